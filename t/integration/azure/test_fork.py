"""A process that forks after it has used a backend, as web servers do."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest

from t.services.azurite import ROOT

from . import fork


@pytest.fixture
def seen(url_for, identity):
    """What parent and child saw, before the fork and after it."""
    program = [sys.executable, '-m', fork.__name__, url_for('ManagedIdentityCredential')]
    return json.loads(subprocess.run(
        program, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout)


def test_parent_and_child_store_and_read(seen):
    assert {name: process['read'] for name, process in seen.items()} == {
        name: [f'{name}-{number}' for number in range(fork.RESULTS)] for name in ('before', 'parent', 'child')}


def test_the_child_uses_no_connection_of_the_parent(seen):
    assert seen['child']['ports']
    assert set(seen['child']['ports']).isdisjoint(seen['before']['ports'] + seen['parent']['ports'])


def test_the_parent_keeps_its_connections(seen):
    assert set(seen['parent']['ports']) & set(seen['before']['ports'])
