"""Secrets: shown by no URL, representation, error, log record or pickled result. Nothing here reaches a network."""
from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import traceback
from urllib.parse import quote, unquote

import pytest

import celery.backends
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from celery.result import GroupResult

pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage import client
from celery.backends.azurestorage.credentials import CREDENTIAL_OPTIONS
from celery.backends.azurestorage.options import SETTINGS
from celery.backends.azurestorage.url import parse_url, redact

HOST = 'https://myaccount.blob.core.windows.net'
EMULATOR = 'http://127.0.0.1:10000/devstoreaccount1'

#: As long as an account's key and a signature are, with all that base64 may hold; they open nothing.
KEY = 'Zm9v/b+r' + 'Ab3dEfGh1j' * 7 + 'xyz01234' + '=='
SIGNATURE = 'q/e+' + 'Ab3dEfGh1j' * 3 + 'xyz012345' + '='
SAS = f'sv=2022-11-02&ss=b&srt=sco&sp=rwdlac&se=2030-01-01T00:00:00Z&sig={quote(SIGNATURE, safe="")}'

DEFAULT = f'azureblockblob://DefaultAzureCredential@{HOST}'
BY_KEY = f'azureblockblob://myaccount:{KEY}@{HOST}'
BY_STRING = f'azureblockblob://AccountName=myaccount;AccountKey={KEY}'
BY_SAS = f'azureblockblob://BlobEndpoint={HOST};SharedAccessSignature={SAS}'

#: Right URLs and how they are shown.
SHOWN = [
    (DEFAULT, DEFAULT),
    (f'{DEFAULT}/?client_id=1-2&container_name=results&base_path=a%2Fb',
     f'{DEFAULT}/?client_id=1-2&container_name=results&base_path=a%2Fb'),
    ('azureblockblob://managedidentitycredential@myaccount', 'azureblockblob://managedidentitycredential@myaccount'),
    ('azureblockblob://DefaultAzureCredential@https://[::1]:10000/acc',
     'azureblockblob://DefaultAzureCredential@https://[::1]:10000/acc'),
    (BY_KEY, f'azureblockblob://myaccount:**@{HOST}'),
    (f'{BY_KEY}?read_timeout=5', f'azureblockblob://myaccount:**@{HOST}?read_timeout=5'),
    (f'azureblockblob://myaccount:{quote(KEY, safe="")}@myaccount', 'azureblockblob://myaccount:**@myaccount'),
    (f'azureblockblob://devstoreaccount1:{KEY}@{EMULATOR}', f'azureblockblob://devstoreaccount1:**@{EMULATOR}'),
    (f'azureblockblob://devstoreaccount1:{KEY}@http://azurite:10000/devstoreaccount1/',
     'azureblockblob://devstoreaccount1:**@http://azurite:10000/devstoreaccount1/'),
    (BY_STRING, 'azureblockblob://AccountName=myaccount;AccountKey=**'),
    (f'azureblockblob:// accountkey = {KEY} ; AccountName = myaccount ;',
     'azureblockblob:// accountkey =**; AccountName = myaccount ;'),
    (f'azureblockblob://DefaultEndpointsProtocol=https;AccountName=myaccount;AccountKey={KEY};'
     f'EndpointSuffix=core.windows.net',
     'azureblockblob://DefaultEndpointsProtocol=https;AccountName=myaccount;AccountKey=**;'
     'EndpointSuffix=core.windows.net'),
    (f'azureblockblob://BlobEndpoint={EMULATOR};AccountName=devstoreaccount1;AccountKey={KEY};',
     f'azureblockblob://BlobEndpoint={EMULATOR};AccountName=devstoreaccount1;AccountKey=**;'),
    (BY_SAS, f'azureblockblob://BlobEndpoint={HOST};SharedAccessSignature=**'),
    (f'azureblockblob://BlobEndpoint={HOST};SharedAccessSignature=?{SAS}',
     f'azureblockblob://BlobEndpoint={HOST};SharedAccessSignature=**'),
    (f'azureblockblob://BlobEndpoint={HOST}/?{SAS};QueueEndpoint=https://q/',
     f'azureblockblob://BlobEndpoint={HOST}/?{SAS.partition("sig=")[0]}sig=**;QueueEndpoint=https://q/'),
    ('azureblockblob://UseDevelopmentStorage=true', 'azureblockblob://UseDevelopmentStorage=true'),
    (f'https://myaccount:{KEY}@myaccount.blob.core.windows.net',
     'https://myaccount:**@myaccount.blob.core.windows.net'),
    (f'azureblockblob+https://myaccount:{KEY}@myaccount', 'azureblockblob+https://myaccount:**@myaccount'),
    (f'https://AccountName=myaccount;AccountKey={KEY}', 'https://AccountName=myaccount;AccountKey=**'),
]

