"""Processes end with the one that started them, whatever happens."""
from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t.services import process
from t.services.process import Process
from t.services.service import wait_until

ROOT = Path(__file__).resolve().parents[3]

#: Starts a child of its own; both hold the lock on the file that is named first, and neither ends when asked to.
STUBBORN = '''
import fcntl, os, signal, sys, time
lock = open(sys.argv[1])
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
time.sleep(120)
'''

#: A Python that starts a Script and then has an accident.
STARTS_AND_DIES = '''
import os, signal, sys
from pathlib import Path
from t.unit.services.test_process import STUBBORN, Script
script = Script(STUBBORN, Path(sys.argv[1]))
script.start()
os.kill(os.getpid(), signal.SIGKILL)
'''


class Script(Process):
    """A Python script that prints "ready" at some time."""

    def __init__(self, source, directory, **kwargs):
        super().__init__(directory / 'log', **kwargs)
        self.source = source
        self.lock = directory / 'lock'
        self.lock.touch()

    def command(self):
        return [sys.executable, '-c', self.source, str(self.lock)]

    def is_ready(self):
        return 'ready' in self.log

    def is_gone(self):
        """Whether no process of the group has the lock."""
        with self.lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


class test_Process:

    def test_is_ready_once_its_log_says_so(self, tmp_path):
        with Script('import signal; print("ready", flush=True); signal.pause()', tmp_path) as script:
            assert script.running
            assert script.log == 'ready\n'
        assert not script.running

    def test_gets_its_environment_and_directory(self, tmp_path):
        source = 'import os, signal; print(os.environ["NAME"], os.getcwd(), "ready", flush=True); signal.pause()'
        with Script(source, tmp_path, environ={'NAME': 'value'}, cwd=tmp_path) as script:
            assert script.log == f'value {tmp_path.resolve()} ready\n'

    def test_one_that_ends_at_once_shows_the_end_of_its_log(self, tmp_path):
        with pytest.raises(RuntimeError, match='Script, ready: it has ended. Its log ends:\nno such file'):
            Script('raise SystemExit("no such file")', tmp_path).start()

    def test_one_that_is_never_ready_is_given_up_and_killed(self, tmp_path, monkeypatch):
        monkeypatch.setattr(process, 'START_TIMEOUT', 0.3)
        script = Script(STUBBORN.replace('ready', 'not yet'), tmp_path)
        with pytest.raises(TimeoutError, match=r'Script, ready: not within 0\.3 s'):
            script.start()
        wait_until(script.is_gone, 'nothing is left', 10)

    def test_stop_ends_what_does_not_listen_and_what_that_has_started(self, tmp_path, monkeypatch):
        monkeypatch.setattr(process, 'STOP_TIMEOUT', 0.1)
        with Script(STUBBORN, tmp_path) as script:
            assert len(script.children()) == 1
            assert not script.is_gone()
        wait_until(script.is_gone, 'nothing is left', 10)

    def test_kill_ends_its_children_too(self, tmp_path):
        with Script(STUBBORN, tmp_path) as script:
            script.kill()
            wait_until(script.is_gone, 'nothing is left', 10)

    def test_does_not_wait_for_it_after_an_error(self, tmp_path):
        begin = time.monotonic()
        with pytest.raises(ZeroDivisionError), Script(STUBBORN, tmp_path) as script:
            1 / 0  # noqa: B018
        assert time.monotonic() - begin < process.STOP_TIMEOUT
        wait_until(script.is_gone, 'nothing is left', 10)

    def test_starts_again_with_a_new_log(self, tmp_path):
        script = Script(STUBBORN, tmp_path)
        pids = []
        for _ in range(2):
            script.start()
            pids.append(script.pid)
            assert script.log == 'ready\n'
            script.kill()
        assert pids[0] != pids[1]

    def test_ends_when_the_python_that_started_it_is_killed(self, tmp_path):
        parent = subprocess.run([sys.executable, '-c', STARTS_AND_DIES, tmp_path], cwd=ROOT, timeout=60)
        assert parent.returncode == -signal.SIGKILL
        assert (tmp_path / 'log').read_text() == 'ready\n'
        wait_until(Script('', tmp_path).is_gone, 'nothing is left', 10)

    def test_is_out_of_reach_of_control_c(self, tmp_path):
        with Script(STUBBORN, tmp_path) as script:
            assert os.getpgid(script.pid) == script.pid != os.getpgrp()
            script.kill()
