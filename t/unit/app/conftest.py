"""Celery's report as the patch mends it. A patched Celery needs none of this, so the file does not travel."""
from pathlib import Path
from types import ModuleType

import pytest

from celery.app import utils
from upstream.edits import mask_backend_urls


@pytest.fixture(autouse=True)
def mended_report(monkeypatch):
    mended = ModuleType(utils.__name__)
    mended.__package__ = utils.__package__
    source = mask_backend_urls(Path(utils.__file__).read_text(encoding='utf-8'))
    exec(compile(source, utils.__file__, 'exec'), vars(mended))
    for name in ('sanitize_url', 'filter_hidden_settings', 'bugreport'):
        monkeypatch.setattr(utils, name, getattr(mended, name), raising=False)
