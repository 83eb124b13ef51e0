"""Which errors of the Azure SDK are temporary, and what to tell the user about the others."""
from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from azure.core import exceptions as core
from azure.storage.blob import PartialBatchErrorException

from .credentials import TokenError
from .url import MASK

__all__ = (
    'CONTAINER_BEING_DELETED', 'ROLE_NEEDED', 'Identity', 'error_code', 'explain', 'hide', 'is_temporary',
    'mask_signatures')

#: Answers that a later attempt may improve (REST: Status and error codes).
TEMPORARY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

#: A conflict that a later attempt may improve; it lasts 30 seconds or more (REST: Delete Container).
CONTAINER_BEING_DELETED = 'ContainerBeingDeleted'

#: May an operation that raised this succeed if it is tried again? None leaves it to the answer.
#: Every exception that the SDK publishes is named, so that a test finds one that nobody has judged.
#: A class that is not here counts as its nearest base.
TEMPORARY: Mapping[type[BaseException], bool | None] = {
    # There was no connection, it was cut, or it took too long.
    core.ServiceRequestError: True,
    core.ServiceRequestTimeoutError: True,
    core.ServiceResponseError: True,
    core.ServiceResponseTimeoutError: True,
    core.IncompleteReadError: True,
    # There was an answer.
    core.HttpResponseError: None,
    core.ClientAuthenticationError: None,
    core.ODataV4Error: None,
    core.ResourceExistsError: None,
    core.ResourceModifiedError: None,
    core.ResourceNotFoundError: None,
    core.ResourceNotModifiedError: None,
    PartialBatchErrorException: None,
    # The same request would meet the same end.
    core.AzureError: False,
    core.DecodeError: False,
    core.DeserializationError: False,
    core.ResponseNotReadError: False,
    core.SerializationError: False,
    core.StreamClosedError: False,
    core.StreamConsumedError: False,
    core.TooManyRedirectsError: False,
}

#: What an identity without a secret needs (Azure: Assign an Azure role for access to blob data).
ROLE_NEEDED = ('It needs the role "Storage Blob Data Contributor" on this container, if that is there already, '
               'or on the account')

_SIGNATURE = re.compile(r'(\bsig=)[^&\s"\'<>)]+', re.IGNORECASE)


class Identity(NamedTuple):
    """Who asks, in the words of an error text.

    Attributes:
        name: Names it, without its secret.
        need: What it needs so that it may store results.
    """

    name: str
    need: str


def is_temporary(exc: BaseException) -> bool:
    """Tell whether the operation that raised `exc` may succeed if it is tried again."""
    if _is_certificate_error(exc):
        return False
    judgement = next((TEMPORARY[cls] for cls in type(exc).__mro__ if cls in TEMPORARY), False)
    if judgement is not None:
        return judgement
    status = getattr(exc, 'status_code', None)
    if status is None:  # either the connection was cut within the answer, or there is no token
        return getattr(exc, 'inner_exception', None) is not None
    return status in TEMPORARY_STATUSES or error_code(exc) == CONTAINER_BEING_DELETED


def error_code(exc: BaseException) -> str:
    """Return the Azure error code of an answer, or ''."""
    code = getattr(exc, 'error_code', None)
    if not code and getattr(exc, 'response', None) is not None:
        code = exc.response.headers.get('x-ms-error-code')  # type: ignore[attr-defined]
    return str(getattr(code, 'value', code) or '')


def explain(exc: BaseException, identity: Identity, place: str) -> BaseException | None:
    """Return an exception that says what to do, or None if there is nothing to add.

    It is of the same class; for a :exc:`.TokenError`, of the class that the credential raised.

    Arguments:
        exc: What the SDK raised.
        identity: Who asked.
        place: The URL of the container.
    """
    if isinstance(exc, TokenError):
        cause = exc.__cause__ or exc
        return _retell(
            cause if isinstance(cause, core.AzureError) else core.ClientAuthenticationError(str(cause)),
            f'{identity.name} could not get a token for {place}. Check its options and its environment variables, '
            'and that its identity endpoint or authority host can be reached from here')
    advice = _advice(exc, identity, place)
    return _retell(exc, advice) if advice else None


