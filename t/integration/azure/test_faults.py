"""What the user sees of a service that fails, and that nothing is lost."""
from __future__ import annotations

import gc
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from unittest import mock

import pytest
from azure.core.exceptions import (
    AzureError,
    DecodeError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
    ServiceResponseTimeoutError,
)
from azure.storage.blob import BlobServiceClient, generate_account_sas

from celery import Celery
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.client import close_clients
from t.services.azurite import Azurite
from t.services.certificates import make_certificates
from t.services.faults import Hold, answer, cut, cut_within, hang, lose
from t.services.service import HOST, wait_until
from t.unit.backends.azurestorage.servicecontract import BlobServiceContract

RESULTS = '/celery-task-meta-'
CREATION = 'restype=container'

#: How often a request is repeated by default.
REPEATED = 3

#: Answers that pass, as the service gives them (REST: Common error codes, Blob service error codes).
PASSING = [
    (408, 'RequestTimeout'), (409, 'ContainerBeingDeleted'), (429, 'TooManyRequests'), (500, 'InternalError'),
    (500, 'OperationTimedOut'), (502, ''), (503, 'ServerBusy'), (504, ''),
]

#: What happens to a connection, and whether the service has done what was asked by then.
BROKEN = [
    pytest.param(cut(), False, id='cut'),
    pytest.param(cut(reset=True), False, id='reset'),
    pytest.param(lose(), True, id='lost answer'),
]

#: Settings without pauses between two attempts of a request.
NO_PAUSES = {'retry_initial_backoff_sec': 0, 'retry_increment_base': 0}

#: Celery's own repetition, without its long pauses and with an end.
ALWAYS_RETRY = {
    'result_backend_always_retry': True,
    'result_backend_max_retries': 500,
    'result_backend_base_sleep_between_retries_ms': 10,
    'result_backend_max_sleep_between_retries_ms': 100,
}

#: Seconds that are far less than any pause of the SDK's own settings, and far more than a request takes.
AT_ONCE = 10


@contextmanager
def within(seconds):
    """Fail if the block takes longer."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


@pytest.fixture
def connect_by_proxy(proxied_url_for, clean_environment):
    """Return a function like `connect`'s, for backends that reach Azurite through the proxy."""
    def connect(*credential, settings=None, **options):
        url = proxied_url_for(*credential, **{**NO_PAUSES, **options})
        app = Celery('test', set_as_current=False, backend=url)
        app.conf.update(settings or {})
        return app.backend
    return connect


@pytest.fixture
def backend(connect_by_proxy, connect):
    """A backend behind the proxy, whose container is there."""
    connect().store_result('before', 0, 'SUCCESS')
    return connect_by_proxy()


@pytest.fixture
def asked_again():
    """A spy on the errors that Celery asks about before it repeats an operation."""
    original = AzureBlockBlobBackend.exception_safe_to_retry
    with mock.patch.object(
            AzureBlockBlobBackend, 'exception_safe_to_retry', autospec=True, side_effect=original) as spy:
        yield spy


@pytest.fixture
def state_of(connect):
    """Return a function that tells a task's state as it stands at the service."""
    return lambda task_id: connect().get_task_meta(task_id)['status']


def operations(backend):
    """Return what a backend does, as functions without arguments."""
    return [lambda: backend.store_result('task', 1, 'SUCCESS'),
            lambda: backend.get_task_meta('before', cache=False),
            lambda: backend.mget([backend.get_key_for_task('before'), backend.get_key_for_task('task')]),
            lambda: backend.forget('before')]


def statuses(proxy):
    """Return the statuses that the client got, in their order."""
    return [request.status for request in proxy.requests]


def blobs(proxy, method):
    """Return the requests of a method for results."""
    return [request for request in proxy.requests if request.method == method and RESULTS in request.path]


def creations(proxy):
    """Return the requests that create a container."""
    return [request for request in proxy.requests if CREATION in request.query and request.method == 'PUT']


