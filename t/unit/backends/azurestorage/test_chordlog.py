"""The log of a chord: what each operation does, and what it makes of each of the service's answers."""
from __future__ import annotations

import logging
import threading
import uuid
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip('azure.storage.blob')

from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)

from celery.backends.azurestorage import chordlog
from celery.backends.azurestorage.chordlog import (
    GROWTH,
    LEASE_DURATION,
    PART,
    TREE,
    Changed,
    ChordLog,
    Crowded,
    Full,
    Gone,
    Leased,
    LeaseLost,
    Record,
)

from .fakehttp import cut_connection, refuse_connection

BLOCK = Record(PART, ['id', 0, 'SUCCESS', None], b'1').to_bytes()


@pytest.fixture
def container(make_backend):
    """The container of the logs; it is not there yet."""
    return make_backend().container


@pytest.fixture
def log(container):
    """A log that nobody has created yet."""
    return ChordLog(container, 'celery-chord-id')


@pytest.fixture
def created(log):
    """An empty log."""
    log.create()
    return log


@pytest.fixture
def no_pauses(monkeypatch):
    """Return a function that says how often an operation is repeated, without pauses."""
    def repeat(times):
        monkeypatch.setattr(chordlog, 'pauses', lambda longest=0: iter([0] * times))
    return repeat


def claim(log):
    """Claim the log as it stands."""
    return log.claim(log.read()[1], str(uuid.uuid4()))


def blob_of(service, log):
    """What the service has stored of a log."""
    [container] = service.containers.values()
    return container.blobs[log.name]


def leased(service, log):
    """Tell whether the log is leased."""
    lease = blob_of(service, log).lease
    return lease is not None and lease.locks(service.now)


class test_create:

    def test_the_container_is_made_with_the_first_log(self, log, fake_service):
        log.create()
        assert log.read()[0] == []
        assert fake_service.operations[:3] == ['Put Blob', 'Create Container', 'Put Blob']

    def test_a_log_that_is_there_is_kept(self, created):
        created.append(BLOCK)
        created.create()
        assert len(created.read()[0]) == 1

    def test_a_log_that_is_claimed_is_kept(self, created):
        created.append(BLOCK)
        claim(created)
        created.create(Record(TREE, ['a']))
        assert len(created.read()[0]) == 1

    def test_the_first_record_is_there_once_however_often_the_log_is_created(self, log):
        tree = Record(TREE, ['a', ['b', 'c']])
        log.create(tree)
        log.append(BLOCK)
        log.create(tree)
        assert [record.kind for record in log.read()[0]] == [TREE, PART]

    def test_the_first_record_is_written_by_the_second_who_creates_the_log_if_the_first_died(self, created):
        created.create(Record(TREE, ['a']))
        assert created.read()[0] == [Record(TREE, ['a'])]

    def test_the_first_record_is_there_once_if_the_answer_is_lost(self, log, fake_service):
        fake_service.on('Append Block', after=cut_connection)
        log.create(Record(TREE, ['a']))
        assert log.read()[0] == [Record(TREE, ['a'])]

    def test_a_chord_that_ends_meanwhile_is_no_error(self, created, fake_service):
        fake_service.on('Append Block', before=lambda: claim(created).delete_log(''))
        created.create(Record(TREE, ['a']))
        with pytest.raises(Gone):
            created.read()

    def test_the_log_is_created_once_if_the_answer_is_lost(self, log, fake_service):
        fake_service.on('Put Blob', times=1)
        fake_service.on('Put Blob', after=cut_connection)
        log.create()
        assert log.append(BLOCK) == 1

    def test_other_errors_are_raised(self, log, fake_service):
        fake_service.on('Put Blob', answer=(409, 'InvalidBlobType'))
        with pytest.raises(HttpResponseError, match='InvalidBlobType'):
            log.create()


