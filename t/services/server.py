"""What the services that hand out tokens have in common: a small HTTP server on a thread of its own."""
from __future__ import annotations

import json
import socket
import ssl
import sys
import threading
from abc import abstractmethod
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .certificates import Certificates
from .service import HOST, Service
from .tokens import LIFETIME, TENANT, make_token

#: Status and JSON body of an answer.
Answer = tuple[int, dict[str, object]]


@dataclass(frozen=True)
class Request:
    """A request that came in.

    Attributes:
        path: Its path.
        parameters: Those of its query and of its form together.
        headers: Its headers; case does not matter.
    """

    path: str
    parameters: dict[str, str]
    headers: Message


class TokenServer(Service):
    """Hands out tokens on a free port of 127.0.0.1. Stopped and started again, it keeps the port.

    Every attribute may be changed while it runs.

    Arguments:
        certificates: What to serve HTTPS with; without it, HTTP is served.
        delay: Seconds that each answer takes.
        status: HTTP status to refuse tokens with.
        lifetime: Seconds that a token is good for; negative for expired ones.
        tenant: The tenant that tokens are for.
        issuer: Who gives them; by default Microsoft Entra, for `tenant`.

    Attributes:
        requests: All requests so far, answered or refused, in their order.
    """

    def __init__(self, certificates: Certificates | None = None, *, delay: float = 0, status: int | None = None,
                 lifetime: int = LIFETIME, tenant: str = TENANT, issuer: str | None = None):
        self.certificates = certificates
        self.delay = delay
        self.status = status
        self.lifetime = lifetime
        self.tenant = tenant
        self.issuer = issuer
        self.requests: list[Request] = []
        self._port = 0
        self._stopping = threading.Event()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Where it listens, with no path."""
        return f'http{"s" if self.certificates else ""}://{HOST}:{self._port}'

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that lead to it, and make requests trust it."""
        return super().environ | (self.certificates.environ if self.certificates else {})

    def start(self) -> None:
        """Listen, on the port that it had before if it was started before."""
        self._stopping.clear()
        self._server = _Server(self._port, self)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05},
                                        name=type(self).__name__)
        self._thread.start()

    def stop(self) -> None:
        """Answer what is under way at once, and end all threads."""
        if self._server:
            self._stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def respond(self, request: Request) -> Answer:
        """Note a request, and return the answer to it when its time has come."""
        self.requests.append(request)
        self._stopping.wait(self.delay)
        return self.answer(request)

    @abstractmethod
    def answer(self, request: Request) -> Answer:
        """Return the answer to a request."""

    @abstractmethod
    def refuse(self, status: int, reason: str) -> Answer:
        """Return a refusal as the service words it."""

    def make_token(self, **claims: str) -> str:
        """Return a token of the tenant, issuer and lifetime that are set; see :func:`.make_token`."""
        return make_token(tenant=self.tenant, issuer=self.issuer, lifetime=self.lifetime, **claims)


class _Server(ThreadingHTTPServer):
    # The threads of unfinished requests are waited for at the end.
    daemon_threads = False

    def __init__(self, port: int, service: TokenServer):
        super().__init__((HOST, port), _Handler)
        self.service = service
        self.tls = _tls_context(service.certificates) if service.certificates else None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls:
            # The handshake takes place in the request's thread: a client that is slow holds nobody up.
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    #: Seconds until a connection that stays silent is closed.
    timeout = 5

    def do_GET(self) -> None:
        """Answer in JSON."""
        url = urlsplit(self.path)
        form = self.rfile.read(int(self.headers.get('Content-Length', 0))).decode()
        parameters = dict(parse_qsl(url.query) + parse_qsl(form))
        status, answer = self.server.service.respond(Request(url.path, parameters, self.headers))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Say nothing: the requests are kept."""


def _tls_context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    return context
