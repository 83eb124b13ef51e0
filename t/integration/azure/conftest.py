"""A project: an app with a broker, a container and workers of its own."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from t.services.azurite import ROOT
from t.services.broker import broker_settings
from t.services.faults import FaultProxy
from t.services.worker import Worker

from . import app as app_module


class Project:
    """An app in this process, and what workers in others need to run the same.

    Arguments:
        directory: For settings, messages and logs; must exist.
        settings: Settings of Celery, without the broker's.
    """

    def __init__(self, directory: Path, **settings: object):
        self.directory = directory
        self._settings_file = directory / 'settings.json'
        self._settings_file.write_text(json.dumps(broker_settings(directory) | settings))
        self.app = app_module.build_app(self._settings_file)

    def task(self, name: str):
        """Return a task of the app's module."""
        return self.app.tasks[f'{app_module.__name__}.{name}']

    @contextmanager
    def worker(self, pool: str = 'prefork', concurrency: int = 2, module: str = app_module.__name__,
               environ: Mapping[str, str] = MappingProxyType({}), **options) -> Iterator[Worker]:
        """Run a worker; for options see :class:`.Worker`. It is killed in the end, which is quicker than to ask."""
        worker = Worker(module, self.directory, pool=pool, concurrency=concurrency, cwd=ROOT,
                        environ={'AZURE_TESTS_SETTINGS': str(self._settings_file), **environ}, **options)
        worker.start()
        try:
            yield worker
        finally:
            worker.kill()
            print(worker.log[-5000:])  # pytest shows it when the test fails


@pytest.fixture
def proxy(azurite):
    """A proxy before Azurite that hands everything on, until a test adds rules."""
    from celery.backends.azurestorage.client import close_clients
    with FaultProxy(azurite.account_url, azurite.certificates) as proxy:
        yield proxy
        close_clients()  # first: a read may still be under way when another has failed


@pytest.fixture
def proxied_url_for(url_for, azurite, proxy):
    """Return a function like `url_for`'s, for URLs that lead through the proxy."""
    return lambda *args, **options: url_for(*args, **options).replace(azurite.account_url, proxy.account_url)


@pytest.fixture
def make_project(tmp_path, url_for, identity):
    """Return a function that makes the project of the test, with a managed identity and settings of Celery."""
    projects = []

    def make_project(make=Project, **settings):
        directory = tmp_path / 'project'
        directory.mkdir()
        projects.append(make(directory, **{'result_backend': url_for('ManagedIdentityCredential'), **settings}))
        return projects[-1]

    yield make_project
    for project in projects:
        project.app.close()


@pytest.fixture
def project(make_project):
    """The test's project, with default settings."""
    return make_project()
