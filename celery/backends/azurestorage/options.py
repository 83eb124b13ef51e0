"""Names, defaults, units and checks of what a user may set.

One table of settings serves the URL, the app's configuration, Celery's defaults and the documentation.
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery.exceptions import ImproperlyConfigured

#: Container names that Azure accepts: 3 to 63 characters, besides two of its own (REST: Naming Containers).
CONTAINER_NAME = re.compile(r'(?=.{3,63}\Z)[a-z0-9]+(?:-[a-z0-9]+)*\Z|\$root\Z|\$web\Z')

#: Blob names have at most 1,024 characters (REST: Naming Blobs); the rest is room for Celery's own part of the name.
MAX_BASE_PATH = 1024 - 256

#: A blob name has at most 254 path segments (REST: Naming Blobs); Celery's own part is the last.
MAX_BASE_PATH_SEGMENTS = 253

#: Errors repeat it, so that it must not match what is longer than a name: an access token, for instance.
DOTTED_PATH = re.compile(r'[^\W\d]\w{,62}(?:[.:][^\W\d]\w{,62})+\Z')

TRUE = frozenset({'true', 'yes', 'on', '1'})
FALSE = frozenset({'false', 'no', 'off', '0'})


@dataclass(frozen=True)
class Option:
    """Something a user may set, in the URL or (settings) in the app's configuration.

    Attributes:
        check: Turns a configured value or the text of a URL into the value to use; raises :exc:`ValueError`
            with the rule that was broken, in words that do not repeat the value.
        help: What it does, for the documentation.
        kind: Its type as :class:`celery.app.defaults.Option` names types.
        default: Its value when it is not set.
        unit: What a number counts.
    """

    check: Callable[[Any], Any]
    help: str
    kind: str = 'string'
    default: Any = None
    unit: str = ''


def text(value: Any) -> str:
    """Return `value` if it is text without control characters."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError('must be printable text')
    return value


def matching(pattern: str, rule: str) -> Callable[[Any], str]:
    """Return a check for text that `pattern` matches as a whole, as `rule` says in words."""
    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value
    return check


def boolean(value: Any) -> bool:
    """Return the truth value that `value` spells."""
    word = str(value).lower()
    if word not in TRUE | FALSE:
        raise ValueError('must be true or false')
    return word in TRUE


def whole_number(least: int) -> Callable[[Any], int]:
    """Return a check for whole numbers from `least` on."""
    def check(value: Any) -> int:
        if not re.fullmatch(r'[0-9]{1,9}', str(value)) or int(value) < least:
            raise ValueError(f'must be a whole number, {least} or more')
        return int(value)
    return check


def seconds(zero: bool = False) -> Callable[[Any], float]:
    """Return a check for a number of seconds above zero, or from `zero` on."""
    def check(value: Any) -> float:
        if not re.fullmatch(r'[0-9]{1,9}(\.[0-9]+)?', str(value)) or not (zero or float(value)):
            raise ValueError(f'must be a number of seconds, {"0 or more" if zero else "more than 0"}')
        number = float(value)
        return int(number) if number.is_integer() else number
    return check


def expires(value: Any) -> float | None:
    """Return for how many seconds something is kept; None or 0 is for ever."""
    if value is None:
        return None
    try:
        number = float('' if value is True else value)
    except (OverflowError, TypeError, ValueError):
        number = -1
    if not number >= 0:  # NaN is not either
        raise ValueError('must be a number of seconds or a timedelta, 0 or more, or None')
    return int(number) if number.is_integer() else number


def container_name(value: Any) -> str:
    """Return `value` if Azure takes it as the name of a container."""
    if not isinstance(value, str) or not CONTAINER_NAME.match(value):
        raise ValueError(
            'must have 3 to 63 characters, lower-case letters, digits and single hyphens, '
            'and begin and end with a letter or a digit')
    return value


