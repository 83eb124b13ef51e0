"""Results in Azure Blob Storage without a secret, on this machine alone: run it with ``make demo``.

It starts Azurite, an endpoint that gives out a managed identity's tokens, and a worker; runs a few tasks; and shows
what came back and which blobs hold it. All that it starts ends with it.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # for t.services
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no traceback while there is nothing to end

from azure.identity import ManagedIdentityCredential  # noqa: E402
from azure.storage.blob import ContainerClient  # noqa: E402

from t.services.azurite import Azurite  # noqa: E402
from t.services.identity import IdentityEndpoint  # noqa: E402
from t.services.service import Service, ServiceUnavailable  # noqa: E402
from t.services.tokens import CLIENT_ID  # noqa: E402
from t.services.worker import Worker  # noqa: E402

#: Seconds that a result may take on a busy machine.
TIMEOUT = 60

PACKAGES = ('celery-azureblockblob', 'celery', 'azure-storage-blob', 'azure-identity')


def main() -> None:
    """Run the demo; a machine without Node.js or Azurite gets one sentence and exit status 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with TemporaryDirectory(prefix='azureblockblob-demo-') as folder:
            demonstrate(Path(folder))
    except ServiceUnavailable as exc:
        sys.exit(f'\n{exc}')
    except KeyboardInterrupt:
        print('\nStopped.')
        sys.exit(128 + signal.SIGINT)


def demonstrate(folder: Path) -> None:
    """Start everything, run the tasks, and print what is to be seen."""
    print(', '.join(f'{package} {version(package)}' for package in PACKAGES), end='\n\n')
    azurite, identity = Azurite(folder), IdentityEndpoint()
    worker = Worker('proj', folder, cwd=HERE)
    with running('Azurite, over TLS and with OAuth', azurite), running('the identity endpoint', identity):
        url = f'azureblockblob://ManagedIdentityCredential@{azurite.account_url}?client_id={CLIENT_ID}'
        for name in ('CELERY_BROKER_URL', 'CELERY_RESULT_BACKEND'):  # the user's own, which would win over these
            os.environ.pop(name, None)
        os.environ.update(azurite.environ | identity.environ)
        os.environ.update(
            AZURE_RESULT_BACKEND=url,
            BROKER_FOLDER=str(folder / 'broker'),
            BROKER_TRANSPORT='t.services.broker:Transport',  # kombu's own may read a message that is half written
            PYTHONPATH=str(HERE.parents[1]))
        with running('a worker with two processes', worker):
            print(f'\nresult_backend = {url}')
            run_tasks()
            print_tokens(identity)
            print_blobs(azurite.account_url)
            shut_down_worker()


@contextmanager
def running(what: str, service: Service) -> Iterator[None]:
    """Run a service for the length of a block, telling how long its start took."""
    print(f'{f"Starting {what} ":.<45} ', end='', flush=True)
    begin = time.monotonic()
    with service:
        print(f'{time.monotonic() - begin:.1f} s')
        yield


def run_tasks() -> None:
    """Run a value, an error, a group and a chord, and print what comes back."""
    from proj import add, fail, tsum  # reads the environment

    from celery import chord, group

    numbers = [add.s(number, number) for number in range(4)]
    value = add.delay(2, 3)
    error = fail.delay('sold out')
    parts = group(numbers).delay()
    parts.save()
    total = chord(numbers)(tsum.s())
    print_table('What came back:', [
        ('Task', 'Result'),
        ('add(2, 3)', value.get(TIMEOUT)),
        ("fail('sold out')", repr(error.get(TIMEOUT, propagate=False))),
        ('group of add(0, 0) to add(3, 3)', parts.get(TIMEOUT)),
        ('chord of the same four, with tsum', total.get(TIMEOUT)),
    ])


def shut_down_worker() -> None:
    """Ask the worker to end by a message: with this broker, it sees one at once, but a signal only after seconds."""
    from proj import app

    app.control.shutdown()


def print_tokens(identity: IdentityEndpoint) -> None:
    """Print which tokens the identity endpoint was asked for, and how often."""
    asked = Counter((request.parameters['resource'], request.parameters['client_id'])
                    for request in identity.requests)
    print_table('Tokens asked of the identity endpoint:', [
        ('Times', 'Resource', 'client_id'), *((times, *token) for token, times in asked.items())])


def print_blobs(account_url: str) -> None:
    """Print what the container holds."""
    with (ManagedIdentityCredential(client_id=CLIENT_ID) as credential,
          ContainerClient(account_url, 'celery', credential) as container):
        rows = [(*describe(json.loads(container.download_blob(blob.name).readall())), blob.size,
                 blob.content_settings.content_type, blob.name) for blob in container.list_blobs()]
    print_table('What the container "celery" holds:', [
        ('Result of', 'State', 'Bytes', 'Content type', 'Blob'), *sorted(rows)])


def describe(content: dict) -> tuple[str, str]:
    """Return what a blob is the result of, and its state; a saved group has none."""
    if 'status' not in content:
        _, parts = content['result']
        return f'group of {len(parts)}', '-'
    task = content['name'].removeprefix('proj.')
    return f'{task}({", ".join(map(repr, content["args"]))})', content['status']


def print_table(title: str, rows: list[tuple]) -> None:
    """Print rows, the first of which has the headings, in columns as wide as they need be."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    print(f'\n{title}')
    for row in rows:
        print('  ' + '  '.join(f'{cell!s:{width}}' for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == '__main__':
    main()