#: Where a key or a signature may be written by mistake. All of these are refused.
MISTAKES = [
    '{}', 'azureblockblob:{}', 'azureblockblobs://myaccount:{}@myaccount', 'myaccount:{}@myaccount',
    'azureblockblob://{}', 'azureblockblob://{}@myaccount', 'azureblockblob://{}:myaccount@myaccount',
    'azureblockblob://:{}@myaccount', 'azureblockblob://my-account:{}@myaccount', 'azureblockblob://myaccount:{}',
    'azureblockblob://myaccount:{}/https://myaccount', 'azureblockblob://myaccount:x{}@',
    'azureblockblob://myaccount:{}@my_account', 'azureblockblob://myaccount@{}', 'azureblockblob://myaccount/{}@host',
    'azureblockblob://myaccount:!{}@myaccount', 'azureblockblob://myaccount:{}!@myaccount',
    'azureblockblob://DefaultAzureCredential:{}@myaccount', 'azureblockblob://DefaultAzureCrednetial:{}@myaccount',
    'azureblockblob://{}Credential@myaccount', 'azureblockblob://DefaultAzureCredential@{}@myaccount',
    'azureblockblob://DefaultAzureCredential@myaccount:{}@myaccount', 'azureblockblob://DefaultAzureCredential@{}',
    'azureblockblob://DefaultAzureCredential@https://{}.blob.core.windows.net',
    'azureblockblob://DefaultAzureCredential@https://myaccount:{}',
    'azureblockblob://DefaultAzureCredential@https://127.0.0.1:10000/{}',
    'azureblockblob://DefaultAzureCredential@https://127.0.0.1:10000/devstoreaccount1/{}',
    'azureblockblob://DefaultAzureCredential@myaccount/{}', 'azureblockblob://DefaultAzureCredential@myaccount#{}',
    'azureblockblob://DefaultAzureCredential@myaccount?{}', 'azureblockblob://DefaultAzureCredential@myaccount?{}=a',
    'azureblockblob://DefaultAzureCredential@myaccount?client_id={}',
    'azureblockblob://DefaultAzureCredential@myaccount?client_id{}=a',
    'azureblockblob://DefaultAzureCredential@myaccount?client_id=a&client_id={}',
    'azureblockblob://DefaultAzureCredential@myaccount?authority={}',
    'azureblockblob://DefaultAzureCredential@myaccount?container_name={}',
    'azureblockblob://DefaultAzureCredential@myaccount?base_path=a/{}/',
    'azureblockblob://DefaultAzureCredential@myaccount?account_key={}',
    'azureblockblob://DefaultAzureCredential@myaccount?sig={}',
    'azureblockblob://DefaultAzureCredential@myaccount?SIG={}',
    'azureblockblob://DefaultAzureCredential@myaccount?sv=2022-11-02&sig={}&sp=r',
    'azureblockblob://DefaultAzureCredential@myaccount?client_id=a%26sig%3D{}',
    'azureblockblob://DefaultAzureCredential@myaccount%3Fsig%3D{}',
    'azureblockblob://ManagedIdentityCredential@myaccount?resource_id={}', 'azureblockblob://sv=2022-11-02&sig={}',
    'azureblockblob://https://myaccount:{}@myaccount.blob.core.windows.net', 'azureblockblob://https://myaccount@{}',
    'azureblockblob://https://myaccount.blob.core.windows.net;AccountName=myaccount;AccountKey={}',
    'azureblockblob://https://myaccount.blob.core.windows.net;SharedAccessSignature=sv=1&sig={}',
    'azureblockblob://https://myaccount.blob.core.windows.net?sv=2022-11-02&sig={}',
    'azureblockblob://AcountName=myaccount;AccountKey={}', 'azureblockblob://AccountName=myaccount;AcountKey={}',
    'azureblockblob://AccountName=myaccount;Account Key={}', 'azureblockblob://AccountName=myaccount;{}',
    'azureblockblob://AccountName={};AccountKey=myaccount', 'azureblockblob://AccountName=myaccount,AccountKey={}',
    'azureblockblob://AccountName=myaccount;AccountKey=!{}',
    'azureblockblob://AccountName=myaccount;AccountKey="{}"',
    'azureblockblob://"AccountName=myaccount;AccountKey={}"', 'azureblockblob://AccountKey={}',
    'azureblockblob://AccountName=myaccount;AccountKey={}?container_name=a',
    'azureblockblob://SharedAccessSignature={}',
    'azureblockblob://BlobEndpoint={};SharedAccessSignature=sv=1&sig=a',
    'azureblockblob://BlobEndpoint=https://me:{}@myaccount;SharedAccessSignature=sv=1&sig=a',
    'azureblockblob://BlobEndpoint=https://myaccount.blob.core.windows.net;SharedAccessSignature=sv=1&si={}',
    'azureblockblob://BlobEndpoint=https://myaccount.blob.core.windows.net?sig={};SharedAccessSignature=sig={}',
    'azureblockblob://DefaultEndpointsProtocol={};AccountName=myaccount',
    'azureblockblob://AccountName=myaccount;EndpointSuffix={}',
    'azureblockblob://Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=a;SharedAccessKey={}',
    'azureblockblob://UseDevelopmentStorage={}', 'azureblockblob://UseDevelopmentStorage=true;AccountKey={}',
    'azureblockblob+https://{}', 'azureblockblob+{}://myaccount', 'https://{}@myaccount',
]

