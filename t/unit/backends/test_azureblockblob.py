"""The backend as Celery builds and calls it, on a fake service that the real SDK talks to."""
from __future__ import annotations

import copy
import pickle
import sys
import threading
from unittest.mock import patch

import pytest

from celery import _state, states
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.exceptions import BackendStoreError, ImproperlyConfigured

from .azurestorage.conftest import *  # noqa: F403  (fixtures)
from .azurestorage.conftest import ACCOUNT_URL, URL
from .azurestorage.contract import BackendContract

pytest.importorskip('azure.storage.blob')
client = pytest.importorskip('celery.backends.azurestorage.client')

KEY = 'a2V5'
SAS = 'sv=2024-11-04&ss=b&sig=c2lnbmF0dXJl%2Bx%3D'


class StaticCredential:
    """A credential of the user's own."""

    def get_token(self, *scopes, **kwargs):
        from azure.core.credentials import AccessToken
        return AccessToken('the-token', 2 ** 40)


@pytest.fixture
def constructions(fake_service):
    """Spy on the SDK's client: the real one is built."""
    real = client.BlobServiceClient
    with patch.object(client, 'BlobServiceClient', autospec=True, side_effect=real) as constructor:
        yield constructor


class test_AzureBlockBlobBackend(BackendContract):
    """What a user sees of results; see the contract."""


class test_construction:

    def test_the_app_has_this_backend_for_its_url(self, azure_app):
        assert type(azure_app.backend) is AzureBlockBlobBackend

    def test_nothing_happens_before_the_first_use(self, make_backend, constructions, fake_service):
        threads = threading.enumerate()
        backend = make_backend()
        repr(backend)
        pickle.dumps(backend)
        assert constructions.call_count == 0
        assert fake_service.requests == []
        assert threading.enumerate() == threads

    def test_the_first_use_builds_the_client(self, make_backend, constructions):
        backend = make_backend()
        backend.get('a')
        backend.get('b')
        assert [call.args for call in constructions.call_args_list] == [(ACCOUNT_URL,)]

    @pytest.mark.parametrize('url', [
        f'azureblockblob://fake:{KEY}@{ACCOUNT_URL}',
        f'azureblockblob://fake:{KEY}@fake',
        f'azureblockblob+https://fake:{KEY}@fake.blob.core.windows.net',
        f'azureblockblob://DefaultEndpointsProtocol=https;AccountName=fake;AccountKey={KEY};'
        'EndpointSuffix=core.windows.net',
    ])
    def test_a_key_signs_the_requests(self, make_backend, fake_service, url):
        make_backend(result_backend=url).store_result('id', 1, states.SUCCESS)
        signatures = [request.headers['Authorization'] for request in fake_service.requests]
        assert all(signature.startswith('SharedKey fake:') for signature in signatures)

    def test_a_shared_access_signature_is_sent_as_it_was_written(self, make_backend, fake_service):
        url = f'azureblockblob://BlobEndpoint={ACCOUNT_URL};SharedAccessSignature={SAS}'
        make_backend(result_backend=url).store_result('id', 1, states.SUCCESS)
        assert {request.query['sig'] for request in fake_service.requests} == {'c2lnbmF0dXJl+x='}
        assert not any('Authorization' in request.headers for request in fake_service.requests)

    def test_a_credential_gives_the_token(self, make_backend, fake_service):
        backend = make_backend(
            result_backend=f'azureblockblob://{ACCOUNT_URL}', azureblockblob_credential=StaticCredential())
        backend.store_result('id', 1, states.SUCCESS)
        assert {request.headers['Authorization'] for request in fake_service.requests} == {'Bearer the-token'}

    def test_a_named_credential_is_one_of_azure_identity(self, make_backend, fake_service):
        identity = pytest.importorskip('azure.identity')
        url = f'azureblockblob://ManagedIdentityCredential@{ACCOUNT_URL}?client_id=some-id'
        constructor = identity.ManagedIdentityCredential
        token = StaticCredential().get_token()
        with patch.object(identity, 'ManagedIdentityCredential', autospec=True, side_effect=constructor) as built, \
                patch.object(constructor, 'get_token_info', autospec=True, return_value=token):
            make_backend(result_backend=url).store_result('id', 1, states.SUCCESS)
        assert built.call_args.kwargs['client_id'] == 'some-id'
        assert {request.headers['Authorization'] for request in fake_service.requests} == {'Bearer the-token'}

    def test_requests_say_who_sends_them(self, make_backend, fake_service):
        from celery import __version__
        make_backend().get('a')
        agent = fake_service.requests[0].headers['User-Agent']
        assert agent.startswith(f'celery/{__version__} azsdk-python-storage-blob')


