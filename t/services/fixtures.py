"""Fixtures of the suites that run on real services: their conftest.py files import them."""
from __future__ import annotations

import os
import uuid
from urllib.parse import urlencode

import pytest
from azure.storage.blob import BlobServiceClient

from celery import Celery

from .authority import Authority
from .azure_cli import AzureCli
from .azurite import Azurite
from .certificates import make_certificates
from .identity import IdentityEndpoint
from .metadata import MetadataService
from .service import ServiceUnavailable

__all__ = (
    'authority', 'azure_cli', 'azurite', 'certificates', 'clean_environment', 'connect', 'container',
    'container_name', 'identity', 'metadata_service', 'services_environment', 'url_for',
)

#: What leads azure-identity to an identity of the machine that the tests run on.
IDENTITY_VARIABLES = ('AZURE_', 'IDENTITY_', 'IMDS_', 'MSI_')


def services_required() -> bool:
    """Tell whether a service that cannot be started fails the tests, rather than skips them."""
    return any(os.environ.get(name, '').lower() in ('1', 'true') for name in ('AZURE_TESTS_REQUIRE_SERVICES', 'CI'))


def give_up(reason: str) -> None:
    """End a test, or all that share a fixture, for something that is missing: a failure where it is required."""
    if services_required():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope='session')
def certificates(tmp_path_factory):
    """The certificates of all services."""
    return make_certificates(tmp_path_factory.mktemp('certificates'))


@pytest.fixture(scope='session')
def azurite(tmp_path_factory, certificates):
    """Azurite, over TLS and with OAuth."""
    service = Azurite(tmp_path_factory.mktemp('azurite'), certificates)
    try:
        service.start()
    except ServiceUnavailable as exc:
        give_up(str(exc))
    yield service
    service.stop()


@pytest.fixture(scope='session')
def services_environment(azurite):
    """The environment in which Azurite is trusted, and found by the tests that know no other fixture."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in azurite.environ.items():
            patch.setenv(name, value)
        patch.setenv('AZUREBLOCKBLOB_URL', f'azureblockblob://{azurite.connection_string}')
        yield


@pytest.fixture
def clean_environment(monkeypatch):
    """An environment without any identity, and a process without clients before and after the test."""
    from celery.backends.azurestorage.client import close_clients
    for name in os.environ:
        if name.startswith(IDENTITY_VARIABLES) and name != 'AZURE_TESTS_REQUIRE_SERVICES':
            monkeypatch.delenv(name)
    close_clients()
    yield
    close_clients()


def enter(monkeypatch, service):
    """Put the environment variables that lead to `service` into this process, and return the service."""
    for name, value in service.environ.items():
        monkeypatch.setenv(name, value)
    return service


@pytest.fixture
def identity(services_environment, clean_environment, monkeypatch):
    """Where this process gets tokens for managed identities, as on App Service."""
    with IdentityEndpoint() as service:
        yield enter(monkeypatch, service)


@pytest.fixture
def metadata_service(services_environment, clean_environment, monkeypatch):
    """Where this process gets tokens for managed identities, as on a virtual machine."""
    with MetadataService() as service:
        yield enter(monkeypatch, service)


@pytest.fixture
def authority(certificates, services_environment, clean_environment, monkeypatch):
    """The sign-in service."""
    with Authority(certificates) as service:
        yield enter(monkeypatch, service)


@pytest.fixture
def azure_cli(tmp_path, services_environment, clean_environment, monkeypatch):
    """An ``az`` on the PATH."""
    directory = tmp_path / 'bin'
    directory.mkdir()
    return enter(monkeypatch, AzureCli(directory))


@pytest.fixture
def container_name():
    """The name of a container that is not there yet."""
    return f'test-{uuid.uuid4().hex}'


@pytest.fixture
def container(azurite, container_name, services_environment):
    """The SDK's own client of the test's container, with the account's key: to see what is in it."""
    with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        yield service.get_container_client(container_name)


@pytest.fixture
def url_for(azurite, container_name, services_environment):
    """Return a function that makes backend URLs for the test's container."""
    def url_for(credential: str = f'{azurite.account_name}:{azurite.account_key}', **options: object) -> str:
        query = urlencode({'container_name': container_name, **options})
        user = f'{credential}@' if credential else ''
        return f'azureblockblob://{user}{azurite.account_url}?{query}'
    return url_for


@pytest.fixture
def connect(url_for, clean_environment):
    """Return a function that returns the backend of a new app, for a credential and options of the URL."""
    def connect(*credential: str, settings: dict[str, object] | None = None, **options: object):
        app = Celery('test', set_as_current=False, backend=url_for(*credential, **options))
        app.conf.update(settings or {})
        return app.backend
    return connect
