"""The log of a chord: an append blob to which each finished part adds a block.

Append Block is atomic and returns the number of blocks, so that one request both stores and counts a part. A log
whose parts are all there is leased by whoever starts the chord's body, and deleted once the body is on its way.

What may happen to a log, why no part is lost, and when a body may start twice:

* A block is appended twice, since an answer was lost or a part delivered twice: readers take the first record of a
  part and count distinct parts; the number of blocks only says when the log is worth reading.
* A request arrives after its sender has given up on it: a block is one that comes twice, or finds no log; a claim
  carries the ETag that was read, and so never fits another log; a late Create Blob leaves an empty log behind.
* Two workers see the last part: both have read the same log, and a lease is given to one.
* The log grows between read and claim: the claim's ETag does not fit, and the log is read again.
* Someone dies with the lease: it lapses, and whoever waits for it, or reports a part again, gets it.
* Only a complete log is claimed (or a full one, whose chord fails), and a claimed one takes no blocks: a
  worker that cannot append has nothing to add that is missing.
* The lease lapses before the body is out: its holder renews it first, and stops if that fails or takes too long.
* It lapses afterwards, since the service cannot be reached: the holder goes on trying to renew it and to delete the
  log. Whoever finds a lease that has lapsed, or that its part was in the log before, leaves it `GRACE` seconds to do
  so. (A lapsed lease is no more seen once a block is appended; but that block is of a part which came twice.)
* The holder is killed or frozen before it has deleted the log: whoever claims it next starts the body again, under
  the same task id.
"""
from __future__ import annotations

import json
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from azure.core import MatchConditions
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
from azure.storage.blob import BlobClient, BlobLeaseClient, BlobProperties

from celery.utils.log import get_logger

from .client import BlobContainer
from .errors import error_code, is_temporary

__all__ = (
    'Changed', 'ChordLog', 'Claim', 'Content', 'Crowded', 'Full', 'Gone', 'LeaseLost', 'Leased', 'Record',
    'patiently', 'pauses')

T = TypeVar('T')

#: How long the claim of a dead worker keeps others waiting, in seconds. Azure gives 15 to 60 (REST: Lease Blob).
LEASE_DURATION = 20

#: How often a lease is renewed, in seconds, and how soon a renewal that failed is tried again.
RENEW_INTERVAL = 6
RENEW_PAUSE = 1

#: The longest pause between two attempts of an operation that must not fail, in seconds; jitter may add half of it.
LONGEST_PAUSE = 4

#: The same for deleting a log whose body is out, and how long such a request, or a renewal, may take, in seconds.
DELETE_PAUSE = 1
HOLDER_TIMEOUT = 3

#: What others leave to a holder whose lease has lapsed, so that it can do so once the service is back, in seconds.
GRACE = HOLDER_TIMEOUT + 2 * DELETE_PAUSE

#: How long an operation that must not fail is retried, in seconds, so that a short outage loses no chord.
PATIENCE = 300

#: Metadata of a log whose chord's size was not known when it was created.
SIZE = 'chord_size'

#: Every block is padded to one byte more than a multiple of this, so that the offset at which it was appended is,
#: modulo this, the number of blocks before it. Azurite's own count does not do (seen on 3.35): it is taken when a
#: request arrives, and blocks that are appended at the same time, fewer than this, all get the same.
STRIDE = 256

#: What a block holds: the tree of the header, a finished part, the notice of one more part.
TREE, PART, GROWTH = b'T', b'P', b'G'

_FRAME = struct.Struct('>cII')

logger = get_logger(__name__)


class Gone(Exception):
    """There is no log: its chord is done, or it has expired."""


class Leased(Exception):
    """Someone else has claimed the log."""


class LeaseLost(Exception):
    """The claim has lapsed: someone else may hold the log."""


class Changed(Exception):
    """The log has grown since it was read."""


class Full(Exception):
    """The log takes no more blocks; a blob has 50,000 at most (REST: Append Block)."""


