"""Which errors are repeated, and what the user reads about the others."""
from __future__ import annotations

import importlib
import itertools
import pkgutil
import ssl
import traceback
import warnings

import pytest

pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

import azure.core
import azure.identity
import azure.storage.blob
import requests
from azure.core import exceptions as core
from azure.core.pipeline.transport import HttpRequest, RequestsTransportResponse
from urllib3.exceptions import MaxRetryError, ProtocolError, SSLError

from celery.backends.azurestorage.credentials import TokenError
from celery.backends.azurestorage.errors import (
    TEMPORARY,
    TEMPORARY_STATUSES,
    Identity,
    error_code,
    explain,
    hide,
    is_temporary,
    mask_signatures,
)

#: Exceptions of the SDK that it does not publish. None of them is temporary.
UNPUBLISHED = {
    # Credentials: there is no token. They count as their base, ClientAuthenticationError.
    'AuthenticationRequiredError', 'CredentialUnavailableError',
    # The key is none.
    'AzureSigningError',
    # Long-running operations, asyncio and Avro: no operation of the backend comes there.
    'BadResponse', 'BadStatus', 'OperationFailed', '_ResponseStopIteration',
    'AvroException', 'DataFileException', 'Error', 'SchemaParseException', 'SchemaResolutionException',
}

#: Statuses besides the temporary ones, with codes as the service has them.
PERMANENT_ANSWERS = [
    (304, ''), (400, 'InvalidHeaderValue'), (401, 'NoAuthenticationInformation'),
    (403, 'AuthorizationPermissionMismatch'), (403, 'AuthenticationFailed'), (404, 'BlobNotFound'),
    (404, 'ContainerNotFound'), (404, ''), (405, 'UnsupportedHttpVerb'), (409, 'BlobAlreadyExists'),
    (409, 'ContainerAlreadyExists'), (409, 'LeaseAlreadyPresent'), (411, ''), (412, 'ConditionNotMet'),
    (412, 'LeaseIdMissing'), (413, 'RequestBodyTooLarge'), (416, 'InvalidRange'), (501, ''), (505, ''),
]

PLACE = 'https://account.blob.core.windows.net/celery'
MANAGED = Identity('ManagedIdentityCredential (client_id=1234)', 'It needs the role "Storage Blob Data Contributor"')


def answer(status, code='', body=b''):
    """Return an answer as the SDK has it."""
    response = requests.Response()
    response.status_code = status
    response.reason = 'as the service says'
    response._content = body
    if code:
        response.headers['x-ms-error-code'] = code
    return RequestsTransportResponse(HttpRequest('GET', PLACE), response)


def refusal(status, code='', kind=core.HttpResponseError):
    """Return an error for an answer."""
    return kind(message='Said by the service.', response=answer(status, code))


def bare(kind):
    """Return an exception of which only the class is known."""
    return kind.__new__(kind)


def wrapped(kind, cause):
    """Return an error of the SDK as it wraps one of requests."""
    return kind(cause, error=cause)


def certificate_error():
    """Return the error of a certificate that is not trusted, as it comes through urllib3, requests and the SDK."""
    refused = ssl.SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate')
    return wrapped(core.ServiceRequestError, requests.exceptions.SSLError(
        MaxRetryError(None, '/celery/key', SSLError(refused))))


def published_exceptions():
    """Return the exceptions in the public modules of the SDK, and the others that any of its modules has."""
    published, others = set(), set()
    for package in (azure.core, azure.identity, azure.storage.blob):
        for module in modules_of(package):
            public = not any(part.startswith('_') for part in module.__name__.split('.'))
            for name, value in vars(module).items():
                if isinstance(value, type) and issubclass(value, BaseException) and of_azure(value):
                    (published if public and not name.startswith('_') else others).add(value)
    return published, others - published


def of_azure(kind):
    return kind.__module__.startswith(('azure.core', 'azure.identity', 'azure.storage.blob'))


def modules_of(package):
    yield package
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.', onerror=lambda name: None):
            try:
                yield importlib.import_module(module.name)
            except ImportError:  # of a transport or a tracer whose library is not installed
                continue


def links_of(exc):
    """Return an exception and all that it is chained to or has wrapped."""
    links, pending = [], [exc]
    while pending:
        link = pending.pop()
        if isinstance(link, BaseException) and not any(link is known for known in links):
            links.append(link)
            pending += [link.__cause__, link.__context__, *link.args, *vars(link).values()]
    return links


