"""Chords without polling: their logs are created, and the parts reported, by what Celery calls here."""
from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from billiard.process import current_process

from celery import states
from celery._state import get_current_task
from celery.canvas import maybe_signature
from celery.result import GroupResult
from celery.signals import task_received, worker_shutdown
from celery.utils.functional import LRUCache
from celery.utils.log import get_logger

from .chordend import THREAD, ChordEnd
from .chordheader import tree_of
from .chordlog import GROWTH, PATIENCE, TREE, Gone, Leased, Record, patiently
from .chordmessage import (
    Mark,
    drop_errbacks,
    errbacks_of,
    last_step_of,
    mark_of,
    parts_in_outer_chord,
    parts_of,
    request_of,
)
from .chordpart import FinishedPart

__all__ = ('MAX_PARTS', 'ChordRunner')

#: The longest header that is counted by its log. A log takes 50,000 blocks; the rest is for parts that come twice.
MAX_PARTS = 40_000

#: How many parts a worker's main process reports at the same time: of a revoked chord, thousands may come at once.
REPORT_THREADS = 10

#: For how many chords a thread remembers what it has learned of them.
CHORDS_KEPT = 1000

#: In the main process of a worker: the requests of grouped tasks that it still deals with, by task id.
_received: WeakValueDictionary[str, Any] = WeakValueDictionary()

logger = get_logger(__name__)


def _remember(request: Any, **kwargs: Any) -> None:
    if request.group:
        _received[request.id] = request


task_received.connect(_remember)


#: All runners of this process. A process of a pool has those of the worker's main process.
_runners: WeakSet[ChordRunner] = WeakSet()


def _forget_threads() -> None:
    for runner in _runners:
        runner.forget_threads()


if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(after_in_child=_forget_threads)


