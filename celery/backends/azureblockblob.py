"""Task results in Azure Blob Storage."""
from __future__ import annotations

import sys
import time
from importlib import import_module

from kombu.utils.encoding import bytes_to_str, ensure_bytes

from celery import states
from celery._state import get_current_task
from celery.app.backends import by_name
from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded, TimeoutError
from celery.utils.log import get_logger

from .azurestorage.credentials import CREDENTIAL_OPTIONS, check_identity, resolve
from .azurestorage.options import EXPIRES, SETTINGS, check, read_settings
from .azurestorage.url import SCHEME, parse_url, redact
from .base import KeyValueStoreBackend, unpickle_backend

try:
    from .azurestorage import chordheader, chordlog, chordmessage, chords, client, errors, expiry
except ImportError as exc:  # __init__ tells the user what to install
    import_error: ImportError | None = exc
else:
    import_error = None

__all__ = ('AzureBlockBlobBackend',)

logger = get_logger(__name__)

#: The first pause of a client that waits for a result, in seconds; each further one is twice as long.
FIRST_PAUSE = 0.01

#: How many conflicting writes of a result are retried; more than this is a fault, not contention.
MAX_ROUNDS = 100

#: How long the log of a chord is kept if `result_chord_expires` is not set, in seconds: far longer than results,
#: since a chord that waits for its last part must not lose the others.
CHORD_LOG_EXPIRES = 7 * 24 * 60 * 60

#: The first byte of a compressed result; no text serializer's output begins with it.
COMPRESSED = b'\x00'