class test_is_temporary:

    def test_every_exception_of_the_sdk_has_been_judged(self):
        published, others = published_exceptions()
        assert len(published) > 20
        judged = {kind.__name__ for kind in TEMPORARY} | UNPUBLISHED
        assert {kind.__name__ for kind in published | others} - judged == set()

    def test_every_published_exception_that_an_operation_can_raise_is_in_the_table_itself(self):
        published, _ = published_exceptions()
        of_the_sdk = {kind for kind in published if issubclass(kind, (core.AzureError, ValueError))}
        assert {kind for kind in of_the_sdk if kind.__name__ not in UNPUBLISHED} - set(TEMPORARY) == set()

    def test_the_table_names_nothing_that_is_gone(self):
        published, others = published_exceptions()
        assert set(TEMPORARY) - published == set()
        assert UNPUBLISHED - {kind.__name__ for kind in published | others} == set()

    def test_what_is_not_published_is_not_temporary(self):
        kinds = {kind for kind in itertools.chain(*published_exceptions()) if kind.__name__ in UNPUBLISHED}
        assert {kind.__name__ for kind in kinds if is_temporary(bare(kind))} == set()

    @pytest.mark.parametrize('kind', [kind for kind, judgement in TEMPORARY.items() if judgement])
    def test_a_connection_that_fails_is(self, kind):
        assert is_temporary(bare(kind))

    @pytest.mark.parametrize('kind', [kind for kind, judgement in TEMPORARY.items() if judgement is False])
    def test_what_would_fail_again_is_not(self, kind):
        assert not is_temporary(bare(kind))

    @pytest.mark.parametrize('kind', [
        core.HttpResponseError, core.ClientAuthenticationError, core.ResourceExistsError, core.ResourceModifiedError,
        core.ResourceNotFoundError, core.ResourceNotModifiedError])
    @pytest.mark.parametrize('status', [408, 429, 500, 502, 503, 504])
    def test_an_answer_is_judged_by_its_status(self, kind, status):
        assert is_temporary(refusal(status, kind=kind))
        assert status in TEMPORARY_STATUSES

    @pytest.mark.parametrize(('status', 'code'), PERMANENT_ANSWERS)
    def test_no_other_status_is(self, status, code):
        assert not is_temporary(refusal(status, code))

    @pytest.mark.parametrize('kind', [core.HttpResponseError, core.ResourceExistsError])
    def test_a_container_that_is_being_deleted_is(self, kind):
        assert is_temporary(refusal(409, 'ContainerBeingDeleted', kind))

    def test_a_code_counts_where_the_sdk_puts_it_as_an_enumeration(self):
        exc = refusal(409, kind=core.ResourceExistsError)
        exc.error_code = azure.storage.blob.StorageErrorCode.CONTAINER_BEING_DELETED
        assert is_temporary(exc)

    def test_an_answer_that_was_cut_is(self):
        cut = requests.exceptions.ChunkedEncodingError(ProtocolError('Connection broken'))
        assert is_temporary(wrapped(core.HttpResponseError, cut))
        assert is_temporary(wrapped(core.HttpResponseError, wrapped(core.IncompleteReadError, cut)))

    def test_a_credential_without_a_token_is_not(self):
        assert not is_temporary(azure.identity.CredentialUnavailableError(message='no identity'))
        assert not is_temporary(core.ClientAuthenticationError(message='wrong secret'))

    def test_a_certificate_that_is_not_trusted_is_not(self):
        assert not is_temporary(certificate_error())

    def test_a_kind_that_nobody_knows_counts_as_its_base(self):
        assert is_temporary(type('NewTimeout', (core.ServiceResponseTimeoutError,), {})('new'))
        assert not is_temporary(type('NewError', (core.AzureError,), {})('new'))

    @pytest.mark.parametrize('exc', [ValueError(), OSError(), KeyError(), TokenError(), TimeoutError()])
    def test_nothing_else_is(self, exc):
        assert not is_temporary(exc)


class test_error_code:

    def test_is_that_of_the_answer(self):
        assert error_code(refusal(409, 'BlobAlreadyExists')) == 'BlobAlreadyExists'

    @pytest.mark.parametrize('exc', [refusal(404), core.ServiceRequestError('no answer'), ValueError()])
    def test_is_empty_without_one(self, exc):
        assert error_code(exc) == ''


