"""What a process shares, and how it talks to the service."""
from __future__ import annotations

import contextlib
import logging
import os
import threading
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from celery import states

from .conftest import ACCOUNT_URL, URL
from .fakehttp import cut_connection, refuse_connection
from .processes import in_child

client = pytest.importorskip('celery.backends.azurestorage.client')
credentials = pytest.importorskip('celery.backends.azurestorage.credentials')
core = pytest.importorskip('azure.core.exceptions')
transport = pytest.importorskip('azure.core.pipeline.transport')

#: How long threads and processes may wait for each other, in seconds.
DEADLINE = 30


class Credential:
    """A credential that counts the tokens it gives."""

    def __init__(self):
        self.tokens = 0
        self.closed = False

    def get_token(self, *scopes, **kwargs):
        from azure.core.credentials import AccessToken
        self.tokens += 1
        return AccessToken(f'token-{self.tokens}', 2 ** 40)

    def close(self):
        self.closed = True


@pytest.fixture
def backend(make_backend):
    return make_backend()


@pytest.fixture
def with_credential(make_backend):
    """Make a backend that asks a credential for its token."""
    def make(credential, **settings):
        return make_backend(
            result_backend=f'azureblockblob://{ACCOUNT_URL}', azureblockblob_credential=credential, **settings)
    return make


@pytest.fixture
def pauses(monkeypatch):
    """How long the pauses between attempts were, in seconds; none of them is waited for."""
    pauses = []
    monkeypatch.setattr(transport.HttpTransport, 'sleep', lambda transport, seconds: pauses.append(seconds))
    monkeypatch.setattr(client, 'time', SimpleNamespace(sleep=lambda seconds: seconds and pauses.append(seconds)))
    return pauses


class test_sharing:

    @pytest.mark.parametrize('url', [
        URL,
        f'{URL}?base_path=x/',
        'azureblockblob://fake:a2V5@fake',
        'azureblockblob://AccountName=fake;AccountKey=a2V5',
    ])
    def test_the_same_account_identity_and_settings_are_one_client(self, make_backend, url):
        assert make_backend(result_backend=url).container.account is make_backend().container.account

    @pytest.mark.parametrize('settings', [
        {'result_backend': 'azureblockblob://fake:b3RoZXI=@fake'},
        {'result_backend': 'azureblockblob://other:a2V5@other'},
        {'result_backend': f'azureblockblob://BlobEndpoint={ACCOUNT_URL};SharedAccessSignature=sv=1&sig=a'},
        {'result_backend': f'azureblockblob://ManagedIdentityCredential@{ACCOUNT_URL}'},
        {'azureblockblob_connection_timeout': 1},
        {'azureblockblob_read_timeout': 1},
        {'azureblockblob_retry_initial_backoff_sec': 1},
        {'azureblockblob_retry_increment_base': 1},
        {'azureblockblob_retry_max_attempts': 1},
        {'azureblockblob_max_concurrency': 1},
    ])
    def test_what_differs_in_any_of_these_has_another_client(self, make_backend, settings):
        assert make_backend(**settings).container.account is not make_backend().container.account

    def test_identities_of_different_options_are_different(self, make_backend):
        url = f'azureblockblob://ManagedIdentityCredential@{ACCOUNT_URL}'
        accounts = {make_backend(result_backend=f'{url}{options}').container.account
                    for options in ('', '?client_id=a', '?client_id=b', '?object_id=a', '?client_id=a')}
        assert len(accounts) == 4

    def test_credentials_of_different_objects_are_different(self, with_credential):
        credential = Credential()
        assert with_credential(credential).container.account is with_credential(credential).container.account
        assert with_credential(credential).container.account is not with_credential(Credential()).container.account

    def test_containers_of_an_account_share_its_client(self, make_backend):
        one = make_backend(azureblockblob_container_name='one').container
        two = make_backend(azureblockblob_container_name='two').container
        assert one is not two
        assert one.account is two.account

    def test_32_cold_threads_build_one_client_and_ask_for_one_token(
            self, with_credential, fake_service, caplog, monkeypatch):
        caplog.set_level(logging.INFO)
        at_client, at_token = threading.Semaphore(0), threading.Semaphore(0)
        credential = Credential()
        backends = [with_credential(credential, azureblockblob_container_name='results') for _ in range(32)]
        before(monkeypatch, client, '_client_key', at_client.release)
        before(monkeypatch, credentials.SharedCredential, 'get_token_info', at_token.release)
        # Whoever builds the client, or asks for the token, takes until all others want it too.
        built = before(monkeypatch, client, '_build_service', lambda: gather(at_client, 32))
        before(monkeypatch, credential, 'get_token', lambda: gather(at_token, 32))

        in_threads([lambda backend=backend: backend.store_result('id', 1, states.SUCCESS) for backend in backends])

        assert len({backend.container.account for backend in backends}) == 1
        assert len(built) == 1
        assert credential.tokens == 1
        assert len(caplog.records) <= 5


