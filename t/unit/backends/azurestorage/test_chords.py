"""Chords that are counted by a log: what a user sees of them, whatever happens to workers, requests and messages."""
from __future__ import annotations

import threading
import uuid
from collections import Counter
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest

pytest.importorskip('azure.storage.blob')

from billiard.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import OperationalError

from celery import chain, chord, group, signals, states
from celery.app.task import Context
from celery.backends.azurestorage import chordlog, chords
from celery.backends.azurestorage.chordlog import LEASE_DURATION
from celery.exceptions import ChordError, TaskRevokedError
from celery.worker.state import revoked

from .fakehttp import cut_connection, refuse_connection
from .inprocess import InProcessWorker, Killed, killed
from .test_interleavings import Schedule, following

#: How long a test waits for a thread, in seconds.
DEADLINE = 30


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Repeat what fails ten times, without pauses."""
    for module in (chordlog, chords):
        monkeypatch.setattr(module, 'pauses', lambda: iter([0] * 10))
    monkeypatch.setattr(chords, 'CLAIM_INTERVAL', 0)


@pytest.fixture
def make_worker(make_app):
    """Return a function that makes a worker of an app with tasks, which counts chords by their log."""
    def make(**settings):
        app = make_app(**{
            'azureblockblob_native_chords': True, 'task_default_queue': f'queue-{uuid.uuid4()}', **settings})
        worker = InProcessWorker(app)
        worker.tasks = define_tasks(app)
        return worker
    return make


@pytest.fixture
def worker(make_worker):
    """A worker that counts chords by their log."""
    return make_worker()


def define_tasks(app):
    """Return some tasks of an app; `calls` lists the arguments of each call of `collect` and `errback`."""
    calls = []

    @app.task(name='echo', shared=False)
    def echo(value):
        return value

    @app.task(name='add', shared=False)
    def add(x, y):
        return x + y

    @app.task(name='fail', shared=False)
    def fail(*args):
        raise ValueError('on purpose')

    @app.task(name='collect', shared=False)
    def collect(results):
        calls.append(results)
        return results

    @app.task(name='errback', shared=False)
    def errback(request, exc, traceback):
        calls.append((request.id, type(exc).__name__))

    @app.task(name='alarm', shared=False)
    def alarm(request, exc, traceback):
        calls.append('alarm')

    @app.task(name='quiet', shared=False, ignore_result=True)
    def quiet(value):
        return value

    @app.task(name='opaque', shared=False, ignore_result=True)
    def opaque():
        return object()

    @app.task(name='replace', shared=False, bind=True)
    def replace(self, signature):
        return self.replace(app.signature(signature))

    @app.task(name='grow', shared=False, bind=True)
    def grow(self, *values):
        for value in values:
            self.add_to_chord(echo.s(value))
        return 'grown'

    @app.task(name='family', shared=False, bind=True)
    def family(self, *args):
        return {'root': self.request.root_id, 'parent': self.request.parent_id, 'id': self.request.id}

    return SimpleNamespace(calls=calls, echo=echo, add=add, fail=fail, collect=collect, errback=errback, quiet=quiet,
                           alarm=alarm, opaque=opaque, replace=replace, grow=grow, family=family)


def echoes(worker, number):
    """Return signatures of so many simple parts, whose results are 0, 1, 2, …"""
    return [worker.tasks.echo.s(value) for value in range(number)]


def start(worker, header, body=None, **options):
    """Start a chord whose body is `collect`; return its result and the messages of its parts."""
    result = chord(header, body or worker.tasks.collect.s()).apply_async(**options)
    return result, worker.receive()


def outcome(worker, result):
    """Return a task's state and result as a user reads them, who has never asked before."""
    worker.app.backend._cache.clear()
    meta = worker.app.backend.get_task_meta(result.id)
    return meta['status'], meta['result']


def fail_with(result):
    """Return what the error says that failed the body."""
    state, error = result
    assert state == states.FAILURE
    assert isinstance(error, ChordError)
    return str(error)


def logs(service):
    """Return the names of the blobs that chords have left."""
    return [name for container in service.containers.values() for name in container.blobs
            if name.startswith('celery-chord-')]


def forget_client():
    """Go on as another process would: with a client of its own."""
    from celery.backends.azurestorage.client import close_clients
    close_clients()


@contextmanager
def main_process(worker):
    """Be the main process of a worker, whose reports are all made behind the block."""
    worker.app.loader.worker_initialized = True
    with worker.current():
        yield
        signals.worker_shutdown.send(sender=worker)