class test_a_proxy_without_rules(BlobServiceContract):

    @pytest.fixture
    def blob_container(self, azurite, proxy, container_name):
        connection_string = azurite.connection_string.replace(azurite.account_url, proxy.account_url)
        with BlobServiceClient.from_connection_string(connection_string, retry_total=0) as service:
            yield service.create_container(container_name)

    def test_tokens_pass(self, connect_by_proxy, identity, state_of):
        connect_by_proxy('ManagedIdentityCredential').store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'

    def test_requests_are_slowed_down_one_by_one_and_counted(self, backend, proxy):
        proxy.latency = 0.2
        begun = time.monotonic()
        backend.mget([f'key-{number}' for number in range(20)])
        assert time.monotonic() - begun > 2 * proxy.latency
        assert len(proxy.requests) == 20
        assert all(request.seconds > proxy.latency for request in proxy.requests)
        assert 1 < proxy.most_at_once <= 10


class test_an_answer_that_passes:

    @pytest.mark.parametrize(('status', 'code'), PASSING)
    def test_a_store_gets_through(self, backend, proxy, state_of, status, code):
        proxy.on(answer(status, code), 'PUT', path=RESULTS, times=REPEATED)
        backend.store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'
        assert statuses(proxy) == [status] * REPEATED + [201]

    @pytest.mark.parametrize(('status', 'code'), PASSING)
    def test_a_read_gets_through(self, backend, proxy, status, code):
        proxy.on(answer(status, code), 'GET', path=RESULTS, times=REPEATED)
        assert backend.get_task_meta('before')['status'] == 'SUCCESS'
        assert statuses(proxy) == [status] * REPEATED + [206]

    @pytest.mark.parametrize(('status', 'code'), PASSING)
    def test_a_deletion_gets_through(self, backend, proxy, state_of, status, code):
        proxy.on(answer(status, code), 'DELETE', path=RESULTS, times=REPEATED)
        backend.forget('before')
        assert state_of('before') == 'PENDING'
        assert statuses(proxy) == [status] * REPEATED + [202]

    @pytest.mark.parametrize(('status', 'code'), PASSING)
    def test_one_that_stays_is_raised_as_it_is_and_may_be_tried_again(self, backend, proxy, state_of, status, code):
        proxy.on(answer(status, code, 'Said by the service.'), path=RESULTS)
        for operation in operations(backend):
            with pytest.raises(HttpResponseError) as info:
                operation()
            assert info.value.status_code == status
            assert not code or 'Said by the service.' in str(info.value)
            assert backend.exception_safe_to_retry(info.value)
        assert set(statuses(proxy)) == {status}
        assert [len(blobs(proxy, method)) for method in ('PUT', 'DELETE')] == [1 + REPEATED] * 2
        assert (state_of('task'), state_of('before')) == ('PENDING', 'SUCCESS')

    def test_the_creation_of_the_container_gets_through(self, connect_by_proxy, proxy, state_of):
        proxy.on(answer(503, 'ServerBusy'), query=CREATION, times=REPEATED)
        connect_by_proxy().store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'

    def test_a_container_that_is_being_deleted_is_not_taken_for_one_that_exists(
            self, connect_by_proxy, proxy, state_of):
        proxy.on(answer(409, 'ContainerBeingDeleted'), query=CREATION, times=REPEATED)
        connect_by_proxy().store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'
        assert [request.status for request in creations(proxy)] == [409] * REPEATED + [201]

    def test_bursts_delay_results_and_lose_none(self, connect_by_proxy, proxy, connect):
        for skip in range(20, 200, 20):
            proxy.on(answer(503, 'ServerBusy'), 'PUT', path=RESULTS, skip=skip, times=20)
        backend = connect_by_proxy(retry_max_attempts=1, settings=ALWAYS_RETRY)
        ids = [f'task-{number}' for number in range(200)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda task_id: backend.store_result(task_id, task_id, 'SUCCESS'), ids))
        assert statuses(proxy).count(503) == 9 * 20
        assert {task_id: meta['result'] for task_id, meta in connect().get_many(ids, timeout=30)} == {
            task_id: task_id for task_id in ids}


