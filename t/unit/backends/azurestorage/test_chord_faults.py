"""Chords that are counted by a log, when workers die, requests are lost, and messages come twice."""
from __future__ import annotations

import os
import threading
import uuid
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest

pytest.importorskip('azure.storage.blob')

from azure.core.credentials import AccessToken
from azure.core.exceptions import ClientAuthenticationError
from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError

from celery import chain, group, signals, states, version_info
from celery.app.task import Context
from celery.backends.azurestorage import chordend, chordlog, chordpart, chords
from celery.backends.azurestorage.client import close_clients
from celery.exceptions import TaskRevokedError
from celery.worker.state import revoked

from .chordworker import Killed, killed, lapse, logs
from .conftest import ACCOUNT_URL
from .fakehttp import cut_connection, refuse_connection
from .processes import in_child
from .schedules import Schedule, following

#: How long a test waits for a thread, in seconds.
DEADLINE = 30


pytestmark = pytest.mark.usefixtures('no_chord_pauses')

#: Where the worker that starts a body may be killed: at a request, before the service sees it or after.
CRASHES = [
    pytest.param(operation, action, answered, id=f'{"after" if answered else "before"} {action} {operation}')
    for operation, action in [('Append Block', ''), ('Get Blob', ''), ('Lease Blob', 'acquire'),
                              ('Lease Blob', 'renew'), ('Delete Blob', '')]
    for answered in (False, True)]


class FailingCredential:
    """Gives tokens that no request can share with another, but for some, that it fails to give."""

    def __init__(self):
        self.failures = 0
        self._coming = iter(())

    def fail(self, skip, times):
        """Give so many tokens more, and then fail so often."""
        self._coming = iter([False] * skip + [True] * times)

    def get_token(self, *scopes, **kwargs):
        if next(self._coming, False):
            self.failures += 1
            raise ClientAuthenticationError('no identity')
        return AccessToken('token', 0)


class test_a_worker_that_is_killed:

    @pytest.mark.parametrize(('operation', 'action', 'answered'), CRASHES)
    def test_has_its_chord_finished_when_its_part_is_delivered_again(
            self, worker, fake_service, operation, action, answered):
        result, messages = worker.start(worker.echoes(3))
        for message in messages[:2]:
            worker.execute(message)
        with killed(fake_service, operation, action, answered):
            worker.execute(messages[2])
        close_clients()
        lapse(fake_service)
        worker.execute(messages[2])
        worker.run()
        published_before_the_end = operation == 'Delete Blob' and not answered
        assert worker.calls == [[0, 1, 2]] * (2 if published_before_the_end else 1)
        assert worker.outcome(result) == (states.SUCCESS, [0, 1, 2])
        assert logs(fake_service) == []

    def test_makes_others_wait_as_long_as_its_lease_lasts(self, worker, fake_service):
        _, [message] = worker.start(worker.echoes(1))
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        refused = []
        fake_service.on('Get Blob Properties', times=3, after=lambda: refused.append(worker.receive()))
        fake_service.on('Get Blob Properties', before=lambda: lapse(fake_service))
        worker.execute(message)
        worker.run()
        assert refused == [[]] * 3
        assert worker.calls == [[0]]

    def test_is_reported_by_the_main_process(self, worker, fake_service):
        result, [message] = worker.start([worker.tasks.quiet.s(5)])
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        lapse(fake_service)
        with worker.main_process():
            lost = worker.request(message)
            lost.task.backend.mark_as_failure(lost.id, OSError('lost'), request=lost._context, store_result=False)
        worker.run()
        assert worker.calls == [[5]]


    @pytest.mark.parametrize(('operation', 'action'), [
        ('Append Block', ''), ('Lease Blob', 'acquire'), ('Lease Blob', 'renew')])
    @pytest.mark.parametrize('answered', [False, True])
    def test_is_replaced_by_the_main_process_though_its_part_has_succeeded(
            self, worker, fake_service, operation, action, answered):
        result, [message] = worker.start(worker.echoes(1))
        lost = worker.request(message)
        with worker.main_process():
            signals.task_received.send(sender=None, request=lost)
            with killed(fake_service, operation, action, answered):
                worker.execute(message)
            lapse(fake_service)
            lost.on_failure(worker_lost())
        worker.run()
        logged = operation != 'Append Block' or answered
        if logged or version_info >= (5, 7):
            assert worker.calls == [[0]]
        else:  # Celery does not see that the part has succeeded
            assert 'WorkerLostError' in worker.failure(result)
        assert worker.outcome(result.parent.results[0]) == (states.SUCCESS, 0)
        assert logs(fake_service) == []