#: Headers by name, what their body is called with, and the number of their parts; None where that is not known.
SHAPES = {
    'one part': (lambda t: [t.echo.s(1)], [1], 1),
    'a list': (lambda t: [t.echo.s(3), t.echo.s(1), t.echo.s(2)], [3, 1, 2], 3),
    'a generator': (lambda t: (t.echo.s(value) for value in range(5)), [0, 1, 2, 3, 4], None),
    'a generator of one': (lambda t: (t.echo.s(value) for value in range(1)), [0], None),
    'a group': (lambda t: group(t.echo.s(1), t.echo.s(2)), [1, 2], 2),
    'equal parts': (lambda t: [t.echo.s(1), t.echo.s(1)], [1, 1], 2),
    'parts without results': (lambda t: [t.quiet.s(1), t.quiet.s(None), t.echo.s(None)], [1, None, None], 3),
    'a chain': (lambda t: [chain(t.echo.s(1), t.add.s(2)), t.echo.s(5)], [3, 5], 2),
    'a chain that ends with a group': (
        lambda t: [t.echo.s(0), chain(t.echo.s(1), group(t.add.s(2), t.add.s(3)))], [0, [3, 4]], 3),
    'a chain that ends with a chord': (
        lambda t: [t.echo.s(0), chain(t.echo.s(1), group(t.add.s(2), t.add.s(3)), t.echo.s())], [0, [3, 4]], 2),
    'a chain that ends with nothing': (lambda t: [t.echo.s(0), chain(t.echo.s(1), group())], [0, 1], 2),
    'a chord': (lambda t: [t.echo.s(0), chord([t.echo.s(1), t.echo.s(2)], t.echo.s())], [0, [1, 2]], 2),
    'a chord whose body is a group': (
        lambda t: [t.echo.s(0), chord([t.echo.s(1)], group(t.echo.s(), t.echo.s()))], [0, [[1], [1]]], 3),
    'a chord whose body is a chain': (
        lambda t: [t.echo.s(0), chord([t.echo.s(1)], chain(t.echo.s(), t.add.s([2])))], [0, [1, 2]], 2),
    'a chord in a chord': (
        lambda t: [chord([chord([t.echo.s(1)], t.echo.s()), t.echo.s(2)], t.echo.s()), t.echo.s(3)],
        [[[1], 2], 3], 2),
    'an empty group beside others': (lambda t: [t.echo.s(0), group(), t.echo.s(1)], [0, 1], 2),
    'a task replaced by a task': (lambda t: [t.replace.s(t.add.s(1, 2)), t.echo.s(0)], [3, 0], 2),
    'a task replaced by a chain': (lambda t: [t.replace.s(chain(t.echo.s(1), t.add.s(2))), t.echo.s(0)], [3, 0], 2),
    'a task replaced by a group': (
        lambda t: [t.replace.s(group(t.echo.s(1), t.echo.s(2))), t.echo.s(0)], [[1, 2], 0], 2),
    'a task replaced by a chord': (
        lambda t: [t.replace.s(chord([t.echo.s(1), t.echo.s(2)], t.echo.s())), t.echo.s(0)], [[1, 2], 0], 2),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    """A header of each shape: a function of the tasks, what the body is called with, the number of parts."""
    return SHAPES[request.param]


class test_the_body:

    def test_gets_the_results_in_the_headers_order(self, worker, shape, fake_service):
        make_header, expected, _ = shape
        result = chord(make_header(worker.tasks), worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.tasks.calls == [expected]
        assert outcome(worker, result) == (states.SUCCESS, expected)
        assert 'celery.chord_unlock' not in worker.names
        assert logs(fake_service) == []

    def test_gets_what_it_gets_of_a_polled_header(self, make_worker, shape):
        make_header, expected, _ = shape
        worker = make_worker(azureblockblob_native_chords=False)
        if 'quiet' in str(make_header(worker.tasks)):
            pytest.skip('Polling needs the results of all parts.')
        chord(make_header(worker.tasks), worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.tasks.calls == [expected]

    @pytest.mark.parametrize('reverse', [False, True])
    def test_gets_the_results_in_order_whatever_the_order_of_the_parts(self, worker, reverse):
        _, messages = start(worker, echoes(worker, 12))
        for message in sorted(messages, key=lambda message: message.headers['id'], reverse=reverse):
            worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [list(range(12))]

    def test_starts_only_when_all_parts_are_there(self, worker):
        _, messages = start(worker, echoes(worker, 5))
        for message in messages:
            assert worker.receive() == []
            worker.execute(message)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']

    def test_of_an_empty_header_starts_at_once(self, worker, fake_service):
        chord([], worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.tasks.calls == [[]]

    def test_of_a_header_of_empty_groups_starts_too(self, worker):
        chord([chain(group())], worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.tasks.calls == [[[]]]

    def test_may_be_a_group(self, worker):
        result = chord(echoes(worker, 2), group(worker.tasks.collect.s(), worker.tasks.collect.s())).apply_async()
        worker.run()
        assert worker.tasks.calls == [[0, 1]] * 2
        assert [outcome(worker, each) for each in result.results] == [(states.SUCCESS, [0, 1])] * 2

    def test_may_be_a_chain(self, worker):
        body = chain(worker.tasks.echo.s(), group(worker.tasks.echo.s(), worker.tasks.echo.s()), worker.tasks.collect.s())
        chord(echoes(worker, 2), body).apply_async()
        worker.run()
        assert worker.tasks.calls == [[[0, 1], [0, 1]]]

    def test_may_be_a_chord(self, worker):
        chord(echoes(worker, 2), chord([worker.tasks.echo.s()], worker.tasks.collect.s())).apply_async()
        worker.run()
        assert worker.tasks.calls == [[[0, 1]]]

    def test_may_be_used_again(self, worker):
        body = worker.tasks.collect.s()
        for number in (2, 3):
            chord(echoes(worker, number), body).apply_async()
            worker.run()
        assert worker.tasks.calls == [[0, 1], [0, 1, 2]]
        assert 'chord_size' not in body

    def test_gets_both_results_of_a_frozen_part_that_is_used_twice(self, worker):
        part = worker.tasks.echo.s(7)
        part.freeze()
        start_and_run(worker, [part, part])
        assert worker.tasks.calls == [[7, 7]]

    def test_gets_both_results_of_such_a_part_in_a_nested_header(self, worker):
        part = worker.tasks.echo.s(7)
        part.freeze()
        start_and_run(worker, [part, part, chain(worker.tasks.echo.s(1), group(worker.tasks.add.s(1), worker.tasks.add.s(2)))])
        assert worker.tasks.calls == [[7, 7, [2, 3]]]

    def test_starts_each_time_a_frozen_chord_is_applied(self, worker):
        frozen = chord(echoes(worker, 2), worker.tasks.collect.s())
        frozen.freeze()
        for _ in range(2):
            frozen.apply_async()
            worker.run()
        assert worker.tasks.calls == [[0, 1]] * 2

    def test_belongs_to_the_part_that_started_it(self, worker):
        result, messages = start(worker, [worker.tasks.family.s(), worker.tasks.family.s()], worker.tasks.family.s())
        worker.execute(messages[0])
        worker.execute(messages[1])
        worker.run()
        last = messages[1].headers['id']
        assert outcome(worker, result)[1] == {'root': last, 'parent': last, 'id': result.id}

    def test_of_chained_chords(self, worker):
        t = worker.tasks
        chain(group(t.echo.s(1), t.echo.s(2)), t.collect.s(), group(t.echo.s(), t.echo.s()), t.collect.s()).apply_async()
        worker.run()
        assert t.calls == [[1, 2], [[1, 2], [1, 2]]]


def start_and_run(worker, header, body=None):
    """Run a chord to its end; return its result."""
    result = chord(header, body or worker.tasks.collect.s()).apply_async()
    worker.run()
    return result


class test_the_number_of_parts:

    def test_is_celerys_own(self, worker, shape, monkeypatch):
        make_header, _, number = shape
        told = {}
        monkeypatch.setattr(worker.app.backend, 'set_chord_size', told.__setitem__)
        result = chord(make_header(worker.tasks), worker.tasks.collect.s()).apply_async()
        marks = {message.payload[2]['chord']['chord_size'] for message in worker.receive()
                 if message.headers['group'] == result.parent.id and message.payload[2]['chord']}
        assert marks <= {number}
        assert told[result.parent.id] == (number or len(result.parent.results))

    def test_of_a_generator_is_not_asked_for_before_its_parts_are_published(self, worker):
        made = []

        def header():
            for value in range(50):
                made.append(value)
                yield worker.tasks.echo.s(value)

        apply_chord = worker.app.backend.apply_chord
        looked_at = []
        worker.app.backend.apply_chord = lambda *args, **kwargs: (apply_chord(*args, **kwargs),
                                                                  looked_at.append(len(made)))
        start_and_run(worker, header())
        assert looked_at[0] < 5
        assert worker.tasks.calls == [list(range(50))]

    def test_of_a_generator_may_come_late(self, worker, fake_service):
        def run_what_is_there():
            for message in worker.receive():
                worker.execute(message)

        fake_service.on('Set Blob Metadata', before=run_what_is_there)
        start_and_run(worker, (worker.tasks.echo.s(value) for value in range(4)))
        assert worker.tasks.calls == [[0, 1, 2, 3]]

    def test_of_a_generator_is_remembered_once_it_is_known(self, worker, fake_service):
        start_and_run(worker, (worker.tasks.echo.s(value) for value in range(20)))
        assert Counter(fake_service.operations)['Get Blob Properties'] == 1

    def test_is_remembered_for_some_chords_only(self, worker, monkeypatch):
        monkeypatch.setattr(chords, 'SIZES_KEPT', 2)
        for _ in range(5):
            start_and_run(worker, (worker.tasks.echo.s(value) for value in range(2)))
            assert len(worker.app.backend._chords._sizes) <= 2
        assert worker.tasks.calls == [[0, 1]] * 5

    def test_is_not_written_for_other_groups(self, worker, fake_service):
        worker.app.backend.set_chord_size('unknown', 3)
        start_and_run(worker, echoes(worker, 2))
        assert 'Set Blob Metadata' not in fake_service.operations

    @pytest.mark.parametrize('code', [(404, 'BlobNotFound'), (412, 'LeaseIdMissing')])
    def test_is_not_written_where_the_chord_is_over_or_complete(self, worker, fake_service, code):
        fake_service.on('Set Blob Metadata', answer=code)
        chord((worker.tasks.echo.s(value) for value in range(2)), worker.tasks.collect.s()).apply_async()
        assert len(worker.receive()) == 2


class test_requests:

    @pytest.mark.parametrize('number', [1, 10, 200])
    def test_besides_the_results_an_append_for_each_part_and_eight_more(self, worker, fake_service, number):
        start_and_run(worker, echoes(worker, number))
        counts = Counter(fake_service.operations)
        results = number + 1  # those of the parts and of the body
        assert counts['Append Block'] == number
        assert sum(counts.values()) - results - number <= 8
        assert worker.tasks.calls == [list(range(number))]
        assert Counter(worker.names) == {'echo': number, 'collect': 1}

    def test_none_for_a_polled_chord(self, make_worker, fake_service):
        worker = make_worker(azureblockblob_native_chords=False)
        start_and_run(worker, echoes(worker, 3))
        assert not {'Append Block', 'Lease Blob'} & set(fake_service.operations)


class test_growth:

    def test_the_body_waits_for_parts_that_join_later(self, worker):
        start_and_run(worker, [worker.tasks.grow.s(10, 11), worker.tasks.echo.s(1)])
        [results] = worker.tasks.calls
        assert Counter(results) == Counter(['grown', 10, 11, 1])
        assert results[-1] == 1

    def test_they_come_last_in_a_nested_header(self, worker):
        t = worker.tasks
        start_and_run(worker, [t.grow.s(10), chain(t.echo.s(1), group(t.add.s(1), t.add.s(2)))])
        assert t.calls == [['grown', [2, 3], 10]]

    def test_the_answer_is_lost(self, worker, fake_service):
        fake_service.on('Append Block', after=cut_connection)
        start_and_run(worker, [worker.tasks.grow.s(10)])
        assert Counter(worker.tasks.calls[0]) == Counter(['grown', 10])

    def test_a_part_that_comes_twice_does_not_grow_what_is_over(self, worker, caplog):
        _, [message] = start(worker, [worker.tasks.grow.s(10)])
        worker.execute(message)
        worker.run()
        worker.execute(message)
        worker.run()
        assert [sorted(map(str, results)) for results in worker.tasks.calls] == [['10', 'grown']]
        assert 'does not wait' in caplog.text

    def test_a_polled_chord_cannot_grow(self, make_worker):
        worker = make_worker(azureblockblob_native_chords=False)
        result, messages = start(worker, [worker.tasks.grow.s(10)])
        worker.execute(messages[-1])
        state, error = outcome(worker, result.parent.results[0])
        assert (state, type(error).__name__) == (states.FAILURE, 'NotImplementedError')

    def test_outside_of_a_task(self, worker):
        result, messages = start(worker, echoes(worker, 1))
        worker.app.backend.add_to_chord(result.parent.id, SimpleNamespace(id='another'))
        worker.execute(messages[0])
        assert worker.receive() == []


class test_failures:

    @pytest.mark.parametrize('number', [1, 2])
    def test_a_failed_part_fails_the_body_with_its_errback_called_once(self, worker, number, fake_service):
        t = worker.tasks
        result = start_and_run(worker, [t.echo.s(1), *[t.fail.s()] * number], t.collect.s().on_error(t.errback.s()))
        assert "raised ValueError('on purpose')" in fail_with(outcome(worker, result))
        assert t.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_the_error_has_the_parts_error_for_its_cause(self, worker, monkeypatch):
        causes = []
        fail = worker.app.backend.chord_error_from_stack
        monkeypatch.setattr(worker.app.backend, 'chord_error_from_stack',
                            lambda body, exc: (causes.append(exc.__cause__), fail(body, exc)))
        start_and_run(worker, [worker.tasks.fail.s()])
        assert [str(cause) for cause in causes] == ['on purpose']

    def test_a_body_fails_only_when_all_parts_are_there(self, worker):
        result, (failing, other) = start(worker, [worker.tasks.fail.s(), worker.tasks.echo.s(1)])
        worker.execute(failing)
        assert outcome(worker, result)[0] == states.PENDING
        worker.execute(other)
        assert outcome(worker, result)[0] == states.FAILURE

    def test_a_failing_body_is_the_bodys_own_affair(self, worker, fake_service):
        result = start_and_run(worker, echoes(worker, 2), worker.tasks.fail.s())
        state, error = outcome(worker, result)
        assert (state, str(error)) == (states.FAILURE, 'on purpose')
        assert logs(fake_service) == []

    def test_all_tasks_of_a_group_body_fail(self, worker):
        t = worker.tasks
        result = start_and_run(worker, [t.fail.s()], group(t.collect.s(), t.collect.s()))
        if not hasattr(worker.app.backend, '_handle_group_chord_error'):
            pytest.skip('This release of Celery does not fail the tasks of a group.')
        assert [outcome(worker, each)[0] for each in result.results] == [states.FAILURE] * 2
        assert t.calls == []

    def test_the_result_of_a_part_cannot_be_encoded(self, worker):
        result = start_and_run(worker, [worker.tasks.opaque.s(), worker.tasks.echo.s(1)])
        assert 'EncodeError' in fail_with(outcome(worker, result)) or 'not' in fail_with(outcome(worker, result))

    @pytest.mark.parametrize('make_header', [
        lambda t: [t.echo.s(1), chord([t.echo.s(1), t.fail.s()], t.collect.s())],
        lambda t: [t.echo.s(1), chord([t.echo.s(1)], t.fail.s())],
        lambda t: [t.echo.s(1), chord([chord([t.fail.s()], t.collect.s())], t.collect.s())],
        lambda t: [t.echo.s(1), chord([t.fail.s()], group(t.collect.s(), t.collect.s()))],
        lambda t: [t.echo.s(1), chord([t.fail.s()], chain(t.collect.s(), t.collect.s()))],
        lambda t: [t.echo.s(1), chord([t.fail.s()], chord([t.collect.s()], t.collect.s()))],
        lambda t: [t.echo.s(1), chain(t.fail.s(), t.collect.s())],
        lambda t: [t.echo.s(1), chain(t.fail.s(), group(t.collect.s(), t.collect.s()))],
        lambda t: [t.replace.s(t.fail.s()), t.echo.s(1)],
        lambda t: [t.replace.s(chord([t.fail.s()], t.collect.s())), t.echo.s(1)],
        lambda t: [t.echo.s(1), t.replace.s(group(t.fail.s(), t.echo.s(1)))],
    ], ids=['header of a nested chord', 'body of a nested chord', 'header of a chord in a nested chord',
            'nested chord with a group', 'nested chord with a chain', 'nested chord with a chord',
            'chain', 'chain that would end with a group', 'replaced task', 'task replaced by a chord',
            'task replaced by a group'])
    def test_of_something_nested_end_the_chord_around_it(self, worker, make_header, fake_service):
        t = worker.tasks
        result = start_and_run(worker, make_header(t), t.collect.s().on_error(t.errback.s()))
        assert 'Dependency' in fail_with(outcome(worker, result))
        assert t.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_of_a_nested_chord_call_an_errback_of_both_once(self, worker):
        t = worker.tasks
        for inner in (t.collect.s(), chain(t.collect.s(), t.collect.s()), group(t.collect.s(), t.collect.s())):
            t.calls.clear()
            outer = chord([t.echo.s(1), chord([t.fail.s()], inner)], t.collect.s())
            for body in (inner, outer.body):
                body.link_error(t.errback.s())
            result = outer.apply_async()
            worker.run()
            assert t.calls == [(result.id, 'ChordError')]

    def test_of_a_nested_chord_call_the_errbacks_of_each(self, worker):
        t = worker.tasks
        inner = chord([t.fail.s()], t.collect.s().on_error(t.errback.s()))
        result = start_and_run(worker, [t.echo.s(1), inner], t.collect.s().on_error(t.alarm.s()))
        assert t.calls == [(result.parent.results[1].id, 'ChordError'), 'alarm']

    def test_a_result_that_cannot_be_read_fails_the_body(self, worker, fake_service, monkeypatch):
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        monkeypatch.setattr(worker.app.backend, 'decode_blob', lambda data: {}['nothing'])
        worker.execute(messages[1])
        assert 'Join error' in fail_with(outcome(worker, result))
        assert logs(fake_service) == []

    def test_errbacks_are_called_once_if_the_failure_cannot_be_stored_at_once(self, worker, fake_service):
        t = worker.tasks
        result, messages = start(worker, [t.fail.s()], t.collect.s().on_error(t.errback.s()))
        fake_service.on('Put Blob', blob=result.id, before=refuse_connection, times=6)
        worker.execute(messages[0])
        assert t.calls == [(result.id, 'ChordError')]
        assert 'Dependency' in fail_with(outcome(worker, result))
        assert logs(fake_service) == []

    def test_errbacks_are_called_once_if_the_failure_can_never_be_stored(self, worker, fake_service, caplog):
        t = worker.tasks
        result, messages = start(worker, [t.fail.s()], t.collect.s().on_error(t.errback.s()))
        fake_service.on('Put Blob', blob=result.id, answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        worker.execute(messages[0])
        assert t.calls == [(result.id, 'ChordError')]
        assert 'could not be stored' in caplog.text


class test_publishing:

    @pytest.fixture
    def broken(self, worker, monkeypatch):
        """A chord of one part whose body cannot be published: the result and the part's message."""
        t = worker.tasks
        result, [message] = start(worker, echoes(worker, 1), t.collect.s().on_error(t.errback.s()))

        def refuse(*args, **kwargs):
            raise OperationalError('no broker')

        with monkeypatch.context() as patch:
            patch.setattr(t.collect, 'apply_async', refuse)
            worker.execute(message)
        return result, message

    def test_that_fails_fails_the_body(self, worker, broken, fake_service):
        result, _ = broken
        assert 'Callback error' in fail_with(outcome(worker, result))
        assert worker.tasks.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_that_failed_is_not_tried_again(self, worker, broken):
        result, message = broken
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [(result.id, 'ChordError')]

    def test_the_part_has_succeeded_all_the_same(self, worker, broken):
        assert outcome(worker, broken[0].parent.results[0]) == (states.SUCCESS, 0)

    def test_is_left_to_celery_to_repeat(self, worker, monkeypatch):
        if not hasattr(worker.app.amqp, '_retry_publish'):
            pytest.skip('This release of Celery has no way to do that.')
        repeated = []
        publish = worker.app.amqp._retry_publish
        monkeypatch.setattr(worker.app.amqp, '_retry_publish',
                            lambda *args: (repeated.append(args[1:]), publish(*args)))
        start_and_run(worker, echoes(worker, 2))
        assert ([0, 1],) in repeated


#: Where the worker that starts a body may be killed: at a request, before the service sees it or after.
CRASHES = [
    pytest.param(operation, action, answered, id=f'{"after" if answered else "before"} {action} {operation}')
    for operation, action in [
        ('Append Block', ''), ('Get Blob', ''), ('Lease Blob', 'acquire'), ('Lease Blob', 'renew'), ('Delete Blob', '')]
    for answered in (False, True)]


class test_a_worker_that_is_killed:

    @pytest.mark.parametrize(('operation', 'action', 'answered'), CRASHES)
    def test_has_its_chord_finished_when_its_part_is_delivered_again(
            self, worker, fake_service, operation, action, answered):
        result, messages = start(worker, echoes(worker, 3))
        for message in messages[:2]:
            worker.execute(message)
        with killed(fake_service, operation, action, answered):
            worker.execute(messages[2])
        forget_client()
        fake_service.now += LEASE_DURATION
        worker.execute(messages[2])
        worker.run()
        published = 2 if operation == 'Delete Blob' and not answered else 1  # killed after publishing, before deleting
        assert worker.tasks.calls == [[0, 1, 2]] * published
        assert outcome(worker, result) == (states.SUCCESS, [0, 1, 2])
        assert logs(fake_service) == []

    def test_makes_others_wait_as_long_as_its_lease_lasts(self, worker, fake_service):
        _, [message] = start(worker, echoes(worker, 1))
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        refused = []
        fake_service.on('Lease Blob', times=3, after=lambda: refused.append(worker.receive()))
        fake_service.on('Lease Blob', before=lambda: setattr(fake_service, 'now', fake_service.now + LEASE_DURATION))
        worker.execute(message)
        worker.run()
        assert refused == [[]] * 3
        assert worker.tasks.calls == [[0]]

    def test_is_reported_by_the_main_process(self, worker, fake_service):
        result, [message] = start(worker, [worker.tasks.quiet.s(5)])
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        fake_service.now += LEASE_DURATION
        with main_process(worker):
            lost = worker.request(message)
            lost.task.backend.mark_as_failure(lost.id, OSError('lost'), request=lost._context, store_result=False)
        worker.run()
        assert worker.tasks.calls == [[5]]


class test_parts_that_come_twice:

    def test_count_once(self, worker):
        _, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        worker.execute(messages[0])
        assert worker.receive() == []
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    def test_count_with_their_first_record(self, worker):
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        request = worker.request(messages[0])._context
        worker.app.backend.on_chord_part_return(request, states.FAILURE, ValueError('later'))
        worker.execute(messages[1])
        worker.run()
        assert outcome(worker, result) == (states.SUCCESS, [0, 1])

    def test_after_the_end_do_nothing_but_warn(self, worker, fake_service, caplog):
        _, messages = start(worker, echoes(worker, 2))
        for message in [*messages, *messages]:
            worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0, 1]]
        assert caplog.text.count('too late') == 2
        assert logs(fake_service) == []

    def test_a_step_that_comes_twice_does_not_start_the_body_twice(self, worker):
        t = worker.tasks
        chain(t.echo.s(1), group(t.add.s(1), t.add.s(2)), t.collect.s()).apply_async()
        [step] = worker.receive()
        worker.execute(step)
        worker.execute(step)
        first, second, *again = worker.receive()
        worker.execute(first)
        for message in [*again, second]:
            worker.execute(message)
        worker.run()
        assert t.calls == [[2, 3]]


class test_lost_and_late_requests:

    def test_the_answer_to_an_append_is_lost(self, worker, fake_service):
        _, messages = start(worker, echoes(worker, 2))
        fake_service.on('Append Block', after=cut_connection)
        worker.execute(messages[0])
        assert worker.receive() == []
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    def test_the_answer_to_the_last_append_is_lost(self, worker, fake_service):
        _, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        fake_service.on('Append Block', after=cut_connection)
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    @pytest.mark.parametrize(('operation', 'action'), [
        ('Get Blob', ''), ('Lease Blob', 'acquire'), ('Lease Blob', 'renew'), ('Delete Blob', '')])
    def test_another_answer_is_lost(self, worker, fake_service, operation, action):
        _, [message] = start(worker, echoes(worker, 1))
        if action == 'renew':
            fake_service.on('Lease Blob')
        fake_service.on(operation, blob='celery-chord-', after=cut_connection)
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]
        assert logs(fake_service) == []

    def test_a_second_create_that_arrives_among_the_parts(self, worker):
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        worker.app.backend.chord_log(result.parent.id).create()
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    def test_a_second_create_that_arrives_after_the_end(self, worker):
        result, messages = start(worker, echoes(worker, 2))
        for message in messages:
            worker.execute(message)
        worker.app.backend.chord_log(result.parent.id).create()
        worker.execute(messages[0])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    def test_the_log_grows_between_read_and_claim(self, worker, fake_service):
        _, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        again = worker.request(messages[0])._context
        fake_service.on('Lease Blob', before=lambda: worker.app.backend.chord_log(again.group).append(
            chordlog.Record(chordlog.PART, [again.id, 0, states.SUCCESS, None], b'"late"').to_bytes()))
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]
        assert Counter(request.operation for request in fake_service.requests
                       if request.operation == 'Get Blob' and 'celery-chord' in request.blob) == {'Get Blob': 2}

    def test_the_lease_lapses_before_the_body_is_published(self, worker, fake_service):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Lease Blob')
        fake_service.on('Lease Blob', answer=(409, 'LeaseIdMismatchWithLeaseOperation'))
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]

    def test_the_lease_lapses_before_the_log_is_deleted(self, worker, fake_service):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Delete Blob', before=lambda: setattr(fake_service, 'now', fake_service.now + LEASE_DURATION))
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]
        assert logs(fake_service) == []

    def test_the_log_cannot_be_deleted_for_long(self, worker, fake_service, caplog):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Delete Blob', answer=(503, 'ServerBusy'), times=1000)
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]
        assert 'was not deleted' in caplog.text

    def test_the_log_is_deleted_by_someone(self, worker, fake_service, caplog):
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        worker.app.backend.container.delete(worker.app.backend.chord_log(result.parent.id).name)
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == []
        assert 'is over, or has expired' in caplog.text

    def test_the_log_expires(self, make_worker, caplog, fake_service):
        worker = make_worker(result_chord_expires=24 * 3600, result_expires=3600)
        fake_service.now -= 25 * 3600
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        worker.app.backend.cleanup()
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == []
        assert 'is over, or has expired' in caplog.text

    def test_the_log_lasts_longer_than_results(self, make_worker, fake_service):
        worker = make_worker(result_expires=3600)
        fake_service.now -= 6 * 24 * 3600
        _, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        worker.app.backend.cleanup()
        fake_service.now += 6 * 24 * 3600
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]

    @pytest.mark.parametrize('operation', ['Append Block', 'Get Blob', 'Lease Blob', 'Delete Blob'])
    def test_the_service_is_busy(self, worker, fake_service, operation):
        _, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        fake_service.on(operation, blob='celery-chord-', answer=(503, 'ServerBusy'), times=20)
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [[0, 1]]
        assert logs(fake_service) == []

    @pytest.mark.parametrize('operation', ['Append Block', 'Get Blob', 'Lease Blob'])
    def test_no_token_is_to_be_had_for_some_time(self, worker, fake_service, operation):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on(operation, blob='celery-chord-', answer=(401, 'InvalidAuthenticationInfo'), times=8)
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]

    def test_a_part_that_cannot_be_logged_fails_aloud(self, worker, fake_service, caplog):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Append Block', answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        with pytest.warns(RuntimeWarning, match='AuthorizationPermissionMismatch'):
            worker.execute(message)
        assert worker.receive() == []

    def test_a_chord_that_cannot_be_finished_is_given_up_aloud(self, worker, fake_service, caplog):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Lease Blob', answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        worker.execute(message)
        assert worker.receive() == []
        assert 'was given up' in caplog.text


