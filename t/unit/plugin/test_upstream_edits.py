"""The patch's changes to files of Celery, made here on the files of the installed release."""
import inspect
import re
from types import ModuleType

import pytest

from celery.app import defaults, utils
from celery.backends.azurestorage.options import SETTINGS
from upstream import edits

CONFIGURATION = """
.. _conf-s3-result-backend:

S3 section

.. _conf-azureblockblob-result-backend:

Old section

.. setting:: azureblockblob_container_name

.. _conf-gcs-result-backend:

GCS section
"""

INDEX = """
    celery.backends.asynchronous
    celery.backends.azureblockblob
    celery.backends.rpc
"""


def run(source, original):
    module = ModuleType(original.__name__)
    module.__package__ = original.__package__
    exec(compile(source, original.__file__, 'exec'), vars(module))
    return module


class test_settings:

    @pytest.fixture
    def edited(self):
        return edits.add_settings(inspect.getsource(defaults))

    def test_are_those_of_our_table(self, edited):
        options = run(edited, defaults).NAMESPACES['azureblockblob']
        assert {name: (option.default, option.type) for name, option in options.items()} == {
            name: (setting.default, setting.kind) for name, setting in SETTINGS.items()}

    def test_leave_all_other_lines_as_they_are(self, edited):
        before, after = (source.splitlines() for source in (inspect.getsource(defaults), edited))
        new = [line for line in after if line not in before]
        assert new
        assert all(re.match(r'        \w+=Option\(', line) for line in new)
        assert all(re.match(r'        \w+=Option\(', line) for line in before if line not in after)

    def test_need_the_namespace_of_the_backend(self):
        with pytest.raises(edits.PlaceNotFound, match='0 places, not 1'):
            edits.add_settings('NAMESPACES = Namespace(\n)\n')

    def test_of_celery_that_we_do_not_know_are_an_error(self):
        source = inspect.getsource(defaults).replace('        container_name=Option(', '        brand_new=Option(')
        with pytest.raises(edits.PlaceNotFound, match='not ours: brand_new'):
            edits.add_settings(source)


class test_mask:

    def test_replaces_celerys_own_for_azure(self):
        edited = edits.mask_backend_urls(inspect.getsource(utils))
        assert '_redact_azure_connection_string' not in edited
        assert edited.count('redact_azure_url(url, mask)') == 1

    def test_is_imported_where_isort_puts_it(self):
        edited = edits.mask_backend_urls(inspect.getsource(utils))
        imports = re.findall(r'^from (celery\.[\w.]+) import', edited, re.MULTILINE)
        assert imports == sorted(imports)

    def test_needs_the_function_that_masks_urls(self):
        source = inspect.getsource(utils).replace('sanitize_url', 'other')
        with pytest.raises(edits.PlaceNotFound, match='0 places'):
            edits.mask_backend_urls(source)


class test_documentation:

    def test_has_our_section_in_the_place_of_celerys(self):
        edited = edits.document_settings(CONFIGURATION)
        assert 'Old section' not in edited
        assert re.findall(r'_conf-\w+', edited) == ['_conf-s3', '_conf-azureblockblob', '_conf-gcs']

    def test_tells_name_default_and_unit_of_every_setting(self):
        edited = edits.document_settings(CONFIGURATION)
        for name, setting in SETTINGS.items():
            [entry] = re.findall(
                rf'^\.\. setting:: azureblockblob_{name}\n\n(.*?)(?=^\.\. (?:setting::|_conf))', edited,
                re.MULTILINE | re.DOTALL)
            default = re.search(r'^Default: (.*)\.$', entry, re.MULTILINE).group(1)
            assert str(setting.default) in default or (setting.default == '' and 'empty' in default)
            assert setting.unit in entry

    def test_lists_every_setting_that_the_code_reads_and_no_other(self):
        edited = edits.document_settings(CONFIGURATION)
        assert set(re.findall(r'setting:: azureblockblob_(\w+)', edited)) == set(SETTINGS)

    def test_needs_celerys_section(self):
        with pytest.raises(edits.PlaceNotFound):
            edits.document_settings('.. _conf-gcs-result-backend:\n')


class test_reference:

    def test_lists_our_modules_after_the_backend(self):
        before, after = INDEX.split()[:2], INDEX.split()[2:]
        entries = edits.list_modules(INDEX).split()
        assert entries == [*before, *edits.modules(), *after]
        assert 'celery.backends.azurestorage.url' in entries

    def test_page_has_a_title_as_long_as_its_rules(self):
        over, title, under = edits.reference_page('celery.backends.azurestorage.url').splitlines()[:3]
        assert over == under == '=' * (len(title) + 1)
