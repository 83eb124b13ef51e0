"""What holds of all texts: each gives a backend or one kind of error, and none gives a secret away."""
from __future__ import annotations

import base64
import logging
import os
import pickle
import re
import traceback
from contextlib import contextmanager
from urllib.parse import quote, unquote

import pytest

pytest.importorskip('hypothesis')
pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from celery import Celery
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.credentials import CREDENTIAL_OPTIONS, CREDENTIALS
from celery.backends.azurestorage.options import SETTINGS
from celery.backends.azurestorage.url import CONNECTION_STRING_KEYS, WHERE, parse_url, redact
from celery.exceptions import ImproperlyConfigured
from celery.result import AsyncResult

#: Not a profile: those belong to whoever runs the tests.
thorough = settings(
    max_examples=1000 if os.environ.get('CI') else 150, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

HOST = 'https://myaccount.blob.core.windows.net'
EMULATOR = 'http://127.0.0.1:10000/devstoreaccount1'

#: Right URLs, with {key} and {signature} where secrets belong.
RIGHT = [
    'azureblockblob://myaccount:{key}@' + HOST,
    'azureblockblob://myaccount:{key}@' + HOST + '?container_name=results&base_path=a/',
    'azureblockblob://myaccount:{key}@myaccount',
    'azureblockblob://devstoreaccount1:{key}@' + EMULATOR,
    'azureblockblob+https://myaccount:{key}@myaccount',
    'https://myaccount:{key}@myaccount.blob.core.windows.net',
    'azureblockblob://DefaultEndpointsProtocol=https;AccountName=myaccount;AccountKey={key};EndpointSuffix=test.local',
    'azureblockblob://AccountKey={key};AccountName=myaccount',
    'azureblockblob://BlobEndpoint=' + EMULATOR + ';AccountName=devstoreaccount1;AccountKey={key}',
    'azureblockblob://BlobEndpoint=' + HOST + ';SharedAccessSignature=sv=2022-11-02&sp=rw&sig={signature}',
    'azureblockblob://BlobEndpoint=' + HOST + ';SharedAccessSignature=?sig={signature}&sv=2022-11-02&sp=rw',
    'azureblockblob://BlobEndpoint=' + HOST + '/?sv=2022-11-02&sig={signature}&sp=rw',
    'azureblockblob://AccountName=myaccount;SharedAccessSignature=sv=2022-11-02&sig={signature}',
]

#: Right URLs without a secret, into which one may be dropped.
PLAIN = [
    'azureblockblob://DefaultAzureCredential@' + HOST,
    'azureblockblob://DefaultAzureCredential@myaccount?client_id=1111-2222&container_name=results&read_timeout=5',
    'azureblockblob://ManagedIdentityCredential@' + HOST + ':443/?resource_id=/subscriptions/1&base_path=a%2Fb',
    'azureblockblob://CertificateCredential@' + HOST + '?tenant_id=t&client_id=c&certificate_path=/etc/cert.pem',
    'azureblockblob://EnvironmentCredential@https://127.0.0.1:10000/devstoreaccount1?authority=https://sign-in.test',
    'azureblockblob://UseDevelopmentStorage=true;DevelopmentStorageProxyUri=http://azurite',
    'https://DefaultAzureCredential@myaccount',
]

PIECES = [
    'azureblockblob://', 'azureblockblob+https://', 'https://', 'http://', '://', ':', '/', '@', '?', '&', '=', ';',
    '#', '%', '%2', '%FF', '%00', '+', ' ', '\n', '"', '[', ']', '[::1]', '::1', '127.0.0.1', 'localhost', ':10000',
    'myaccount', 'MyAccount', 'devstoreaccount1', '.blob.core.windows.net', '.queue.core.windows.net', 'results',
    '..', '*', 'a2V5', 'a2V5==', 'sig', 'sv', 'true', '0', '1.5', '-1', '\u20ac', '\u0130', '\u017f', '\ud800',
    '\x00', 'os.sep', *CREDENTIALS, *SETTINGS,
    *sorted({name for options in CREDENTIAL_OPTIONS.values() for name in options}),
    *CONNECTION_STRING_KEYS.values(),
]

texts = st.one_of(
    st.text(),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map(''.join),
    st.builds('{}{}'.format, st.sampled_from(['azureblockblob://', 'https://']), st.text()),
    st.builds(lambda pieces: 'azureblockblob://' + ''.join(pieces), st.lists(st.sampled_from(PIECES), max_size=12)),
)
others = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.lists(st.text()),
    st.dictionaries(st.text(), st.text()), st.sampled_from([object(), Celery, ...]))


def encoded(size):
    """Secrets as Azure writes them: random bytes in base64, with the = at its end."""
    return st.binary(min_size=size, max_size=size).map(lambda data: base64.b64encode(data).decode())


keys, signatures = encoded(64), encoded(32)


def written(secret):
    """The ways to write a secret: as it is, and percent-encoded in whole or in part."""
    whole = quote(secret, safe='')
    return st.sampled_from([secret, quote(secret), whole, whole.replace('%2B', '%2b').replace('%3D', '%3d')])


def said_against(url, **configured):
    """Build a backend. Return what is said against it, or '' after a look that it gives its URL back."""
    app = Celery('azure', set_as_current=False)
    app.conf.update({f'azureblockblob_{name}': value for name, value in configured.items()})
    try:
        backend = AzureBlockBlobBackend(app=app, url=url)
    except ImproperlyConfigured as exc:
        return str(exc)
    assert backend.as_uri(include_password=True) == url
    return ''


