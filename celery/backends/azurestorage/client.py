"""One client per process, account and identity: its connections, its token, its threads."""
from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from queue import Queue
from typing import Any, NamedTuple, TypeVar

import requests
from azure.core import MatchConditions
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import AzureError, DecodeError, HttpResponseError, ResourceNotFoundError
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import (
    BlobServiceClient,
    ContainerClient,
    ContentSettings,
    ExponentialRetry,
    PartialBatchErrorException,
)
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies

from celery import __version__ as celery_version
from celery.utils.functional import LRUCache
from celery.utils.log import get_logger

from .credentials import TokenError, build_credential
from .errors import (
    CONTAINER_BEING_DELETED,
    ROLE_NEEDED,
    Identity,
    error_code,
    explain,
    hide,
    is_temporary,
    mask_signatures,
)
from .url import BackendURL

__all__ = ('Blob', 'BlobContainer', 'Conflict', 'close_clients', 'get_container')

T = TypeVar('T')
R = TypeVar('R')

#: The largest blob that one request writes (REST: Put Blob, service version 2019-12-12 and later), in bytes.
MAX_SINGLE_PUT = 5000 * 1024 * 1024

#: Codes of a write whose condition does not hold; absence, when it is the condition, has one of its own.
CONFLICT_CODES = frozenset({'BlobAlreadyExists', 'ConditionNotMet'})

#: Codes for what is not there. A 404 with another code, or none, does not come from the account's blob service.
NOT_FOUND_CODES = frozenset({'BlobNotFound', 'ContainerNotFound'})

#: Settings that belong to the client, so that backends which differ in one of these do not share it.
CLIENT_SETTINGS = (
    'connection_timeout', 'read_timeout', 'retry_initial_backoff_sec', 'retry_increment_base', 'retry_max_attempts',
    'max_concurrency')

#: How many idle connections are kept at least: a worker may run more tasks in threads than `max_concurrency`, and
#: urllib3 warns of each connection that it has no place for.
CONNECTIONS_KEPT = 100

#: How many ETags of unfinished states a process remembers, so that the next state is written without a read.
UNFINISHED_KEPT = 1000

logger = get_logger(__name__)

#: Where the SDK logs each request, 48 lines for one stored result. Set its level to INFO to see them.
request_logger = get_logger(f'{__name__}.requests')
if request_logger.level == logging.NOTSET:
    request_logger.setLevel(logging.WARNING)


class Conflict(Exception):
    """The condition of a write does not hold: someone else has written the blob."""


class Blob(NamedTuple):
    """Content of a blob, and the ETag that stands for this very content."""

    data: bytes
    etag: str


class BlobItem(NamedTuple):
    """A blob as it is listed."""

    name: str
    etag: str
    last_modified: datetime


class _Clients:
    """The clients of this process. A fork leaves them to the parent, whose sockets they hold."""

    def __init__(self) -> None:
        self.by_key: dict[Any, AccountClient] = {}
        self._locks: dict[Any, threading.Lock] = {}

    def get(self, url: BackendURL, settings: Mapping[str, Any]) -> AccountClient:
        """Return the client of an account and identity. The lock is its own: a credential may take long to build."""
        key = _client_key(url, settings)
        account = self.by_key.get(key)
        if account is None:
            with self._locks.setdefault(key, threading.Lock()):
                account = self.by_key.get(key)
                if account is None:
                    account = self.by_key[key] = AccountClient(url, settings)
        return account

    def close(self) -> None:
        """Close all of them."""
        for key in list(self.by_key):
            self.by_key.pop(key).close()


_clients = _Clients()

#: The clients of the processes that this one was forked from. They are kept, since a thread may have held a lock of
#: theirs at the fork: whoever frees them (urllib3 closes its pools then) could wait for that lock for ever.
_inherited: list[_Clients] = []


def _forget_clients() -> None:
    global _clients
    _inherited.append(_clients)
    _clients = _Clients()


if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(after_in_child=_forget_clients)


