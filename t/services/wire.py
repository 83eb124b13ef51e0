"""HTTP/1.1 as it comes off the wire, and the connections that a proxy hands it on by."""
from __future__ import annotations

import re
import select
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple
from urllib.parse import SplitResult

from .certificates import Certificates
from .service import HOST

#: How long to wait for a service's next bytes, in seconds.
SERVICE_TIMEOUT = 60

#: Makes the kernel reset a connection that is closed, rather than end it in order (see socket(7), SO_LINGER).
RESET_ON_CLOSE = struct.pack('ii', 1, 0)


class Message(NamedTuple):
    """An HTTP request or answer, as its bytes came."""

    head: bytes
    body: bytes

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        return self.header('Connection').lower() == 'close'

    @property
    def first_line(self) -> list[str]:
        """The three parts of the first line."""
        return self.head.split(b'\r\n', 1)[0].decode('latin-1').split(' ', 2)

    def header(self, name: str) -> str:
        """Return a header's value, or ''."""
        found = re.search(rb'\r\n' + name.encode() + rb':[ \t]*([^\r\n]*)', self.head, re.IGNORECASE)
        return found[1].decode('latin-1') if found else ''


def read_message(stream: BinaryIO, asked: str = '') -> Message | None:
    """Read a request, or the answer to one. Return None if the other side has closed the connection.

    Arguments:
        stream: Where to read.
        asked: For an answer: the method of its request.
    """
    lines = [stream.readline()]
    if not lines[0]:
        return None
    while lines[-1] != b'\r\n':
        lines.append(stream.readline())
        if not lines[-1]:
            raise ConnectionError('the connection was closed within a head')
    message = Message(b''.join(lines), b'')
    if asked == 'HEAD' or (asked and message.first_line[1] in ('204', '304')):
        return message
    if 'chunked' in message.header('Transfer-Encoding').lower():
        return message._replace(body=b''.join(_read_chunks(stream)))
    return message._replace(body=_read_exactly(stream, int(message.header('Content-Length') or 0)))


def _read_chunks(stream: BinaryIO) -> Iterator[bytes]:
    size = -1
    while size:
        line = stream.readline()
        size = int(line.partition(b';')[0] or b'0', 16)
        yield line
        if size:
            yield _read_exactly(stream, size + len(b'\r\n'))
    yield _read_exactly(stream, len(b'\r\n'))  # there are no trailers in this protocol


def _read_exactly(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise ConnectionError('the connection was closed within a body')
    return data


class Cut(Exception):
    """The client's connection is to be closed, in order or with a reset."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


class Upstream:
    """A connection to the service, kept open for the requests of one client's connection."""

    def __init__(self, target: SplitResult, certificates: Certificates | None) -> None:
        self._target = target
        self._certificates = certificates
        self._socket: socket.socket | None = None

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._close()

    def ask(self, message: Message) -> Message:
        """Send a request and return its answer."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self._close()  # the service has closed an idle connection
        connection = self._socket or self._connect()
        connection.sendall(message.head + message.body)
        answered = read_message(self._stream, asked=message.first_line[0])
        if answered is None:
            raise ConnectionError('the service has closed the connection')
        if answered.closes:
            self._close()
        return answered

    def _connect(self) -> socket.socket:
        host = self._target.hostname or ''
        connection = socket.create_connection((host, self._target.port or 0), SERVICE_TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._certificates:
            context = ssl.create_default_context(cafile=self._certificates.bundle)
            connection = context.wrap_socket(connection, server_hostname=host)
        self._socket = connection
        self._stream = connection.makefile('rb')
        return connection

    def _close(self) -> None:
        if self._socket is not None:
            self._stream.close()
            self._socket.close()
            self._socket = None


class Listener(socketserver.ThreadingTCPServer):
    """Listens on a port and serves each connection on a thread of its own.

    Arguments:
        port: The port; 0 takes a free one.
        certificates: What to serve HTTPS with; without it, HTTP is served.
        serve: Called with each connection, and an event that is set when the listener closes.
    """

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, certificates: Certificates | None,
                 serve: Callable[[socket.socket, threading.Event], None]) -> None:
        super().__init__((HOST, port), socketserver.BaseRequestHandler)
        self._tls = _tls_context(certificates) if certificates else None
        self._serve = serve
        self._closing = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name='fault-proxy')
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept a connection. Its thread does the TLS handshake: a slow one must not keep others waiting."""
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._connections.add(connection)
        return connection, address

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        """Serve a connection until either side closes it or a rule cuts it."""
        with suppress(OSError, ValueError):  # ValueError: a TLS connection that is closed while it is read
            try:
                self._serve(request, self._closing)
            except Cut as exc:
                if exc.reset:
                    request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                    request.close()

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Close a connection."""
        with self._lock:
            self._connections.discard(request)
        with suppress(OSError):
            socket.socket.shutdown(request, socket.SHUT_WR)
        request.close()

    def close(self) -> None:
        """Close the port, cut every connection, and wait for their threads."""
        self._closing.set()
        self.shutdown()
        self.socket.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):  # of the class: a TLS socket's own would take its state from under its reader
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()
        self._thread.join()


def _tls_context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    return context
