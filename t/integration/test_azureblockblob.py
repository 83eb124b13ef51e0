"""The azureblockblob result backend on a Blob service: Azurite, or an account of Azure's.

The environment variable ``AZUREBLOCKBLOB_URL`` holds the URL of the backend, as for ``result_backend``, without a
container. For Azurite on its usual port that is ``azureblockblob://UseDevelopmentStorage=true``.
"""
from __future__ import annotations

import os
import uuid
from contextlib import suppress

import pytest

from celery import Celery
from t.unit.backends.azurestorage.contract import BackendContract

client = pytest.importorskip('celery.backends.azurestorage.client')
exceptions = pytest.importorskip('azure.core.exceptions')


class test_AzureBlockBlobBackend(BackendContract):

    @pytest.fixture
    def make_backend(self):
        url = os.environ.get('AZUREBLOCKBLOB_URL')
        if not url:
            pytest.skip('AZUREBLOCKBLOB_URL is not set')
        used = {}

        def make_backend(**settings):
            app = Celery('azureblockblob', set_as_current=False, backend=url)
            app.conf.update({'azureblockblob_container_name': f'celery-{uuid.uuid4().hex}', **settings})
            used[app.conf.azureblockblob_container_name] = app.backend
            return app.backend

        yield make_backend
        for backend in used.values():
            with suppress(exceptions.ResourceNotFoundError):
                backend.container._client.delete_container()
        client.close_clients()
