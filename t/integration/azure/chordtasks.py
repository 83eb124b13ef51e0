"""Tasks of chords, beside those in :mod:`.app`: a project names this module in its setting ``include``."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from celery import shared_task


@shared_task
def echo(value):
    return value


@shared_task(ignore_result=True)
def echo_quietly(value):
    return value


@shared_task
def write_process_id(file):
    Path(file).write_text(str(os.getpid()))
    return 'written'


@shared_task
def echo_at_length(text, length):
    return text * length


@shared_task
def record(results, file):
    """The body of a chord: add a line to a file for each time it is started."""
    with Path(file).open('a') as lines:
        lines.write(json.dumps(results) + '\n')
    return results


@shared_task
def record_error(request, exc, traceback, file):
    """The errback of a body: add a line to a file for each time it is called."""
    with Path(file).open('a') as lines:
        lines.write(json.dumps(f'{type(exc).__name__}: {exc}') + '\n')


@shared_task(bind=True)
def replace_by_chain(self, *values):
    return self.replace(echo.s(values[0]) | echo_all.s(values[1:]))


@shared_task(bind=True)
def echo_all(self, value, values):
    return [value, *values]


@shared_task(bind=True)
def add_parts(self, *values):
    for value in values:
        self.add_to_chord(echo.s(value))
    return 'added'


@shared_task
def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@shared_task
def outlast_its_time():
    """Run until a time limit ends it."""
    while True:
        time.sleep(0.05)