#: Texts with something that is no key by its looks, but stands where a secret would, and how they are shown.
SUSPECT = [
    ('azureblockblob://myaccount:Abc@myaccount', 'azureblockblob://myaccount:**@myaccount'),
    ('azureblockblob://Abc:myaccount@myaccount', 'azureblockblob://**@myaccount'),
    ('azureblockblob://:Abc@myaccount', 'azureblockblob://**@myaccount'),
    ('azureblockblob://Abc@myaccount', 'azureblockblob://**@myaccount'),
    ('azureblockblob://DefaultAzureCredential:Abc@myaccount', 'azureblockblob://DefaultAzureCredential:**@myaccount'),
    ('azureblockblob://DefaultAzureCredential@me:Abc@myaccount', 'azureblockblob://**@myaccount'),
    ('azureblockblob://myaccount:Abc', 'azureblockblob://**'),
    ('azureblockblob://myaccount:Abc/https://myaccount', 'azureblockblob://**'),
    ('azureblockblob://myaccount@https://me:Abc', 'azureblockblob://**@**'),
    ('azureblockblob://Abc', 'azureblockblob://**'),
    ('azureblockblob://DefaultAzureCredential@myaccount/Abc', 'azureblockblob://DefaultAzureCredential@**'),
    ('azureblockblob://DefaultAzureCredential@myaccount/a/b', 'azureblockblob://DefaultAzureCredential@**'),
    ('azureblockblob://DefaultAzureCredential@myaccount#Abc', 'azureblockblob://DefaultAzureCredential@**'),
    ('azureblockblob://DefaultAzureCredential@myaccount?password=Abc&client_id=a&Abc',
     'azureblockblob://DefaultAzureCredential@myaccount?**&client_id=a&**'),
    ('azureblockblob://DefaultAzureCredential@myaccount?authority=https://me:Abc@host&client_id=a',
     'azureblockblob://DefaultAzureCredential@myaccount?**&client_id=a'),
    ('azureblockblob://DefaultAzureCredential@myaccount?authority=me%3AAbc%40host&client_id=a;AccountKey=Abc',
     'azureblockblob://DefaultAzureCredential@myaccount?**&**'),
    ('azureblockblob://AccountName=myaccount;AcountKey=Abc;Abc;', 'azureblockblob://AccountName=myaccount;**;**;'),
    ('azureblockblob://AccountName=Abc;AccountKey=myaccount', 'azureblockblob://AccountName=**;AccountKey=**'),
    ('azureblockblob://AcountName=myaccount;AccountKey=Abc', 'azureblockblob://**'),
    ('azureblockblob://BlobEndpoint=https://me:Abc@myaccount;AccountKey=Abc',
     'azureblockblob://BlobEndpoint=**;AccountKey=**'),
    ('azureblockblob://BlobEndpoint=https://myaccount?Abc', 'azureblockblob://BlobEndpoint=https://myaccount?**'),
    ('redis://:Abc@localhost', 'redis:**@localhost'),
    ('myaccount:Abc@https://myaccount', 'myaccount:**@https://myaccount'),
    ('AccountName=myaccount;AccountKey=Abc', 'AccountName=myaccount;AccountKey=**'),
]

