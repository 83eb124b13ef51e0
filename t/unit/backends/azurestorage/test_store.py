"""Who writes a task's state when others do so too. What happens in between is forced, never left to chance."""
from __future__ import annotations

import itertools
import threading
from unittest.mock import Mock

import pytest

from celery import states
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded, TimeoutError

from .fakehttp import cut_connection, refuse_connection

azureblockblob = pytest.importorskip('celery.backends.azureblockblob')
client = pytest.importorskip('celery.backends.azurestorage.client')
core = pytest.importorskip('azure.core.exceptions')

BLOB = 'celery-task-meta-id'

#: States that a success replaces.
UNFINISHED = [states.STARTED, states.RETRY, 'PROGRESS']
LESSER = [*UNFINISHED, states.FAILURE, states.REVOKED]

DAY = 24 * 60 * 60  # what results are kept for, in seconds

#: How long threads may wait for each other, in seconds.
DEADLINE = 30


@pytest.fixture
def backend(make_backend):
    backend = make_backend(azureblockblob_container_name='results')
    backend.set('makes the container', b'')
    return backend


@pytest.fixture
def processes(make_backend):
    """Return a function that makes the backend of another process.

    Its client has a setting of its own, so that the two share nothing, above all no ETags.
    """
    timeouts = itertools.count(1000)
    return lambda: make_backend(azureblockblob_container_name='results', azureblockblob_read_timeout=next(timeouts))


@pytest.fixture
def store(backend):
    """Store a state of the task `id`, with a value that no other has."""
    values = itertools.count()

    def store(state, request=None, writer=backend):
        value = f'{next(values)}'
        writer.store_result(
            'id', ValueError(value) if state in states.EXCEPTION_STATES else value, state, request=request)
    return store


@pytest.fixture
def requests_of(fake_service):
    """Return the operations that an action asks for."""
    def requests_of(action):
        del fake_service.requests[:]
        action()
        return fake_service.operations
    return requests_of


@pytest.fixture
def stored(processes):
    """Return the state that is stored, as another process reads it."""
    reader = processes()
    return lambda: reader.get_state('id')


class test_number_of_requests:

    def test_a_result_is_one(self, store, requests_of):
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob']

    def test_started_and_success_are_two(self, store, requests_of):
        assert requests_of(lambda: [store(states.STARTED), store(states.SUCCESS)]) == ['Put Blob'] * 2

    def test_each_state_of_one_process_is_one(self, store, requests_of, stored):
        assert requests_of(lambda: [store(state) for state in [*UNFINISHED, states.SUCCESS]]) == ['Put Blob'] * 4
        assert stored() == states.SUCCESS

    def test_a_read_is_one(self, backend, store, requests_of):
        store(states.SUCCESS)
        assert requests_of(lambda: backend.get_task_meta('id')) == ['Get Blob']

    def test_a_missing_result_is_one(self, backend, requests_of):
        assert requests_of(lambda: backend.get_task_meta('id')) == ['Get Blob']

    def test_200_results_are_200_at_most_10_at_once(self, backend, requests_of, fake_service):
        ids = [f'id-{number}' for number in range(200)]
        for task_id in ids:
            backend.store_result(task_id, 1, states.SUCCESS)
        everyone = threading.Barrier(10, timeout=DEADLINE)
        fake_service.on('Get Blob', times=200, before=everyone.wait)
        assert requests_of(lambda: list(backend.get_many(ids))) == ['Get Blob'] * 200
        assert fake_service.peak == 10

    def test_fewer_at_once_can_be_asked_for(self, make_backend, fake_service):
        backend = make_backend(azureblockblob_max_concurrency=3)
        everyone = threading.Barrier(3, timeout=DEADLINE)
        fake_service.on('Get Blob', times=30, before=everyone.wait)
        assert backend.mget([f'key-{number}' for number in range(30)]) == [None] * 30
        assert fake_service.peak == 3

    def test_one_at_once_takes_no_threads(self, make_backend, fake_service):
        threads = threading.enumerate()
        make_backend(azureblockblob_max_concurrency=1).mget(['a', 'b', 'c'])
        assert fake_service.peak == 1
        assert threading.enumerate() == threads

    def test_a_forgotten_result_is_one(self, backend, store, requests_of):
        store(states.SUCCESS)
        assert requests_of(lambda: backend.forget('id')) == ['Delete Blob']

    def test_a_result_of_100_mib_is_one(self, backend, store, requests_of, stored):
        value = 'x' * (100 * 1024 * 1024)
        assert requests_of(lambda: backend.store_result('id', value, states.SUCCESS)) == ['Put Blob']
        assert requests_of(lambda: store(states.FAILURE)) == ['Put Blob', 'Get Blob']
        assert stored() == states.SUCCESS


