"""Credentials: what reaches azure-identity, what it then asks for, and who asks. The network is played by `wire`."""
from __future__ import annotations

import datetime
import io
import json
import logging
import os
import re
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import create_autospec
from urllib.parse import parse_qs, urlsplit

import pytest

from celery import Celery
from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded

pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

import requests
from azure import identity
from azure.core.credentials import AccessToken, AccessTokenInfo
from azure.core.exceptions import ClientAuthenticationError
from urllib3 import HTTPResponse

from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage import credentials
from celery.backends.azurestorage.credentials import (
    CREDENTIAL_OPTIONS,
    CREDENTIALS,
    RENEW_BEFORE_EXPIRY,
    RENEWAL_PAUSE,
    SharedCredential,
    TokenError,
    build_credential,
)
from celery.backends.azurestorage.url import parse_url

HOST = 'https://myaccount.blob.core.windows.net'
ACCOUNT_URL = f'azureblockblob://{HOST}'
SCOPE = 'https://storage.azure.com/.default'
THREADS = 32
PATIENCE = 30  # seconds

logger = logging.getLogger('test.azureblockblob')

#: What each option of each credential becomes: queries of the URL, and the keyword arguments of azure-identity.
KEYWORDS = [
    ('DefaultAzureCredential', '', {}),
    ('DefaultAzureCredential', 'client_id=a',
     {'managed_identity_client_id': 'a', 'workload_identity_client_id': 'a'}),
    ('DefaultAzureCredential',
     'managed_identity_client_id=a&workload_identity_client_id=b&workload_identity_tenant_id=c',
     {'managed_identity_client_id': 'a', 'workload_identity_client_id': 'b', 'workload_identity_tenant_id': 'c'}),
    ('DefaultAzureCredential',
     'authority=login.microsoftonline.us&disable_instance_discovery=true&process_timeout=3',
     {'authority': 'login.microsoftonline.us', 'disable_instance_discovery': True, 'process_timeout': 3}),
    *(('DefaultAzureCredential', f'{option}=true', {option: True})
      for option in CREDENTIAL_OPTIONS['DefaultAzureCredential'] if option.startswith('exclude_')),
    ('ManagedIdentityCredential', '', {}),
    ('ManagedIdentityCredential', 'client_id=a', {'client_id': 'a'}),
    ('ManagedIdentityCredential', 'object_id=a', {'identity_config': {'object_id': 'a'}}),
    ('ManagedIdentityCredential', 'resource_id=/a', {'identity_config': {'resource_id': '/a'}}),
    ('WorkloadIdentityCredential', 'tenant_id=a&client_id=b&token_file_path=/c',
     {'tenant_id': 'a', 'client_id': 'b', 'token_file_path': '/c'}),
    ('WorkloadIdentityCredential',
     'tenant_id=a&client_id=b&token_file_path=/c&authority=login.microsoftonline.us&disable_instance_discovery=on',
     {'tenant_id': 'a', 'client_id': 'b', 'token_file_path': '/c', 'authority': 'login.microsoftonline.us',
      'disable_instance_discovery': True}),
    ('EnvironmentCredential', 'authority=login.microsoftonline.us&disable_instance_discovery=no',
     {'authority': 'login.microsoftonline.us', 'disable_instance_discovery': False}),
    ('CertificateCredential', 'tenant_id=a&client_id=b&certificate_path=CERTIFICATE&send_certificate_chain=true'
     '&authority=login.microsoftonline.us&disable_instance_discovery=1',
     {'tenant_id': 'a', 'client_id': 'b', 'certificate_path': 'CERTIFICATE', 'send_certificate_chain': True,
      'authority': 'login.microsoftonline.us', 'disable_instance_discovery': True}),
    ('AzureCliCredential', '', {}),
    ('AzureCliCredential', 'tenant_id=a&subscription=b%20c&process_timeout=3',
     {'tenant_id': 'a', 'subscription': 'b c', 'process_timeout': 3}),
]