class test_403:

    def test_a_role_on_the_container_is_enough(self, connect_by_proxy, backend, proxy):
        proxy.on(answer(403, 'AuthorizationPermissionMismatch'), query=f'^{CREATION}$')
        ids = [f'task-{number}' for number in range(20)]
        for task_id in ids:
            backend.store_result(task_id, 1, 'STARTED')
            backend.store_result(task_id, 1, 'SUCCESS')
        assert len(dict(backend.get_many(ids, timeout=30))) == 20
        backend.forget('task-0')
        backend.cleanup()
        assert backend.get_task_meta('task-0', cache=False)['status'] == 'PENDING'
        assert 403 not in statuses(proxy)
        assert creations(proxy) == []

    def test_a_missing_container_that_may_not_be_created_is_named(
            self, connect_by_proxy, identity, proxy, container_name):
        proxy.on(answer(403, 'AuthorizationPermissionMismatch'), query=CREATION)
        with pytest.raises(HttpResponseError, match='on this container, if that is there already') as info:
            connect_by_proxy('ManagedIdentityCredential').store_result('task', 1, 'SUCCESS')
        assert f'{proxy.account_url}/{container_name}' in str(info.value)
        assert info.value.status_code == 403

    def test_who_may_do_nothing_is_told_which_role_is_missing_at_once(
            self, connect_by_proxy, identity, proxy, container_name):
        proxy.on(answer(403, 'AuthorizationPermissionMismatch', 'Not authorized.'))
        backend = connect_by_proxy('ManagedIdentityCredential', client_id='1234', settings=ALWAYS_RETRY)
        for operation in operations(backend):
            proxy.requests.clear()
            with pytest.raises(HttpResponseError) as info:
                operation()
            for words in ('ManagedIdentityCredential (client_id=1234) is not authorized for this operation in ',
                          f'{proxy.account_url}/{container_name}. It needs the role "Storage Blob Data Contributor"',
                          'Not authorized.'):
                assert words in str(info.value)
            assert (info.value.status_code, info.value.error_code) == (403, 'AuthorizationPermissionMismatch')
            assert str(info.value.__cause__).startswith('Not authorized.')
            assert len(proxy.requests) <= 2

    def test_a_cleanup_that_may_not_delete_says_so(self, connect_by_proxy, identity, backend, proxy):
        proxy.on(answer(403, 'AuthorizationPermissionMismatch'), query='comp=batch')
        backend = connect_by_proxy('ManagedIdentityCredential', settings={'result_expires': 1e-6})
        with pytest.raises(HttpResponseError, match='It needs the role "Storage Blob Data Contributor"'):
            backend.cleanup()

    def test_a_key_is_not_said_to_need_a_role(self, backend, proxy):
        proxy.on(answer(403, 'KeyBasedAuthenticationNotPermitted', 'Key based authentication is not permitted.'))
        with pytest.raises(HttpResponseError, match='The account must allow access with its keys') as info:
            backend.store_result('task', 1, 'SUCCESS')
        assert 'role' not in str(info.value)


class test_a_missing_container:

    def test_has_no_results(self, connect_by_proxy, proxy):
        _store, *others = operations(connect_by_proxy())
        assert [operation() for operation in others] == [{'status': 'PENDING', 'result': None}, [None, None], None]
        assert set(statuses(proxy)) == {404}
        assert creations(proxy) == []

    def test_is_created_by_the_first_result(self, connect_by_proxy, proxy, state_of):
        connect_by_proxy().store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'
        assert statuses(proxy) == [404, 201, 201]

    def test_is_created_again_when_someone_has_deleted_it(self, backend, container, state_of):
        backend.store_result('first', 1, 'SUCCESS')
        container.delete_container()
        backend.store_result('second', 1, 'SUCCESS')
        assert (state_of('first'), state_of('second')) == ('PENDING', 'SUCCESS')

    def test_may_be_missed_by_two_writers_at_once(self, connect_by_proxy, proxy, state_of):
        missed = Hold(answered=True)
        proxy.on(missed, 'PUT', path=RESULTS, times=2)
        backend = connect_by_proxy()
        with ThreadPoolExecutor(2) as threads:
            stores = [threads.submit(backend.store_result, task_id, 1, 'SUCCESS') for task_id in ('one', 'two')]
            missed.wait(2)
            missed.release()
            for store in stores:
                store.result()
        assert (state_of('one'), state_of('two')) == ('SUCCESS', 'SUCCESS')
        assert sorted(request.status for request in creations(proxy)) == [201, 409]


