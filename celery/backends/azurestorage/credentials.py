"""The credentials that a backend URL may name: those of azure-identity that run unattended.

azure-identity ignores keyword arguments that it does not know, so the table here decides what is accepted.
"""
from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded
from celery.utils.imports import symbol_by_name

from .options import Option, boolean, matching, text, whole_number
from .url import BackendURL, refuse

__all__ = (
    'CREDENTIALS', 'CREDENTIAL_OPTIONS', 'SharedCredential', 'TokenError', 'build_credential', 'check_identity',
    'resolve')

#: A token is renewed this many seconds before it expires, unless the service says when (as azure-core does).
RENEW_BEFORE_EXPIRY = 300

#: A token whose renewal fails is used on while it is valid; the next attempt comes this many seconds later.
RENEWAL_PAUSE = 30

_identity_id = matching('[A-Za-z0-9._-]+', 'must be an id: letters, digits and hyphens')
_tenant_id = matching('[A-Za-z0-9.-]+', 'must be an id or a domain: letters, digits, hyphens and dots')
_resource_id = matching(r'[\w/.() -]+', 'must be the resource id of an identity: /subscriptions/…')
_subscription = matching('[A-Za-z0-9_. -]+', 'must be the name or the id of a subscription')
_authority = matching(
    r'(?:(?i:https://)[A-Za-z0-9.-]+|(?i:localhost)|[A-Za-z0-9-]+(?=[.:])[A-Za-z0-9.-]*'
    r'|(?i:https://)?\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._-]*)*',
    'must be a host or an https:// URL, such as login.microsoftonline.us')

_CLIENT_ID = Option(_identity_id, 'Client id of the identity.')
_TENANT_ID = Option(_tenant_id, 'Id of the tenant that the identity belongs to.')
_AUTHORITY = Option(_authority, 'Host of the sign-in service, for sovereign and private clouds, '
                    'for instance ``login.microsoftonline.us``.')
_NO_DISCOVERY = Option(boolean, 'True keeps azure-identity from asking the public cloud about `authority`: '
                       'for private clouds and local endpoints.', 'bool')
_PROCESS_TIMEOUT = Option(whole_number(1), 'How long a command may take.', 'int', unit='seconds')


def _exclude(member: str) -> Option:
    return Option(boolean, f'True leaves {member} out of the chain.', 'bool')


@dataclass(frozen=True)
class CredentialType:
    """A credential that a URL may name.

    Attributes:
        help: Where it takes its token from, for the documentation.
        options: What it takes in the URL.
        required: Options that it cannot do without.
        environment: Environment variables that stand in for options.
        one_of: Options of which it takes at most one.
    """

    help: str
    options: Mapping[str, Option]
    required: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    one_of: tuple[tuple[str, ...], ...] = ()


