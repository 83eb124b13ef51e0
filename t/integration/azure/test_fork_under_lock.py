"""A fork while another thread of the process is inside the connection pool."""
from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading

from urllib3.connectionpool import HTTPConnectionPool

from celery import Celery, states
from t.services.azurite import ROOT

#: Seconds that the child may take.
DEADLINE = 30


def test_the_child_stores_and_ends(url_for):
    subprocess.run([sys.executable, '-m', __name__, url_for()], cwd=ROOT, timeout=2 * DEADLINE, check=True)


def main(url: str) -> int:
    """Fork while every lock of the backend's connection pools is held; return the child's exit status."""
    app = Celery('fork', set_as_current=False, backend=url)
    app.backend.store_result('parent', 1, states.SUCCESS)
    locks = [pool.pool.mutex for pool in gc.get_objects() if isinstance(pool, HTTPConnectionPool)]
    assert locks
    for lock in locks:
        lock.acquire()
    child = os.fork()
    if not child:
        app.backend.store_result('child', 1, states.SUCCESS)
        gc.collect()
        os._exit(0)
    for lock in locks:
        lock.release()
    killer = threading.Timer(DEADLINE, os.kill, (child, signal.SIGKILL))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    return os.waitstatus_to_exitcode(status)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