class test_append:

    def test_the_answer_counts_all_blocks(self, created):
        assert [created.append(BLOCK) for _ in range(3)] == [1, 2, 3]

    def test_one_request(self, created, fake_service):
        fake_service.requests.clear()
        created.append(BLOCK)
        assert fake_service.operations == ['Append Block']

    def test_a_block_whose_answer_is_lost_is_there_twice(self, created, fake_service):
        fake_service.on('Append Block', after=cut_connection)
        with pytest.raises(ServiceResponseError):
            created.append(BLOCK)
        assert created.append(BLOCK) == 2
        assert len(created.read()[0]) == 2

    def test_a_log_that_is_not_there_is_gone(self, created, fake_service):
        claim(created).delete_log('')
        with pytest.raises(Gone):
            created.append(BLOCK)

    def test_a_container_that_is_not_there_is_another_matter(self, log):
        with pytest.raises(ResourceNotFoundError, match='ContainerNotFound'):
            log.append(BLOCK)

    def test_a_claimed_log_takes_no_blocks(self, created):
        claim(created)
        with pytest.raises(Leased):
            created.append(BLOCK)

    def test_a_log_does_not_become_longer_than_it_may(self, created):
        assert created.append(BLOCK, limit=2 * len(BLOCK)) == 1
        assert created.append(BLOCK, limit=2 * len(BLOCK)) == 2
        with pytest.raises(Crowded):
            created.append(BLOCK, limit=2 * len(BLOCK))
        assert created.append(BLOCK) == 3

    def test_a_full_log_takes_no_blocks(self, created, fake_service):
        fake_service.max_blocks = 1
        created.append(BLOCK)
        with pytest.raises(Full):
            created.append(BLOCK)

    @pytest.mark.parametrize('sizes', [[1, 1, 1], [1, 300, 70_000]], ids=['equal', 'different'])
    def test_the_answer_is_right_though_the_service_counts_before_it_appends(
            self, created, fake_service, monkeypatch, sizes):
        append = fake_service._append_block

        def append_after_counting(request):  # as Azurite does: all are counted before the first is there
            answer = append(request)
            return answer._replace(headers={**answer.headers, 'x-ms-blob-committed-block-count': '1'})

        monkeypatch.setattr(fake_service, '_append_block', append_after_counting)
        blocks = [Record(PART, ['id', 0, 'SUCCESS', None], b'x' * size).to_bytes() for size in sizes]
        assert [created.append(block) for block in blocks] == [1, 2, 3]

    def test_the_answer_counts_as_many_blocks_as_a_log_takes(self, created, fake_service):
        blob = blob_of(fake_service, created)
        blob.blocks, blob.data = 49_999, bytearray(49_999 * len(BLOCK))
        assert created.append(BLOCK) == 50_000


class test_read:

    @pytest.mark.parametrize('record', [
        Record(TREE, ['a', ['b', []]]),
        Record(PART, ['id', None, 'SUCCESS', None], b''),
        Record(PART, ['gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n', 7, 'FAILURE', 'blob'], bytes(range(256))),
        Record(GROWTH, ['id'], b'x' * 2 ** 16),
    ], ids=['tree', 'empty', 'binary', 'large'])
    def test_records_come_back_as_they_were_written(self, created, record):
        created.append(record.to_bytes())
        created.append(BLOCK)
        created.append(record.to_bytes())
        assert created.read()[0] == [record, Record(PART, ['id', 0, 'SUCCESS', None], b'1'), record]

    def test_an_empty_log(self, created):
        assert created.read()[0] == []

    def test_the_etag_stands_for_the_content(self, created):
        before = created.read()[1]
        assert created.read()[1] == before
        created.append(BLOCK)
        assert created.read()[1] != before

    def test_a_log_that_is_not_there_is_gone(self, created):
        claim(created).delete_log('')
        with pytest.raises(Gone):
            created.read()

    def test_a_container_that_is_not_there_is_another_matter(self, log):
        with pytest.raises(ResourceNotFoundError, match='ContainerNotFound'):
            log.read()


class test_waiting_for_a_lease:

    @pytest.fixture
    def pauses(self):
        """The pauses that were made."""
        return []

    def wait(self, log, pauses, after=None):
        """Wait for the lease; call `after` in the third pause."""
        def pause():
            pauses.append(1)
            if len(pauses) == 3:
                after()
        return log.wait_for_lease(pause)

    def test_that_lapses(self, created, fake_service, pauses):
        claim(created)
        assert self.wait(created, pauses, lambda: setattr(fake_service, 'now', fake_service.now + LEASE_DURATION))
        assert len(pauses) == 3
        assert created.read().lapsed

    def test_that_is_released(self, created, fake_service, pauses):
        held = claim(created)
        assert not self.wait(created, pauses, lambda: created.release(held._lease_id))
        assert not created.read().lapsed

    def test_whose_log_is_deleted(self, created, pauses):
        etag = created.read().etag
        held = claim(created)
        with pytest.raises(Gone):
            self.wait(created, pauses, lambda: held.delete_log(etag))