def get_container(url: BackendURL, settings: Mapping[str, Any]) -> BlobContainer:
    """Return the container of a backend, on the client that this process shares.

    Arguments:
        url: The backend's URL.
        settings: All settings of the backend.

    Raises:
        celery.exceptions.ImproperlyConfigured: if the credential cannot be built.
    """
    return _clients.get(url, settings).container(settings['container_name'])


def close_clients() -> None:
    """Close all clients of this process: connections, credentials, threads. The next use builds anew."""
    _clients.close()


def _client_key(url: BackendURL, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    configured = settings['credential']
    return (
        url.account_url, url.account_name, url.account_key, url.sas, url.credential, *sorted(url.options.items()),
        configured if isinstance(configured, str) else id(configured), *(settings[name] for name in CLIENT_SETTINGS))


class AccountClient:
    """What a process shares for an account and an identity.

    Arguments:
        url: The backend's URL.
        settings: All settings of the backend.
    """

    def __init__(self, url: BackendURL, settings: Mapping[str, Any]) -> None:
        self.identity = _describe(url, settings['credential'])
        self.max_attempts: int = settings['retry_max_attempts']
        self.retry_policy = _retry_policy(settings)
        self._configured = settings['credential']  # kept alive: its id is in the key
        self._credential = None if url.account_key or url.sas else build_credential(
            url, self._configured, request_logger, settings['read_timeout'])
        self._service = _build_service(url, settings, self._credential, self.retry_policy)
        self._containers: dict[str, BlobContainer] = {}
        self._max_concurrency: int = settings['max_concurrency']
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        if url.sas:
            _mask_signatures_in_logs()

    def container(self, name: str) -> BlobContainer:
        """Return a container of the account."""
        container = self._containers.get(name)
        if container is None:
            container = self._containers.setdefault(
                name, BlobContainer(self, self._service.get_container_client(name)))
        return container

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Call `function` with each of `items`, `max_concurrency` at a time, and return what it gave, in order.

        The first error ends the call: what has not begun by then never does.
        """
        items = list(items)
        if len(items) < 2 or self._max_concurrency == 1:
            return [function(item) for item in items]
        threads = self._threads()
        futures: list[Future[R]] = []
        try:
            futures.extend(threads.submit(function, item) for item in items)
        except RuntimeError:  # the process can have no more threads
            for future in futures:
                future.cancel()
            return [function(item) for item in items]
        ended: Queue[Future[R]] = Queue()
        for future in futures:
            future.add_done_callback(ended.put)
        try:
            for _ in futures:
                ended.get().result()  # in the order in which they end, so that no error waits for a slow answer
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def pause(self, attempt: int) -> None:
        """Wait before a further attempt, as long as the SDK would."""
        time.sleep(self.retry_policy.get_backoff_time({'count': attempt}))

    def close(self) -> None:
        """Close connections, credential and threads."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor:
            executor.shutdown(cancel_futures=True)
        self._service.close()
        if self._credential:
            self._credential.close()

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._max_concurrency, 'azureblockblob')
            return self._executor


