"""A plugin for pytest: the same limits for all of Celery's integration tests, and tests for Redis open to others."""
from __future__ import annotations

from typing import Any

import pytest

#: Seconds that a test may take, in place of what its own mark says; 20 to 300 there.
TIME_LIMIT = 400


class OpenURL(str):
    """The URL of a result backend that says yes to tests which ask whether it is Redis.

    ``redis://`` is another question: a test that fails with Redis asks it.
    """

    def startswith(self, prefix: Any, *args: Any) -> bool:
        """Tell whether the URL starts with `prefix`, or, of a tuple, with any."""
        return 'redis' in (prefix if isinstance(prefix, tuple) else [prefix]) or super().startswith(prefix, *args)


def pytest_plugin_registered(plugin: Any) -> None:
    """Open the backend's URL as soon as Celery's ``conftest.py`` is there: before any test module has asked."""
    if getattr(plugin, '__name__', '') == 't.integration.conftest':
        plugin.TEST_BACKEND = OpenURL(plugin.TEST_BACKEND)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set the time limit."""
    for item in items:
        item.add_marker(pytest.mark.timeout(TIME_LIMIT), append=False)