class test_settings:

    def test_defaults(self, azure_app):
        backend = AzureBlockBlobBackend(app=azure_app, url=URL, container_name='celery')
        assert backend.base_path == ''
        assert backend.container._client.container_name == 'celery'

    def test_the_container_is_celery_unless_it_is_named(self, make_backend):
        backend = make_backend(azureblockblob_container_name=None)
        assert backend.container._client.container_name == 'celery'

    def test_the_url_wins_over_the_configuration_and_leaves_it_alone(self, make_app, fake_service):
        app = make_app(result_backend=f'{URL}?container_name=in-url&base_path=x/&read_timeout=7',
                       azureblockblob_container_name='in-conf', azureblockblob_read_timeout=8)
        app.backend.store_result('id', 1, states.SUCCESS)
        assert list(fake_service.containers['in-url'].blobs) == ['x/celery-task-meta-id']
        assert fake_service.requests[0].sending['timeout'][1] == 7
        assert app.conf.azureblockblob_container_name == 'in-conf'
        assert app.conf.azureblockblob_read_timeout == 8

    def test_old_upper_case_names_count(self, make_app):
        app = make_app(azureblockblob_container_name=None, AZUREBLOCKBLOB_CONTAINER_NAME='old-name')
        assert app.backend.container._client.container_name == 'old-name'

    def test_an_argument_wins_over_all(self, azure_app):
        url = f'{URL}?container_name=in-url'
        backend = AzureBlockBlobBackend(app=azure_app, url=url, container_name='argument')
        assert backend.container._client.container_name == 'argument'

    def test_time_outs_reach_the_connection(self, make_backend, fake_service):
        make_backend(azureblockblob_connection_timeout=3, azureblockblob_read_timeout=11).get('a')
        make_backend().get('a')
        assert [request.sending['timeout'] for request in fake_service.requests] == [(3, 11), (20, 120)]

    def test_a_big_result_is_one_request_each_way(self, make_backend, fake_service):
        backend = make_backend()
        backend.set('first', b'')
        value = 'x' * (70 * 1024 * 1024)  # more than the SDK's defaults for one request: 64 MiB out, 32 MiB in
        del fake_service.requests[:]
        backend.set('big', value)
        assert backend.get('big') == value
        assert fake_service.operations == ['Put Blob', 'Get Blob']