#: Members of the default chain, by the option that leaves each out. Some are there on Windows only.
MEMBERS = {
    'exclude_environment_credential': 'EnvironmentCredential',
    'exclude_workload_identity_credential': ('WorkloadIdentityCredential', 'FailedDACCredential'),
    'exclude_managed_identity_credential': 'ManagedIdentityCredential',
    'exclude_visual_studio_code_credential': 'VisualStudioCodeCredential',
    'exclude_cli_credential': 'AzureCliCredential',
    'exclude_powershell_credential': 'AzurePowerShellCredential',
    'exclude_developer_cli_credential': 'AzureDeveloperCliCredential',
    'exclude_broker_credential': 'BrokerCredential',
}


class Credential:
    """A credential of a user's own, which gives tokens in turn; an exception among them is raised."""

    def __init__(self, *answers):
        self.answers = list(answers) or [make_token('token')]
        self.asked = []
        self.closed = False

    def get_token_info(self, *scopes, options=None):
        self.asked.append((scopes, dict(options or {})))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def get_token(self, *scopes, **kwargs):
        raise AssertionError('The SDK asks for get_token_info where it is there.')

    def close(self):
        self.closed = True


class OldCredential:
    """A credential with nothing but get_token."""

    def get_token(self, *scopes, claims=None, tenant_id=None, **kwargs):
        return AccessToken(f'{scopes[0]} {tenant_id}', 2000)


class AsyncCredential:

    async def get_token(self, *scopes, **kwargs):
        return AccessToken('token', 2000)


def make_token(text, expires_on=None, refresh_on=None):
    return AccessTokenInfo(text, int(expires_on or time.time() + 3600), refresh_on=refresh_on)


CREDENTIAL = Credential()
SOMETHING, NOTHING = object(), None


def give_credential():
    return CREDENTIAL


def give_nothing():
    return None


def give_for(tenant_id):
    return CREDENTIAL


def parse(name, query=''):
    return parse_url(f'azureblockblob://{name}@{HOST}?{query}', CREDENTIAL_OPTIONS)


def build(name, query=''):
    """Return the credential of azure-identity that a URL leads to."""
    return build_credential(parse(name, query), None, logger).credential


def make_backend(url=ACCOUNT_URL, credential=None):
    app = Celery('azure', set_as_current=False)
    app.conf.azureblockblob_credential = credential
    return AzureBlockBlobBackend(app=app, url=url)


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, 'It took too long.'
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Take away what azure-identity reads of the environment."""
    for name in ('AZURE_AUTHORITY_HOST', 'AZURE_CLIENT_CERTIFICATE_PATH', 'AZURE_CLIENT_ID', 'AZURE_CLIENT_SECRET',
                 'AZURE_FEDERATED_TOKEN_FILE', 'AZURE_TENANT_ID', 'AZURE_TOKEN_CREDENTIALS', 'AZURE_USERNAME',
                 'IDENTITY_ENDPOINT', 'IDENTITY_HEADER', 'IDENTITY_SERVER_THUMBPRINT', 'IMDS_ENDPOINT',
                 'MSI_ENDPOINT', 'MSI_SECRET'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wire(monkeypatch):
    """What azure-identity sends, each answered as the sign-in service or an identity endpoint would."""
    sent = []

    def send(adapter, request, **kwargs):
        sent.append(request)
        parts = urlsplit(request.url)
        answers = {
            'openid-configuration': {
                name: f'{parts.scheme}://{parts.netloc}/{name}'
                for name in ('authorization_endpoint', 'token_endpoint', 'device_authorization_endpoint', 'issuer')},
            'instance': {
                'tenant_discovery_endpoint': f'https://{parts.netloc}/common/v2.0/.well-known/openid-configuration',
                'metadata': []},
        }
        token = {'access_token': 'token', 'token_type': 'Bearer', 'expires_in': 3600,
                 'expires_on': int(time.time()) + 3600, 'resource': SCOPE}
        content = json.dumps(answers.get(parts.path.rpartition('/')[2], token)).encode()
        return adapter.build_response(request, HTTPResponse(
            io.BytesIO(content), {'Content-Type': 'application/json'}, 200, preload_content=False))

    monkeypatch.setattr(requests.adapters.HTTPAdapter, 'send', send)
    return sent


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / 'token'
    path.write_text('assertion')
    return path


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    """A file with a certificate of its own making, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'test')])
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1)).sign(
        key, hashes.SHA256())
    path = tmp_path_factory.mktemp('certificate') / 'cert.pem'
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM))
    return path


def ask(credential):
    return credential.get_token_info(SCOPE).token


