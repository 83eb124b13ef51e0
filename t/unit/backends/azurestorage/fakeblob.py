"""An Azure Blob service in memory: what results and chords need of it, with Azure's own statuses and error codes.

Facts are those of the Blob service REST reference. What the fake does not know raises :exc:`NotImplementedError`.
"""
from __future__ import annotations

import email
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from itertools import count
from xml.etree import ElementTree

from .fakehttp import Answer, FakeServer, Refusal, Request

#: A deleted container's name is taken for so long, in seconds (REST: Delete Container).
CONTAINER_DELETION = 30

#: Blobs in one answer to List Blobs, and requests in one Blob Batch.
MAX_RESULTS = 5000
MAX_BATCH = 256

#: Conditions that the fake does not judge, and so must not ignore.
UNKNOWN_CONDITIONS = ('If-Modified-Since', 'If-Unmodified-Since', 'x-ms-if-tags')


@dataclass
class Lease:
    """A lease on a blob, which lasts `duration` seconds, until `ends`."""

    id: str
    duration: float
    ends: float
    broken: bool = False

    def state(self, now: float) -> str:
        """Return the state as the REST reference names it."""
        if now < self.ends:
            return 'breaking' if self.broken else 'leased'
        return 'broken' if self.broken else 'expired'

    def locks(self, now: float) -> bool:
        """Tell whether writes need the lease's id."""
        return now < self.ends


@dataclass
class StoredBlob:
    """A blob. `modified` and `created` are seconds since the epoch, `blocks` counts what was appended."""

    kind: str
    data: bytearray
    content_type: str
    metadata: dict[str, str]
    created: float
    modified: float
    etag: str = ''
    blocks: int = 0
    lease: Lease | None = None


@dataclass
class StoredContainer:
    """A container; `gone` is when a deleted one's name is free again."""

    blobs: dict[str, StoredBlob] = field(default_factory=dict)
    staged: dict[tuple[str, str], bytes] = field(default_factory=dict)
    gone: float | None = None


