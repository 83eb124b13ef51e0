"""All tests here have Azurite, over TLS and with OAuth, and no identity but the one that they ask for."""
from __future__ import annotations

import pytest

from t.services.fixtures import *  # noqa: F403  (fixtures)


@pytest.fixture(autouse=True)
def services(services_environment, clean_environment):
    """Every test here needs them."""
