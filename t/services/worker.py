"""A real Celery worker."""
from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .process import Process

#: A worker that is alone has nobody to talk to; without these it waits for answers at its start.
ALONE = ('--without-gossip', '--without-mingle', '--without-heartbeat')

READY = re.compile(r' ready\.$', re.MULTILINE)


class Worker(Process):
    """``celery worker`` in a process of its own, ready for tasks once it has started.

    Arguments:
        app: The app, as ``celery -A`` takes it.
        directory: Where its log and its temporary files go; must exist.
        pool: Its pool: prefork, threads, solo or gevent.
        concurrency: Number of the pool's processes, threads or greenlets.
        environ: Environment variables that it gets beside those of this process.
        cwd: Where it runs, and finds the app.
        loglevel: INFO or DEBUG, since its log tells when it is ready.
        arguments: Further arguments of ``celery worker``.
        name: Its name; workers that share a broker or a directory need different ones.
    """

    def __init__(self, app: str, directory: Path, *, pool: str = 'prefork', concurrency: int = 2,
                 environ: Mapping[str, str] | None = None, cwd: Path | None = None, loglevel: str = 'INFO',
                 arguments: Sequence[str] = (), name: str = 'worker'):
        # What a killed worker leaves behind is to go with the directory.
        super().__init__(directory / f'{name}.log', {'TMPDIR': str(directory), **(environ or {})}, cwd)
        self._arguments = [
            '--app', app, 'worker', '--pool', pool, '--concurrency', str(concurrency), '--loglevel', loglevel,
            '--hostname', f'{name}@%h', *ALONE, *arguments]

    def command(self) -> list[str]:
        """Return the command line, for this Python."""
        return [sys.executable, '-m', 'celery', *self._arguments]

    def is_ready(self) -> bool:
        """Whether it waits for tasks."""
        return READY.search(self.log) is not None
