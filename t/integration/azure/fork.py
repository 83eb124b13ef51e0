"""Uses a backend, forks, and uses it in both processes at once.

``python -m t.integration.azure.fork URL`` prints, for each of the three, what it read, and the local ports of the
connections on which it was answered.
"""
from __future__ import annotations

import json
import os
import sys
from http.client import HTTPConnection
from unittest.mock import patch

from celery import Celery, states

RESULTS = 5


def use(backend, name: str) -> dict[str, list]:
    """Store results and read them in parallel."""
    ports = set()
    answer = HTTPConnection.getresponse

    def noting_port(connection):
        ports.add(connection.sock.getsockname()[1])
        return answer(connection)

    with patch.object(HTTPConnection, 'getresponse', noting_port):
        ids = [f'{name}-{number}' for number in range(RESULTS)]
        for task_id in ids:
            backend.store_result(task_id, task_id, states.SUCCESS)
        read = dict(backend.get_many(ids, timeout=30))
    return {'read': [read[task_id]['result'] for task_id in ids], 'ports': sorted(ports)}


def main(url: str) -> None:
    """Print what the processes saw, as JSON."""
    backend = Celery('fork', set_as_current=False, backend=url).backend
    seen = {'before': use(backend, 'before')}
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, json.dumps(use(backend, 'child')).encode())
        os._exit(0)
    os.close(writer)
    seen['parent'] = use(backend, 'parent')
    with open(reader) as answer:
        seen['child'] = json.load(answer)
    print(json.dumps(seen))


if __name__ == '__main__':
    main(sys.argv[1])
