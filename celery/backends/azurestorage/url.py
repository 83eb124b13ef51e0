"""Backend URLs: text in, frozen value out.

Parsing does no I/O and imports nothing of Azure, so that every mistake is found where the backend is built::

    azureblockblob://CONNECTION_STRING
    azureblockblob://CREDENTIAL@ACCOUNT_URL[?OPTIONS]
    azureblockblob://ACCOUNT_NAME:ACCOUNT_KEY@ACCOUNT_URL[?OPTIONS]
    azureblockblob://ACCOUNT_URL[?OPTIONS]
    azureblockblob+https://…

An error repeats only text that cannot be a secret: what resembles a name that is known here.
"""
from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import unquote

from celery.exceptions import ImproperlyConfigured

from .options import CONTAINER_NAME, SETTINGS, Option, check, nearest

__all__ = ('BackendURL', 'parse_url', 'redact', 'refuse')

SCHEME = 'azureblockblob'
SCHEMES = frozenset({SCHEME, 'https', 'http'})  # Celery hands over what follows the + of azureblockblob+https://…
MASK = '**'
WHERE = 'Azure Blob Storage result backend'

ACCEPTED_FORMS = """Accepted are:
  azureblockblob://DefaultAzureCredential@https://ACCOUNT.blob.core.windows.net
  azureblockblob://ManagedIdentityCredential@https://ACCOUNT.blob.core.windows.net?client_id=CLIENT_ID
  azureblockblob://ACCOUNT_NAME:ACCOUNT_KEY@https://ACCOUNT.blob.core.windows.net
  azureblockblob://DefaultEndpointsProtocol=https;AccountName=ACCOUNT;AccountKey=KEY
  azureblockblob://BlobEndpoint=https://ACCOUNT.blob.core.windows.net;SharedAccessSignature=SAS
  azureblockblob://https://ACCOUNT.blob.core.windows.net (with the setting azureblockblob_credential)"""

#: Keys of a storage connection string (Azure: Configure connection strings); Azure ignores their case.
CONNECTION_STRING_KEYS = {key.lower(): key for key in (
    'AccountKey', 'AccountName', 'BlobEndpoint', 'BlobSecondaryEndpoint', 'DefaultEndpointsProtocol',
    'DevelopmentStorageProxyUri', 'EndpointSuffix', 'FileEndpoint', 'FileSecondaryEndpoint', 'QueueEndpoint',
    'QueueSecondaryEndpoint', 'SharedAccessSignature', 'TableEndpoint', 'TableSecondaryEndpoint',
    'UseDevelopmentStorage',
)}

#: Those of them whose values are secret.
SECRET_KEYS = frozenset({'AccountKey', 'SharedAccessSignature'})

#: Query parameters of a shared access signature (REST: account, service and user delegation SAS).
SAS_PARAMETERS = frozenset({
    'se', 'si', 'sig', 'sip', 'sp', 'spr', 'sr', 'srt', 'ss', 'st', 'sv',
    'ske', 'skoid', 'sks', 'skt', 'sktid', 'skv',
})

#: What people write as an option or in another wrong place, and where it goes.
MISPLACED = {
    'accountkey': 'an account key goes between the name of its account and an @: '
                  'ACCOUNT_NAME:ACCOUNT_KEY@ACCOUNT_URL.',
    'clientsecret': 'a client secret goes into AZURE_CLIENT_SECRET, where EnvironmentCredential reads it.',
    'sas': 'a shared access signature goes into a connection string: '
           'BlobEndpoint=https://ACCOUNT.blob.core.windows.net;SharedAccessSignature=SAS.',
}
MISPLACED |= {'key': MISPLACED['accountkey'], 'sastoken': MISPLACED['sas']}

ACCOUNT_NAME = re.compile(r'[a-z0-9]{3,24}\Z')  # REST: storage account names
HOST_NAME = re.compile(r'(?=.{1,253}\Z)(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\Z')

#: The account of Azurite and of the Azure storage emulator. Its key is published: it protects nothing.
DEVELOPMENT_ACCOUNT = 'devstoreaccount1'
DEVELOPMENT_KEY = 'Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=='