def worker_lost():
    """Return what a worker's main process learns of a process of its pool that has been killed."""
    try:
        raise WorkerLostError('killed')
    except WorkerLostError:
        return ExceptionInfo()


class test_parts_that_come_twice:

    def test_count_once(self, worker):
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        worker.execute(messages[0])
        assert worker.receive() == []
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    def test_count_with_their_first_record(self, worker):
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        request = worker.request(messages[0])._context
        worker.app.backend.on_chord_part_return(request, states.FAILURE, ValueError('later'))
        worker.execute(messages[1])
        worker.run()
        assert worker.outcome(result) == (states.SUCCESS, [0, 1])

    def test_after_the_end_do_nothing_but_warn(self, worker, fake_service, caplog):
        _, messages = worker.start(worker.echoes(2))
        for message in [*messages, *messages]:
            worker.execute(message)
        worker.run()
        assert worker.calls == [[0, 1]]
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
        assert worker.calls == [[2, 3]]


    def test_a_step_that_comes_again_finishes_what_the_first_has_begun(self, worker):
        t = worker.tasks
        chain(t.echo.s(1), group(t.add.s(1), t.add.s(2)), t.collect.s()).apply_async()
        [step] = worker.receive()
        worker.execute(step)
        worker.execute(worker.receive()[0])  # its other message is lost
        worker.execute(step)
        worker.run()
        assert worker.calls == [[2, 3]]


