"""Deleting what has expired."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import islice

from celery.utils.log import get_logger

from .client import BlobContainer, BlobItem

__all__ = ('Totals', 'delete_expired')

#: How many blobs one request deletes (REST: Blob Batch).
BATCH = 256

#: The end of the name of a blob that goes with another one: the rest is the other's name.
_OWNED = re.compile(r'\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z')

logger = get_logger(__name__)


@dataclass
class Totals:
    """How many blobs were found, had expired, were deleted; an expired one may be rewritten before it is deleted."""

    found: int = 0
    expired: int = 0
    deleted: int = 0


def delete_expired(
    container: BlobContainer,
    ages: Mapping[str, float],
    dry_run: bool = False,
    on_progress: Callable[[Totals], None] = lambda totals: None,
    attached: str = '',
) -> Totals:
    """Delete the blobs that were written too long ago.

    Each is deleted only as it was listed, so that a result that is rewritten meanwhile stays.

    Arguments:
        container: Where they are.
        ages: What their names begin with, and for how many seconds each kind is kept.
        dry_run: Only count them.
        on_progress: Called with the totals so far after each batch.
        attached: One of those beginnings. There, a blob ``NAME.UUID`` is kept as long as the blob ``NAME``.
    """
    totals = Totals()
    now = datetime.now(timezone.utc)

    def delete(prefix: str, items: Iterable[BlobItem]) -> None:
        for batch in _batches(items):
            totals.expired += len(batch)
            if not dry_run:
                totals.deleted += container.delete_many(batch)
            logger.info('Cleanup of %s*: %s', prefix, totals)
            on_progress(totals)

    for prefix, age in ages.items():
        oldest = now - timedelta(seconds=min(age, now.timestamp()))  # before 1970, Azure had no blobs
        owned: list[BlobItem] = []
        delete(prefix, _expired(container, prefix, oldest, totals, owned if prefix == attached else None))
        if owned and not dry_run:
            there = {item.name for item in container.list_blobs(prefix)}
            owned = [item for item in owned if _owner(item) not in there]
        delete(prefix, owned)
    return totals


def _expired(
    container: BlobContainer, prefix: str, oldest: datetime, totals: Totals, owned: list[BlobItem] | None,
) -> Iterator[BlobItem]:
    """Yield what has expired; put into `owned` what goes with another such blob, since that may be rewritten yet."""
    live, expired = set(), set()
    for item in container.list_blobs(prefix):  # in order of their names, so that NAME comes before NAME.UUID
        totals.found += 1
        if owned is None:
            if item.last_modified < oldest:
                yield item
        elif item.last_modified >= oldest:
            live.add(item.name)
        elif _owner(item) in expired:
            owned.append(item)
        elif _owner(item) not in live:
            expired.add(item.name)
            yield item


def _owner(item: BlobItem) -> str:
    end = _OWNED.search(item.name)
    return item.name[:end.start()] if end else ''


def _batches(items: Iterable[BlobItem]) -> Iterator[list[BlobItem]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