_ACCOUNT_URL = re.compile(
    r'(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?P<host>\[[^]/]*\]|[^/:]*)(?::(?P<port>[^/]*))?(?P<path>/.*)?\Z',
    re.IGNORECASE)
_CREDENTIAL_NAME = re.compile(r'[a-z]{1,40}credential\Z', re.IGNORECASE)

# Masking shows what these match and nothing else, so that what was written in a wrong place stays hidden as well.
_SHOWN_PLACE = re.compile(
    r'(?:[Hh][Tt][Tt][Pp][Ss]?://)?'
    r'(?:[a-z0-9_-]{1,63}|(?:[A-Za-z0-9_-]{1,63}\.)+[A-Za-z0-9_-]{1,63}|\[[0-9A-Fa-f:.]+\])'
    r'(?::[0-9]{1,5})?(?:/[a-z0-9-]{1,63})?/?\Z')
_SHOWN_OPTION = re.compile(
    r'(?:[a-z]+_)*'
    r'(?:attempts|authority|base|chain|chords|concurrency|credential|discovery|id|name|path|sec|subscription|timeout)='
    r'(?:(?!%40|%3[Bb])[^@;])*\Z')
# Of an endpoint's query; the value of sig is masked by _BARE_SECRET.
_SHOWN_PARAMETER = re.compile(
    r'(?:sig=|(?:comp|restype|s[eiprstv]|spr|srt)=[a-z0-9:.-]{0,30}\Z)', re.IGNORECASE)
_BARE_KEY = r'(?<![a-z0-9+/])(?:[a-z0-9+/]|%2[bf]){40,}(?:=|%3d){1,2}'
_BARE_SECRET = re.compile(rf'((?:(?<![a-z])|(?<=%3f))sig(?:=|%3d))[^&;]*|{_BARE_KEY}', re.IGNORECASE)


@dataclass(frozen=True)
class BackendURL:
    """What a backend URL says. Its representation shows no secret.

    Attributes:
        text: The URL as it was given.
        account_url: Where the account is, as ``http(s)://…`` without a trailing slash.
        account_name: Name of the account, if the URL holds one.
        account_key: The account's key, in base64.
        sas: A shared access signature, exactly as it was written.
        credential: A credential's name, in its own spelling.
        options: Options of that credential, checked.
        settings: Settings of the backend that the URL gives, checked, without their prefix.
    """

    text: str
    account_url: str
    account_name: str | None = None
    account_key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)
    credential: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f'<{type(self).__name__}: {redact(self.text)}>'


def parse_url(url: Any, credentials: Mapping[str, Mapping[str, Option]]) -> BackendURL:
    """Read a backend URL.

    Arguments:
        url: The URL, or what Celery hands over of ``azureblockblob+https://…``.
        credentials: Names of the credentials that a URL may hold, with the options that each takes.

    Raises:
        celery.exceptions.ImproperlyConfigured: if anything is wrong with it.
    """
    scheme, rest = _split_scheme(url)
    if _is_connection_string(rest):
        return _read_connection_string(url, rest)
    _refuse_lookalikes(rest)
    place, _, query = rest.partition('?')
    account, identity = _find_identity(place, credentials)
    account_url = _read_account_url(account, scheme, identity.get('account_name'))
    name = identity.get('credential')
    if name and not account_url.startswith('https:'):
        refuse(f'{name} sends a token, which Azure takes over https only. Write an https account URL.')
    options, settings = _read_options(query, name, credentials)
    return BackendURL(url, account_url, options=options, settings=settings, **identity)


def redact(url: str, mask: str = MASK) -> str:
    """Return a backend URL, right or wrong, with `mask` for what is or may be a secret.

    Account keys, shared access signatures, and whatever stands where neither a name nor an address is expected.
    """
    scheme, separator, rest = url.partition('://')
    if scheme.lower().removeprefix(f'{SCHEME}+') not in SCHEMES:
        scheme, separator, rest = '', '', url
    if _is_connection_string(rest):
        shown = ';'.join(_redact_field(field, mask) for field in rest.split(';'))
    else:
        shown = _redact_parts(rest, mask)
    return scheme + separator + _BARE_SECRET.sub(lambda match: f'{match[1] or ""}{mask}', shown)


