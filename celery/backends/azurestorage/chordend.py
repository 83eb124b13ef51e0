"""The end of a chord: whoever has reported its last part starts its body."""
from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import Any
from uuid import uuid4

from celery import states
from celery._state import get_current_worker_task, pop_current_task, push_current_task
from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.utils.log import get_logger

from .chordheader import Header, Part
from .chordlog import GRACE, Changed, Claim, Gone, Leased, LeaseLost, patiently, pauses
from .chordmessage import drop_errbacks, errbacks_of, parts_in_outer_chord, unmark_body
from .chordpart import FULL, FinishedPart
from .errors import is_temporary

__all__ = ('THREAD', 'ChordEnd')

#: How often to try whether a claimed log has become free, in seconds.
CLAIM_INTERVAL = 1

#: How the names of the threads begin that report parts and start bodies.
THREAD = 'azureblockblob-chord'

logger = get_logger(__name__)


class ChordEnd:
    """The end of a chord, for a worker that has reported a part of it.

    Arguments:
        backend: The backend.
        part: The part.
        number: What adding it to the log gave; see :meth:`.FinishedPart.append`.
        find_size: Returns the chord's size, or None if it is not known yet.
    """

    def __init__(self, backend: Any, part: FinishedPart, number: float | None,
                 find_size: Callable[[], int | None]) -> None:
        self._backend = backend
        self._part = part
        self._number = number
        self._find_size = find_size
        self._id = part.mark.chord_id
        self._log = part.log
        self._request = part.request
        self._awaited: float | None = None
        self._has_left_time = False
        self._lease_id = str(uuid4())

    def reach(self) -> float | None:
        """Start the body if all parts are there. Raises nothing: Celery would report the part again.

        A soft time limit interrupts the main thread only, so that this is done on another one.

        Returns:
            Number of the block that may be the last one, if that is known: until then nobody needs to look.
        """
        task = get_current_worker_task()
        thread = threading.Thread(target=copy_context().run, name=THREAD, args=(
            _call_within, task, task and task.request, self._start_patiently))
        finish: Callable[[], None] = thread.join
        try:
            thread.start()
        except RuntimeError as exc:  # the process can have no more threads: a time limit has it begin again
            logger.warning('Chord %s is finished without a thread of its own: %r', self._id, exc)
            finish = self._start_patiently
        while True:
            try:
                finish()
                return self._awaited
            except Exception as exc:
                logger.warning('Task %s is past its time, but finishes chord %s first: %r',
                               self._request.id, self._id, exc)

    def _start_patiently(self) -> None:
        """Start the body if all parts are there; repeat what fails for `PATIENCE` seconds."""
        waits = pauses()
        while True:
            try:
                return self._start()
            except Gone:
                return None
            except Exception as exc:
                self._has_left_time = False
                logger.warning('Chord %s could not be finished; trying again: %r', self._id, exc,
                               exc_info=not is_temporary(exc))
            pause = next(waits, None)
            if pause is None:
                logger.critical('Chord %s was given up: its body is not started.', self._id)
                return None
            time.sleep(pause)

    def _start(self) -> None:
        while True:
            size = self._find_size()
            if self._number is not None and self._number < (FULL if size is None else size):
                return
            header = Header.read(self._log)
            missing = FULL if size is None else header.missing(size)
            if missing and self._number is None:  # what was claimed is gone, or is full, and this is all there is
                _pause_for_claim()
                self._number = self._part.append()
                continue
            if missing and self._number != FULL:
                self._awaited = header.blocks + missing
                return
            # Someone may have started the body, and then not been able to delete the log.
            if not self._has_left_time and (header.lapsed or self._part.key in header.repeated):
                self._leave_time()
                continue
            try:
                claim = self._claim(header.etag)
            except Changed:
                continue
            if self._start_under(claim, header, complete=not missing):
                return
            self._has_left_time = False

    def _claim(self, etag: str) -> Claim:
        """Claim the log; wait for whoever else has claimed it until they are done, or dead."""
        while True:
            try:
                claim = self._log.claim(etag, self._lease_id)
            except Leased:
                if self._log.wait_for_lease(_pause_for_claim):
                    self._leave_time()
            else:
                self._lease_id = str(uuid4())  # for the next one
                return claim

    def _leave_time(self) -> None:
        """Leave time to someone whose claim has lapsed: either they are dead, or they delete the log now."""
        time.sleep(GRACE)
        self._has_left_time = True

    def _start_under(self, claim: Claim, header: Header, complete: bool) -> bool:
        """Start the body, or fail it, and delete the log. Return False if the claim was lost before that."""
        with claim.held():
            outcome = self._join(header) if complete else ChordError(
                f'The header of chord {self._id} has more parts than its log can hold: '
                f'give it as a list, so that it can be polled')
            try:
                claim.renew()
            except LeaseLost:
                return False
            if isinstance(outcome, ChordError):
                self._fail(outcome)
            else:
                self._publish(outcome)
            header = self._delete_log(claim, header)
        self._delete_payloads(header)
        return True

    def _delete_log(self, claim: Claim, header: Header) -> Header:
        """Delete the log, and return what it held. Raises nothing: the body must not be started again.

        If the claim has lapsed meanwhile, a part that was reported again may have been added to the log.
        """
        try:
            while True:
                try:
                    claim.delete_log(header.etag)
                    break
                except Changed:
                    found = patiently(lambda: Header.read(self._log))
                    if not set(header.parts).issubset(found.parts):  # it is another log
                        break
                    header = found
        except Gone:
            pass
        except Exception as exc:
            logger.warning('The log of chord %s was not deleted: %r', self._id, exc)
        return header

    def _join(self, header: Header) -> list[Any] | ChordError:
        """Return what the body is called with, or the error that fails it."""
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
        chord = self._request.chord
        body = {**chord, 'options': dict(chord['options'])}
        unmark_body(body)
        return maybe_signature(body, app=self._backend.app)

    def _publish(self, results: list[Any]) -> None:
        amqp, body = self._backend.app.amqp, self._body()
        try:
            if hasattr(amqp, '_retry_publish'):  # Celery 5.7
                amqp._retry_publish(body.delay, results)
            else:
                body.delay(results)
        except Exception as exc:
            logger.exception('The body of chord %s could not be published.', self._id)
            self._fail(_chord_error(f'Callback error: {exc!r}', exc))

    def _fail(self, error: ChordError) -> None:
        """Fail the body. Raises nothing.

        Celery calls the errbacks first: they must not be called again, whatever goes wrong then.
        """
        logger.error('Chord %s failed: %s', self._id, error)
        body = self._body()
        try:
            _leave_errbacks_to_outer_chord(body)
            self._fail_body(body, error)
        except Exception:
            logger.critical('The failure of chord %s could not be stored.', self._id, exc_info=True)

    def _fail_body(self, body: Any, error: ChordError) -> None:
        backend = self._backend
        try:
            raise error  # Celery takes the traceback of the exception being handled
        except ChordError:
            try:
                backend.chord_error_from_stack(body, error)
            except Exception as exc:
                logger.warning('The failure of chord %s is stored again: %r', self._id, exc)
                result = backend.encode_result(error, states.FAILURE)
                patiently(lambda: backend._store_result(body.id, result, states.FAILURE))

    def _delete_payloads(self, header: Header) -> None:
        """Delete the blobs of large results. What is left of them expires."""
        container = self._backend.container
        try:
            container.account.map(container.delete, header.payloads)
        except Exception as exc:  # nothing may be raised: the body is on its way
            logger.warning('Blobs of chord parts were not deleted, and expire: %r', exc)


def _pause_for_claim() -> None:
    time.sleep(CLAIM_INTERVAL * random.uniform(0.5, 1.5))


def _leave_errbacks_to_outer_chord(body: dict[str, Any]) -> None:
    """Take away the errbacks that the outer chord has too: `chord.link_error` gives them to nested chords also."""
    parts = parts_in_outer_chord(body)
    outer = [errback for part in parts for errback in errbacks_of(part['options']['chord'])]
    for signature in (body, *parts):
        drop_errbacks(signature, outer)


def _chord_error(message: str, cause: Any) -> ChordError:
    error = ChordError(message)
    error.__cause__ = cause if isinstance(cause, BaseException) else None
    return error


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