FORMS = [KEY, quote(KEY, safe=''), SIGNATURE, quote(SIGNATURE, safe='')]


def make_app(url):
    return Celery('azure', set_as_current=False, backend=url)


def build(url):
    return AzureBlockBlobBackend(app=Celery('azure', set_as_current=False), url=url)


def shows(text, secrets=(KEY, SIGNATURE)):
    """Tell whether a text holds a secret: whole, or a part of it that is long enough to recognize."""
    parts = [secret[at:at + 12] for secret in secrets for at in range(len(secret) - 11)]
    return any(part in form for part in parts for form in (text, unquote(text)))


def all_texts(exc):
    """Return all that an exception says, by itself and through what it is chained to."""
    told, links = ''.join(traceback.format_exception(type(exc), exc, exc.__traceback__)), [exc]
    for link in links:
        told += f'{link!s} {link!r} {link.args!r} {vars(link)!r}'
        links += [more for more in (link.__cause__, link.__context__) if more is not None and more not in links]
    return told


class test_URLs:

    @pytest.mark.parametrize(('url', 'shown'), SHOWN)
    def test_secrets_are_masked_and_nothing_else(self, url, shown):
        backend = build(url)
        assert backend.as_uri() == shown
        assert backend.as_uri(include_password=True) == url

    @pytest.mark.parametrize(('url', 'shown'), SHOWN)
    def test_representations_are_masked(self, url, shown):
        assert repr(build(url)) == f'<AzureBlockBlobBackend: {shown}>'
        assert repr(parse_url(url, CREDENTIAL_OPTIONS)) == f'<BackendURL: {shown}>'

    @pytest.mark.parametrize('secret', FORMS)
    @pytest.mark.parametrize('mistake', MISTAKES)
    def test_a_secret_in_the_wrong_place_is_masked(self, mistake, secret):
        assert not shows(redact(mistake.replace('{}', secret)))

    @pytest.mark.parametrize('secret', FORMS)
    @pytest.mark.parametrize('mistake', MISTAKES)
    def test_a_secret_in_the_wrong_place_is_not_repeated(self, mistake, secret, caplog):
        with caplog.at_level(logging.DEBUG), pytest.raises(ImproperlyConfigured) as caught:
            build(mistake.replace('{}', secret))
        assert not shows(all_texts(caught.value))
        assert not shows(caplog.text)

    @pytest.mark.parametrize(('text', 'shown'), SUSPECT)
    def test_what_stands_where_a_secret_would_is_masked(self, text, shown):
        assert redact(text) == shown

    def test_another_mask_may_be_used(self):
        for url, shown in SHOWN + SUSPECT:
            assert redact(url, '<hidden>') == shown.replace('**', '<hidden>')

    @pytest.mark.parametrize('shown', [shown for _, shown in SHOWN + SUSPECT])
    def test_masking_twice_is_masking_once(self, shown):
        assert redact(shown) == shown

    @pytest.mark.parametrize(
        'option', sorted({*SETTINGS, *(name for options in CREDENTIAL_OPTIONS.values() for name in options)}))
    def test_values_of_options_are_shown(self, option):
        assert redact(f'{DEFAULT}?{option}=value') == f'{DEFAULT}?{option}=value'

    @pytest.mark.parametrize(('text', 'shown'), [
        ('', ''), ('azureblockblob', 'azureblockblob'), ('azureblockblob://', 'azureblockblob://'), ('://', '**'),
        ('redis://localhost', '**'), ('?', '?'), ('@', '**@'), ('=;=', '**'), ('a b', '**'),
    ])
    def test_what_is_no_url_is_masked_without_an_error(self, text, shown):
        assert redact(text) == shown


