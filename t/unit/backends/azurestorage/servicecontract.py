"""What the backend takes for granted of a Blob service, said through the SDK. The fake and Azurite do it alike."""
from __future__ import annotations

import base64
from contextlib import contextmanager

import pytest

core = pytest.importorskip('azure.core')
exceptions = pytest.importorskip('azure.core.exceptions')
blob = pytest.importorskip('azure.storage.blob')

IF_ABSENT = {'match_condition': core.MatchConditions.IfMissing}


def if_unchanged(etag):
    return {'match_condition': core.MatchConditions.IfNotModified, 'etag': etag}


@contextmanager
def refused(status, code):
    """Expect an answer with this status and error code."""
    with pytest.raises(exceptions.HttpResponseError) as caught:
        yield
    assert (caught.value.status_code, caught.value.response.headers['x-ms-error-code']) == (status, code)


class BlobServiceContract:
    """Needs a fixture `blob_container`: a ``ContainerClient`` of a new container that exists."""

    @pytest.fixture
    def put(self, blob_container):
        """Store a blob and return its ETag."""
        def put(name, data=b'x', **kwargs):
            return blob_container.get_blob_client(name).upload_blob(data, overwrite=True, **kwargs)['etag']
        return put

    @pytest.fixture
    def log(self, blob_container):
        """An append blob."""
        log = blob_container.get_blob_client('log')
        log.create_append_blob()
        return log

    def test_a_container_is_made_once(self, blob_container):
        with refused(409, 'ContainerAlreadyExists'):
            blob_container.create_container()

    def test_nothing_is_found_in_a_missing_container(self, blob_container):
        blob_container.delete_container()
        with refused(404, 'ContainerNotFound'):
            blob_container.get_blob_client('a').download_blob()
        with refused(404, 'ContainerNotFound'):
            blob_container.get_blob_client('a').upload_blob(b'x', overwrite=True, **IF_ABSENT)
        with refused(404, 'ContainerNotFound'):
            blob_container.get_blob_client('a').append_block(b'x')
        with refused(404, 'ContainerNotFound'):
            list(blob_container.list_blobs())

    def test_a_blob_comes_back_with_its_type_and_etag(self, blob_container, put):
        etag = put('a/b ä?', b'data', content_settings=blob.ContentSettings(content_type='text/x-test'))
        stream = blob_container.get_blob_client('a/b ä?').download_blob()
        assert stream.readall() == b'data'
        assert stream.properties.content_settings.content_type == 'text/x-test'
        assert stream.properties.etag == etag

    def test_an_empty_blob_can_be_read(self, blob_container, put):
        put('a', b'')
        assert blob_container.get_blob_client('a').download_blob().readall() == b''

    def test_a_part_of_a_blob_can_be_read(self, blob_container, put):
        put('a', b'0123456789')
        part = blob_container.get_blob_client('a').download_blob(offset=7, length=100)
        assert part.readall() == b'789'
        with refused(416, 'InvalidRange'):
            blob_container.get_blob_client('a').download_blob(offset=11, length=1)

    def test_a_missing_blob_is_not_found(self, blob_container):
        missing = blob_container.get_blob_client('a')
        for request in (missing.download_blob, missing.delete_blob, missing.acquire_lease,
                        lambda: missing.append_block(b'x'), lambda: missing.set_blob_metadata({})):
            with refused(404, 'BlobNotFound'):
                request()
        assert not missing.exists()

    def test_only_the_first_of_two_new_blobs_is_written(self, blob_container, put):
        put('a', b'first', **IF_ABSENT)
        with refused(409, 'BlobAlreadyExists'):
            put('a', b'second', **IF_ABSENT)
        assert blob_container.get_blob_client('a').download_blob().readall() == b'first'

    def test_only_the_content_of_an_etag_is_replaced(self, blob_container, put):
        etag = put('a', b'first')
        assert put('a', b'second', **if_unchanged(etag)) != etag
        with refused(412, 'ConditionNotMet'):
            put('a', b'third', **if_unchanged(etag))
        with refused(412, 'ConditionNotMet'):
            put('missing', b'third', **if_unchanged(etag))
        assert blob_container.get_blob_client('a').download_blob().readall() == b'second'

    def test_only_a_changed_blob_is_read(self, blob_container, put):
        etag = put('a')
        modified = {'match_condition': core.MatchConditions.IfModified, 'etag': etag}
        with refused(304, 'ConditionNotMet'):
            blob_container.get_blob_client('a').download_blob(**modified)
        put('a', b'new')
        assert blob_container.get_blob_client('a').download_blob(**modified).readall() == b'new'

    def test_only_the_content_of_an_etag_is_deleted(self, blob_container, put):
        old = put('a')
        new = put('a')
        with refused(412, 'ConditionNotMet'):
            blob_container.get_blob_client('a').delete_blob(**if_unchanged(old))
        blob_container.get_blob_client('a').delete_blob(**if_unchanged(new))
        assert not blob_container.get_blob_client('a').exists()

    def test_metadata_is_kept_and_makes_a_new_etag(self, blob_container, put):
        etag = put('a', b'data')
        client = blob_container.get_blob_client('a')
        client.set_blob_metadata({'size': '3'})
        properties = client.get_blob_properties()
        assert properties.metadata == {'size': '3'}
        assert properties.size == 4
        assert properties.etag != etag
        with refused(412, 'ConditionNotMet'):
            client.set_blob_metadata({'size': '4'}, **if_unchanged(etag))

    def test_blobs_are_listed_by_prefix_in_order_and_pages(self, blob_container, put):
        for name in ('b/3', 'b/1', 'a/1', 'b/2', 'c'):
            put(name)
        pages = blob_container.list_blobs(name_starts_with='b/', results_per_page=2).by_page()
        assert [[entry.name for entry in page] for page in pages] == [['b/1', 'b/2'], ['b/3']]

    def test_a_listing_tells_size_age_and_etag(self, blob_container, put):
        etag = put('a', b'data', metadata={'size': '3'})
        entry, = blob_container.list_blobs(include=['metadata'])
        properties = blob_container.get_blob_client('a').get_blob_properties()
        assert (entry.size, entry.last_modified, entry.metadata) == (4, properties.last_modified, {'size': '3'})
        put('a', b'data', **if_unchanged(entry.etag))
        with refused(412, 'ConditionNotMet'):
            put('a', b'data', **if_unchanged(etag))

    def test_a_batch_deletes_each_blob_on_its_own_condition(self, blob_container, put):
        old = put('rewritten')
        put('rewritten')
        etag = put('same')
        answers = list(blob_container.delete_blobs(
            {'name': 'same', 'etag': etag, 'match_condition': core.MatchConditions.IfNotModified},
            {'name': 'rewritten', 'etag': old, 'match_condition': core.MatchConditions.IfNotModified},
            {'name': 'missing'},
            raise_on_any_failure=False))
        assert [answer.status_code for answer in answers] == [202, 412, 404]
        assert [entry.name for entry in blob_container.list_blobs()] == ['rewritten']

    def test_blocks_become_a_blob_when_their_list_is_written(self, blob_container):
        client = blob_container.get_blob_client('a')
        ids = [base64.b64encode(name).decode() for name in (b'1', b'2')]
        client.stage_block(ids[0], b'one')
        client.stage_block(ids[1], b'two')
        with refused(404, 'BlobNotFound'):
            client.download_blob()
        client.commit_block_list([blob.BlobBlock(block_id) for block_id in reversed(ids)])
        assert client.download_blob().readall() == b'twoone'
        with refused(409, 'BlobAlreadyExists'):
            client.commit_block_list([], **IF_ABSENT)
        with refused(400, 'InvalidBlockList'):
            client.commit_block_list([blob.BlobBlock(base64.b64encode(b'3').decode())])

    def test_an_append_tells_its_place_and_the_number_of_blocks(self, log):
        first = log.append_block(b'one')
        second = log.append_block(b'two')
        assert (first['blob_append_offset'], first['blob_committed_block_count']) == ('0', 1)
        assert (second['blob_append_offset'], second['blob_committed_block_count']) == ('3', 2)
        assert first['etag'] != second['etag']
        assert log.download_blob().readall() == b'onetwo'
        assert log.get_blob_properties().append_blob_committed_block_count == 2

    def test_an_append_can_depend_on_its_place(self, log):
        log.append_block(b'one', appendpos_condition=0)
        with refused(412, 'AppendPositionConditionNotMet'):
            log.append_block(b'two', appendpos_condition=0)
        with refused(412, 'MaxBlobSizeConditionNotMet'):
            log.append_block(b'two', maxsize_condition=5)
        assert log.download_blob().readall() == b'one'

    def test_an_append_blob_that_is_there_is_not_truncated(self, log):
        log.append_block(b'one')
        with refused(409, 'BlobAlreadyExists'):
            log.create_append_blob(**IF_ABSENT)
        assert log.download_blob().readall() == b'one'

    def test_a_block_blob_takes_no_appends(self, blob_container, put):
        put('a')
        with refused(409, 'InvalidBlobType'):
            blob_container.get_blob_client('a').append_block(b'x')

    def test_who_has_no_lease_cannot_write(self, log):
        lease = log.acquire_lease(15)
        other = '00000000-0000-0000-0000-000000000000'
        for write in (lambda **kwargs: log.append_block(b'x', **kwargs),
                      lambda **kwargs: log.set_blob_metadata({}, **kwargs),
                      lambda **kwargs: log.create_append_blob(**kwargs), log.delete_blob):
            with refused(412, 'LeaseIdMissing'):
                write()
            with refused(412, 'LeaseIdMismatchWithBlobOperation'):
                write(lease=other)
        log.append_block(b'one', lease=lease)
        assert log.download_blob().readall() == b'one'
        log.delete_blob(lease=lease)
        assert not log.exists()

    def test_a_lease_keeps_the_etag(self, log):
        etag = log.get_blob_properties().etag
        lease = log.acquire_lease(15, **if_unchanged(etag))
        lease.renew()
        lease.release()
        assert log.get_blob_properties().etag == etag
        with refused(412, 'ConditionNotMet'):
            log.acquire_lease(15, **if_unchanged('"0x8D0000000000000"'))

    def test_there_is_one_lease_at_a_time(self, log):
        first = log.acquire_lease(15)
        assert log.get_blob_properties().lease.state == 'leased'
        with refused(409, 'LeaseAlreadyPresent'):
            log.acquire_lease(15)
        blob.BlobLeaseClient(log, first.id).release()
        assert log.get_blob_properties().lease.state == 'available'
        with refused(409, 'LeaseIdMismatchWithLeaseOperation'):
            first.renew()
        second = log.acquire_lease(15)
        for late in (first.renew, first.release):
            with refused(409, 'LeaseIdMismatchWithLeaseOperation'):
                late()
        second.renew()

    def test_a_broken_lease_is_not_renewed(self, log):
        lease = log.acquire_lease(-1)
        assert lease.break_lease() == 0
        with refused(409, 'LeaseIsBrokenAndCannotBeRenewed'):
            lease.renew()
        log.append_block(b'one')

    def test_a_lease_lasts_15_to_60_seconds(self, log):
        with refused(400, 'InvalidHeaderValue'):
            log.acquire_lease(14)
