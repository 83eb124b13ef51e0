"""Every credential of the table: the real class of azure-identity stores and reads a result on Azurite."""
from __future__ import annotations

import logging
import shlex
import sys
import threading
import time
import types
from contextlib import contextmanager

import pytest
from azure.core.credentials import AccessToken
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

from celery import Celery
from celery.exceptions import ImproperlyConfigured
from t.services.service import wait_until
from t.services.tokens import AUDIENCE, CLIENT_ID, TENANT, make_token, read_claims

CLIENT = 'b2f6c1a5-9f60-4f0e-8b1c-52d9a3d2c7aa'
OBJECT = '0d9a9f4e-6a61-4b59-9d0f-2f0e4ce3a5bb'
RESOURCE = '/subscriptions/s/resourceGroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/celery'
ALIEN_TENANT = '5f1c0d0b-76c2-4d58-8a6e-0a4b8c2f9dcc'

#: Keeps azure-identity from asking the public cloud about the local authority.
LOCAL = {'disable_instance_discovery': 'true'}

#: Members of the chain that look for something on this machine.
MEMBERS = {
    'environment': 'exclude_environment_credential',
    'workload identity': 'exclude_workload_identity_credential',
    'managed identity': 'exclude_managed_identity_credential',
    'az': 'exclude_cli_credential',
    'powershell': 'exclude_powershell_credential',
    'azd': 'exclude_developer_cli_credential',
}


def store_and_read(backend):
    """Store a result and read it, both on Azurite."""
    backend.store_result('task', {'some': 'value'}, 'SUCCESS')
    return backend.get_result('task')


def asks(request):
    """Return what a request for a token asks for, but for what all of them do."""
    return {name: value for name, value in request.parameters.items() if name not in ('api-version', 'resource')}


@contextmanager
def fails(error, *words, within=30):
    """Expect an error that names all of `words`, in less than `within` seconds."""
    begun = time.monotonic()
    with pytest.raises(error) as caught:
        yield
    assert time.monotonic() - begun < within
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.fixture
def token_file(tmp_path):
    """The token of a Kubernetes service account."""
    file = tmp_path / 'service-account-token'
    file.write_text(make_token(audience='api://AzureADTokenExchange'))
    return file


