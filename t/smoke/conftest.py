"""pytest-celery's clusters of a folder, Azurite and a worker process.

Its plugin is not on by itself, so that its fixtures shadow no others: ``pytest -p pytest_celery.plugin t/smoke``.
"""
from __future__ import annotations

import json

import pytest
from pytest_celery import CeleryTestBackend, CeleryTestBroker, CeleryTestWorker
from pytest_celery.vendors.worker import tasks

from t.integration.azure import app as worker_app
from t.services.azurite import ROOT
from t.services.broker import broker_settings
from t.services.fixtures import *  # noqa: F403  (fixtures)
from t.services.worker import Worker

from .nodes import FolderContainer, ProcessContainer, WorkerContainer


@pytest.fixture
def settings(tmp_path):
    """Settings for the broker, and for what pytest-celery's setup pings."""
    return broker_settings(tmp_path) | {'include': [tasks.__name__]}


@pytest.fixture
def celery_broker(settings):
    """The only broker."""
    return CeleryTestBroker(FolderContainer(settings['broker_url']))


@pytest.fixture
def celery_backend(azurite, identity, url_for):
    """The only backend."""
    return CeleryTestBackend(ProcessContainer(azurite, url_for('ManagedIdentityCredential')))


@pytest.fixture
def celery_setup_config(celery_setup_config, settings):
    """The configuration of the app, here and in the worker."""
    return settings | celery_setup_config


@pytest.fixture
def celery_worker(tmp_path, celery_setup_config, celery_setup_app):
    """The only worker."""
    settings_file = tmp_path / 'settings.json'
    settings_file.write_text(json.dumps(celery_setup_config))
    worker = Worker(worker_app.__name__, tmp_path, environ={'AZURE_TESTS_SETTINGS': str(settings_file)}, cwd=ROOT)
    worker.start()
    node = CeleryTestWorker(WorkerContainer(worker), celery_setup_app)
    yield node
    node.teardown()