class test_time_limits:

    @pytest.mark.parametrize('action', ['acquire', 'renew'])
    def test_a_soft_one_does_not_disturb_the_end_of_a_chord(self, worker, fake_service, monkeypatch, action, caplog):
        result, [message] = start(worker, echoes(worker, 1))
        struck, begun = threading.Event(), threading.Event()
        join = threading.Thread.join

        def join_until_the_limit(thread, *args):
            if thread.name == 'azureblockblob-chord' and not struck.is_set():
                assert begun.wait(DEADLINE)
                struck.set()
                raise SoftTimeLimitExceeded
            return join(thread, *args)

        def wait_for_the_limit():
            begun.set()
            assert struck.wait(DEADLINE)

        monkeypatch.setattr(threading.Thread, 'join', join_until_the_limit)
        if action == 'renew':
            fake_service.on('Lease Blob')
        fake_service.on('Lease Blob', after=wait_for_the_limit)
        worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]
        assert outcome(worker, result.parent.results[0]) == (states.SUCCESS, 0)
        assert 'past its time' in caplog.text

    def test_a_soft_one_before_the_part_is_logged_fails_the_part(self, worker, fake_service):
        def strike():
            raise SoftTimeLimitExceeded

        result, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Append Block', before=strike)
        with pytest.warns(RuntimeWarning, match='SoftTimeLimitExceeded'):
            worker.execute(message)
        assert 'SoftTimeLimitExceeded' in fail_with(outcome(worker, result))

    def test_a_soft_one_after_the_part_is_logged_does_no_harm(self, worker, fake_service):
        def strike():
            raise SoftTimeLimitExceeded

        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Append Block', after=strike)
        with pytest.warns(RuntimeWarning, match='SoftTimeLimitExceeded'):
            worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0]]


