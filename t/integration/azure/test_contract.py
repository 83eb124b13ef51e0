"""The suites that the fake Blob service passes, on Azurite; with the account's key: ``test_azureblockblob.py``."""
from __future__ import annotations

import uuid

import pytest
from azure.storage.blob import BlobServiceClient

from celery import Celery
from t.unit.backends.azurestorage.contract import BackendContract
from t.unit.backends.azurestorage.servicecontract import BlobServiceContract


class test_results_with_a_managed_identity(BackendContract):

    @pytest.fixture
    def make_backend(self, azurite, identity):
        def make_backend(**settings):
            url = f'azureblockblob://ManagedIdentityCredential@{azurite.account_url}'
            app = Celery('test', set_as_current=False, backend=url)
            app.conf.update({'azureblockblob_container_name': f'test-{uuid.uuid4().hex}', **settings})
            return app.backend
        return make_backend


class test_the_service(BlobServiceContract):

    @pytest.fixture
    def blob_container(self, azurite, container_name):
        with BlobServiceClient.from_connection_string(azurite.connection_string, retry_total=0) as service:
            yield service.create_container(container_name)