class Wire:
    """What stands in for connections: each gets an answer that was written in advance, or fails."""

    def __init__(self, answer=None):
        self.answer = answer
        self.peers = []

    def connect(self, *args, **kwargs):
        if self.answer is None:
            raise ConnectionRefusedError(111, 'Connection refused')
        ours, peer = socket.socketpair()
        peer.sendall(self.answer)
        self.peers.append(peer)
        return ours

    def receive(self):
        """Return what was sent over the first connection."""
        return self.peers[0].recv(65536).decode()

    def close(self):
        for peer in self.peers:
            peer.close()


@pytest.fixture
def connect_to(monkeypatch):
    """Return a function that has the next connections answered so."""
    wires = []

    def connect(answer=None):
        wires.append(Wire(answer))
        monkeypatch.setattr('urllib3.util.connection.create_connection', wires[-1].connect)
        return wires[-1]
    yield connect
    client.close_clients()
    for wire in wires:
        wire.close()


NOT_FOUND = b'HTTP/1.1 404 Not Found\r\nx-ms-error-code: BlobNotFound\r\nContent-Length: 0\r\n\r\n'
FORBIDDEN = b'HTTP/1.1 403 Forbidden\r\nx-ms-error-code: AuthenticationFailed\r\nContent-Length: 0\r\n\r\n'

#: URLs whose secrets are sent, or sign what is sent, without TLS.
PLAIN = [
    f'azureblockblob://BlobEndpoint={EMULATOR};SharedAccessSignature={SAS}',
    f'azureblockblob://BlobEndpoint={EMULATOR}?{SAS}',
    f'azureblockblob://BlobEndpoint={EMULATOR};SharedAccessSignature=sv=1&sig={SIGNATURE}',
    f'azureblockblob://BlobEndpoint={EMULATOR};AccountName=devstoreaccount1;AccountKey={KEY}',
    f'azureblockblob://devstoreaccount1:{KEY}@{EMULATOR}',
]


class test_Requests:

    @pytest.fixture
    def backend_of(self, connect_to):
        def make(url):
            app = make_app(url)
            app.conf.azureblockblob_retry_max_attempts = 0
            return app.backend
        return make

    @pytest.mark.parametrize('url', PLAIN)
    def test_no_log_record_shows_a_secret(self, url, backend_of, connect_to, caplog):
        connect_to(NOT_FOUND)
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, client.request_logger.name):
            assert backend_of(url).get('key') is None
        assert 'GET /devstoreaccount1/celery/key' in caplog.text  # urllib3 has logged the request
        assert not shows(caplog.text)
        assert not any(shows(str(vars(record))) for record in caplog.records)

    @pytest.mark.parametrize('answer', [None, FORBIDDEN])
    @pytest.mark.parametrize('url', PLAIN)
    def test_no_error_shows_a_secret(self, url, answer, backend_of, connect_to, caplog):
        connect_to(answer)
        with caplog.at_level(logging.DEBUG), pytest.raises(Exception, match=r'127\.0\.0\.1') as caught:
            backend_of(url).get('key')
        assert not shows(all_texts(caught.value))
        assert not shows(caplog.text)

    @pytest.mark.parametrize('sas', [SAS, f'sv=1&newer=2&sig={quote(SIGNATURE, safe="")}', 'sv=1&sig=a/b+c='])
    def test_a_signature_is_sent_as_it_was_written(self, sas, backend_of, connect_to):
        wire = connect_to(NOT_FOUND)
        assert backend_of(f'azureblockblob://BlobEndpoint={EMULATOR};SharedAccessSignature={sas}').get('key') is None
        assert wire.receive().startswith(f'GET /devstoreaccount1/celery/key?{sas} HTTP/1.1')


#: What a process of its own does with a pickle: it has nothing but an app.
UNPICKLE = """
import json, pickle, sys
import celery.backends
told = json.load(sys.stdin)
celery.backends.__path__[:] = told['modules']
import celery
app = celery.Celery('other', backend=told['url'])
thing = pickle.loads(bytes.fromhex(told['pickle']))
backend = getattr(thing, 'backend', thing)
json.dump({
    'class': f'{type(backend).__module__}.{type(backend).__name__}',
    'url': backend.as_uri(include_password=True),
    'container': backend._settings['container_name'],
    'expires': backend.expires,
    'app': backend.app.main,
    'id': getattr(thing, 'id', None),
}, sys.stdout)
"""


