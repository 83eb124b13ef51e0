"""The command ``celery azureblockblob``, on Azurite."""
from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from celery_azureblockblob_command import azureblockblob
from click.testing import CliRunner

from celery import Celery, states
from t.services.service import free_port, wait_until


@pytest.fixture
def run():
    """Return a function that runs the command for an app and returns its exit status and its output."""
    def run(app, *arguments):
        result = CliRunner().invoke(azureblockblob, arguments, obj=SimpleNamespace(app=app))
        return result.exit_code, result.output
    return run


@pytest.fixture
def backend(connect):
    """A backend with three results, all older than a second."""
    backend = connect()
    for number in range(3):
        backend.store_result(f'task-{number}', number, states.SUCCESS)
    since = time.time()
    wait_until(lambda: time.time() > since + 2, 'the results to grow old', 30)
    return backend


def test_cleanup_deletes_what_is_older(run, backend):
    status, output = run(SimpleNamespace(backend=backend), 'cleanup', '--older-than', '1s')
    assert (status, '3 blobs, 3 expired' in output, '3 deleted, 0 kept' in output) == (0, True, True)
    assert backend.get_state('task-0') == states.PENDING


def test_a_dry_run_deletes_nothing(run, backend):
    status, output = run(SimpleNamespace(backend=backend), 'cleanup', '--older-than', '1s', '--dry-run')
    assert (status, '3 blobs, 3 expired' in output, 'deleted' in output) == (0, True, False)
    assert backend.get_state('task-0') == states.SUCCESS


@pytest.mark.parametrize('age', ['1h', '30d', '999999999d'])
def test_cleanup_keeps_what_is_not(run, backend, age):
    assert run(SimpleNamespace(backend=backend), 'cleanup', '--older-than', age)[0] == 0
    assert backend.get_state('task-0') == states.SUCCESS


@pytest.mark.parametrize('age', ['0', '-1', 'soon', '5 weeks', ''])
def test_a_wrong_age_is_refused(run, age):
    status, output = run(SimpleNamespace(backend=None), 'cleanup', '--older-than', age)
    assert (status, '90s, 15m, 12h or 30d' in output) == (2, True)


def test_results_that_do_not_expire_need_an_age(run, connect):
    status, output = run(SimpleNamespace(backend=connect(settings={'result_expires': None})), 'cleanup')
    assert (status, 'say --older-than' in output) == (2, True)


def test_another_backend_is_refused(run):
    status, output = run(Celery(set_as_current=False, backend='cache+memory://'), 'cleanup')
    assert (status, 'CacheBackend, not azureblockblob' in output) == (2, True)


def test_a_server_that_is_gone_is_told_in_a_sentence(run):
    app = Celery(set_as_current=False, backend=(
        f'azureblockblob://myaccount:bm90IGEga2V5@http://127.0.0.1:{free_port()}/myaccount?retry_max_attempts=0'))
    status, output = run(app, 'cleanup')
    assert (status, output.startswith('Error: Cannot connect to http://127.0.0.1')) == (1, True)


@pytest.mark.parametrize(('url', 'told'), [
    ('azureblockblob://DefaultAzureCredntial@https://myaccount.blob.core.windows.net', 'did you mean'),
    ('azureblockblob://WorkloadIdentityCredential@https://myaccount.blob.core.windows.net', 'AZURE_TENANT_ID'),
])
def test_a_mistake_in_the_configuration_is_told_without_a_traceback(run, url, told):
    status, output = run(Celery(set_as_current=False, backend=url), 'cleanup')
    assert (status, output.startswith('Error: '), told in output) == (1, True, True)


def test_celery_lists_it():
    celery = [sys.executable, '-m', 'celery', 'azureblockblob', 'cleanup', '--help']
    assert '--older-than' in subprocess.run(celery, capture_output=True, text=True, check=True, timeout=60).stdout