def refuse(problem: str) -> NoReturn:
    """Raise an error that names a problem of the backend's URL and the accepted forms.

    Raises:
        celery.exceptions.ImproperlyConfigured: always.
    """
    raise ImproperlyConfigured(f'{WHERE}: {problem}\n{ACCEPTED_FORMS}')


def _redact_field(field: str, mask: str) -> str:
    key, _, value = field.partition('=')
    name = CONNECTION_STRING_KEYS.get(key.strip().lower())
    if not name:
        return mask if field.strip() else field
    if name in SECRET_KEYS:
        return f'{key}={mask}'
    place, question, query = value.partition('?')
    shown = place if _SHOWN_PLACE.match(place.strip()) else mask
    return f'{key}={shown}{question}{_redact_query(query, _SHOWN_PARAMETER, mask)}'


def _redact_parts(text: str, mask: str) -> str:
    place, question, query = text.partition('?')
    user_info, at, account = place.rpartition('@')
    name, colon, _ = user_info.partition(':')
    if colon:
        user_info = f'{name}:{mask}' if ACCOUNT_NAME.match(name) or _CREDENTIAL_NAME.match(name) else mask
    elif at and not _CREDENTIAL_NAME.match(user_info):
        user_info = mask
    if account and not _SHOWN_PLACE.match(account):
        account = mask
    return f'{user_info}{at}{account}{question}{_redact_query(query, _SHOWN_OPTION, mask)}'


def _redact_query(query: str, shown: re.Pattern[str], mask: str) -> str:
    return '&'.join(part if shown.match(part) else part and mask for part in query.split('&'))


def _split_scheme(url: Any) -> tuple[str, str]:
    """Return the scheme of account URLs without one, and what follows the scheme of `url`."""
    if url is not None and not isinstance(url, str):
        refuse('the URL must be text.')
    if not url:
        refuse('the URL is missing.')
    scheme, separator, rest = url.partition('://')
    scheme = scheme.lower().removeprefix(f'{SCHEME}+')
    if not separator or scheme not in SCHEMES:
        refuse(f'the URL must begin with {SCHEME}://.')
    if not rest:
        refuse(f'nothing follows {SCHEME}://.')
    if re.match(rf'{SCHEME}(?:\+https?)?://', rest, re.IGNORECASE):
        refuse(f'{SCHEME}:// stands there twice.')
    if not rest.isprintable() or (' ' in rest and not _is_connection_string(rest)):
        refuse('the URL holds white space or control characters.')
    if rest[0] in '"\'':
        refuse('the URL stands in quotation marks. Leave them out.')
    return ('http' if scheme == 'http' else 'https'), rest


def _is_connection_string(text: str) -> bool:
    key, equals, _ = text.partition('=')
    return bool(equals) and key.strip(' ;').lower() in CONNECTION_STRING_KEYS


def _refuse_lookalikes(text: str) -> None:
    """Refuse what is meant as a connection string, a shared access signature or a key, but is not written as one."""
    names = re.findall('(?:^|[?&;]|%26|%3f)([a-z]*)(?:=|%3d)', text.lower())
    if {'sig', 'sharedaccesssignature'}.intersection(names) or SAS_PARAMETERS.intersection(names[:1]):
        refuse(MISPLACED['sas'])
    if 'sharedaccesskey' in names:
        refuse('this is a connection string of Service Bus or Event Hubs. Take that of the storage account.')
    key, equals, _ = text.partition('=')
    hint = nearest(key, CONNECTION_STRING_KEYS.values()) if equals and not re.search('[?@:/.]', key) else ''
    if hint:
        refuse(f'{_name(key, "what stands before the =")} is not a key of a connection string{hint}')
    if ';' in text.partition('?')[0]:
        refuse('a ; stands in connection strings only, and the first key here is none that Azure Storage knows. '
               'Options follow a ? and are separated by &.')
    if re.search(_BARE_KEY, re.sub('^(?:[^@:/]*@)?[^@:/]*:[^@]*@', '', text), re.IGNORECASE):
        refuse(MISPLACED['accountkey'])