class Crowded(Exception):
    """The log takes no block of this size any more: its length is limited."""


#: What the error codes of the service mean for a log (REST: Blob service error codes).
OUTCOMES: dict[str, type[Exception]] = {
    'BlobNotFound': Gone,
    'LeaseIdMissing': Leased,
    'LeaseAlreadyPresent': Leased,
    'LeaseIdMismatchWithBlobOperation': LeaseLost,
    'LeaseIdMismatchWithLeaseOperation': LeaseLost,
    'LeaseLost': LeaseLost,
    'LeaseNotPresentWithBlobOperation': LeaseLost,
    'LeaseNotPresentWithLeaseOperation': LeaseLost,
    'LeaseIsBrokenAndCannotBeRenewed': LeaseLost,
    'ConditionNotMet': Changed,
    'AppendPositionConditionNotMet': Changed,
    'BlockCountExceedsLimit': Full,
    'MaxBlobSizeConditionNotMet': Crowded,
}


#: Keyword arguments of a request that is not waited for any longer.
BRIEFLY: dict[str, Any] = {'connection_timeout': HOLDER_TIMEOUT, 'read_timeout': HOLDER_TIMEOUT}


class Record(NamedTuple):
    """A block of a log.

    Attributes:
        kind: What it is.
        head: What everyone can read of it.
        data: A result, as the backend's serializer wrote it.
    """

    kind: bytes
    head: list[Any]
    data: bytes = b''

    def to_bytes(self) -> bytes:
        """Return the block, padded to its length (see `STRIDE`) with spaces that JSON allows behind the head."""
        head = json.dumps(self.head).encode()
        head += b' ' * ((1 - _FRAME.size - len(head) - len(self.data)) % STRIDE)
        return _FRAME.pack(self.kind, len(head), len(self.data)) + head + self.data


class Content(NamedTuple):
    """What is in a log.

    Attributes:
        records: All its blocks.
        etag: What stands for them.
        lapsed: Whether someone has claimed the log, and neither released nor deleted it in time.
    """

    records: list[Record]
    etag: str
    lapsed: bool


