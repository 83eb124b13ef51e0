"""Measuring two or more things in turn, so that what else the machine does falls on all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

#: What a round leaves: seconds of wall clock and of CPU, for each operation.
Sample = tuple[float, float]


@dataclass
class Series:
    """The samples of one contender, in seconds for each operation."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        self.wall.append(sample[0])
        self.cpu.append(sample[1])


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method='inclusive')
        return cls(median, low, high)


def ratio(ours: list[float], theirs: list[float]) -> Spread:
    """Return how many times as much as ours theirs is, round by round."""
    return Spread.of([their / our for our, their in zip(ours, theirs, strict=True)])


def take_turns(contenders: Mapping[str, Callable[[int], None]], rounds: int, operations: int) -> dict[str, Series]:
    """Run each contender `operations` times a round, in an order that changes from round to round.

    Arguments:
        contenders: What is measured, by name; called with a number that is new each time.
        rounds: How often each has its turn, after one round that is not counted.
        operations: How often it is called in its turn.
    """
    series = {name: Series() for name in contenders}
    names = list(contenders)
    number = 0
    for turn in range(rounds + 1):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            sample = timed(contenders[name], number, operations)
            number += operations
            if turn:
                series[name].add(sample)
    return series


def timed(operation: Callable[[int], None], first: int = 0, operations: int = 1) -> Sample:
    """Call `operation` with numbers from `first` on; return the seconds of a call, on the clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(first, first + operations):
        operation(number)
    return (time.perf_counter() - wall) / operations, (time.process_time() - cpu) / operations