class test_fork:

    @pytest.fixture(autouse=True)
    def needs_fork(self):
        if not hasattr(os, 'fork'):
            pytest.skip('This system has no fork.')

    def test_parent_and_child_have_clients_of_their_own(self, with_credential):
        credential = Credential()
        backend = with_credential(credential, azureblockblob_max_concurrency=2)
        for number in range(4):
            backend.set(f'key-{number}', f'{number}')
        keys = [f'key-{number}' for number in range(4)]
        backend.mget(keys)  # the threads run
        account = backend.container.account

        def use():
            return [backend.mget(keys), backend.container.account is account, credential.tokens]

        assert in_child(use) == [['0', '1', '2', '3'], False, 2]
        assert use() == [['0', '1', '2', '3'], True, 1]

    def test_a_child_waits_for_no_lock_of_its_parent(self, backend):
        backend.get('a')
        with backend.container.account._lock:
            assert in_child(lambda: backend.mget(['a', 'b'])) == [None, None]

    def test_a_child_does_not_wait_for_a_client_that_its_parent_builds(self, backend, monkeypatch):
        building, release = threading.Event(), threading.Event()

        def take_long():
            if threading.current_thread() is not threading.main_thread():
                building.set()
                release.wait(DEADLINE)

        before(monkeypatch, client, '_build_service', take_long)
        thread = threading.Thread(target=lambda: backend.get('a'))
        thread.start()
        assert building.wait(DEADLINE)
        try:
            assert in_child(lambda: backend.mget(['a', 'b'])) == [None, None]
        finally:
            release.set()
            thread.join(DEADLINE)

    def test_the_child_keeps_no_etag_of_the_parent(self, backend):
        backend.store_result('id', None, states.STARTED)
        assert in_child(lambda: list(backend.container.unfinished)) == []
        assert list(backend.container.unfinished) == ['celery-task-meta-id']


class test_the_container:

    def test_is_made_by_the_first_write(self, backend, fake_service):
        backend.set('a', b'x')
        backend.set('b', b'x')
        assert fake_service.operations == ['Put Blob', 'Create Container', 'Put Blob', 'Put Blob']

    def test_is_not_made_by_anything_else(self, backend, fake_service):
        backend.get('a')
        backend.mget(['a', 'b'])
        backend.delete('a')
        assert 'Create Container' not in fake_service.operations

    def test_is_missed_by_requests_that_are_no_results(self, backend, fake_service):
        with pytest.raises(core.ResourceNotFoundError):
            backend.container.call('a', lambda blob: blob.append_block(b'x'))
        backend.container.call('a', lambda blob: blob.create_append_blob(), creating=True)
        assert fake_service.operations == ['Append Block', 'Put Blob', 'Create Container', 'Put Blob']

    def test_needs_no_right_to_be_made_where_it_is_there(self, backend, fake_service):
        backend.set('makes it', b'')
        fake_service.on('Create Container', times=float('inf'), answer=(403, 'AuthorizationPermissionMismatch'))
        backend.store_result('id', 1, states.SUCCESS)
        assert backend.get_result('id') == 1

    def test_that_may_not_be_made_is_an_error_that_says_so(self, backend, fake_service):
        fake_service.on('Create Container', answer=(403, 'AuthorizationPermissionMismatch'))
        name = backend.container._client.container_name
        with pytest.raises(core.HttpResponseError, match=f'not authorized .*{name}'):
            backend.set('a', b'x')

    def test_may_be_made_by_someone_else_meanwhile(self, make_backend, fake_service):
        one, other = (make_backend(azureblockblob_container_name='results') for _ in range(2))
        fake_service.on('Create Container', before=lambda: other.set('b', 'other'))
        one.set('a', 'one')
        assert one.mget(['a', 'b']) == ['one', 'other']

    @pytest.mark.parametrize('code', ['BlobNotFound', 'ResourceNotFound', 'AccountNotFound'])
    def test_is_not_made_because_of_something_else(self, backend, fake_service, code):
        fake_service.on('Put Blob', answer=(404, code))
        with pytest.raises(core.ResourceNotFoundError):
            backend.set('a', b'x')
        assert fake_service.operations == ['Put Blob']

    def test_is_made_again_once_its_deletion_is_over(self, make_backend, fake_service, monkeypatch):
        backend = make_backend(azureblockblob_retry_initial_backoff_sec=20)
        backend.set('a', 'old')
        backend.container._client.delete_container()
        let_pauses_pass(monkeypatch, fake_service)
        backend.set('a', 'new')
        assert backend.get('a') == 'new'


