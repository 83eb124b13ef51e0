"""Redis, as a broker and as what this backend is compared with."""
from __future__ import annotations

import shutil
from pathlib import Path

from .process import Process
from .service import HOST, ServiceUnavailable, free_port


class Redis(Process):
    """A Redis server on a free port, which keeps nothing on disk.

    Arguments:
        directory: Where it runs and logs; must exist.
    """

    def __init__(self, directory: Path):
        super().__init__(directory / 'redis.log', cwd=directory)
        self.port = free_port()

    @property
    def url(self) -> str:
        """The address of its database 0."""
        return f'redis://{HOST}:{self.port}/0'

    def command(self) -> list[str]:
        """Return the command line.

        Raises:
            ServiceUnavailable: if Redis is missing.
        """
        program = shutil.which('redis-server')
        if program is None:
            raise ServiceUnavailable('Redis is missing: install redis-server from your system\'s packages.')
        return [program, '--bind', HOST, '--port', str(self.port), '--save', '', '--appendonly', 'no']

    def is_ready(self) -> bool:
        """Whether it listens."""
        return 'Ready to accept connections' in self.log
