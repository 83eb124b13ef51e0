"""Workers in processes of their own, with a managed identity, on Azurite."""
from __future__ import annotations

import os
import re
import signal
from importlib.util import find_spec

import pytest

from celery import chord, group, states
from celery.exceptions import ChordError
from t.services.fixtures import give_up
from t.services.service import wait_until

#: Seconds that a task may take, on a busy machine.
TIMEOUT = 60

#: By pool, how many tasks a worker runs at once.
CONCURRENCY = {'prefork': 2, 'threads': 16, 'gevent': 50, 'eventlet': 50}

#: How many tasks it gets.
TASKS = 500

#: How a worker tells of a task that it runs.
ABOUT_A_TASK = re.compile(r' Task \S+\[\S+] (received|succeeded)')


@pytest.fixture(params=CONCURRENCY)
def pool(request):
    """Each pool that is installed."""
    if request.param in ('gevent', 'eventlet') and find_spec(request.param) is None:
        give_up(f'{request.param} is missing: run "pip install {request.param}".')
    return request.param


def blob_names(container):
    return sorted(blob.name for blob in container.list_blobs())


class test_what_a_task_leaves:

    @pytest.fixture(autouse=True)
    def worker(self, project):
        with project.worker() as worker:
            yield worker

    def test_a_value(self, project, container):
        result = project.task('add').delay(1, 2)
        assert result.get(timeout=TIMEOUT) == 3
        assert result.state == states.SUCCESS
        assert blob_names(container) == [f'celery-task-meta-{result.id}']

    def test_an_error(self, project):
        result = project.task('fail').delay('bad luck')
        with pytest.raises(ValueError, match='bad luck'):
            result.get(timeout=TIMEOUT)
        assert result.state == states.FAILURE
        assert 'in fail' in result.traceback

    def test_a_group(self, project, container):
        result = group(project.task('add').s(number, number) for number in range(5)).apply_async()
        assert result.get(timeout=TIMEOUT) == [0, 2, 4, 6, 8]
        result.save()
        assert project.app.GroupResult.restore(result.id).get(timeout=TIMEOUT) == [0, 2, 4, 6, 8]
        assert f'celery-taskset-meta-{result.id}' in blob_names(container)

    def test_a_polled_chord(self, project):
        add = project.task('add')
        header = [add.s(number, number) for number in range(5)]
        assert chord(header)(project.task('total').s()).get(timeout=TIMEOUT) == 20

    def test_a_polled_chord_whose_part_fails(self, project):
        header = [project.task('add').s(1, 1), project.task('fail').s('bad luck')]
        body = chord(header)(project.task('total').s())
        with pytest.raises(ChordError, match='bad luck'):
            project.app.AsyncResult(body.id).get(timeout=TIMEOUT)

    def test_a_task_that_is_retried(self, project):
        assert project.task('succeed_at_attempt').delay(3).get(timeout=TIMEOUT) == 3

    def test_a_task_that_tells_how_far_it_is(self, project, tmp_path):
        file = tmp_path / 'file'
        result = project.task('wait_for_file').delay(str(file))
        wait_until(lambda: result.state == 'PROGRESS', 'progress', TIMEOUT)
        assert result.info == {'waits for': str(file)}
        file.touch()
        assert result.get(timeout=TIMEOUT) == 'it is there'

    def test_an_ignored_result(self, project, container, tmp_path):
        file = tmp_path / 'file'
        ignored = project.task('touch').delay(str(file))
        wait_until(file.exists, 'the task', TIMEOUT)
        after = project.task('add').delay(1, 2)
        assert after.get(timeout=TIMEOUT) == 3
        assert ignored.state == states.PENDING
        assert blob_names(container) == [f'celery-task-meta-{after.id}']

    def test_a_result_that_is_forgotten(self, project, container):
        result = project.task('add').delay(1, 2)
        result.get(timeout=TIMEOUT)
        result.forget()
        assert result.state == states.PENDING
        assert blob_names(container) == []


class test_each_pool:

    def test_many_results_from_start_to_end(self, project, identity, pool):
        with project.worker(pool, CONCURRENCY[pool], loglevel='INFO') as worker:
            results = [project.task('add').delay(number, number) for number in range(TASKS)]
            read = project.task('read_results').delay([result.id for result in results])
            assert read.get(timeout=4 * TIMEOUT) == [2 * number for number in range(TASKS)]
            os.kill(worker.pid, signal.SIGTERM)
            wait_until(lambda: not worker.running, 'the end that the worker was asked for', TIMEOUT)
            log = worker.log
        # A token for each process, and no line for each request.
        processes = CONCURRENCY[pool] if pool == 'prefork' else 1
        assert len(identity.requests) <= processes + 1  # one of them is this process
        others = [line for line in log.partition(' ready.\n')[2].splitlines() if not ABOUT_A_TASK.search(line)]
        assert len(others) <= 20, '\n'.join(others[:30])


class test_processes_that_come_and_go:

    def test_children_that_are_replaced_after_10_tasks(self, make_project, identity):
        project = make_project(worker_max_tasks_per_child=10)
        with project.worker():
            results = [project.task('process_id').delay() for _ in range(60)]
            children = {result.get(timeout=TIMEOUT) for result in results}
        assert len(children) >= 6
        assert len(identity.requests) == len(children) + 1  # a token for each process, this one included

    def test_a_worker_that_is_killed_and_started_again(self, project):
        with project.worker() as worker:
            before = project.task('add').delay(1, 2)
            before.get(timeout=TIMEOUT)
            worker.kill()
            worker.start()
            assert project.task('add').delay(3, 4).get(timeout=TIMEOUT) == 7
            assert project.app.AsyncResult(before.id).get(timeout=TIMEOUT) == 3
