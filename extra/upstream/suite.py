"""``python -m upstream test RELEASE``: Celery's unit tests without and with the patch."""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from xml.etree import ElementTree

from upstream import diff, source

REPLACED = Path(__file__).with_name('replaced.txt')
AZURE_LIBRARIES = source.ROOT / 'requirements' / 'extras' / 'azureblockblob.txt'

#: Seconds for an installation, and for Celery's unit tests, which take 4 minutes on two cores.
INSTALL_TIMEOUT, SUITE_TIMEOUT = 1200, 2400

PYTHON = f'{sys.version_info.major}.{sys.version_info.minor}'

#: What became of each test: its name as pytest writes it, and ``passed``, ``failed`` or ``skipped``.
Outcomes = Mapping[str, str]


@dataclass
class Comparison:
    """What the patch changes for the worse. Each field holds names of tests."""

    newly_failing: list[str]
    gone: list[str]
    newly_skipped: list[str]
    listed_but_there: list[str]

    def complaints(self) -> list[str]:
        """Return a line for each."""
        return [f'{field.name.replace("_", " ")}: {test}'
                for field in fields(self) for test in getattr(self, field.name)]


def compare(release: str) -> int:
    """Run Celery's unit tests without and with the patch, and compare what passes.

    What the tests of the unpatched source give is kept for the next time, by release and Python version.

    Arguments:
        release: The version of Celery.

    Returns:
        The exit status: 0 if the patch makes nothing worse.
    """
    diff.write(release)
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(release, Path(folder))
        pristine = source.CACHE / f'unpatched-{release}-py{PYTHON}.xml'
        if not pristine.exists():
            _run(python, source.unpack(release, Path(folder, 'unpatched')), pristine)
        patched = source.BUILD / f'patched-{release}-py{PYTHON}.xml'
        tree = source.unpack(release, Path(folder, 'patched'))
        diff.apply(diff.path(release), tree)
        _run(python, tree, patched)
    return report(release, outcomes(pristine), outcomes(patched), replaced())


def report(release: str, pristine: Outcomes, patched: Outcomes, expected: Iterable[str]) -> int:
    """Print how the two runs compare.

    Arguments:
        release: The version of Celery.
        pristine: The outcomes without the patch.
        patched: The outcomes with it.
        expected: The tests that the patch replaces.

    Returns:
        The exit status.
    """
    for title, result in ('without', pristine), ('with', patched):
        counts = Counter(result.values())
        print(f'Celery {release}, Python {PYTHON}, {title} the patch: '
              + ', '.join(f'{counts[word]} {word}' for word in ('passed', 'failed', 'skipped')))
    complaints = judge(pristine, patched, expected).complaints()
    print('\n'.join(complaints)
          or f'Nothing fails that passed before, and {REPLACED.name} lists every test that is gone.')
    return 1 if complaints else 0


def judge(pristine: Outcomes, patched: Outcomes, expected: Iterable[str]) -> Comparison:
    """Compare two runs.

    Arguments:
        pristine: The outcomes without the patch.
        patched: The outcomes with it.
        expected: The tests that the patch replaces. One name stands for all parameters of the test.
    """
    gone = {_function(test) for test in pristine if test not in patched}
    there = {_function(test) for test in patched}
    expected = set(expected)
    return Comparison(
        newly_failing=sorted(
            test for test, outcome in patched.items() if outcome == 'failed' != pristine.get(test)),
        gone=sorted(gone - expected),
        newly_skipped=sorted(
            test for test, outcome in patched.items() if outcome == 'skipped' and pristine.get(test) == 'passed'),
        listed_but_there=sorted(expected & there))


def replaced() -> list[str]:
    """Return the tests that the patch replaces.

    Raises:
        LookupError: if ``replaced.txt``, indented by four spaces at each step from file to reason to test, is not.
    """
    file = reason = None
    tests = []
    for line in REPLACED.read_text(encoding='utf-8').splitlines():
        text = line.lstrip(' ')
        depth = len(line) - len(text)
        if not text or text.startswith('#'):
            continue
        if depth == 0:
            file, reason = text, None
        elif depth == 4 and file:
            reason = text
        elif depth == 8 and reason:
            tests.append(f'{file}::{text}')
        else:
            raise LookupError(f'{REPLACED.name}: file and reason must stand above {text}')
    return tests


def outcomes(xml: Path) -> Outcomes:
    """Read what pytest wrote with ``--junitxml``, in the family ``xunit1``."""
    result = {}
    for case in ElementTree.parse(xml).iter('testcase'):
        tags = {child.tag for child in case}
        failed, skipped = tags & {'failure', 'error'}, 'skipped' in tags
        result[_name(case)] = 'failed' if failed else 'skipped' if skipped else 'passed'
    if not result:
        raise LookupError(f'{xml} holds no test.')
    return result


def _name(case: ElementTree.Element) -> str:
    file = case.get('file', '')
    classes = case.get('classname', '').removeprefix(file.removesuffix('.py').replace('/', '.')).lstrip('.')
    return '::'.join(part for part in (file, *classes.split('.'), case.get('name', '')) if part)


def _function(test: str) -> str:
    return test.partition('[')[0]


def _environment(release: str, folder: Path) -> Path:
    """Make a virtual environment for Celery's tests, the first time, and return its interpreter.

    The released Celery is in it for its libraries alone: the tests see the source tree first.
    """
    home = source.CACHE / f'venv-{release}-py{PYTHON}'
    python, done = home / 'bin' / 'python', home / 'complete'
    if not done.exists():
        print(f"Installing what Celery {release}'s tests need (a minute) …", flush=True)
        venv.create(home, with_pip=True, clear=True)
        theirs = source.unpack(release, folder / 'requirements') / 'requirements' / 'test.txt'
        subprocess.run(
            [python, '-m', 'pip', 'install', '-qq', f'celery=={release}', '-r', theirs, '-r', AZURE_LIBRARIES],
            check=True, timeout=INSTALL_TIMEOUT)
        done.touch()
    return python


def _run(python: Path, tree: Path, xml: Path) -> None:
    """Run the unit tests in `tree`; write what became of each test to `xml` once all have run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST_')}
    environment['PYTHONPATH'] = str(tree)
    _check_import(python, tree, environment)
    print(f"Running Celery's unit tests in the {tree.parent.name} source (about 4 minutes) …", flush=True)
    log, unfinished = xml.with_suffix('.log'), xml.with_suffix('.part')
    with log.open('w', encoding='utf-8') as output:
        done = subprocess.run(
            [python, '-m', 'pytest', 't/unit', '-q', '-p', 'no:cacheprovider', '-o', 'junit_family=xunit1',
             f'--junitxml={unfinished}'],
            cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=SUITE_TIMEOUT)
    if done.returncode not in (0, 1):
        raise subprocess.SubprocessError(f'The tests did not run to their end: see {log}')
    unfinished.rename(xml)


def _check_import(python: Path, tree: Path, environment: Mapping[str, str]) -> None:
    """Make sure that the tests see the Celery in `tree`, not a released one."""
    code = 'import celery.backends.azureblockblob as module; print(module.__file__)'
    seen = subprocess.run([python, '-c', code], cwd=tree, env=dict(environment), check=True, capture_output=True,
                          encoding='utf-8').stdout
    if not Path(seen.strip()).is_relative_to(tree):
        raise LookupError(f'The tests would import {seen.strip()}, which is not in {tree}.')
