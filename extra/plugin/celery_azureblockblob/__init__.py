"""This distribution's ``azureblockblob`` result backend, on a released Celery.

Celery gets here through the entry point ``azureblockblob`` of the group ``celery.result_backends``. From then on the
backend's modules are imported as parts of :mod:`celery.backends`, before Celery's own, so that one class goes by the
name ``celery.backends.azureblockblob.AzureBlockBlobBackend``, also where a pickled result or an import asks for it.
No file of Celery is changed.
"""
from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import celery.backends

__all__ = ('AzureBlockBlobBackend',)
__version__ = '0.1.0'

#: Where the distribution installs the modules (see ``setup.py``).
INSTALLED_AS = '_celery_azureblockblob'

#: The modules that take the place of Celery's; of packages, all that is in them.
NAMES = ('celery.backends.azureblockblob', 'celery.backends.azurestorage')


def find_modules() -> str:
    """Return the folder that holds the backend's modules, installed or, in an editable install, as they are edited.

    Raises:
        ImportError: if the distribution is damaged.
    """
    spec = find_spec(INSTALLED_AS)
    for folder in (spec and spec.submodule_search_locations) or ():
        if os.path.isfile(os.path.join(folder, 'azureblockblob.py')):
            return os.path.realpath(folder)
    raise ImportError(f'{INSTALLED_AS} is not there: install celery-azureblockblob again.')


def take_precedence(folder: str) -> None:
    """Make :mod:`celery.backends` import the modules in `folder` before its own. Does nothing the second time.

    A module of the same name that came from elsewhere is forgotten; the next import finds the one in `folder`.
    """
    if celery.backends.__path__[0] != folder:
        celery.backends.__path__.insert(0, folder)
    for name in [name for name in sys.modules if _is_replaced(name)]:
        if not _lies_in(folder, sys.modules[name].__file__):
            del sys.modules[name]


def _is_replaced(name: str) -> bool:
    return any(name == replaced or name.startswith(f'{replaced}.') for replaced in NAMES)


def _lies_in(folder: str, file: str | None) -> bool:
    return file is not None and os.path.realpath(file).startswith(os.path.join(folder, ''))


take_precedence(find_modules())

from celery.backends.azureblockblob import AzureBlockBlobBackend  # noqa: E402  (needs what stands above)
