"""Celery's own module, as released, and this one read what the other has stored."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest

from celery.backends import azureblockblob
from t.services.azurite import ROOT

from . import released


@pytest.fixture(params=['json', 'yaml'])
def serializer(request):
    """The serializers that the released module reads; it takes every result for text."""
    return request.param


@pytest.fixture
def app(serializer, url_for):
    """An app on this module."""
    return released.build_app(serializer, result_backend=url_for())


@pytest.fixture
def released_celery(azurite, container_name, serializer):
    """Return a function that lets the released module store or read."""
    def released_celery(action):
        program = [sys.executable, '-m', released.__name__]
        output = subprocess.run(
            [*program, action, azurite.connection_string, container_name, serializer],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout
        answer = json.loads(output)
        assert answer['file'] != azureblockblob.__file__
        return answer['found']
    return released_celery


def test_what_the_released_module_has_stored_is_read_here(app, released_celery):
    stored = released_celery('store')
    assert released.read(app) == stored


def test_what_is_stored_here_is_read_by_the_released_module(app, released_celery):
    stored = released.store(app)
    assert released_celery('read') == stored
