"""The patch's changes to files of Celery, each a function from a file's text to its new text.

A function finds its place by what stands there, in every supported release, or raises :exc:`PlaceNotFound`.
"""
from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import celery_azureblockblob  # noqa: F401  (celery.backends.azurestorage is then that of this repository)
from celery.backends import azurestorage
from celery.backends.azurestorage.options import SETTINGS, Option


class PlaceNotFound(LookupError):
    """A file of Celery is not as an edit expects it: the edit needs to learn about that release."""


def add_settings(defaults: str) -> str:
    """Put our settings into the namespace ``azureblockblob`` of ``celery/app/defaults.py``.

    Celery's lines keep their order; lines for settings of ours follow.
    """
    namespace = re.compile(r'(?<=^    azureblockblob=Namespace\(\n)(?:        .*\n)+(?=    \),$)', re.MULTILINE)
    lines = _find(namespace, defaults).group()
    theirs = re.findall(r'^ +(\w+)=Option\(', lines, re.MULTILINE)
    unknown = sorted(set(theirs) - set(SETTINGS))
    if unknown:
        raise PlaceNotFound(f'Celery has azureblockblob settings that are not ours: {", ".join(unknown)}')
    names = dict.fromkeys([*theirs, *SETTINGS])
    return _replace(namespace, ''.join(_default(name, SETTINGS[name]) for name in names), defaults)


def _default(name: str, setting: Option) -> str:
    default = '' if setting.default is None else f'{setting.default!r}, '
    return f'        {name}=Option({default}type={setting.kind!r}),\n'


def mask_backend_urls(utils: str) -> str:
    """Let ``celery/app/utils.py`` mask our URLs, in ``celery report`` and ``app.conf.humanize()``, as we do."""
    mask = _mask_in_sanitize_url if 'def sanitize_url(' in utils else _mask_through_kombu
    place = re.compile(r'^(?=from celery\.exceptions import )', re.MULTILINE)
    return _replace(place, 'from celery.backends.azurestorage.url import redact as redact_azure_url\n', mask(utils))


#: Whether a URL chooses our backend, by its alias or by the path of its class.
_IS_OURS = "'azureblockblob' in url.partition('://')[0].lower()"


def _mask_in_sanitize_url(utils: str) -> str:
    """Celery 5.7: has a function for backend URLs, with a mask for Azure's connection strings of its own."""
    guard = re.compile(r"(?<=^        if '://' not in url:\n            return url\n)", re.MULTILINE)
    helper = re.compile(r'^def _redact_azure_connection_string\(.*?(?=^def )', re.MULTILINE | re.DOTALL)
    use_of_helper = re.compile(r"^(?:        #.*\n)*        if scheme == 'azureblockblob':\n(?:            .*\n)+\n",
                               re.MULTILINE)
    utils = _replace(guard, f'        if {_IS_OURS}:\n            return redact_azure_url(url, mask)\n', utils)
    return _replace(helper, '', _replace(use_of_helper, '', utils))


def _mask_through_kombu(utils: str) -> str:
    """Celery 5.4 to 5.6: gives backend URLs to a function of kombu's, in two places."""
    calls = re.compile(r'\bmaybe_sanitize_url\(')
    definition = (
        "def sanitize_url(url, mask='**'):\n"
        '    """Mask what is secret in the URL of a result backend."""\n'
        f'    if isinstance(url, str) and {_IS_OURS}:\n'
        '        return redact_azure_url(url, mask)\n'
        '    return maybe_sanitize_url(url, mask=mask)\n\n\n')
    utils = _replace(calls, 'sanitize_url(', utils, places=2)
    return _replace(re.compile(r'^(?=def filter_hidden_settings\()', re.MULTILINE), definition, utils)


def document_settings(configuration: str) -> str:
    """Put our section in the place of Celery's in ``docs/userguide/configuration.rst``."""
    section = re.compile(
        r'^\.\. _conf-azureblockblob-result-backend:\n.*?(?=^\.\. _conf-)', re.MULTILINE | re.DOTALL)
    ours = Path(__file__).with_name('configuration.rst').read_text(encoding='utf-8')
    return _replace(section, ours + '\n', configuration)


def list_modules(index: str) -> str:
    """Name our modules in ``docs/internals/reference/index.rst``, where Celery wants each module to be."""
    place = re.compile(r'(?<=^    celery\.backends\.azureblockblob\n)', re.MULTILINE)
    return _replace(place, ''.join(f'    {module}\n' for module in modules()), index)


def modules() -> list[str]:
    """Return the names of the package under the backend and of its modules."""
    name = azurestorage.__name__
    return [name, *(f'{name}.{module.name}' for module in pkgutil.iter_modules(azurestorage.__path__))]


def reference_page(module: str) -> str:
    """Return the page of ``docs/internals/reference`` for a module."""
    title = f' ``{module}``'
    rule = '=' * (len(title) + 1)
    return f'{rule}\n{title}\n{rule}\n\n.. automodule:: {module}\n    :members:\n    :undoc-members:\n'


#: Celery's files that are changed.
EDITS: Mapping[str, Callable[[str], str]] = {
    'celery/app/defaults.py': add_settings,
    'celery/app/utils.py': mask_backend_urls,
    'docs/internals/reference/index.rst': list_modules,
    'docs/userguide/configuration.rst': document_settings,
}


def _find(place: re.Pattern[str], text: str, places: int = 1) -> re.Match[str]:
    found = list(place.finditer(text))
    if len(found) != places:
        raise PlaceNotFound(f'{len(found)} places, not {places}, match {place.pattern!r}')
    return found[0]


def _replace(place: re.Pattern[str], new: str, text: str, places: int = 1) -> str:
    _find(place, text, places)
    return place.sub(lambda _: new, text)
