"""The header of a chord: what Celery counts as its parts, and what its log says of them."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from celery.app.task import Context
from celery.result import GroupResult

from .chordlog import GROWTH, PART, TREE, ChordLog

__all__ = (
    'Header', 'Part', 'chord_id_of', 'ends_of', 'ids_of', 'is_counted', 'parts_of', 'request_of', 'tree_of')


class Part(NamedTuple):
    """A finished part of a chord: `data` is its result, unless that is in the blob `payload`."""

    task_id: str
    group_index: int | None
    state: str
    payload: str | None
    data: bytes


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
        """Read a log.

        Raises:
            Gone: if there is no log.
        """
        records, etag = log.read()
        reports = [Part._make([*record.head, record.data]) for record in records if record.kind == PART]
        first: dict[tuple[str, int | None], Part] = {}
        for part in reports:
            first.setdefault((part.task_id, part.group_index), part)
        return cls(
            parts=sorted(first.values(), key=lambda part: (part.group_index is None, part.group_index)),
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


def ids_of(results: Iterable[Any]) -> Iterator[str]:
    """Yield the task id of each part of a header that leads to `results`: those of nested groups one by one."""
    for result in results:
        if isinstance(result, GroupResult):
            yield from ids_of(result.results)
        else:
            yield result.id


def tree_of(results: Iterable[Any]) -> list[Any]:
    """Return the task ids of `results`, nested as the groups among them are."""
    return [tree_of(result.results) if isinstance(result, GroupResult) else result.id for result in results]


def is_counted(request: Any) -> bool:
    """Tell whether a task is a part of a chord that is counted by its log."""
    return bool(request.id and request.group and 'chord_size' in (request.chord or ()))


def chord_id_of(request: Any) -> str:
    """Return the id of the chord that a task is a part of. The last step of a chain may have another group's id."""
    return request.chord.get('chord_id') or request.group


def ends_of(signature: Any) -> list[Any]:
    """Return the tasks at the end of a signature. Each of them counts in the header that the signature is in."""
    kind, kwargs = signature.get('subtask_type'), signature.get('kwargs')
    if kind == 'chord':
        return ends_of(kwargs['body'])
    if kind == 'group':
        return [end for task in kwargs['tasks'] for end in ends_of(task)]
    if kind == 'chain':
        return next((ends for task in reversed(kwargs['tasks']) if (ends := ends_of(task))), [])
    return [signature]


def parts_of(request: Any) -> Iterator[Any]:
    """Yield the requests of all parts that `request` stands for.

    When a chain fails, Celery reports its last step, in place of the parts which that step would have become.
    """
    for end in ends_of(request):
        yield request if end is request else request_of(end, group=request.group, chord=request.chord)


def request_of(signature: Mapping[str, Any], **known: Any) -> Any:
    """Return the request of a task that is not sent."""
    options = signature['options']
    return Context(options, **{'id': options.get('task_id'), 'group': options.get('group_id'), **known})