class FakeBlobService(FakeServer):
    """An account of the Blob service. One request is done at a time, as a whole.

    Attributes:
        now: The service's clock, in seconds since the epoch. It stands still unless a test moves it.
        containers: What is stored.
        max_blocks: How many blocks an append blob takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = time.time()
        self.containers: dict[str, StoredContainer] = {}
        self.max_blocks = 50_000
        self._etags = count(0x8DE000000000000)
        self._state = threading.RLock()

    def handle(self, request: Request) -> Answer:
        """Do what a request asks for."""
        if any(condition in request.headers for condition in UNKNOWN_CONDITIONS):
            raise NotImplementedError('The fake does not know this condition')
        operation: Callable[[Request], Answer] = getattr(self, '_' + request.operation.lower().replace(' ', '_'))
        with self._state:
            return operation(request)

    # Containers

    def _create_container(self, request: Request) -> Answer:
        there = self.containers.get(request.container)
        gone = there.gone if there else 0
        if gone is None:
            raise Refusal(409, 'ContainerAlreadyExists')
        if self.now < gone:
            raise Refusal(409, 'ContainerBeingDeleted')
        self.containers[request.container] = StoredContainer()
        return Answer(201, {'ETag': self._new_etag(), 'Last-Modified': _date(self.now)})

    def _get_container_properties(self, request: Request) -> Answer:
        self._container(request)
        return Answer(200)

    def _delete_container(self, request: Request) -> Answer:
        self._container(request).gone = self.now + CONTAINER_DELETION
        return Answer(202)

    def _list_blobs(self, request: Request) -> Answer:
        if 'delimiter' in request.query:
            raise NotImplementedError('The fake lists no hierarchy')
        blobs = self._container(request).blobs
        prefix, marker = request.query.get('prefix', ''), request.query.get('marker', '')
        names = sorted(name for name in blobs if name.startswith(prefix) and name >= marker)
        limit = int(request.query.get('maxresults', MAX_RESULTS))
        listing = ElementTree.Element('EnumerationResults', ContainerName=request.container)
        _element(listing, 'Prefix', prefix)
        entries = ElementTree.SubElement(listing, 'Blobs')
        for name in names[:limit]:
            self._describe(ElementTree.SubElement(entries, 'Blob'), name, blobs[name],
                           'metadata' in request.query.get('include', '').split(','))
        _element(listing, 'NextMarker', names[limit] if len(names) > limit else '')
        return Answer(200, {'Content-Type': 'application/xml'}, ElementTree.tostring(listing, 'utf-8'))

    def _describe(self, entry: ElementTree.Element, name: str, blob: StoredBlob, with_metadata: bool) -> None:
        _element(entry, 'Name', name)
        properties = ElementTree.SubElement(entry, 'Properties')
        _element(properties, 'Creation-Time', _date(blob.created))
        _element(properties, 'Last-Modified', _date(blob.modified))
        _element(properties, 'Etag', blob.etag.strip('"'))  # a listing has them without quotes
        _element(properties, 'Content-Length', str(len(blob.data)))
        _element(properties, 'Content-Type', blob.content_type)
        _element(properties, 'BlobType', blob.kind)
        _element(properties, 'LeaseState', self._lease_state(blob))
        if with_metadata:
            metadata = ElementTree.SubElement(entry, 'Metadata')
            for key, value in blob.metadata.items():
                _element(metadata, key, value)

    def _blob_batch(self, request: Request) -> Answer:
        self._container(request)
        parts = _split_batch(request)
        if len(parts) > MAX_BATCH:
            raise Refusal(400, 'ExceedsMaxBatchRequestCount')
        return _join_batch([(content_id, self.answer(part)) for content_id, part in parts])

    # Blobs

    def _put_blob(self, request: Request) -> Answer:
        return self._replace(request, request.headers['x-ms-blob-type'], request.body)

    def _put_block(self, request: Request) -> Answer:
        self._container(request).staged[request.blob, request.query['blockid']] = request.body
        return Answer(201)

    def _put_block_list(self, request: Request) -> Answer:
        staged = self._container(request).staged
        names = [(request.blob, element.text or '') for element in ElementTree.fromstring(request.body)]
        if any(name not in staged for name in names):
            raise Refusal(400, 'InvalidBlockList')
        answer = self._replace(request, 'BlockBlob', b''.join(staged[name] for name in names))
        for name in [name for name in staged if name[0] == request.blob]:
            del staged[name]
        return answer

    def _replace(self, request: Request, kind: str, data: bytes) -> Answer:
        blobs = self._container(request).blobs
        old = blobs.get(request.blob)
        self._check_conditions(request, old)
        if old:
            self._check_lease(request, old)
        content_type = request.headers.get('x-ms-blob-content-type') or 'application/octet-stream'
        blob = blobs[request.blob] = StoredBlob(
            kind, bytearray(data), content_type, _metadata(request), old.created if old else self.now, self.now,
            lease=old.lease if old else None)
        return self._written(blob, 201)

    def _append_block(self, request: Request) -> Answer:
        blob = self._blob_to_write(request)
        offset = len(blob.data)
        if blob.kind != 'AppendBlob':
            raise Refusal(409, 'InvalidBlobType')
        if int(request.headers.get('x-ms-blob-condition-appendpos', offset)) != offset:
            raise Refusal(412, 'AppendPositionConditionNotMet')
        if offset + len(request.body) > float(request.headers.get('x-ms-blob-condition-maxsize', math.inf)):
            raise Refusal(412, 'MaxBlobSizeConditionNotMet')
        if blob.blocks >= self.max_blocks:
            raise Refusal(409, 'BlockCountExceedsLimit')
        blob.data += request.body
        blob.blocks += 1
        return self._written(blob, 201, **{
            'x-ms-blob-append-offset': str(offset), 'x-ms-blob-committed-block-count': str(blob.blocks)})

    def _set_blob_metadata(self, request: Request) -> Answer:
        blob = self._blob_to_write(request)
        blob.metadata = _metadata(request)
        return self._written(blob, 200)

    def _delete_blob(self, request: Request) -> Answer:
        self._blob_to_write(request)
        del self._container(request).blobs[request.blob]
        return Answer(202)

    def _get_blob(self, request: Request) -> Answer:
        blob = self._blob_to_read(request)
        wanted = request.headers.get('x-ms-range') or request.headers.get('Range')
        if not wanted:
            return Answer(200, self._properties(blob), bytes(blob.data))
        first, _, last = wanted.removeprefix('bytes=').partition('-')
        start, end = int(first), min(int(last or len(blob.data)), len(blob.data) - 1)
        if start >= len(blob.data):
            raise Refusal(416, 'InvalidRange', **{'Content-Range': f'bytes */{len(blob.data)}'})
        properties = {**self._properties(blob), 'Content-Range': f'bytes {start}-{end}/{len(blob.data)}'}
        return Answer(206, properties, bytes(blob.data[start:end + 1]))

    def _get_blob_properties(self, request: Request) -> Answer:
        blob = self._blob_to_read(request)
        return Answer(200, {**self._properties(blob), 'Content-Length': str(len(blob.data))})

    # Leases

    def _lease_blob(self, request: Request) -> Answer:
        blob = self._blob(request)
        self._check_conditions(request, blob)
        lease = self._changed_lease(request, blob.lease)
        headers = {'ETag': blob.etag, 'Last-Modified': _date(blob.modified)}
        action = request.headers['x-ms-lease-action']
        if action == 'release':
            blob.lease = None
            return Answer(200, headers)
        blob.lease = lease
        if action == 'break':
            return Answer(202, {**headers, 'x-ms-lease-time': str(max(0, math.ceil(lease.ends - self.now)))})
        return Answer(201 if action == 'acquire' else 200, {**headers, 'x-ms-lease-id': lease.id})

    def _changed_lease(self, request: Request, lease: Lease | None) -> Lease:
        """Return what becomes of a lease (REST: Lease Blob, outcomes by lease state)."""
        action = request.headers['x-ms-lease-action']
        if action == 'acquire':
            return self._acquired(request, lease)
        if action == 'break':
            return self._broken(request, lease)
        if lease is None or lease.id != request.headers['x-ms-lease-id']:
            raise Refusal(409, 'LeaseIdMismatchWithLeaseOperation')
        if action == 'renew' and lease.broken:
            raise Refusal(409, 'LeaseIsBrokenAndCannotBeRenewed')
        if action not in ('renew', 'release'):
            raise NotImplementedError(f'The fake cannot {action} a lease')
        return Lease(lease.id, lease.duration, self.now + lease.duration)

    def _acquired(self, request: Request, lease: Lease | None) -> Lease:
        wanted = request.headers.get('x-ms-proposed-lease-id') or str(uuid.uuid4())
        seconds = int(request.headers['x-ms-lease-duration'])
        if lease and lease.locks(self.now) and (lease.broken or lease.id != wanted):
            own = lease.broken and lease.id == wanted
            raise Refusal(409, 'LeaseIsBreakingAndCannotBeAcquired' if own else 'LeaseAlreadyPresent')
        if seconds != -1 and not 15 <= seconds <= 60:
            raise Refusal(400, 'InvalidHeaderValue')
        duration = math.inf if seconds == -1 else seconds
        return Lease(wanted, duration, self.now + duration)

    def _broken(self, request: Request, lease: Lease | None) -> Lease:
        if lease is None:
            raise Refusal(409, 'LeaseNotPresentWithLeaseOperation')
        left = max(0.0, lease.ends - self.now)
        default = 0 if math.isinf(left) else left
        period = min(left, float(request.headers.get('x-ms-lease-break-period', default)))
        return Lease(lease.id, lease.duration, self.now + period, broken=True)

    def _lease_state(self, blob: StoredBlob) -> str:
        return blob.lease.state(self.now) if blob.lease else 'available'

    # What operations share

    def _container(self, request: Request) -> StoredContainer:
        container = self.containers.get(request.container)
        if container is None or container.gone is not None:
            raise Refusal(404, 'ContainerNotFound')
        return container

    def _blob(self, request: Request) -> StoredBlob:
        blob = self._container(request).blobs.get(request.blob)
        if blob is None:
            raise Refusal(404, 'BlobNotFound')
        return blob

    def _blob_to_read(self, request: Request) -> StoredBlob:
        blob = self._blob(request)
        self._check_conditions(request, blob)
        return blob

    def _blob_to_write(self, request: Request) -> StoredBlob:
        blob = self._blob(request)
        self._check_conditions(request, blob)
        self._check_lease(request, blob)
        return blob

    def _check_conditions(self, request: Request, blob: StoredBlob | None) -> None:
        """Judge If-Match and If-None-Match (REST: Specifying conditional headers for Blob service operations)."""
        match, none_match = request.headers.get('If-Match'), request.headers.get('If-None-Match')
        if match and (blob is None or not _same(match, blob.etag)):
            raise Refusal(412, 'ConditionNotMet')
        if none_match and blob and _same(none_match, blob.etag):
            if request.method in ('GET', 'HEAD'):
                raise Refusal(304, 'ConditionNotMet')
            if none_match == '*':
                raise Refusal(409, 'BlobAlreadyExists')
            raise Refusal(412, 'ConditionNotMet')

    def _check_lease(self, request: Request, blob: StoredBlob) -> None:
        """Judge a write against the blob's lease, which ends with it unless it still holds."""
        given = request.headers.get('x-ms-lease-id')
        if blob.lease and blob.lease.locks(self.now):
            if not given:
                raise Refusal(412, 'LeaseIdMissing')
            if given != blob.lease.id:
                raise Refusal(412, 'LeaseIdMismatchWithBlobOperation')
        elif given:
            raise Refusal(412, 'LeaseLost' if blob.lease else 'LeaseNotPresentWithBlobOperation')
        else:
            blob.lease = None

    def _written(self, blob: StoredBlob, status: int, **headers: str) -> Answer:
        blob.etag = self._new_etag()
        blob.modified = self.now
        return Answer(status, {'ETag': blob.etag, 'Last-Modified': _date(blob.modified), **headers})

    def _properties(self, blob: StoredBlob) -> dict[str, str]:
        locked = blob.lease is not None and blob.lease.locks(self.now)
        counted = {'x-ms-blob-committed-block-count': str(blob.blocks)} if blob.kind == 'AppendBlob' else {}
        return {
            'ETag': blob.etag, 'Last-Modified': _date(blob.modified), 'Content-Type': blob.content_type,
            'x-ms-blob-type': blob.kind, 'x-ms-lease-state': self._lease_state(blob),
            'x-ms-lease-status': 'locked' if locked else 'unlocked', **counted,
            **{f'x-ms-meta-{key}': value for key, value in blob.metadata.items()}}

    def _new_etag(self) -> str:
        return f'"0x{next(self._etags):X}"'