class test_a_conflict:

    def test_a_condition_that_fails_for_no_reason_is_tried_again(self, backend, proxy, state_of):
        proxy.on(answer(412, 'ConditionNotMet'), 'PUT', path=RESULTS, times=1)
        backend.store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'
        assert statuses(proxy) == [412, 404, 201]

    @pytest.mark.parametrize(('status', 'code'), [
        (409, 'LeaseAlreadyPresent'), (409, 'BlobImmutableDueToPolicy'), (409, ''), (412, 'LeaseIdMissing')])
    def test_any_other_is_raised_after_one_request(self, backend, proxy, status, code):
        proxy.on(answer(status, code), 'PUT', path=RESULTS)
        with pytest.raises(HttpResponseError) as info:
            backend.store_result('task', 1, 'SUCCESS')
        assert info.value.status_code == status
        assert not backend.exception_safe_to_retry(info.value)
        assert statuses(proxy) == [status]


class test_a_broken_connection:

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_a_store_gets_through(self, backend, proxy, connect, fault, done):
        proxy.on(fault, 'PUT', path=RESULTS, times=REPEATED)
        backend.store_result('task', 'mine', 'SUCCESS')
        assert connect().get_result('task') == 'mine'
        writes = [request.service_status for request in blobs(proxy, 'PUT')]
        assert writes == ([201, 409, 409, 409] if done else [None, None, None, 201])

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_a_state_that_follows_another_gets_through(self, backend, proxy, connect, fault, done):
        backend.store_result('task', None, 'STARTED')
        proxy.on(fault, 'PUT', path=RESULTS, times=1)
        backend.store_result('task', 'mine', 'SUCCESS')
        assert connect().get_result('task') == 'mine'
        writes = [request.service_status for request in blobs(proxy, 'PUT')]
        assert writes == ([201, 201, 412] if done else [201, None, 201])

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_a_read_gets_through(self, backend, proxy, fault, done):
        proxy.on(fault, 'GET', path=RESULTS, times=REPEATED)
        assert backend.get_task_meta('before')['status'] == 'SUCCESS'
        assert len(proxy.requests) == 1 + REPEATED

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_a_deletion_gets_through(self, backend, proxy, state_of, fault, done):
        proxy.on(fault, 'DELETE', path=RESULTS, times=REPEATED)
        backend.forget('before')
        assert state_of('before') == 'PENDING'
        assert [request.service_status for request in proxy.requests] == (
            [202, 404, 404, 404] if done else [None, None, None, 202])

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_the_creation_of_the_container_gets_through(self, connect_by_proxy, proxy, state_of, fault, done):
        proxy.on(fault, query=CREATION, times=REPEATED)
        connect_by_proxy().store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'
        assert [request.service_status for request in creations(proxy)] == (
            [201, 409, 409, 409] if done else [None, None, None, 201])

    @pytest.mark.parametrize(('fault', 'done'), BROKEN)
    def test_one_that_stays_broken_is_raised_and_may_be_tried_again(self, backend, proxy, state_of, fault, done):
        proxy.on(fault, path=RESULTS)
        for operation in operations(backend):
            with pytest.raises(ServiceResponseError) as info:
                operation()
            assert backend.exception_safe_to_retry(info.value)
        assert set(statuses(proxy)) == {None}
        assert (state_of('task'), state_of('before')) == (
            ('SUCCESS', 'PENDING') if done else ('PENDING', 'SUCCESS'))

    @pytest.mark.parametrize('fault', [
        pytest.param(cut_within(), id='cut'), pytest.param(cut_within(reset=True), id='reset')])
    def test_an_answer_that_breaks_off_is_asked_for_again(self, backend, proxy, fault):
        proxy.on(fault, 'GET', path=RESULTS, times=1)
        assert backend.get_task_meta('before')['result'] == 0
        assert [request.service_status for request in proxy.requests] == [206, 206]

    def test_half_an_answer_is_never_taken_for_a_whole_one(self, backend, proxy):
        proxy.on(cut_within(), 'GET', path=RESULTS)
        with pytest.raises(AzureError) as info:
            backend.get_task_meta('before')
        assert backend.exception_safe_to_retry(info.value)

    def test_the_first_write_that_arrives_late_changes_nothing(self, connect_by_proxy, backend, proxy, connect):
        late = Hold()
        proxy.on(late, 'PUT', path=RESULTS, times=1)
        hasty = connect_by_proxy(read_timeout=0.3)
        hasty.store_result('task', None, 'STARTED')
        backend.store_result('task', 'mine', 'SUCCESS')
        late.release()
        wait_until(lambda: blobs(proxy, 'PUT')[0].service_status, 'the late write', 30)
        assert blobs(proxy, 'PUT')[0].service_status == 409
        assert connect().get_result('task') == 'mine'


