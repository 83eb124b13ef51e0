"""A part of a chord that has finished, and how it is added to the chord's log."""
from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from azure.core.exceptions import AzureError
from kombu.utils.encoding import ensure_bytes

from .chordheader import PartKey
from .chordlog import PART, ChordLog, Crowded, Full, Gone, Leased, Record, patiently
from .chordmessage import Mark

__all__ = ('FULL', 'FinishedPart')

#: In place of the number of a block: the log takes no more, so that its chord must fail.
FULL = math.inf

#: The largest block of a log, in bytes; a result that does not fit into it gets a blob of its own.
MAX_BLOCK = 64 * 1024

#: How long a log may become through results, in bytes, since whoever starts the body reads it whole. In a longer
#: one, all results get blobs of their own; with their names for 50,000 parts, it stays below 64 MiB.
MAX_LENGTH = 40 * 1024 * 1024


class FinishedPart:
    """A part of a chord that has finished.

    Arguments:
        backend: The backend.
        mark: What its message says of the chord.
        request: Its request, with the chord's body.
        state: Its state.
        result: What it returned or raised.

    Attributes:
        key: What the part is known by.
        log: The chord's log.
        mark, request: As given.
    """

    def __init__(self, backend: Any, mark: Mark, request: Any, state: str, result: Any) -> None:
        self.mark = mark
        self.request = request
        self.log: ChordLog = backend.chord_log(mark.chord_id)
        self._backend = backend
        self.key: PartKey = (str(request.id), request.group_index)
        self._head = [*self.key, state]
        self._data = ensure_bytes(backend.encode(backend.encode_result(result, state)))
        self._payload: str | None = None

    def append(self) -> float | None:
        """Add the part to the log, and return the number of its block.

        A log that is full gives `FULL`; one that is claimed, so that it takes no blocks, gives None.

        Raises:
            Gone: if there is no log.
            azure.core.exceptions.AzureError: if the part cannot be logged, after many attempts or for good.
        """
        try:
            return patiently(self._append_once)
        except Full:
            return FULL
        except Leased:
            return None
        except Gone:
            if self._payload:
                with suppress(AzureError):  # it expires
                    self._backend.container.delete(self._payload)
            raise

    def _append_once(self) -> int:
        """Add the part: with its result, or with the name of a blob that has it, since it is large or the log is."""
        if self._payload is None:
            block = Record(PART, [*self._head, None], self._data).to_bytes()
            if len(block) <= MAX_BLOCK:
                with suppress(Crowded):
                    return self.log.append(block, MAX_LENGTH)
            self._payload = self.log.store_payload(self._data, self._backend.content_type)
        return self.log.append(Record(PART, [*self._head, self._payload]).to_bytes())