@pytest.fixture
def principal(authority, monkeypatch):
    """Return a function that describes a service principal in the environment."""
    def principal(**variables):
        for name, value in {'CLIENT_ID': CLIENT_ID, **variables}.items():
            monkeypatch.setenv(f'AZURE_{name}', str(value))
    return principal


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The only directory on the PATH."""
    directory = tmp_path / 'commands'
    directory.mkdir()
    monkeypatch.setenv('PATH', str(directory))
    return directory


@pytest.fixture
def command(commands):
    """Return a function that makes a command which prints something."""
    def command(name, output):
        file = commands / name
        file.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(output)}\n")
        file.chmod(0o755)
    return command


@pytest.fixture
def no_managed_identity(metadata_service):
    """A virtual machine without a managed identity."""
    metadata_service.status = 400


class test_ManagedIdentityCredential:

    @pytest.mark.parametrize(('options', 'asked'), [
        ({}, {}),
        ({'client_id': CLIENT}, {'client_id': CLIENT}),
        ({'object_id': OBJECT}, {'object_id': OBJECT}),
        ({'resource_id': RESOURCE}, {'mi_res_id': RESOURCE}),
    ], ids=['system', 'client_id', 'object_id', 'resource_id'])
    def test_app_service_is_asked_for_this_identity(self, connect, identity, options, asked):
        assert store_and_read(connect('ManagedIdentityCredential', **options)) == {'some': 'value'}
        assert [asks(request) for request in identity.requests] == [asked]

    @pytest.mark.parametrize(('options', 'asked'), [
        ({}, {}),
        ({'client_id': CLIENT}, {'client_id': CLIENT}),
        ({'object_id': OBJECT}, {'object_id': OBJECT}),
        ({'resource_id': RESOURCE}, {'msi_res_id': RESOURCE}),
    ], ids=['system', 'client_id', 'object_id', 'resource_id'])
    def test_a_virtual_machine_is_asked_for_this_identity(self, connect, metadata_service, options, asked):
        assert store_and_read(connect('ManagedIdentityCredential', **options)) == {'some': 'value'}
        assert [asks(request) for request in metadata_service.requests] == [asked]

    def test_the_token_is_for_azure_storage(self, connect, identity):
        store_and_read(connect('ManagedIdentityCredential'))
        assert identity.requests[0].parameters['resource'] == AUDIENCE

    def test_the_token_is_asked_anew_when_it_expires(self, connect, identity):
        identity.lifetime = 2
        backend = connect('ManagedIdentityCredential')
        backend.get('key')
        first = len(identity.requests)

        def asked_again():
            backend.get('key')
            return len(identity.requests) > first

        wait_until(asked_again, 'another token', 30)
        assert store_and_read(backend) == {'some': 'value'}


class test_WorkloadIdentityCredential:

    def test_options_in_the_url(self, connect, authority, token_file):
        backend = connect('WorkloadIdentityCredential', tenant_id=TENANT, client_id=CLIENT,
                          token_file_path=token_file, authority=authority.url, **LOCAL)
        assert store_and_read(backend) == {'some': 'value'}
        form = authority.requests[-1].parameters
        assert (form['client_id'], form['client_assertion']) == (CLIENT, token_file.read_text())

    def test_options_in_the_environment(self, connect, authority, principal, token_file):
        principal(FEDERATED_TOKEN_FILE=token_file)
        assert store_and_read(connect('WorkloadIdentityCredential', **LOCAL)) == {'some': 'value'}
        assert authority.requests[-1].parameters['client_assertion'] == token_file.read_text()

    def test_options_that_are_missing(self, connect):
        backend = connect('WorkloadIdentityCredential', client_id=CLIENT, **LOCAL)
        with pytest.raises(ImproperlyConfigured, match='AZURE_TENANT_ID.*AZURE_FEDERATED_TOKEN_FILE'):
            backend.get('key')


class test_EnvironmentCredential:

    def test_a_client_secret(self, connect, authority, principal):
        principal(CLIENT_SECRET='of the test')
        assert store_and_read(connect('EnvironmentCredential', **LOCAL)) == {'some': 'value'}
        form = authority.requests[-1].parameters
        assert (form['client_id'], form['client_secret']) == (CLIENT_ID, 'of the test')

    def test_a_certificate(self, connect, authority, principal, certificates):
        principal(CLIENT_CERTIFICATE_PATH=certificates.client)
        assert store_and_read(connect('EnvironmentCredential', **LOCAL)) == {'some': 'value'}
        assert read_claims(authority.requests[-1].parameters['client_assertion'])['iss'] == CLIENT_ID

    def test_an_authority_in_the_url(self, connect, authority, principal, monkeypatch):
        monkeypatch.delenv('AZURE_AUTHORITY_HOST')
        principal(CLIENT_SECRET='of the test')
        backend = connect('EnvironmentCredential', authority=authority.url, **LOCAL)
        assert store_and_read(backend) == {'some': 'value'}

    def test_nothing_in_the_environment(self, connect):
        with pytest.raises(ClientAuthenticationError, match='EnvironmentCredential.*environment variables'):
            store_and_read(connect('EnvironmentCredential', **LOCAL))


class test_CertificateCredential:

    def options(self, certificates):
        return {'tenant_id': TENANT, 'client_id': CLIENT, 'certificate_path': certificates.client, **LOCAL}

    def test_a_certificate(self, connect, authority, certificates):
        assert store_and_read(connect('CertificateCredential', **self.options(certificates))) == {'some': 'value'}
        form = authority.requests[-1].parameters
        assert (form['client_id'], read_claims(form['client_assertion'])['iss']) == (CLIENT, CLIENT)

    def test_a_file_that_is_missing(self, connect, authority, certificates):
        options = self.options(certificates) | {'certificate_path': '/nowhere/client.pem'}
        with pytest.raises(ImproperlyConfigured, match='CertificateCredential.*/nowhere/client.pem'):
            store_and_read(connect('CertificateCredential', **options))


class test_AzureCliCredential:

    def test_whoever_is_signed_in(self, connect, azure_cli):
        assert store_and_read(connect('AzureCliCredential')) == {'some': 'value'}
        assert azure_cli.calls == [f'account get-access-token --output json --resource {AUDIENCE}']

    def test_tenant_and_subscription(self, connect, azure_cli):
        backend = connect('AzureCliCredential', tenant_id=TENANT, subscription='sub')
        assert store_and_read(backend) == {'some': 'value'}
        assert azure_cli.calls[0].endswith(f'--tenant {TENANT} --subscription sub')


class test_DefaultAzureCredential:
    """Each member of the chain that works where nobody is at the keyboard, and outside Windows."""

    def connect_to(self, connect, member):
        """Connect with the members that are asked before `member`, and `member` itself."""
        asked_later = list(MEMBERS.values())[list(MEMBERS).index(member) + 1:]
        return connect('DefaultAzureCredential', **LOCAL, **dict.fromkeys(asked_later, 'true'))

    def test_environment(self, connect, principal, authority):
        principal(CLIENT_SECRET='of the test')
        assert store_and_read(self.connect_to(connect, 'environment')) == {'some': 'value'}
        assert authority.requests[-1].parameters['client_secret'] == 'of the test'

    def test_workload_identity(self, connect, principal, authority, token_file):
        principal(FEDERATED_TOKEN_FILE=token_file)
        assert store_and_read(self.connect_to(connect, 'workload identity')) == {'some': 'value'}
        assert authority.requests[-1].parameters['client_assertion'] == token_file.read_text()

    def test_managed_identity(self, connect, identity):
        assert store_and_read(self.connect_to(connect, 'managed identity')) == {'some': 'value'}
        assert [asks(request) for request in identity.requests] == [{}]

    def test_managed_identity_of_a_virtual_machine(self, connect, metadata_service):
        assert store_and_read(self.connect_to(connect, 'managed identity')) == {'some': 'value'}
        assert [asks(request) for request in metadata_service.requests] == [{}]

    @pytest.mark.parametrize('option', ['client_id', 'managed_identity_client_id'])
    def test_managed_identity_by_client_id(self, connect, identity, option):
        assert store_and_read(connect('DefaultAzureCredential', **{option: CLIENT})) == {'some': 'value'}
        assert [asks(request) for request in identity.requests] == [{'client_id': CLIENT}]

    def test_workload_identity_by_client_id(self, connect, principal, authority, token_file):
        principal(FEDERATED_TOKEN_FILE=token_file)
        backend = connect('DefaultAzureCredential', workload_identity_client_id=CLIENT, **LOCAL)
        assert store_and_read(backend) == {'some': 'value'}
        assert authority.requests[-1].parameters['client_id'] == CLIENT

    def test_azure_cli(self, connect, azure_cli, no_managed_identity):
        assert store_and_read(self.connect_to(connect, 'az')) == {'some': 'value'}
        assert len(azure_cli.calls) == 1

    def test_azure_powershell(self, connect, command, no_managed_identity):
        command('pwsh', f'azsdk%{make_token()}%{int(time.time()) + 3600}')
        assert store_and_read(self.connect_to(connect, 'powershell')) == {'some': 'value'}

    def test_azure_developer_cli(self, connect, command, no_managed_identity):
        command('azd', f'{{"token": "{make_token()}", "expiresOn": "2100-01-01T00:00:00Z"}}')
        assert store_and_read(self.connect_to(connect, 'azd')) == {'some': 'value'}

    def test_members_that_are_left_out_are_not_asked(self, connect, identity, azure_cli):
        backend = connect('DefaultAzureCredential', exclude_managed_identity_credential='true')
        assert store_and_read(backend) == {'some': 'value'}
        assert (len(identity.requests), len(azure_cli.calls)) == (0, 1)

    def test_nobody_answers(self, connect, no_managed_identity, commands):
        with fails(ClientAuthenticationError, 'DefaultAzureCredential could not get a token',
                   'EnvironmentCredential', 'WorkloadIdentityCredential', 'ManagedIdentityCredential',
                   'AzureCliCredential'):
            store_and_read(connect('DefaultAzureCredential'))


class Credential:
    """A credential of the user's own, as simple as azure-core allows."""

    def __init__(self, lifetime=3600):
        self.lifetime = lifetime
        self.asked = 0

    def get_token(self, *scopes, **kwargs):
        assert scopes == (f'{AUDIENCE}/.default',)
        self.asked += 1
        return AccessToken(make_token(), int(time.time()) + self.lifetime)


