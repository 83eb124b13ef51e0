"""Deleting what has expired."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import islice

from celery.utils.log import get_logger

from .client import BlobContainer, BlobItem

__all__ = ('Totals', 'delete_expired')

#: How many blobs one request deletes (REST: Blob Batch).
BATCH = 256

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
        attached: One of those beginnings. There, a blob ``NAME.SUFFIX`` is kept as long as the blob ``NAME``.
    """
    totals = Totals()
    now = datetime.now(timezone.utc)
    for prefix, age in ages.items():
        oldest = now - timedelta(seconds=min(age, now.timestamp()))  # before 1970, Azure had no blobs
        for batch in _batches(_expired(container, prefix, oldest, totals, prefix == attached)):
            totals.expired += len(batch)
            if not dry_run:
                totals.deleted += container.delete_many(batch)
            logger.info('Cleanup of %s*: %s', prefix, totals)
            on_progress(totals)
    return totals


def _expired(
    container: BlobContainer, prefix: str, oldest: datetime, totals: Totals, attached: bool,
) -> Iterator[BlobItem]:
    live = set()
    for item in container.list_blobs(prefix):  # in order of their names, so that NAME comes before NAME.SUFFIX
        totals.found += 1
        if item.last_modified >= oldest:
            if attached:
                live.add(item.name)
        elif not attached or item.name.rpartition('.')[0] not in live:
            yield item


def _batches(items: Iterable[BlobItem]) -> Iterator[list[BlobItem]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
