"""Chords that are counted by a log: what a user sees of them."""
from __future__ import annotations

import contextvars
import uuid
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip('azure.storage.blob')

from kombu.exceptions import OperationalError

from celery import chain, chord, group, signals, states, version_info
from celery.app.task import Context
from celery.backends.azurestorage import chordlog, chordpart, chords
from celery.backends.base import Backend
from celery.result import GroupResult

from .chordworker import killed, lapse, logs
from .fakehttp import cut_connection, refuse_connection

pytestmark = pytest.mark.usefixtures('no_chord_pauses')

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
    'a chain that ends with a group with a chord': (
        lambda t: [t.echo.s(0), chain(t.echo.s(1), group(t.echo.s(), chord([t.echo.s(), t.echo.s()], t.echo.s())))],
        [0, [1, [1, 1]]], 3),
    'an empty group beside others': (lambda t: [t.echo.s(0), group(), t.echo.s(1)], [0, 1], 2),
    'a task replaced by a task': (lambda t: [t.replace.s(t.add.s(1, 2)), t.echo.s(0)], [3, 0], 2),
    'a task replaced by a chain': (lambda t: [t.replace.s(chain(t.echo.s(1), t.add.s(2))), t.echo.s(0)], [3, 0], 2),
    'a task replaced by a group': (
        lambda t: [t.replace.s(group(t.echo.s(1), t.echo.s(2))), t.echo.s(0)], [[1, 2], 0], 2),
    'a task replaced by a chord': (
        lambda t: [t.replace.s(chord([t.echo.s(1), t.echo.s(2)], t.echo.s())), t.echo.s(0)], [[1, 2], 0], 2),
}

if version_info < (5, 7):
    # There Celery counts a part that no task is, and hands an empty list to the body.
    del SHAPES['a chain that ends with nothing']


@contextmanager
def connected(signal, receiver):
    """Have a signal received within the block."""
    signal.connect(receiver, weak=False)
    try:
        yield
    finally:
        signal.disconnect(receiver)


@pytest.fixture(params=SHAPES)
def shape(request):
    """A header of each shape: a function of the tasks, what the body is called with, the number of parts."""
    return SHAPES[request.param]


