"""How a client waits for results. Time is the test's own: nothing here depends on how fast the machine is."""
from __future__ import annotations

import pytest

from celery import states
from celery.exceptions import TimeoutError

azureblockblob = pytest.importorskip('celery.backends.azureblockblob')


class Clock:
    """Stands in for the module `time`, of which the backend must use nothing else.

    Attributes:
        pauses: How long each sleep was, in seconds.
        on_sleep: Called after each sleep, with the number of sleeps so far.
    """

    def __init__(self):
        self.now = 1000.0
        self.pauses = []
        self.on_sleep = lambda count: None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(round(seconds, 6))
        self.now += seconds
        self.on_sleep(len(self.pauses))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(azureblockblob, 'time', clock)
    return clock


@pytest.fixture
def backend(make_backend, clock):
    return make_backend()


@pytest.fixture
def store(backend):
    return lambda task_id='id', value=1, state=states.SUCCESS: backend.store_result(task_id, value, state)


def wait_for_one(backend, **kwargs):
    return backend.wait_for('id', **kwargs)


def wait_for_many(backend, **kwargs):
    return list(backend.get_many(['id'], **kwargs))


@pytest.fixture(params=[wait_for_one, wait_for_many])
def wait(request, backend):
    """Wait for the task `id`, in each of the two ways."""
    return lambda **kwargs: request.param(backend, **kwargs)


class test_pauses:

    def test_a_result_that_is_there_is_read_at_once(self, wait, store, clock, fake_service):
        store()
        del fake_service.requests[:]
        assert wait()
        assert clock.pauses == []
        assert fake_service.operations == ['Get Blob']

    def test_they_begin_at_10_ms_and_double_up_to_the_interval(self, wait, store, clock):
        clock.on_sleep = lambda count: count == 9 and store()
        wait()
        assert clock.pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]

    def test_none_is_longer_than_the_interval_however_far_the_timeout(self, wait, store, clock):
        clock.on_sleep = lambda count: count == 9 and store()
        wait(timeout=60)
        assert clock.pauses[-3:] == [0.5, 0.5, 0.5]

    def test_no_interval_is_half_a_second(self, wait, store, clock):
        clock.on_sleep = lambda count: count == 8 and store()
        wait(interval=None)
        assert clock.pauses[-2:] == [0.5, 0.5]

    def test_a_longer_interval_is_reached_by_doubling(self, wait, store, clock):
        clock.on_sleep = lambda count: count == 9 and store()
        wait(interval=1)
        assert clock.pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1]

    def test_none_is_longer_than_a_short_interval(self, wait, store, clock):
        clock.on_sleep = lambda count: count == 3 and store()
        wait(interval=0.004)
        assert clock.pauses == [0.004] * 3

    def test_there_is_none_after_the_last_result(self, wait, store, clock):
        clock.on_sleep = lambda count: store()
        wait()
        assert clock.pauses == [0.01]

    @pytest.mark.parametrize('state', [states.STARTED, states.RETRY, 'PROGRESS'])
    def test_an_unfinished_task_is_waited_for(self, wait, store, clock, state):
        store(value=ValueError('x') if state == states.RETRY else None, state=state)
        clock.on_sleep = lambda count: store()
        wait()
        assert clock.pauses == [0.01]

    @pytest.mark.parametrize('state', [states.FAILURE, states.REVOKED])
    def test_a_failed_task_is_not_waited_for(self, wait, store, clock, state):
        store(value=ValueError('x'), state=state)
        wait()
        assert clock.pauses == []

    def test_the_caller_is_told_before_each(self, wait, store, clock):
        told = []
        clock.on_sleep = lambda count: count == 2 and store()
        wait(on_interval=lambda: told.append(len(clock.pauses)))
        assert told == [0, 1]


class test_timeout:

    def test_it_ends_the_wait(self, wait, clock):
        with pytest.raises(TimeoutError):
            wait(timeout=0.1)
        assert clock.pauses == [0.01, 0.02, 0.04, 0.03]
        assert clock.now == pytest.approx(1000.1)

    def test_there_is_a_last_look_when_it_is_over(self, wait, store, clock):
        clock.on_sleep = lambda count: clock.now >= 1000.1 and store()
        assert wait(timeout=0.1)

    def test_zero_is_one_look(self, wait, clock, fake_service):
        with pytest.raises(TimeoutError):
            wait(timeout=0)
        assert clock.pauses == []
        assert fake_service.operations == ['Get Blob']

    def test_a_slow_service_cannot_hide_a_result(self, wait, store, clock, fake_service):
        store()
        fake_service.on('Get Blob', before=lambda: clock.sleep(3600))
        assert wait(timeout=1)

    def test_the_time_that_reading_takes_counts(self, wait, clock, fake_service):
        fake_service.on('Get Blob', times=10, before=lambda: setattr(clock, 'now', clock.now + 0.6))
        with pytest.raises(TimeoutError):
            wait(timeout=1)
        assert fake_service.operations == ['Get Blob'] * 2

    def test_it_is_checked_once_all_that_came_is_handed_over(self, backend, store, clock):
        for number in range(5):
            store(f'id-{number}', number)
        coming = backend.get_many([f'id-{number}' for number in range(5)] + ['missing'], timeout=1)
        got = [next(coming)[0]]
        clock.now += 3600  # what the caller does with a result takes its time
        got += [next(coming)[0] for _ in range(4)]
        with pytest.raises(TimeoutError):
            next(coming)
        assert sorted(got) == [f'id-{number}' for number in range(5)]


class test_many:

    def test_only_what_is_missing_is_read_again(self, backend, store, clock, fake_service):
        store('first')
        clock.on_sleep = lambda count: store('second')
        del fake_service.requests[:]
        list(backend.get_many(['first', 'second']))
        read = [request.blob for request in fake_service.requests if request.operation == 'Get Blob']
        assert sorted(read[:2]) == ['celery-task-meta-first', 'celery-task-meta-second']
        assert read[2:] == ['celery-task-meta-second']

    def test_what_is_cached_is_not_read_again(self, make_backend, fake_service):
        backend = make_backend(result_cache_max=10)
        backend.store_result('id', 1, states.SUCCESS)
        first = list(backend.get_many(['id']))
        del fake_service.requests[:]
        assert list(backend.get_many(['id'])) == first
        assert fake_service.requests == []

    def test_no_tasks_are_no_requests(self, backend, fake_service, clock):
        assert list(backend.get_many([])) == []
        assert (fake_service.requests, clock.pauses) == ([], [])

    def test_the_callers_ids_are_left_alone(self, backend, store):
        store()
        ids = {'id'}
        list(backend.get_many(ids))
        assert ids == {'id'}

    def test_each_message_is_handed_over(self, backend, store):
        store()
        got = []
        list(backend.get_many(['id'], on_message=got.append))
        assert [meta['result'] for meta in got] == [1]

    def test_looks_can_be_counted(self, backend, clock, fake_service):
        assert list(backend.get_many(['id'], max_iterations=3)) == []
        assert fake_service.operations == ['Get Blob'] * 3

    def test_other_states_can_be_waited_for(self, backend, store):
        store(value=None, state=states.STARTED)
        (_, meta), = backend.get_many(['id'], READY_STATES={states.STARTED})
        assert meta['status'] == states.STARTED

    def test_each_pass_is_one_pause_however_many_are_missing(self, backend, clock, store):
        ids = [f'id-{number}' for number in range(50)]
        clock.on_sleep = lambda count: [store(task_id) for task_id in ids]
        assert len(list(backend.get_many(ids))) == 50
        assert clock.pauses == [0.01]