class AzureBlockBlobBackend(KeyValueStoreBackend):
    """Task results in a container of Azure Blob Storage, a blob each.

    Arguments:
        url: The backend's URL, with the storage account and the credential; for its forms see
            :mod:`celery.backends.azurestorage.url`.
        container_name: Name of the container; it wins over URL and configuration.

    Raises:
        celery.exceptions.ImproperlyConfigured: if anything in URL or settings is wrong, or a library is missing.
            No network is needed to find out.
    """

    chord_keyprefix = 'celery-chord-'
    supports_native_join = True
    supports_result_compression = True

    def __init__(self, url=None, container_name=None, use_app_url=False, **kwargs):
        super().__init__(**kwargs)
        _require('azure-storage-blob', 'azure.storage.blob')
        if import_error:
            raise ImproperlyConfigured(
                'The azureblockblob result backend needs a newer azure-storage-blob: '
                'pip install --upgrade azure-storage-blob') from import_error
        if use_app_url:
            url = _url_of(self.app)
        self.url = url
        self._parsed_url = parse_url(url, CREDENTIAL_OPTIONS)
        if self._parsed_url.credential:
            _require('azure-identity', 'azure.identity')
        given = dict(self._parsed_url.settings)
        if container_name is not None:
            given['container_name'] = check(
                'container_name', container_name, SETTINGS['container_name'], type(self).__name__)
        self._settings = read_settings(self.app.conf, given)
        self.expires = self._read_expiry('result_expires', kwargs.get('expires'))
        chord_expires = self.app.conf.get('result_chord_expires')
        self._chord_log_expires = self._read_expiry(
            'result_chord_expires', CHORD_LOG_EXPIRES if chord_expires is None else chord_expires)
        check_identity(self._parsed_url, self._settings['credential'])
        resolve(self._settings['credential'])
        self.base_path = self._settings['base_path']
        self._chords = chords.ChordRunner(self)

    def __repr__(self):
        return f'<{type(self).__name__}: {self.as_uri()}>'

    def as_uri(self, include_password=False):
        """Return the backend's URL: whole, or with its secrets masked."""
        return self.url if include_password else redact(self.url)

    def __reduce__(self, args=(), kwargs=None):
        # The app's own URL may hold a key: whoever unpickles has an app, and reads the URL there.
        own = {'use_app_url': True} if _without_alias(self.url) == _url_of(self.app) else {'url': self.url}
        kwargs = dict(kwargs or {}, expires=self.expires, container_name=self._settings['container_name'], **own)
        return unpickle_backend, (_BackendClass(type(self)), args, kwargs)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self  # whoever copies a result means the same backend

    @property
    def container(self):
        """The container of the results, on the client that this process shares."""
        return client.get_container(self._parsed_url, self._settings)

    def _blob_name(self, key):
        name = f'{self.base_path}{bytes_to_str(key)}'
        # HTTP clients fold these, and the request would be for another blob, even in another container.
        if not {'.', '..'}.isdisjoint(name.split('/')):
            raise ValueError('An id must not hold a . or .. between slashes: it is part of a URL.')
        return name

    def get(self, key):
        """Return the value stored under `key`, or None. One request."""
        blob = self.container.read(self._blob_name(key))
        return self._from_blob(blob.data) if blob and blob.data else None

    def mget(self, keys):
        """Return the values stored under `keys`, in order; they are read in parallel. One request each."""
        return self.container.account.map(self.get, keys)

    def set(self, key, value):
        """Store `value` under `key`, whatever is there. One request."""
        self.container.write(self._blob_name(key), ensure_bytes(value), self.content_type)

    def delete(self, key):
        """Delete what is stored under `key`, if anything is. One request."""
        self.container.delete(self._blob_name(key))

    def exception_safe_to_retry(self, exc):
        """Tell whether an operation that raised `exc` may be repeated."""
        return errors.is_temporary(exc)

    def _from_blob(self, data):
        if self.content_encoding == 'binary' or data.startswith(COMPRESSED):
            return data
        return data.decode(self.content_encoding)

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta['task_id'] = bytes_to_str(task_id)
        self._write_unless_done(
            self._blob_name(self.get_key_for_task(task_id)), ensure_bytes(self.encode(meta)), state,
            read_first=_is_repeated(request))
        return result

    def _write_unless_done(self, name, data, state, read_first):
        """Write a task's state, unless the task has succeeded: a late or redelivered task must not hide that.

        Every write carries a condition, so that the service decides each race. Whoever writes after another has
        found what that one wrote, and a write counts only against the state it was decided on:

        * First writers race: one creates the blob, the others conflict, read it, and decide again.
        * Someone writes, or forgets the result, between our read and our write: our condition fails; decide again.
        * The answer to our write was lost and the SDK has repeated it: it conflicts with itself, and the read finds
          our own content.
        * Our first write arrives after we have given up on it: its condition fails against whatever is there.
        * The ETag we kept is stale, since another process has written: the same as losing a race.

        Each round is lost to another writer's success, so that someone always gets on.
        """
        container = self.container
        etag = container.unfinished.pop(name, None)
        if etag is None and read_first:
            etag, done = self._find_unfinished(container, name, data, state)
            if done:
                return
        for _ in range(MAX_ROUNDS):
            try:
                etag = container.write(name, data, self.content_type, etag=etag, new=etag is None)
                break
            except client.Conflict as exc:
                conflict = exc
            etag, done = self._find_unfinished(container, name, data, state)
            if done:
                break
        else:
            raise conflict
        if state not in states.READY_STATES and etag:
            container.unfinished[name] = etag

    def decode_blob(self, data):
        """Return the value that the bytes of a blob stand for."""
        return self.decode(self._from_blob(data))

    def _find_unfinished(self, container, name, data, state):
        """Return the ETag of a task's state, and whether there is nothing to write: it is `data` or a SUCCESS.

        One that cannot be read is damaged, or of a worker with another serializer. It may be a SUCCESS: only a
        finished `state` replaces it.
        """
        blob = container.read(name)
        if blob is None:
            return None, False
        if blob.data == data:
            return blob.etag, True
        try:
            done = bool(blob.data) and self.decode_blob(blob.data)['status'] == states.SUCCESS
        except SoftTimeLimitExceeded:  # of the task
            raise
        except Exception as exc:  # decoders raise what they like
            done = state not in states.READY_STATES
            logger.warning('The state in the blob %s cannot be read (%s), and %s.',
                           name, type(exc).__name__, 'stays' if done else 'is replaced')
        return (None if done else blob.etag), done

    def _read_expiry(self, name, value):
        return check(name, self.prepare_expires(value), EXPIRES, 'Configuration')

    def cleanup(self):
        """Delete what has expired. Celery beat has a worker call this once a day."""
        totals = self.delete_expired()
        logger.info('Cleanup of %s: %s', self.as_uri(), totals or 'results do not expire')

    def delete_expired(self, older_than=None, dry_run=False, **kwargs):
        """Delete results, groups and chord logs that were written too long ago.

        Arguments:
            older_than: For how many seconds results and groups are kept, in place of :setting:`result_expires`.
            dry_run: Only count them.
            kwargs: See :func:`celery.backends.azurestorage.expiry.delete_expired`.

        Returns:
            ~celery.backends.azurestorage.expiry.Totals: what was found, or None if results do not expire.
        """
        expires = self.expires if older_than is None else older_than
        if not expires:
            return None
        ages = {self._blob_name(prefix): expires for prefix in (self.task_keyprefix, self.group_keyprefix)}
        chord_logs = self._blob_name(self.chord_keyprefix)
        if self._chord_log_expires:
            ages[chord_logs] = max(expires, self._chord_log_expires)
        return expiry.delete_expired(self.container, ages, dry_run, attached=chord_logs, **kwargs)

    def wait_for(self, task_id, timeout=None, interval=0.5, no_ack=True, on_interval=None):
        """Wait for a task and return its meta-data.

        Arguments:
            task_id: The task's id.
            timeout: The longest wait, in seconds.
            interval: The longest pause between two polls, in seconds; the first ones are shorter.
            no_ack: Ignored.
            on_interval: Called before each pause.

        Raises:
            celery.exceptions.TimeoutError: if the task has no result after `timeout` seconds.
        """
        self._ensure_not_eager()
        for _ in _polls(timeout, interval, on_interval):
            meta = self.get_task_meta(task_id)
            if meta['status'] in states.READY_STATES:
                break
        return meta

    def get_many(self, task_ids, timeout=None, interval=0.5, no_ack=True,
                 on_message=None, on_interval=None, max_iterations=None,
                 READY_STATES=states.READY_STATES):
        """Wait for tasks; yield the id and the meta-data of each as it comes.

        Arguments:
            task_ids: The tasks' ids.
            timeout: The longest wait, in seconds.
            interval: The longest pause between two polls, in seconds; the first ones are shorter.
            no_ack: Ignored.
            on_message: Called with each meta-data that is read.
            on_interval: Called before each pause.
            max_iterations: The largest number of polls.
            READY_STATES: States to wait for.

        Raises:
            celery.exceptions.TimeoutError: if results are missing after `timeout` seconds.
        """
        waiting = {bytes_to_str(task_id) for task_id in task_ids}
        cached = {task_id: self._cache[task_id] for task_id in waiting if task_id in self._cache}
        for task_id, meta in cached.items():
            if meta['status'] in READY_STATES:
                waiting.remove(task_id)
                yield task_id, meta
        if not waiting:
            return
        for _ in _polls(timeout, interval, on_interval, max_iterations):
            ids = list(waiting)
            values = self.mget([self.get_key_for_task(task_id) for task_id in ids])
            for task_id, meta in self._mget_to_results(values, ids, READY_STATES).items():
                self._cache[task_id] = meta
                waiting.remove(task_id)
                if on_message is not None:
                    on_message(meta)
                yield task_id, meta
            if not waiting:
                return

    def apply_chord(self, header_result_args, body, **kwargs):
        """Prepare a chord whose header is about to be published.

        The body travels in every message of the header. Its ``chord_size`` tells the workers that run the parts to
        count them in the chord's log, whatever they are configured to do; None means that the log says it later.
        Without it, the header is polled. Its ``chord_id`` names the log: the last step of a chain may come with
        another group's id.

        Arguments:
            header_result_args: The header's id and the results of its tasks.
            body: The signature of the body.
            kwargs: Options for polling.
        """
        group_id, results = header_result_args
        size = chordheader.count_parts(results)
        if self._counts_parts(size, body):
            chordmessage.mark_body(body, size, group_id)
            self._chords.start(group_id, results, size)
        else:
            chordmessage.unmark_body(body)
            super().apply_chord(header_result_args, body, **kwargs)

    def _counts_parts(self, size, body):
        if not self._settings['native_chords']:
            return False
        if size == 0 or not body:  # nothing but empty groups: no part would be reported
            return False
        if size is not None and size > chords.MAX_PARTS:
            logger.warning('A chord of %s parts is polled: its log could hold %s.', size, chords.MAX_PARTS)
            return False
        return True

    def set_chord_size(self, group_id, chord_size):
        """Record the number of parts of a chord whose header is a generator."""
        self._chords.set_size(group_id, chord_size)

    def on_chord_part_return(self, request, state, result, **kwargs):
        """Report a finished part of a chord, and start the body if it was the last. Polled chords need no report."""
        self._chords.report(request, state, result)

    def chord_error_from_stack(self, callback, exc=None):
        """Fail the body of a chord, and all that Celery would let wait for it.

        That is what a body leads to which is a chord, or a chain that ends with a chord or group; and the chord that
        the body is a part of.
        """
        if exc is None:
            exc = sys.exc_info()[1]
        try:
            return super().chord_error_from_stack(callback, exc)
        finally:
            self._chords.fail_what_waits(callback, exc)

    def _get_task_meta_for(self, task_id):
        meta = super()._get_task_meta_for(task_id)
        if meta['status'] == states.SUCCESS:
            self._chords.report_lost(task_id, meta['result'])
        return meta

    def add_to_chord(self, chord_id, result):
        """Make a chord wait for the task of `result` too.

        Raises:
            NotImplementedError: if the current task's chord is polled: its size is fixed.
        """
        task = get_current_task()
        if task and task.request.group == chord_id:
            mark = chordmessage.mark_of(task.request)
            if mark is None:
                raise NotImplementedError('Only chords that are started with azureblockblob_native_chords can grow.')
            chord_id = mark.chord_id
        self._chords.grow(chord_id, result.id)

    def chord_log(self, chord_id):
        """Return the log of a chord."""
        return chordlog.ChordLog(self.container, self._blob_name(self.get_key_for_chord(chord_id)))


