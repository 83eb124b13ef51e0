"""Stores and reads a result by each URL that it gets. ``check_wheel.py`` runs it where the plugin is installed."""
from __future__ import annotations

import inspect
import sys

from celery import Celery, uuid

#: Seconds to wait for a result that is there.
TIMEOUT = 10

RESULT = {'answer': 42}


def main() -> None:
    """Store and read.

    Raises:
        SystemExit: if what is read is not what was stored, or the backend is not the installed one.
    """
    for url in sys.argv[1:]:
        backend = Celery(backend=url).backend
        if not inspect.getfile(type(backend)).startswith(sys.prefix):
            sys.exit(f'The backend comes from {inspect.getfile(type(backend))}.')
        task_id = uuid()
        backend.store_result(task_id, RESULT, 'SUCCESS')
        read = Celery(backend=url).AsyncResult(task_id).get(timeout=TIMEOUT)
        if read != RESULT:
            sys.exit(f'{backend.as_uri()} gave back {read!r}, not {RESULT!r}.')
        print(f'{backend.as_uri()} gave back {read!r}')


if __name__ == '__main__':
    main()