def _advice(exc: BaseException, identity: Identity, place: str) -> str:
    status, code = getattr(exc, 'status_code', None), error_code(exc)
    if _is_certificate_error(exc):
        return (f'The TLS certificate of {place} was rejected. It must be valid for this host and issued by a CA '
                'that is trusted here; REQUESTS_CA_BUNDLE can name a file with further CA certificates')
    if isinstance(exc, core.ServiceRequestError):
        return f'Cannot connect to {place}. Check the account URL, the network and its proxy settings'
    if isinstance(exc, core.ServiceResponseError):
        return f'The connection to {place} gave no answer. Check the account URL, its https:// and its port'
    if status in TEMPORARY_STATUSES or is_temporary(exc):
        return ''
    if isinstance(exc, core.DecodeError) or (status is not None and not code) or code == 'ResourceNotFound':
        return f'What answers at {place} is not the blob service of this account. Check the account URL'
    if status == 401:
        return f'{place} rejected {identity.name}. Check its tenant and the account URL'
    if code == 'InvalidAuthenticationInfo' or (status == 403 and code == 'AuthenticationFailed'):
        return f'{place} rejected {identity.name}. Check its secret, and this machine\'s clock'
    if status == 403:
        return (f'{identity.name} is not authorized for this operation in {place}. {identity.need}. '
                'The account\'s network rules may also keep this machine out')
    return ''


def _is_certificate_error(exc: BaseException) -> bool:
    return isinstance(exc, core.AzureError) and any(
        isinstance(link, ssl.SSLCertVerificationError) for link in _links(exc, _causes))


def _retell(exc: BaseException, advice: str) -> BaseException:
    told = type(exc).__new__(type(exc))  # copy() would call __init__, with arguments that not every class takes
    told.__dict__.update(exc.__dict__)
    message = f'{advice}: {exc.args[0] if exc.args else exc}'
    told.args = (message, *exc.args[1:])
    if hasattr(told, 'message'):
        told.message = message
    return told


def hide(exc: BaseException, handled: BaseException | None = None) -> None:
    """Mask signatures in the texts of an exception and of all that it is chained to, in place.

    A shared access signature is part of a request's URL, which urllib3 repeats in what it says of the request.

    Arguments:
        exc: What the SDK raised.
        handled: What was being handled before the request. It is somebody else's, and stays as it is.
    """
    for link in _links(exc, lambda link: [*_causes(link), link.__context__], handled):
        link.args = tuple(mask_signatures(arg) for arg in link.args)
        vars(link).update({name: mask_signatures(value) for name, value in vars(link).items()})


def mask_signatures(value: object) -> object:
    """Return `value`; if it is text, without the signatures of the URLs in it."""
    return _SIGNATURE.sub(rf'\1{MASK}', value) if isinstance(value, str) else value


def _causes(exc: BaseException) -> list[object]:
    """Return what an exception was raised for, and what it wraps; not what happened to be handled at the time.

    That is what an AzureError keeps as `exc_value`.
    """
    return [exc.__cause__, *exc.args, *(value for name, value in vars(exc).items() if name != 'exc_value')]


def _links(
    exc: BaseException, following: Callable[[BaseException], list[object]], excluded: BaseException | None = None,
) -> Iterator[BaseException]:
    """Yield an exception and all exceptions that `following` leads to, but not beyond `excluded`."""
    seen = {id(excluded)}
    pending: list[object] = [exc]
    while pending:
        link = pending.pop()
        if isinstance(link, BaseException) and id(link) not in seen:
            seen.add(id(link))
            yield link
            pending += following(link)
