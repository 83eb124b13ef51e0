"""What the documentation shows works."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from celery import Celery
from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.credentials import CREDENTIALS

ROOT = Path(__file__).resolve().parents[3]
SETTINGS_PAGE = ROOT / 'extra' / 'upstream' / 'configuration.rst'
PAGES = [*sorted((ROOT / 'docs').glob('*.rst')), ROOT / 'README.rst', SETTINGS_PAGE]

#: URLs whose parts are words in capitals stand for others; these are what a user would put there.
STAND_INS = {
    'ACCOUNT_NAME:ACCOUNT_KEY@': 'myaccount:bm90IGEga2V5@',
    'ACCOUNT:KEY@': 'myaccount:bm90IGEga2V5@',
    'AccountKey=KEY': 'AccountKey=bm90IGEga2V5',
    'SharedAccessSignature=SAS': 'SharedAccessSignature=sv=2024-11-04&sig=bm90',
    'AccountName=ACCOUNT': 'AccountName=myaccount',
    'ACCOUNT.blob': 'myaccount.blob',
    'CLIENT_ID': '00000000-0000-0000-0000-000000000000',
}


def examples():
    """Yield each whole URL of a result backend in the documentation."""
    for page in PAGES:
        for url in re.findall(r"(azureblockblob(?:\+https)?://[^\s`'\"]+)", page.read_text()):
            for stand_in, value in STAND_INS.items():
                url = url.replace(stand_in, value)
            if not re.search(r'[A-Z]{3,}[_@\[]|…', url.removesuffix('==')):  # a grammar, or a part of a URL
                yield pytest.param(url.rstrip('.,'), id=f'{page.name}: {url}')


def test_there_are_examples():
    assert len(list(examples())) > 20


@pytest.mark.parametrize('url', list(examples()))
def test_a_url_in_the_documentation_is_accepted(url):
    app = Celery(set_as_current=False)
    if '@' not in url and 'Account' not in url and 'Shared' not in url and 'UseDevelopment' not in url:
        app.conf.azureblockblob_credential = 'azure.identity.DefaultAzureCredential'
    url = url.removeprefix('azureblockblob+')
    assert AzureBlockBlobBackend(app=app, url=url).as_uri(include_password=True) == url


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_command_can_be_pasted(page):
    for block in re.findall(r'code-block:: console\n\n((?: +.*\n)+)', page.read_text()):
        lines = block.splitlines()
        for before, line in zip(['', *lines], lines, strict=False):
            assert line.strip().startswith('$ ') or before.endswith('\\')


@pytest.mark.parametrize('name', list(CREDENTIALS))
def test_the_settings_page_names_the_options_of_each_credential(name):
    described = re.search(rf'\* ``{name}`` \((.*?)\)\n', SETTINGS_PAGE.read_text(), re.DOTALL)[1]
    for option in CREDENTIALS[name].options:
        assert option in described or (option.startswith('exclude_') and 'exclude_*_credential' in described)
