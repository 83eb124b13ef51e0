"""What the workers of these tests run: ``celery -A t.integration.azure.app``, with the settings of a test.

The environment variable ``AZURE_TESTS_SETTINGS`` names a JSON file that holds them.
"""
from __future__ import annotations

import json
import os
from pathlib import Path

from celery import Celery, shared_task
from celery.result import allow_join_result
from t.services.service import wait_until


def build_app(settings_file: Path) -> Celery:
    """Return an app with these settings, for a test or for a worker."""
    app = Celery(__name__, set_as_current=False)
    app.conf.update(json.loads(settings_file.read_text()))
    return app


if 'AZURE_TESTS_SETTINGS' in os.environ:
    app = build_app(Path(os.environ['AZURE_TESTS_SETTINGS']))


@shared_task
def add(x, y):
    return x + y


@shared_task
def total(numbers):
    return sum(numbers)


@shared_task
def fail(message):
    raise ValueError(message)


@shared_task(ignore_result=True)
def touch(file):
    Path(file).touch()


@shared_task(bind=True, max_retries=3)
def succeed_at_attempt(self, number):
    attempt = self.request.retries + 1
    if attempt < number:
        raise self.retry(countdown=0)
    return attempt


@shared_task(bind=True)
def wait_for_file(self, file):
    self.update_state(state='PROGRESS', meta={'waits for': file})
    wait_until(Path(file).exists, file, timeout=60)
    return 'it is there'


@shared_task(bind=True)
def read_results(self, task_ids):
    with allow_join_result():
        results = [self.app.AsyncResult(task_id) for task_id in task_ids]
        return self.app.GroupResult('results', results).join_native(timeout=60)


@shared_task
def process_id():
    return os.getpid()