class test_the_body:

    def test_gets_the_results_in_the_headers_order(self, worker, shape, fake_service):
        make_header, expected, _ = shape
        result = chord(make_header(worker.tasks), worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.calls == [expected]
        assert worker.outcome(result) == (states.SUCCESS, expected)
        assert 'celery.chord_unlock' not in worker.names
        assert logs(fake_service) == []

    def test_gets_what_it_gets_of_a_polled_header(self, make_worker, shape):
        make_header, expected, _ = shape
        worker = make_worker(azureblockblob_native_chords=False)
        if 'quiet' in str(make_header(worker.tasks)):
            pytest.skip('Polling needs the results of all parts.')
        chord(make_header(worker.tasks), worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.calls == [expected]

    @pytest.mark.parametrize('reverse', [False, True])
    def test_gets_the_results_in_order_whatever_the_order_of_the_parts(self, worker, reverse):
        _, messages = worker.start(worker.echoes(12))
        for message in sorted(messages, key=lambda message: message.headers['id'], reverse=reverse):
            worker.execute(message)
        worker.run()
        assert worker.calls == [list(range(12))]

    @pytest.mark.skipif(version_info < (5, 7), reason='This Celery cannot store results of such tasks.')
    def test_gets_the_results_of_parts_whose_ids_are_uuids(self, worker, fake_service):
        t = worker.tasks
        part, first, second = (task.set(task_id=uuid.uuid4()) for task in (t.echo.s(0), t.add.s(2), t.add.s(3)))
        worker.finish([part, chain(t.echo.s(1), group(first, second))])
        assert worker.calls == [[0, [3, 4]]]
        assert logs(fake_service) == []

    def test_waits_for_a_part_that_joins_whose_id_is_a_uuid(self, worker):
        result, [message] = worker.start(worker.echoes(1))
        worker.app.backend.add_to_chord(result.parent.id, worker.app.AsyncResult(uuid.uuid4()))
        worker.execute(message)
        assert worker.receive() == []

    def test_starts_only_when_all_parts_are_there(self, worker):
        _, messages = worker.start(worker.echoes(5))
        for message in messages:
            assert worker.receive() == []
            worker.execute(message)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']

    def test_of_an_empty_header_starts_at_once(self, worker, fake_service):
        chord([], worker.tasks.collect.s()).apply_async()
        worker.run()
        assert worker.calls == [[]]

    @pytest.mark.parametrize(('make_header', 'expected'), [
        (lambda: [chain(group())], [[]]), (lambda: [group()], []), (lambda: (group() for _ in range(2)), [[], []]),
    ], ids=['chain', 'list', 'generator'])
    def test_of_a_header_of_empty_groups_starts_too(self, worker, fake_service, make_header, expected):
        worker.finish(make_header())
        assert worker.calls == [expected]
        assert logs(fake_service) == []

    def test_may_be_a_group(self, worker):
        result = chord(worker.echoes(2), group(worker.tasks.collect.s(), worker.tasks.collect.s())).apply_async()
        worker.run()
        assert worker.calls == [[0, 1]] * 2
        assert [worker.outcome(each) for each in result.results] == [(states.SUCCESS, [0, 1])] * 2

    def test_may_be_a_chain(self, worker):
        t = worker.tasks
        worker.finish(worker.echoes(2), chain(t.echo.s(), group(t.echo.s(), t.echo.s()), t.collect.s()))
        assert worker.calls == [[[0, 1], [0, 1]]]

    def test_may_be_a_chord(self, worker):
        chord(worker.echoes(2), chord([worker.tasks.echo.s()], worker.tasks.collect.s())).apply_async()
        worker.run()
        assert worker.calls == [[[0, 1]]]

    def test_may_be_used_again(self, worker):
        body = worker.tasks.collect.s()
        for number in (2, 3):
            chord(worker.echoes(number), body).apply_async()
            worker.run()
        assert worker.calls == [[0, 1], [0, 1, 2]]
        assert 'chord_size' not in body

    def test_gets_both_results_of_a_frozen_part_that_is_used_twice(self, worker):
        part = worker.tasks.echo.s(7)
        part.freeze()
        worker.finish([part, part])
        assert worker.calls == [[7, 7]]

    def test_gets_both_results_of_such_a_part_in_a_nested_header(self, worker):
        t = worker.tasks
        part = t.echo.s(7)
        part.freeze()
        worker.finish([part, part, chain(t.echo.s(1), group(t.add.s(1), t.add.s(2)))])
        assert worker.calls == [[7, 7, [2, 3]]]

    def test_starts_each_time_a_frozen_chord_is_applied(self, worker):
        frozen = chord(worker.echoes(2), worker.tasks.collect.s())
        frozen.freeze()
        for _ in range(2):
            frozen.apply_async()
            worker.run()
        assert worker.calls == [[0, 1]] * 2

    def test_is_published_in_the_context_of_the_part_that_started_it(self, worker):
        trace = contextvars.ContextVar('trace')
        seen = {}

        def begin(task, **kwargs):
            trace.set(f'trace of {task.name}')

        def publish(sender, **kwargs):
            seen[sender] = trace.get(None)

        _, [message] = worker.start(worker.echoes(1))
        with connected(signals.task_prerun, begin), connected(signals.before_task_publish, publish):
            contextvars.copy_context().run(worker.execute, message)
        assert seen == {'collect': 'trace of echo'}

    def test_belongs_to_the_part_that_started_it(self, worker):
        result, messages = worker.start([worker.tasks.family.s(), worker.tasks.family.s()], worker.tasks.family.s())
        worker.execute(messages[0])
        worker.execute(messages[1])
        worker.run()
        last = messages[1].headers['id']
        assert worker.outcome(result)[1] == {'root': last, 'parent': last, 'id': result.id}

    @pytest.mark.parametrize('serializer', ['json', 'pickle'])
    @pytest.mark.parametrize(('make_body', 'nested'), [
        (lambda t: t.collect.s(), False),
        (lambda t: group(t.collect.s()), False),
        (lambda t: chain(t.echo.s(), t.collect.s()), False),
        (lambda t: chord([t.echo.s()], t.collect.s()), True),
    ], ids=['task', 'group', 'chain', 'chord'])
    def test_starts_whatever_it_is_and_however_messages_are_written(
            self, make_worker, fake_service, make_body, nested, serializer):
        worker = make_worker(task_serializer=serializer, accept_content=['json', serializer])
        t = worker.tasks
        worker.finish(worker.echoes(2), make_body(t))
        worker.finish([chord(worker.echoes(2), make_body(t)), t.echo.s(2)], t.echo.s())
        assert worker.calls == [[[0, 1]] if nested else [0, 1]] * 2
        assert logs(fake_service) == []

    @pytest.mark.parametrize('header', [
        lambda t: [t.echo.s(1)],
        lambda t: [t.echo.s(1), chord([t.echo.s(1)], group())],
    ], ids=['flat', 'nested'])
    def test_may_be_empty(self, worker, fake_service, header, request):
        if version_info < (5, 7) and 'nested' in request.node.callspec.id:
            pytest.skip('There Celery cannot start such a chord, nor poll it.')
        worker.finish(header(worker.tasks), group())
        assert logs(fake_service) == []

    def test_of_chained_chords(self, worker):
        t = worker.tasks
        steps = [group(t.echo.s(1), t.echo.s(2)), t.collect.s(), group(t.echo.s(), t.echo.s()), t.collect.s()]
        chain(*steps).apply_async()
        worker.run()
        assert worker.calls == [[1, 2], [[1, 2], [1, 2]]]


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
        worker.finish(header())
        assert looked_at[0] < 5
        assert worker.calls == [list(range(50))]

    def test_of_a_generator_may_come_late(self, worker, fake_service):
        def run_what_is_there():
            for message in worker.receive():
                worker.execute(message)

        fake_service.on('Set Blob Metadata', before=run_what_is_there)
        worker.finish(worker.tasks.echo.s(value) for value in range(4))
        assert worker.calls == [[0, 1, 2, 3]]

    def test_of_a_generator_is_remembered_once_it_is_known(self, worker, fake_service):
        worker.finish(worker.tasks.echo.s(value) for value in range(20))
        assert Counter(fake_service.operations)['Get Blob Properties'] == 1

    def test_of_a_generator_may_be_another_when_its_id_is_used_again(self, worker):
        t = worker.tasks
        for number in (2, 4, 3):
            header = (t.echo.s(value) for value in range(number))
            chord(header, t.collect.s()).set(task_id='nightly').apply_async()
            worker.run()
        assert worker.calls == [[0, 1], [0, 1, 2, 3], [0, 1, 2]]

    def test_is_remembered_for_some_chords_only(self, worker):
        worker.app.backend._chords._sizes.limit = 2
        for _ in range(5):
            worker.finish(worker.tasks.echo.s(value) for value in range(2))
            assert len(worker.app.backend._chords._sizes) <= 2
        assert worker.calls == [[0, 1]] * 5

    def test_is_not_written_for_other_groups(self, worker, fake_service):
        worker.app.backend.set_chord_size('unknown', 3)
        worker.finish(worker.echoes(2))
        assert 'Set Blob Metadata' not in fake_service.operations

    @pytest.mark.parametrize('code', [(404, 'BlobNotFound'), (412, 'LeaseIdMissing')])
    def test_is_not_written_where_the_chord_is_over_or_complete(self, worker, fake_service, code, caplog):
        fake_service.on('Set Blob Metadata', answer=code)
        chord((worker.tasks.echo.s(value) for value in range(2)), worker.tasks.collect.s()).apply_async()
        assert len(worker.receive()) == 2
        assert 'was not written' in caplog.text


def count_reads(service):
    """Return how often logs were read."""
    return sum(request.operation == 'Get Blob' and request.blob.startswith('celery-chord-')
               for request in service.requests)


class test_requests:

    @pytest.mark.parametrize('number', [1, 10, 200])
    def test_besides_the_results_an_append_for_each_part_and_five_more(self, worker, fake_service, number):
        worker.finish(worker.echoes(1))  # creates the container
        fake_service.requests.clear()
        worker.names.clear(), worker.calls.clear()
        worker.finish(worker.echoes(number))
        counts = Counter(fake_service.operations)
        results = number + 1  # those of the parts and of the body
        assert counts['Append Block'] == number
        assert sum(counts.values()) == results + number + 5
        assert worker.calls == [list(range(number))]
        assert Counter(worker.names) == {'echo': number, 'collect': 1}

    @pytest.mark.parametrize('make_header', [
        lambda t: [t.grow.s(*range(40))],
        lambda t: [chain(t.echo.s(1), group(t.echo.s() for _ in range(40))), t.echo.s(1)],
    ], ids=['that grows', 'that is nested'])
    def test_a_log_with_more_blocks_than_parts_is_read_a_few_times_only(self, worker, fake_service, make_header):
        worker.finish(make_header(worker.tasks))
        assert len(worker.calls) == 1
        assert count_reads(fake_service) <= 3

    def test_a_log_with_parts_that_came_twice_is_read_a_few_times_only(self, worker, fake_service):
        _, messages = worker.start(worker.echoes(40))
        for message in [*messages[:20], *messages]:
            worker.execute(message)
        worker.run()
        assert worker.calls == [list(range(40))]
        assert count_reads(fake_service) <= 3

    def test_none_for_a_polled_chord(self, make_worker, fake_service):
        worker = make_worker(azureblockblob_native_chords=False)
        worker.finish(worker.echoes(3))
        assert not {'Append Block', 'Lease Blob'} & set(fake_service.operations)


class test_growth:

    def test_the_body_waits_for_parts_that_join_later(self, worker):
        worker.finish([worker.tasks.grow.s(10, 11), worker.tasks.echo.s(1)])
        [results] = worker.calls
        assert Counter(results) == Counter(['grown', 10, 11, 1])
        assert results[-1] == 1

    def test_they_come_last_in_a_nested_header(self, worker):
        t = worker.tasks
        worker.finish([t.grow.s(10), chain(t.echo.s(1), group(t.add.s(1), t.add.s(2)))])
        assert worker.calls == [['grown', [2, 3], 10]]

    def test_the_answer_is_lost(self, worker, fake_service):
        fake_service.on('Append Block', after=cut_connection)
        worker.finish([worker.tasks.grow.s(10)])
        assert Counter(worker.calls[0]) == Counter(['grown', 10])

    def test_a_part_that_comes_twice_does_not_grow_what_is_over(self, worker, caplog):
        _, [message] = worker.start([worker.tasks.grow.s(10)])
        worker.execute(message)
        worker.run()
        worker.execute(message)
        worker.run()
        assert [sorted(map(str, results)) for results in worker.calls] == [['10', 'grown']]
        assert 'does not wait' in caplog.text

    def test_a_task_can_make_another_chord_than_its_own_grow(self, worker):
        other, [part] = worker.start(worker.echoes(1))
        worker.finish([worker.tasks.grow_other.s(other.parent.id)])
        assert worker.calls == [[None]]
        worker.execute(part)
        assert worker.receive() == []

    def test_a_polled_chord_cannot_grow(self, make_worker):
        worker = make_worker(azureblockblob_native_chords=False)
        result, messages = worker.start([worker.tasks.grow.s(10)])
        worker.execute(messages[-1])
        state, error = worker.outcome(result.parent.results[0])
        assert (state, type(error).__name__) == (states.FAILURE, 'NotImplementedError')
        assert 'azureblockblob_native_chords' in str(error)

    def test_outside_of_a_task(self, worker):
        result, messages = worker.start(worker.echoes(1))
        worker.app.backend.add_to_chord(result.parent.id, SimpleNamespace(id='another'))
        worker.execute(messages[0])
        assert worker.receive() == []


class test_failures:

    @pytest.mark.parametrize('number', [1, 2])
    def test_a_failed_part_fails_the_body_with_its_errback_called_once(self, worker, number, fake_service):
        t = worker.tasks
        result = worker.finish([t.echo.s(1), *[t.fail.s()] * number], t.collect.s().on_error(t.errback.s()))
        assert "raised ValueError('on purpose')" in worker.failure(result)
        assert worker.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_the_error_has_the_parts_error_for_its_cause(self, worker, monkeypatch):
        causes = []
        fail = worker.app.backend.chord_error_from_stack
        monkeypatch.setattr(worker.app.backend, 'chord_error_from_stack',
                            lambda body, exc: (causes.append(exc.__cause__), fail(body, exc)))
        worker.finish([worker.tasks.fail.s()])
        assert [str(cause) for cause in causes] == ['on purpose']

    def test_a_body_fails_only_when_all_parts_are_there(self, worker):
        result, (failing, other) = worker.start([worker.tasks.fail.s(), worker.tasks.echo.s(1)])
        worker.execute(failing)
        assert worker.outcome(result)[0] == states.PENDING
        worker.execute(other)
        assert worker.outcome(result)[0] == states.FAILURE

    def test_a_failing_body_is_the_bodys_own_affair(self, worker, fake_service):
        result = worker.finish(worker.echoes(2), worker.tasks.fail.s())
        state, error = worker.outcome(result)
        assert (state, str(error)) == (states.FAILURE, 'on purpose')
        assert logs(fake_service) == []

    def test_all_tasks_of_a_group_body_fail(self, worker):
        t = worker.tasks
        result = worker.finish([t.fail.s()], group(t.collect.s(), t.collect.s()))
        if not hasattr(worker.app.backend, '_handle_group_chord_error'):
            pytest.skip('This release of Celery does not fail the tasks of a group.')
        assert [worker.outcome(each)[0] for each in result.results] == [states.FAILURE] * 2
        assert worker.calls == []

    def test_the_result_of_a_part_cannot_be_encoded(self, worker):
        result = worker.finish([worker.tasks.opaque.s(), worker.tasks.echo.s(1)])
        assert 'EncodeError' in worker.failure(result)

    @pytest.mark.parametrize('make_header', [
        lambda t: [t.echo.s(1), chord([t.echo.s(1), t.fail.s()], t.collect.s())],
        lambda t: [t.echo.s(1), chord([t.echo.s(1)], t.fail.s())],
        lambda t: [t.echo.s(1), chord([chord([t.fail.s()], t.collect.s())], t.collect.s())],
        lambda t: [t.echo.s(1), chord([t.fail.s()], group(t.collect.s(), t.collect.s()))],
        lambda t: [t.echo.s(1), chord([t.fail.s()], chain(t.collect.s(), t.collect.s()))],
        lambda t: [t.echo.s(1), chord([t.fail.s()], chord([t.collect.s()], t.collect.s()))],
        lambda t: (x for x in [chord([t.fail.s()], t.collect.s())]),
        lambda t: (x for x in [chord([t.fail.s()], chain(t.collect.s(), t.collect.s()))]),
        lambda t: (x for x in [chord([t.fail.s()], group(t.collect.s(), t.collect.s()))]),
        lambda t: (x for x in [chord([t.fail.s()], chord([t.collect.s()], t.collect.s()))]),
        lambda t: [t.echo.s(1), chain(t.fail.s(), t.collect.s())],
        lambda t: [t.echo.s(1), chain(t.fail.s(), group(t.collect.s(), t.collect.s()))],
        lambda t: [t.replace.s(t.fail.s()), t.echo.s(1)],
        lambda t: [t.replace.s(chord([t.fail.s()], t.collect.s())), t.echo.s(1)],
        lambda t: [t.echo.s(1), t.replace.s(group(t.fail.s(), t.echo.s(1)))],
    ], ids=['header of a nested chord', 'body of a nested chord', 'header of a chord in a nested chord',
            'nested chord with a group', 'nested chord with a chain', 'nested chord with a chord',
            'generated chord', 'generated chord with a chain', 'generated chord with a group',
            'generated chord with a chord',
            'chain', 'chain that would end with a group', 'replaced task', 'task replaced by a chord',
            'task replaced by a group'])
    def test_of_something_nested_end_the_chord_around_it(self, worker, make_header, fake_service):
        t = worker.tasks
        result = worker.finish(make_header(t), t.collect.s().on_error(t.errback.s()))
        assert 'Dependency' in worker.failure(result)
        assert worker.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    @pytest.mark.parametrize('make_body', [
        lambda t: chord([t.collect.s()], t.collect.s()),
        lambda t: chord([t.collect.s()], chain(t.collect.s(), group(t.collect.s(), t.collect.s()))),
        lambda t: chain(t.collect.s(), group(t.collect.s(), t.collect.s())),
        lambda t: group(t.collect.s(), chord([t.collect.s()], t.collect.s())),
    ], ids=['chord', 'chord with a chain', 'chain that ends with a group', 'group with a chord'])
    @pytest.mark.parametrize('native_chords', [True, False])
    def test_end_all_that_waits_for_a_body_of_several_tasks(self, make_worker, make_body, native_chords):
        if not hasattr(Backend, '_handle_group_chord_error'):
            pytest.skip('This release of Celery forgets groups that are bodies.')
        worker = make_worker(azureblockblob_native_chords=native_chords)
        result = worker.finish([worker.tasks.fail.s()], make_body(worker.tasks))
        ends = result.results if isinstance(result, GroupResult) else [result]
        assert [worker.outcome(end)[0] for end in ends] == [states.FAILURE] * len(ends)
        assert worker.calls == []

    @pytest.mark.skipif(version_info < (5, 7), reason='This Celery cannot link an errback to a group.')
    @pytest.mark.filterwarnings('ignore:task_allow_error_cb_on_chord_header')
    @pytest.mark.parametrize('native_chords', [True, False])
    def test_call_an_errback_once_that_is_linked_at_several_levels(self, make_worker, native_chords):
        worker = make_worker(azureblockblob_native_chords=native_chords)
        t = worker.tasks
        canvas = chord([t.fail.s()], chord([t.collect.s()], t.collect.s()))
        canvas.link_error(t.alarm.s())
        canvas.apply_async(link_error=t.alarm.s())
        worker.run()
        assert worker.calls == ['alarm']

    def test_of_a_polled_chord_end_the_counted_one_around_it(self, worker, monkeypatch):
        monkeypatch.setattr(chords, 'MAX_PARTS', 2)
        t = worker.tasks
        result = worker.finish([t.echo.s(0), chord([t.fail.s(), t.echo.s(1), t.echo.s(2)], t.echo.s())])
        assert 'celery.chord_unlock' in worker.names
        assert 'Dependency' in worker.failure(result)

    def test_of_a_nested_chord_call_an_errback_of_both_once(self, worker):
        t = worker.tasks
        for inner in (t.collect.s(), chain(t.collect.s(), t.collect.s()), group(t.collect.s(), t.collect.s())):
            worker.calls.clear()
            outer = chord([t.echo.s(1), chord([t.fail.s()], inner)], t.collect.s())
            for body in (inner, outer.body):
                body.link_error(t.errback.s())
            result = outer.apply_async()
            worker.run()
            assert worker.calls == [(result.id, 'ChordError')]

    def test_of_a_nested_chord_call_the_errbacks_of_each(self, worker):
        t = worker.tasks
        inner = chord([t.fail.s()], t.collect.s().on_error(t.errback.s()))
        result = worker.finish([t.echo.s(1), inner], t.collect.s().on_error(t.alarm.s()))
        assert worker.calls == [(result.parent.results[1].id, 'ChordError'), 'alarm']

    def test_a_result_that_cannot_be_read_fails_the_body(self, worker, fake_service, monkeypatch):
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        monkeypatch.setattr(worker.app.backend, 'decode_blob', lambda data: {}['nothing'])
        worker.execute(messages[1])
        assert 'Join error' in worker.failure(result)
        assert logs(fake_service) == []

    def test_errbacks_are_called_once_if_the_failure_cannot_be_stored_at_once(self, worker, fake_service):
        t = worker.tasks
        result, messages = worker.start([t.fail.s()], t.collect.s().on_error(t.errback.s()))
        fake_service.on('Put Blob', blob=result.id, before=refuse_connection, times=6)
        worker.execute(messages[0])
        assert worker.calls == [(result.id, 'ChordError')]
        assert 'Dependency' in worker.failure(result)
        assert logs(fake_service) == []

    def test_errbacks_are_called_once_if_the_failure_can_never_be_stored(self, worker, fake_service, caplog):
        t = worker.tasks
        result, messages = worker.start([t.fail.s()], t.collect.s().on_error(t.errback.s()))
        fake_service.on('Put Blob', blob=result.id, answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        worker.execute(messages[0])
        assert worker.calls == [(result.id, 'ChordError')]
        assert 'could not be stored' in caplog.text


class test_publishing:

    @pytest.fixture
    def broken(self, worker, monkeypatch):
        """A chord of one part whose body cannot be published: the result and the part's message."""
        t = worker.tasks
        result, [message] = worker.start(worker.echoes(1), t.collect.s().on_error(t.errback.s()))

        def refuse(*args, **kwargs):
            raise OperationalError('no broker')

        with monkeypatch.context() as patch:
            patch.setattr(t.collect, 'apply_async', refuse)
            worker.execute(message)
        return result, message

    def test_that_fails_fails_the_body(self, worker, broken, fake_service):
        result, _ = broken
        assert 'Callback error' in worker.failure(result)
        assert worker.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_that_failed_is_not_tried_again(self, worker, broken):
        result, message = broken
        worker.execute(message)
        worker.run()
        assert worker.calls == [(result.id, 'ChordError')]

    def test_the_part_has_succeeded_all_the_same(self, worker, broken):
        assert worker.outcome(broken[0].parent.results[0]) == (states.SUCCESS, 0)

    def test_is_left_to_celery_to_repeat(self, worker, monkeypatch):
        if not hasattr(worker.app.amqp, '_retry_publish'):
            pytest.skip('This release of Celery has no way to do that.')
        repeated = []
        publish = worker.app.amqp._retry_publish
        monkeypatch.setattr(worker.app.amqp, '_retry_publish',
                            lambda *args: (repeated.append(args[1:]), publish(*args)))
        worker.finish(worker.echoes(2))
        assert ([0, 1],) in repeated


class test_limits:

    def test_a_list_of_too_many_parts_is_polled_with_a_warning(self, worker, monkeypatch, caplog, fake_service):
        monkeypatch.setattr(chords, 'MAX_PARTS', 2)
        worker.finish(worker.echoes(3))
        assert worker.calls == [[0, 1, 2]]
        assert 'A chord of 3 parts is polled' in caplog.text
        assert 'Append Block' not in fake_service.operations

    def test_a_list_of_as_many_parts_as_fit_is_counted(self, worker, monkeypatch, fake_service):
        monkeypatch.setattr(chords, 'MAX_PARTS', 3)
        worker.finish(worker.echoes(3))
        assert worker.calls == [[0, 1, 2]]
        assert 'Append Block' in fake_service.operations

    def test_a_log_has_room_for_more_than_the_longest_list(self, fake_service):
        assert 40_000 == chords.MAX_PARTS < fake_service.max_blocks

    @pytest.mark.parametrize('late', [False, True])
    def test_a_generator_of_too_many_parts_fails_its_chord_and_says_why(self, worker, fake_service, late):
        t = worker.tasks
        fake_service.max_blocks = 3
        header = (t.echo.s(value) for value in range(5))
        if late:
            fake_service.on('Set Blob Metadata', before=worker.run)
        result = worker.finish(header, t.collect.s().on_error(t.errback.s()))
        message = worker.failure(result)
        assert 'more parts than its log can hold' in message
        assert 'list' in message
        assert worker.calls == [(result.id, 'ChordError')]
        assert logs(fake_service) == []

    def test_a_chord_whose_log_is_full_fails_though_the_worker_that_was_to_fail_it_is_killed(
            self, worker, fake_service):
        fake_service.max_blocks = 2
        result, messages = worker.start(worker.tasks.echo.s(value) for value in range(4))
        worker.execute(messages[0])
        worker.execute(messages[1])
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(messages[2])
        fake_service.on('Append Block', times=2)
        fake_service.on('Append Block', before=lambda: lapse(fake_service))
        worker.execute(messages[3])
        assert 'more parts than its log can hold' in worker.failure(result)


class test_large_results:

    def large(self, worker, number=2):
        return [worker.tasks.echo.s('x' * chordpart.MAX_BLOCK) for _ in range(number)]

    def test_get_blobs_of_their_own_which_go_with_the_log(self, worker, fake_service):
        _, messages = worker.start([*self.large(worker), worker.tasks.echo.s(1)])
        for message in messages[:2]:
            worker.execute(message)
        assert len(logs(fake_service)) == 3
        worker.execute(messages[2])
        worker.run()
        assert worker.calls == [['x' * chordpart.MAX_BLOCK] * 2 + [1]]
        assert logs(fake_service) == []

    def test_those_of_parts_that_come_twice_go_too(self, worker, fake_service):
        _, messages = worker.start(self.large(worker))
        for message in [messages[0], *messages]:
            worker.execute(message)
        worker.run()
        assert logs(fake_service) == []

    def test_that_come_after_the_end_leave_nothing(self, worker, fake_service):
        _, [message] = worker.start(self.large(worker, 1))
        for _ in range(2):
            worker.execute(message)
        assert logs(fake_service) == []

    def test_are_stored_once_though_the_log_is_busy(self, worker, fake_service):
        _, messages = worker.start(self.large(worker))
        fake_service.on('Append Block', answer=(503, 'ServerBusy'), times=10)
        worker.execute(messages[0])
        assert len(logs(fake_service)) == 2

    def test_get_none_as_long_as_they_fit_into_a_block(self, worker, fake_service):
        header = (worker.tasks.echo.s('x' * (chordpart.MAX_BLOCK - 1000)) for _ in range(3))
        _, messages = worker.start(header)
        worker.execute(messages[0])
        assert len(logs(fake_service)) == 1

    def test_get_them_all_once_the_log_is_long(self, worker, fake_service, monkeypatch):
        monkeypatch.setattr(chordpart, 'MAX_LENGTH', 2000)
        _, messages = worker.start([worker.tasks.echo.s('x' * 300) for _ in range(9)])
        for message in messages[:8]:
            worker.execute(message)
        assert len(logs(fake_service)) == 1 + 8 - 3  # as many fit into the log
        worker.execute(messages[8])
        worker.run()
        assert worker.calls == [['x' * 300] * 9]
        assert logs(fake_service) == []

    def test_a_log_stays_below_64_mib_with_the_longest_header(self):
        head = [str(uuid.uuid4()), chords.MAX_PARTS, states.SUCCESS, f'celery-chord-{uuid.uuid4()}.{uuid.uuid4()}']
        block = chordlog.Record(chordlog.PART, head)
        assert chordpart.MAX_LENGTH + 50_000 * len(block.to_bytes()) < 64 * 1024 * 1024

    def test_that_are_gone_fail_the_chord(self, worker, fake_service):
        result, messages = worker.start(self.large(worker))
        worker.execute(messages[0])
        [payload] = [name for name in logs(fake_service) if '.' in name]
        worker.app.backend.container.delete(payload)
        worker.execute(messages[1])
        assert 'is gone' in worker.failure(result)

    def test_that_cannot_be_read_for_some_time_do_not_fail_it(self, worker, fake_service):
        _, messages = worker.start(self.large(worker))
        worker.execute(messages[0])
        fake_service.on('Get Blob', blob='.', answer=(503, 'ServerBusy'), times=8)
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [['x' * chordpart.MAX_BLOCK] * 2]

    def test_that_cannot_be_deleted_are_left_to_expire(self, worker, fake_service, caplog):
        _, messages = worker.start(self.large(worker))
        fake_service.on('Delete Blob', blob='.', answer=(403, 'AuthorizationPermissionMismatch'), times=10)
        for message in messages:
            worker.execute(message)
        worker.run()
        assert len(worker.calls) == 1
        assert 'were not deleted' in caplog.text


class test_formats:

    @pytest.mark.parametrize('serializer', ['json', 'pickle', 'yaml', 'msgpack'])
    @pytest.mark.parametrize('compression', [None, 'gzip'])
    @pytest.mark.parametrize('size', [1, chordpart.MAX_BLOCK])
    def test_results_come_as_they_were_returned(self, make_worker, serializer, compression, size):
        if serializer in ('yaml', 'msgpack'):
            pytest.importorskip(serializer)
        worker = make_worker(result_serializer=serializer, result_compression=compression,
                             accept_content=['json', serializer])
        results = ['\N{SNOWMAN}' * size, {'a': [1, None, 2.5]}]
        worker.finish([worker.tasks.echo.s(result) for result in results])
        assert worker.calls == [results]

    @pytest.mark.parametrize('serializer', ['json', 'pickle'])
    def test_errors_keep_their_type(self, make_worker, serializer):
        worker = make_worker(result_serializer=serializer, accept_content=['json', serializer])
        result = worker.finish([worker.tasks.fail.s()])
        assert "ValueError('on purpose')" in worker.failure(result)


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
        _, messages = off.start(off.echoes(2), body)
        assert [message.headers['task'] for message in messages] == ['celery.chord_unlock', 'echo', 'echo']
        assert all('chord_size' not in message.payload[2]['chord'] for message in messages[1:])
        for message in messages:
            off.execute(message)
        off.run()
        assert off.calls == [[0, 1]]
        assert not {'Append Block', 'Lease Blob'} & set(fake_service.operations)

    def test_workers_that_are_off_count_the_parts_of_one_that_is_on(self, worker, off):
        _, messages = worker.start(worker.echoes(2))
        for message in messages:
            off.execute(message)
        off.run()
        assert off.calls == [[0, 1]]

    def test_workers_that_are_on_leave_the_parts_of_one_that_is_off_to_polling(self, worker, off, fake_service):
        _, messages = off.start(off.echoes(2))
        for message in messages:
            worker.execute(message)
        worker.run()
        assert worker.calls == [[0, 1]]
        assert 'Append Block' not in fake_service.operations

    def test_each_step_of_a_chain_is_as_its_publisher_is(self, worker, off, fake_service):
        t = worker.tasks
        steps = [group(t.echo.s(1), t.echo.s(2)), t.echo.s(), group(t.echo.s(), t.echo.s()), t.collect.s()]
        chain(*steps).apply_async()
        off.run()
        assert off.calls == [[[1, 2], [1, 2]]]
        assert off.names.count('celery.chord_unlock') >= 1
        assert Counter(fake_service.operations)['Append Block'] == 2

    def test_tasks_outside_of_chords_are_not_reported(self, worker, fake_service):
        group(worker.echoes(2)).apply_async()
        worker.run()
        worker.app.backend.on_chord_part_return(Context(id='id'), states.SUCCESS, 1)
        worker.app.backend.on_chord_part_return(Context(id='id', group='group'), states.SUCCESS, 1)
        worker.app.backend.on_chord_part_return(Context(id='id', chord={'chord_size': 1}), states.SUCCESS, 1)
        assert 'Append Block' not in fake_service.operations

    def test_the_mark_does_not_travel_on_with_the_body(self, worker):
        body = chord([worker.tasks.echo.s()], worker.tasks.collect.s())
        _, [message] = worker.start(worker.echoes(1), body)
        worker.execute(message)
        [message] = worker.receive()
        assert 'chord_size' not in message.properties
        assert 'chord_size' not in message.headers