class test_the_main_process:

    def test_reports_a_revoked_part(self, worker):
        result, messages = start(worker, echoes(worker, 2))
        worker.execute(messages[0])
        revoked.add(messages[1].headers['id'])
        with main_process(worker):
            worker.execute(messages[1])
        assert 'TaskRevokedError' in fail_with(outcome(worker, result))

    def test_does_not_wait_for_what_it_reports(self, worker, fake_service):
        _, messages = start(worker, echoes(worker, 1))
        request = worker.request(messages[0])._context
        free = threading.Event()
        reporters = []

        def hold():
            reporters.append(threading.current_thread())
            assert free.wait(DEADLINE)

        fake_service.on('Append Block', before=hold)
        with main_process(worker):
            worker.app.backend.mark_as_revoked(request.id, request=request, store_result=False)
            free.set()
        assert reporters != [threading.current_thread()]

    def test_does_not_wait_for_a_log_that_is_claimed(self, worker, fake_service):
        _, [message] = start(worker, echoes(worker, 1))
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        request = worker.request(message)._context
        with main_process(worker):
            worker.app.backend.mark_as_failure(request.id, OSError('lost'), request=request, store_result=False)
            fake_service.now += LEASE_DURATION
        worker.run()
        assert worker.tasks.calls == [[0]]

    def test_reports_many_parts_on_few_threads(self, worker, fake_service):
        number = 5 * chords.REPORT_THREADS
        result, messages = start(worker, echoes(worker, number))
        most = []
        fake_service.on('Append Block', times=number, before=lambda: most.append(threading.active_count()))
        before = threading.active_count()
        with main_process(worker):
            for message in messages:
                request = worker.request(message)._context
                worker.app.backend.on_chord_part_return(request, states.REVOKED, TaskRevokedError())
        assert max(most) <= before + chords.REPORT_THREADS + 1
        assert 'TaskRevokedError' in fail_with(outcome(worker, result))

    def test_says_when_it_cannot_report(self, worker, fake_service, caplog):
        _, [message] = start(worker, echoes(worker, 1))
        fake_service.on('Append Block', answer=(403, 'AuthorizationPermissionMismatch'))
        with main_process(worker):
            worker.app.backend.on_chord_part_return(
                worker.request(message)._context, states.REVOKED, TaskRevokedError())
        assert 'could not be reported' in caplog.text

    def test_waits_where_it_runs_the_task_itself(self, worker):
        _, [message] = start(worker, echoes(worker, 1))
        worker.app.loader.worker_initialized = True
        worker.execute(message)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']

    def test_is_no_process_of_a_pool(self, worker, monkeypatch):
        _, [message] = start(worker, echoes(worker, 1))
        worker.app.loader.worker_initialized = True
        monkeypatch.setattr(chords, 'current_process', lambda: SimpleNamespace(name='ForkPoolWorker-1'))
        worker.app.backend.on_chord_part_return(worker.request(message)._context, states.SUCCESS, 0)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']


