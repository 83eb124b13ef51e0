"""What the tests of the services share."""
from __future__ import annotations

import pytest

from t.services.certificates import make_certificates


@pytest.fixture(scope='package')
def certificates(tmp_path_factory):
    """The certificates of all services."""
    return make_certificates(tmp_path_factory.mktemp('certificates'))


@pytest.fixture
def enter(monkeypatch):
    """Return a function that puts the environment variables of a service into this process."""
    def enter(service):
        for name, value in service.environ.items():
            monkeypatch.setenv(name, value)
    return enter