class test_azureblockblob_credential:

    def connect(self, connect, credential):
        return connect('', settings={'azureblockblob_credential': credential})

    def test_an_object(self, connect):
        credential = Credential()
        assert store_and_read(self.connect(connect, credential)) == {'some': 'value'}
        assert credential.asked == 1

    def test_a_callable(self, connect):
        assert store_and_read(self.connect(connect, Credential)) == {'some': 'value'}

    @pytest.mark.parametrize('value', [Credential(), Credential, lambda: Credential()],
                             ids=['of an object', 'of a class', 'of a function'])
    def test_a_dotted_path(self, connect, monkeypatch, value):
        module = types.ModuleType('identity_of_the_project')
        module.credential = value
        monkeypatch.setitem(sys.modules, module.__name__, module)
        backend = self.connect(connect, 'identity_of_the_project.credential')
        assert store_and_read(backend) == {'some': 'value'}

    def test_a_credential_that_fails(self, connect):
        class Broken(Credential):
            def get_token(self, *scopes, **kwargs):
                raise RuntimeError('the vault is sealed')
        with pytest.raises(AzureError, match='azureblockblob_credential.*Broken.*the vault is sealed'):
            store_and_read(self.connect(connect, Broken()))


class test_what_an_error_says:
    """Which credential was asked, and why there is no token or why it is not accepted."""

    def test_a_tenant_that_is_not_there(self, connect, authority, principal):
        principal(CLIENT_SECRET='of the test', TENANT_ID=ALIEN_TENANT)
        with fails(ClientAuthenticationError, 'EnvironmentCredential', ALIEN_TENANT):
            store_and_read(connect('EnvironmentCredential', **LOCAL))

    def test_an_issuer_that_the_account_does_not_trust(self, connect, identity):
        identity.issuer = 'https://login.example.org/'
        with fails(HttpResponseError, 'ManagedIdentityCredential', 'AuthenticationFailed'):
            store_and_read(connect('ManagedIdentityCredential'))

    def test_an_expired_token(self, connect):
        class Late(Credential):
            def get_token(self, *scopes, **kwargs):
                return AccessToken(make_token(lifetime=-60), int(time.time()) + 3600)
        with fails(HttpResponseError, 'Late', 'AuthenticationFailed', 'clock'):
            store_and_read(connect('', settings={'azureblockblob_credential': Late()}))

    def test_an_endpoint_that_is_down(self, connect, identity):
        backend = connect('ManagedIdentityCredential', client_id=CLIENT)
        identity.stop()
        with fails(AzureError, 'ManagedIdentityCredential', CLIENT, 'refused'):
            store_and_read(backend)

    def test_an_endpoint_that_refuses(self, connect, identity):
        identity.status = 400
        with fails(ClientAuthenticationError, 'ManagedIdentityCredential', '400'):
            store_and_read(connect('ManagedIdentityCredential'))

    def test_an_endpoint_that_is_slow(self, connect, identity):
        identity.delay = 20
        with fails(AzureError, 'ManagedIdentityCredential', 'timed out'):
            store_and_read(connect('ManagedIdentityCredential', read_timeout=1))

    def test_a_sign_in_service_that_is_down(self, connect, authority, principal):
        principal(CLIENT_SECRET='of the test')
        backend = connect('EnvironmentCredential', **LOCAL)
        authority.stop()
        with fails(AzureError, 'EnvironmentCredential', 'refused'):
            store_and_read(backend)

    def test_az_that_fails(self, connect, azure_cli):
        azure_cli.fail('ERROR: AADSTS70043: The refresh token has expired.')
        with fails(ClientAuthenticationError, 'AzureCliCredential', 'AADSTS70043'):
            store_and_read(connect('AzureCliCredential'))

    def test_az_where_nobody_is_signed_in(self, connect, azure_cli):
        azure_cli.fail("ERROR: Please run 'az login' to setup account.")
        with fails(ClientAuthenticationError, 'AzureCliCredential', 'az login'):
            store_and_read(connect('AzureCliCredential'))

    def test_az_that_hangs(self, connect, azure_cli):
        azure_cli.hang()
        with fails(ClientAuthenticationError, 'AzureCliCredential', 'Failed to invoke'):
            store_and_read(connect('AzureCliCredential', process_timeout=1))

    def test_az_that_is_not_installed(self, connect, commands):
        with fails(ClientAuthenticationError, 'AzureCliCredential', 'not found'):
            store_and_read(connect('AzureCliCredential'))


