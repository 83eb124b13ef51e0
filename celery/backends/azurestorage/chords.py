"""Chords without polling: their logs are created, and the parts reported, by what Celery calls here."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

from billiard.process import current_process
from kombu.utils.encoding import ensure_bytes

from celery import states
from celery._state import get_current_task
from celery.result import GroupResult
from celery.signals import task_received, worker_shutdown
from celery.utils.log import get_logger

from .chordend import ChordEnd
from .chordheader import chord_id_of, ids_of, is_counted, parts_of, tree_of
from .chordlog import GROWTH, PART, TREE, ChordLog, Full, Gone, Leased, Record, patiently

__all__ = ('MAX_PARTS', 'ChordRunner')

#: The longest header that is counted by its log. A log takes 50,000 blocks; the rest is for parts that come twice.
MAX_PARTS = 40_000

#: The largest block of a log, in bytes; a result that does not fit into it gets a blob of its own.
MAX_BLOCK = 64 * 1024

#: What a log may grow to, in bytes, since whoever starts the body reads it whole.
MAX_LOG = 64 * 1024 * 1024

#: How many parts a worker's main process reports at the same time: of a revoked chord, thousands may come at once.
REPORT_THREADS = 10

#: For how many chords whose header is a generator a process remembers the size.
SIZES_KEPT = 1000

#: In the main process of a worker: the requests of grouped tasks that it still deals with, by task id.
_received: WeakValueDictionary[str, Any] = WeakValueDictionary()

logger = get_logger(__name__)


@task_received.connect
def _remember(request: Any, **kwargs: Any) -> None:
    if request.group:
        _received[request.id] = request


class ChordRunner:
    """Keeps the logs of chords for a backend.

    Arguments:
        backend: An :class:`~celery.backends.azureblockblob.AzureBlockBlobBackend`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._sizes: dict[str, int] = {}
        self._awaiting_size: set[str] = set()
        self._reporters: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def start(self, chord_id: str, results: Sequence[Any], size: int | None) -> None:
        """Create the log of a chord, before any part of it can finish.

        Arguments:
            chord_id: Id of the chord, which is that of its header.
            results: Results of the header's tasks; of no meaning if their number is not known.
            size: Number of parts, or None for a header that is a generator.
        """
        log = self._backend.chord_log(chord_id)
        if size is None:
            self._awaiting_size.add(chord_id)
            log.create()
            return
        is_nested = any(isinstance(result, GroupResult) for result in results)
        is_new = log.create(Record(TREE, tree_of(results)) if is_nested else None)
        if is_new and get_current_task() and self._has_run(next(ids_of(results))):
            logger.warning('Chord %s is over: the task that starts it has come again.', chord_id)
            log.discard()

    def _has_run(self, task_id: str) -> bool:
        """Tell whether a part has stored a result, which it does while there is a log.

        If there was none, the chord is over, and the message of the task that starts it was delivered again. To look
        after the log was made leaves no gap: what has deleted it came after all results.
        """
        return self._backend.get(self._backend.get_key_for_task(task_id)) is not None

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

    def grow(self, chord_id: str, task_id: str) -> None:
        """Make a chord wait for one more part, which is the task `task_id`.

        Raises:
            Full: if the chord has too many parts.
        """
        log = self._backend.chord_log(chord_id)
        block = Record(GROWTH, [task_id]).to_bytes()
        try:
            patiently(lambda: log.append(block))
        except (Gone, Leased):  # of all running parts, only one that came twice can find its chord so
            logger.warning('Chord %s is over, or has expired, and does not wait for %s.', chord_id, task_id)

    def report(self, request: Any, state: str, result: Any) -> None:
        """Log a finished part, and start the body if it was the last.

        A worker's main process reports the tasks that were revoked, timed out, or lost with their process. It does
        so on other threads: its event loop must not wait for Azure.

        Raises:
            azure.core.exceptions.AzureError: if the part cannot be logged, after many attempts or for good.
        """
        for part in parts_of(request):
            if self._in_main_process():
                self._report_in_thread(part, state, result)
            else:
                self._report(part, state, result)

    def report_lost(self, task_id: str, result: Any) -> None:
        """Report a part again of which a worker's main process learns that it has succeeded.

        The main process asks for that when a process of its pool is lost (Celery 5.7 and later). If the task has
        succeeded, Celery leaves it at that. But the process may have been lost before it had logged the part, or
        while it was about to start the body; if not, the second report does no harm.
        """
        request = _received.get(task_id)
        if request is not None and self._in_main_process() and is_counted(request._context):
            self.report(request._context, states.SUCCESS, result)

    def _in_main_process(self) -> bool:
        """Tell whether this is the main process of a worker, and not the thread of a task there.

        In a process of the pool a report is waited for, even where Celery makes it after the task: such a process
        ends without waiting for its threads.
        """
        return (self._backend.app.loader.worker_initialized
                and current_process().name == 'MainProcess' and get_current_task() is None)

    def _report_in_thread(self, *report: Any) -> None:
        with self._lock:
            if self._reporters is None:
                self._reporters = ThreadPoolExecutor(REPORT_THREADS, 'azureblockblob-report')
                worker_shutdown.connect(self._finish_reports, weak=False)
            self._reporters.submit(self._report_or_log, *report)

    def _finish_reports(self, **kwargs: Any) -> None:
        """Wait for all reports. Python would wait at its end too, but does not let them start threads there."""
        with self._lock:
            reporters, self._reporters = self._reporters, None
        if reporters:
            reporters.shutdown()

    def _report_or_log(self, request: Any, state: str, result: Any) -> None:
        try:
            self._report(request, state, result)
        except Exception:
            logger.critical('Task %s could not be reported: chord %s will not end.', request.id,
                            chord_id_of(request), exc_info=True)

    def _report(self, request: Any, state: str, result: Any) -> None:
        """Log a part, and start the body if it was the last. Return when that is done.

        Whatever interrupts this, Celery reports the part again, as failed. Its first record counts, so that this
        does no harm; and the second report finishes what the first has not.
        """
        chord_id = chord_id_of(request)
        log = self._backend.chord_log(chord_id)
        size = self._known_size(request)
        block = patiently(lambda: self._encode(log, request, state, result, size))
        count = None
        try:
            count = patiently(lambda: log.append(block))
        except Gone:
            logger.warning('Chord %s is over, or has expired: task %s came too late for it.', chord_id, request.id)
            return
        except (Full, Leased):
            pass
        if count is None or size is None or count >= size:
            ChordEnd(self._backend, request, log, count, lambda: self._find_size(request, log), self._report).reach()

    def _known_size(self, request: Any) -> int | None:
        size = request.chord['chord_size']
        return self._sizes.get(chord_id_of(request)) if size is None else size

    def _find_size(self, request: Any, log: ChordLog) -> int | None:
        """Return a chord's size: from a part's message, or from the log. Of the latter, only a number is remembered.

        The size is written before the last part is published, and read after a part is logged: so that whoever logs
        the last one finds it.
        """
        size = self._known_size(request)
        if size is None:
            size = log.size()
            if size is not None:
                if len(self._sizes) >= SIZES_KEPT:
                    self._sizes.clear()
                self._sizes[chord_id_of(request)] = size
        return size

    def _encode(self, log: ChordLog, request: Any, state: str, result: Any, size: int | None) -> bytes:
        """Return a part's block, its result stored elsewhere if it is large."""
        backend = self._backend
        data = ensure_bytes(backend.encode(backend.encode_result(result, state)))
        block = Record(PART, [request.id, request.group_index, state, None], data).to_bytes()
        if len(block) <= min(MAX_BLOCK, MAX_LOG // (size or MAX_PARTS)):
            return block
        payload = log.store_payload(data, backend.content_type)
        return Record(PART, [request.id, request.group_index, state, payload]).to_bytes()
