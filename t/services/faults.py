"""A proxy that makes faults, in front of a blob service.

It hands HTTP/1.1 on as it stands, so that a request keeps its signature, until a rule takes one::

    with FaultProxy(azurite.account_url, azurite.certificates) as proxy:
        proxy.on(answer(503, 'ServerBusy'), method='PUT', path='celery-task-meta-', times=2)
        store_a_result_at(proxy.account_url)
        assert [request.status for request in proxy.requests] == [503, 503, 201]

Actions: `answer`, `delay`, `cut`, `cut_within`, `lose`, `hang`, and a `Hold` that a test lets go.
A proxy that is stopped refuses connections until it is started again.

`SlowNetwork` runs it in a process of its own, without faults: a network that adds to the round trip.
"""
from __future__ import annotations

import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

from .certificates import Certificates
from .process import Process
from .service import HOST, INTERVAL, Service
from .wire import Cut, Listener, Message, Upstream, read_message

#: No fault lasts longer than this, in seconds, so that a test which forgets one ends.
LONGEST_WAIT = 60


@dataclass
class Request:
    """What came through the proxy.

    Attributes:
        method: The HTTP method.
        path: The path, as it was sent.
        query: The query string, as it was sent.
        seconds: How long it took, once it is over.
        status: The status that the client got; None if it got none.
        service_status: The status that the service gave; None if it never saw the request.
    """

    method: str
    path: str
    query: str
    seconds: float | None = None
    status: int | None = None
    service_status: int | None = None


class Exchange:
    """A request on its way: what an action works with.

    Arguments:
        message: The request.
        request: Its record.
        client: The client's connection.
        upstream: The connection to the service.
        closing: Set when the proxy goes.
    """

    def __init__(self, message: Message, request: Request, client: socket.socket, upstream: Upstream,
                 closing: threading.Event) -> None:
        self.message = message
        self.request = request
        self._closing = closing
        self._client = client
        self._upstream = upstream

    def forward(self) -> Message:
        """Let the service do what is asked. Return its answer, which the client does not have yet."""
        answered = self._upstream.ask(self.message)
        self.request.service_status = int(answered.first_line[1])
        return answered

    def reply(self, answered: Message) -> None:
        """Send an answer to the client."""
        self.request.status = int(answered.first_line[1])  # first: the client may look as soon as it has the answer
        self._client.sendall(answered.head + answered.body)

    def reply_part(self, answered: Message, length: int) -> None:
        """Send an answer's head to the client, and this many bytes of its body."""
        self._client.sendall(answered.head + answered.body[:length])

    def wait(self, seconds: float) -> bool:
        """Wait, until the proxy goes at the latest. Return whether it goes."""
        return self._closing.wait(seconds)


Action = Callable[[Exchange], None]


def hand_on(exchange: Exchange) -> None:
    """Let the service answer."""
    exchange.reply(exchange.forward())


def answer(status: int, code: str = '', message: str = 'A fault made by a test.') -> Action:
    """Answer in the service's place, as Azure does (REST: Status and error codes). The service sees nothing.

    Arguments:
        status: The HTTP status.
        code: The Azure error code; without one the answer is what any web server might send.
        message: The text that goes with the code.
    """
    body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'

    def act(exchange: Exchange) -> None:
        sent = b'' if exchange.request.method == 'HEAD' or not code else body.encode()
        headers = [f'HTTP/1.1 {status} {HTTPStatus(status).phrase}', f'Content-Length: {len(sent)}']
        if code:
            headers += ['Content-Type: application/xml', f'x-ms-error-code: {code}']
        exchange.reply(Message('\r\n'.join([*headers, '', '']).encode(), sent))
    return act


def delay(seconds: float) -> Action:
    """Hand the request on after some seconds."""
    def act(exchange: Exchange) -> None:
        exchange.wait(seconds)
        hand_on(exchange)
    return act


def cut(reset: bool = False) -> Action:
    """Close the connection; the service never sees the request."""
    def act(exchange: Exchange) -> None:
        raise Cut(reset)
    return act