class _BackendClass:
    """Pickles a backend's class by the name under which it is registered.

    By its module's name it could be Celery's own class, in a process that has not looked the backend up yet.
    """

    def __init__(self, cls):
        self.cls = cls

    def __reduce__(self):
        if self.cls is AzureBlockBlobBackend:
            return by_name, (SCHEME,)
        return _itself, (self.cls,)


def _itself(value):
    return value


def _url_of(app):
    """Return the URL of an app's own backend, as Celery hands it to the backend."""
    return _without_alias(app.backend_cls or app.conf.result_backend)


def _without_alias(url):
    scheme = url.partition('://')[0] if isinstance(url, str) else ''
    return url.partition('+')[2] if '+' in scheme else url


def _require(distribution, module):
    try:
        import_module(module)
    except ImportError as exc:
        raise ImproperlyConfigured(
            f'The azureblockblob result backend needs {distribution}: pip install {distribution}') from exc


def _is_repeated(request):
    """Tell whether a task has run before, so that its state is probably there."""
    if request is None:
        return False
    return bool(request.retries or (request.delivery_info or {}).get('redelivered'))


def _polls(timeout, interval, on_interval, max_iterations=None):
    """Yield each time to poll for results: at once, after 10 ms, then twice as long, up to `interval` seconds.

    Raises:
        celery.exceptions.TimeoutError: if the caller still polls after `timeout` seconds.
    """
    interval = 0.5 if interval is None else interval
    deadline = None if timeout is None else time.monotonic() + timeout
    pause = min(FIRST_PAUSE, interval)
    polls = 0
    while True:
        yield
        polls += 1
        if max_iterations and polls >= max_iterations:
            return
        remaining = interval if deadline is None else deadline - time.monotonic()
        if deadline is not None and remaining <= 0:
            raise TimeoutError(f'The operation timed out after {timeout} seconds.')
        if on_interval:
            on_interval()
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, interval)
