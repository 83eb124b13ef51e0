"""An app on Celery's own module, as it is released, for workers: ``celery -A t.integration.azure.released_app``.

It has the settings of :mod:`.app`, but for the backend, which ``AZURE_TESTS_CONNECTION_STRING`` and
``AZURE_TESTS_CONTAINER`` lead to.
"""
from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from celery.backends.azureblockblob import AzureBlockBlobBackend

from .app import build_app


def make_backend(app: Celery, url: None) -> AzureBlockBlobBackend:
    """Return a backend of the module that Celery imports if nobody has put another one in its place."""
    return AzureBlockBlobBackend(
        app=app, url=f'azureblockblob://{os.environ["AZURE_TESTS_CONNECTION_STRING"]}',
        container_name=os.environ['AZURE_TESTS_CONTAINER'])


app = build_app(Path(os.environ['AZURE_TESTS_SETTINGS']))
app.conf.result_backend = make_backend
