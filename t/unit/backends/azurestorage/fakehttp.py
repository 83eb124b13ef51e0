"""The way to the fake Azure Blob service: what the SDK sends is recorded, disturbed and answered here.

The whole pipeline of the real SDK runs above it; no socket is opened below.
"""
from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.structures import CaseInsensitiveDict
from urllib3.exceptions import ProtocolError
from urllib3.response import HTTPResponse

#: Names of the operations in the REST reference, by method, resource and the query's `comp`.
OPERATIONS = {
    ('PUT', 'container', ''): 'Create Container',
    ('GET', 'container', ''): 'Get Container Properties',
    ('DELETE', 'container', ''): 'Delete Container',
    ('GET', 'container', 'list'): 'List Blobs',
    ('POST', 'container', 'batch'): 'Blob Batch',
    ('PUT', 'blob', ''): 'Put Blob',
    ('PUT', 'blob', 'block'): 'Put Block',
    ('PUT', 'blob', 'blocklist'): 'Put Block List',
    ('PUT', 'blob', 'appendblock'): 'Append Block',
    ('PUT', 'blob', 'metadata'): 'Set Blob Metadata',
    ('PUT', 'blob', 'lease'): 'Lease Blob',
    ('GET', 'blob', ''): 'Get Blob',
    ('HEAD', 'blob', ''): 'Get Blob Properties',
    ('DELETE', 'blob', ''): 'Delete Blob',
}


@dataclass(frozen=True)
class Request:
    """A request as the service sees it.

    Attributes:
        method: The HTTP method.
        container: Name of the container.
        blob: Name of the blob, or ''.
        query: Parameters of the URL.
        headers: Headers; their names are not case-sensitive.
        body: Content.
        sending: What the adapter was told besides: `timeout`, `verify`, `proxies`.
    """

    method: str
    container: str
    blob: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b''
    sending: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, method: str, url: str, headers: Mapping[str, str], body: Any, **sending: Any) -> Request:
        """Return the request that `requests`, or a part of a batch, is about to send."""
        parts = urlsplit(url)
        path = unquote(parts.path).lstrip('/')
        if parts.hostname and '.blob.' not in parts.hostname:  # the first segment is the account
            path = path.partition('/')[2]
        container, _, blob = path.partition('/')
        return cls(method, container, blob, dict(parse_qsl(parts.query, keep_blank_values=True)),
                   CaseInsensitiveDict(headers), _as_bytes(body), sending)

    @property
    def operation(self) -> str:
        """The operation's name in the REST reference."""
        resource = 'blob' if self.blob else 'container'
        name = OPERATIONS.get((self.method, resource, self.query.get('comp', '')))
        if name is None:
            raise NotImplementedError(f'The fake does not know {self.method} {resource} {dict(self.query)}')
        return name


def _as_bytes(body: Any) -> bytes:
    if hasattr(body, 'read'):
        body = body.read()
    return body.encode() if isinstance(body, str) else bytes(body or b'')


class Answer(NamedTuple):
    """What the service answers."""

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b''


class Refusal(Exception):
    """An answer that is an error: its status and its code in the REST reference."""

    def __init__(self, status: int, code: str, **headers: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code
        self.headers = headers

    def answer(self) -> Answer:
        """Return the answer, as the service writes it."""
        text = f'<?xml version="1.0"?><Error><Code>{self.code}</Code><Message>The fake refuses.</Message></Error>'
        headers = {'x-ms-error-code': self.code, 'Content-Type': 'application/xml', **self.headers}
        return Answer(self.status, headers, text.encode())


@dataclass
class Rule:
    """What is to happen to certain requests; see :meth:`FakeServer.on`."""

    operation: str
    blob: str
    times: float
    before: Callable[[], None] | None
    after: Callable[[], None] | None
    answer: tuple[int, str] | None

    def applies(self, request: Request) -> bool:
        """Tell whether a request is one of those."""
        return self.times > 0 and self.operation in ('', request.operation) and self.blob in request.blob


class FakeServer:
    """Records requests, does to them what a test has planned, and leaves the rest to :meth:`handle`.

    Attributes:
        requests: All requests that came here, in order.
        peak: The greatest number of requests that were under way at once.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.peak = 0
        self._under_way = 0
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    @property
    def operations(self) -> list[str]:
        """Names of the operations that were asked for, in order."""
        return [request.operation for request in self.requests]

    def on(self, operation: str = '', blob: str = '', *, times: float = 1,
           before: Callable[[], None] | None = None, after: Callable[[], None] | None = None,
           answer: tuple[int, str] | None = None) -> None:
        """Plan what happens to a coming request: the first plan that fits it. One that says nothing lets it pass.

        Arguments:
            operation: The operation's name in the REST reference; '' is any.
            blob: A part of the blob's name.
            times: How many requests it is for.
            before: Called before the service acts; if it raises, the service never sees the request.
            after: Called when the service has acted; if it raises, the answer is lost.
            answer: Status and error code to give in place of the service's answer.
        """
        self._rules.append(Rule(operation, blob, times, before, after, answer))

    def forget_plans(self) -> None:
        """Let all coming requests pass."""
        self._rules.clear()

    def adapter(self, **kwargs: Any) -> FakeAdapter:
        """Return what stands in for :class:`requests.adapters.HTTPAdapter`, of which it takes the arguments."""
        return FakeAdapter(self, **kwargs)

    def serve(self, request: Request) -> Answer:
        """Answer a request that has come over the network."""
        with self._lock:
            self.requests.append(request)
            self._under_way += 1
            self.peak = max(self.peak, self._under_way)
            rule = next((rule for rule in self._rules if rule.applies(request)), None)
            if rule:
                rule.times -= 1
        try:
            return self._follow(rule, request) if rule else self.answer(request)
        finally:
            with self._lock:
                self._under_way -= 1

    def answer(self, request: Request) -> Answer:
        """Do what a request asks for, undisturbed and unrecorded."""
        try:
            return self.handle(request)
        except Refusal as refusal:
            return refusal.answer()

    def handle(self, request: Request) -> Answer:
        """Do what a request asks for.

        Raises:
            Refusal: if it cannot be done.
        """
        raise NotImplementedError

    def _follow(self, rule: Rule, request: Request) -> Answer:
        if rule.before:
            rule.before()
        answer = Refusal(*rule.answer).answer() if rule.answer else self.answer(request)
        if rule.after:
            rule.after()
        return answer


class FakeAdapter(HTTPAdapter):
    """Hands requests to a :class:`FakeServer` where the real one would open a connection."""

    def __init__(self, server: FakeServer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.server = server

    def send(self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, verify: Any = True,
             cert: Any = None, proxies: Any = None) -> requests.Response:
        """Return the server's answer."""
        read = Request.read(str(request.method), str(request.url), request.headers, request.body,
                            timeout=timeout, verify=verify, proxies=dict(proxies or {}))
        status, headers, body = self.server.serve(read)
        return self.build_response(request, HTTPResponse(
            body=BytesIO(b'' if read.method == 'HEAD' or status == 304 else body),
            headers={'Content-Length': str(len(body)), **headers},
            status=status, reason=http.client.responses[status], request_method=read.method, preload_content=False))


def refuse_connection() -> NoReturn:
    """Raise what `requests` raises when nobody listens: the service has seen nothing."""
    raise requests.ConnectionError('Connection refused')


def cut_connection() -> NoReturn:
    """Raise what `requests` raises when a connection ends before the answer: the service may have acted."""
    raise requests.ConnectionError(ProtocolError('Connection aborted.', ConnectionResetError(104, 'reset by peer')))
