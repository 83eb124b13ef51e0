"""The header of a chord: its shape, and what the log says of its parts."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from celery.result import GroupResult
from celery.utils.functional import _regen

from .chordlog import GROWTH, PART, TREE, ChordLog

__all__ = ('Header', 'Part', 'PartKey', 'count_parts', 'ids_of', 'tree_of')


#: What a part is known by: its task's id, and its place in the header.
PartKey = tuple[str, int | None]


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
        repeated: Keys of the parts that came more than once.
        payloads: Names of the blobs of large results, those included of parts that came twice.
        blocks: Number of blocks in the log.
        etag: What stands for this content of the log.
        lapsed: Whether someone has claimed the log, and neither released nor deleted it in time.
    """

    parts: list[Part]
    growth: int
    tree: list[Any] | None
    repeated: set[PartKey]
    payloads: list[str]
    blocks: int
    etag: str
    lapsed: bool

    @classmethod
    def read(cls, log: ChordLog) -> Header:
        """Read a log.

        Raises:
            Gone: if there is no log.
        """
        records, etag, lapsed = log.read()
        reports = [Part._make([*record.head, record.data]) for record in records if record.kind == PART]
        first: dict[PartKey, Part] = {}
        repeated = set()
        for part in reports:
            key = (part.task_id, part.group_index)
            if first.setdefault(key, part) is not part:
                repeated.add(key)
        return cls(
            parts=sorted(first.values(), key=lambda part: (part.group_index is None, part.group_index)),
            growth=len({record.head[0] for record in records if record.kind == GROWTH}),
            tree=next((record.head for record in records if record.kind == TREE), None),
            repeated=repeated,
            payloads=[part.payload for part in reports if part.payload],
            blocks=len(records),
            etag=etag,
            lapsed=lapsed)

    def missing(self, size: int) -> int:
        """Return how many parts of a header that began with `size` are not there, of those that joined later too."""
        return max(0, size + self.growth - len(self.parts))

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


def count_parts(results: Iterable[Any]) -> int | None:
    """Return how many parts a header has that leads to `results`, or None if that shows only when they are sent.

    Celery looks at a generator's first task in any case; the others are not asked for.
    """
    if isinstance(results, _regen) and next(ids_of(results), None) is not None:
        return None
    return sum(1 for _ in ids_of(results))


def ids_of(results: Iterable[Any]) -> Iterator[str]:
    """Yield the task id of each part of a header that leads to `results`: those of nested groups one by one."""
    for result in results:
        if isinstance(result, GroupResult):
            yield from ids_of(result.results)
        else:
            yield str(result.id)


def tree_of(results: Iterable[Any]) -> list[Any]:
    """Return the task ids of `results`, nested as the groups among them are."""
    return [tree_of(result.results) if isinstance(result, GroupResult) else str(result.id) for result in results]