class test_lost_and_late_requests:

    def test_the_answer_to_an_append_is_lost(self, worker, fake_service):
        _, messages = worker.start(worker.echoes(2))
        fake_service.on('Append Block', after=cut_connection)
        worker.execute(messages[0])
        assert worker.receive() == []
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    def test_the_answer_to_the_last_append_is_lost(self, worker, fake_service):
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        fake_service.on('Append Block', after=cut_connection)
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    @pytest.mark.parametrize(('operation', 'action'), [
        ('Get Blob', ''), ('Lease Blob', 'acquire'), ('Lease Blob', 'renew'), ('Delete Blob', '')])
    def test_another_answer_is_lost(self, worker, fake_service, operation, action):
        _, [message] = worker.start(worker.echoes(1))
        if action == 'renew':
            fake_service.on('Lease Blob')
        fake_service.on(operation, blob='celery-chord-', after=cut_connection)
        worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]
        assert logs(fake_service) == []

    def test_a_second_create_that_arrives_among_the_parts(self, worker):
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        worker.app.backend.chord_log(result.parent.id).create()
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    def test_a_second_create_that_arrives_after_the_end(self, worker):
        result, messages = worker.start(worker.echoes(2))
        for message in messages:
            worker.execute(message)
        worker.app.backend.chord_log(result.parent.id).create()
        worker.execute(messages[0])
        worker.run()
        assert worker.calls == [[0, 1]]

    def test_a_second_create_that_arrives_after_the_end_while_someone_waits_for_the_claim(
            self, worker, fake_service, monkeypatch):
        t = worker.tasks
        result, messages = worker.start(worker.echoes(2), t.collect.s().on_error(t.errback.s()))
        worker.execute(messages[0])
        request = worker.request(messages[1])._context
        waiter = threading.Thread(
            target=worker.app.backend.on_chord_part_return, args=(request, states.SUCCESS, 1), daemon=True)
        waiting, created = threading.Event(), threading.Event()

        def wait_for_claim(seconds):
            waiting.set()
            assert created.wait(DEADLINE)

        def report_again():
            waiter.start()
            assert waiting.wait(DEADLINE)

        monkeypatch.setattr(chordend, 'time', SimpleNamespace(sleep=wait_for_claim))
        fake_service.on('Lease Blob')
        fake_service.on('Lease Blob', before=report_again)  # the renewal of the claim
        worker.execute(messages[1])
        worker.app.backend.chord_log(result.parent.id).create()
        created.set()
        waiter.join(DEADLINE)
        worker.run()
        assert worker.calls == [[0, 1]]
        assert worker.outcome(result) == (states.SUCCESS, [0, 1])

    def test_the_log_grows_between_read_and_claim(self, worker, fake_service):
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        again = worker.request(messages[0])._context
        fake_service.on('Lease Blob', before=lambda: worker.app.backend.chord_log(again.group).append(
            chordlog.Record(chordlog.PART, [again.id, 0, states.SUCCESS, None], b'"late"').to_bytes()))
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]
        assert Counter(request.operation for request in fake_service.requests
                       if request.operation == 'Get Blob' and 'celery-chord' in request.blob) == {'Get Blob': 2}

    def test_the_lease_lapses_before_the_body_is_published(self, worker, fake_service):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Lease Blob')
        fake_service.on('Lease Blob', answer=(409, 'LeaseIdMismatchWithLeaseOperation'))
        worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]

    def test_the_lease_lapses_before_the_log_is_deleted(self, worker, fake_service):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Delete Blob', before=lambda: lapse(fake_service))
        worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]
        assert logs(fake_service) == []

    @pytest.fixture
    def outage(self, worker, fake_service, monkeypatch):
        """Return a function that has a chord's part reported again while the log cannot be deleted any more.

        The body is out then, the lease lapses, and the service is away. When it is back, whoever reports the part
        comes first, though one of its requests may fail too; but leaves time, as the pause tells.
        """
        def outage(message, seen_by, waiting=False):
            paused, deleted = threading.Event(), threading.Event()

            def begin():
                lapse(fake_service)
                if seen_by:
                    fake_service.on(seen_by, blob='celery-chord-', answer=(503, 'ServerBusy'))

            def sleep(seconds):
                if seconds == 'grace':
                    paused.set()
                    assert deleted.wait(DEADLINE)
                elif seconds == 'claimed':
                    begin()

            def report_again():
                if not waiting:
                    begin()
                again.start()
                assert paused.wait(DEADLINE)
                refuse_connection()

            monkeypatch.setattr(chordend, 'GRACE', 'grace')
            monkeypatch.setattr(chordend, '_pause_for_claim', lambda: sleep('claimed'))
            monkeypatch.setattr(chordend.time, 'sleep', sleep)
            again = threading.Thread(target=worker.execute, args=(message,))
            fake_service.on('Delete Blob', before=report_again)
            worker.execute(message)
            deleted.set()
            again.join(DEADLINE)
            worker.run()
        return outage

    @pytest.mark.parametrize('seen_by', [None, 'Append Block', 'Get Blob', 'Lease Blob'])
    def test_the_lease_lapses_in_an_outage_before_the_log_is_deleted(self, worker, fake_service, outage, seen_by):
        _, [message] = worker.start(worker.echoes(1))
        outage(message, seen_by)
        assert worker.calls == [[0]]
        assert logs(fake_service) == []

    @pytest.mark.parametrize('seen_by', [None, 'Get Blob Properties', 'Get Blob', 'Lease Blob'])
    def test_the_lease_lapses_in_an_outage_while_someone_waits_for_it(self, worker, fake_service, outage, seen_by):
        _, [message] = worker.start(worker.echoes(1))
        outage(message, seen_by, waiting=True)
        assert worker.calls == [[0]]
        assert logs(fake_service) == []

    def test_the_log_cannot_be_deleted_for_long(self, worker, fake_service, caplog):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Delete Blob', answer=(503, 'ServerBusy'), times=1000)
        worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]
        assert 'was not deleted' in caplog.text

    def test_the_log_is_deleted_by_someone(self, worker, fake_service, caplog):
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        worker.app.backend.container.delete(worker.app.backend.chord_log(result.parent.id).name)
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == []
        assert 'is over, or has expired' in caplog.text

    def test_the_log_expires(self, make_worker, caplog, fake_service):
        worker = make_worker(result_chord_expires=24 * 3600, result_expires=3600)
        fake_service.now -= 25 * 3600
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        worker.app.backend.cleanup()
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == []
        assert 'is over, or has expired' in caplog.text

    def test_the_log_does_not_expire_if_that_is_wished(self, make_worker, fake_service):
        worker = make_worker(result_chord_expires=0, result_expires=3600)
        fake_service.now -= 100 * 24 * 3600
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        fake_service.now += 100 * 24 * 3600
        worker.app.backend.cleanup()
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    def test_a_large_result_lasts_as_long_as_the_log(self, worker, fake_service):
        _, messages = worker.start([worker.tasks.echo.s('x' * chordpart.MAX_BLOCK), *worker.echoes(2)])
        fake_service.now -= 8 * 24 * 3600
        worker.execute(messages[0])
        fake_service.now += 2 * 24 * 3600
        worker.execute(messages[1])
        fake_service.now += 6 * 24 * 3600
        worker.app.backend.cleanup()
        assert len(logs(fake_service)) == 2
        worker.execute(messages[2])
        worker.run()
        assert worker.calls == [['x' * chordpart.MAX_BLOCK, 0, 1]]

    def test_a_large_result_expires_with_its_log(self, worker, fake_service):
        _, messages = worker.start([worker.tasks.echo.s('x' * chordpart.MAX_BLOCK), *worker.echoes(2)])
        fake_service.now -= 8 * 24 * 3600
        worker.execute(messages[0])
        fake_service.now += 8 * 24 * 3600
        worker.app.backend.cleanup()
        assert logs(fake_service) == []

    def test_a_large_result_belongs_to_its_own_log_only(self, worker, fake_service):
        large = worker.tasks.echo.s('x' * chordpart.MAX_BLOCK)
        fake_service.now -= 8 * 24 * 3600
        for group_id in ('a', 'a.b', 'a.b.c'):
            _, messages = worker.start(group([large, *worker.echoes(1)], task_id=group_id))
            worker.execute(messages[0])
        fake_service.now += 8 * 24 * 3600
        worker.execute(messages[0])
        worker.app.backend.cleanup()
        assert len(logs(fake_service)) == 1 + 2
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [['x' * chordpart.MAX_BLOCK, 0]]

    def test_a_large_result_does_not_expire_with_a_log_that_lives_on(self, worker, fake_service):
        _, messages = worker.start([worker.tasks.echo.s('x' * chordpart.MAX_BLOCK), *worker.echoes(1)])
        fake_service.now -= 8 * 24 * 3600
        worker.execute(messages[0])
        fake_service.now += 8 * 24 * 3600
        fake_service.on('Blob Batch', before=lambda: worker.execute(messages[1]))
        fake_service.on('Get Blob', blob='celery-chord', answer=(503, 'ServerBusy'), times=11)
        worker.app.backend.cleanup()
        assert len(logs(fake_service)) == 2
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [['x' * chordpart.MAX_BLOCK, 0]]

    def test_the_log_lasts_longer_than_results(self, make_worker, fake_service):
        worker = make_worker(result_expires=3600)
        fake_service.now -= 6 * 24 * 3600
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        worker.app.backend.cleanup()
        fake_service.now += 6 * 24 * 3600
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]

    @pytest.mark.parametrize('operation', ['Append Block', 'Get Blob', 'Lease Blob', 'Delete Blob'])
    def test_the_service_is_busy(self, worker, fake_service, operation):
        _, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        fake_service.on(operation, blob='celery-chord-', answer=(503, 'ServerBusy'), times=10)
        worker.execute(messages[1])
        worker.run()
        assert worker.calls == [[0, 1]]
        assert logs(fake_service) == []

    @pytest.mark.parametrize('token', [1, 2, 3, 4], ids=['append', 'read', 'claim', 'renewal'])
    def test_no_token_is_to_be_had_for_some_time(self, make_worker, fake_service, token):
        credential = FailingCredential()
        worker = make_worker(result_backend=f'azureblockblob://{ACCOUNT_URL}', azureblockblob_credential=credential)
        _, [message] = worker.start(worker.echoes(1))
        credential.fail(skip=token, times=5)
        fake_service.on('Get Blob Properties', before=lambda: lapse(fake_service))  # a claim that was not released
        worker.execute(message)
        worker.run()
        assert credential.failures == 5
        assert worker.calls == [[0]]

    def test_no_thread_can_be_started(self, worker, fake_service, no_more_threads):
        _, [message] = worker.start(worker.echoes(1))
        with no_more_threads():
            worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]
        assert logs(fake_service) == []

    def test_no_thread_can_be_started_for_large_results(self, worker, fake_service, no_more_threads):
        _, messages = worker.start([worker.tasks.echo.s('x' * chordpart.MAX_BLOCK)] * 2)
        with no_more_threads():
            for message in messages:
                worker.execute(message)
        worker.run()
        assert [len(results) for results in worker.calls] == [2]
        assert logs(fake_service) == []

    def test_a_soft_time_limit_where_no_thread_can_be_started(
            self, worker, fake_service, monkeypatch, no_more_threads):
        def strike(seconds):
            monkeypatch.setattr(chordend.time, 'sleep', lambda seconds: None)
            raise SoftTimeLimitExceeded

        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Lease Blob', answer=(503, 'ServerBusy'))
        monkeypatch.setattr(chordend.time, 'sleep', strike)
        with no_more_threads():
            worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]

    def test_a_part_that_cannot_be_logged_fails_aloud(self, worker, fake_service, caplog):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Append Block', answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        with pytest.warns(RuntimeWarning, match='AuthorizationPermissionMismatch'):
            worker.execute(message)
        assert worker.receive() == []

    def test_a_chord_that_cannot_be_finished_is_given_up_aloud(self, worker, fake_service, caplog):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Lease Blob', answer=(403, 'AuthorizationPermissionMismatch'), times=100)
        worker.execute(message)
        assert worker.receive() == []
        assert 'was given up' in caplog.text