def _find_identity(place: str, credentials: Mapping[str, Mapping[str, Option]]) -> tuple[str, dict[str, Any]]:
    """Return the account URL in `place`, and what stands before it: a credential, or an account's name and key."""
    known = {name.lower(): name for name in credentials}
    user_info, at, account = place.rpartition('@')
    if not at:
        _refuse_lone_credential(place, known)
        return place, {}
    if user_info.lower() in known:
        return account, {'credential': known[user_info.lower()]}
    if user_info.lower().startswith(('http://', 'https://')) or account.lower() in known:
        refuse('a credential, or ACCOUNT_NAME:ACCOUNT_KEY, goes before the @, and the account URL after it.')
    first = known.get(user_info.partition('@')[0].lower())
    if first:
        refuse(f'two identities at once: {first} and what follows its @. An account URL holds no @.')
    name, colon, key = user_info.partition(':')
    if not colon or name.lower() in known or not ACCOUNT_NAME.match(name):
        _refuse_credential(name, colon, credentials)
    return account, {'account_name': name, 'account_key': _read_key(unquote(key))}


def _refuse_lone_credential(text: str, known: Mapping[str, str]) -> None:
    word = re.split('[^A-Za-z]', text)[0].lower()
    if word in known:
        refuse(f'{known[word]} needs an @ and an account URL after it.')
    if 'cred' in word and not text.startswith(word):  # all in lower case, it may be an account's name
        refuse(f'a credential needs an @ and an account URL after it{nearest(word, known.values())}')


def _refuse_credential(word: str, colon: str, credentials: Mapping[str, Mapping[str, Option]]) -> NoReturn:
    """Refuse what stands before an @, up to its first colon if it has one."""
    known = {name.lower(): name for name in credentials}
    name = known.get(word.lower())
    if name:
        option = 'client_id' if 'client_id' in credentials[name] else next(iter(credentials[name]))
        refuse(f'{name} takes no value after a colon. Its options follow a ?: ?{option}=…')
    hint = nearest(word, known.values())
    if colon and not hint and not _CREDENTIAL_NAME.match(word):
        refuse('the account name before the colon must have 3 to 24 lower-case letters and digits.')
    name = _name(word, '') if hint or _CREDENTIAL_NAME.match(word) else ''
    problem = f'{name} is no' if name else 'what stands before the @ is neither ACCOUNT_NAME:ACCOUNT_KEY nor a'
    refuse(f'{problem} credential that can be used here{hint or "."} '
           f'These can: {", ".join(credentials)}. For any other there is the setting azureblockblob_credential.')


def _name(word: str, otherwise: str) -> str:
    """Return a word that resembles a known name, or `otherwise` if it holds more than letters."""
    return word if word.replace('_', '').isalpha() else otherwise


def _read_key(key: str) -> str:
    if not key:
        refuse('the account key is missing.')
    try:
        if base64.b64decode(key, validate=True):
            return key
    except (binascii.Error, ValueError):
        pass
    refuse('the account key is not base64. Copy it whole, with the = at its end.')


def _read_account_url(text: str, default_scheme: str, account_name: str | None = None) -> str:
    """Return an account URL as ``http(s)://…`` without a slash at its end."""
    if not text:
        refuse('the account URL is missing.')
    match = _ACCOUNT_URL.match(text)
    if not match or '@' in text or '#' in text:
        refuse('the account URL is no URL, host or account name, or holds an @ or a #.')
    scheme, host, port, path = match['scheme'], match['host'].lower(), match['port'], match['path'] or ''
    if (scheme or 'https').lower() not in ('http', 'https') or host in ('http', 'https'):
        refuse('the account URL must begin with https:// or http://.')
    if port is not None and not (re.fullmatch('[0-9]{1,5}', port) and 0 < int(port) < 65536):
        refuse('the port of the account URL must be a number from 1 to 65535. '
               'An account key needs an @ after it: ACCOUNT_NAME:ACCOUNT_KEY@ACCOUNT_URL.')
    bare = not (scheme or port or '.' in host or host.startswith('[') or host == 'localhost')
    if bare:
        if not ACCOUNT_NAME.match(match['host']):
            refuse('an account name has 3 to 24 lower-case letters and digits. '
                   'Write that, or https://ACCOUNT.blob.core.windows.net.')
        host = f'{host}.blob.core.windows.net'
    _check_host(host)
    path = _check_path(host, port, path, account_name)
    return f'{(scheme or default_scheme).lower()}://{host}{":" + port if port else ""}{path}'