class ChordLog:
    """A chord's append blob, and the blobs of large results that it names.

    Arguments:
        container: Where it is.
        name: The blob's name.
    """

    def __init__(self, container: BlobContainer, name: str) -> None:
        self.name = name
        self._container = container

    def create(self, first: Record | None = None) -> None:
        """Create the log if it is not there; put `first` first. One or two requests.

        A log that exists is kept: the step that makes the chord was delivered again, and parts may be there.
        """
        try:
            self._call(
                lambda blob: blob.create_append_blob(match_condition=MatchConditions.IfMissing), creating=True)
        except (Changed, Leased):
            pass
        except HttpResponseError as exc:
            if error_code(exc) != 'BlobAlreadyExists':
                raise
        if first is not None:
            with suppress(Changed, Gone, Leased):  # another delivery of the same step has put it there
                self._append(first.to_bytes(), appendpos_condition=0)

    def append(self, block: bytes, limit: int | None = None) -> int:
        """Add a block, and return its number: how many there are, up to this one. One request.

        Arguments:
            block: What to add.
            limit: How long the log may become, in bytes.

        Raises:
            Crowded: if it would become longer.
            Full: if the log takes no more.
            Gone: if there is no log.
            Leased: if all parts are there and someone is about to start the body.
        """
        return self._append(block, once=True, maxsize_condition=limit)

    def _append(self, block: bytes, once: bool = False, **conditions: Any) -> int:
        answer = self._call(lambda blob, **options: blob.append_block(block, **conditions, **options), once=once)
        count, before = int(answer['blob_committed_block_count']), int(answer['blob_append_offset'])
        return count + (before + 1 - count) % STRIDE

    def read(self) -> Content:
        """Return what is in the log. One request.

        Raises:
            Gone: if there is no log.
        """
        def download(blob: BlobClient, **options: Any) -> Content:
            stream = blob.download_blob(**options)
            records = list(_records(stream.readall()))
            return Content(records, stream.properties.etag or '', _has_lapsed(stream.properties))

        return self._call(download, once=True)

    def wait_for_lease(self, pause: Callable[[], None]) -> bool:
        """Wait until the log is not leased any more, and return whether the lease has lapsed. A request each time.

        Arguments:
            pause: Called before each request.

        Raises:
            Gone: if there is no log.
        """
        while True:
            pause()
            properties = self._read_properties()
            if properties.lease.state != 'leased':
                return _has_lapsed(properties)

    def size(self) -> int | None:
        """Return the chord's size, if it was written since. One request.

        Raises:
            Gone: if there is no log.
        """
        size = self._read_properties().metadata.get(SIZE)
        return None if size is None else int(size)

    def set_size(self, size: int) -> None:
        """Write the chord's size. One request.

        Raises:
            Gone: if there is no log.
            Leased: if the chord is complete, so that its size is known.
        """
        self._call(lambda blob: blob.set_blob_metadata({SIZE: str(size)}))

    def store_payload(self, data: bytes, content_type: str) -> str:
        """Store a result that is too large for a block, and return the name of its blob. One request."""
        name = f'{self.name}.{uuid4()}'
        self._container.write(name, data, content_type)
        return name

    def claim(self, etag: str, lease_id: str) -> Claim:
        """Lease the log. One request.

        Arguments:
            etag: What was read: nothing else is leased.
            lease_id: A new id; or that of a claim without an answer, so that it finds its own lease.

        Raises:
            Changed: if the log has grown since.
            Gone: if there is no log.
            Leased: if someone else has it.
        """
        self._call(lambda blob, **options: BlobLeaseClient(blob, lease_id).acquire(
            LEASE_DURATION, etag=etag, match_condition=MatchConditions.IfNotModified, **options), once=True)
        return Claim(self, lease_id)

    def delete(self, lease_id: str, etag: str) -> None:
        """Delete the log. One request, or two where the lease has lapsed.

        Arguments:
            lease_id: The lease on it.
            etag: What was read under that lease; without the lease, nothing else is deleted.

        Raises:
            Changed, Gone, Leased: if the lease has lapsed and the log has changed, is gone, or is claimed again.
        """
        try:
            self._call(lambda blob, **options: blob.delete_blob(lease=lease_id, **BRIEFLY, **options), once=True)
        except LeaseLost:
            self._call(lambda blob, **options: blob.delete_blob(
                etag=etag, match_condition=MatchConditions.IfNotModified, **BRIEFLY, **options), once=True)

    def renew(self, lease_id: str, once: bool = False) -> None:
        """Renew a lease. One request.

        Arguments:
            lease_id: Id of the lease.
            once: Do not repeat the request, nor wait long for its answer.

        Raises:
            LeaseLost: if it has lapsed and someone else holds the log, or nobody.
        """
        limits: dict[str, Any] = BRIEFLY if once else {}
        self._call(lambda blob, **options: BlobLeaseClient(blob, lease_id).renew(**limits, **options), once=once)

    def release(self, lease_id: str) -> None:
        """End a lease. One request."""
        self._call(lambda blob: BlobLeaseClient(blob, lease_id).release())

    def _read_properties(self) -> BlobProperties:
        return self._call(lambda blob, **options: blob.get_blob_properties(**options), once=True)

    def _call(self, request: Callable[..., T], creating: bool = False, once: bool = False) -> T:
        try:
            return self._container.call(self.name, request, creating, once)
        except HttpResponseError as exc:
            outcome = OUTCOMES.get(error_code(exc))
            if outcome is None:
                raise
            raise outcome(self.name) from exc