class test_limits:

    def test_a_list_of_too_many_parts_is_polled_with_a_warning(self, worker, monkeypatch, caplog, fake_service):
        monkeypatch.setattr(chords, 'MAX_PARTS', 2)
        start_and_run(worker, echoes(worker, 3))
        assert worker.tasks.calls == [[0, 1, 2]]
        assert 'A chord of 3 parts is polled' in caplog.text
        assert 'Append Block' not in fake_service.operations

    def test_a_list_of_as_many_parts_as_fit_is_counted(self, worker, monkeypatch, fake_service):
        monkeypatch.setattr(chords, 'MAX_PARTS', 3)
        start_and_run(worker, echoes(worker, 3))
        assert worker.tasks.calls == [[0, 1, 2]]
        assert 'Append Block' in fake_service.operations

    def test_a_log_has_room_for_more_than_the_longest_list(self):
        assert chords.MAX_PARTS == 40_000

    @pytest.mark.parametrize('late', [False, True])
    def test_a_generator_of_too_many_parts_fails_its_chord_and_says_why(self, worker, fake_service, late):
        t = worker.tasks
        fake_service.max_blocks = 3
        header = (t.echo.s(value) for value in range(5))
        if late:
            fake_service.on('Set Blob Metadata', before=worker.run)
        result = start_and_run(worker, header, t.collect.s().on_error(t.errback.s()))
        message = fail_with(outcome(worker, result))
        assert 'more parts than its log can hold' in message
        assert 'list' in message
        assert t.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_a_chord_whose_log_is_full_fails_though_the_worker_that_was_to_fail_it_is_killed(
            self, worker, fake_service):
        fake_service.max_blocks = 2
        result, messages = start(worker, (worker.tasks.echo.s(value) for value in range(4)))
        worker.execute(messages[0])
        worker.execute(messages[1])
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(messages[2])
        fake_service.on('Lease Blob', times=2)
        fake_service.on('Lease Blob', before=lambda: setattr(fake_service, 'now', fake_service.now + LEASE_DURATION))
        worker.execute(messages[3])
        assert 'more parts than its log can hold' in fail_with(outcome(worker, result))


