"""Chords without polling: what a worker does with the log of a chord."""
from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from azure.core.exceptions import AzureError
from billiard.process import current_process
from kombu.utils.encoding import ensure_bytes

from celery import states
from celery._state import get_current_task, get_current_worker_task, pop_current_task, push_current_task
from celery.app.task import Context
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult
from celery.signals import worker_shutdown
from celery.utils.log import get_logger

from .chordlog import (
    GROWTH,
    PART,
    TREE,
    Changed,
    ChordLog,
    Claim,
    Full,
    Gone,
    Leased,
    LeaseLost,
    Record,
    patiently,
    pauses,
)

__all__ = ('MAX_PARTS', 'ChordRunner', 'count_parts', 'is_counted')

#: The longest header that is counted by its log. A log takes 50,000 blocks; the rest is for parts that come twice.
MAX_PARTS = 40_000

#: The largest block of a log, in bytes; a result that does not fit into it gets a blob of its own.
MAX_BLOCK = 64 * 1024

#: What a log may grow to, in bytes, since whoever starts the body reads it whole.
MAX_LOG = 64 * 1024 * 1024

#: How often to try whether a claimed log has become free, in seconds.
CLAIM_INTERVAL = 1

#: How many parts a worker's main process reports at the same time: of a revoked chord, thousands may come at once.
REPORT_THREADS = 10

#: For how many chords whose header is a generator a process remembers the size.
SIZES_KEPT = 1000

logger = get_logger(__name__)


class Part(NamedTuple):
    """A finished part of a chord: `data` is its result, unless that is in the blob `payload`."""

    task_id: str
    group_index: int | None
    state: str
    payload: str | None
    data: bytes = b''


class Header(NamedTuple):
    """What a log says of a chord's header.

    Attributes:
        parts: Each part once, as it was first reported, in the header's order.
        growth: How many parts joined later.
        tree: The parts' ids, nested as the header is; None for a flat one.
        payloads: Names of the blobs of large results, those included of parts that came twice.
        etag: What stands for this content of the log.
    """

    parts: list[Part]
    growth: int
    tree: list[Any] | None
    payloads: list[str]
    etag: str

    @classmethod
    def read(cls, log: ChordLog) -> Header:
        """Read a log."""
        records, etag = log.read()
        reports = [Part._make([*record.head, record.data]) for record in records if record.kind == PART]
        parts: dict[tuple[str, int | None], Part] = {}
        for part in reports:
            parts.setdefault((part.task_id, part.group_index), part)
        return cls(
            parts=sorted(parts.values(), key=lambda part: (part.group_index is None, part.group_index)),
            growth=len({record.head[0] for record in records if record.kind == GROWTH}),
            tree=next((record.head for record in records if record.kind == TREE), None),
            payloads=[part.payload for part in reports if part.payload],
            etag=etag)

    def is_complete(self, size: int | None) -> bool:
        """Tell whether all parts are there, those included that joined later."""
        return size is not None and len(self.parts) >= size + self.growth

    def arrange(self, values: Sequence[Any]) -> list[Any]:
        """Return the parts' values, nested as the header is; those of parts that joined later come last."""
        if self.tree is None:
            return list(values)
        by_id: dict[str, deque[Any]] = {}
        for part, value in zip(self.parts, values, strict=True):
            by_id.setdefault(part.task_id, deque()).append(value)

        def fill(branch: Sequence[Any]) -> list[Any]:
            return [fill(leaf) if isinstance(leaf, list) else by_id[leaf].popleft() for leaf in branch]

        return [*fill(self.tree), *(value for rest in by_id.values() for value in rest)]


def count_parts(results: Iterable[Any]) -> int:
    """Return how many parts a header has that leads to `results`: those of nested groups count one by one."""
    return sum(count_parts(result.results) if isinstance(result, GroupResult) else 1 for result in results)


def tree_of(results: Iterable[Any]) -> list[Any]:
    """Return the task ids of `results`, nested as the groups among them are."""
    return [tree_of(result.results) if isinstance(result, GroupResult) else result.id for result in results]


def is_counted(request: Any) -> bool:
    """Tell whether a task is a part of a chord that is counted by its log."""
    return bool(request and request.id and request.group and 'chord_size' in (request.chord or ()))


