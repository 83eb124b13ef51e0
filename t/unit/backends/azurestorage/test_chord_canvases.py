"""Random canvases: chords that are counted by logs end as polled ones do, also if parts are run twice."""
from __future__ import annotations

import itertools
import json
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

pytest.importorskip('azure.storage.blob')

from celery import chain, chord, group, states, version_info
from celery.result import GroupResult

from .chordworker import MANY, logs

pytestmark = [pytest.mark.usefixtures('no_chord_pauses'), pytest.mark.parametrize('seed', range(20))]


class Canvases:
    """Makes random canvases. From the same seed they are the same, whatever the app.

    Arguments:
        tasks: The app's tasks.
        seed: The seed.
        failures: Which share of the tasks fails.
    """

    def __init__(self, tasks, seed, failures):
        self._tasks = tasks
        self._random = Random(seed)
        self._failures = failures
        self._labels = (f'task {number}' for number in itertools.count())

    def chord(self, depth=0):
        if self._random.random() < 0.7:
            return chord(self._several(self._any, depth), self._any(depth + 1))
        # No group is among these: its parts would come in any order, as they do with Redis.
        parts = self._several(self._task_or_chord, depth)
        return chord((part for part in parts), self._any(depth + 1))

    def _any(self, depth):
        kinds = [self.chord, self._chain, self._group, self._replaced] if depth < 4 else []
        return self._random.choice([self._task] * (depth + 1) + kinds)(depth)

    def _several(self, make, depth):
        return [make(depth + 1) for _ in range(self._random.randint(1, 3))]

    def _task(self, depth):
        task = self._tasks.failing if self._random.random() < self._failures else self._tasks.step
        signature = task.s(label=next(self._labels)).set(immutable=self._random.random() < 0.1)
        if self._random.random() < 0.2:
            signature.link_error(self._tasks.alarming.s(label=next(self._labels)))
        return signature

    def _task_or_chord(self, depth):
        part = self._task(depth)
        return part if self._random.random() < 0.5 else chord([part], chain(*self._several(self._task, depth)))

    def _chain(self, depth):
        return chain(self._task(depth), *self._several(self._any, depth))

    def _group(self, depth):
        one = self._any(depth + 1)
        return group(self._random.choice([[], [one], [one, one], [one, self._any(depth + 1)]]))

    def _replaced(self, depth):
        return self._tasks.replace.si(self._any(depth + 1))


class Run:
    """What becomes of a random canvas.

    Arguments:
        worker: The worker that runs it.
        seed: What the canvas is made from, and the order in which its messages are run.
        failures: Which share of the tasks fails.
        twice: Which share of the parts that are simple tasks is run twice.
    """

    def __init__(self, worker, seed, failures=0, twice=0):
        self.calls = Counter()
        self.repeated = 0
        self._worker, self._random, self._twice = worker, Random(seed), twice
        self._waiting = []
        with worker.current():
            result = Canvases(_tasks(worker, self.calls), seed, failures).chord().apply_async()
        self._execute_all()
        self.outcome = list(self._outcomes(result))

    def _execute_all(self):
        """Run messages in random order; ask for parts when nothing else is left, until that leads nowhere."""
        polls = self._receive()
        while self._waiting or polls:
            if self._waiting:
                self._execute(self._waiting.pop(self._random.randrange(len(self._waiting))))
                polls += self._receive()
            else:
                for poll in polls:
                    self._worker.execute(poll)
                asked, polls = polls, self._receive()
                if not self._waiting and len(polls) == len(asked):
                    return

    def _receive(self):
        """Take new messages; return those that ask for the parts of polled chords."""
        polls = []
        for message in self._worker.receive():
            (polls if message.headers['task'] == 'celery.chord_unlock' else self._waiting).append(message)
        assert len(self._worker.names) < MANY
        return polls

    def _execute(self, message):
        self._worker.execute(message)
        then = message.payload[2]
        is_part = message.headers['task'] == 'step' and then['chord'] and not then['chain']
        if is_part and self._random.random() < self._twice:
            self.repeated += 1
            self._worker.execute(message)

    def _outcomes(self, result):
        if isinstance(result, GroupResult):
            for each in result.results:
                yield from self._outcomes(each)
        else:
            state, value = self._worker.outcome(result)
            yield state, json.dumps(value) if state == states.SUCCESS else ''


def _tasks(worker, calls):
    @worker.app.task(name='step', shared=False)
    def step(*args, label):
        calls[label, json.dumps(args)] += 1
        return [label, *args]

    @worker.app.task(name='failing', shared=False)
    def failing(*args, label):
        calls[label, json.dumps(args)] += 1
        raise ValueError(label)

    @worker.app.task(name='alarming', shared=False)
    def alarming(request, exc, traceback, label):
        calls[label] += 1

    return SimpleNamespace(step=step, failing=failing, alarming=alarming, replace=worker.tasks.replace)


class test_a_random_canvas:

    @pytest.mark.parametrize('failures', [0, 0.15])
    def test_ends_as_a_polled_one(self, worker, make_worker, fake_service, seed, failures):
        if version_info < (5, 6):
            pytest.skip('There Celery numbers all parts alike of a chord that takes the place of a task.')
        run = Run(worker, seed, failures)
        polled = Run(make_worker(azureblockblob_native_chords=False), seed, failures)
        if states.PENDING not in dict(polled.outcome):  # Celery itself forgets some canvases
            assert (run.outcome, run.calls) == (polled.outcome, polled.calls)
            assert logs(fake_service) == []

    def test_starts_no_body_twice_though_parts_are_run_twice(self, worker, make_worker, fake_service, seed):
        once, run = Run(make_worker(), seed), Run(worker, seed, twice=0.3)
        assert (run.outcome, set(run.calls)) == (once.outcome, set(once.calls))
        assert run.calls.total() == once.calls.total() + run.repeated
        assert logs(fake_service) == [] or states.PENDING in dict(once.outcome)