def cut_within(reset: bool = False) -> Action:
    """Close the connection after half of the answer's body."""
    def act(exchange: Exchange) -> None:
        answered = exchange.forward()
        exchange.reply_part(answered, len(answered.body) // 2)
        raise Cut(reset)
    return act


def lose() -> Action:
    """Close the connection after the service has done what was asked; the client gets no answer."""
    def act(exchange: Exchange) -> None:
        exchange.forward()
        raise Cut
    return act


def hang() -> Action:
    """Never answer; the service never sees the request."""
    def act(exchange: Exchange) -> None:
        exchange.wait(LONGEST_WAIT)
        raise Cut
    return act


class Hold:
    """Keeps each request, or its answer, until a test lets them go: for schedules that must be forced.

    Arguments:
        answered: Let the service do what is asked, and keep its answer.
    """

    def __init__(self, answered: bool = False) -> None:
        self.answered = answered
        self._arrived = threading.Semaphore(0)
        self._released = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        answered = exchange.forward() if self.answered else None
        self._arrived.release()
        for _ in range(int(LONGEST_WAIT / INTERVAL)):
            if exchange.wait(0):
                raise Cut
            if self._released.wait(INTERVAL):
                break
        exchange.reply(answered or exchange.forward())

    def wait(self, count: int = 1) -> None:
        """Wait until `count` more requests are kept here."""
        for _ in range(count):
            if not self._arrived.acquire(timeout=LONGEST_WAIT):
                raise TimeoutError('no such request came')

    def release(self) -> None:
        """Let all requests go, those to come too."""
        self._released.set()


@dataclass
class Rule:
    """Which requests an action is for.

    Attributes:
        action: What to do with them.
        method: Their method; '' for any.
        path: A regular expression that is found in their path.
        query: A regular expression that is found in their query string.
        skip: How many of them pass first.
        times: How many the action is then for; None for all.
    """

    action: Action
    method: str = ''
    path: str = ''
    query: str = ''
    skip: int = 0
    times: int | None = None
    _seen: int = field(default=0, init=False)

    def takes(self, request: Request) -> bool:
        """Tell whether the action is for `request`, and count it."""
        if self.method not in ('', request.method):
            return False
        if not (re.search(self.path, request.path) and re.search(self.query, request.query)):
            return False
        self._seen += 1
        return self._seen > self.skip and (self.times is None or self._seen <= self.skip + self.times)


class FaultProxy(Service):
    """The proxy. Stopped and started again, it listens on the same port: between the two it refuses connections.

    Arguments:
        account_url: The account's address at the service.
        certificates: What to serve HTTPS with, and what to trust at the service; without it, both speak HTTP.
        latency: Round trip to add to each request and twice to each connection (TCP and TLS handshake), in seconds.

    Attributes:
        requests: What came through, in the order in which it came.
        most_at_once: The largest number of requests that were under way together.
    """

    def __init__(self, account_url: str, certificates: Certificates | None = None, *, latency: float = 0) -> None:
        self.latency = latency
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._target = urlsplit(account_url)
        self._certificates = certificates
        self._port = 0
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._under_way = 0
        self._listener: Listener | None = None

    @property
    def account_url(self) -> str:
        """The account's address at the proxy."""
        return f'{self._target.scheme}://{HOST}:{self._port}{self._target.path}'

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that make the Azure SDK trust it."""
        return super().environ | (self._certificates.environ if self._certificates else {})

    def start(self) -> None:
        """Listen, on the port that it had before if it was started before."""
        self._listener = Listener(self._port, self._certificates, self._serve)
        self._port = self._listener.server_address[1]

    def stop(self) -> None:
        """Cut every connection, end every thread, and refuse what comes."""
        listener, self._listener = self._listener, None
        if listener:
            listener.close()

    def on(self, action: Action, method: str = '', path: str = '', query: str = '', skip: int = 0,
           times: int | None = None) -> None:
        """Add a rule (see `Rule`). The first that takes a request wins; what none takes passes."""
        with self._lock:
            self._rules.append(Rule(action, method, path, query, skip, times))

    def clear(self) -> None:
        """Forget all rules and all records."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()
            self.most_at_once = 0

    def _serve(self, client: socket.socket, closing: threading.Event) -> None:
        """Serve a client's connection, request by request."""
        if self.latency:
            time.sleep(2 * self.latency)
        if isinstance(client, ssl.SSLSocket):
            client.do_handshake()
        with Upstream(self._target, self._certificates) as upstream, client.makefile('rb') as stream:
            while (message := read_message(stream)) is not None:
                method, target, _ = message.first_line
                path, _, query = target.partition('?')
                request = Request(method, path, query)
                with self._recorded(request) as action:
                    action(Exchange(message, request, client, upstream, closing))
                if message.closes:
                    return

    @contextmanager
    def _recorded(self, request: Request) -> Iterator[Action]:
        with self._lock:
            self.requests.append(request)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            action = next((rule.action for rule in self._rules if rule.takes(request)), hand_on)
        begun = time.perf_counter()
        try:
            if self.latency:
                time.sleep(self.latency)
            yield action
        finally:
            request.seconds = time.perf_counter() - begun
            with self._lock:
                self._under_way -= 1


class SlowNetwork(Process):
    """A proxy in a process of its own, so that its work is not counted as that of the process which measures.

    Arguments:
        directory: Where its log goes; must exist.
        account_url: The account's address at the service.
        certificates: As for `FaultProxy`.
        latency: Round trip to add, in seconds, as for `FaultProxy`.
    """

    def __init__(self, directory: Path, account_url: str, certificates: Certificates | None, latency: float) -> None:
        super().__init__(directory / 'network.log', cwd=Path(__file__).resolve().parents[2])
        self._arguments = [account_url, str(latency), *map(str, astuple(certificates) if certificates else ())]

    @property
    def account_url(self) -> str:
        """The account's address at the proxy."""
        return self.log.strip()

    def command(self) -> list[str]:
        """Return the command line."""
        return [sys.executable, '-m', __name__, *self._arguments]

    def is_ready(self) -> bool:
        """Whether it has written its address."""
        return self.log.endswith('\n')


def main(account_url: str, latency: str, *files: str) -> None:
    """Run a proxy until SIGTERM; write its account URL to standard output."""
    certificates = Certificates(*map(Path, files)) if files else None
    with FaultProxy(account_url, certificates, latency=float(latency)) as proxy:
        print(proxy.account_url, flush=True)
        signal.sigwait({signal.SIGTERM})


if __name__ == '__main__':
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads inherit it, so that sigwait gets it
    main(*sys.argv[1:])