class ChordRunner:
    """Keeps the logs of chords for a backend.

    Arguments:
        backend: An :class:`~celery.backends.azureblockblob.AzureBlockBlobBackend`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._sizes: dict[str, int] = {}
        self._awaiting_size: set[str] = set()
        self._reports: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def start(self, group_id: str, results: Sequence[Any], size: int | None) -> None:
        """Create the log of a chord, before any part of it can finish.

        Arguments:
            group_id: Id of the header.
            results: Results of the header's tasks; of no meaning if their number is not known.
            size: Number of parts, or None for a header that is a generator.
        """
        tree = None
        if size is None:
            self._awaiting_size.add(group_id)
        elif any(isinstance(result, GroupResult) for result in results):
            tree = Record(TREE, tree_of(results))
        self._backend.chord_log(group_id).create(tree)

    def set_size(self, group_id: str, size: int) -> None:
        """Write the size of a chord whose header is a generator, before Celery publishes the last part.

        This is called for every group with a chord; all others have their size in the message.
        """
        if group_id not in self._awaiting_size:
            return
        self._awaiting_size.remove(group_id)
        try:
            self._backend.chord_log(group_id).set_size(size)
        except (Gone, Leased) as exc:  # a step that came twice: the chord is done or complete
            logger.warning('The size of the chord %s was not written: %r', group_id, exc)

    def find_size(self, request: Any, log: ChordLog) -> int | None:
        """Return a chord's size: from a part's message, or from the log. Of the latter, only a number is remembered.

        The part must be logged already. Its size is written before the last part is published: so that whoever logs
        the last one finds it.
        """
        size = self._known_size(request)
        if size is None:
            size = log.size()
            if size is not None:
                if len(self._sizes) >= SIZES_KEPT:
                    self._sizes.clear()
                self._sizes[request.group] = size
        return size

    def _known_size(self, request: Any) -> int | None:
        size = request.chord['chord_size']
        return self._sizes.get(request.group) if size is None else size

    def grow(self, group_id: str, task_id: str) -> None:
        """Make a chord wait for one more part, which is the task `task_id`.

        Raises:
            Full: if the chord has too many parts.
        """
        block = Record(GROWTH, [task_id]).to_bytes()
        try:
            patiently(lambda: self._backend.chord_log(group_id).append(block))
        except (Gone, Leased):  # of all running parts, only one that came twice can find its chord so
            logger.warning('Chord %s is over, or has expired, and does not wait for %s.', group_id, task_id)

    def report(self, request: Any, state: str, result: Any) -> None:
        """Log a finished part, and start the body if it was the last.

        A worker's main process reports the tasks that were revoked, timed out, or lost with their process. It does
        so on other threads: its event loop must not wait for Azure.

        Raises:
            azure.core.exceptions.AzureError: if it cannot be logged, here and now or after many attempts.
        """
        for part in _parts_of(request):
            if self._is_event_loop():
                self._later().submit(self._report_or_log, part, state, result)
            else:
                self.report_now(part, state, result)

    def _is_event_loop(self) -> bool:
        """Tell whether this is the main process of a worker, and no task's own thread there.

        In a process of the pool a report is waited for, even where Celery makes it after the task: such a process
        ends without waiting for its threads.
        """
        return (self._backend.app.loader.worker_initialized
                and current_process().name == 'MainProcess' and get_current_task() is None)

    def _later(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._reports is None:
                self._reports = reports = ThreadPoolExecutor(REPORT_THREADS, 'azureblockblob-report')
                # Later, when Python ends, it starts no threads any more, which finishing a chord needs.
                worker_shutdown.connect(lambda **kwargs: reports.shutdown(), weak=False)
            return self._reports

    def _report_or_log(self, request: Any, state: str, result: Any) -> None:
        try:
            self.report_now(request, state, result)
        except Exception:
            logger.critical('Task %s could not be reported: chord %s will not end.', request.id, request.group,
                            exc_info=True)

    def report_now(self, request: Any, state: str, result: Any) -> None:
        """Log a part, and start the body if it was the last. Return when that is done.

        Whatever interrupts this, Celery reports the part again, as failed. Its first record counts, so that it does
        no harm; and the second report finishes what the first has not.
        """
        log = self._backend.chord_log(request.group)
        size = self._known_size(request)
        block = patiently(lambda: self._encode(log, request, state, result, size))
        count = None
        try:
            count = patiently(lambda: log.append(block))
        except Gone:
            logger.warning('Chord %s is over, or has expired: task %s came too late for it.',
                           request.group, request.id)
            return
        except (Full, Leased):
            pass
        if count is None or size is None or count >= size:
            _undisturbed(_Ending(self._backend, self, request, log, count).reach)

    def _encode(self, log: ChordLog, request: Any, state: str, result: Any, size: int | None) -> bytes:
        """Return a part's block, its result stored elsewhere if it is large."""
        backend = self._backend
        data = ensure_bytes(backend.encode(backend.encode_result(result, state)))
        block = Record(PART, [request.id, request.group_index, state, None], data).to_bytes()
        if len(block) <= min(MAX_BLOCK, MAX_LOG // (size or MAX_PARTS)):
            return block
        payload = log.store_payload(data, backend.content_type)
        return Record(PART, [request.id, request.group_index, state, payload]).to_bytes()


class _Ending:
    """The end of a chord, for a worker that has reported a part of it.

    Arguments:
        backend: The backend.
        runner: Its runner of chords.
        request: The part's request, with the body.
        log: The chord's log.
        count: Number of blocks in the log with the part; None if it took no more: it was complete, or is full.
    """

    def __init__(self, backend: Any, runner: ChordRunner, request: Any, log: ChordLog, count: int | None) -> None:
        self._backend = backend
        self._runner = runner
        self._request = request
        self._log = log
        self._count = count

    def reach(self) -> None:
        """Start the body if all parts are there, whatever goes wrong for `PATIENCE` seconds. Raises nothing."""
        waits = pauses()
        while True:
            try:
                return self._start_body()
            except Gone:
                return None
            except Exception:
                logger.exception('Chord %s could not be finished.', self._request.group)
            pause = next(waits, None)
            if pause is None:
                logger.critical('Chord %s was given up: its body is not started.', self._request.group)
                return None
            time.sleep(pause)

    def _start_body(self) -> None:
        size = self._runner.find_size(self._request, self._log)
        if self._count is not None and (size is None or self._count < size):
            return
        while True:
            header = Header.read(self._log)
            complete = header.is_complete(size)
            if self._count is not None and not complete:
                return
            try:
                claim = self._claim(header.etag)
            except Changed:
                continue
            if self._run(claim, header, complete):
                return

    def _claim(self, etag: str) -> Claim:
        """Claim the log; wait for whoever else has claimed it until they are done, or dead."""
        while True:
            try:
                return self._log.claim(etag)
            except Leased:
                time.sleep(CLAIM_INTERVAL * random.uniform(0.5, 1.5))

    def _run(self, claim: Claim, header: Header, complete: bool) -> bool:
        """Start the body under a claim, and delete the log. Return False if the claim was lost before that."""
        with claim.held():
            outcome = self._join(header) if complete else ChordError(
                f'The header of chord {self._request.group} has more parts than its log can hold: '
                f'give it as a list, so that it can be polled')
            try:
                claim.renew()
            except LeaseLost:
                return False
            if isinstance(outcome, ChordError):
                self._fail(outcome)
            else:
                self._publish(outcome)
            claim.delete_log(header.etag)
        self._delete_payloads(header)
        return True

    def _join(self, header: Header) -> list[Any] | ChordError:
        """Return what the body is called with, or the error that fails the chord."""
        container = self._backend.container
        names = [part.payload for part in header.parts if part.payload]
        payloads = dict(zip(names, container.account.map(container.read, names), strict=True))
        try:
            return header.arrange([self._value(part, payloads) for part in header.parts])
        except ChordError as exc:
            return exc
        except Exception as exc:
            return _chord_error(f'Join error: {exc!r}', exc)

    def _value(self, part: Part, payloads: Mapping[str, Any]) -> Any:
        data = part.data
        if part.payload:
            blob = payloads[part.payload]
            if blob is None:
                raise LookupError(f'the result of task {part.task_id} is gone')
            data = blob.data
        result = self._backend.decode_blob(data)
        if part.state in states.EXCEPTION_STATES:
            result = self._backend.exception_to_python(result)
        if part.state in states.PROPAGATE_STATES:
            raise _chord_error(f'Dependency {part.task_id} raised {result!r}', result)
        return result

    def _body(self) -> Any:
        body = {key: value for key, value in self._request.chord.items() if key != 'chord_size'}
        return maybe_signature(body, app=self._backend.app)

    def _publish(self, results: list[Any]) -> None:
        amqp, body = self._backend.app.amqp, self._body()
        try:
            if hasattr(amqp, '_retry_publish'):  # Celery 5.7
                amqp._retry_publish(body.delay, results)
            else:
                body.delay(results)
        except Exception as exc:
            logger.exception('The body of chord %s could not be published.', self._request.group)
            self._fail(_chord_error(f'Callback error: {exc!r}', exc))

    def _fail(self, error: ChordError) -> None:
        """Fail the body, and with it the parts that it is of another chord. Raises nothing.

        Celery calls the errbacks first: they must not be called again, whatever goes wrong then.
        """
        logger.error('Chord %s failed: %s', self._request.group, error)
        body = self._body()
        try:
            self._fail_body(body, error)
            for request in map(_request_of, _ends_of(body)):
                if is_counted(request):
                    self._runner.report_now(request, states.FAILURE, error)
        except Exception:
            logger.critical('The failure of chord %s could not be stored.', self._request.group, exc_info=True)

    def _fail_body(self, body: Any, error: ChordError) -> None:
        backend = self._backend
        try:
            raise error  # Celery takes the traceback of the exception being handled
        except ChordError:
            try:
                backend.chord_error_from_stack(body, error)
            except Exception as exc:
                logger.warning('The failure of chord %s is stored again: %r', self._request.group, exc)
                result = backend.encode_result(error, states.FAILURE)
                patiently(lambda: backend._store_result(body.id, result, states.FAILURE))

    def _delete_payloads(self, header: Header) -> None:
        """Delete the blobs of large results. What is left of them expires."""
        container = self._backend.container
        try:
            container.account.map(container.delete, header.payloads)
        except AzureError as exc:
            logger.warning('Blobs of chord parts were not deleted, and expire: %r', exc)


def _ends_of(signature: Any) -> list[Any]:
    """Return the tasks at the end of a signature. As parts of a chord, each of them counts."""
    kind, kwargs = signature.get('subtask_type'), signature.get('kwargs')
    if kind == 'chord':
        return _ends_of(kwargs['body'])
    if kind == 'group':
        return [end for task in kwargs['tasks'] for end in _ends_of(task)]
    if kind == 'chain':
        return next((ends for task in reversed(kwargs['tasks']) if (ends := _ends_of(task))), [])
    return [signature]


def _parts_of(request: Any) -> Iterator[Any]:
    """Yield the requests of all parts that `request` stands for.

    When a chain fails, Celery reports its last step, in place of the parts that step would have become.
    """
    for end in _ends_of(request):
        yield request if end is request else _request_of({**end, 'options': {
            **end['options'], 'group_id': request.group, 'chord': request.chord}})


def _request_of(signature: Mapping[str, Any]) -> Any:
    """Return the request of a task that is not sent."""
    options = signature['options']
    return Context(options, id=options.get('task_id'), group=options.get('group_id'))


def _chord_error(message: str, cause: Any) -> ChordError:
    error = ChordError(message)
    error.__cause__ = cause if isinstance(cause, BaseException) else None
    return error


def _undisturbed(function: Callable[[], None]) -> None:
    """Call a function on a thread of its own, and wait for it.

    A soft time limit interrupts the main thread only, wherever that is. It has no business here: the task is done.
    """
    task = get_current_worker_task()
    thread = threading.Thread(target=_call_within, args=(task, task and task.request, function),
                              name='azureblockblob-chord')
    thread.start()
    while thread.is_alive():
        try:
            thread.join()
        except Exception as exc:
            logger.warning('A task is past its time, but finishes its chord first: %r', exc)


def _call_within(task: Any, request: Any, function: Callable[[], None]) -> None:
    """Call a function as if `task` did: what it publishes inherits that task's root, and has it for its parent."""
    if task is None:
        return function()
    push_current_task(task)
    task.request_stack.push(request)
    try:
        return function()
    finally:
        task.request_stack.pop()
        pop_current_task()
