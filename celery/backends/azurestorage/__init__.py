"""How the ``azureblockblob`` result backend reaches Azure Blob Storage.

:mod:`~celery.backends.azureblockblob` is what Celery calls; the modules here are its parts and nothing else uses
them. Each imports only those below it::

    expiry          deleting what has expired
    chords          what starts a chord, and what each of its parts does when it has finished
    chordend        starting the body when all parts are there, once
    chordpart       adding a finished part to the log of its chord
    chordmessage    what the messages of a chord say of it
    chordheader     what the log of a chord says of its parts
    chordlog        the log of a chord, an append blob
    client          one BlobServiceClient per process, account and identity
    errors          which errors are temporary, and what to tell the user about the others
    credentials     the credentials that a URL may name, built with azure-identity
    url             backend URL -> frozen value; masking. No I/O, no Azure import
    options         names, defaults, units and checks of settings and credential options
"""