class test_missing_libraries:

    def test_the_sdk(self, azure_app, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.storage.blob', None)
        with pytest.raises(ImproperlyConfigured, match='pip install azure-storage-blob'):
            AzureBlockBlobBackend(app=azure_app, url=URL)

    def test_azure_identity_where_a_credential_is_named(self, azure_app, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.identity', None)
        with pytest.raises(ImproperlyConfigured, match='pip install azure-identity'):
            AzureBlockBlobBackend(app=azure_app, url=f'azureblockblob://DefaultAzureCredential@{ACCOUNT_URL}')

    def test_azure_identity_is_not_needed_for_a_key(self, azure_app, monkeypatch):
        monkeypatch.setitem(sys.modules, 'azure.identity', None)
        assert AzureBlockBlobBackend(app=azure_app, url=URL).get('a') is None


class test_secrets:

    @pytest.mark.parametrize('url', [
        URL,
        f'azureblockblob://AccountName=fake;AccountKey={KEY}',
        f'azureblockblob://BlobEndpoint={ACCOUNT_URL};SharedAccessSignature={SAS}',
    ])
    def test_a_backend_shows_its_url_without_secrets(self, make_backend, url):
        backend = make_backend(result_backend=url)
        for shown in (backend.as_uri(), repr(backend)):
            assert 'fake' in shown
            assert KEY not in shown
            assert 'c2lnbmF0dXJl' not in shown
        assert backend.as_uri(include_password=True) == url

    def test_a_pickled_result_holds_no_key(self, azure_app):
        assert KEY.encode() not in pickle.dumps(azure_app.AsyncResult('id'))


@pytest.fixture
def current_app(azure_app, monkeypatch):
    """The app of copied and unpickled results."""
    monkeypatch.setattr(_state._tls, 'current_app', azure_app)
    return azure_app


class test_copies:

    @pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy])
    def test_of_results_are_read_where_the_result_is(self, current_app, copied):
        current_app.backend.store_result('id', 'value', states.SUCCESS)
        result = current_app.AsyncResult('id')
        assert copied(result).get(timeout=10) == 'value'
        assert copied(current_app.GroupResult('group', [result])).results[0].get(timeout=10) == 'value'
        assert copied(current_app.backend) is current_app.backend


class test_pickling:

    def test_a_pickled_result_is_read_where_it_is_unpickled(self, current_app):
        current_app.backend.store_result('id', 'value', states.SUCCESS)
        result = pickle.loads(pickle.dumps(current_app.AsyncResult('id')))
        assert type(result.backend) is AzureBlockBlobBackend
        assert result.get(timeout=10) == 'value'

    def test_a_backend_keeps_what_it_was_built_with(self, current_app):
        url = f'azureblockblob://other:{KEY}@other?base_path=x/'
        backend = AzureBlockBlobBackend(app=current_app, url=url, container_name='argument', expires=1234)
        restored = pickle.loads(pickle.dumps(backend))
        assert restored.as_uri(include_password=True) == url
        assert restored.base_path == 'x/'
        assert restored.expires == 1234
        assert restored.container is backend.container

    def test_a_subclass_stays_one(self, current_app):
        backend = OwnBackend(app=current_app, url=URL)
        assert type(pickle.loads(pickle.dumps(backend))) is OwnBackend


class OwnBackend(AzureBlockBlobBackend):
    """A user's own."""


class test_always_retry:

    @pytest.fixture
    def pauses(self, monkeypatch):
        pauses = []
        monkeypatch.setattr(AzureBlockBlobBackend, '_sleep', lambda backend, seconds: pauses.append(seconds))
        return pauses

    def test_a_passing_fault_is_sat_out(self, make_backend, fake_service, pauses):
        backend = make_backend(result_backend_always_retry=True, azureblockblob_retry_max_attempts=0)
        fake_service.on(times=5, answer=(503, 'ServerBusy'))
        backend.store_result('id', 1, states.SUCCESS)
        assert backend.get_result('id') == 1
        assert len(pauses) == 5

    def test_a_lasting_fault_is_raised_at_once(self, make_backend, fake_service, pauses):
        backend = make_backend(result_backend_always_retry=True)
        fake_service.on(answer=(403, 'AuthorizationPermissionMismatch'))
        with pytest.raises(Exception, match='is not authorized'):
            backend.store_result('id', 1, states.SUCCESS)
        assert pauses == []

    def test_giving_up_says_which_result_was_lost(self, make_backend, fake_service, pauses):
        backend = make_backend(result_backend_always_retry=True, result_backend_max_retries=2,
                               azureblockblob_retry_max_attempts=0)
        fake_service.on(times=3, answer=(503, 'ServerBusy'))
        with pytest.raises(BackendStoreError) as caught:
            backend.store_result('id', 1, states.SUCCESS)
        assert (caught.value.task_id, caught.value.state) == ('id', states.SUCCESS)
        assert len(pauses) == 2
