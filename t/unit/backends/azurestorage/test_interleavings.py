"""Who writes a task's state: every order in which the requests of several writers can reach the service."""
from __future__ import annotations

import itertools

import pytest

from celery import states
from celery.app.task import Context

from .schedules import Schedule, following

REDELIVERED = Context(id='id', delivery_info={'redelivered': True})


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
