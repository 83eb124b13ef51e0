"""What pytest-celery's nodes ask of a Docker container, for processes in its place."""
from __future__ import annotations

from signal import SIGKILL

from t.services.process import Process


class FolderContainer:
    """A broker that is a folder: it is always there."""

    name = id = 'folder'
    status = 'running'

    def __init__(self, url: str):
        self.celeryconfig = {'url': url, 'host_url': url}

    def ready(self) -> bool:
        """Whether it can be used."""
        return True

    def logs(self) -> str:
        """What it has written."""
        return ''

    def teardown(self) -> None:
        """Leave it: it is in the test's own folder."""


class ProcessContainer:
    """A service that is a process.

    Arguments:
        process: The process, which has been started.
        url: What Celery finds it by.
    """

    def __init__(self, process: Process, url: str = ''):
        self.name = self.id = type(process).__name__
        self.process = process
        self.celeryconfig = {'url': url, 'host_url': url}

    @property
    def status(self) -> str:
        """Docker's word for whether it runs."""
        return 'running' if self.process.running else 'exited'

    def ready(self) -> bool:
        """Whether it can be used; a process is, once it has started."""
        return self.process.running

    def logs(self) -> str:
        """What it has written since it was started last."""
        return self.process.log

    def kill(self, signal: str | int) -> None:
        """Kill it, or ask it to end."""
        if signal in (SIGKILL, SIGKILL.name):
            self.process.kill()
        else:
            self.process.stop()

    def restart(self, timeout: int) -> None:
        """Start it anew, if need be after it has ended; a process has time limits of its own."""
        self.process.stop()
        self.process.start()

    def reload(self) -> None:
        """Look again: here that is done each time."""

    def teardown(self) -> None:
        """End it."""
        self.process.kill()


class WorkerContainer(ProcessContainer):
    """A worker, which takes its tasks from Celery's default queue."""

    def worker_name(self) -> str:
        """What begins its host name."""
        return self.name

    def worker_queue(self) -> str:
        """Where it takes its tasks from."""
        return 'celery'