def unpickle(data, url):
    """Return what a fresh process, whose app has its results at `url`, reads from a pickle."""
    told = {'modules': list(celery.backends.__path__), 'url': url, 'pickle': data.hex()}
    environment = {name: value for name, value in os.environ.items() if name != 'CELERY_RESULT_BACKEND'}
    done = subprocess.run(
        [sys.executable, '-c', UNPICKLE], input=json.dumps(told), capture_output=True, text=True, timeout=60,
        env={**environment, 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WITH_SECRETS = [BY_KEY, BY_STRING, BY_SAS, f'azureblockblob://BlobEndpoint={HOST}?{SAS}',
                f'azureblockblob+https://myaccount:{KEY}@myaccount.blob.core.windows.net']


class test_Pickles:

    def test_it_is_in_none_if_the_app_names_the_class(self):
        path = 'celery.backends.azureblockblob:AzureBlockBlobBackend'
        app = make_app(f'{path}+https://myaccount:{KEY}@myaccount')
        assert app.backend.as_uri(include_password=True) == f'https://myaccount:{KEY}@myaccount'
        assert not shows(pickle.dumps(app.AsyncResult('id')).decode('latin-1'))

    @pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize('url', WITH_SECRETS)
    def test_the_apps_own_url_is_in_none(self, url, protocol):
        app = make_app(url)
        results = [app.AsyncResult('id'), app.GroupResult('id', [app.AsyncResult('a'), app.AsyncResult('b')])]
        for thing in (app.backend, *results):
            assert not shows(pickle.dumps(thing, protocol).decode('latin-1'))

    def test_it_is_in_none_if_a_backend_was_given_the_whole_of_it(self):
        url = f'azureblockblob+https://myaccount:{KEY}@myaccount.blob.core.windows.net'
        assert not shows(pickle.dumps(AzureBlockBlobBackend(app=make_app(url), url=url)).decode('latin-1'))

    def test_it_is_in_none_if_the_environment_gave_it(self, monkeypatch):
        monkeypatch.setenv('CELERY_RESULT_BACKEND', BY_KEY)
        app = Celery('azure', set_as_current=False)
        assert app.backend.as_uri(include_password=True) == BY_KEY
        assert not shows(pickle.dumps(app.AsyncResult('id')).decode('latin-1'))

    def test_it_is_in_none_if_the_apps_class_gave_it(self):
        class App(Celery):
            backend_cls = BY_KEY
        app = App('azure', set_as_current=False)
        assert app.backend.as_uri(include_password=True) == BY_KEY
        assert not shows(pickle.dumps(app.AsyncResult('id')).decode('latin-1'))

    @pytest.mark.parametrize('url', WITH_SECRETS)
    def test_a_result_finds_the_url_of_the_app_where_it_is_unpickled(self, url):
        app = make_app(url)
        assert unpickle(pickle.dumps(app.AsyncResult('task-id')), url) == {
            'class': 'celery.backends.azureblockblob.AzureBlockBlobBackend',
            'url': url.removeprefix('azureblockblob+'), 'container': 'celery', 'expires': 86400, 'app': 'other',
            'id': 'task-id'}

    def test_it_may_be_another_url_there(self):
        there = unpickle(pickle.dumps(make_app(BY_KEY).backend), DEFAULT)
        assert there['url'] == DEFAULT

    def test_a_group_finds_it_too(self):
        app = make_app(BY_KEY)
        group = GroupResult('group-id', [app.AsyncResult('a')], app=app)
        data = pickle.dumps(group.results[0])
        assert unpickle(data, BY_KEY)['url'] == BY_KEY

    def test_what_is_the_backends_own_goes_with_it(self):
        backend = AzureBlockBlobBackend(app=make_app(BY_KEY), url=BY_KEY, container_name='others', expires=77)
        there = unpickle(pickle.dumps(backend), BY_KEY)
        assert (there['url'], there['container'], there['expires']) == (BY_KEY, 'others', 77)

    def test_a_backend_with_a_url_of_its_own_keeps_it(self):
        backend = AzureBlockBlobBackend(app=make_app(DEFAULT), url=BY_STRING)
        assert unpickle(pickle.dumps(backend), DEFAULT)['url'] == BY_STRING

    def test_without_a_url_there_the_error_says_so(self):
        with pytest.raises(AssertionError, match='the URL is missing'):
            unpickle(pickle.dumps(make_app(BY_KEY).backend), None)