def _check_host(host: str) -> None:
    if _is_ip_address(host):
        return
    if not HOST_NAME.match(host) or re.fullmatch(r'[0-9.]+', host):
        refuse('the host of the account URL is no valid host name or address. Options follow a ?.')
    if re.search(r'\.(?:dfs|file|queue|table)\.core\.', host) or (
            host.endswith('core.windows.net') and '.blob.' not in host):
        refuse('results are stored in blobs: the host is ACCOUNT.blob.core.windows.net.')


def _is_ip_address(host: str) -> bool:
    try:
        version = ipaddress.ip_address(host.removeprefix('[').removesuffix(']')).version
    except ValueError:
        return False
    return host.startswith('[') == (version == 6)


def _check_path(host: str, port: str | None, path: str, account_name: str | None) -> str:
    """Return the path of an account URL: the account's name where the host does not hold it, else nothing."""
    segments = [segment for segment in path.split('/') if segment]
    local = _is_ip_address(host) or '.' not in host
    named = segments[:1] == [account_name] if account_name else port is not None
    path_style = local or ('.blob.' not in host and (named or segments[:1] == [DEVELOPMENT_ACCOUNT]))
    if local and not segments:
        refuse('the account name is missing. An account of Azure is written https://ACCOUNT.blob.core.windows.net, '
               'and one of an emulator http://HOST:PORT/ACCOUNT_NAME.')
    extra = segments[1:] if path_style else segments
    if extra:
        container = extra[0] if len(extra) == 1 and CONTAINER_NAME.match(extra[0]) else 'CONTAINER'
        refuse(f'an account URL holds no container. Write it as the option ?container_name={container}, '
               'or as the setting azureblockblob_container_name.')
    if segments and not re.fullmatch('[A-Za-z0-9-]+', segments[0]):
        refuse('the path of the account URL is no account name.')
    return f'/{segments[0]}' if segments else ''


