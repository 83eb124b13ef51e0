"""Chords that are counted by a log: real workers on Azurite, killed, cut off, and mixed with released ones."""
from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec

import pytest

from celery import chain, chord, group, states
from celery.backends.azurestorage.chordlog import PART, Record
from celery.exceptions import ChordError
from t.services.faults import Hold, answer, lose
from t.services.fixtures import give_up
from t.services.service import wait_until

from . import chordtasks
from .conftest import Project

#: Seconds that a chord may take, on a busy machine.
TIMEOUT = 60

#: Requests for a chord's log: their method, and what their query names.
APPEND, LEASE, SIZE = ({'method': 'PUT', 'path': 'celery-chord-', 'query': f'comp={comp}'}
                       for comp in ('appendblock', 'lease', 'metadata'))
DELETION = {'method': 'DELETE', 'path': 'celery-chord-'}
ANY = {'path': 'celery-chord-'}

#: Which of the requests for a lease is for what, when a chord goes well.
CLAIM, RENEWAL = 0, 1


class ChordProject(Project):
    """A project whose chords are counted by their log, and whose backend is behind a proxy that makes faults."""

    def __init__(self, directory, proxy, **settings):
        super().__init__(directory, **{
            'azureblockblob_native_chords': True, 'azureblockblob_retry_initial_backoff_sec': 0,
            'azureblockblob_retry_increment_base': 0, 'include': [chordtasks.__name__], **settings})
        self.proxy = proxy
        self._bodies = directory / 'bodies'
        self._errbacks = directory / 'errbacks'

    def sign(self, name, *args):
        """Return a signature of a task in `chordtasks`."""
        return self.app.tasks[f'{chordtasks.__name__}.{name}'].s(*args)

    def echoes(self, number):
        """Return signatures of simple parts, whose results are 0, 1, 2, …"""
        return [self.sign('echo', value) for value in range(number)]

    def body(self):
        """Return a body that leaves a line each time it is started, with an errback that does the same."""
        return self.sign('record', str(self._bodies)).on_error(self.sign('record_error', str(self._errbacks)))

    def start(self, header):
        """Start a chord, and return its result."""
        return chord(header, self.body()).apply_async()

    @property
    def bodies(self):
        """What the bodies were called with that were started."""
        return read_lines(self._bodies)

    @property
    def errors(self):
        """What the errbacks were called with."""
        return read_lines(self._errbacks)

    def wait_for_error(self, result):
        """Wait until a body has failed; return what its errback, which was called once, was told."""
        wait_until(lambda: result.state == states.FAILURE, 'the failure of the body', TIMEOUT)
        assert isinstance(result.result, ChordError)
        [error] = self.errors
        assert self.bodies == []
        return error

    def deliver_again(self, task_id):
        """Deliver a task's message again, as a broker does whose worker has not acknowledged it."""
        options = self.app.conf.broker_transport_options
        for file in map(os.DirEntry.path.__get__, os.scandir(options['processed_folder'])):
            with open(file) as message:
                delivered = json.load(message)
            if delivered['headers'].get('id') == task_id:
                shutil.move(file, options['data_folder_in'])

    def released_worker(self, azurite, container_name):
        """Run a worker on Celery's own module."""
        return self.worker(module=f'{__package__}.released_app', name='released', environ={
            'AZURE_TESTS_CONTAINER': container_name, 'AZURE_TESTS_CONNECTION_STRING': azurite.connection_string})


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def make_chord_project(make_project, proxied_url_for, proxy):
    """Return a function that makes the test's project with settings of Celery."""
    url = proxied_url_for('ManagedIdentityCredential')
    return partial(make_project, partial(ChordProject, proxy=proxy), result_backend=url)


@pytest.fixture
def project(make_chord_project):
    """A project with default settings."""
    return make_chord_project()


def logs(container):
    """Return the names of the blobs that chords have left."""
    return [blob.name for blob in container.list_blobs(name_starts_with='celery-chord-')]


