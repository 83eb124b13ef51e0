"""What a user sees of the backend, whatever service it talks to: the same suite runs on the fake and on Azurite."""
from __future__ import annotations

import json
import threading
from datetime import datetime

import pytest
from kombu.serialization import loads

from celery import states
from celery import uuid as new_id
from celery.app.task import Context
from celery.backends.base import KeyValueStoreBackend
from celery.exceptions import TaskRevokedError, TimeoutError

MEBIBYTE = 1024 * 1024

#: Values that every serializer can write.
VALUES = [None, True, 0, -1, 0.5, '', 'text', 'ünï → 漢字 😀', 'a\nb\x7f', [], [1, [2, None]], {}, {'a': {'b': [1]}}]

#: Module that each serializer needs.
SERIALIZERS = {'json': 'json', 'pickle': 'pickle', 'yaml': 'yaml', 'msgpack': 'msgpack'}

#: Ids that a URL could mistake for something else.
ODD_IDS = ['a b', 'a+b', 'a/b', 'a?b=c&d', 'a#b', 'a%2Fb', 'a/%2E%2E/b', '../a', 'a...b', 'a:b@c', "a'b\"c", '~a',
           'ünï-漢字', 'A', 'a', 'x' * 500]

compression = pytest.mark.skipif(
    not hasattr(KeyValueStoreBackend, 'supports_result_compression'), reason='Celery 5.7 brought result_compression')


class OwnError(Exception):
    """An error that a task of the user's may raise."""