class test_large_results:

    def large(self, worker, number=2):
        return [worker.tasks.echo.s('x' * chords.MAX_BLOCK) for _ in range(number)]

    def test_get_blobs_of_their_own_which_go_with_the_log(self, worker, fake_service):
        _, messages = start(worker, [*self.large(worker), worker.tasks.echo.s(1)])
        for message in messages[:2]:
            worker.execute(message)
        assert len(logs(fake_service)) == 3
        worker.execute(messages[2])
        worker.run()
        assert worker.tasks.calls == [['x' * chords.MAX_BLOCK] * 2 + [1]]
        assert logs(fake_service) == []

    def test_those_of_parts_that_come_twice_go_too(self, worker, fake_service):
        _, messages = start(worker, self.large(worker))
        for message in [messages[0], *messages]:
            worker.execute(message)
        worker.run()
        assert logs(fake_service) == []

    def test_are_stored_once_though_the_log_is_busy(self, worker, fake_service):
        _, messages = start(worker, self.large(worker))
        fake_service.on('Append Block', answer=(503, 'ServerBusy'), times=10)
        worker.execute(messages[0])
        assert len(logs(fake_service)) == 2

    def test_are_smaller_in_longer_headers(self, worker, fake_service, monkeypatch):
        monkeypatch.setattr(chords, 'MAX_LOG', 4000)
        _, messages = start(worker, [worker.tasks.echo.s('x' * 300), *echoes(worker, 19)])
        worker.execute(messages[0])
        assert len(logs(fake_service)) == 2
        for message in messages[1:]:
            worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [['x' * 300, *range(19)]]

    def test_a_log_stays_small_with_the_longest_header(self):
        block = chordlog.Record(chordlog.PART, [str(uuid.uuid4()), chords.MAX_PARTS, states.SUCCESS, str(uuid.uuid4())])
        assert len(block.to_bytes()) < chords.MAX_LOG / chords.MAX_PARTS

    def test_that_are_gone_fail_the_chord(self, worker, fake_service):
        result, messages = start(worker, self.large(worker))
        worker.execute(messages[0])
        [payload] = [name for name in logs(fake_service) if '.' in name]
        worker.app.backend.container.delete(payload)
        worker.execute(messages[1])
        assert 'is gone' in fail_with(outcome(worker, result))

    def test_that_cannot_be_read_for_some_time_do_not_fail_it(self, worker, fake_service):
        _, messages = start(worker, self.large(worker))
        worker.execute(messages[0])
        fake_service.on('Get Blob', blob='.', answer=(503, 'ServerBusy'), times=8)
        worker.execute(messages[1])
        worker.run()
        assert worker.tasks.calls == [['x' * chords.MAX_BLOCK] * 2]

    def test_that_cannot_be_deleted_are_left_to_expire(self, worker, fake_service, caplog):
        _, messages = start(worker, self.large(worker))
        fake_service.on('Delete Blob', blob='.', answer=(403, 'AuthorizationPermissionMismatch'), times=10)
        for message in messages:
            worker.execute(message)
        worker.run()
        assert len(worker.tasks.calls) == 1
        assert 'were not deleted' in caplog.text