class test_explain:

    def told(self, exc, identity=MANAGED):
        told = explain(exc, identity, PLACE)
        assert type(told) is type(exc)
        assert 'Said by' in str(exc) or isinstance(exc, core.ServiceRequestError)
        assert told is not exc
        return told

    def test_a_403_names_who_asks_and_where_and_the_role_that_is_missing(self):
        text = str(self.told(refusal(403, 'AuthorizationPermissionMismatch')))
        assert 'ManagedIdentityCredential (client_id=1234)' in text
        assert PLACE in text
        assert 'Storage Blob Data Contributor' in text
        assert 'Said by the service.' in text

    @pytest.mark.parametrize(('status', 'code'), [
        (403, 'AuthenticationFailed'), (403, 'InvalidAuthenticationInfo'), (400, 'InvalidAuthenticationInfo')])
    def test_a_wrong_secret_is_told(self, status, code):
        key = Identity('The key of the account a', 'The account must allow access with its keys')
        text = str(self.told(refusal(status, code, core.ClientAuthenticationError), key))
        assert 'The key of the account a' in text
        assert PLACE in text
        assert 'secret' in text
        assert 'clock' in text
        assert 'role' not in text

    def test_a_401_names_who_asks_and_where(self):
        text = str(self.told(refusal(401, 'InvalidAuthenticationInfo', core.ClientAuthenticationError)))
        assert 'ManagedIdentityCredential (client_id=1234)' in text
        assert PLACE in text
        assert 'tenant' in text

    def test_a_certificate_that_is_not_trusted_leads_to_the_bundle(self):
        text = str(self.told(certificate_error()))
        assert PLACE in text
        assert 'REQUESTS_CA_BUNDLE' in text
        assert 'self-signed certificate' in text

    def test_a_host_that_cannot_be_reached_is_named(self):
        text = str(self.told(core.ServiceRequestError('Name or service not known')))
        assert PLACE in text
        assert 'Check the account URL' in text
        assert 'Name or service not known' in text

    @pytest.mark.parametrize('cls', [core.ServiceResponseError, core.ServiceResponseTimeoutError])
    def test_a_host_that_does_not_answer_is_named(self, cls):
        text = str(self.told(cls('Said by urllib3: Remote end closed connection')))
        assert f'The connection to {PLACE} gave no answer' in text
        assert 'https://' in text
        assert 'Remote end closed' in text

    @pytest.mark.parametrize('exc', [
        refusal(404), refusal(405), refusal(302), refusal(200), refusal(403), refusal(404, 'ResourceNotFound'),
        core.DecodeError('Said by requests')])
    def test_a_host_that_is_no_blob_service_is_named(self, exc):
        text = str(self.told(exc))
        assert PLACE in text
        assert 'not the blob service' in text
        assert 'Check the account URL' in text

    @pytest.mark.parametrize('exc', [
        refusal(404, 'ContainerNotFound'), refusal(409, 'LeaseAlreadyPresent'), refusal(412, 'LeaseIdMissing'),
        refusal(400, 'InvalidHeaderValue'), refusal(503), refusal(503, 'ServerBusy'), refusal(429),
        core.IncompleteReadError('cut'), ValueError()])
    def test_nothing_is_added_where_there_is_nothing_to_do(self, exc):
        assert explain(exc, MANAGED, PLACE) is None

    def test_all_that_a_program_can_read_of_an_error_stays(self):
        exc = refusal(403, 'AuthorizationFailure', core.ClientAuthenticationError)
        exc.error_code = azure.storage.blob.StorageErrorCode.AUTHORIZATION_FAILURE
        exc.additional_info = {'authenticationerrordetail': 'x'}
        told = self.told(exc)
        changed = {'message'}
        assert {**vars(told), 'message': ''} == {**vars(exc), 'message': ''}
        assert {name for name in vars(exc) if getattr(told, name) != getattr(exc, name)} == changed
        assert told.message == told.args[0]

    def test_the_original_stays_as_it_was(self):
        exc = refusal(403, 'AuthorizationFailure')
        explain(exc, MANAGED, PLACE)
        assert (exc.args, exc.message) == (('Said by the service.',), 'Said by the service.')

    @pytest.mark.parametrize('exc', [
        azure.storage.blob.PartialBatchErrorException('Said by the SDK', answer(403, 'AuthorizationFailure'), []),
        core.ODataV4Error(answer(403, 'AuthorizationFailure'), message='Said by the SDK'),
        core.TooManyRedirectsError([], response=answer(302))])
    def test_exceptions_that_cannot_be_made_of_their_arguments_are_told_too(self, exc):
        assert PLACE in str(explain(exc, MANAGED, PLACE))

    def token_error(self, cause):
        try:
            raise TokenError(str(cause)) from cause
        except TokenError as exc:
            return exc

    def test_a_failed_token_says_which_credential_was_asked_and_what_for(self):
        cause = azure.identity.CredentialUnavailableError(message='No managed identity endpoint found.')
        told = explain(self.token_error(cause), MANAGED, PLACE)
        assert type(told) is azure.identity.CredentialUnavailableError
        for words in ('ManagedIdentityCredential (client_id=1234) could not get a token', PLACE,
                      'Check its options and its environment variables', 'No managed identity endpoint found.'):
            assert words in str(told)
        assert not is_temporary(told)

    def test_a_failed_token_of_a_credential_of_the_users_own_is_a_failed_authentication(self):
        told = explain(self.token_error(KeyError('SECRET_FILE')), MANAGED, PLACE)
        assert type(told) is core.ClientAuthenticationError
        assert 'SECRET_FILE' in str(told)
        assert not is_temporary(told)

    def test_a_sign_in_service_that_is_busy_may_be_asked_again(self):
        told = explain(self.token_error(refusal(503, kind=core.ClientAuthenticationError)), MANAGED, PLACE)
        assert is_temporary(told)
        assert told.status_code == 503


