"""Results that expire, on Azurite."""
from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

from celery import Celery, states
from celery.backends.azurestorage.client import BlobContainer
from celery.beat import Scheduler
from t.services.azurite import Azurite
from t.services.service import wait_until

#: How many results expire among others. The more blobs Azurite has, the longer it takes for each deletion: minutes
#: of a processor's time for 10,000.
EXPIRED = int(os.environ.get('AZURE_TESTS_EXPIRED', '1000'))

#: Threads that write blobs.
WRITERS = 4

#: Azure knows to the second when a blob was written.
RESOLUTION = 1


@pytest.fixture
def crowded(tmp_path):
    """An Azurite for one test: all that is in it slows down each of its deletions, in any container."""
    with Azurite(tmp_path, tls=False) as azurite:
        yield azurite


@pytest.fixture
def crowded_container(crowded, container_name):
    """A container in it."""
    with BlobServiceClient.from_connection_string(crowded.connection_string) as service:
        yield service.create_container(container_name)


def write(azurite, container, names):
    """Write blobs, more quickly than the SDK would."""
    url = urlsplit(container.url)
    sas = generate_container_sas(
        azurite.account_name, container.container_name, azurite.account_key,
        permission=ContainerSasPermissions(write=True), expiry=datetime.now(timezone.utc) + timedelta(hours=1))

    def write_some(names):
        connection = HTTPConnection(url.netloc, timeout=60)
        for name in names:
            connection.request('PUT', f'{url.path}/{name}?{sas}', b'{}', {'x-ms-blob-type': 'BlockBlob'})
            response = connection.getresponse()
            response.read()
            assert response.status == 201
        connection.close()

    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(write_some, [names[writer::WRITERS] for writer in range(WRITERS)]))


def wait_for_seconds_to_pass(seconds, since):
    """Let what was written until `since` become older than what comes."""
    wait_until(lambda: time.time() >= since + seconds, 'the clock', 60)


def blob_names(container):
    return {blob.name for blob in container.list_blobs()}


@pytest.mark.timeout(1800)
def test_of_many_results_exactly_the_expired_ones_go(crowded, crowded_container):
    expired = [*(f'celery-task-meta-{number}' for number in range(EXPIRED * 9 // 10)),
               *(f'celery-taskset-meta-{number}' for number in range(EXPIRED // 10))]
    foreign = [*(f'other-{number}' for number in range(50)),
               *(f'other/celery-task-meta-{number}' for number in range(50))]
    live = [f'celery-task-meta-live-{number}' for number in range(EXPIRED // 10)]
    app = Celery('test', set_as_current=False, backend=f'azureblockblob://{crowded.connection_string}')
    app.conf.update(azureblockblob_container_name=crowded_container.container_name, azureblockblob_read_timeout=600)
    write(crowded, crowded_container, expired + foreign)
    boundary = time.time() + 2 * RESOLUTION
    wait_for_seconds_to_pass(3 * RESOLUTION, since=boundary)
    write(crowded, crowded_container, live)
    app.conf.result_expires = time.time() - boundary
    app.backend.cleanup()
    assert blob_names(crowded_container) == {*foreign, *live}


def test_a_result_that_is_rewritten_between_listing_and_deletion_stays(connect, monkeypatch):
    backend = connect()
    for task_id in ('rewritten', 'expired'):
        backend.store_result(task_id, None, states.STARTED)
    wait_for_seconds_to_pass(2 * RESOLUTION, since=time.time())
    delete_many = BlobContainer.delete_many

    def rewrite_and_delete(blobs, items):
        backend.store_result('rewritten', 'new', states.SUCCESS)
        return delete_many(blobs, items)

    monkeypatch.setattr(BlobContainer, 'delete_many', rewrite_and_delete)
    totals = backend.delete_expired(older_than=RESOLUTION)
    assert (totals.expired, totals.deleted) == (2, 1)
    assert backend.get_result('rewritten') == 'new'
    assert backend.get_state('expired') == states.PENDING


def test_a_result_that_is_gone_before_it_is_deleted_does_no_harm(connect, monkeypatch):
    backend = connect()
    for task_id in ('forgotten', 'expired'):
        backend.store_result(task_id, 1, states.SUCCESS)
    wait_for_seconds_to_pass(2 * RESOLUTION, since=time.time())
    delete_many = BlobContainer.delete_many

    def forget_and_delete(blobs, items):
        backend.forget('forgotten')
        return delete_many(blobs, items)

    monkeypatch.setattr(BlobContainer, 'delete_many', forget_and_delete)
    assert backend.delete_expired(older_than=RESOLUTION).deleted == 1
    assert backend.get_state('expired') == states.PENDING


def test_nothing_to_clean_up_in_a_container_that_is_not_there(connect, container):
    connect(settings={'result_expires': 1}).cleanup()
    assert not container.exists()


def test_results_below_a_base_path(connect, container):
    mine, others = connect(base_path='mine/'), connect()
    for backend in (mine, others):
        backend.store_result('task', 1, states.SUCCESS)
    wait_for_seconds_to_pass(2 * RESOLUTION, since=time.time())
    mine.delete_expired(older_than=RESOLUTION)
    assert blob_names(container) == {'celery-task-meta-task'}


def test_beat_cleans_up_by_itself(connect):
    scheduler = Scheduler(connect().app, lazy=True)
    scheduler.install_default_entries({})
    assert scheduler.schedule['celery.backend_cleanup'].task == 'celery.backend_cleanup'


def test_a_worker_with_beat_cleans_up(make_project, container, tmp_path):
    every_second = {'celery.backend_cleanup': {'task': 'celery.backend_cleanup', 'schedule': 1}}
    project = make_project(result_expires=1, beat_schedule=every_second)
    project.app.backend.store_result('task', 1, states.SUCCESS)
    project.app.GroupResult('group', []).save()
    container.upload_blob('foreign', b'')
    old = {'celery-task-meta-task', 'celery-taskset-meta-group'}
    assert blob_names(container) == {*old, 'foreign'}
    with project.worker(arguments=('--beat', '--schedule', str(tmp_path / 'schedule'))) as worker:
        worker.wait_until(lambda: not old & blob_names(container), 'the cleanup', 60)
    assert 'foreign' in blob_names(container)