class test_many_threads_at_once:

    THREADS = 32

    def store_in_threads(self, app):
        """Store a result from each of many threads that begin together, with a backend each."""
        start = threading.Barrier(self.THREADS)
        errors = []

        def store(number):
            start.wait(30)
            try:
                app.backend.store_result(f'task-{number}', number, 'SUCCESS')
            except Exception as exc:
                errors.append(exc)

        threads = [threading.Thread(target=store, args=(number,)) for number in range(self.THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return errors

    def test_one_token_is_asked_and_little_is_logged(self, url_for, identity, caplog):
        app = Celery('test', set_as_current=False, backend=url_for('ManagedIdentityCredential'))
        with caplog.at_level(logging.INFO):
            assert self.store_in_threads(app) == []
        assert len(identity.requests) == 1
        assert len(caplog.records) <= 5
        assert [app.backend.get_result(f'task-{number}') for number in range(self.THREADS)] == [*range(self.THREADS)]

    def test_threads_that_wait_together_get_one_error(self, url_for, identity):
        identity.status, identity.delay = 400, 1
        app = Celery('test', set_as_current=False, backend=url_for('ManagedIdentityCredential'))
        errors = self.store_in_threads(app)
        assert len(errors) == self.THREADS
        assert all('ManagedIdentityCredential could not get a token' in str(error) for error in errors)
        assert len(identity.requests) == 1