def base_path(value: Any) -> str:
    """Return `value` if Azure takes it as the beginning of a blob's name.

    Azure turns a backslash into a slash and drops dots at the end of a segment; HTTP clients fold ``.`` and ``..``.
    Such a name would be stored under another one.
    """
    value = '' if value is None else text(value)
    if len(value) > MAX_BASE_PATH or value.count('/') > MAX_BASE_PATH_SEGMENTS:
        raise ValueError(
            f'must have at most {MAX_BASE_PATH} characters and {MAX_BASE_PATH_SEGMENTS} segments')
    if '\\' in value or any(segment.endswith('.') for segment in value.split('/')[:-1]):
        raise ValueError('must hold no backslash, and no segment that ends with a dot')
    return value


def token_credential(value: Any) -> Any:
    """Return `value` if it is a credential, a callable, or the dotted path of one of these."""
    if value is None or callable(value) or callable(getattr(value, 'get_token', None)):
        return value
    if not isinstance(value, str) or not DOTTED_PATH.match(value):
        raise ValueError('must be a TokenCredential, a callable that returns one, or the dotted path of either, '
                         'such as azure.identity.DefaultAzureCredential')
    return value


#: Celery's own settings `result_expires` and `result_chord_expires`, once a timedelta has become seconds.
EXPIRES = Option(expires, 'How long results, or the logs of chords, are kept.', unit='seconds')

#: Settings of the backend, without their prefix ``azureblockblob_``.
SETTINGS: Mapping[str, Option] = {
    'container_name': Option(
        container_name, 'The container that holds the results. It is created when the first result is written.',
        default='celery'),
    'base_path': Option(
        base_path, 'What the names of all blobs begin with, for instance ``prefix/``. No slash is added to it.',
        default=''),
    'connection_timeout': Option(
        seconds(), 'How long opening a connection may take.', 'int', 20, 'seconds'),
    'read_timeout': Option(
        seconds(), 'How long the service may take for the next part of its answer.', 'int', 120, 'seconds'),
    'retry_initial_backoff_sec': Option(
        seconds(zero=True), 'What a pause between two attempts of a request lasts, give or take half of it.',
        'int', 2, 'seconds'),
    'retry_increment_base': Option(
        whole_number(0), 'The pause before attempt *n* grows by this number to the power of *n*.',
        'int', 2, 'seconds'),
    'retry_max_attempts': Option(
        whole_number(0), 'How often a request that failed for a passing reason is repeated.', 'int', 3, 'requests'),
    'max_concurrency': Option(
        whole_number(1), 'How many results a process reads at the same time, and how many connections it keeps.',
        'int', 10, 'requests'),
    'native_chords': Option(
        boolean, 'True has the parts of a chord counted by an append blob, in place of polling. '
        'All workers must run this backend then.', 'bool', False),
    'credential': Option(
        token_credential, 'A ``TokenCredential``, a callable that returns one, or the dotted path of either, '
        'for URLs that name no credential.', 'any'),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``': did you mean …?'`` for what `word` most resembles among `known`, or ``''``.

    `word` itself is not in the answer: it may be a secret that stands in the wrong place.
    """
    spelled = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), spelled, n=1, cutoff=0.7)
    return f': did you mean {spelled[matches[0]]}?' if matches else ''


def check(name: str, value: Any, option: Option, where: str) -> Any:
    """Return the checked `value` of an option.

    Arguments:
        name: The option's name, for the error.
        value: What the user wrote.
        option: What is known about the option.
        where: Where it was written, for the error.

    Raises:
        celery.exceptions.ImproperlyConfigured: if the value breaks the option's rule.
    """
    try:
        return option.check(value)
    except ValueError as exc:
        raise ImproperlyConfigured(f'{where}: {name} {exc}.') from None


def read_settings(conf: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting: what the URL gave, else what the app configures, else its default.

    Arguments:
        conf: The app's configuration; it is read only. Upper-case names count where Celery took them once.
        given: Settings given in the URL, checked.

    Raises:
        celery.exceptions.ImproperlyConfigured: if a configured value is wrong.
    """
    return {name: given[name] if name in given else _configured(conf, f'azureblockblob_{name}', option)
            for name, option in SETTINGS.items()}


def _configured(conf: Mapping[str, Any], key: str, option: Option) -> Any:
    for spelling in (key, key.upper()):
        value = conf.get(spelling)
        if value is not None and value != option.default:
            return check(key, value, option, 'Configuration')
    return option.default