def bodies(sent):
    """Return the forms that were posted."""
    return [read_form(request.body) for request in sent if request.body]


def queries(sent):
    return [read_form(urlsplit(request.url).query) for request in sent]


def read_form(text):
    return {name: values[0] for name, values in parse_qs(text.decode() if isinstance(text, bytes) else text).items()}


not_on_windows = pytest.mark.skipif(sys.platform == 'win32', reason='A script cannot stand in for az there.')


def make_az(folder, monkeypatch, code):
    """Put an `az` on PATH that runs `code`."""
    script = folder / 'az'
    script.write_text(f'#!{sys.executable}\n{code}\n')
    script.chmod(0o700)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)


class test_Keywords:

    @pytest.mark.parametrize(('name', 'query', 'keywords'), KEYWORDS)
    def test_each_option_reaches_its_keyword(self, name, query, keywords, certificate, monkeypatch):
        real = getattr(identity, name)
        spy = create_autospec(real, side_effect=real)
        monkeypatch.setattr(identity, name, spy)
        path = str(certificate)
        assert isinstance(build(name, query.replace('CERTIFICATE', path)), real)
        expected = {key: path if value == 'CERTIFICATE' else value for key, value in keywords.items()}
        given = dict(spy.call_args.kwargs)
        assert given.pop('logger', logger) is logger
        assert (spy.call_args.args, given) == ((), expected)

    def test_every_option_is_tried_here(self):
        tried = {name: set() for name in CREDENTIALS}
        for name, query, _ in KEYWORDS:
            tried[name] |= set(parse(name, query).options)
        assert tried == {name: set(row.options) for name, row in CREDENTIALS.items()}

    @pytest.mark.parametrize(('name', 'query', 'keywords'), KEYWORDS)
    def test_azure_identity_documents_each_keyword(self, name, query, keywords):
        # It swallows those that it does not know.
        undocumented = {
            ('DefaultAzureCredential', 'disable_instance_discovery'),  # passed on, as tests below show
            ('WorkloadIdentityCredential', 'disable_instance_discovery'),
            ('EnvironmentCredential', 'disable_instance_discovery'),
            ('EnvironmentCredential', 'authority'),
        }
        cls = getattr(identity, name)
        documented = ''.join(base.__doc__ or '' for base in cls.__mro__)
        for keyword in keywords:
            if (name, keyword) not in undocumented:
                assert re.search(rf':(?:param|keyword)[^:]* {keyword}:', documented), keyword

    def test_what_azure_identity_does_not_take_is_an_error(self):
        options = CREDENTIALS['AzureCliCredential'].options
        wrong = {'AzureCliCredential': {**options, 'timeout': options['process_timeout']}}
        url = parse_url(f'azureblockblob://AzureCliCredential@{HOST}?timeout=3', wrong)
        with pytest.raises(ImproperlyConfigured, match="AzureCliCredential: .*unexpected keyword .*'timeout'"):
            build_credential(url, None, logger)