def _read_options(
    query: str, credential: str | None, credentials: Mapping[str, Mapping[str, Option]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the options of the credential and the settings that a query string gives."""
    taken = credentials[credential] if credential else {}
    values: dict[str, Any] = {}
    for part in query.split('&') if query else []:
        name, _, value = part.partition('=')
        option = taken.get(name) or SETTINGS.get(name)
        if not option:
            _refuse_option(name, credential, credentials)
        if name in values:
            refuse(f'the option {name} is given twice.')
        if not value:
            refuse(f'the option {name} is empty.')
        if '?' in value:
            refuse(f'a ? stands in the option {name}. Options are separated by &; a ? that is meant is %3F.')
        values[name] = check(f'the option {name}', _unquote(name, value), option, WHERE)
    return (MappingProxyType({name: value for name, value in values.items() if name in taken}),
            MappingProxyType({name: value for name, value in values.items() if name not in taken}))


def _unquote(name: str, value: str) -> str:
    decoded = unquote(value)
    if '\N{REPLACEMENT CHARACTER}' in decoded:
        refuse(f'the percent-encoding of the option {name} is no UTF-8.')
    return decoded


def _refuse_option(
    name: str, credential: str | None, credentials: Mapping[str, Mapping[str, Option]],
) -> NoReturn:
    if not name:
        refuse('an option is missing next to an &, or before an =.')
    takers = [other for other, options in credentials.items() if name in options]
    if takers and credential:
        refuse(f'{credential} does not take the option {name}. '
               f'It takes: {", ".join(sorted(credentials[credential]))}.')
    if takers:
        refuse(f'the option {name} goes with a credential: {" or ".join(takers)}.')
    known = [*(credentials[credential] if credential else ()), *SETTINGS]
    word = name.lower().removeprefix(f'{SCHEME}_')
    if word.replace('_', '') in MISPLACED:
        refuse(MISPLACED[word.replace('_', '')])
    hint = nearest(word, known)
    refuse(f'{_name(name, "what follows the ?")} is not an option{hint}' if hint
           else f'unknown option. Known are: {", ".join(sorted(known))}.')


def _read_connection_string(url: str, text: str) -> BackendURL:
    values = _split_connection_string(text)
    if values.get('UseDevelopmentStorage', '').lower() == 'true':
        return _development_storage(url, values)
    account_url = _read_account_url(*_find_endpoint(values), values.get('AccountName'))
    key, sas = values.get('AccountKey'), _find_sas(values)
    if key and sas:
        refuse('two identities at once: a connection string holds either an AccountKey or a SharedAccessSignature.')
    if key and 'AccountName' not in values:
        refuse('AccountKey needs AccountName.')
    key = _read_key(key) if key else None
    return BackendURL(url, account_url, account_name=values.get('AccountName'), account_key=key, sas=sas)


def _split_connection_string(text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(';'))):
        key, _, value = map(str.strip, part.partition('='))
        name = CONNECTION_STRING_KEYS.get(key.lower())
        if not name:
            hint = nearest(key, CONNECTION_STRING_KEYS.values())
            if key.lower().removeprefix(f'{SCHEME}_') in SETTINGS:
                refuse(f'{key} is a setting, and a connection string takes none: set azureblockblob_….')
            refuse(f'{_name(key, "what stands before an =")} is not a key of a connection string{hint}' if hint
                   else 'the connection string has a part that is not a KEY=VALUE which Azure Storage knows.')
        if name in values:
            refuse(f'{name} is given twice in the connection string.')
        if not value:
            refuse(f'{name} is empty in the connection string.')
        if ' ' in value:
            refuse(f'{name} holds white space.')
        if '?' in value.removeprefix('?') and not name.endswith('Endpoint'):
            refuse(f'{name} holds a ?. A connection string takes no options: '
                   'they are settings, such as azureblockblob_container_name.')
        values[name] = value
    return values


def _find_endpoint(values: Mapping[str, str]) -> tuple[str, str]:
    """Return the account URL of a connection string, and the scheme to read it with."""
    protocol = values.get('DefaultEndpointsProtocol', 'https').lower()
    if protocol not in ('http', 'https'):
        refuse('DefaultEndpointsProtocol must be https or http.')
    name = values.get('AccountName')
    if name and not ACCOUNT_NAME.match(name):
        refuse('AccountName must have 3 to 24 lower-case letters and digits, up to the next ;.')
    if 'BlobEndpoint' in values:
        return values['BlobEndpoint'].partition('?')[0], protocol
    if not name:
        refuse('the connection string names no account: it needs AccountName or BlobEndpoint.')
    suffix = values.get('EndpointSuffix', 'core.windows.net')
    if not HOST_NAME.match(suffix):
        refuse('EndpointSuffix must be a host name, such as core.windows.net.')
    return f'{name}.blob.{suffix}', protocol


def _find_sas(values: Mapping[str, str]) -> str | None:
    """Return the shared access signature of a connection string, as it is written there."""
    found = [sas for sas in (values.get('SharedAccessSignature', '').removeprefix('?'),
                             values.get('BlobEndpoint', '').partition('?')[2]) if sas]
    if len(found) > 1:
        refuse('two identities at once: a SharedAccessSignature, and another one in BlobEndpoint.')
    if found and not re.search(r'(?:^|&)sig=[^&]', found[0], re.IGNORECASE):
        refuse('the SharedAccessSignature, or what follows the ? of BlobEndpoint, has no sig=…: copy it whole.')
    return found[0] if found else None


def _development_storage(url: str, values: Mapping[str, str]) -> BackendURL:
    others = values.keys() - {'UseDevelopmentStorage', 'DevelopmentStorageProxyUri'}
    if others:
        refuse(f'UseDevelopmentStorage=true goes without {", ".join(sorted(others))}.')
    proxy = values.get('DevelopmentStorageProxyUri', 'http://127.0.0.1').rstrip('/').removesuffix(':10000')
    if not re.fullmatch(r'https?://[^/:@?]+', proxy, re.IGNORECASE):
        refuse('DevelopmentStorageProxyUri must be http://HOST. Its port is always 10000.')
    account_url = _read_account_url(f'{proxy}:10000/{DEVELOPMENT_ACCOUNT}', 'http')
    return BackendURL(url, account_url, account_name=DEVELOPMENT_ACCOUNT, account_key=DEVELOPMENT_KEY)
