"""Writers that race for the state of a task, as they please, on Azurite behind a slow network."""
from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery import Celery, states
from t.services.faults import FaultProxy

RACES = 300

#: Round trip of the network, in seconds.
LATENCY = 0.004


@pytest.fixture
def slow_network(azurite):
    """Azurite behind it."""
    with FaultProxy(azurite.account_url, azurite.certificates, latency=LATENCY) as proxy:
        yield proxy


@pytest.mark.parametrize('rival', [states.FAILURE, states.RETRY, states.STARTED])
def test_no_success_is_lost_to_a_rival(azurite, slow_network, url_for, clean_environment, rival):
    url = url_for().replace(azurite.account_url, slow_network.account_url)
    backend = Celery('test', set_as_current=False, backend=url).backend
    start = threading.Barrier(2)

    def store(task_id, state):
        start.wait(60)
        backend.store_result(task_id, {'pid': 1} if state == states.STARTED else None, state)

    with ThreadPoolExecutor(2) as writers:
        for number in range(RACES // 3):
            both = [writers.submit(store, f'task-{number}', state) for state in (states.SUCCESS, rival)]
            for writer in both:
                writer.result(60)
    found = {backend.get_task_meta(f'task-{number}', cache=False)['status'] for number in range(RACES // 3)}
    assert found == {states.SUCCESS}