def appends(proxy, status=201):
    """Return how many parts were logged; or how many were not, for another status."""
    return sum('comp=appendblock' in request.query and request.status == status for request in proxy.requests)


#: Headers by name, and what their body is called with.
SHAPES = {
    'a list': (lambda sign: [sign('echo', 2), sign('echo', 1)], [2, 1]),
    'a generator': (lambda sign: (sign('echo', value) for value in range(7)), [0, 1, 2, 3, 4, 5, 6]),
    'results that are ignored': (lambda sign: [sign('echo_quietly', 1), sign('echo', 2)], [1, 2]),
    'large results': (lambda sign: [sign('echo_at_length', 'x', 100_000), sign('echo', 1)], ['x' * 100_000, 1]),
    'a chord': (
        lambda sign: [sign('echo', 0), chord([sign('echo', 1), sign('echo', 2)], sign('echo'))],
        [0, [1, 2]]),
    'a chord with a group': (
        lambda sign: [sign('echo', 0), chord([sign('echo', 1)], group(sign('echo'), sign('echo')))],
        [0, [[1], [1]]]),
    'a chain that ends with a group': (
        lambda sign: [sign('echo', 0), chain(sign('echo', 1), group(sign('echo_all', [2]), sign('echo_all', [3])))],
        [0, [[1, 2], [1, 3]]]),
    'a task that is replaced': (lambda sign: [sign('replace_by_chain', 1, 2), sign('echo', 3)], [[1, 2], 3]),
}


class test_chords:

    @pytest.fixture
    def worker(self, project):
        with project.worker(concurrency=4) as worker:
            yield worker

    def test_of_each_shape(self, project, worker, container):
        results = {name: project.start(make_header(project.sign)) for name, (make_header, _) in SHAPES.items()}
        found = {name: result.get(timeout=TIMEOUT) for name, result in results.items()}
        assert found == {name: expected for name, (_, expected) in SHAPES.items()}
        assert len(project.bodies) == len(SHAPES)
        assert 'chord_unlock' not in worker.log
        wait_until(lambda: logs(container) == [], 'the end of the logs', TIMEOUT)

    def test_whose_parts_finish_at_the_same_time(self, project, worker):
        results = [project.start(project.echoes(4)) for _ in range(40)]
        assert [result.get(timeout=TIMEOUT) for result in results] == [[0, 1, 2, 3]] * 40
        assert len(project.bodies) == 40

    def test_that_fail(self, project, worker, container):
        result = project.start([project.sign('echo', 1), project.app.signature(project.task('fail').s('bad luck'))])
        assert 'bad luck' in project.wait_for_error(result)
        wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)

    def test_that_grow(self, project, worker):
        result = project.start([project.sign('add_parts', 1, 2), project.sign('echo', 0)])
        assert sorted(map(str, result.get(timeout=TIMEOUT))) == ['0', '1', '2', 'added']

    def test_whose_messages_all_come_twice(self, project, container):
        result = project.start(project.echoes(5))
        folder = project.app.conf.broker_transport_options['data_folder_in']
        for name in os.listdir(folder):
            shutil.copy(f'{folder}/{name}', f'{folder}/{int(name.partition("_")[0]) + 1}_again.celery.msg')
        with project.worker(concurrency=4) as worker:
            assert result.get(timeout=TIMEOUT) == [0, 1, 2, 3, 4]
            wait_until(lambda: worker.log.count('echo[') >= 20, 'the end of all parts', TIMEOUT)
        assert project.bodies == [[0, 1, 2, 3, 4]]
        assert logs(container) == []


class test_what_a_chord_costs:

    @pytest.mark.parametrize('number', [1, 10, 200])
    def test_besides_the_results_a_request_for_each_part_and_eight_more(self, project, container, number):
        with project.worker(concurrency=4):
            project.start(project.echoes(number))
            wait_until(lambda: project.bodies, 'the body', TIMEOUT)
            wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)
        assert project.bodies == [list(range(number))]
        assert appends(project.proxy) == number
        others = [request for request in project.proxy.requests if 'celery-task-meta-' not in request.path]
        assert len(others) <= number + 8

    def test_one_request_counts_a_block_that_is_appended_with_others_at_the_same_time(self, project):
        log = project.app.backend.chord_log('chord')
        log.create()
        with ThreadPoolExecutor(20) as threads:
            counts = list(threads.map(log.append, [
                Record(PART, ['part', number, states.SUCCESS, None], b'x' * (number % 5 * 1000)).to_bytes()
                for number in range(400)]))
        assert sorted(counts) == list(range(1, 401))
        assert appends(project.proxy) == 400