class test_not_found:

    def test_is_no_result(self, backend, fake_service):
        assert backend.get('a') is None
        backend.set('b', b'')
        assert backend.get('a') is None

    def test_from_something_that_is_no_blob_service_is_an_error(self, backend, fake_service):
        fake_service.on('Get Blob', answer=(404, ''))
        with pytest.raises(core.ResourceNotFoundError):
            backend.get('a')
        fake_service.on('Delete Blob', answer=(404, ''))
        with pytest.raises(core.ResourceNotFoundError):
            backend.delete('a')


class test_repetition:

    #: Answers after which a request is sent again: by the SDK, and where that gives up.
    passing = pytest.mark.parametrize(('status', 'code'), [
        (408, 'RequestTimeout'), (429, 'TooManyRequests'), (500, 'InternalError'), (502, 'BadGateway'),
        (503, 'ServerBusy'), (504, 'GatewayTimeout'), (409, 'ContainerBeingDeleted')])

    @passing
    def test_of_what_passes(self, backend, fake_service, status, code):
        fake_service.on('Get Blob', times=3, answer=(status, code))
        assert backend.get('a') is None
        assert fake_service.operations == ['Get Blob'] * 4

    @passing
    def test_ends(self, backend, fake_service, status, code):
        fake_service.on('Get Blob', times=float('inf'), answer=(status, code))
        with pytest.raises(core.HttpResponseError) as caught:
            backend.get('a')
        assert caught.value.status_code == status
        assert backend.exception_safe_to_retry(caught.value)
        assert fake_service.operations == ['Get Blob'] * 4

    @pytest.mark.parametrize('fault', [refuse_connection, cut_connection])
    def test_of_what_did_not_get_through(self, backend, fake_service, fault):
        fake_service.on('Get Blob', times=3, before=fault)
        assert backend.get('a') is None

    @pytest.mark.parametrize(('status', 'code'), [
        (400, 'InvalidUri'), (401, 'InvalidAuthenticationInfo'), (403, 'AuthorizationFailure'),
        (409, 'BlobArchived')])
    def test_is_not_done_for_what_lasts(self, backend, fake_service, status, code):
        fake_service.on('Get Blob', answer=(status, code))
        with pytest.raises(core.HttpResponseError) as caught:
            backend.get('a')
        assert not backend.exception_safe_to_retry(caught.value)
        assert fake_service.operations == ['Get Blob']

    @pytest.mark.parametrize('fault', [
        {'answer': (503, 'ServerBusy')}, {'answer': (429, 'TooManyRequests')}, {'before': refuse_connection}])
    def test_is_set_by_three_settings(self, make_backend, fake_service, pauses, fault):
        backend = make_backend(azureblockblob_retry_initial_backoff_sec=4, azureblockblob_retry_increment_base=3,
                               azureblockblob_retry_max_attempts=2)
        fake_service.on(times=float('inf'), **fault)
        with pytest.raises(core.AzureError):
            backend.get('a')
        assert fake_service.operations == ['Get Blob'] * 3
        # Between half and one and a half of the first backoff, and 3, then 9 seconds besides.
        assert len(pauses) == 2
        assert 2 + 3 <= pauses[0] <= 6 + 3
        assert 2 + 9 <= pauses[1] <= 6 + 9

    @pytest.mark.parametrize('fault', [
        {'answer': (503, 'ServerBusy')}, {'answer': (429, 'TooManyRequests')}, {'before': refuse_connection}])
    def test_can_be_off(self, make_backend, fake_service, pauses, fault):
        backend = make_backend(azureblockblob_retry_max_attempts=0)
        fake_service.on(**fault)
        with pytest.raises(core.AzureError):
            backend.get('a')
        assert (fake_service.operations, pauses) == (['Get Blob'], [])

    def test_is_counted_alike_for_every_kind_of_fault(self, make_backend):
        policy = make_backend(azureblockblob_retry_max_attempts=5).container.account.retry_policy
        assert {policy.total_retries, policy.connect_retries, policy.read_retries, policy.status_retries} == {5}


