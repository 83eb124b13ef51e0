"""The fake against what Azure does, so that the tests on it mean something."""
from __future__ import annotations

import pytest

from .conftest import ACCOUNT_URL
from .fakehttp import cut_connection, refuse_connection
from .servicecontract import BlobServiceContract, refused

exceptions = pytest.importorskip('azure.core.exceptions')


@pytest.fixture
def blob_container(fake_service):
    """A container of the fake service."""
    from azure.core.pipeline.transport import RequestsTransport
    from azure.storage.blob import BlobServiceClient
    from requests import Session
    session = Session()
    session.mount('https://', fake_service.adapter())
    with BlobServiceClient(
            ACCOUNT_URL, credential={'account_name': 'fake', 'account_key': 'a2V5'},
            transport=RequestsTransport(session=session), retry_total=0) as service:
        yield service.create_container('results')


class test_FakeBlobService(BlobServiceContract):

    def test_a_deleted_containers_name_is_free_after_30_seconds(self, blob_container, fake_service):
        blob_container.delete_container()
        with refused(409, 'ContainerBeingDeleted'):
            blob_container.create_container()
        fake_service.now += 30
        blob_container.create_container()
        assert list(blob_container.list_blobs()) == []

    def test_a_lease_ends_with_its_time(self, log, fake_service):
        lease = log.acquire_lease(15)
        fake_service.now += 14
        with refused(412, 'LeaseIdMissing'):
            log.append_block(b'x')
        lease.renew()
        fake_service.now += 15
        assert log.get_blob_properties().lease.state == 'expired'
        log.append_block(b'x')

    def test_an_expired_lease_can_be_renewed_until_someone_writes(self, log, fake_service):
        lease = log.acquire_lease(15)
        fake_service.now += 15
        lease.renew()
        fake_service.now += 15
        log.append_block(b'x')
        with refused(409, 'LeaseIdMismatchWithLeaseOperation'):
            lease.renew()

    def test_a_lease_that_is_being_broken_holds_for_its_time(self, log, fake_service):
        assert log.acquire_lease(15).break_lease() == 15
        with refused(409, 'LeaseAlreadyPresent'):
            log.acquire_lease(15)
        fake_service.now += 15
        log.acquire_lease(15)

    def test_a_full_append_blob_takes_no_more(self, log, fake_service):
        fake_service.max_blocks = 1
        log.append_block(b'x')
        with refused(409, 'BlockCountExceedsLimit'):
            log.append_block(b'x')

    def test_blobs_have_the_time_of_the_services_clock(self, blob_container, fake_service):
        fake_service.now = 1000000000
        blob_container.upload_blob('a', b'x')
        fake_service.now += 60
        entry, = blob_container.list_blobs()
        assert entry.last_modified.timestamp() == 1000000000

    def test_what_the_fake_does_not_know_is_no_silent_success(self, blob_container):
        with pytest.raises(NotImplementedError):
            blob_container.set_container_metadata({'a': 'b'})

    def test_plans_are_followed_in_their_order(self, blob_container, fake_service):
        fake_service.on('Put Blob', 'a', answer=(503, 'ServerBusy'))
        fake_service.on('Put Blob')
        fake_service.on('Put Blob', answer=(500, 'InternalError'))
        blob_container.upload_blob('b', b'x')
        with refused(503, 'ServerBusy'):
            blob_container.upload_blob('a', b'x')
        with refused(500, 'InternalError'):
            blob_container.upload_blob('c', b'x')
        blob_container.upload_blob('c', b'x')
        assert [entry.name for entry in blob_container.list_blobs()] == ['b', 'c']

    def test_a_refused_connection_does_nothing(self, blob_container, fake_service):
        fake_service.on('Put Blob', before=refuse_connection)
        with pytest.raises(exceptions.ServiceRequestError):
            blob_container.upload_blob('a', b'x')
        assert list(blob_container.list_blobs()) == []

    def test_a_lost_answer_is_to_something_done(self, blob_container, fake_service):
        fake_service.on('Put Blob', after=cut_connection)
        with pytest.raises(exceptions.ServiceResponseError):
            blob_container.upload_blob('a', b'x')
        assert [entry.name for entry in blob_container.list_blobs()] == ['a']

    def test_requests_are_recorded_by_their_names_in_the_reference(self, blob_container, fake_service):
        blob_container.upload_blob('a', b'data')
        assert fake_service.operations == ['Create Container', 'Put Blob']
        assert fake_service.requests[-1].body == b'data'