class test_time_limits:

    @pytest.mark.parametrize('action', ['acquire', 'renew'])
    def test_a_soft_one_does_not_disturb_the_end_of_a_chord(self, worker, fake_service, monkeypatch, action, caplog):
        result, [message] = worker.start(worker.echoes(1))
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
        assert worker.calls == [[0]]
        assert worker.outcome(result.parent.results[0]) == (states.SUCCESS, 0)
        assert 'past its time' in caplog.text

    def test_a_soft_one_before_the_part_is_logged_fails_the_part(self, worker, fake_service):
        def strike():
            raise SoftTimeLimitExceeded

        result, [message] = worker.start(worker.echoes(1))
        fake_service.on('Append Block', before=strike)
        with pytest.warns(RuntimeWarning, match='SoftTimeLimitExceeded'):
            worker.execute(message)
        assert 'SoftTimeLimitExceeded' in worker.failure(result)

    def test_a_soft_one_after_the_part_is_logged_does_no_harm(self, worker, fake_service):
        def strike():
            raise SoftTimeLimitExceeded

        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Append Block', after=strike)
        with pytest.warns(RuntimeWarning, match='SoftTimeLimitExceeded'):
            worker.execute(message)
        worker.run()
        assert worker.calls == [[0]]


class test_the_main_process:

    def test_reports_a_revoked_part(self, worker):
        result, messages = worker.start(worker.echoes(2))
        worker.execute(messages[0])
        revoked.add(messages[1].headers['id'])
        with worker.main_process():
            worker.execute(messages[1])
        assert 'TaskRevokedError' in worker.failure(result)

    def test_does_not_wait_for_what_it_reports(self, worker, fake_service):
        _, messages = worker.start(worker.echoes(1))
        request = worker.request(messages[0])._context
        free = threading.Event()
        reporters = []

        def hold():
            reporters.append(threading.current_thread())
            assert free.wait(DEADLINE)

        fake_service.on('Append Block', before=hold)
        with worker.main_process():
            worker.app.backend.mark_as_revoked(request.id, request=request, store_result=False)
            free.set()
        [reporter] = reporters
        assert reporter is not threading.current_thread()

    def test_does_not_wait_for_a_log_that_is_claimed(self, worker, fake_service):
        _, [message] = worker.start(worker.echoes(1))
        with killed(fake_service, 'Lease Blob', 'renew'):
            worker.execute(message)
        request = worker.request(message)._context
        with worker.main_process():
            worker.app.backend.mark_as_failure(request.id, OSError('lost'), request=request, store_result=False)
            lapse(fake_service)
        worker.run()
        assert worker.calls == [[0]]

    def test_reports_many_parts_on_few_threads(self, worker, fake_service):
        number = 5 * chords.REPORT_THREADS
        result, messages = worker.start(worker.echoes(number))
        most = []
        fake_service.on('Append Block', times=number, before=lambda: most.append(threading.active_count()))
        before = threading.active_count()
        with worker.main_process():
            for message in messages:
                request = worker.request(message)._context
                worker.app.backend.on_chord_part_return(request, states.REVOKED, TaskRevokedError())
        assert max(most) <= before + chords.REPORT_THREADS + 1
        assert 'TaskRevokedError' in worker.failure(result)

    def test_ends_though_its_reports_do_not(self, worker, fake_service, monkeypatch, caplog):
        number = 3 * chords.REPORT_THREADS
        _, messages = worker.start(worker.echoes(number))
        monkeypatch.setattr(chords, 'PATIENCE', 0.01)
        free = threading.Event()
        fake_service.on('Append Block', before=lambda: free.wait(DEADLINE), times=number)
        fake_service.requests.clear()
        with worker.main_process():
            for message in messages:
                worker.app.backend.on_chord_part_return(
                    worker.request(message)._context, states.REVOKED, TaskRevokedError())
        assert f'{number} finished parts of chords could not be reported' in caplog.text
        free.set()
        for thread in threading.enumerate():
            if thread.name.startswith(chordend.THREAD):
                thread.join(DEADLINE)
        assert fake_service.operations == ['Append Block'] * chords.REPORT_THREADS

    @pytest.mark.skipif(not hasattr(os, 'fork'), reason='This system has no fork.')
    def test_leaves_no_lock_to_the_processes_that_it_forks(self, worker):
        _, [message] = worker.start(worker.echoes(1))
        runner = worker.app.backend._chords
        held, forked = threading.Event(), threading.Event()

        def hold():
            with runner._awaited.mutex, runner._sizes.mutex, runner._lock:
                held.set()
                forked.wait(DEADLINE)

        def report():
            worker.execute(message)
            return [message.headers['task'] for message in worker.receive()]

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(DEADLINE)
        try:
            assert in_child(report) == ['collect']
        finally:
            forked.set()
            holder.join(DEADLINE)

    def test_says_when_it_cannot_report(self, worker, fake_service, caplog):
        _, [message] = worker.start(worker.echoes(1))
        fake_service.on('Append Block', answer=(403, 'AuthorizationPermissionMismatch'))
        with worker.main_process():
            worker.app.backend.on_chord_part_return(
                worker.request(message)._context, states.REVOKED, TaskRevokedError())
        assert 'could not be reported' in caplog.text

    def test_waits_where_it_runs_the_task_itself(self, worker):
        _, [message] = worker.start(worker.echoes(1))
        worker.app.loader.worker_initialized = True
        worker.execute(message)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']

    def test_is_no_process_of_a_pool(self, worker, monkeypatch):
        _, [message] = worker.start(worker.echoes(1))
        worker.app.loader.worker_initialized = True
        monkeypatch.setattr(chords, 'current_process', lambda: SimpleNamespace(name='ForkPoolWorker-1'))
        worker.app.backend.on_chord_part_return(worker.request(message)._context, states.SUCCESS, 0)
        assert [message.headers['task'] for message in worker.receive()] == ['collect']


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
            lapse(self._service)
        self._waiting_for_claim.clear()
        super()._let_one_pass()
        self._turns.update(waiting)


