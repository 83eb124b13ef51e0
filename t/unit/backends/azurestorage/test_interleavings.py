"""Who writes a task's state: every order in which the requests of several writers can reach the service."""
from __future__ import annotations

import itertools
import threading

import pytest

from celery import states
from celery.app.task import Context

from .fakehttp import cut_connection

#: How long an actor may take for a step, in seconds.
DEADLINE = 30

REDELIVERED = Context(id='id', delivery_info={'redelivered': True})


class Schedule:
    """Runs actors at the same time, and lets their requests pass one by one in an order that is chosen.

    Arguments:
        actors: Functions without arguments.
        choices: Numbers of the alternatives to take, step by step; 0 where they end. An alternative is one of the
            actors whose request waits; a second round of these loses the answer to the request.
        losses: How many answers may be lost.

    Attributes:
        taken: The choices that were made, each with the number of alternatives.
        errors: What the actors raised.
    """

    def __init__(self, actors, choices, losses=0):
        self.taken = []
        self.errors = []
        self._choices = iter(choices)
        self._losses = losses
        self._losing = set()
        self._running = len(actors)
        self._turns = {}
        self._condition = threading.Condition()
        self._threads = [threading.Thread(target=self._act, args=(actor,)) for actor in actors]

    def run(self):
        for thread in self._threads:
            thread.start()
        with self._condition:
            while self._everyone_waits_or_is_done() and self._turns:
                self._let_one_pass()
        for thread in self._threads:
            thread.join(DEADLINE)

    def before_request(self):
        """Wait until the request may pass."""
        turn = threading.Event()
        with self._condition:
            self._turns[threading.current_thread()] = turn
            self._running -= 1
            self._condition.notify_all()
        assert turn.wait(DEADLINE), 'The turn never comes.'

    def after_request(self):
        """Lose the answer, if it is to be lost."""
        if threading.current_thread() in self._losing:
            self._losing.clear()
            cut_connection()

    def _everyone_waits_or_is_done(self):
        assert self._condition.wait_for(lambda: not self._running, DEADLINE), 'An actor hangs.'
        return True

    def _let_one_pass(self):
        waiting = [thread for thread in self._threads if thread in self._turns]
        choice = next(self._choices, 0)
        self.taken.append((choice, len(waiting) * (2 if self._losses else 1)))
        lost, number = divmod(choice, len(waiting))
        if lost:
            self._losses -= 1
            self._losing.add(waiting[number])
        self._running += 1
        self._turns.pop(waiting[number]).set()

    def _act(self, actor):
        try:
            actor()
        except Exception as exc:
            self.errors.append(exc)
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()


def following(taken):
    """Return the choices that come after those that were taken, or None after the last ones."""
    while taken and taken[-1][0] + 1 == taken[-1][1]:
        taken = taken[:-1]
    return [choice for choice, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None


def test_the_orders_of_two_actors_are_counted_right():
    def two_requests():
        schedule.before_request()
        schedule.before_request()

    choices, orders = [], 0
    while choices is not None:
        schedule = Schedule([two_requests, two_requests], choices)
        schedule.run()
        choices, orders = following(schedule.taken), orders + 1
    assert orders == 6  # 4! / (2! 2!)


@pytest.fixture
def explore(make_backend, fake_service):
    """Return a function that runs actors in every order, and returns the state that each order leads to."""
    timeouts = itertools.count(1000)

    def new_process():
        # A setting of its own gives it a client of its own, so that it shares nothing with the others.
        return make_backend(azureblockblob_container_name='results', azureblockblob_read_timeout=next(timeouts))

    def run(actors, processes, choices, before, losses):
        fake_service.containers['results'].blobs.clear()
        for process in processes:
            process.container.unfinished.clear()
        if before:
            processes[0].store_result('id', 'before', before)
        schedule = Schedule(
            [lambda act=act, process=process: act(process) for act, process in zip(actors, processes, strict=True)],
            choices, losses)
        fake_service.on(times=float('inf'), before=schedule.before_request, after=schedule.after_request)
        schedule.run()
        fake_service.forget_plans()
        assert schedule.errors == []
        return schedule

    def explore(*actors, before=None, losses=0):
        reader, *processes = [new_process() for _ in range(1 + len(actors))]
        reader.set('makes the container', b'')
        outcomes, choices = [], []
        while choices is not None:
            choices = following(run(actors, processes, choices, before, losses).taken)
            outcomes.append(reader.get_state('id'))
        return outcomes

    return explore


def writing(*written, request=None):
    """Return an actor that stores states one after another."""
    def act(process):
        for state in written:
            value = f'{state} after {written}'
            process.store_result(
                'id', ValueError(value) if state in states.EXCEPTION_STATES else value, state, request=request)
    return act


def forgetting(process):
    """An actor that forgets the result."""
    process.forget('id')


class test_a_success_is_never_lost:

    @pytest.mark.parametrize('losses', [0, 1])
    @pytest.mark.parametrize('before', [None, states.STARTED])
    @pytest.mark.parametrize('state', [states.STARTED, states.RETRY, states.FAILURE, states.REVOKED, states.SUCCESS])
    def test_to_another_writer(self, explore, state, before, losses):
        outcomes = explore(writing(states.SUCCESS), writing(state), before=before, losses=losses)
        assert len(outcomes) >= 2 + 5 * losses
        assert set(outcomes) == {states.SUCCESS}

    @pytest.mark.parametrize('losses', [0, 1])
    def test_where_two_workers_run_the_task(self, explore, losses):
        outcomes = explore(writing(states.STARTED, states.SUCCESS), writing(states.STARTED, states.FAILURE),
                           losses=losses)
        assert len(outcomes) >= 14 * (1 + 5 * losses)
        assert set(outcomes) == {states.SUCCESS}

    @pytest.mark.parametrize('losses', [0, 1])
    def test_where_the_task_is_delivered_again(self, explore, losses):
        outcomes = explore(
            writing(states.STARTED, states.SUCCESS), writing(states.RETRY, request=REDELIVERED), losses=losses)
        assert len(outcomes) >= 8 * (1 + 5 * losses)
        assert set(outcomes) == {states.SUCCESS}

    def test_to_two_other_writers(self, explore):
        outcomes = explore(writing(states.SUCCESS), writing(states.FAILURE), writing(states.STARTED))
        assert len(outcomes) >= 40
        assert set(outcomes) == {states.SUCCESS}

    def test_but_by_forgetting(self, explore):
        outcomes = explore(writing(states.SUCCESS), forgetting, before=states.STARTED, losses=1)
        assert set(outcomes) == {states.SUCCESS, states.PENDING}


class test_other_outcomes:

    def test_without_a_success_one_of_the_states_is_left(self, explore):
        outcomes = explore(writing(states.FAILURE), writing(states.RETRY), losses=1)
        assert set(outcomes) == {states.FAILURE, states.RETRY}

    def test_after_forgetting_another_may_write(self, explore):
        outcomes = explore(writing(states.SUCCESS), writing(states.FAILURE), forgetting)
        assert set(outcomes) == {states.SUCCESS, states.FAILURE, states.PENDING}