#: By name of the class in :mod:`azure.identity`, as they are from its version 1.24 on.
CREDENTIALS: Mapping[str, CredentialType] = {
    'DefaultAzureCredential': CredentialType(
        'The first of environment, workload identity, managed identity and developer tools that gives a token.',
        {
            'client_id': Option(_identity_id, 'Client id of the managed and of the workload identity.'),
            'managed_identity_client_id': Option(_identity_id, 'Client id of the managed identity.'),
            'workload_identity_client_id': Option(_identity_id, 'Client id of the workload identity.'),
            'workload_identity_tenant_id': Option(_tenant_id, 'Id of the tenant of the workload identity.'),
            'authority': Option(_authority, f'{_AUTHORITY.help} The workload identity in the chain takes it from '
                                '``AZURE_AUTHORITY_HOST`` only.'),
            'disable_instance_discovery': _NO_DISCOVERY,
            'process_timeout': _PROCESS_TIMEOUT,
            'exclude_environment_credential': _exclude('EnvironmentCredential'),
            'exclude_workload_identity_credential': _exclude('WorkloadIdentityCredential'),
            'exclude_managed_identity_credential': _exclude('ManagedIdentityCredential'),
            'exclude_shared_token_cache_credential': _exclude('SharedTokenCacheCredential'),
            'exclude_visual_studio_code_credential': _exclude('VisualStudioCodeCredential'),
            'exclude_cli_credential': _exclude('AzureCliCredential'),
            'exclude_powershell_credential': _exclude('AzurePowerShellCredential'),
            'exclude_developer_cli_credential': _exclude('AzureDeveloperCliCredential'),
            'exclude_interactive_browser_credential': _exclude('InteractiveBrowserCredential'),
            'exclude_broker_credential': _exclude('BrokerCredential'),
        },
        one_of=(('client_id', 'managed_identity_client_id'), ('client_id', 'workload_identity_client_id')),
    ),
    'ManagedIdentityCredential': CredentialType(
        'The managed identity of the Azure host; without an option, the system-assigned one.',
        {
            'client_id': Option(_identity_id, 'Client id of a user-assigned identity.'),
            'object_id': Option(_identity_id, 'Object (principal) id of a user-assigned identity.'),
            'resource_id': Option(_resource_id, 'Resource id of a user-assigned identity, ``/subscriptions/…``.'),
        },
        one_of=(('client_id', 'object_id', 'resource_id'),),
    ),
    'WorkloadIdentityCredential': CredentialType(
        'Workload identity of Kubernetes: a service account\'s token is exchanged for one of Azure.',
        {
            'tenant_id': _TENANT_ID,
            'client_id': _CLIENT_ID,
            'token_file_path': Option(text, 'File that holds the service account\'s token.'),
            'authority': _AUTHORITY,
            'disable_instance_discovery': _NO_DISCOVERY,
        },
        environment={
            'tenant_id': 'AZURE_TENANT_ID',
            'client_id': 'AZURE_CLIENT_ID',
            'token_file_path': 'AZURE_FEDERATED_TOKEN_FILE',
        },
    ),
    'EnvironmentCredential': CredentialType(
        'A service principal that the environment variables ``AZURE_TENANT_ID``, ``AZURE_CLIENT_ID`` and '
        '``AZURE_CLIENT_SECRET`` or ``AZURE_CLIENT_CERTIFICATE_PATH`` describe.',
        {'authority': _AUTHORITY, 'disable_instance_discovery': _NO_DISCOVERY},
    ),
    'CertificateCredential': CredentialType(
        'A service principal with a certificate.',
        {
            'tenant_id': _TENANT_ID,
            'client_id': _CLIENT_ID,
            'certificate_path': Option(text, 'File with the certificate and its private key, PEM or PKCS12.'),
            'send_certificate_chain': Option(boolean, 'True sends the whole chain, as authentication by subject '
                                             'name and issuer needs.', 'bool'),
            'authority': _AUTHORITY,
            'disable_instance_discovery': _NO_DISCOVERY,
        },
        required=('tenant_id', 'client_id', 'certificate_path'),
    ),
    'AzureCliCredential': CredentialType(
        'Whoever is signed in with ``az login``.',
        {
            'tenant_id': _TENANT_ID,
            'subscription': Option(_subscription, 'Name or id of a subscription.'),
            'process_timeout': _PROCESS_TIMEOUT,
        },
    ),
}

#: What :func:`~celery.backends.azurestorage.url.parse_url` needs to know of the table.
CREDENTIAL_OPTIONS = {name: row.options for name, row in CREDENTIALS.items()}


def check_identity(url: BackendURL, configured: Any) -> None:
    """Check that a backend has exactly one identity.

    Arguments:
        url: The backend's URL.
        configured: The setting ``azureblockblob_credential``.

    Raises:
        celery.exceptions.ImproperlyConfigured: if it has none, more than one, or half of one.
    """
    if url.credential:
        _check_options(url.credential, url.options)
    in_url = url.credential or url.account_key or url.sas
    if in_url and configured is not None:
        refuse('two identities at once: the URL holds one, and azureblockblob_credential is set.')
    if not in_url and configured is None:
        refuse('the URL holds no identity. Name a credential before the account '
               f'({", ".join(f"{name}@" for name in CREDENTIALS)}), or set azureblockblob_credential.')
    if configured is not None and not url.account_url.startswith('https:'):
        refuse('azureblockblob_credential sends tokens, which Azure takes over https only.')


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    row = CREDENTIALS[name]
    for rivals in row.one_of:
        given = [option for option in rivals if option in options]
        if len(given) > 1:
            refuse(f'two identities at once: {name} takes only one of {", ".join(rivals)}.')
    members = [option for option in row.options if option.startswith('exclude_')]
    if members and all(options.get(member) for member in members):
        refuse(f'{name} has nothing left: all its members are excluded.')
    missing = [option for option in row.required if option not in options]
    if missing:
        refuse(f'{name} needs in the URL: {", ".join(missing)}.')