class BlobContainer:
    """The few things that results need of a container.

    Reads take a missing container for an empty one; a write makes it. It is not made in advance: that would be a
    request for each process, and fail for an identity whose role is scoped to the container.

    Arguments:
        account: The client that this process shares.
        client: The SDK's client of the container.

    Attributes:
        unfinished: ETags of unfinished states that this process wrote, by blob name: the next write needs no read.
    """

    def __init__(self, account: AccountClient, client: ContainerClient) -> None:
        self.account = account
        self.unfinished: LRUCache = LRUCache(limit=UNFINISHED_KEPT)
        self._client = client
        self._place = client.primary_endpoint.partition('?')[0]

    def read(self, name: str) -> Blob | None:
        """Return a blob, or None if there is none. One request (REST: Get Blob)."""
        def download() -> Blob | None:
            try:
                stream = self._client.get_blob_client(name).download_blob()
                return Blob(stream.readall(), stream.properties.etag or '')
            except ResourceNotFoundError as exc:
                if error_code(exc) in NOT_FOUND_CODES:
                    return None
                raise
            except ValueError as exc:  # the SDK, on an answer without the headers of a blob
                raise DecodeError(str(exc)) from exc
        return self._run(download)

    def write(self, name: str, data: bytes, content_type: str, etag: str | None = None, new: bool = False) -> str:
        """Store a blob and return its ETag. One request (REST: Put Blob) up to `MAX_SINGLE_PUT` bytes.

        Arguments:
            name: The blob's name.
            data: Its content.
            content_type: Its media type.
            etag: Only replace the content that this ETag stands for.
            new: Only write if there is no such blob.

        Raises:
            Conflict: if the condition does not hold.
        """
        conditions: dict[str, Any] = {}
        if new:
            conditions = {'match_condition': MatchConditions.IfMissing}
        elif etag:
            conditions = {'match_condition': MatchConditions.IfNotModified, 'etag': etag}

        def upload() -> str:
            try:
                return self._client.get_blob_client(name).upload_blob(
                    data, overwrite=True, content_settings=ContentSettings(content_type=content_type),
                    **conditions)['etag']
            except HttpResponseError as exc:
                if error_code(exc) in CONFLICT_CODES:
                    raise Conflict(name) from exc
                raise
        return self._run(upload, creating=True)

    def delete(self, name: str) -> None:
        """Delete a blob, if it is there. One request (REST: Delete Blob)."""
        def delete() -> None:
            try:
                self._client.get_blob_client(name).delete_blob()
            except ResourceNotFoundError as exc:
                if error_code(exc) not in NOT_FOUND_CODES:
                    raise
        self._run(delete)

    def list_blobs(self, prefix: str) -> Iterator[BlobItem]:
        """Yield the blobs whose names begin with `prefix`. One request for 5,000 (REST: List Blobs)."""
        pages = self._client.list_blobs(name_starts_with=prefix).by_page()
        while page := self._run(lambda: _next_page(pages)):
            yield from page

    def delete_many(self, items: Sequence[BlobItem]) -> int:
        """Delete blobs that are still what was listed; return how many. One request (REST: Blob Batch).

        Arguments:
            items: At most 256 blobs.
        """
        blobs = [{'name': item.name, 'etag': f'"{item.etag}"'} for item in items]

        def delete() -> int:
            answers = list(self._client.delete_blobs(*blobs, raise_on_any_failure=False))
            failed = [answer for answer in answers if answer.status_code not in (202, 404, 412)]
            if failed:
                raise PartialBatchErrorException('Some blobs were not deleted.', failed[0], failed)
            return sum(answer.status_code == 202 for answer in answers)
        return self._run(delete)

    def call(self, name: str, request: Callable[..., R], creating: bool = False, once: bool = False) -> R:
        """Send a request about a blob.

        Arguments:
            name: The blob's name.
            request: Called with the SDK's client of the blob, and with keyword arguments for what it calls there.
            creating: Whether to make the container if it is missing.
            once: Raise at once what is raised, in place of repeating the request.
        """
        if once:
            with self._explained():
                return request(self._client.get_blob_client(name), retry_total=0)
        return self._run(lambda: request(self._client.get_blob_client(name)), creating)

    def _run(self, request: Callable[[], R], creating: bool = False) -> R:
        """Send a request, again where the SDK gives up too early, and the container made where that is missing."""
        with self._explained():
            try:
                return self._repeat(request)
            except ResourceNotFoundError as exc:
                if not creating or error_code(exc) != 'ContainerNotFound':
                    raise
            self._repeat(self._create)
            return self._repeat(request)

    def _repeat(self, request: Callable[[], R]) -> R:
        """Send a request, again after answers that are temporary though the SDK does not repeat them."""
        for attempt in range(1, self.account.max_attempts + 1):
            try:
                return request()
            except HttpResponseError as exc:
                if exc.status_code != 429 and error_code(exc) != CONTAINER_BEING_DELETED:
                    raise
                self.account.pause(attempt)
        return request()

    def _create(self) -> None:
        try:
            self._client.create_container()
        except HttpResponseError as exc:
            if error_code(exc) != 'ContainerAlreadyExists':
                raise
        else:
            logger.info('Created the container %s.', self._place)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        handled = sys.exc_info()[1]  # Celery stores a task's failure while it handles that task's exception
        try:
            yield
        except (AzureError, TokenError) as exc:
            hide(exc, handled)
            told = explain(exc, self.account.identity, self._place)
            if told is None:
                raise
            raise told from (exc.__cause__ if isinstance(exc, TokenError) else exc)