class test_a_repeated_task:
    """One that is retried or delivered again: something is probably there, so reading comes first."""

    requests = pytest.mark.parametrize('request_', [
        Context(id='id', retries=1),
        Context(id='id', retries=0, delivery_info={'redelivered': True}),
    ], ids=['retried', 'redelivered'])

    @requests
    @pytest.mark.parametrize('before', LESSER)
    def test_reads_and_replaces(self, store, processes, requests_of, stored, request_, before):
        store(before, writer=processes())
        assert requests_of(lambda: store(states.SUCCESS, request_)) == ['Get Blob', 'Put Blob']
        assert stored() == states.SUCCESS

    @requests
    @pytest.mark.parametrize('state', [*LESSER, states.SUCCESS])
    def test_leaves_a_success_alone(self, store, processes, requests_of, stored, request_, state):
        store(states.SUCCESS, writer=processes())
        assert requests_of(lambda: store(state, request_)) == ['Get Blob']
        assert stored() == states.SUCCESS

    @requests
    def test_may_find_nothing(self, store, requests_of, request_):
        assert requests_of(lambda: store(states.STARTED, request_)) == ['Get Blob', 'Put Blob']

    @requests
    def test_reads_once(self, store, requests_of, request_):
        store(states.STARTED, request_)
        assert requests_of(lambda: store(states.SUCCESS, request_)) == ['Put Blob']

    @pytest.mark.parametrize('request_', [
        None, Context(id='id'), Context(id='id', retries=0, delivery_info=None),
        Context(id='id', delivery_info={'redelivered': False}),
    ])
    def test_is_not_one_that_runs_for_the_first_time(self, store, requests_of, request_):
        assert requests_of(lambda: store(states.STARTED, request_)) == ['Put Blob']


class test_an_etag_that_is_kept:

    @pytest.mark.parametrize('other', LESSER)
    def test_is_stale_when_another_process_has_written(self, store, processes, requests_of, stored, other):
        store(states.STARTED)
        store(other, writer=processes())
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob', 'Get Blob', 'Put Blob']
        assert stored() == states.SUCCESS

    @pytest.mark.parametrize('state', LESSER)
    def test_does_not_hide_the_success_of_another_process(self, store, processes, requests_of, stored, state):
        store(states.STARTED)
        store(states.SUCCESS, writer=processes())
        assert requests_of(lambda: store(state)) == ['Put Blob', 'Get Blob']
        assert stored() == states.SUCCESS

    def test_is_of_no_use_for_a_forgotten_result(self, backend, store, requests_of, stored):
        store(states.STARTED)
        backend.forget('id')
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob', 'Get Blob', 'Put Blob']
        assert stored() == states.SUCCESS

    def test_is_found_again_after_a_conflict(self, store, processes, requests_of):
        store(states.STARTED, writer=processes())
        store(states.STARTED)
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob']

    def test_is_not_kept_for_a_finished_task(self, backend, store):
        store(states.STARTED)
        store(states.FAILURE)
        assert list(backend.container.unfinished) == []

    def test_is_one_of_a_limited_number(self, backend, monkeypatch):
        for number in range(client.UNFINISHED_KEPT + 10):
            backend.container.unfinished[f'{number}'] = 'etag'
        backend.store_result('id', None, states.STARTED)
        assert len(backend.container.unfinished) == client.UNFINISHED_KEPT

    def test_is_shared_by_the_threads_of_a_process(self, store, make_backend, requests_of):
        store(states.STARTED)
        same_process = make_backend(azureblockblob_container_name='results')
        assert requests_of(lambda: store(states.SUCCESS, writer=same_process)) == ['Put Blob']