class test_a_service_that_hangs:

    def test_a_store_gets_through(self, connect_by_proxy, backend, proxy, state_of):
        proxy.on(hang(), path=RESULTS, times=1)
        connect_by_proxy(read_timeout=0.3).store_result('task', 1, 'SUCCESS')
        assert state_of('task') == 'SUCCESS'

    def test_one_that_goes_on_is_raised_and_may_be_tried_again(self, connect_by_proxy, backend, proxy):
        proxy.on(hang(), path=RESULTS)
        hasty = connect_by_proxy(read_timeout=0.3)
        for operation in operations(hasty):
            with within(AT_ONCE), pytest.raises(ServiceResponseTimeoutError, match='read timeout=0.3') as info:
                operation()
            assert hasty.exception_safe_to_retry(info.value)


class test_a_service_that_is_not_there:

    def test_is_reported_within_seconds(self, connect_by_proxy, proxy, container_name):
        proxy.stop()
        backend = connect_by_proxy(retry_max_attempts=1)
        place = f'{proxy.account_url}/{container_name}'
        for operation in operations(backend):
            with within(AT_ONCE), pytest.raises(ServiceRequestError) as info:
                operation()
            assert f'Cannot connect to {place}. Check the account URL' in str(info.value)
            assert 'Connection refused' in str(info.value)
            assert backend.exception_safe_to_retry(info.value)

    def test_a_result_gets_through_when_it_is_there_again(
            self, connect_by_proxy, backend, proxy, state_of, asked_again):
        backend = connect_by_proxy(retry_max_attempts=0, settings=ALWAYS_RETRY)
        backend.get_task_meta('before')
        proxy.stop()
        with ThreadPoolExecutor(1) as threads:
            store = threads.submit(backend.store_result, 'task', 1, 'SUCCESS')
            wait_until(lambda: asked_again.call_count > 2, 'two attempts', 30)
            proxy.start()
            store.result(60)
        assert state_of('task') == 'SUCCESS'

    def test_a_shared_access_signature_shows_nowhere(self, azurite, proxy, container_name):
        proxy.stop()
        expiry = datetime.now(timezone.utc) + timedelta(hours=1)
        sas = generate_account_sas(azurite.account_name, azurite.account_key, 'sco', 'racwdl', expiry)
        signature = sas.rpartition('sig=')[2]
        app = Celery('test', set_as_current=False, backend=(
            f'azureblockblob://BlobEndpoint={proxy.account_url};SharedAccessSignature={sas}'))
        app.conf.update(azureblockblob_container_name=container_name, azureblockblob_retry_max_attempts=0)
        with pytest.raises(ServiceRequestError) as info:
            app.backend.store_result('task', 1, 'SUCCESS')
        text = ''.join(traceback.format_exception(info.value))
        assert 'sig=**' in text
        assert signature not in text


