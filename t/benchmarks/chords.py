"""How long a chord of empty parts takes: here, with released Celery, and with Redis, in turn, on a worker each.

    python -m t.benchmarks.chords build/chords.json [--rounds 15]

Measured is the time from the start of the chord until its body runs, which tells so through Redis. Redis is the
broker of all three; Azurite stores the results of the first two.
"""
from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path

from redis import Redis as RedisClient

from celery import Celery, chord, uuid
from t.services.azurite import ROOT, Azurite
from t.services.redis import Redis
from t.services.worker import Worker

from .chord_app import make_app
from .measure import Spread, ratio

SIZES = (20, 200)
CONTENDERS = ('ours', 'released', 'redis')

#: Seconds that a chord may take.
TIMEOUT = 120

LIBRARIES = ('celery', 'azure-storage-blob', 'redis')


class Contender:
    """A worker of two processes with its backend, and a client that starts chords.

    Arguments:
        name: One of `CONTENDERS`.
        directory: Where its log goes; must exist.
        broker: URL of a Redis database.
        backend: URL of its backend.
    """

    def __init__(self, name: str, directory: Path, broker: str, backend: str) -> None:
        self.name = name
        self.broker = broker
        self.app: Celery = make_app(name, broker, backend)
        self.worker = Worker(
            't.benchmarks.chord_app', directory, name=name, cwd=ROOT,
            environ={'BENCH_CONTENDER': name, 'BENCH_BROKER': broker, 'BENCH_BACKEND': backend})

    def run(self, size: int) -> float:
        """Run a chord, and return how many seconds it took until its body ran."""
        key = f'done-{uuid()}'
        parts = [self.app.signature('empty') for _ in range(size)]
        with RedisClient.from_url(self.broker, socket_timeout=None) as redis:
            begun = time.perf_counter()
            chord(parts, app=self.app)(self.app.signature('tell', (key, self.broker)))
            told = redis.blpop(key, TIMEOUT)
            seconds = time.perf_counter() - begun
        if told is None or int(told[1]) != size:
            raise RuntimeError(f'{self.name}: {told} came of {size} parts. {self.worker.log[-2000:]}')
        self._forget_results()
        return seconds

    def _forget_results(self) -> None:
        """Free what this client keeps of the chord, of which Redis' backend waits for each part."""
        for pending in getattr(self.app.backend, '_pending_results', ()):
            pending.clear()
        gc.collect()

    def check(self) -> None:
        """Make sure that it polled if, and only if, it is released Celery."""
        polled = 'celery.chord_unlock' in self.worker.log
        if polled != (self.name == 'released'):
            raise RuntimeError(f'{self.name} {"polled" if polled else "did not poll"}: the figures say nothing.')


@contextmanager
def contenders(directory: Path) -> Iterator[list[Contender]]:
    """Start what is compared."""
    with ExitStack() as stack:
        redis = stack.enter_context(Redis(directory))
        azurite = stack.enter_context(Azurite(directory, tls=False, in_memory=True))
        storage = f'azureblockblob://{azurite.connection_string}'
        started = []
        for number, name in enumerate(CONTENDERS):
            broker = re.sub('0$', str(number), redis.url)
            contender = Contender(name, directory, broker, broker if name == 'redis' else storage)
            stack.enter_context(contender.worker)
            stack.callback(contender.app.close)
            started.append(contender)
        yield started


def measure(size: int, rivals: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round after the first, which is not counted, by contender."""
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for turn in range(rounds + 1):
        first = turn % len(rivals)
        for rival in rivals[first:] + rivals[:first]:
            took = rival.run(size)
            if turn:
                seconds[rival.name].append(took)
    return seconds


def show(size: int, seconds: dict[str, list[float]]) -> None:
    """Print the figures for one size."""
    print(f'{size} parts: median (quartiles)')
    for name, values in seconds.items():
        spread, times = Spread.of(values), ratio(seconds['ours'], values)
        print(f'  {name:<9} {spread.median:7.3f} s ({spread.low:.3f} to {spread.high:.3f}), '
              f'{times.median:.2f} times ours ({times.low:.2f} to {times.high:.2f})', flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='where to write the figures, as JSON')
    parser.add_argument('--rounds', type=int, default=15, help='chords of each size and contender (15)')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contenders(Path(directory)) as rivals:
        figures = {}
        for size in SIZES:
            figures[size] = measure(size, rivals, arguments.rounds)
            show(size, figures[size])
        for rival in rivals:
            rival.check()
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text(json.dumps({
        'date': date.today().isoformat(),
        'versions': {'python': platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}},
        'seconds': figures,
    }, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
