"""How the ``azureblockblob`` result backend reaches Azure Blob Storage.

:mod:`~celery.backends.azureblockblob` is what Celery calls; the modules here are its parts and nothing else uses
them. Each imports only those below it::

    chords          what a worker does with the log of a chord
    chordlog        the parts of a chord, in one append blob
    client          one BlobServiceClient per process, account and identity
    credentials     the credentials that a URL may name, built with azure-identity
    errors          which errors are temporary, and what to tell the user about the others
    url             backend URL -> frozen value; masking. No I/O, no Azure import
    options         names, defaults, units and checks of settings and credential options
"""