class test_between_two_requests:
    """What others do between our requests: before our first write, between its conflict and our read, and later."""

    @pytest.fixture(params=['first write', 'read', 'second write'])
    def meanwhile(self, request, backend, store, processes, fake_service):
        """Let something be done just before one of the three requests that a conflict brings about."""
        def meanwhile(action):
            if request.param == 'first write':
                fake_service.on('Put Blob', 'id', before=action)
                return
            store(states.STARTED, writer=processes())  # so that the first write conflicts
            if request.param == 'read':
                fake_service.on('Get Blob', 'id', before=action)
            else:
                fake_service.on('Put Blob', 'id')
                fake_service.on('Put Blob', 'id', before=action)
        return meanwhile

    @pytest.mark.parametrize('state', LESSER)
    def test_a_success_stays(self, meanwhile, store, processes, stored, state):
        other = processes()
        meanwhile(lambda: store(states.SUCCESS, writer=other))
        store(state)
        assert stored() == states.SUCCESS

    @pytest.mark.parametrize('other_state', LESSER)
    def test_a_lesser_state_is_replaced(self, meanwhile, store, processes, stored, other_state):
        other = processes()
        meanwhile(lambda: store(other_state, writer=other))
        store(states.SUCCESS)
        assert stored() == states.SUCCESS

    def test_the_result_is_forgotten(self, meanwhile, store, processes, stored):
        other = processes()
        meanwhile(lambda: other.forget('id'))
        store(states.SUCCESS)
        assert stored() == states.SUCCESS

    def test_the_result_is_forgotten_and_stored_again(self, meanwhile, store, processes, stored):
        other = processes()
        meanwhile(lambda: [other.forget('id'), store(states.SUCCESS, writer=other)])
        store(states.FAILURE)
        assert stored() == states.SUCCESS

    def test_the_result_expires(self, meanwhile, store, processes, stored, fake_service):
        other = processes()
        fake_service.now -= 2 * DAY
        meanwhile(other.cleanup)
        store(states.SUCCESS)
        assert stored() == states.SUCCESS

    def test_the_container_is_deleted(self, meanwhile, store, backend, fake_service):
        def delete():
            del fake_service.containers['results']
        meanwhile(delete)
        store(states.SUCCESS)
        assert backend.get_state('id') == states.SUCCESS

    def test_every_round_brings_another_writer(self, store, processes, stored, fake_service, requests_of):
        other = processes()
        for _ in range(20):
            fake_service.on('Put Blob', 'id', before=lambda: store(states.RETRY, writer=other))
            fake_service.on('Put Blob', 'id')  # the other writer's own
        store(states.SUCCESS)
        assert stored() == states.SUCCESS


class test_cleanup_meanwhile:

    @pytest.mark.parametrize('request_', ['List Blobs', 'Blob Batch'])
    def test_leaves_what_is_written_again(self, backend, store, processes, stored, fake_service, request_):
        fake_service.now -= 2 * DAY
        store(states.STARTED)
        fake_service.now += 2 * DAY
        fake_service.on(request_, before=lambda: store(states.SUCCESS))
        processes().cleanup()
        assert stored() == states.SUCCESS