def shows(text, secret):
    """Tell whether a text holds a secret in any form, or a part of it that is long enough to recognize."""
    parts = [part for part in re.split('[/+=]', secret) if len(part) >= 8] + [secret]
    return any(part in form for part in parts for form in (text, unquote(text)))


@contextmanager
def all_logs():
    """Collect all that is logged, at DEBUG."""
    class Collector(logging.Handler):
        def emit(self, record):
            told.append(f'{record.getMessage()} {record.args!r} {record.exc_text}')
    told, root, handler = [], logging.getLogger(), Collector()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield told
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def all_that_is_told(url):
    """Build the backend of an app. Return all that can be seen of its URL, or of why there is none."""
    told = [redact(url)]
    with all_logs() as logs:
        try:
            app = Celery('azure', set_as_current=False, backend=url)
            backend = AzureBlockBlobBackend(app=app, url=url)
            result = AsyncResult('id', backend, app=app)
        except ImproperlyConfigured as exc:
            while exc is not None:
                told += [str(exc), repr(exc), *traceback.format_exception(type(exc), exc, exc.__traceback__)]
                exc = exc.__cause__ or exc.__context__
        else:
            told += [backend.as_uri(), repr(backend), str(backend), repr(backend._parsed_url), repr(result),
                     pickle.dumps(result).decode('latin-1')]
            assert backend.as_uri(include_password=True) == url
    return '\n'.join(told + logs)


class test_AnyText:

    @thorough
    @given(texts)
    @example('')
    @example('azureblockblob://' + '=' * 5000)
    @example('azureblockblob://' + 'a' * 20000 + '@')
    @example('azureblockblob://DefaultAzureCredential@' + '/' * 20000)
    def test_it_gives_a_backend_that_gives_it_back_or_one_kind_of_error(self, text):
        said = said_against(text)
        assert not said or said.startswith((WHERE, 'azureblockblob_credential'))

    @thorough
    @given(texts)
    def test_it_does_so_with_a_credential_configured(self, text):
        said = said_against(text, credential=Celery)
        assert not said or said.startswith(WHERE)

    @thorough
    @given(texts)
    def test_it_is_read_the_same_way_each_time(self, text):
        def read():
            try:
                return parse_url(text, CREDENTIAL_OPTIONS)
            except ImproperlyConfigured as exc:
                return str(exc)
        assert read() == read()

    @thorough
    @given(texts)
    def test_it_can_be_masked_and_then_stays_so(self, text):
        assert redact(redact(text)) == redact(text)

    @thorough
    @given(others)
    def test_what_is_no_text_is_refused(self, value):
        assert 'the URL is missing' in said_against(value) or 'the URL must be text' in said_against(value)

    @thorough
    @given(st.text() | others, st.sampled_from(sorted(SETTINGS)))
    def test_any_value_of_a_setting_is_taken_or_refused(self, value, name):
        url = f'azureblockblob://{"" if name == "credential" else "DefaultAzureCredential@"}myaccount'
        said = said_against(url, **{name: value})
        assert not said or f'azureblockblob_{name}' in said


class test_Secrets:

    @thorough
    @given(st.data(), keys, signatures, st.sampled_from(RIGHT))
    def test_none_is_shown_where_it_belongs(self, data, key, signature, form):
        in_url = form.startswith(('https', 'azureblockblob+', 'azureblockblob://myaccount', 'azureblockblob://devstore'))
        url = form.format(
            key=data.draw(written(key)) if in_url else key, signature=data.draw(written(signature)))
        parsed = parse_url(url, CREDENTIAL_OPTIONS)
        assert parsed.account_key == key or signature in unquote(parsed.sas)
        told = all_that_is_told(url)
        assert 'Accepted are' not in told
        assert not shows(told, key)
        assert not shows(told, signature)

    @thorough
    @given(st.data(), keys | signatures, st.sampled_from(RIGHT + PLAIN))
    def test_none_is_shown_wherever_it_is_dropped(self, data, secret, form):
        url = form.format(key='a2V5', signature='a2V5')
        at = data.draw(st.integers(0, len(url)))
        assert not shows(all_that_is_told(url[:at] + data.draw(written(secret)) + url[at:]), secret)

    @thorough
    @given(st.data(), keys | signatures, st.lists(st.sampled_from(PIECES), max_size=8))
    def test_none_is_shown_among_pieces(self, data, secret, pieces):
        at = data.draw(st.integers(0, len(pieces)))
        text = ''.join([*pieces[:at], data.draw(written(secret)), *pieces[at:]])
        assert not shows(all_that_is_told('azureblockblob://' + text), secret)
        assert not shows(all_that_is_told(text), secret)

    @thorough
    @given(st.data(), keys | signatures, st.sampled_from(RIGHT))
    def test_none_is_shown_when_a_part_is_left_out(self, data, secret, form):
        url = form.format(key=data.draw(written(secret)), signature=data.draw(written(secret)))
        begin = data.draw(st.integers(0, len(url)))
        end = data.draw(st.integers(begin, len(url)))
        assume(secret in unquote(url[:begin] + url[end:]))
        assert not shows(all_that_is_told(url[:begin] + url[end:]), secret)