class test_size:

    def test_it_is_unknown_until_it_is_written(self, created):
        assert created.size() is None
        created.set_size(12)
        assert created.size() == 12

    def test_it_is_not_written_where_the_chord_is_over(self, created):
        claim(created).delete_log('')
        with pytest.raises(Gone):
            created.set_size(1)
        with pytest.raises(Gone):
            created.size()

    def test_it_is_not_written_where_the_chord_is_complete(self, created):
        claim(created)
        with pytest.raises(Leased):
            created.set_size(1)


class test_payloads:

    def test_it_lies_beside_the_log_with_its_type(self, created, container, fake_service):
        name = created.store_payload(b'large', 'application/json')
        assert container.read(name).data == b'large'
        assert name.startswith(created.name)
        assert fake_service.requests[-2].headers['x-ms-blob-content-type'] == 'application/json'

    def test_each_has_a_name_of_its_own(self, created):
        assert created.store_payload(b'a', 'text/plain') != created.store_payload(b'a', 'text/plain')


class test_claim:

    def test_only_what_was_read_is_claimed(self, created):
        etag = created.read()[1]
        created.append(BLOCK)
        with pytest.raises(Changed):
            created.claim(etag, str(uuid.uuid4()))

    def test_it_is_given_to_one(self, created):
        claim(created)
        with pytest.raises(Leased):
            claim(created)

    def test_of_a_log_that_is_not_there(self, created):
        etag = created.read()[1]
        claim(created).delete_log(etag)
        with pytest.raises(Gone):
            created.claim(etag, str(uuid.uuid4()))

    def test_a_log_that_was_made_anew_is_not_claimed_by_an_old_request(self, created):
        etag = created.read()[1]
        claim(created).delete_log(etag)
        created.create()
        with pytest.raises(Changed):
            created.claim(etag, str(uuid.uuid4()))

    def test_whose_answer_is_lost_is_ours(self, created, fake_service):
        fake_service.on('Lease Blob', after=cut_connection)
        lease_id, etag = str(uuid.uuid4()), created.read()[1]
        with pytest.raises(ServiceResponseError):
            created.claim(etag, lease_id)
        created.claim(etag, lease_id).renew()

    def test_it_lapses_if_its_holder_dies(self, created, fake_service):
        claim(created)
        fake_service.now += LEASE_DURATION
        claim(created)

    def test_renewing_makes_it_last(self, created, fake_service):
        held = claim(created)
        for _ in range(3):
            fake_service.now += LEASE_DURATION - 1
            held.renew()
        assert leased(fake_service, created)

    def test_it_is_lost_when_someone_else_has_it(self, created, fake_service):
        lost = claim(created)
        fake_service.now += LEASE_DURATION
        claim(created)
        with pytest.raises(LeaseLost):
            lost.renew()

    def test_it_is_lost_when_the_log_is_gone(self, created, fake_service):
        lost = claim(created)
        fake_service.now += LEASE_DURATION
        claim(created).delete_log('')
        with pytest.raises(LeaseLost):
            lost.renew()

    def test_it_counts_as_lost_when_the_answer_comes_so_late_that_it_may_have_lapsed(self, created, monkeypatch):
        held = claim(created)
        times = iter([0, LEASE_DURATION])
        monkeypatch.setattr(chordlog.time, 'monotonic', lambda: next(times))
        with pytest.raises(LeaseLost):
            held.renew()