class test_AzureIdentity:
    """What the real classes ask for, and whom."""

    @pytest.mark.parametrize(('query', 'expected'), [
        ('', {}),
        ('client_id=a-1', {'client_id': 'a-1'}),
        ('object_id=a-1', {'object_id': 'a-1'}),
        ('resource_id=/a/b', {'mi_res_id': '/a/b'}),
    ])
    def test_a_managed_identity_is_asked_for_by_its_name(self, query, expected, wire, monkeypatch):
        monkeypatch.setenv('IDENTITY_ENDPOINT', 'http://127.0.0.1/msi/token')
        monkeypatch.setenv('IDENTITY_HEADER', 'header')
        assert ask(build('ManagedIdentityCredential', query)) == 'token'
        asked = queries(wire)[0]
        assert {name: asked[name] for name in asked.keys() & {'client_id', 'object_id', 'mi_res_id'}} == expected

    @pytest.mark.parametrize(('query', 'client_id'), [
        ('client_id=a-1', 'a-1'), ('managed_identity_client_id=a-1', 'a-1'),
        ('workload_identity_client_id=a-1', None),
    ])
    def test_the_default_credential_passes_it_to_the_managed_identity(self, query, client_id, wire, monkeypatch):
        monkeypatch.setenv('IDENTITY_ENDPOINT', 'http://127.0.0.1/msi/token')
        monkeypatch.setenv('IDENTITY_HEADER', 'header')
        assert ask(build('DefaultAzureCredential', query)) == 'token'
        assert queries(wire)[0].get('client_id') == client_id

    @pytest.mark.parametrize('option', ['client_id', 'workload_identity_client_id'])
    def test_the_default_credential_passes_it_to_the_workload_identity(self, option, wire, token_file, monkeypatch):
        monkeypatch.setenv('AZURE_FEDERATED_TOKEN_FILE', str(token_file))
        query = f'{option}=a-1&workload_identity_tenant_id=t&disable_instance_discovery=true'
        assert ask(build('DefaultAzureCredential', query)) == 'token'
        assert '/t/' in wire[0].url
        assert bodies(wire)[-1]['client_id'] == 'a-1'

    def test_the_default_credential_passes_the_authority_to_the_environment_credential(self, wire, monkeypatch):
        for name in ('AZURE_TENANT_ID', 'AZURE_CLIENT_ID', 'AZURE_CLIENT_SECRET'):
            monkeypatch.setenv(name, 'value')
        assert ask(build('DefaultAzureCredential', 'authority=sign-in.test&disable_instance_discovery=1')) == 'token'
        assert {urlsplit(request.url).netloc for request in wire} == {'sign-in.test'}

    @pytest.mark.parametrize('option', MEMBERS)
    def test_the_default_credential_leaves_out_what_is_excluded(self, option):
        def members(query):
            return [type(member).__name__ for member in build('DefaultAzureCredential', query).credentials]
        left_out = [name for name in members('') if name not in members(f'{option}=true')]
        assert len(left_out) == 1
        assert left_out[0] in MEMBERS[option]
        assert members(f'{option}=false') == members('')

    def test_the_default_credential_opens_a_browser_only_if_told_to(self):
        def members(query):
            return [type(member).__name__ for member in build('DefaultAzureCredential', query).credentials]
        assert 'InteractiveBrowserCredential' not in members('')
        assert 'InteractiveBrowserCredential' in members('exclude_interactive_browser_credential=false')

    def test_a_workload_identity_exchanges_its_file(self, wire, token_file):
        query = f'tenant_id=t&client_id=a-1&token_file_path={token_file}&authority=sign-in.test'
        assert ask(build('WorkloadIdentityCredential', f'{query}&disable_instance_discovery=true')) == 'token'
        assert wire[0].url.startswith('https://sign-in.test/t/')
        assert (bodies(wire)[-1]['client_id'], bodies(wire)[-1]['client_assertion']) == ('a-1', 'assertion')

    def test_a_workload_identity_may_stand_in_the_environment(self, wire, token_file, monkeypatch):
        monkeypatch.setenv('AZURE_TENANT_ID', 't')
        monkeypatch.setenv('AZURE_CLIENT_ID', 'a-1')
        monkeypatch.setenv('AZURE_FEDERATED_TOKEN_FILE', str(token_file))
        assert ask(build('WorkloadIdentityCredential', 'disable_instance_discovery=true')) == 'token'
        assert bodies(wire)[-1]['client_id'] == 'a-1'

    @pytest.mark.parametrize('disabled', [True, False])
    @pytest.mark.parametrize(
        'name', ['EnvironmentCredential', 'WorkloadIdentityCredential', 'DefaultAzureCredential'])
    def test_the_public_cloud_is_asked_about_other_authorities_unless_disabled(
            self, name, disabled, wire, token_file, monkeypatch):
        for variable in ('AZURE_TENANT_ID', 'AZURE_CLIENT_ID', 'AZURE_CLIENT_SECRET'):
            monkeypatch.setenv(variable, 'value')
        monkeypatch.setenv('AZURE_FEDERATED_TOKEN_FILE', str(token_file))
        query = f'authority=https://sign-in.test&disable_instance_discovery={disabled}'
        assert ask(build(name, query)) == 'token'
        hosts = {urlsplit(request.url).netloc for request in wire}
        assert hosts == {'sign-in.test'} if disabled else {'sign-in.test', 'login.microsoftonline.com'}

    @pytest.mark.parametrize('chain', [True, False])
    def test_a_certificate_is_sent_with_its_chain_if_asked(self, chain, wire, certificate):
        import jwt
        query = f'tenant_id=t&client_id=a-1&certificate_path={certificate}&authority=sign-in.test'
        query += f'&disable_instance_discovery=1&send_certificate_chain={chain}'
        assert ask(build('CertificateCredential', query)) == 'token'
        assert wire[0].url.startswith('https://sign-in.test/t/')
        assert ('x5c' in jwt.get_unverified_header(bodies(wire)[-1]['client_assertion'])) == chain

    @not_on_windows
    def test_the_cli_is_told_tenant_and_subscription(self, tmp_path, monkeypatch):
        told = tmp_path / 'told'
        answer = json.dumps({'accessToken': 'token', 'expires_on': 4102444800})
        make_az(tmp_path, monkeypatch, 'import sys\n'
                f'open({str(told)!r}, "w").write(str(sys.argv))\nprint({answer!r})')
        assert ask(build('AzureCliCredential', 'tenant_id=t-1&subscription=my%20one')) == 'token'
        assert "'--tenant', 't-1'" in told.read_text()
        assert "'--subscription', 'my one'" in told.read_text()

    @not_on_windows
    @pytest.mark.parametrize(('name', 'query'), [
        ('AzureCliCredential', ''),
        ('DefaultAzureCredential', ''.join(
            f'exclude_{member}_credential=1&'
            for member in ('broker', 'developer_cli', 'managed_identity', 'powershell', 'visual_studio_code'))),
    ])
    def test_the_cli_has_as_long_as_it_is_given(self, name, query, tmp_path, monkeypatch):
        make_az(tmp_path, monkeypatch, f'import time; time.sleep({2 * PATIENCE})')
        began = time.monotonic()
        with pytest.raises(ClientAuthenticationError):
            ask(build(name, f'{query}process_timeout=1'))
        assert time.monotonic() - began < PATIENCE

    def test_its_requests_are_logged_where_it_is_told(self, wire, monkeypatch, caplog):
        monkeypatch.setenv('IDENTITY_ENDPOINT', 'http://127.0.0.1/msi/token')
        monkeypatch.setenv('IDENTITY_HEADER', 'header')
        with caplog.at_level(logging.INFO, 'azure'), caplog.at_level(logging.INFO, logger.name):
            ask(build('ManagedIdentityCredential'))
        assert {record.name for record in caplog.records if 'Request URL' in record.getMessage()} == {logger.name}


