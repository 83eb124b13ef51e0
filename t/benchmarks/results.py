"""What storing and reading results costs: released Celery's module and ours, in turn, on one Azurite.

    python -m t.benchmarks.results build/results.json [--quick]
"""
from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from importlib import metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from uuid import uuid4

import requests.adapters
from azure.storage.blob import BlobServiceClient

import celery_azureblockblob  # noqa: F401  (makes celery.backends.azureblockblob ours)
from celery import Celery, states, uuid
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.client import close_clients
from t.services.azurite import Azurite
from t.services.faults import SlowNetwork

from .measure import Series, take_turns, timed

#: The round trip of the slow network, in seconds.
ROUND_TRIP = 0.010

VALUE = {'answer': 42, 'text': 'x' * 200}


def released_class() -> type:
    """Return the backend of the installed Celery, from the file that the plugin takes the place of."""
    folder = Path(find_spec('celery').origin).parent
    name = 'celery.backends.released_azureblockblob'
    spec = spec_from_file_location(name, folder / 'backends' / 'azureblockblob.py')
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.AzureBlockBlobBackend


class Place:
    """An account, reached directly or through the slow network, with a backend of each kind and the bare SDK."""

    def __init__(self, connection_string: str) -> None:
        self.connection_string = connection_string
        app = Celery(set_as_current=False)
        app.conf.update(azureblockblob_container_name=f'bench-{uuid4()}', result_cache_max=-1)
        url = f'azureblockblob://{connection_string}'
        self.released = released_class()(app=app, url=url)
        self.ours = AzureBlockBlobBackend(app=app, url=url)
        self.service = BlobServiceClient.from_connection_string(connection_string)
        self.container = app.conf.azureblockblob_container_name
        self.released.store_result(uuid(), VALUE, states.SUCCESS)  # makes the container
        self.ours.store_result(uuid(), VALUE, states.SUCCESS)
        self.data = self.ours.encode({'status': 'SUCCESS', 'result': VALUE, 'traceback': None, 'children': []})

    @property
    def backends(self) -> dict[str, Any]:
        return {'ours': self.ours, 'released': self.released}

    def blob(self, name: str) -> Any:
        return self.service.get_blob_client(self.container, name)