class test_held:

    def test_the_claim_is_released_behind_it(self, created, fake_service):
        with claim(created).held():
            assert leased(fake_service, created)
        assert not leased(fake_service, created)

    def test_the_claim_is_released_behind_an_error(self, created, fake_service):
        with pytest.raises(ZeroDivisionError), claim(created).held():
            raise ZeroDivisionError
        assert not leased(fake_service, created)

    def test_a_claim_that_cannot_be_released_is_no_error(self, created, fake_service, caplog):
        with claim(created).held():
            fake_service.on('Lease Blob', answer=(403, 'AuthorizationPermissionMismatch'))
        assert 'lapses' in caplog.text

    def test_it_is_renewed_all_the_time(self, created, fake_service, monkeypatch):
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', 0.001)
        renewals = threading.Semaphore(0)
        with claim(created).held():
            fake_service.on('Lease Blob', before=renewals.release, times=3)
            assert all(renewals.acquire(timeout=30) for _ in range(3))
        assert not leased(fake_service, created)

    def test_it_is_renewed_after_a_renewal_that_failed(self, created, fake_service, monkeypatch):
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', 0.001)
        renewed = threading.Event()
        with claim(created).held():
            fake_service.on('Lease Blob', answer=(403, 'AuthorizationPermissionMismatch'))
            fake_service.on('Lease Blob', after=renewed.set)
            assert renewed.wait(30)

    def test_no_renewals_are_tried_once_it_is_lost(self, created, fake_service, monkeypatch):
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', 0.001)
        held = claim(created)
        fake_service.now += LEASE_DURATION
        claim(created)
        with held.held():
            held._renewer.join(30)
            assert not held._renewer.is_alive()
        assert leased(fake_service, created)

    def test_a_renewal_that_failed_is_tried_again_soon(self, created, fake_service, monkeypatch):
        monkeypatch.setattr(chordlog, 'RENEW_INTERVAL', 7)
        monkeypatch.setattr(chordlog, 'RENEW_PAUSE', 1)
        held = claim(created)
        pauses = []
        monkeypatch.setattr(held, '_ended', SimpleNamespace(
            wait=lambda pause: pauses.append(pause) or len(pauses) > 4))
        fake_service.on('Lease Blob')
        fake_service.on('Lease Blob', answer=(503, 'ServerBusy'), times=2)
        held._renew_repeatedly()
        assert pauses == [7, 7, 1, 1, 7]

    def test_its_holder_does_not_wait_long_for_an_answer(self, created, fake_service):
        etag = created.read().etag
        held = claim(created)
        fake_service.requests.clear()
        created.renew(held._lease_id, once=True)
        held.delete_log(etag)
        limits = (chordlog.HOLDER_TIMEOUT, chordlog.HOLDER_TIMEOUT)
        assert [request.sending['timeout'] for request in fake_service.requests] == [limits] * 2

    def test_it_is_held_where_no_thread_can_be_started(self, created, fake_service, no_more_threads, caplog):
        held = claim(created)
        with no_more_threads(), held.held():
            assert leased(fake_service, created)
        assert not leased(fake_service, created)
        assert 'is not renewed' in caplog.text

    def test_no_thread_is_left(self, created):
        before = threading.active_count()
        with claim(created).held():
            assert threading.active_count() == before + 1
        assert threading.active_count() == before


class test_delete_log:

    @pytest.fixture
    def held(self, created):
        """A claim that is held."""
        etag = created.read()[1]
        held = created.claim(etag, str(uuid.uuid4()))
        held.etag = etag
        return held

    @pytest.fixture
    def quiet(self, caplog):
        """The log of warnings, which is expected to be empty."""
        with caplog.at_level(logging.WARNING):
            yield
        assert caplog.text == ''

    def test_it_is_gone(self, created, held, quiet):
        with held.held():
            held.delete_log(held.etag)
        with pytest.raises(Gone):
            created.read()

    def test_one_request(self, held, fake_service):
        fake_service.requests.clear()
        with held.held():
            held.delete_log(held.etag)
        assert fake_service.operations == ['Delete Blob']

    def test_after_the_lease_has_lapsed(self, created, held, fake_service, quiet):
        fake_service.now += LEASE_DURATION
        held.delete_log(held.etag)
        with pytest.raises(Gone):
            created.read()

    def test_not_what_has_grown_after_the_lease_has_lapsed(self, created, held, fake_service):
        fake_service.now += LEASE_DURATION
        created.append(BLOCK)
        with pytest.raises(Changed):
            held.delete_log(held.etag)
        assert len(created.read()[0]) == 1

    def test_not_what_someone_else_has_claimed_since(self, created, held, fake_service):
        fake_service.now += LEASE_DURATION
        claim(created)
        with pytest.raises(Leased):
            held.delete_log(held.etag)
        assert leased(fake_service, created)

    def test_the_answer_is_lost(self, created, held, fake_service, quiet):
        fake_service.on('Delete Blob', after=cut_connection)
        held.delete_log(held.etag)
        with pytest.raises(Gone):
            created.read()

    def test_the_service_cannot_be_reached_for_some_time(self, created, held, fake_service, no_pauses):
        no_pauses(3)
        fake_service.on('Delete Blob', before=refuse_connection, times=3)
        held.delete_log(held.etag)
        with pytest.raises(Gone):
            created.read()

    def test_the_service_cannot_be_reached_for_too_long(self, held, fake_service, no_pauses):
        no_pauses(1)
        fake_service.on('Delete Blob', before=refuse_connection, times=float('inf'))
        fake_service.requests.clear()
        with pytest.raises(ServiceRequestError), held.held():
            held.delete_log(held.etag)
        assert 'Lease Blob' not in fake_service.operations