class BackendContract:
    """Needs a fixture `make_backend`, a function that makes a backend with settings of Celery.

    Unless `azureblockblob_container_name` is among them, its container is new and is not there yet.
    """

    @pytest.fixture(params=SERIALIZERS)
    def serializer(self, request):
        pytest.importorskip(SERIALIZERS[request.param])
        return {'result_serializer': request.param, 'accept_content': ['json', request.param]}

    @pytest.fixture
    def backend(self, make_backend):
        return make_backend()

    @pytest.fixture
    def another(self, make_backend):
        """Make a further backend on the container of one: nothing is cached in it."""
        def another(backend, **settings):
            return make_backend(azureblockblob_container_name=container_of(backend).container_name, **settings)
        return another

    # What is stored is read

    def test_a_result_is_read_as_it_was_stored(self, make_backend, another, serializer):
        backend = make_backend(**serializer)
        for number, value in enumerate(VALUES):
            backend.store_result(f'id-{number}', value, states.SUCCESS)
        reader = another(backend, **serializer)
        assert [reader.get_result(f'id-{number}') for number, _ in enumerate(VALUES)] == VALUES

    @pytest.mark.parametrize('name', ['pickle', 'msgpack'])
    def test_a_binary_serializer_takes_bytes(self, make_backend, another, name):
        pytest.importorskip(name)
        settings = {'result_serializer': name, 'accept_content': [name]}
        backend = make_backend(**settings)
        backend.store_result('id', b'\x00\xff', states.SUCCESS)
        assert another(backend, **settings).get_result('id') == b'\x00\xff'

    @pytest.mark.parametrize('state', sorted(states.ALL_STATES) + ['PROGRESS'])
    def test_any_state_is_read_as_it_was_stored(self, backend, another, state):
        backend.store_result('id', ValueError('x') if state in states.EXCEPTION_STATES else {'done': 3}, state)
        assert another(backend).get_state('id') == state

    def test_what_was_never_stored_is_pending(self, backend):
        backend.store_result('other', 1, states.SUCCESS)
        assert backend.get_task_meta('id') == {'status': states.PENDING, 'result': None}

    @pytest.mark.parametrize('error', [ValueError('bad', 1), KeyError('ä'), OwnError(), TaskRevokedError('gone')])
    def test_an_error_is_raised_as_it_was(self, make_backend, another, serializer, error):
        backend = make_backend(**serializer)
        backend.store_result('id', error, states.FAILURE, traceback='Traceback: …')
        result = another(backend, **serializer).app.AsyncResult('id')
        assert result.traceback == 'Traceback: …'
        with pytest.raises(type(error)) as caught:
            result.get(timeout=10)
        assert caught.value.args == error.args

    def test_a_big_result_is_read_as_it_was_stored(self, backend, another):
        value = 'ä' * (9 * MEBIBYTE)
        backend.store_result('id', value, states.SUCCESS)
        assert another(backend).get_result('id') == value

    @pytest.mark.parametrize('task_id', ODD_IDS)
    def test_any_id_has_a_result_of_its_own(self, backend, another, task_id):
        backend.store_result(task_id, task_id, states.SUCCESS)
        backend.store_result(task_id + '-', 'other', states.SUCCESS)
        assert another(backend).get_result(task_id) == task_id
        assert f'celery-task-meta-{task_id}' in blob_names(backend)
        backend.forget(task_id)
        assert blob_names(backend) == [f'celery-task-meta-{task_id}-']

    @pytest.mark.parametrize('task_id', ['a/../b', 'a/../../other-container/b', 'a/./b', 'a/..', 'a/.'])
    def test_an_id_cannot_lead_to_another_blob(self, backend, task_id):
        with pytest.raises(ValueError, match='between slashes'):
            backend.store_result(task_id, 1, states.SUCCESS)
        with pytest.raises(ValueError, match='between slashes'):
            backend.forget(task_id)

    def test_an_id_may_be_bytes(self, backend, another):
        backend.store_result(b'id', 1, states.SUCCESS)
        assert another(backend).get_result('id') == 1

    def test_many_threads_store_and_read(self, backend, another):
        def store(number):
            backend.store_result(f'id-{number}', number, states.SUCCESS)
        threads = [threading.Thread(target=store, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        reader = another(backend)
        assert [reader.get_result(f'id-{number}') for number in range(20)] == list(range(20))

    # What is stored, and where

    def test_a_blob_is_named_and_written_as_celery_does(self, make_backend, serializer):
        backend = make_backend(azureblockblob_base_path='some/path-', **serializer)
        backend.store_result('id', {'a': 1}, states.SUCCESS)
        assert blob_names(backend) == ['some/path-celery-task-meta-id']
        data, content_type = raw_blob(backend, 'some/path-celery-task-meta-id')
        assert content_type == backend.content_type
        meta = loads(data, backend.content_type, backend.content_encoding, accept=backend.accept)
        assert meta == backend.get_task_meta('id')
        assert meta['result'] == {'a': 1}

    def test_json_is_written_as_plain_text(self, backend):
        backend.store_result('id', 'ä', states.SUCCESS)
        data, content_type = raw_blob(backend, 'celery-task-meta-id')
        assert content_type == 'application/json'
        assert json.loads(data)['result'] == 'ä'

    def test_a_base_path_keeps_results_apart(self, backend, another):
        below = another(backend, azureblockblob_base_path='below/')
        below.store_result('id', 1, states.SUCCESS)
        assert backend.get_state('id') == states.PENDING
        assert below.get_state('id') == states.SUCCESS

    def test_a_global_key_prefix_is_part_of_the_name(self, make_backend):
        backend = make_backend(result_backend_transport_options={'global_keyprefix': 'mine'})
        backend.store_result('id', 1, states.SUCCESS)
        assert blob_names(backend) == ['mine_celery-task-meta-id']

    def test_values_are_read_as_the_serializer_writes_them(self, make_backend, serializer):
        backend = make_backend(**serializer)
        value = backend.encode({'a': 1})
        backend.set('key', value)
        assert backend.get('key') == value
        backend.set('key', backend.encode({'a': 2}))
        assert backend.decode(backend.get('key')) == {'a': 2}

    @compression
    def test_a_compressed_result_is_small_and_read_by_everyone(self, make_backend, another, serializer):
        backend = make_backend(result_compression='gzip', **serializer)
        backend.store_result('id', 'x' * MEBIBYTE, states.SUCCESS)
        data, _ = raw_blob(backend, 'celery-task-meta-id')
        assert len(data) < MEBIBYTE / 100
        assert another(backend, **serializer).get_result('id') == 'x' * MEBIBYTE

    @compression
    def test_a_plain_result_is_read_where_compression_is_on(self, backend, another):
        backend.store_result('id', 'x', states.SUCCESS)
        assert another(backend, result_compression='gzip').get_result('id') == 'x'

    # What else is known of a task

    def test_a_finished_task_has_a_date(self, backend, another):
        backend.store_result('id', 1, states.SUCCESS)
        result = another(backend).app.AsyncResult('id')
        assert isinstance(result.date_done, datetime)
        assert abs((backend.app.now() - result.date_done).total_seconds()) < 60

    def test_an_unfinished_task_has_no_date(self, backend, another):
        backend.store_result('id', {'done': 1}, states.STARTED)
        assert another(backend).get_task_meta('id')['date_done'] is None

    def test_the_children_of_a_task_are_kept(self, backend, another):
        children = [backend.app.AsyncResult(new_id()) for _ in range(2)]
        request = Context(id='id')
        request.children.extend(children)
        backend.store_result('id', 1, states.SUCCESS, request=request)
        assert another(backend).app.AsyncResult('id').children == children

    def test_the_family_of_a_task_is_kept(self, backend, another):
        request = Context(id='id', group='group', parent_id='parent')
        backend.store_result('id', 1, states.SUCCESS, request=request)
        meta = another(backend).get_task_meta('id')
        assert (meta['group_id'], meta['parent_id']) == ('group', 'parent')

    def test_an_extended_result_tells_how_the_task_was_called(self, make_backend, another):
        backend = make_backend(result_extended=True)
        request = Context(id='id', task='add', args=[1], kwargs={'y': 2}, hostname='host', retries=1,
                          delivery_info={'routing_key': 'fast'})
        backend.store_result('id', 3, states.SUCCESS, request=request)
        result = another(backend, result_extended=True).app.AsyncResult('id')
        assert (result.name, result.args, result.kwargs) == ('add', [1], {'y': 2})
        assert (result.worker, result.retries, result.queue) == ('host', 1, 'fast')

    # One state after another

    @pytest.mark.parametrize('state', [states.STARTED, states.RETRY, states.FAILURE, states.REVOKED, states.SUCCESS])
    def test_a_success_is_never_overwritten(self, backend, another, state):
        backend.store_result('id', 'first', states.SUCCESS)
        for writer in (backend, another(backend)):
            writer.store_result('id', ValueError('late') if state in states.EXCEPTION_STATES else 'late', state)
        assert another(backend).get_result('id') == 'first'

    @pytest.mark.parametrize('before', [states.STARTED, states.RETRY, states.FAILURE, states.REVOKED])
    def test_a_success_replaces_any_other_state(self, backend, another, before):
        backend.store_result('id', ValueError('x') if before in states.EXCEPTION_STATES else None, before)
        another(backend).store_result('id', 'done', states.SUCCESS)
        assert another(backend).get_result('id') == 'done'

    def test_states_follow_each_other(self, backend, another):
        for state in (states.STARTED, states.RETRY, states.STARTED, 'PROGRESS', states.FAILURE, states.SUCCESS):
            backend.store_result('id', ValueError('x') if state in states.EXCEPTION_STATES else None, state)
            assert another(backend).get_state('id') == state

    def test_a_forgotten_result_can_be_stored_again(self, backend, another):
        backend.store_result('id', 1, states.SUCCESS)
        backend.forget('id')
        backend.store_result('id', 2, states.SUCCESS)
        assert another(backend).get_result('id') == 2

    # Forgetting

    def test_a_forgotten_result_is_gone(self, backend, another):
        backend.store_result('id', 1, states.SUCCESS)
        backend.store_result('other', 1, states.SUCCESS)
        backend.app.AsyncResult('id').forget()
        assert another(backend).get_state('id') == states.PENDING
        assert blob_names(backend) == ['celery-task-meta-other']

    def test_forgetting_can_be_repeated(self, backend):
        backend.store_result('id', 1, states.SUCCESS)
        for _ in range(2):
            backend.forget('id')
        backend.forget('never stored')
        assert blob_names(backend) == []

    # A container that is not there

    def test_a_missing_container_is_an_empty_one(self, backend):
        assert backend.get_state('id') == states.PENDING
        assert backend.mget(['a', 'b']) == [None, None]
        assert backend.restore_group('group') is None
        backend.forget('id')
        backend.delete_group('group')
        assert not container_of(backend).exists()

    def test_the_first_result_makes_the_container(self, backend):
        backend.store_result('id', 1, states.SUCCESS)
        assert container_of(backend).exists()

    def test_the_first_group_makes_the_container(self, backend):
        backend.app.GroupResult('group', []).save(backend=backend)
        assert container_of(backend).exists()

    # Groups

    def test_a_group_is_restored_as_it_was_saved(self, make_backend, another, serializer):
        backend = make_backend(**serializer)
        app = backend.app
        group = app.GroupResult('group', [app.AsyncResult('a'), app.GroupResult('inner', [app.AsyncResult('b')])])
        group.save(backend=backend)
        reader = another(backend, **serializer)
        assert reader.restore_group('group') == group
        assert blob_names(backend) == ['celery-taskset-meta-group']

    def test_a_deleted_group_is_gone(self, backend, another):
        group = backend.app.GroupResult('group', [backend.app.AsyncResult('a')])
        group.save(backend=backend)
        for _ in range(2):
            group.delete(backend=backend)
        assert another(backend).restore_group('group') is None

    def test_a_missing_group_is_none(self, backend):
        backend.store_result('group', 1, states.SUCCESS)
        assert backend.restore_group('group') is None

    # Many results

    def test_many_values_are_read_in_their_order(self, backend):
        for number in range(30):
            backend.set(f'key-{number}', f'{number}')
        keys = ['missing', *(f'key-{number}' for number in reversed(range(30))), 'key-3', b'key-4']
        assert backend.mget(keys) == [None, *(f'{number}' for number in reversed(range(30))), '3', '4']

    def test_no_values_are_none(self, backend):
        assert backend.mget([]) == []

    def test_each_result_that_has_come_is_yielded_once(self, backend, another):
        for number in range(25):
            backend.store_result(f'id-{number}', number, states.SUCCESS)
        backend.store_result('failed', ValueError('x'), states.FAILURE)
        ids = [f'id-{number}' for number in range(25)]
        got = list(another(backend).get_many([*ids, 'failed', 'id-3'], timeout=10))
        assert sorted(task_id for task_id, _ in got) == sorted([*ids, 'failed'])
        metas = dict(got)
        assert [metas[task_id]['result'] for task_id in ids] == list(range(25))
        assert metas['failed']['result'].args == ('x',)

    def test_what_has_come_is_yielded_before_the_timeout(self, backend, another):
        backend.store_result('ready', 1, states.SUCCESS)
        backend.store_result('started', None, states.STARTED)
        coming = another(backend).get_many(['ready', 'started', 'missing'], timeout=0.02)
        assert next(coming)[0] == 'ready'
        with pytest.raises(TimeoutError):
            next(coming)

    def test_a_result_is_yielded_once_it_comes(self, backend, another):
        backend.store_result('first', 1, states.SUCCESS)
        waiting = another(backend).get_many(['first', 'second'], timeout=60)
        assert next(waiting)[0] == 'first'
        backend.store_result('second', 2, states.SUCCESS)
        assert [task_id for task_id, _ in waiting] == ['second']

    def test_a_group_gives_its_results_in_the_order_of_its_tasks(self, backend, another):
        ids = [new_id() for _ in range(12)]
        for number, task_id in enumerate(ids):
            backend.store_result(task_id, number, states.SUCCESS)
        app = another(backend).app
        group = app.GroupResult('group', [app.AsyncResult(task_id) for task_id in ids])
        assert group.get(timeout=10) == list(range(12))
        assert group.join_native(timeout=10) == list(range(12))
        metas = dict(group.iter_native(timeout=10))
        assert [metas[task_id]['result'] for task_id in ids] == list(range(12))

    def test_a_group_raises_the_error_of_a_task(self, backend, another):
        backend.store_result('good', 1, states.SUCCESS)
        backend.store_result('bad', ValueError('x'), states.FAILURE)
        app = another(backend).app
        group = app.GroupResult('group', [app.AsyncResult('good'), app.AsyncResult('bad')])
        with pytest.raises(ValueError, match='x'):
            group.get(timeout=10)
        good, bad = group.get(timeout=10, propagate=False)
        assert good == 1
        assert bad.args == ('x',)

    # Waiting

    def test_a_result_that_is_there_is_not_waited_for(self, backend, another):
        backend.store_result('id', 1, states.SUCCESS)
        assert another(backend).app.AsyncResult('id').get(timeout=0) == 1

    def test_a_wait_ends_with_its_timeout(self, backend):
        backend.store_result('id', None, states.STARTED)
        with pytest.raises(TimeoutError):
            backend.app.AsyncResult('id').get(timeout=0.02)

    def test_a_waiting_client_gets_a_result_that_comes_later(self, backend, another):
        result = another(backend).app.AsyncResult('id')
        pauses = []

        def store():
            if not pauses:
                backend.store_result('id', 'late', states.SUCCESS)
            pauses.append(1)

        assert result.get(timeout=60, on_interval=store) == 'late'
        assert len(pauses) == 1


def container_of(backend):
    """Return the SDK's client of a backend's container."""
    return backend.container._client


def blob_names(backend):
    """Return the names of all blobs in a backend's container."""
    return [blob.name for blob in container_of(backend).list_blobs()]


def raw_blob(backend, name):
    """Return what a blob holds, and its content type."""
    stream = container_of(backend).get_blob_client(name).download_blob()
    return stream.readall(), stream.properties.content_settings.content_type