def build_credential(
    url: BackendURL, configured: Any, logger: Any, read_timeout: float | None = None,
) -> SharedCredential:
    """Build the credential that `url` names, or that `configured` is or leads to.

    Arguments:
        url: The backend's URL.
        configured: The setting ``azureblockblob_credential``.
        logger: Where azure-identity logs its requests.
        read_timeout: How long a sign-in service may take for the next part of its answer, in seconds.

    Raises:
        celery.exceptions.ImproperlyConfigured: if azure-identity is missing or refuses the options.
    """
    if not url.credential:
        return SharedCredential(_load(configured))
    _check_environment(url.credential, url.options)
    cls = getattr(import_module('azure.identity'), url.credential)
    try:
        keywords = _keywords(url.credential, url.options) | _pipeline_keywords(cls, logger, read_timeout)
        return SharedCredential(cls(**keywords))
    except Exception as exc:  # a file that is missing, a certificate that cannot be read, and so on
        raise ImproperlyConfigured(f'{url.credential}: {exc}') from exc


def _keywords(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as keyword arguments of azure-identity."""
    keywords = dict(options)
    if name == 'DefaultAzureCredential' and 'client_id' in keywords:
        client_id = keywords.pop('client_id')
        keywords.update(managed_identity_client_id=client_id, workload_identity_client_id=client_id)
    if name == 'ManagedIdentityCredential':
        config = {key: keywords.pop(key) for key in ('object_id', 'resource_id') if key in keywords}
        if config:
            keywords['identity_config'] = config
    return keywords


def _pipeline_keywords(cls: Callable[..., Any], logger: Any, read_timeout: float | None) -> dict[str, Any]:
    """Return keyword arguments for what sends requests. AzureCliCredential sends none, and takes no others."""
    kinds = {parameter.kind for parameter in inspect.signature(cls).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return {}
    return {'logger': logger} if read_timeout is None else {'logger': logger, 'read_timeout': read_timeout}


def _check_environment(name: str, options: Mapping[str, Any]) -> None:
    missing = [f'{option} (in the URL, or {variable})' for option, variable in CREDENTIALS[name].environment.items()
               if option not in options and not os.environ.get(variable)]
    if missing:
        raise ImproperlyConfigured(f'{name} needs {", ".join(missing)}.')


def resolve(configured: Any) -> Any:
    """Return what the setting ``azureblockblob_credential`` names by a dotted path, or is.

    Raises:
        celery.exceptions.ImproperlyConfigured: if nothing of use is there.
    """
    if configured is None:
        return None
    found, name = configured, type(configured).__name__
    if isinstance(configured, str):
        found, name = _import(configured), configured
    _refuse_asynchronous(found, name)
    if _is_credential(found):
        return found
    if not callable(found):
        raise ImproperlyConfigured(f'azureblockblob_credential: {name} is no TokenCredential and no callable.')
    if not _takes_nothing(found):
        raise ImproperlyConfigured(f'azureblockblob_credential: {name} cannot be called without arguments.')
    return found


def _import(path: str) -> Any:
    try:
        return symbol_by_name(path)
    except Exception as exc:  # whatever a module of the user's own raises
        raise ImproperlyConfigured(f'azureblockblob_credential: cannot import {path}: {exc}') from exc


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        pass
    return True


def _is_credential(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, 'get_token', None))


def _load(configured: Any) -> Any:
    found = resolve(configured)
    credential = found if _is_credential(found) else _call(found)
    if not _is_credential(credential):
        raise ImproperlyConfigured(
            f'azureblockblob_credential: {type(credential).__name__} is no TokenCredential: it has no get_token.')
    _refuse_asynchronous(credential, type(credential).__name__)
    return credential


def _refuse_asynchronous(value: Any, name: str) -> None:
    """Refuse a credential, or the class of one, that only a coroutine can ask."""
    if inspect.iscoroutinefunction(getattr(value, 'get_token', None)):
        raise ImproperlyConfigured(f'azureblockblob_credential: {name} is asynchronous. '
                                   'The class of this name in azure.identity is not.')


def _call(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as exc:  # whatever a function of the user's own raises
        # What it says may hold a secret; it is shown where Python shows the cause.
        raise ImproperlyConfigured(f'azureblockblob_credential: {function!r} raised {type(exc).__name__}') from exc


class TokenError(Exception):
    """A credential gave no token. Its cause is what the credential raised.

    Not an :exc:`~azure.core.exceptions.AzureError`: the SDK would repeat the request, though azure-identity has
    repeated its own already.
    """


class _Kept(NamedTuple):
    """A token, and when to ask for the next one (seconds since the epoch)."""

    token: Any
    renew_on: float


class SharedCredential:
    """A token credential that asks once for all threads of a process.

    The SDK's pipeline asks a credential for a token in each thread that finds none, and the identity endpoint of a
    virtual machine takes 20 requests a second. Here one thread asks and the others wait for what it gets, be it a
    token or an error.

    Arguments:
        credential: A ``TokenCredential``.

    Raises:
        TokenError: from `get_token_info`, in place of whatever the credential raises.
    """

    def __init__(self, credential: Any) -> None:
        self.credential = credential
        self._lock = threading.Lock()
        self._tokens: dict[Any, _Kept] = {}
        self._failures = 0
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        return f'<{type(self).__name__}: {type(self.credential).__name__}>'

    def get_token_info(self, *scopes: str, options: Mapping[str, Any] | None = None) -> Any:
        """Return an :class:`~azure.core.credentials.AccessTokenInfo` for `scopes`."""
        options = dict(options or {})
        key = scopes, options.get('tenant_id')
        if options.get('claims'):  # the service rejected the token that is kept
            self._tokens[key] = _keep(self._ask(scopes, options))
            return self._tokens[key].token
        failures, kept = self._failures, self._tokens.get(key)
        if not kept or kept.token.expires_on <= time.time():
            self._lock.acquire()
        elif not self._lock.acquire(blocking=False):
            return kept.token  # another thread renews it
        try:
            kept = self._tokens.get(key)
            if kept and time.time() < kept.renew_on:
                return kept.token
            # Someone failed while this thread waited: its answer would be the same.
            if failures != self._failures:
                raise TokenError(str(self._failure)) from self._failure
            self._tokens[key] = self._renew(kept, scopes, options)
            return self._tokens[key].token
        finally:
            self._lock.release()

    def get_token(self, *scopes: str, **options: Any) -> Any:
        """Return an :class:`~azure.core.credentials.AccessToken` for `scopes`."""
        token = self.get_token_info(*scopes, options=options)
        return import_module('azure.core.credentials').AccessToken(token.token, token.expires_on)

    def close(self) -> None:
        """Close the credential's connections."""
        close: Callable[[], None] = getattr(self.credential, 'close', lambda: None)
        close()

    def _renew(self, kept: _Kept | None, scopes: Iterable[str], options: Mapping[str, Any]) -> _Kept:
        try:
            return _keep(self._ask(scopes, options))
        except TokenError as exc:
            if kept and kept.token.expires_on > time.time():
                return _Kept(kept.token, min(time.time() + RENEWAL_PAUSE, kept.token.expires_on))
            self._failures += 1
            self._failure = exc.__cause__
            raise

    def _ask(self, scopes: Iterable[str], options: Mapping[str, Any]) -> Any:
        try:
            if hasattr(self.credential, 'get_token_info'):
                token = self.credential.get_token_info(*scopes, options=options)
            else:
                token = self.credential.get_token(*scopes, **options)
            return import_module('azure.core.credentials').AccessTokenInfo(
                token.token, token.expires_on, token_type=getattr(token, 'token_type', 'Bearer'),
                refresh_on=getattr(token, 'refresh_on', None))
        except SoftTimeLimitExceeded:  # of the task, not of the credential
            raise
        except Exception as exc:  # a credential of the user's own may raise anything, or return no token
            raise TokenError(str(exc)) from exc


def _keep(token: Any) -> _Kept:
    renew_on = getattr(token, 'refresh_on', None) or token.expires_on - RENEW_BEFORE_EXPIRY
    return _Kept(token, max(renew_on, min(time.time() + RENEWAL_PAUSE, token.expires_on)))