class test_every_order_of_requests:
    """Workers report at the same time: the body starts once, whatever the order in which their requests arrive."""

    @pytest.fixture
    def explore(self, worker, fake_service, monkeypatch):
        """Return a function that has parts reported in every order, and returns how often each body was started."""
        backend = worker.app.backend
        def reach_here(end):
            end._start_patiently()
            return end._awaited

        monkeypatch.setattr(chordend.ChordEnd, 'reach', reach_here)
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', DEADLINE)

        published = []
        body = worker.tasks.collect.s()
        monkeypatch.setattr(
            worker.tasks.collect, 'apply_async', lambda args, kwargs, **options: published.append(args[0]))

        def run(parts, choices, **faults):
            published.clear()
            group_id, size = str(uuid.uuid4()), max(parts) + 1
            backend._chords.start(group_id, [SimpleNamespace(id=str(part)) for part in range(size)], size)

            def report(part):
                chord = {**body, 'chord_id': group_id, 'chord_size': size}
                request = Context(id=str(part), group=group_id, group_index=part, chord=chord)
                backend.on_chord_part_return(request, states.SUCCESS, part)

            schedule = ChordSchedule(
                fake_service, [lambda part=part: report(part) for part in parts], choices, **faults)
            monkeypatch.setattr(chordend, 'time', SimpleNamespace(sleep=schedule.wait_for_claim))
            fake_service.on(times=float('inf'), before=schedule.before_request, after=schedule.after_request)
            schedule.run()
            fake_service.forget_plans()
            assert schedule.errors == []
            lapse(fake_service)
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
        assert len(orders) == 2  # one append is done after the other, and only the second one sees two parts
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
        assert len(orders) > 200
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_with_a_worker_killed_whose_part_is_delivered_again(self, explore):
        orders = explore(0, 1, deaths=1)
        assert len(orders) > 10
        assert all(bodies == [[0, 1]] for bodies in orders)

    def test_with_a_worker_killed_while_another_has_the_same_part(self, explore):
        orders = explore(0, 0, deaths=1)
        assert len(orders) > 800
        assert all(bodies == [[0]] for bodies in orders)