class test_formats:

    @pytest.mark.parametrize('serializer', ['json', 'pickle', 'yaml', 'msgpack'])
    @pytest.mark.parametrize('compression', [None, 'gzip'])
    @pytest.mark.parametrize('size', [1, chords.MAX_BLOCK])
    def test_results_come_as_they_were_returned(self, make_worker, serializer, compression, size):
        if serializer in ('yaml', 'msgpack'):
            pytest.importorskip(serializer)
        worker = make_worker(result_serializer=serializer, result_compression=compression,
                             accept_content=['json', serializer])
        results = ['\N{SNOWMAN}' * size, {'a': [1, None, 2.5]}]
        start_and_run(worker, [worker.tasks.echo.s(result) for result in results])
        assert worker.tasks.calls == [results]

    @pytest.mark.parametrize('serializer', ['json', 'pickle'])
    def test_errors_keep_their_type(self, make_worker, serializer):
        worker = make_worker(result_serializer=serializer, accept_content=['json', serializer])
        result = start_and_run(worker, [worker.tasks.fail.s()])
        assert "ValueError('on purpose')" in fail_with(outcome(worker, result))


class test_on_and_off:

    @pytest.fixture
    def off(self, make_worker, worker):
        """A worker that shares everything with `worker`, but does not count chords."""
        conf = worker.app.conf
        return make_worker(
            azureblockblob_native_chords=False, task_default_queue=conf.task_default_queue,
            azureblockblob_container_name=conf.azureblockblob_container_name)

    def test_it_is_off_by_default(self, make_app):
        assert make_app().backend._settings['native_chords'] is False

    def test_off_a_chord_is_polled_and_its_messages_have_no_mark(self, off, fake_service):
        body = off.tasks.collect.s()
        body['chord_size'] = 3
        _, messages = start(off, echoes(off, 2), body)
        assert [message.headers['task'] for message in messages] == ['celery.chord_unlock', 'echo', 'echo']
        assert all('chord_size' not in message.payload[2]['chord'] for message in messages[1:])
        for message in messages:
            off.execute(message)
        off.run()
        assert off.tasks.calls == [[0, 1]]
        assert not {'Append Block', 'Lease Blob'} & set(fake_service.operations)

    def test_workers_that_are_off_count_the_parts_of_one_that_is_on(self, worker, off):
        _, messages = start(worker, echoes(worker, 2))
        for message in messages:
            off.execute(message)
        off.run()
        assert off.tasks.calls == [[0, 1]]

    def test_workers_that_are_on_leave_the_parts_of_one_that_is_off_to_polling(self, worker, off, fake_service):
        _, messages = start(off, echoes(off, 2))
        for message in messages:
            worker.execute(message)
        worker.run()
        assert worker.tasks.calls == [[0, 1]]
        assert 'Append Block' not in fake_service.operations

    def test_each_step_of_a_chain_is_as_its_publisher_is(self, worker, off, fake_service):
        t = worker.tasks
        chain(group(t.echo.s(1), t.echo.s(2)), t.echo.s(), group(t.echo.s(), t.echo.s()), t.collect.s()).apply_async()
        off.run()
        assert off.tasks.calls == [[[1, 2], [1, 2]]]
        assert off.names.count('celery.chord_unlock') >= 1
        assert Counter(fake_service.operations)['Append Block'] == 2

    def test_tasks_outside_of_chords_are_not_reported(self, worker, fake_service):
        group(echoes(worker, 2)).apply_async()
        worker.run()
        worker.app.backend.on_chord_part_return(Context(id='id'), states.SUCCESS, 1)
        worker.app.backend.on_chord_part_return(Context(id='id', group='group'), states.SUCCESS, 1)
        worker.app.backend.on_chord_part_return(Context(id='id', chord={'chord_size': 1}), states.SUCCESS, 1)
        assert 'Append Block' not in fake_service.operations

    def test_the_mark_does_not_travel_on_with_the_body(self, worker):
        body = chord([worker.tasks.echo.s()], worker.tasks.collect.s())
        _, [message] = start(worker, echoes(worker, 1), body)
        worker.execute(message)
        [message] = worker.receive()
        assert 'chord_size' not in message.properties
        assert 'chord_size' not in message.headers


