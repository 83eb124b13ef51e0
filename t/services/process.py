"""Services that are processes of their own, and never outlive the process that started them."""
from __future__ import annotations

import os
import signal
import subprocess
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .service import Service, T, wait_until

#: Turns into the command it is given, after it has left a guard in the process group: a shell that reads from a pipe
#: whose other end only this Python holds. However this Python ends, that closes the pipe, and the guard kills the
#: group.
GUARDED = '''
exec 3<&0
( (read -r line <&3; kill -s KILL -- "-$$") & )
exec "$@" </dev/null 3<&-
'''

#: Seconds that a process may take to start, on a busy machine.
START_TIMEOUT = 60

#: Seconds that it may take to end when it is asked to.
STOP_TIMEOUT = 15

#: How much of its log an error shows, in characters.
TAIL = 2000


class Process(Service):
    """A process, with those that it starts in turn.

    They are a process group of their own: Ctrl-C in a terminal reaches only the process that started them. As a
    context manager, it is stopped at the end of the block, or killed if the block ends with an error.

    Arguments:
        log_file: Where its output goes; begun anew at each start.
        environ: Environment variables that it gets beside those of this process.
        cwd: Where it runs.
    """

    _child: subprocess.Popen[bytes]

    def __init__(self, log_file: Path, environ: Mapping[str, str] | None = None, cwd: Path | None = None):
        self.log_file = log_file
        self._own_environ = dict(environ or {})
        self._cwd = cwd
        self._started = False

    @abstractmethod
    def command(self) -> list[str]:
        """Return what to run, with its arguments."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether its log says that it is ready."""

    @property
    def pid(self) -> int:
        """Its process id, since it was started last."""
        return self._child.pid

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._started and self._child.poll() is None

    @property
    def log(self) -> str:
        """What it has written since it was started last."""
        return self.log_file.read_text(errors='replace')

    def start(self) -> None:
        """Start it, and wait until it is ready.

        Raises:
            RuntimeError: if it ends instead.
            TimeoutError: if it takes more than 60 s.
        """
        command = ['/bin/sh', '-c', GUARDED, 'sh', *self.command()]
        with self.log_file.open('wb') as output:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, cwd=self._cwd,
                env=os.environ | self._own_environ, start_new_session=True)
        self._started = True
        try:
            self.wait_until(self.is_ready, 'ready', START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def wait_until(self, condition: Callable[[], T], what: str, timeout: float) -> T:
        """Wait for `condition`, as :func:`.wait_until` does, as long as the process runs.

        Raises:
            RuntimeError: if it ends first.
            TimeoutError: if the time is over.
        """
        what = f'{type(self).__name__}, {what}'

        def condition_or_end() -> T:
            if not (result := condition()) and not self.running:
                raise RuntimeError(f'{what}: it has ended. {self._tail()}')
            return result

        try:
            return wait_until(condition_or_end, what, timeout)
        except TimeoutError as exc:
            raise TimeoutError(f'{exc}. {self._tail()}') from None

    def stop(self) -> None:
        """Ask it to end (SIGTERM), and after 15 s, or when it has ended, kill what is left of its group."""
        if self.running:
            self._child.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """Kill its whole group (SIGKILL), as the loss of a machine does."""
        if self._started:
            with self._child, suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._started = False

    def __exit__(self, *exc_info: object) -> None:
        if exc_info[0] is not None:
            self.kill()
        self.stop()

    def children(self) -> list[int]:
        """Return the ids of the processes that it has started itself and that still run (Linux only)."""
        return sorted(pid for pid, parent in running_processes().items() if parent == self.pid)

    def _tail(self) -> str:
        return f'Its log ends:\n{self.log[-TAIL:]}'


def running_processes() -> dict[int, int]:
    """Return the ids of all processes that have not ended, and that of each one's parent (Linux only)."""
    parents = {}
    for file in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has just ended
            state, parent = file.read_text().rpartition(')')[2].split()[:2]
            if state != 'Z':
                parents[int(file.parent.name)] = int(parent)
    return parents
