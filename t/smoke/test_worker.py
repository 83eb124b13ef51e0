"""A worker with a managed identity, driven by pytest-celery."""
from __future__ import annotations

from pytest_celery import RESULT_TIMEOUT

from celery import chord, group
from t.integration.azure.app import add, total


def test_a_setup_is_ready(celery_setup):
    assert celery_setup.ready(ping=True, docker=True)


def test_results_outlive_the_worker_and_the_service(celery_setup):
    before = group(add.s(number, number) for number in range(5)).apply_async()
    assert before.get(timeout=RESULT_TIMEOUT) == [0, 2, 4, 6, 8]
    celery_setup.worker.kill()
    celery_setup.backend.restart()
    waiting = chord([add.s(number, number) for number in range(5)])(total.s())
    celery_setup.worker.restart()
    celery_setup.worker.assert_log_exists('ready.')
    assert waiting.get(timeout=RESULT_TIMEOUT) == 20
    assert before.get(timeout=RESULT_TIMEOUT) == [0, 2, 4, 6, 8]