class test_WhatIsMissing:

    @pytest.mark.parametrize(('present', 'missing'), [
        ({}, ['tenant_id (in the URL, or AZURE_TENANT_ID)', 'client_id (in the URL, or AZURE_CLIENT_ID)',
              'token_file_path (in the URL, or AZURE_FEDERATED_TOKEN_FILE)']),
        ({'AZURE_TENANT_ID': 't', 'AZURE_CLIENT_ID': ''}, ['client_id (in the URL, or AZURE_CLIENT_ID)']),
        ({'AZURE_TENANT_ID': 't', 'AZURE_CLIENT_ID': 'c'}, ['needs token_file_path (in the URL, or AZURE_FED']),
    ])
    def test_a_workload_identity_says_what_it_needs_and_where(self, present, missing, monkeypatch):
        for name, value in present.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ImproperlyConfigured, match='WorkloadIdentityCredential needs') as caught:
            build('WorkloadIdentityCredential')
        assert all(text in str(caught.value) for text in missing)

    def test_the_environment_is_not_looked_at_before_a_token_is_needed(self):
        # A process that only sends tasks need not have it.
        assert make_backend(f'azureblockblob://WorkloadIdentityCredential@{HOST}')

    def test_a_certificate_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(ImproperlyConfigured, match=r'CertificateCredential: .*No such file .*missing\.pem'):
            build('CertificateCredential', f'tenant_id=t&client_id=c&certificate_path={tmp_path}/missing.pem')

    def test_what_is_no_certificate_is_refused(self, token_file):
        with pytest.raises(ImproperlyConfigured, match='CertificateCredential: '):
            build('CertificateCredential', f'tenant_id=t&client_id=c&certificate_path={token_file}')

    def test_what_azure_identity_refuses_is_no_error_of_its_own(self, monkeypatch):
        monkeypatch.setenv('AZURE_TOKEN_CREDENTIALS', 'nobody')
        with pytest.raises(ImproperlyConfigured, match='DefaultAzureCredential: .*AZURE_TOKEN_CREDENTIALS'):
            build('DefaultAzureCredential')