class test_a_lost_answer:

    @pytest.mark.parametrize('state', [*LESSER, states.SUCCESS])
    def test_to_the_first_write(self, store, requests_of, stored, fake_service, state):
        fake_service.on('Put Blob', after=cut_connection)
        assert requests_of(lambda: store(state)) == ['Put Blob', 'Put Blob', 'Get Blob']
        assert stored() == state

    def test_to_a_write_whose_etag_is_kept(self, store, requests_of, fake_service):
        fake_service.on('Put Blob', after=cut_connection)
        store(states.STARTED)
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob']

    def test_to_a_write_over_another_state(self, store, requests_of, stored, fake_service):
        store(states.STARTED)
        fake_service.on('Put Blob', after=cut_connection)
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob', 'Put Blob', 'Get Blob']
        assert stored() == states.SUCCESS

    def test_to_the_read_after_a_conflict(self, store, processes, requests_of, stored, fake_service):
        store(states.STARTED, writer=processes())
        fake_service.on('Get Blob', after=cut_connection)
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob', 'Get Blob', 'Get Blob', 'Put Blob']
        assert stored() == states.SUCCESS

    def test_while_another_process_succeeds(self, store, processes, stored, fake_service):
        other = processes()

        def lose():
            store(states.SUCCESS, writer=other)
            cut_connection()

        fake_service.on('Put Blob', after=lose)
        store(states.FAILURE)
        assert stored() == states.SUCCESS

    def test_while_the_result_is_forgotten(self, store, processes, stored, fake_service):
        def lose():
            processes().forget('id')
            cut_connection()

        fake_service.on('Put Blob', after=lose)
        store(states.SUCCESS)
        assert stored() == states.SUCCESS

    def test_to_forgetting(self, backend, store, requests_of, stored, fake_service):
        store(states.SUCCESS)
        fake_service.on('Delete Blob', after=cut_connection)
        assert requests_of(lambda: backend.forget('id')) == ['Delete Blob'] * 2
        assert stored() == states.PENDING

    def test_to_a_read(self, backend, store, requests_of, fake_service):
        store(states.SUCCESS)
        fake_service.on('Get Blob', after=cut_connection)
        assert requests_of(lambda: backend.get_state('id')) == ['Get Blob'] * 2

    def test_to_the_making_of_the_container(self, make_backend, requests_of, fake_service):
        backend = make_backend()
        fake_service.on('Create Container', after=cut_connection)
        assert requests_of(lambda: backend.store_result('id', 1, states.SUCCESS)) == [
            'Put Blob', 'Create Container', 'Create Container', 'Put Blob']
        assert backend.get_state('id') == states.SUCCESS

    def test_to_every_request(self, store, stored, fake_service):
        for _ in range(3):  # each request, and its repetition that succeeds
            fake_service.on(blob='id', after=cut_connection)
            fake_service.on(blob='id')
        store(states.SUCCESS)
        assert stored() == states.SUCCESS

    def test_a_refused_connection_is_tried_again(self, store, requests_of, stored, fake_service):
        fake_service.on('Put Blob', before=refuse_connection)
        assert requests_of(lambda: store(states.SUCCESS)) == ['Put Blob'] * 2
        assert stored() == states.SUCCESS


class test_a_request_that_arrives_late:
    """The network may hold back a request until its sender has given up on it and gone on."""

    @pytest.fixture
    def hold_back(self, fake_service):
        """Hold back the next write, and return a function that lets it arrive."""
        def hold_back():
            number = len(fake_service.requests)
            fake_service.on('Put Blob', 'id', before=refuse_connection)
            return lambda: fake_service.answer(fake_service.requests[number])
        return hold_back

    def test_does_not_undo_a_success(self, store, stored, hold_back):
        arrive = hold_back()
        store(states.STARTED)
        store(states.SUCCESS)
        assert arrive().status == 409
        assert stored() == states.SUCCESS

    def test_does_not_undo_the_success_of_another(self, store, processes, stored, hold_back):
        arrive = hold_back()
        store(states.FAILURE)
        store(states.SUCCESS, writer=processes())
        assert arrive().status == 409
        assert stored() == states.SUCCESS

    def test_does_not_undo_what_followed_on_its_etag(self, store, stored, hold_back):
        store(states.STARTED)
        arrive = hold_back()
        store(states.RETRY)
        store(states.SUCCESS)
        assert arrive().status == 412
        assert stored() == states.SUCCESS


