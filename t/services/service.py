"""What all services have in common."""
from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

S = TypeVar('S', bound='Service')
T = TypeVar('T')

HOST = '127.0.0.1'

#: Seconds between two looks at something that is waited for.
INTERVAL = 0.05


class ServiceUnavailable(Exception):
    """A service cannot be started on this machine; the message says what to install."""


class Service(ABC):
    """Something that can be started and stopped; as a context manager, it runs for the length of the block."""

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that lead a process to this service, once it has started."""
        return {'no_proxy': f'{HOST},localhost'}

    @abstractmethod
    def start(self) -> None:
        """Start, and return when the service is ready."""

    @abstractmethod
    def stop(self) -> None:
        """Stop, and return when it has ended. Does nothing when it does not run."""

    def __enter__(self: S) -> S:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def wait_until(condition: Callable[[], T], what: str, timeout: float) -> T:
    """Call `condition` every 50 ms until it returns something true, and return that.

    Arguments:
        condition: Called without arguments.
        what: What is waited for, for the error.
        timeout: Seconds to wait at most.

    Raises:
        TimeoutError: if that time is over.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f'{what}: not within {timeout:g} s')
        time.sleep(INTERVAL)
    return result


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on just now."""
    with socket.create_server((HOST, 0)) as server:
        port: int = server.getsockname()[1]
    return port
