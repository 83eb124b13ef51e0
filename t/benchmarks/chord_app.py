"""The app that the chord benchmark's workers and client share. The environment says which backend it has."""
from __future__ import annotations

import logging
import os

from redis import Redis

from celery import Celery

# Released Celery lets the SDK log 48 lines for each result; that is not what is measured.
logging.getLogger('azure').setLevel(logging.WARNING)


class ReleasedApp(Celery):
    """An app with the backend that the plugin takes the place of."""

    def _get_backend(self):
        from .results import released_class
        return released_class()(app=self, url=self.conf.result_backend)


def make_app(contender: str, broker: str, backend: str) -> Celery:
    """Return the app of a contender."""
    app = (ReleasedApp if contender == 'released' else Celery)(contender, broker=broker, backend=backend)
    app.conf.update(
        azureblockblob_native_chords=contender == 'ours',
        azureblockblob_container_name=f'bench-{contender}')
    app.task(empty, name='empty')
    app.task(tell, name='tell')
    return app


def empty() -> None:
    """Do nothing: a part."""


def tell(results: list[None], key: str, broker: str) -> None:
    """Say that all parts are done: the body."""
    with Redis.from_url(broker) as redis:
        redis.lpush(key, len(results))


if 'BENCH_CONTENDER' in os.environ:
    app = make_app(*(os.environ[f'BENCH_{name}'] for name in ('CONTENDER', 'BROKER', 'BACKEND')))
