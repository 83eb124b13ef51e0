"""Fixtures: backends on a fake Azure Blob service, and nothing that reaches a network."""
from __future__ import annotations

import itertools
import socket
import threading
from contextlib import contextmanager

import pytest

from celery import Celery

#: The account of the fake service; the key opens nothing.
ACCOUNT_URL = 'https://fake.blob.core.windows.net'
URL = f'azureblockblob://fake:a2V5@{ACCOUNT_URL}'


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail what opens a connection."""
    def refuse(*args, **kwargs):
        raise AssertionError('A unit test opens a connection.')
    for name in ('connect', 'connect_ex'):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.fixture
def fake_service(monkeypatch):
    """An Azure Blob service in memory, which all clients of this test talk to."""
    client = pytest.importorskip('celery.backends.azurestorage.client')
    from .fakeblob import FakeBlobService
    service = FakeBlobService()
    monkeypatch.setattr(client, 'HTTPAdapter', service.adapter)
    yield service
    client.close_clients()


@pytest.fixture
def make_app(fake_service):
    """Return a function that makes apps with results on the fake service. Settings are those of Celery."""
    apps = []
    numbers = itertools.count()

    def make(**settings):
        app = Celery('azure', set_as_current=False)
        app.conf.update({
            'broker_url': 'memory://',
            'result_backend': URL,
            'azureblockblob_container_name': f'results-{next(numbers)}',
            'azureblockblob_retry_initial_backoff_sec': 0,
            'azureblockblob_retry_increment_base': 0,
            **settings})
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


@pytest.fixture
def azure_app(make_app):
    """An app with results on the fake service."""
    return make_app()


@pytest.fixture
def make_backend(make_app):
    """Return a function that makes the backend of a new app, by default on a container that is not there yet."""
    return lambda **settings: make_app(**settings).backend


@pytest.fixture
def no_chord_pauses(monkeypatch):
    """Repeat what fails at a chord ten times, without pauses."""
    from celery.backends.azurestorage import chordend, chordlog
    for module in (chordlog, chordend):
        monkeypatch.setattr(module, 'pauses', lambda longest=0: iter([0] * 10))
    monkeypatch.setattr(chordend, 'CLAIM_INTERVAL', 0)
    monkeypatch.setattr(chordend, 'GRACE', 0)


@pytest.fixture
def no_more_threads(monkeypatch):
    """Return a context manager in which the process can start no thread."""
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    @contextmanager
    def no_more_threads():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, 'start', refuse)
            yield
    return no_more_threads


@pytest.fixture
def make_worker(make_app):
    """Return a function that makes a worker which counts chords by their log."""
    from .chordworker import ChordWorker, chord_app
    return lambda **settings: ChordWorker(chord_app(make_app, **settings))


@pytest.fixture
def worker(make_worker):
    """A worker that counts chords by their log."""
    return make_worker()