def _next_page(pages: Iterator[Iterator[Any]]) -> list[BlobItem]:
    """Return the next blobs of a listing, or none behind the last and in a container that is not there."""
    try:
        # A page may be empty and not the last.
        for page in pages:
            items = [BlobItem(blob.name, blob.etag.strip('"'), blob.last_modified) for blob in page]
            if items:
                return items
    except ResourceNotFoundError as exc:
        if error_code(exc) not in NOT_FOUND_CODES:
            raise
    return []


def _build_service(
    url: BackendURL, settings: Mapping[str, Any], credential: Any, retry_policy: ExponentialRetry,
) -> BlobServiceClient:
    if url.account_key:
        credential = {'account_name': url.account_name, 'account_key': url.account_key}
    elif url.sas:
        credential = AzureSasCredential(url.sas)  # the SDK would decode and encode text
    timeouts = {name: settings[name] for name in ('connection_timeout', 'read_timeout')}
    return BlobServiceClient(
        url.account_url,
        credential=credential,
        transport=_build_transport(url.account_url, settings['max_concurrency'], timeouts),
        retry_policy=retry_policy,
        max_single_put_size=MAX_SINGLE_PUT,
        max_single_get_size=MAX_SINGLE_PUT,
        user_agent=f'celery/{celery_version}',
        logger=request_logger,
    )


def _build_transport(account_url: str, connections: int, timeouts: Mapping[str, float]) -> RequestsTransport:
    """Return a transport that reads proxies and authorities from the environment once, not for each request."""
    session = requests.Session()
    session.trust_env = False
    session.proxies = get_environ_proxies(account_url)
    for prefix in ('https://', 'http://'):
        session.mount(prefix, HTTPAdapter(pool_maxsize=max(connections, CONNECTIONS_KEPT)))
    authorities = os.environ.get('REQUESTS_CA_BUNDLE') or os.environ.get('CURL_CA_BUNDLE') or True
    return RequestsTransport(session=session, connection_verify=authorities, **timeouts)


class _RetryPolicy(ExponentialRetry):
    """The SDK's policy, but it gives up at once where no further attempt can help, as with a wrong certificate."""

    def increment(
        self, settings: dict[str, Any], request: Any, response: Any = None, error: AzureError | None = None,
    ) -> bool:
        if error is not None and not is_temporary(error):
            return False
        again = super().increment(settings, request, response, error)
        if again and response is not None:
            response.internal_response.close()  # nobody reads it, and it holds a connection
        return again


def _retry_policy(settings: Mapping[str, Any]) -> ExponentialRetry:
    attempts = settings['retry_max_attempts']
    backoff = settings['retry_initial_backoff_sec']
    return _RetryPolicy(
        initial_backoff=backoff,
        increment_base=settings['retry_increment_base'],
        random_jitter_range=backoff / 2,
        retry_total=attempts, retry_connect=attempts, retry_read=attempts, retry_status=attempts)


def _describe(url: BackendURL, configured: Any) -> Identity:
    if url.account_key:
        return Identity(f'The key of the account {url.account_name}',
                        'The account must allow access with its keys, and this must be one of them')
    if url.sas:
        return Identity('The shared access signature', 'It needs all permissions on blobs (racwdl)')
    name = url.credential
    options = ', '.join(f'{name}={value}' for name, value in url.options.items())
    if not name:
        name = 'azureblockblob_credential'
        options = configured if isinstance(configured, str) else type(configured).__name__
    return Identity(f'{name} ({options})' if options else name, ROLE_NEEDED)


class _SignatureFilter(logging.Filter):
    """Masks the signature in the URLs that urllib3 logs at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(mask_signatures(arg) for arg in record.args)
        return True


def _mask_signatures_in_logs() -> None:
    urllib3_logger = logging.getLogger('urllib3.connectionpool')
    if not any(isinstance(present, _SignatureFilter) for present in urllib3_logger.filters):
        urllib3_logger.addFilter(_SignatureFilter())