class ChordSchedule(Schedule):
    """Lets the requests of workers that report parts pass in a chosen order; see :class:`.Schedule`.

    Who waits for a claim has its next turn when another has had one. Where all wait, their claims lapse.

    Arguments:
        service: The service.
        actors: What each worker does.
        choices: The order.
        losses: How many answers may be lost.
        deaths: How many workers may be killed, each when the service has done what it asked for.
    """

    def __init__(self, service, actors, choices, losses=0, deaths=0):
        self.dead = set()
        self._service = service
        self._deadly = bool(deaths)
        self._waiting_for_claim = set()
        super().__init__([self._until_killed(number, actor) for number, actor in enumerate(actors)], choices,
                         losses + deaths)

    def _until_killed(self, number, actor):
        def act():
            with suppress(Killed):
                self._numbers[threading.current_thread()] = number
                actor()
        self._numbers = {}
        return act

    def wait_for_claim(self, seconds):
        self._waiting_for_claim.add(threading.current_thread())

    def before_request(self):
        self._end_if_dead()
        super().before_request()

    def after_request(self):
        if self._deadly and threading.current_thread() in self._losing:
            self._losing.clear()
            self.dead.add(self._numbers[threading.current_thread()])
        self._end_if_dead()
        super().after_request()

    def _end_if_dead(self):
        if self._numbers[threading.current_thread()] in self.dead:
            raise Killed

    def _let_one_pass(self):
        waiting = {thread: self._turns.pop(thread) for thread in self._waiting_for_claim & set(self._turns)}
        if not self._turns:
            self._turns, waiting = waiting, {}
            self._service.now += LEASE_DURATION
        self._waiting_for_claim.clear()
        super()._let_one_pass()
        self._turns.update(waiting)


class test_every_order_of_requests:
    """Workers report at the same time: the body starts once, whatever the order in which their requests arrive."""

    @pytest.fixture
    def explore(self, worker, fake_service, monkeypatch):
        """Return a function that has parts reported in every order, and returns how often each body was started."""
        backend = worker.app.backend
        monkeypatch.setattr(chords, '_undisturbed', lambda function: function())
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', DEADLINE)

        published = []
        body = {**worker.tasks.collect.s(), 'chord_size': None}
        monkeypatch.setattr(worker.tasks.collect, 'apply_async', lambda args, kwargs, **options: published.append(args[0]))

        def run(parts, choices, **faults):
            published.clear()
            group_id, size = str(uuid.uuid4()), max(parts) + 1
            backend._chords.start(group_id, [SimpleNamespace(id=str(part)) for part in range(size)], size)

            def report(part):
                request = Context(id=str(part), group=group_id, group_index=part, chord={**body, 'chord_size': size})
                backend.on_chord_part_return(request, states.SUCCESS, part)

            schedule = ChordSchedule(
                fake_service, [lambda part=part: report(part) for part in parts], choices, **faults)
            monkeypatch.setattr(chords, 'time', SimpleNamespace(sleep=schedule.wait_for_claim))
            fake_service.on(times=float('inf'), before=schedule.before_request, after=schedule.after_request)
            schedule.run()
            fake_service.forget_plans()
            assert schedule.errors == []
            fake_service.now += LEASE_DURATION
            for number in schedule.dead:
                report(parts[number])  # its message is delivered again
            assert logs(fake_service) == []
            return schedule.taken, list(published)

        def explore(*parts, **faults):
            orders, choices = [], []
            with worker.current():
                while choices is not None:
                    taken, bodies = run(parts, choices, **faults)
                    choices = following(taken)
                    orders.append(bodies)
            return orders

        return explore

    def test_of_the_last_two_parts(self, explore):
        orders = explore(0, 1)
        assert len(orders) == 2  # the service does one append after the other, and only the second one sees two parts
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_of_a_part_that_is_delivered_twice(self, explore):
        orders = explore(0, 0)
        assert len(orders) > 100
        assert all(bodies == [[0]] for bodies in orders)

    def test_of_three_parts_one_of_them_delivered_twice(self, explore):
        orders = explore(0, 1, 1)
        assert len(orders) > 400
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_with_an_answer_lost(self, explore):
        orders = explore(0, 1, losses=1)
        assert len(orders) > 400
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_with_a_worker_killed_whose_part_is_delivered_again(self, explore):
        orders = explore(0, 1, deaths=1)
        assert len(orders) > 10
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_with_a_worker_killed_while_another_has_the_same_part(self, explore):
        orders = explore(0, 0, deaths=1)
        assert len(orders) > 800
        assert all(bodies == [[0]] for bodies in orders)
