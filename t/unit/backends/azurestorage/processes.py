"""Forks, for tests of what a process has of its parent."""
from __future__ import annotations

import json
import os
import signal
import warnings

#: How long a child may take, in seconds.
DEADLINE = 30


def in_child(function):
    """Call a function in a forked process; return what it gave, by way of JSON."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 warns of threads, which are the point here
        pid = os.fork()
    if not pid:
        signal.alarm(DEADLINE)  # ends the process, should it hang
        try:
            given = function()
        except Exception as exc:
            given = repr(exc)
        os.write(writing, json.dumps(given).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, 'rb') as pipe:
        data = pipe.read()  # ends with the child
    os.waitpid(pid, 0)
    return json.loads(data)