def _same(condition: str, etag: str) -> bool:
    return condition == '*' or condition.strip('"') == etag.strip('"')


def _metadata(request: Request) -> dict[str, str]:
    return {key.lower().removeprefix('x-ms-meta-'): value for key, value in request.headers.items()
            if key.lower().startswith('x-ms-meta-')}


def _date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


def _element(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = text


def _split_batch(request: Request) -> list[tuple[str, Request]]:
    """Return the requests in a batch, each with its Content-ID."""
    head = f'Content-Type: {request.headers["Content-Type"]}\r\n\r\n'.encode()
    parts = []
    for part in email.message_from_bytes(head + request.body).walk():
        if part.get_content_type() == 'application/http':
            start, _, rest = str(part.get_payload()).lstrip().partition('\n')
            method, path, _ = start.split()
            headers = dict(email.message_from_string(rest))
            url = f'https://fake.blob.core.windows.net{path}'
            parts.append((part['Content-ID'], Request.read(method, url, headers, b'')))
    return parts


def _join_batch(answers: list[tuple[str, Answer]]) -> Answer:
    boundary = f'batchresponse_{uuid.uuid4()}'
    lines = []
    for content_id, (status, headers, body) in answers:
        lines += [f'--{boundary}', 'Content-Type: application/http', f'Content-ID: {content_id}', '',
                  f'HTTP/1.1 {status} Fake', *(f'{name}: {value}' for name, value in headers.items()), '',
                  body.decode()]
    lines += [f'--{boundary}--', '']
    return Answer(202, {'Content-Type': f'multipart/mixed; boundary={boundary}'}, '\r\n'.join(lines).encode())