class test_ConfiguredCredential:

    @pytest.mark.parametrize('configured', [
        CREDENTIAL, give_credential, lambda: CREDENTIAL, f'{__name__}.CREDENTIAL', f'{__name__}.give_credential',
        f'{__name__}:give_credential',
    ])
    def test_an_object_a_callable_or_the_path_of_either_gives_the_credential(self, configured):
        backend = make_backend(credential=configured)
        built = build_credential(backend._parsed_url, backend._settings['credential'], logger)
        assert built.credential is CREDENTIAL

    def test_what_a_callable_raises_is_not_repeated_since_it_may_hold_a_secret(self):
        def fail():
            raise RuntimeError('sig=c2VjcmV0')

        backend = make_backend(credential=fail)
        with pytest.raises(ImproperlyConfigured, match='fail.* raised RuntimeError') as caught:
            build_credential(backend._parsed_url, backend._settings['credential'], logger)
        assert 'c2VjcmV0' not in str(caught.value)

    @pytest.mark.parametrize(('configured', 'cls'), [
        (Credential, Credential), (OldCredential, OldCredential), (f'{__name__}.OldCredential', OldCredential),
        ('azure.identity.AzurePowerShellCredential', identity.AzurePowerShellCredential),
        ('azure.identity:AzureCliCredential', identity.AzureCliCredential),
    ])
    def test_a_class_or_its_path_gives_an_object_of_it(self, configured, cls):
        backend = make_backend(credential=configured)
        built = build_credential(backend._parsed_url, backend._settings['credential'], logger)
        assert type(built.credential) is cls

    def test_nothing_is_called_before_a_token_is_needed(self):
        called = []
        assert make_backend(credential=lambda: called.append('called'))
        assert called == []

    @pytest.mark.parametrize(('configured', 'message'), [
        ('nowhere.to.be.found', r"cannot import nowhere\.to\.be\.found: No module named 'nowhere'"),
        (f'{__name__}.nothing_of_this_name', 'nothing_of_this_name'),
        (f'{__name__}.SOMETHING', 'SOMETHING is no TokenCredential and no callable'),
        (f'{__name__}.NOTHING', 'NOTHING is no TokenCredential and no callable'),
        (f'{__name__}.give_for', 'give_for cannot be called without arguments'),
        (give_for, 'function cannot be called without arguments'),
        ('azure.identity.ClientSecretCredential', 'ClientSecretCredential cannot be called without arguments'),
        (AsyncCredential(), 'AsyncCredential is asynchronous'),
        (f'{__name__}.AsyncCredential', r'AsyncCredential is asynchronous\. The class of this name in azure\.ide'),
    ])
    def test_what_gives_no_credential_is_refused_when_the_backend_is_built(self, configured, message):
        with pytest.raises(ImproperlyConfigured, match=f'azureblockblob_credential: .*{message}'):
            make_backend(credential=configured)

    def test_whatever_its_module_raises_is_told_as_ours(self, tmp_path, monkeypatch):
        (tmp_path / 'broken_credentials.py').write_text('def make(:\n')
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ImproperlyConfigured, match=r'cannot import broken_credentials\.make'):
            make_backend(credential='broken_credentials.make')

    @pytest.mark.parametrize(('configured', 'message'), [
        (give_nothing, 'NoneType is no TokenCredential: it has no get_token'),
        (lambda: Credential, 'type is no TokenCredential'),
        (lambda: AsyncCredential(), r'AsyncCredential is asynchronous\. The class of this name in azure\.id'),
    ])
    def test_what_gives_something_else_is_refused_when_it_is_used(self, configured, message):
        backend = make_backend(credential=configured)
        with pytest.raises(ImproperlyConfigured, match=message):
            build_credential(backend._parsed_url, backend._settings['credential'], logger)


