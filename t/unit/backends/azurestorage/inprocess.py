"""A worker in this process: it takes an app's messages from kombu's broker in memory, and runs them one by one."""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

from kombu import Message

from celery import Celery, _state
from celery.worker.request import Request

from .fakeblob import FakeBlobService
from .fakehttp import Request as ServiceRequest

#: How many messages a test may lead to at the most.
MANY = 2000


class InProcessWorker:
    """Runs what is in an app's queue.

    Arguments:
        app: The app.

    Attributes:
        names: Names of the tasks that were received, in order.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.names: list[str] = []

    def receive(self) -> list[Message]:
        """Take all messages."""
        with self.app.connection_for_read() as connection:
            queue = self.app.amqp.queues[self.app.conf.task_default_queue].bind(connection.default_channel)
            queue.declare()
            messages = list(iter(lambda: queue.get(no_ack=True), None))
        self.names += [message.headers['task'] for message in messages]
        return messages

    def execute(self, message: Message) -> None:
        """Run a message's task, as a process of a pool does. A message may be run again."""
        with self.current():
            self.request(message).execute()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the app what it is in its workers: the current one of each thread."""
        with patch.object(_state, 'default_app', self.app), patch.object(_state._tls, 'current_app', self.app):
            yield

    def request(self, message: Message) -> Request:
        """Return the request that the worker's main process makes of a message."""
        return Request(message, app=self.app)

    def run(self) -> None:
        """Run all messages, and those that they lead to."""
        while messages := self.receive():
            assert len(self.names) < MANY, 'There is no end of messages.'
            for message in messages:
                self.execute(message)


class Killed(BaseException):
    """The process is killed: here, what it does from then on reaches nobody."""


@contextmanager
def killed(service: FakeBlobService, operation: str, action: str = '', answered: bool = False) -> Iterator[None]:
    """Run the block as a process that is killed when it sends a certain request.

    Arguments:
        service: The service.
        operation: The request's name in the REST reference.
        action: For Lease Blob: what is asked for.
        answered: Let the service do what is asked, so that only the answer is not seen.
    """
    serve = service.serve
    dead = False

    def serve_the_living(request: ServiceRequest) -> Any:
        nonlocal dead
        if not dead and request.operation == operation and request.headers.get('x-ms-lease-action', '') == action:
            dead = True
            if answered:
                serve(request)
        if dead:
            raise Killed
        return serve(request)

    report = threading.excepthook

    def report_what_lives(error: Any) -> None:
        if error.exc_type is not Killed:
            report(error)

    with patch.object(service, 'serve', serve_the_living), patch.object(threading, 'excepthook', report_what_lives):
        with suppress(Killed):
            yield
    assert dead, f'There was no {action} {operation}.'
