"""A worker is real, ready when it has started, and gone when it is killed."""
from __future__ import annotations

import pytest

from t.services.process import running_processes
from t.services.service import wait_until
from t.services.worker import Worker

APP = '''
from celery import Celery
app = Celery('tiny', broker='memory://')
'''


@pytest.fixture
def app_folder(tmp_path):
    (tmp_path / 'tiny.py').write_text(APP)
    return tmp_path


class test_Worker:

    def test_has_the_processes_it_was_asked_for_until_it_is_killed(self, app_folder):
        with Worker('tiny', app_folder, cwd=app_folder, concurrency=2) as worker:
            assert ' ready.' in worker.log
            processes = worker.children()
            assert len(processes) == 2
            worker.kill()
            assert not worker.running
            wait_until(lambda: not running_processes().keys() & processes, 'its processes are gone', 10)

    def test_an_app_that_is_not_there_is_told_from_its_log(self, app_folder):
        with pytest.raises(RuntimeError, match='missing'):
            Worker('missing', app_folder, cwd=app_folder).start()