class test_an_answer_from_somewhere_else:

    @pytest.mark.parametrize('status', [302, 400, 403, 404, 405])
    def test_is_not_taken_for_the_services(self, backend, proxy, container_name, status):
        proxy.on(answer(status))
        for operation in operations(backend):
            with pytest.raises(HttpResponseError) as info:
                operation()
            assert f'{proxy.account_url}/{container_name} is not the blob service of this account' in str(info.value)
            assert not backend.exception_safe_to_retry(info.value)

    @pytest.mark.filterwarnings('ignore:unclosed')  # the SDK leaves such an answer unread
    def test_a_web_page_is_not_taken_for_a_result(self, backend, proxy, container_name):
        proxy.on(answer(200))
        with pytest.raises(DecodeError) as info:
            backend.get_task_meta('before')
        assert f'{proxy.account_url}/{container_name} is not the blob service of this account' in str(info.value)
        del info
        gc.collect()

    def test_an_account_that_is_not_there_is_not_an_empty_one(self, azurite, container_name):
        url = f'azureblockblob://{azurite.account_name}:{azurite.account_key}@{azurite.account_url}'
        app = Celery('test', set_as_current=False, backend=url.replace(azurite.account_name, 'other'))
        with pytest.raises(ResourceNotFoundError, match='Check the account URL'):
            app.backend.get_task_meta('task')

    def test_a_certificate_that_is_not_trusted_is_reported_at_once(
            self, connect_by_proxy, proxy, container_name, tmp_path, monkeypatch):
        monkeypatch.setenv('REQUESTS_CA_BUNDLE', str(make_certificates(tmp_path).bundle))
        backend = connect_by_proxy(retry_initial_backoff_sec=2, retry_increment_base=2, settings=ALWAYS_RETRY)
        with within(AT_ONCE), pytest.raises(ServiceRequestError, match='REQUESTS_CA_BUNDLE') as info:
            backend.store_result('task', 1, 'SUCCESS')
        assert f'{proxy.account_url}/{container_name}' in str(info.value)
        assert 'CERTIFICATE_VERIFY_FAILED' in str(info.value)

    def test_a_certificate_for_another_host_is_reported_at_once(self, proxy, url_for, azurite, monkeypatch):
        resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, 'getaddrinfo', lambda host, *args, **options: resolve(HOST, *args, **options))
        elsewhere = proxy.account_url.replace(HOST, 'account.example.org')
        app = Celery('test', set_as_current=False, backend=url_for().replace(azurite.account_url, elsewhere))
        with within(AT_ONCE), pytest.raises(ServiceRequestError, match='must be valid for this host') as info:
            app.backend.store_result('task', 1, 'SUCCESS')
        assert elsewhere in str(info.value)


class test_a_token_that_fails:

    def test_is_asked_for_once_and_reported_at_once(self, connect, identity, container_name, azurite):
        identity.status = 403
        backend = connect('ManagedIdentityCredential', client_id='1234', settings=ALWAYS_RETRY)
        with within(AT_ONCE), pytest.raises(AzureError, match='could not get a token') as info:
            backend.store_result('task', 1, 'SUCCESS')
        assert 'ManagedIdentityCredential (client_id=1234)' in str(info.value)
        assert f'{azurite.account_url}/{container_name}' in str(info.value)
        assert len(identity.requests) == 1


class test_Azurite_that_is_stopped_and_started_under_load:

    THREADS = 4
    RESULTS_EACH = 80

    @pytest.fixture
    def own_azurite(self, tmp_path, certificates):
        with Azurite(tmp_path, certificates) as service:
            yield service

    @pytest.fixture
    def app(self, own_azurite, container_name):
        app = Celery('test', set_as_current=False, backend=f'azureblockblob://{own_azurite.connection_string}')
        app.conf.update(
            ALWAYS_RETRY, azureblockblob_container_name=container_name, azureblockblob_retry_max_attempts=0)
        yield app
        close_clients()

    def test_no_result_is_lost(self, own_azurite, app, asked_again):
        stored = []

        def store(thread):
            for number in range(self.RESULTS_EACH):
                task_id = f'task-{thread}-{number}'
                app.backend.store_result(task_id, task_id, 'STARTED')
                app.backend.store_result(task_id, task_id, 'SUCCESS')
                stored.append(task_id)

        with ThreadPoolExecutor(self.THREADS) as threads:
            stores = [threads.submit(store, thread) for thread in range(self.THREADS)]
            wait_until(lambda: len(stored) > 20, 'results before', 60)
            own_azurite.stop()
            wait_until(lambda: asked_again.call_count >= self.THREADS, 'a thread that waits', 60)
            before = len(stored)
            own_azurite.start()
            for done in stores:
                done.result(120)
        assert before < len(stored) == self.THREADS * self.RESULTS_EACH
        results = {task_id: meta['result'] for task_id, meta in app.backend.get_many(stored, timeout=60)}
        assert results == {task_id: task_id for task_id in stored}