class ChordRunner:
    """Keeps the logs of chords for a backend.

    Arguments:
        backend: An :class:`~celery.backends.azureblockblob.AzureBlockBlobBackend`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._awaiting_size: set[str] = set()
        self.forget_threads()
        _runners.add(self)

    def forget_threads(self) -> None:
        """Begin anew with all that threads share: after a fork, one that is not there may hold a lock."""
        self._sizes: LRUCache = LRUCache(limit=CHORDS_KEPT)
        self._awaited: LRUCache = LRUCache(limit=CHORDS_KEPT)
        self._reporters: ThreadPoolExecutor | None = None
        self._reports: set[Future[None]] = set()
        self._lock = threading.Lock()

    def start(self, chord_id: str, results: Sequence[Any], size: int | None) -> None:
        """Create the log of a chord, before any part of it can finish.

        Arguments:
            chord_id: Id of the chord, which is that of its header.
            results: Results of the header's tasks; of no meaning if their number is not known.
            size: Number of parts, or None for a header that is a generator.
        """
        tree = None
        if size is None:
            self._awaiting_size.add(chord_id)
        elif any(isinstance(result, GroupResult) for result in results):
            tree = Record(TREE, tree_of(results))
        self._backend.chord_log(chord_id).create(tree)

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
        block = Record(GROWTH, [str(task_id)]).to_bytes()
        try:
            patiently(lambda: log.append(block))
        except (Gone, Leased):  # only a part that was delivered again can find its chord like that
            logger.warning('Chord %s is over, or has expired, and does not wait for %s.', chord_id, task_id)

    def report(self, request: Any, state: str, result: Any) -> None:
        """Log a finished part of a chord, and start the body if it was the last. A polled chord needs no report.

        A worker's main process reports the tasks that were revoked, timed out, or lost with their process. It does
        so on other threads: its event loop must not wait for Azure.

        Raises:
            azure.core.exceptions.AzureError: if the part cannot be logged, after many attempts or for good.
        """
        mark = mark_of(request)
        if mark is None:
            return
        for part in parts_of(request):
            if self._in_main_process():
                self._report_in_thread(mark, part, state, result)
            else:
                self._report(mark, part, state, result)

    def report_lost(self, task_id: str, result: Any) -> None:
        """Report a part again of which a worker's main process learns that it has succeeded.

        The main process asks for that when a process of its pool is lost (Celery 5.7 and later). If the task has
        succeeded, Celery leaves it at that. But the process may have been lost before it had logged the part, or
        while it was about to start the body; if not, the second report does no harm.
        """
        request = _received.get(task_id)
        if request is not None and self._in_main_process():
            self.report(request._context, states.SUCCESS, result)

    def fail_what_waits(self, body: Any, error: Any) -> None:
        """Fail what waits for a body that has failed since its chord has: see `chord_error_from_stack`."""
        parts = parts_in_outer_chord(body)
        last = last_step_of(body)
        if last is None:
            for part in parts:
                self.report(request_of(part), states.FAILURE, error)
            return
        last = maybe_signature(last, app=self._backend.app)
        for signature in (last, *getattr(last, 'tasks', ())):
            drop_errbacks(signature, errbacks_of(body))  # Celery has called these
        self._backend.chord_error_from_stack(last, error)

    def _in_main_process(self) -> bool:
        """Tell whether this is the main process of a worker, and there neither the thread of a task nor one of ours.

        In a process of the pool a report is waited for, even where Celery makes it after the task: such a process
        ends without waiting for its threads.
        """
        return (self._backend.app.loader.worker_initialized
                and current_process().name == 'MainProcess' and get_current_task() is None
                and not threading.current_thread().name.startswith(THREAD))

    def _report_in_thread(self, *report: Any) -> None:
        with self._lock:
            if self._reporters is None:
                self._reporters = ThreadPoolExecutor(REPORT_THREADS, f'{THREAD}-report')
                # A function of its own: up to Celery 5.6, a signal takes methods of different objects for the same.
                worker_shutdown.connect(lambda **kwargs: self._finish_reports(), weak=False)
            future = self._reporters.submit(self._report_or_log, *report)
            self._reports.add(future)
        future.add_done_callback(self._reports.discard)

    def _finish_reports(self) -> None:
        """Wait for all reports that begin within `PATIENCE` seconds, so that the worker ends though Azure is away.

        Python would wait at its end too, but does not let them start threads there.
        """
        with self._lock:
            reporters, self._reporters = self._reporters, None
        if not reporters:
            return
        late = wait(self._reports, PATIENCE).not_done
        if late:
            logger.critical('%s finished parts of chords could not be reported in time: their chords may not end.',
                            len(late))
        reporters.shutdown(wait=not late, cancel_futures=True)

    def _report_or_log(self, mark: Mark, request: Any, state: str, result: Any) -> None:
        try:
            self._report(mark, request, state, result)
        except Exception:
            logger.critical('Task %s could not be reported: chord %s will not end.', request.id, mark.chord_id,
                            exc_info=True)

    def _report(self, mark: Mark, request: Any, state: str, result: Any) -> None:
        """Log a part, and start the body if it was the last. Return when that is done.

        If this is interrupted, Celery reports the part again, as failed. Only its first record counts, so that this
        does no harm; and the second report finishes what the first has not.
        """
        part = FinishedPart(self._backend, mark, request, state, result)
        try:
            number = part.append()
        except Gone:
            logger.warning(
                'Chord %s is over, or has expired: task %s came too late for it.', mark.chord_id, request.id)
            return
        awaited = _recall(self._awaited, mark.chord_run) or self._known_size(mark)
        if number is None or awaited is None or number >= awaited:
            awaited = ChordEnd(self._backend, part, number, lambda: self._find_size(part)).reach()
            if awaited is not None:
                self._awaited[mark.chord_run] = awaited

    def _known_size(self, mark: Mark) -> int | None:
        return _recall(self._sizes, mark.chord_run) if mark.chord_size is None else mark.chord_size

    def _find_size(self, part: FinishedPart) -> int | None:
        """Return a chord's size: from a part's message, or from the log. Of the latter, only a number is remembered.

        The size is written before the last part is published, and read after a part is logged: so that whoever logs
        the last one finds it.
        """
        size = self._known_size(part.mark)
        if size is None:
            size = part.log.size()
            if size is not None:
                self._sizes[part.mark.chord_run] = size
        return size


def _recall(cache: LRUCache, key: str) -> Any:
    try:
        return cache[key]
    except KeyError:  # .get() asks twice, and another thread may come between
        return None