class Requests:
    """Counts the requests of this process."""

    def __init__(self) -> None:
        self.count = 0
        self._send = requests.adapters.HTTPAdapter.send

    def __enter__(self) -> Requests:
        def send(adapter: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self._send(adapter, *args, **kwargs)
        requests.adapters.HTTPAdapter.send = send
        return self

    def __exit__(self, *exc_info: object) -> None:
        requests.adapters.HTTPAdapter.send = self._send


def store(place: Place) -> dict[str, Callable[[int], None]]:
    run = uuid()
    operations = {name: lambda n, b=backend: b.store_result(f'{run}-{n}', VALUE, states.SUCCESS)
                  for name, backend in place.backends.items()}
    return {**operations, 'bare SDK': lambda n: place.blob(f'{run}-{n}').upload_blob(place.data, overwrite=True)}


def start_and_store(place: Place) -> dict[str, Callable[[int], None]]:
    run = uuid()

    def both(backend: Any, n: int) -> None:
        backend.store_result(f'{run}-{n}', {'pid': 1}, states.STARTED)
        backend.store_result(f'{run}-{n}', VALUE, states.SUCCESS)
    return {name: lambda n, b=backend: both(b, n) for name, backend in place.backends.items()}


def read(place: Place) -> dict[str, Callable[[int], None]]:
    task_id = uuid()
    place.ours.store_result(task_id, VALUE, states.SUCCESS)
    name = f'celery-task-meta-{task_id}'
    operations = {name: lambda n, b=backend: b.get_task_meta(task_id, cache=False)
                  for name, backend in place.backends.items()}
    return {**operations, 'bare SDK': lambda n: place.blob(name).download_blob().readall()}


def read_missing(place: Place) -> dict[str, Callable[[int], None]]:
    return {name: lambda n, b=backend: b.get_task_meta(f'missing-{n}', cache=False)
            for name, backend in place.backends.items()}


def forget(place: Place) -> dict[str, Callable[[int], None]]:
    return {name: lambda n, b=backend: b.forget(f'missing-{n}') for name, backend in place.backends.items()}


def get_many(count: int) -> Callable[[Place], dict[str, Callable[[int], None]]]:
    def operations(place: Place) -> dict[str, Callable[[int], None]]:
        ids = [uuid() for _ in range(count)]
        place.ours.container.account.map(lambda task_id: place.ours.store_result(task_id, VALUE, 'SUCCESS'), ids)

        def collect(backend: Any) -> None:
            assert len(list(backend.get_many(ids, timeout=300))) == count
        return {name: lambda n, b=backend: collect(b) for name, backend in place.backends.items()}
    return operations


def waiting_lag(place: Place, tasks: int) -> dict[str, list[float]]:
    """Return how long after a short task has stored its result a waiting client has it, in seconds."""
    lags: dict[str, list[float]] = {name: [] for name in place.backends}
    random.seed(1)
    for _ in range(tasks):
        duration = random.uniform(0.02, 0.4)
        for name, backend in place.backends.items():
            task_id = uuid()
            stored: list[float] = []

            def work(task_id: str = task_id, stored: list[float] = stored, duration: float = duration) -> None:
                time.sleep(duration)
                place.ours.store_result(task_id, VALUE, states.SUCCESS)
                stored.append(time.monotonic())
            worker = threading.Thread(target=work)
            worker.start()
            backend.wait_for(task_id, timeout=10)
            seen = time.monotonic()
            worker.join()
            lags[name].append(max(seen - stored[0], 0))
    return lags


def clean_up(place: Place, count: int, rounds: int) -> dict[str, Series]:
    """Delete expired results: ours at once; released Celery expires nothing, so it forgets each."""
    def fill() -> list[str]:
        ids = [uuid() for _ in range(count)]
        place.ours.container.account.map(lambda task_id: place.ours.store_result(task_id, VALUE, 'SUCCESS'), ids)
        return ids

    series = {'ours': Series(), 'released': Series()}
    for _ in range(rounds):
        ids = fill()
        series['released'].add(timed(lambda number, ids=ids: [place.released.forget(task_id) for task_id in ids]))
        fill()
        time.sleep(1)  # a result must be older than this to expire
        series['ours'].add(timed(lambda number: place.ours.delete_expired(older_than=1)))
    return series


def growth(place: Place, sizes: list[int], threads: list[int], stores: int) -> dict[str, dict[int, float]]:
    """Return the seconds of `get_many` for a result by number of results, and of a store by number of threads."""
    by_size = {}
    for size in sizes:
        operation = get_many(size)(place)['ours']
        begun = time.perf_counter()
        operation(0)
        by_size[size] = (time.perf_counter() - begun) / size
    by_threads = {}
    for count in threads:
        def work(count: int = count) -> None:
            for _ in range(stores // count):
                place.ours.store_result(uuid(), VALUE, states.SUCCESS)
        workers = [threading.Thread(target=work) for _ in range(count)]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        by_threads[count] = (time.perf_counter() - begun) / (stores // count * count)
    return {'get_many': by_size, 'store': by_threads}


#: By name: what is measured, and how many operations make a round.
OPERATIONS: dict[str, tuple[Callable[[Place], dict[str, Callable[[int], None]]], int]] = {
    'store': (store, 50),
    'STARTED, then SUCCESS': (start_and_store, 25),
    'read': (read, 50),
    'read what is missing': (read_missing, 50),
    'forget': (forget, 50),
    '200 results by get_many': (get_many(200), 1),
}


def measure_operations(place: Place, rounds: int) -> dict[str, Any]:
    measured = {}
    for title, (operation, count) in OPERATIONS.items():
        print(f'  {title}', flush=True)
        contenders = operation(place)
        requests_of = {}
        for number, (name, contender) in enumerate(contenders.items()):
            with Requests() as counter:
                contender(-1 - number)
            requests_of[name] = counter.count
        series = take_turns(contenders, rounds, count)
        measured[title] = {
            name: {'requests': requests_of[name], 'wall': series[name].wall, 'cpu': series[name].cpu}
            for name in contenders}
    return measured


def measure_expiry_and_growth(rounds: int, sizes: list[int]) -> dict[str, Any]:
    """Measure these on an empty Azurite each: a deletion takes it the longer the more blobs it has."""
    results: dict[str, Any] = {}
    for title in ('cleanup', 'growth'):
        print(title, flush=True)
        with (tempfile.TemporaryDirectory() as directory,
              Azurite(Path(directory), tls=False, in_memory=True) as azurite):
            place = Place(azurite.connection_string)
            if title == 'cleanup':
                results[title] = {name: {'wall': series.wall, 'cpu': series.cpu}
                                  for name, series in clean_up(place, 1000, rounds).items()}
            else:
                results[title] = growth(place, sizes, [1, 2, 4, 8, 16, 32], 320)
            close_clients()
    return results


def versions() -> dict[str, str]:
    names = ('celery', 'azure-storage-blob', 'azure-core', 'requests', 'urllib3')
    return {'Python': platform.python_version(), **{name: metadata.version(name) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('output', type=Path)
    parser.add_argument('--quick', action='store_true', help='a few rounds only, to see that it runs')
    arguments = parser.parse_args()
    rounds, few = (2, 2) if arguments.quick else (15, 3)
    results: dict[str, Any] = {'date': date.today().isoformat(), 'versions': versions(), 'round_trip': ROUND_TRIP}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        azurite = stack.enter_context(Azurite(directory, tls=False, in_memory=True))
        far = stack.enter_context(SlowNetwork(directory, azurite.account_url, None, ROUND_TRIP))
        stack.callback(close_clients)
        places = {
            'near': Place(azurite.connection_string),
            'far': Place(azurite.connection_string.replace(azurite.account_url, far.account_url))}
        for name, place in places.items():
            print(f'{name}:', flush=True)
            results[name] = measure_operations(place, rounds)
            print('  a waiting client', flush=True)
            results[name]['lag'] = waiting_lag(place, 5 if arguments.quick else 40)
        sizes = [10, 100] if arguments.quick else [10, 100, 1000, 10_000]
        results |= measure_expiry_and_growth(few, sizes)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