class test_logging:

    def test_is_quiet_at_info(self, backend, caplog):
        caplog.set_level(logging.INFO)
        for number in range(10):
            backend.store_result(f'id-{number}', number, states.SUCCESS)
            backend.get_result(f'id-{number}')
        assert [record.getMessage() for record in caplog.records] == [
            f'Created the container {ACCOUNT_URL}/{backend.container._client.container_name}.']

    def test_shows_the_requests_when_it_is_asked_to(self, backend, caplog):
        caplog.set_level(logging.INFO, logger='celery.backends.azurestorage.client.requests')
        backend.get('a')
        text = caplog.text
        assert f'{ACCOUNT_URL}/{backend.container._client.container_name}/a' in text
        assert 'SharedKey' not in text

    def test_shows_no_signature(self, make_backend, caplog):
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, logger='celery.backends.azurestorage.client.requests')
        url = f'azureblockblob://BlobEndpoint={ACCOUNT_URL};SharedAccessSignature=sv=1&sig=c2lnbmF0dXJl'
        make_backend(result_backend=url).store_result('id', 1, states.SUCCESS)
        assert 'Put Blob' not in caplog.text
        assert ACCOUNT_URL in caplog.text
        assert 'c2lnbmF0dXJl' not in caplog.text


class test_environment:

    @pytest.fixture(autouse=True)
    def no_settings(self, monkeypatch):
        for name in ('HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY', 'NO_PROXY', 'REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE'):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)

    @pytest.fixture
    def sending(self, make_backend, fake_service):
        """Send a request, and return how."""
        def sending():
            make_backend().get('a')
            return fake_service.requests[-1].sending
        return sending

    def test_without_settings(self, sending):
        assert sending()['proxies'] == {}
        assert sending()['verify'] is True

    @pytest.mark.parametrize('name', ['HTTPS_PROXY', 'https_proxy', 'ALL_PROXY'])
    def test_a_proxy(self, sending, monkeypatch, name):
        monkeypatch.setenv(name, 'http://proxy.test:3128')
        assert 'http://proxy.test:3128' in sending()['proxies'].values()

    def test_a_proxy_that_is_not_for_this_host(self, sending, monkeypatch):
        monkeypatch.setenv('HTTPS_PROXY', 'http://proxy.test:3128')
        monkeypatch.setenv('NO_PROXY', 'example.com,.blob.core.windows.net')
        assert sending()['proxies'] == {}

    @pytest.mark.parametrize('name', ['REQUESTS_CA_BUNDLE', 'CURL_CA_BUNDLE'])
    def test_authorities(self, sending, monkeypatch, name):
        monkeypatch.setenv(name, '/etc/own-authorities.pem')
        assert sending()['verify'] == '/etc/own-authorities.pem'

    def test_the_first_of_two_files_with_authorities(self, sending, monkeypatch):
        monkeypatch.setenv('REQUESTS_CA_BUNDLE', '/etc/first.pem')
        monkeypatch.setenv('CURL_CA_BUNDLE', '/etc/second.pem')
        assert sending()['verify'] == '/etc/first.pem'