@pytest.mark.parametrize('pool', ['threads', 'solo', 'gevent'])
def test_each_pool(project, pool):
    if find_spec(pool) is None and pool == 'gevent':
        give_up('gevent is missing: run "pip install gevent".')
    with project.worker(pool, concurrency=4):
        expired = project.sign('echo', 1).set(expires=0)
        assert 'TaskRevokedError' in project.wait_for_error(project.start([project.sign('echo', 0), expired]))
        assert project.start(project.echoes(20)).get(timeout=TIMEOUT) == list(range(20))


class test_a_worker_that_is_killed:
    """With its pool, while it starts a body; then its message is delivered again, to another worker."""

    @pytest.fixture
    def kill_while(self, project):
        """Return a function that has a worker killed while it waits for an answer. It returns the chord's result."""
        def kill_while(hold, request, skip=0, bodies=0):
            project.proxy.on(hold, **request, skip=skip, times=1)
            with project.worker(name='killed') as worker:
                result = project.start(project.echoes(1))
                hold.wait()
                wait_until(lambda: len(project.bodies) == bodies, 'the first body', TIMEOUT)
                worker.kill()
            project.deliver_again(result.parent.results[0].id)
            return result
        return kill_while

    def test_before_the_claim(self, project, kill_while, container):
        result = kill_while(Hold(), LEASE, skip=CLAIM)
        with project.worker():
            assert result.get(timeout=TIMEOUT) == [0]
        assert project.bodies == [[0]]
        assert logs(container) == []

    def test_after_the_claim(self, project, kill_while, container):
        result = kill_while(Hold(answered=True), LEASE, skip=CLAIM)
        with project.worker():
            assert result.get(timeout=TIMEOUT) == [0]
        assert project.bodies == [[0]]
        assert logs(container) == []

    def test_after_publishing_where_the_body_is_started_twice(self, project, kill_while, container):
        result = kill_while(Hold(), DELETION, bodies=1)
        with project.worker():
            wait_until(lambda: len(project.bodies) == 2, 'the second body', TIMEOUT)
        assert project.bodies == [[0]] * 2
        assert result.get(timeout=TIMEOUT) == [0]
        assert logs(container) == []