class Claim:
    """The lease on a complete log. A thread renews it until it is released or the log is deleted.

    Arguments:
        log: The log.
        lease_id: Id of the lease.
    """

    def __init__(self, log: ChordLog, lease_id: str) -> None:
        self._log = log
        self._lease_id = lease_id
        self._ended = threading.Event()
        self._deleted = False
        self._renewer = threading.Thread(target=self._renew_repeatedly, name='azureblockblob-lease', daemon=True)

    def renew(self) -> None:
        """Make sure of the lease for some more seconds.

        Raises:
            LeaseLost: if someone else may hold the log.
        """
        begun = time.monotonic()
        try:
            self._log.renew(self._lease_id)
        except (Gone, Leased) as exc:
            raise LeaseLost(self._log.name) from exc
        if time.monotonic() - begun > LEASE_DURATION / 2:
            raise LeaseLost(self._log.name)  # an answer that comes so late may be out of date

    def delete_log(self, etag: str) -> None:
        """Delete the log: the chord is over.

        Arguments:
            etag: What was read under this claim.

        Raises:
            Changed: if the claim has lapsed, and the log has grown or is another one.
            Leased: if the claim has lapsed, and someone else has claimed the log.
            azure.core.exceptions.AzureError: if the log cannot be deleted for `PATIENCE` seconds, or for good.
        """
        self._deleted = True
        with suppress(Gone):  # an earlier attempt has done it
            patiently(lambda: self._log.delete(self._lease_id, etag), DELETE_PAUSE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the lease within the block, and release it behind it unless the log is deleted."""
        try:
            self._renewer.start()
        except RuntimeError as exc:  # the process can have no more threads: the lease holds for its first term only
            logger.warning('The claim on the chord log %s is not renewed: %r', self._log.name, exc)
        try:
            yield
        finally:
            self._ended.set()
            if self._renewer.is_alive():
                self._renewer.join()
            if not self._deleted:
                self._release()

    def _release(self) -> None:
        try:
            self._log.release(self._lease_id)
        except (AzureError, Gone, Leased, LeaseLost) as exc:
            logger.warning('The claim on the chord log %s was not released, and lapses: %r', self._log.name, exc)

    def _renew_repeatedly(self) -> None:
        pause = RENEW_INTERVAL
        while not self._ended.wait(pause):
            try:
                self._log.renew(self._lease_id, once=True)
                pause = RENEW_INTERVAL
            except (Gone, Leased, LeaseLost):
                return
            except AzureError as exc:
                logger.warning('The claim on the chord log %s could not be renewed: %r', self._log.name, exc)
                pause = RENEW_PAUSE


def pauses(longest: float = LONGEST_PAUSE) -> Iterator[float]:
    """Yield growing pauses, in seconds and with jitter, that fill `PATIENCE` seconds.

    Arguments:
        longest: Where they stop growing, in seconds.
    """
    deadline = time.monotonic() + PATIENCE
    pause = 0.5
    while time.monotonic() < deadline:
        yield pause * random.uniform(0.5, 1.5)
        pause = min(2 * pause, longest)


def patiently(operation: Callable[[], T], longest: float = LONGEST_PAUSE) -> T:
    """Return what `operation` returns; repeat it while the service, or a token for it, is unavailable.

    Arguments:
        operation: What to do.
        longest: See `pauses`.

    Raises:
        azure.core.exceptions.AzureError: after `PATIENCE` seconds, or at once if waiting does not help.
    """
    for pause in pauses(longest):
        try:
            return operation()
        except AzureError as exc:
            if not is_temporary(exc) and not isinstance(exc, ClientAuthenticationError):
                raise
            logger.warning('Azure Blob Storage does not answer; trying again: %r', exc)
        time.sleep(pause)
    return operation()


def _has_lapsed(properties: BlobProperties) -> bool:
    return properties.lease.state == 'expired'


def _records(data: bytes) -> Iterator[Record]:
    view = memoryview(data)
    while view:
        kind, head, length = _FRAME.unpack_from(view)
        end = _FRAME.size + head
        yield Record(kind, json.loads(bytes(view[_FRAME.size:end])), bytes(view[end:end + length]))
        view = view[end + length:]