class test_what_is_no_conflict:

    @pytest.mark.parametrize(('status', 'code'), [
        (409, 'BlobImmutableDueToPolicy'),
        (409, 'InvalidBlobType'),
        (409, 'SnapshotsPresent'),
        (409, 'PublicAccessNotPermitted'),
        (412, 'LeaseIdMissing'),
        (412, 'BlobTagsConditionNotMet'),
        (400, 'InvalidHeaderValue'),
        (403, 'AuthorizationPermissionMismatch'),
        (404, 'ResourceTypeMismatch'),
    ])
    def test_is_raised_after_one_request(self, store, requests_of, fake_service, status, code):
        fake_service.on('Put Blob', answer=(status, code))
        with pytest.raises(core.HttpResponseError) as caught:
            store(states.SUCCESS)
        assert caught.value.status_code == status
        assert len([request for request in fake_service.requests if request.blob == BLOB]) == 1

    def test_an_endless_conflict_ends_with_an_error(self, store, fake_service):
        fake_service.on('Put Blob', times=float('inf'), answer=(412, 'ConditionNotMet'))
        with pytest.raises(client.Conflict):
            store(states.SUCCESS)
        written = [request for request in fake_service.requests if (request.method, request.blob) == ('PUT', BLOB)]
        assert len(written) == azureblockblob.MAX_ROUNDS

    def test_an_error_in_the_read_is_raised(self, store, processes, fake_service):
        store(states.STARTED, writer=processes())
        fake_service.on('Get Blob', answer=(403, 'AuthorizationPermissionMismatch'))
        with pytest.raises(core.HttpResponseError):
            store(states.SUCCESS)

    @pytest.mark.parametrize('data', [b'{', b'null', b'[]', b'{}', b'\xff\xfe', b'\x00zstd'])
    @pytest.mark.parametrize('state', [states.SUCCESS, states.FAILURE, states.REVOKED])
    def test_a_state_that_cannot_be_read_is_replaced_by_a_finished_one(
            self, backend, store, stored, state, data, caplog):
        backend.set(BLOB, data)
        store(state)
        assert stored() == state
        assert f'{BLOB} cannot be read' in caplog.text

    @pytest.mark.parametrize('state', UNFINISHED)
    def test_a_state_that_cannot_be_read_stays_until_then(self, backend, store, state, caplog):
        backend.set(BLOB, b'\xff\xfe')
        store(state)
        assert backend.container.read(BLOB).data == b'\xff\xfe'
        assert 'stays' in caplog.text

    def test_a_state_of_another_serializer_is_replaced(self, make_backend, store, stored, processes):
        make_backend(azureblockblob_container_name='results', result_serializer='pickle',
                     azureblockblob_read_timeout=999).store_result('id', None, states.STARTED)
        store(states.SUCCESS, writer=processes())
        assert stored() == states.SUCCESS

    def test_a_time_limit_while_a_state_is_read_is_raised(self, backend, store, stored, processes, monkeypatch):
        store(states.STARTED)
        writer = processes()
        monkeypatch.setattr(writer, 'decode', Mock(side_effect=SoftTimeLimitExceeded))
        with pytest.raises(SoftTimeLimitExceeded):
            store(states.SUCCESS, writer=writer)
        assert stored() == states.STARTED

    def test_an_empty_blob_is_missing_among_many(self, backend):
        backend.set(BLOB, b'')
        assert backend.get(BLOB) is None
        with pytest.raises(TimeoutError):
            list(backend.get_many(['id'], timeout=0))

    def test_an_empty_blob_is_no_result_and_is_replaced(self, backend, store, stored):
        backend.set(BLOB, b'')
        store(states.SUCCESS)
        assert stored() == states.SUCCESS