class test_the_main_process:
    """It reports the parts that are not run to their end."""

    @pytest.mark.parametrize('ignore_result', [False, True])
    def test_takes_over_from_its_child_and_goes_on_working_meanwhile(self, project, tmp_path, ignore_result):
        held = Hold(answered=True)
        project.proxy.on(held, **LEASE, skip=CLAIM, times=1)
        with project.worker():
            part = project.sign('write_process_id', str(tmp_path / 'pid')).set(ignore_result=ignore_result)
            result = project.start([part])
            held.wait()
            os.kill(int((tmp_path / 'pid').read_text()), signal.SIGKILL)
            wait_until(lambda: appends(project.proxy, 412), 'the report of the main process', TIMEOUT)
            assert project.sign('echo', 2).apply_async().get(timeout=TIMEOUT) == 2
            assert project.bodies == []
            assert result.get(timeout=TIMEOUT) == ['written']
        assert project.bodies == [['written']]

    @pytest.mark.parametrize(('name', 'options', 'error'), [
        ('kill_itself', {}, 'WorkerLostError'),
        ('outlast_its_time', {'time_limit': 1}, 'TimeLimitExceeded'),
        ('outlast_its_time', {'soft_time_limit': 1}, 'SoftTimeLimitExceeded'),
        ('echo', {'expires': 0}, 'TaskRevokedError'),
    ], ids=['lost child', 'hard time limit', 'soft time limit', 'expired'])
    def test_a_part_that_is_not_run_to_its_end_fails_the_chord(self, project, container, name, options, error):
        args = [0] if name == 'echo' else []
        with project.worker():
            result = project.start([project.sign('echo', 1), project.sign(name, *args).set(**options)])
            assert error in project.wait_for_error(result)
            wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)

    def test_a_part_that_is_revoked_fails_the_chord(self, project):
        with project.worker() as worker:
            result = project.start([project.sign('echo', 0), project.sign('echo', 1).set(countdown=2)])
            revoked = result.parent.results[1].id
            wait_until(lambda: f'echo[{revoked}] received' in worker.log, 'the part', TIMEOUT)
            project.app.control.revoke(revoked)
            assert 'TaskRevokedError' in project.wait_for_error(result)

    def test_finishes_its_reports_before_it_ends(self, project):
        held = Hold()
        project.proxy.on(held, **APPEND, times=1)
        with project.worker() as worker:
            result = project.start([project.sign('echo', 0).set(expires=0)])
            held.wait()
            os.kill(worker.pid, signal.SIGTERM)
            wait_until(lambda: 'Warm shutdown' in worker.log, 'the beginning of the end', TIMEOUT)
            held.release()
            wait_until(lambda: not worker.running, 'the end', TIMEOUT)
        assert 'TaskRevokedError' in project.wait_for_error(result)


class test_a_service_that_fails:

    @pytest.fixture
    def worker(self, project):
        with project.worker() as worker:
            yield worker

    @pytest.mark.parametrize('request_', [APPEND, LEASE, DELETION], ids=['append', 'claim', 'deletion'])
    def test_that_is_busy_for_some_time(self, project, worker, container, request_):
        project.proxy.on(answer(503, 'ServerBusy'), **request_, times=10)
        result = project.start(project.echoes(2))
        assert result.get(timeout=TIMEOUT) == [0, 1]
        wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)
        assert project.bodies == [[0, 1]]

    def test_that_throttles_all_parts_for_half_a_minute(self, project, worker, container):
        project.proxy.on(answer(503, 'ServerBusy'), **APPEND)
        result = project.start(project.echoes(2))
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() > begun + 30, 'half a minute', TIMEOUT)
        assert appends(project.proxy, 503) > 2
        assert project.bodies == []
        project.proxy.clear()
        assert result.get(timeout=TIMEOUT) == [0, 1]
        wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)
        assert project.bodies == [[0, 1]]

    def test_that_is_away_for_half_a_minute_once_the_body_is_out_while_someone_waits(self, project, container):
        held = Hold()
        project.proxy.on(held, **LEASE, skip=RENEWAL, times=1)
        with project.worker(concurrency=3):  # one to end the chord, one to wait, one for the body
            result = project.start(project.echoes(1))
            held.wait()
            project.deliver_again(result.parent.results[0].id)
            wait_until(lambda: appends(project.proxy, 412), 'the second delivery', TIMEOUT)
            project.proxy.on(answer(503, 'ServerBusy'), **ANY)
            held.release()
            begun = time.monotonic()
            assert result.get(timeout=TIMEOUT) == [0]
            wait_until(lambda: time.monotonic() > begun + 30, 'half a minute', TIMEOUT)
            assert len(logs(container)) == 1
            project.proxy.clear()
            wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)
            assert project.sign('echo', 2).apply_async().get(timeout=TIMEOUT) == 2
        assert project.bodies == [[0]]

    @pytest.mark.parametrize('request_', [APPEND, LEASE, DELETION], ids=['append', 'claim', 'deletion'])
    def test_whose_answer_is_lost(self, project, worker, container, request_):
        project.proxy.on(lose(), **request_, times=1)
        result = project.start(project.echoes(2))
        assert result.get(timeout=TIMEOUT) == [0, 1]
        wait_until(lambda: logs(container) == [], 'the end of the log', TIMEOUT)
        assert project.bodies == [[0, 1]]

    def test_that_takes_its_time_beyond_a_soft_time_limit(self, project, worker):
        held = Hold()
        project.proxy.on(held, **LEASE, skip=RENEWAL, times=1)
        result = project.start([project.sign('echo', 0).set(soft_time_limit=1)])
        held.wait()
        wait_until(lambda: 'past its time' in worker.log, 'the time limit', TIMEOUT)
        held.release()
        assert result.get(timeout=TIMEOUT) == [0]
        assert result.parent.results[0].state == states.SUCCESS
        assert project.bodies == [[0]]

    def test_that_takes_its_time_to_learn_the_size_of_a_generator(self, project, worker):
        held = Hold()
        project.proxy.on(held, **SIZE, times=1)
        started = []
        starter = threading.Thread(target=lambda: started.append(
            project.start(project.sign('echo', value) for value in range(5))))
        starter.start()
        held.wait()
        wait_until(lambda: appends(project.proxy) == 4, 'all parts but the last', TIMEOUT)
        held.release()
        starter.join()
        assert started[0].get(timeout=TIMEOUT) == [0, 1, 2, 3, 4]
        assert project.bodies == [[0, 1, 2, 3, 4]]

    def test_that_has_lost_the_log(self, project, container):
        result = project.start(project.echoes(1))
        [log] = logs(container)
        container.delete_blob(log)
        with project.worker() as worker:
            wait_until(lambda: 'came too late' in worker.log, 'the warning', TIMEOUT)
        assert result.state == states.PENDING
        assert project.bodies == []