class test_parallel_reads:

    def test_an_error_of_one_ends_the_call(self, backend, fake_service):
        fake_service.on('Get Blob', 'key-7', answer=(403, 'AuthorizationPermissionMismatch'))
        with pytest.raises(core.HttpResponseError, match='not authorized'):
            backend.mget([f'key-{number}' for number in range(500)])
        backend.mget(['later', 'later'])  # they queue behind whatever is left of the call
        assert len(fake_service.requests) < 400

    def test_an_error_does_not_wait_for_those_that_hang(self, backend, fake_service):
        release, given_up = threading.Event(), []

        def hang():
            if not release.wait(DEADLINE):
                given_up.append(True)

        fake_service.on('Get Blob', 'first', answer=(403, 'AuthorizationPermissionMismatch'))
        fake_service.on('Get Blob', times=float('inf'), before=hang)
        with pytest.raises(core.HttpResponseError):
            backend.mget(['first', 'second', 'third'])
        release.set()
        assert given_up == []

    def test_after_an_error_the_next_call_works(self, backend, fake_service):
        fake_service.on('Get Blob', answer=(403, 'AuthorizationPermissionMismatch'))
        with pytest.raises(core.HttpResponseError):
            backend.mget(['a', 'b', 'c'])
        assert backend.mget(['a', 'b', 'c']) == [None] * 3

    def test_an_error_ends_a_wait_for_many_results(self, backend, fake_service):
        fake_service.on('Get Blob', answer=(403, 'AuthorizationPermissionMismatch'))
        with pytest.raises(core.HttpResponseError):
            list(backend.get_many(['a', 'b', 'c'], timeout=DEADLINE))

    def test_of_two_callers_are_no_more_at_once_than_of_one(self, make_backend, fake_service):
        backend = make_backend(azureblockblob_max_concurrency=4)
        keys = [f'key-{number}' for number in range(40)]
        values = in_threads([lambda: backend.mget(keys)] * 3)
        assert values == [[None] * 40] * 3
        assert fake_service.peak <= 4

    def test_one_value_takes_no_thread(self, backend):
        threads = threading.enumerate()
        backend.mget(['a'])
        assert threading.enumerate() == threads

    def test_as_many_connections_are_kept(self, make_backend):
        with patch.object(client, 'HTTPAdapter', autospec=True, side_effect=client.HTTPAdapter) as adapter:
            make_backend(azureblockblob_max_concurrency=170).get('a')
        assert {call.kwargs['pool_maxsize'] for call in adapter.call_args_list} == {170}


class test_closing:

    def test_leaves_no_thread(self, backend):
        threads = threading.enumerate()
        backend.mget(['a', 'b', 'c'])
        assert threading.enumerate() != threads
        client.close_clients()
        assert threading.enumerate() == threads

    def test_closes_the_credential(self, with_credential):
        credential = Credential()
        with_credential(credential).get('a')
        client.close_clients()
        assert credential.closed

    def test_is_followed_by_a_new_client(self, backend):
        backend.set('a', 'x')
        account = backend.container.account
        client.close_clients()
        assert backend.mget(['a', 'b']) == ['x', None]
        assert backend.container.account is not account

    def test_can_be_repeated(self, backend):
        backend.get('a')
        client.close_clients()
        client.close_clients()

    def test_ends_the_reads_of_others(self, make_backend, fake_service):
        backend = make_backend(azureblockblob_max_concurrency=2)
        reading, release = threading.Semaphore(0), threading.Event()

        def hang():
            reading.release()
            release.wait(DEADLINE)

        fake_service.on('Get Blob', times=2, before=hang)
        reader = threading.Thread(target=ignoring_errors(lambda: backend.mget(['a', 'b', 'c', 'd'])))
        reader.start()
        gather(reading, 2)
        closer = threading.Thread(target=client.close_clients)
        closer.start()
        release.set()
        closer.join(DEADLINE)
        reader.join(DEADLINE)
        assert not closer.is_alive()
        assert not reader.is_alive()


def before(monkeypatch, owner, name, action):
    """Do something before each call of a function. Return a list that grows by one with each."""
    real = getattr(owner, name)
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(name)
        action()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def gather(semaphore, number):
    """Wait until a semaphore was released so often."""
    for _ in range(number):
        assert semaphore.acquire(timeout=DEADLINE)


def in_threads(functions):
    """Call functions in threads that begin together; return what they gave, in order."""
    together = threading.Barrier(len(functions), timeout=DEADLINE)
    results = [None] * len(functions)

    def act(number):
        together.wait()
        results[number] = functions[number]()

    threads = [threading.Thread(target=act, args=(number,)) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return results


def ignoring_errors(function):
    def ignoring():
        with contextlib.suppress(Exception):
            function()
    return ignoring


def let_pauses_pass(monkeypatch, fake_service):
    """Let pauses between attempts move the service's clock, and take no time."""
    def pause(seconds):
        fake_service.now += seconds
    monkeypatch.setattr(transport.HttpTransport, 'sleep', lambda transport, seconds: pause(seconds))
    monkeypatch.setattr(client, 'time', SimpleNamespace(sleep=pause))
