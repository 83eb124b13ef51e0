"""``python -m upstream integration RELEASE``: Celery's integration tests with this backend and with Redis."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from t.services.azurite import Azurite
from t.services.process import Process
from t.services.redis import Redis
from t.services.service import HOST, ServiceUnavailable, wait_until
from upstream import source
from upstream.suite import PYTHON, Outcomes, outcomes

FILES = [f't/integration/test_{name}.py' for name in (
    'canvas', 'tasks', 'group_chains', 'backend', 'inspect', 'worker', 'serialization')]

#: Tests that look into Redis itself: at the keys of a chord, and at the channels that tell of results.
REDIS_ONLY = frozenset({
    't/integration/test_canvas.py::test_chord::test_chord_on_error',
    't/integration/test_tasks.py::test_task_redis_result_backend::test_asyncresult_forget_cancels_subscription',
    't/integration/test_tasks.py::test_task_redis_result_backend::test_asyncresult_get_cancels_subscription',
})

#: What Celery's suite reads in its root, beside the URLs.
SETTINGS = {'azureblockblob_native_chords': True}

#: Seconds for the whole suite with one backend.
SUITE_TIMEOUT = 7200


def compare(release: str) -> int:
    """Run Celery's integration tests with either backend, and compare what passes.

    Arguments:
        release: The version of Celery, which must be the one that is installed.

    Returns:
        The exit status: 0 if all that passes with Redis passes with this backend, but for `REDIS_ONLY`.
    """
    _check_installed(release)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = (_run(release, name, Path(folder, name)) for name in ('azureblockblob', 'redis'))
    except ServiceUnavailable as problem:
        raise LookupError(str(problem)) from None
    return report(release, ours, theirs)


def report(release: str, ours: Outcomes, theirs: Outcomes) -> int:
    """Print how the two runs compare.

    Arguments:
        release: The version of Celery.
        ours: The outcomes with this backend.
        theirs: The outcomes with Redis.

    Returns:
        The exit status.
    """
    counts = [Counter(result.values()) for result in (ours, theirs)]
    print(f'Celery {release}, Python {PYTHON}: azureblockblob | redis')
    for word in 'passed', 'failed', 'skipped':
        print(f'{counts[0][word]:>5} | {counts[1][word]:<5} {word}')
    for test in sorted(ours.keys() | theirs.keys()):
        if ours.get(test) != theirs.get(test):
            reason = ' (looks into Redis)' if test in REDIS_ONLY else ''
            print(f'{ours.get(test, "missing"):>7} | {theirs.get(test, "missing"):<7} {test}{reason}')
    worse = complaints(ours, theirs)
    print('\n'.join(worse) or 'All that passes with Redis passes with azureblockblob, but for what looks into it.')
    return 1 if worse else 0


def complaints(ours: Outcomes, theirs: Outcomes) -> list[str]:
    """Return a line for each test that should pass with this backend and does not, or should not and does."""
    worse = sorted(test for test, outcome in theirs.items()
                   if outcome == 'passed' != ours.get(test) and test not in REDIS_ONLY)
    stale = sorted(test for test in REDIS_ONLY if ours.get(test) == 'passed' or test not in theirs)
    return ([f'passes with Redis alone: {test}' for test in worse]
            + [f'needs no exception any more: {test}' for test in stale])


def _run(release: str, name: str, folder: Path) -> Outcomes:
    """Run the tests with one backend, on services of its own; keep their log and report in the build folder."""
    folder.mkdir()
    tree = source.unpack(release, folder)
    shutil.rmtree(tree / 'celery')  # the installed one is meant
    (tree / 'integration-tests-config.json').write_text(json.dumps(SETTINGS), encoding='utf-8')
    source.BUILD.mkdir(exist_ok=True)
    xml = source.BUILD / f'integration-{name}-{release}-py{PYTHON}.xml'
    xml.unlink(missing_ok=True)
    with _services(name, folder) as environ, _Suite(tree, xml, environ) as suite:
        print(f"Running Celery's integration tests with {name}; follow them in {os.path.relpath(suite.log_file)} …",
              flush=True)
        wait_until(lambda: not suite.running, f'the tests with {name}', SUITE_TIMEOUT)
    if not xml.exists():
        raise subprocess.SubprocessError(f'The tests did not run to their end: see {suite.log_file}')
    return outcomes(xml)


class _Suite(Process):
    """The tests in `tree`, which write what became of them to `xml`, and a log beside it."""

    def __init__(self, tree: Path, xml: Path, environ: Mapping[str, str]) -> None:
        super().__init__(xml.with_suffix('.log'), environ, cwd=tree)
        self._xml = xml

    def command(self) -> list[str]:
        return [
            sys.executable, '-m', 'pytest', *FILES, '-v', '-p', 'no:cacheprovider',
            # Celery's own fixtures, without those of pytest-celery, which need Docker.
            '-p', 'no:celery', '-p', 'celery.contrib.pytest',
            # No reruns: a test that only passes at times shows.
            '-p', 'no:rerunfailures', '-p', 'upstream.pytest_upstream',
            '-o', 'junit_family=xunit1', f'--junitxml={self._xml}']

    def is_ready(self) -> bool:
        return True


@contextmanager
def _services(name: str, folder: Path) -> Iterator[Mapping[str, str]]:
    """Start what the tests with one backend need, and yield their environment."""
    with Redis(folder) as redis:
        environ = redis.environ | {
            'PYTHONPATH': str(source.ROOT / 'extra'), 'PYTEST_ADDOPTS': '',
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
            'TEST_BROKER': redis.url, 'TEST_BACKEND': redis.url,
            'REDIS_HOST': HOST, 'REDIS_PORT': str(redis.port), 'WORKER_LOGLEVEL': 'INFO'}
        if name == 'redis':
            yield environ
            return
        with Azurite(folder, tls=False, in_memory=True) as azurite:
            url = f'azureblockblob://{azurite.connection_string}'
            yield environ | azurite.environ | {'TEST_BACKEND': url, 'AZUREBLOCKBLOB_URL': url}


def _check_installed(release: str) -> None:
    """Make sure that the tests will see the released Celery, and in it the backend of this tree."""
    if version('celery') != release:
        raise LookupError(f'Celery {version("celery")} is installed, not {release}.')
    code = 'import celery.app.backends as b, inspect; print(inspect.getfile(b.by_name("azureblockblob")))'
    seen = subprocess.run(
        [sys.executable, '-c', code], cwd=tempfile.gettempdir(), check=True, capture_output=True, encoding='utf-8')
    if not Path(seen.stdout.strip()).is_relative_to(source.ROOT):
        raise LookupError(f'The tests would use {seen.stdout.strip()}: install the plugin with `pip install -e .`')