class test_workers_of_both_kinds:

    def test_polled_chords_leave_no_log(self, make_chord_project, container):
        project = make_chord_project(azureblockblob_native_chords=False)
        with project.worker() as worker:
            assert project.start(project.echoes(3)).get(timeout=TIMEOUT) == [0, 1, 2]
            assert 'chord_unlock' in worker.log
        assert appends(project.proxy) == 0

    @pytest.mark.parametrize('counted', [False, True], ids=['polled', 'counted'])
    def test_a_worker_that_is_set_otherwise_does_as_the_message_says(self, make_chord_project, counted):
        project = make_chord_project(azureblockblob_native_chords=not counted)  # so is the worker
        with project.worker():
            project.app.conf.azureblockblob_native_chords = counted
            assert project.start(project.echoes(3)).get(timeout=TIMEOUT) == [0, 1, 2]
        assert appends(project.proxy) == (3 if counted else 0)

    def test_the_parts_of_a_polled_chord_may_run_on_released_celery(
            self, make_chord_project, azurite, container_name):
        project = make_chord_project(azureblockblob_native_chords=False)
        with project.worker(), project.released_worker(azurite, container_name) as released:
            result = project.start(project.echoes(20))
            assert result.get(timeout=TIMEOUT) == list(range(20))
            assert 'echo[' in released.log
        assert project.bodies == [list(range(20))]

    def test_a_counted_chord_ends_though_a_polled_one_in_it_fails(self, make_chord_project):
        project = make_chord_project(azureblockblob_native_chords=False)
        fail = project.app.signature(project.task('fail').si('bad luck'))
        inner = chain(project.sign('echo', 1), group(fail, project.sign('echo')), project.sign('echo'))
        with project.worker() as worker:
            project.app.conf.azureblockblob_native_chords = True
            assert 'Dependency' in project.wait_for_error(project.start([project.sign('echo', 0), inner]))
            assert 'chord_unlock' in worker.log

    def test_a_counted_chord_waits_for_ever_for_a_part_that_runs_on_released_celery(
            self, project, azurite, container_name, container):
        result = project.start(project.echoes(2))
        with project.released_worker(azurite, container_name) as released:
            wait_until(lambda: released.log.count('succeeded') == 2, 'both parts', TIMEOUT)
        assert [part.get(timeout=TIMEOUT) for part in result.parent.results] == [0, 1]
        assert appends(project.proxy) == 0
        assert len(logs(container)) == 1
        assert result.state == states.PENDING
