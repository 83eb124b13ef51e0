"""A worker in this process, for chords: it takes messages from kombu's broker in memory, and runs each of them."""
from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from kombu import Message
from kombu.serialization import prepare_accept_content

from celery import Celery, _state, chord, signals, states
from celery.backends.azurestorage.chordlog import LEASE_DURATION
from celery.exceptions import ChordError
from celery.worker.request import Request

from .fakeblob import FakeBlobService
from .fakehttp import Request as ServiceRequest

#: How many messages a test may lead to at the most.
MANY = 2000


def chord_app(make_app: Callable[..., Celery], **settings: Any) -> Celery:
    """Return an app with a queue of its own, whose chords are counted by logs unless `settings` say otherwise."""
    return make_app(**{
        'azureblockblob_native_chords': True, 'task_default_queue': f'queue-{uuid.uuid4()}', **settings})


class ChordWorker:
    """Runs what is in an app's queue.

    Arguments:
        app: The app.

    Attributes:
        names: Names of the tasks that were received, in order.
        calls: What `collect` was called with, and the errbacks.
        tasks: The app's tasks.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.names: list[str] = []
        self.calls: list[Any] = []
        self.tasks = _define_tasks(app, self.calls)

    def echoes(self, number: int) -> list[Any]:
        """Return signatures of so many simple parts, whose results are 0, 1, 2, …"""
        return [self.tasks.echo.s(value) for value in range(number)]

    def start(self, header: Any, body: Any = None) -> tuple[Any, list[Message]]:
        """Start a chord, by default with the body `collect`; return its result and the messages of its parts."""
        result = chord(header, body or self.tasks.collect.s()).apply_async()
        return result, self.receive()

    def finish(self, header: Any, body: Any = None) -> Any:
        """Run a chord to its end, by default with the body `collect`; return its result."""
        result = chord(header, body or self.tasks.collect.s()).apply_async()
        self.run()
        return result

    def receive(self) -> list[Message]:
        """Take all messages."""
        with self.app.connection_for_read() as connection:
            queue = self.app.amqp.queues[self.app.conf.task_default_queue].bind(connection.default_channel)
            queue.declare()
            accept = prepare_accept_content(self.app.conf.accept_content)
            messages = list(iter(lambda: queue.get(no_ack=True, accept=accept), None))
        self.names += [message.headers['task'] for message in messages]
        return messages

    def request(self, message: Message) -> Request:
        """Return the request that the worker's main process makes of a message, as it came from the broker."""
        message._decoded_cache = None
        return Request(message, app=self.app)

    def execute(self, message: Message) -> None:
        """Run a message's task, as a process of a pool does. A message may be run again."""
        with self.current():
            self.request(message).execute()

    def run(self) -> None:
        """Run all messages, and those that they lead to."""
        while messages := self.receive():
            assert len(self.names) < MANY, 'There is no end of messages.'
            for message in messages:
                self.execute(message)

    def outcome(self, result: Any) -> tuple[str, Any]:
        """Return a task's state and result as they are read by someone who has never asked before."""
        self.app.backend._cache.clear()
        meta = self.app.backend.get_task_meta(result.id)
        return meta['status'], meta['result']

    def failure(self, result: Any) -> str:
        """Return what the error says that failed a body."""
        state, error = self.outcome(result)
        assert (state, type(error)) == (states.FAILURE, ChordError)
        return str(error)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the app what it is in its workers: the current one of each thread."""
        with patch.object(_state, 'default_app', self.app), patch.object(_state._tls, 'current_app', self.app):
            yield

    @contextmanager
    def main_process(self) -> Iterator[None]:
        """Be the main process of a worker, whose reports are all made behind the block."""
        self.app.loader.worker_initialized = True
        with self.current():
            yield
            signals.worker_shutdown.send(sender=self)
        self.app.loader.worker_initialized = False


def _define_tasks(app: Celery, calls: list[Any]) -> SimpleNamespace:
    @app.task(name='echo', shared=False)
    def echo(value):
        return value

    @app.task(name='add', shared=False)
    def add(x, y):
        return x + y

    @app.task(name='fail', shared=False)
    def fail(*args):
        raise ValueError('on purpose')

    @app.task(name='collect', shared=False)
    def collect(results):
        calls.append(results)
        return results

    @app.task(name='errback', shared=False)
    def errback(request, exc, traceback):
        calls.append((request.id, type(exc).__name__))

    @app.task(name='alarm', shared=False)
    def alarm(request, exc, traceback):
        calls.append('alarm')

    @app.task(name='quiet', shared=False, ignore_result=True)
    def quiet(value):
        return value

    @app.task(name='opaque', shared=False, ignore_result=True)
    def opaque():
        return object()

    @app.task(name='replace', shared=False, bind=True)
    def replace(self, signature):
        return self.replace(app.signature(signature))

    @app.task(name='grow', shared=False, bind=True)
    def grow(self, *values):
        for value in values:
            self.add_to_chord(echo.s(value))
        return 'grown'

    @app.task(name='grow_other', shared=False)
    def grow_other(chord_id):
        app.backend.add_to_chord(chord_id, app.AsyncResult('another'))

    @app.task(name='family', shared=False, bind=True)
    def family(self, *args):
        return {'root': self.request.root_id, 'parent': self.request.parent_id, 'id': self.request.id}

    return SimpleNamespace(
        echo=echo, add=add, fail=fail, collect=collect, errback=errback, alarm=alarm, quiet=quiet, opaque=opaque,
        replace=replace, grow=grow, grow_other=grow_other, family=family)


def lapse(service: FakeBlobService) -> None:
    """Let time pass until no lease holds any more that has not been renewed since."""
    service.now += LEASE_DURATION


def logs(service: FakeBlobService) -> list[str]:
    """Return the names of the blobs that chords have left."""
    return [name for container in service.containers.values() for name in container.blobs
            if name.startswith('celery-chord-')]


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

    with (patch.object(service, 'serve', serve_the_living),
          patch.object(threading, 'excepthook', report_what_lives),
          suppress(Killed)):
        yield
    assert dead, f'There was no {action} {operation}.'