class CountingLock:
    """A lock that knows how many threads have come to it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.came = []

    def acquire(self, blocking=True):
        self.came.append(threading.current_thread())
        return self.lock.acquire(blocking)

    def release(self):
        self.lock.release()


class SlowCredential:
    """A credential that answers once all threads wait for it, as one whose endpoint is slow."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0
        self.go_on = threading.Event()

    def get_token(self, *scopes, **kwargs):
        self.asked += 1
        assert self.go_on.wait(PATIENCE)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def ask_from_all_threads():
    """Return a function that has all threads ask a credential at the same time; it returns what each got."""
    def ask_all(shared):
        def ask_one():
            try:
                answers.append(shared.get_token_info(SCOPE).token)
            except Exception as exc:
                answers.append(exc)
        answers = []
        shared._lock = lock = CountingLock()
        threads = [threading.Thread(target=ask_one) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(lock.came) == THREADS)
        shared.credential.go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        return answers
    return ask_all


class Oops(Exception):
    """An exception that cannot be copied, as many are."""

    def __init__(self, one, two):
        super().__init__(f'{one} and {two}')


class test_SharedCredential:

    @pytest.fixture
    def clock(self, monkeypatch):
        """The time that credentials see, in seconds."""
        clock = SimpleNamespace(now=1000.0)
        monkeypatch.setattr(credentials, 'time', SimpleNamespace(time=lambda: clock.now))
        return clock

    def test_all_threads_share_one_ask(self, ask_from_all_threads):
        slow = SlowCredential(AccessToken('token', int(time.time()) + 3600))
        assert ask_from_all_threads(SharedCredential(slow)) == ['token'] * THREADS
        assert slow.asked == 1

    @pytest.mark.parametrize('error', [ClientAuthenticationError('no identity here'), Oops('no', 'identity here')])
    def test_all_threads_share_a_failure(self, error, ask_from_all_threads):
        slow = SlowCredential(error)
        answers = ask_from_all_threads(SharedCredential(slow))
        assert [(type(answer), str(answer), answer.__cause__) for answer in answers] == [
            (TokenError, str(error), error)] * THREADS
        assert slow.asked == 1

    def test_nobody_waits_for_the_renewal_of_a_token_that_is_still_valid(self, clock):
        slow = SlowCredential(make_token('new', 9000))
        shared = SharedCredential(Credential(make_token('old', 2000)))
        shared.get_token_info(SCOPE)
        shared.credential, clock.now = slow, 1900
        renewer = threading.Thread(target=shared.get_token_info, args=(SCOPE,))
        renewer.start()
        wait_until(lambda: slow.asked)
        assert shared.get_token_info(SCOPE).token == 'old'
        slow.go_on.set()
        renewer.join(PATIENCE)
        assert shared.get_token_info(SCOPE).token == 'new'

    def test_a_token_that_lives_shortly_is_not_renewed_for_each_request(self, clock):
        credential = Credential(make_token('brief', 1100), make_token('next', 1100))
        shared = SharedCredential(credential)
        assert {shared.get_token_info(SCOPE).token for _ in range(3)} == {'brief'}

    def test_a_time_limit_of_the_task_is_not_the_credentials_failure(self):
        with pytest.raises(SoftTimeLimitExceeded):
            SharedCredential(Credential(SoftTimeLimitExceeded())).get_token_info(SCOPE)

    def test_whoever_comes_after_a_failure_asks_again(self):
        credential = Credential(ValueError('no'), make_token('token'))
        shared = SharedCredential(credential)
        with pytest.raises(TokenError, match='no'):
            shared.get_token_info(SCOPE)
        assert shared.get_token_info(SCOPE).token == 'token'

    def test_all_threads_go_on_with_a_token_whose_renewal_fails(self, clock, ask_from_all_threads):
        shared = SharedCredential(Credential(make_token('old', 2000)))
        shared.get_token_info(SCOPE)
        clock.now = 1990
        shared.credential = slow = SlowCredential(ValueError('no'))
        assert ask_from_all_threads(shared) == ['old'] * THREADS
        assert slow.asked == 1

    @pytest.mark.parametrize(('refresh_on', 'renewed_at'), [(None, 10000 - RENEW_BEFORE_EXPIRY), (5000, 5000)])
    def test_a_token_is_renewed_in_time(self, refresh_on, renewed_at, clock):
        credential = Credential(make_token('first', 10000, refresh_on), make_token('second', 20000))
        shared = SharedCredential(credential)
        shared.get_token_info(SCOPE)
        clock.now = renewed_at - 1
        assert shared.get_token_info(SCOPE).token == 'first'
        clock.now = renewed_at
        assert shared.get_token_info(SCOPE).token == 'second'
        assert shared.get_token_info(SCOPE).token == 'second'
        assert len(credential.asked) == 2

    def test_a_token_whose_renewal_fails_serves_while_it_is_valid(self, clock):
        credential = Credential(make_token('first', 2000), ValueError('no'))
        shared = SharedCredential(credential)
        shared.get_token_info(SCOPE)
        for now in (1700, 1701, 1700 + RENEWAL_PAUSE - 1):
            clock.now = now
            assert shared.get_token_info(SCOPE).token == 'first'
        assert len(credential.asked) == 2
        clock.now = 1700 + RENEWAL_PAUSE
        assert shared.get_token_info(SCOPE).token == 'first'
        assert len(credential.asked) == 3
        clock.now = 2000
        with pytest.raises(TokenError, match='no'):
            shared.get_token_info(SCOPE)

    def test_a_renewal_that_comes_through_later_counts(self, clock):
        shared = SharedCredential(
            Credential(make_token('first', 2000), ValueError('no'), make_token('second', 9000)))
        shared.get_token_info(SCOPE)
        clock.now = 1990
        assert shared.get_token_info(SCOPE).token == 'first'
        clock.now = 2000
        assert shared.get_token_info(SCOPE).token == 'second'

    def test_a_rejected_token_is_not_given_again(self):
        credential = Credential(make_token('kept'), make_token('new'))
        shared = SharedCredential(credential)
        shared.get_token_info(SCOPE)
        assert shared.get_token_info(SCOPE, options={'claims': 'claims'}).token == 'new'
        assert shared.get_token_info(SCOPE).token == 'new'
        assert credential.asked == [((SCOPE,), {}), ((SCOPE,), {'claims': 'claims'})]

    def test_each_scope_and_tenant_has_a_token_of_its_own(self):
        credential = Credential(make_token('one'), make_token('two'), make_token('three'))
        shared = SharedCredential(credential)
        asked = [((SCOPE,), {}), (('other',), {}), ((SCOPE,), {'tenant_id': 't'})]
        for _ in range(2):
            assert [shared.get_token_info(*scopes, options=options).token for scopes, options in asked] == [
                'one', 'two', 'three']
        assert credential.asked == asked

    def test_a_credential_with_only_get_token_serves_as_well(self):
        shared = SharedCredential(OldCredential())
        token = shared.get_token_info(SCOPE, options={'tenant_id': 't', 'enable_cae': True})
        assert isinstance(token, AccessTokenInfo)
        assert (token.token, token.expires_on) == (f'{SCOPE} t', 2000)

    def test_it_serves_whoever_asks_for_a_plain_token(self):
        token = SharedCredential(Credential(make_token('token', 5000))).get_token(SCOPE)
        assert isinstance(token, AccessToken)
        assert token == ('token', 5000)

    @pytest.mark.parametrize('error', [KeyError('x'), Oops(1, 2), ClientAuthenticationError('no'), OSError(5, 'no')])
    def test_whatever_a_credential_raises_is_the_cause_of_one_error(self, error):
        with pytest.raises(TokenError) as caught:
            SharedCredential(Credential(error)).get_token_info(SCOPE)
        assert caught.value.__cause__ is error

    @pytest.mark.parametrize('credential', [
        Credential(None), SimpleNamespace(get_token=lambda *scopes, **kwargs: None)])
    def test_a_credential_that_gives_no_token_is_one_that_fails(self, credential):
        with pytest.raises(TokenError):
            SharedCredential(credential).get_token_info(SCOPE)

    def test_the_end_of_the_process_is_no_failure(self):
        credential = Credential(KeyboardInterrupt(), make_token('token'))
        shared = SharedCredential(credential)
        with pytest.raises(KeyboardInterrupt):
            shared.get_token_info(SCOPE)
        assert shared.get_token_info(SCOPE).token == 'token'

    def test_it_closes_what_it_shares(self):
        credential = Credential()
        SharedCredential(credential).close()
        assert credential.closed
        SharedCredential(OldCredential()).close()

    def test_its_representation_shows_no_token(self):
        shared = SharedCredential(Credential(make_token('c2VjcmV0')))
        shared.get_token_info(SCOPE)
        assert repr(shared) == '<SharedCredential: Credential>'