#: What a log makes of the codes with which the service refuses something.
OUTCOMES = [
    (404, 'BlobNotFound', Gone),
    (412, 'LeaseIdMissing', Leased),
    (409, 'LeaseAlreadyPresent', Leased),
    (412, 'LeaseIdMismatchWithBlobOperation', LeaseLost),
    (409, 'LeaseIdMismatchWithLeaseOperation', LeaseLost),
    (412, 'LeaseLost', LeaseLost),
    (412, 'LeaseNotPresentWithBlobOperation', LeaseLost),
    (409, 'LeaseNotPresentWithLeaseOperation', LeaseLost),
    (409, 'LeaseIsBrokenAndCannotBeRenewed', LeaseLost),
    (412, 'ConditionNotMet', Changed),
    (412, 'AppendPositionConditionNotMet', Changed),
    (409, 'BlockCountExceedsLimit', Full),
    (412, 'MaxBlobSizeConditionNotMet', Crowded),
]


class test_outcomes:

    @pytest.mark.parametrize(('status', 'code', 'outcome'), OUTCOMES, ids=[code for _, code, _ in OUTCOMES])
    def test_each_code_has_one(self, created, fake_service, status, code, outcome):
        fake_service.on('Append Block', answer=(status, code))
        with pytest.raises(outcome):
            created.append(BLOCK)

    def test_all_are_here(self):
        assert {code: outcome for _, code, outcome in OUTCOMES} == chordlog.OUTCOMES

    @pytest.mark.parametrize(('status', 'code'), [
        (404, 'ContainerNotFound'), (403, 'AuthorizationPermissionMismatch'), (409, 'InvalidBlobType')])
    def test_other_codes_are_raised_as_they_are(self, created, fake_service, status, code):
        fake_service.on('Append Block', answer=(status, code))
        with pytest.raises(HttpResponseError, match=code):
            created.append(BLOCK)


def failing(*errors, result='done'):
    """Return an operation that raises each of `errors` before it returns."""
    left = list(errors)

    def operation():
        if left:
            raise left.pop(0)
        return result
    return operation


@contextmanager
def clock(monkeypatch):
    """Yield a list with the time, which passes when somebody sleeps."""
    now = [0.0]
    monkeypatch.setattr(chordlog.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(chordlog.time, 'sleep', lambda seconds: now.__setitem__(0, now[0] + seconds))
    yield now


class test_patiently:

    @pytest.fixture(autouse=True)
    def patience(self, no_pauses):
        no_pauses(3)

    def test_what_is_there_at_once(self):
        assert chordlog.patiently(failing()) == 'done'

    @pytest.mark.parametrize('error', [
        ServiceRequestError('no connection'), ClientAuthenticationError('no token')])
    def test_while_the_service_or_a_token_is_not_to_be_had(self, error):
        assert chordlog.patiently(failing(error, error, error)) == 'done'

    def test_not_for_ever(self):
        error = ServiceRequestError('no connection')
        with pytest.raises(ServiceRequestError):
            chordlog.patiently(failing(*[error] * 4))

    @pytest.mark.parametrize('error', [ResourceNotFoundError('no container'), Gone('done'), ValueError('other')])
    def test_not_where_waiting_does_not_help(self, error):
        with pytest.raises(type(error)):
            chordlog.patiently(failing(error))


class test_pauses:

    def test_they_fill_the_time(self, monkeypatch):
        with clock(monkeypatch) as now:
            for pause in chordlog.pauses():
                chordlog.time.sleep(pause)
            assert chordlog.PATIENCE <= now[0] < chordlog.PATIENCE + 1.5 * chordlog.LONGEST_PAUSE

    def test_they_grow_and_do_not_come_at_the_same_time_everywhere(self, monkeypatch):
        with clock(monkeypatch):
            ours, theirs, short = ([next(pauses) for _ in range(8)] for pauses in (
                chordlog.pauses(), chordlog.pauses(), chordlog.pauses(chordlog.DELETE_PAUSE)))
        assert ours != theirs
        assert ours[0] < 1 < 0.5 * chordlog.LONGEST_PAUSE < ours[7] < 1.5 * chordlog.LONGEST_PAUSE
        assert max(short) < 1.5 * chordlog.DELETE_PAUSE < chordlog.GRACE