SIGNATURES = ['abc%2Bdef%2Fghi%3D', 'abc%2bdef%2fghi%3d', 'abc+def/ghi=']


class test_hide:

    def chained(self, signature):
        """Return an error with a signature in each of its links, as urllib3, requests and the SDK chain them."""
        url = f'/celery/celery-task-meta-1?sv=2024-11-04&sig={signature}&se=2030-01-01'
        refused = MaxRetryError(None, url, OSError(111, 'Connection refused'))
        exc = wrapped(core.ServiceRequestError, requests.ConnectionError(refused))
        try:
            try:
                raise KeyError(f'while https://account{url} was asked')
            except KeyError:
                raise exc from refused
        except core.ServiceRequestError as raised:
            return raised

    @pytest.mark.parametrize('signature', SIGNATURES)
    def test_no_text_of_the_chain_shows_a_signature(self, signature):
        exc = self.chained(signature)
        assert signature in ''.join(traceback.format_exception(exc))
        hide(exc)
        texts = [text for link in links_of(exc) for text in (str(link), repr(link), repr(vars(link)))]
        assert len(texts) >= 4 * 3
        assert signature not in ''.join(texts)
        assert signature not in ''.join(traceback.format_exception(exc))

    def test_the_rest_can_still_be_read(self):
        exc = self.chained('secret')
        hide(exc)
        text = ''.join(traceback.format_exception(exc))
        assert '/celery/celery-task-meta-1?sv=2024-11-04&sig=**&se=2030-01-01' in text
        assert 'Connection refused' in text

    def test_what_is_told_shows_no_signature_either(self):
        exc = self.chained('secret')
        hide(exc)
        assert 'secret' not in str(explain(exc, MANAGED, PLACE))

    def test_a_chain_that_is_a_ring_ends(self):
        first, second = ValueError('sig=secret'), ValueError('sig=secret')
        first.__cause__, second.__cause__ = second, first
        hide(first)
        assert [str(first), str(second)] == ['sig=**', 'sig=**']

    def test_an_exception_of_the_users_own_may_have_attributes_that_cannot_be_set(self):
        class Locked(Exception):
            message = property(lambda self: self.args[0])

        exc = Locked('/c?sig=secret')
        hide(exc)
        assert exc.message == '/c?sig=**'

    @pytest.mark.parametrize(('text', 'masked'), [
        ('https://a/c?sig=x%3D', 'https://a/c?sig=**'),
        ('SIG=x&se=1', 'SIG=**&se=1'),
        ('(Caused by "/c?sig=x")', '(Caused by "/c?sig=**")'),
        ("url: /c?sig=x' (Caused", "url: /c?sig=**' (Caused"),
        ('/c?sig=x&a=1 /c?sig=y', '/c?sig=**&a=1 /c?sig=**'),
        ('?design=1&assign=2', '?design=1&assign=2'),
        ('', ''),
    ])
    def test_only_the_signature_goes(self, text, masked):
        assert mask_signatures(text) == masked

    @pytest.mark.parametrize('value', [None, 1, b'sig=x', ('sig=x',)])
    def test_what_is_no_text_stays(self, value):
        assert mask_signatures(value) is value


class test_a_task_that_failed_by_itself:
    """Celery stores a failure while it handles the task's exception, which is then the context of all others."""

    def outage_while(self, handled):
        try:
            raise handled
        except type(handled):
            try:
                raise core.ServiceRequestError('no connection')
            except core.ServiceRequestError as exc:
                return exc

    def test_because_of_a_certificate_has_its_result_stored_later(self):
        assert is_temporary(self.outage_while(ssl.SSLCertVerificationError('CERTIFICATE_VERIFY_FAILED')))

    def test_because_of_a_certificate_is_not_told_of_another(self):
        outage = self.outage_while(ssl.SSLCertVerificationError('CERTIFICATE_VERIFY_FAILED'))
        assert 'certificate' not in str(explain(outage, MANAGED, PLACE))

    def test_keeps_its_own_words(self):
        handled = ValueError('sig=42 is the answer')
        hide(self.outage_while(handled), handled)
        assert handled.args == ('sig=42 is the answer',)
