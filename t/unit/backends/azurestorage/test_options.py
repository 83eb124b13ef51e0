"""Settings: where they come from, which source wins, what values are refused. No test here opens a connection."""
from __future__ import annotations

import copy
from datetime import timedelta
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from celery import Celery
from celery.app.defaults import NAMESPACES
from celery.exceptions import ImproperlyConfigured

pytest.importorskip('azure.storage.blob')
pytest.importorskip('azure.identity')

from celery.backends.azureblockblob import AzureBlockBlobBackend
from celery.backends.azurestorage.options import MAX_BASE_PATH, MAX_BASE_PATH_SEGMENTS, SETTINGS, nearest

URL = 'azureblockblob://DefaultAzureCredential@https://myaccount.blob.core.windows.net'
ACCOUNT_URL = 'azureblockblob://https://myaccount.blob.core.windows.net'

#: Values of each setting other than its default: as Python, and as a URL spells it.
OTHER = {
    'container_name': ('results', 'results'),
    'base_path': ('été/', '%C3%A9t%C3%A9/'),
    'connection_timeout': (2.5, '2.5'),
    'read_timeout': (30, '30'),
    'retry_initial_backoff_sec': (0, '0'),
    'retry_increment_base': (0, '0'),
    'retry_max_attempts': (0, '0'),
    'max_concurrency': (1, '1'),
    'native_chords': (True, 'true'),
    'credential': ('azure.identity.AzureCliCredential', 'azure.identity.AzureCliCredential'),
}

SECONDS = ('connection_timeout', 'read_timeout')
COUNTS = ('retry_increment_base', 'retry_max_attempts')

GOOD_CONTAINERS = ['abc', 'a' * 63, '0-1', '2024-results-1', '$root', '$web']
BAD_CONTAINERS = [
    '', 'ab', 'a' * 64, 'Results', 'my_results', 'my.results', '-results', 'results-', 'my--results', 'my results',
    'results/', 'r\u00e9sultats', '$logs2', 'results\n', b'results', 5, ['results'],
]

GOOD_BASE_PATHS = [
    '', 'a', 'a/b/', '/a', 'a//b', '.hidden', 'v1.2', 'a?b#c%d&e=f', 'a b', '\u65e5\u672c/', 'a.', '...',
    'a' * MAX_BASE_PATH, '/' * MAX_BASE_PATH_SEGMENTS,
]
BAD_BASE_PATHS = [
    'a\\b', 'a./b', './', '../a', 'a/../b', 'a\nb', '\x00', '\u200b', '\ud800', b'a', 5, ['a'],
    'a' * (MAX_BASE_PATH + 1), '/' * (MAX_BASE_PATH_SEGMENTS + 1),
]

BAD_SECONDS = [
    0, '0', '0.0', -1, '-1', 'soon', '', ' 5', '5s', '1e3', '1_000', '.5', '5.', '\u0663', 10 ** 9, float('nan'),
    float('inf'), True, b'5', [5], {},
]
BAD_COUNTS = [
    -1, '-1', 1.5, '1.5', 4.0, 'many', '', '5 ', '1e3', '1_000', '\u0663', 10 ** 9, float('nan'), True, b'5', [5],
]


def give_credential():
    """Stand where a credential is configured; nobody calls it."""
    raise AssertionError('Nothing asks for a token when a backend is built.')


def settings_of(url=URL, argument=None, **configured):
    """Return the settings of a backend, with `configured` (without their prefix) in the app's configuration."""
    app = Celery('azure', set_as_current=False)
    app.conf.update({f'azureblockblob_{name}': value for name, value in configured.items()})
    return AzureBlockBlobBackend(app=app, url=url, container_name=argument)._settings


def settings_from(source, **kwargs):
    """Return the settings of an app's own backend, which is configured from `source`."""
    app = Celery('azure', set_as_current=False)
    app.config_from_object(source, **kwargs)
    assert isinstance(app.backend, AzureBlockBlobBackend)
    return app.backend._settings


def url_for(name):
    """Return a URL that leaves a setting to be given: the one that names a credential leaves no other."""
    return ACCOUNT_URL if name == 'credential' else URL


class test_Sources:

    def test_the_defaults_are_those_of_the_table(self):
        assert settings_of() == {name: option.default for name, option in SETTINGS.items()}

    @pytest.mark.parametrize('name', NAMESPACES['azureblockblob'])
    def test_a_setting_that_celery_knows_has_its_default(self, name):
        assert SETTINGS[name].default == NAMESPACES['azureblockblob'][name].default

    def test_every_setting_is_tried_here(self):
        assert OTHER.keys() == SETTINGS.keys()

    @pytest.mark.parametrize('name', OTHER)
    def test_each_can_be_configured(self, name):
        value, _ = OTHER[name]
        assert settings_of(url_for(name), **{name: value})[name] == value

    @pytest.mark.parametrize('name', OTHER)
    def test_each_can_be_given_in_the_url(self, name):
        value, spelled = OTHER[name]
        assert settings_of(f'{url_for(name)}?{name}={spelled}')[name] == value

    @pytest.mark.parametrize('name', OTHER)
    def test_the_url_wins_over_the_configuration(self, name):
        value, spelled = OTHER[name]
        configured = {'container_name': 'others', 'base_path': 'others', 'credential': give_credential,
                      'native_chords': False}.get(name, 77)
        assert settings_of(f'{url_for(name)}?{name}={spelled}', **{name: configured})[name] == value

    @pytest.mark.parametrize('name', sorted(OTHER.keys() - {'base_path', 'credential'}))  # not empty
    def test_the_default_in_the_url_wins_over_the_configuration(self, name):
        value, _ = OTHER[name]
        default = SETTINGS[name].default
        assert settings_of(f'{URL}?{name}={default}', **{name: value})[name] == default

    def test_what_the_url_overrides_is_not_looked_at(self):
        assert settings_of(f'{URL}?container_name=results', container_name='!')['container_name'] == 'results'

    def test_an_argument_wins_over_url_and_configuration(self):
        url = f'{URL}?container_name=from-url'
        assert settings_of(url, 'argument', container_name='configured')['container_name'] == 'argument'

    @pytest.mark.parametrize('name', OTHER)
    def test_none_means_the_default(self, name):
        assert settings_of(URL, **{name: None})[name] == SETTINGS[name].default

    def test_a_number_may_be_configured_as_text(self):
        settings = settings_of(read_timeout='7.5', retry_max_attempts='4')
        assert (settings['read_timeout'], settings['retry_max_attempts']) == (7.5, 4)

    @pytest.mark.parametrize('spelled', ['true', 'True', 'YES', 'on', '1'])
    def test_truth_is_spelled_in_several_ways(self, spelled):
        assert settings_of(f'{URL}?native_chords={spelled}')['native_chords'] is True
        assert settings_of(native_chords=spelled)['native_chords'] is True

    def test_a_credential_may_be_an_object(self):
        assert settings_of(ACCOUNT_URL, credential=give_credential)['credential'] is give_credential

    def test_nothing_is_written_into_the_configuration(self):
        app = Celery('azure', set_as_current=False)
        app.conf.update(azureblockblob_container_name='configured', result_backend=URL)
        before = copy.deepcopy(dict(app.conf.items()))
        query = '&'.join(f'{name}={spelled}' for name, (_, spelled) in OTHER.items() if name != 'credential')
        AzureBlockBlobBackend(app=app, url=f'{URL}?{query}', container_name='argument')
        assert dict(app.conf.items()) == before
        assert app.conf.azureblockblob_container_name == 'configured'

    def test_two_backends_of_an_app_have_settings_of_their_own(self):
        app = Celery('azure', set_as_current=False)
        first = AzureBlockBlobBackend(app=app, url=f'{URL}?container_name=first&base_path=a/')
        second = AzureBlockBlobBackend(app=app, url=URL)
        assert (first._settings['container_name'], first.base_path) == ('first', 'a/')
        assert (second._settings['container_name'], second.base_path) == ('celery', '')


class test_Spellings:

    @pytest.mark.parametrize('name', OTHER)
    def test_each_setting_works_in_upper_case(self, name):
        value, _ = OTHER[name]
        source = {'CELERY_RESULT_BACKEND': url_for(name), f'AZUREBLOCKBLOB_{name.upper()}': value}
        assert settings_from(source)[name] == value

    @pytest.mark.parametrize('name', OTHER)
    def test_each_setting_works_in_lower_case(self, name):
        value, _ = OTHER[name]
        assert settings_from({'result_backend': url_for(name), f'azureblockblob_{name}': value})[name] == value

    def test_all_work_together_in_upper_case(self):
        source = {f'AZUREBLOCKBLOB_{name.upper()}': value for name, (value, _) in OTHER.items()}
        assert settings_from({'CELERY_RESULT_BACKEND': ACCOUNT_URL, **source}) == {
            name: value for name, (value, _) in OTHER.items()}

    @pytest.mark.parametrize('name', OTHER)
    def test_each_setting_works_as_django_projects_write_it(self, name):
        value, _ = OTHER[name]
        settings = SimpleNamespace(**{
            'CELERY_RESULT_BACKEND': url_for(name), f'CELERY_AZUREBLOCKBLOB_{name.upper()}': value})
        assert settings_from(settings, namespace='CELERY')[name] == value

    def test_all_work_together_as_django_projects_write_them(self):
        settings = SimpleNamespace(CELERY_RESULT_BACKEND=ACCOUNT_URL, DEBUG=True, **{
            f'CELERY_AZUREBLOCKBLOB_{name.upper()}': value for name, (value, _) in OTHER.items()})
        assert settings_from(settings, namespace='CELERY') == {name: value for name, (value, _) in OTHER.items()}

    def test_the_url_wins_over_a_namespace_too(self):
        settings = SimpleNamespace(
            CELERY_RESULT_BACKEND=f'{URL}?container_name=from-url', CELERY_AZUREBLOCKBLOB_CONTAINER_NAME='others')
        assert settings_from(settings, namespace='CELERY')['container_name'] == 'from-url'

    @pytest.mark.parametrize('source', [
        {'CELERY_RESULT_BACKEND': URL, 'AZUREBLOCKBLOB_MAX_CONCURRENCY': 'many'},
        {'result_backend': URL, 'azureblockblob_max_concurrency': 'many'},
    ])
    def test_a_wrong_value_is_named_as_the_setting_is_documented(self, source):
        with pytest.raises(ImproperlyConfigured, match='azureblockblob_max_concurrency must be a whole number'):
            settings_from(source)


def refused_in_the_url(name, value, message):
    with pytest.raises(ImproperlyConfigured, match=message):
        settings_of(f'{URL}?{name}={quote(value)}')


def refused_in_the_configuration(name, value, message):
    with pytest.raises(ImproperlyConfigured, match=f'azureblockblob_{name} {message}'):
        settings_of(**{name: value})


def texts(values):
    """Return those values that a URL can hold: text that is not empty."""
    return [value for value in values if isinstance(value, str) and value and value != '\ud800']


class test_Values:

    @pytest.mark.parametrize('name', GOOD_CONTAINERS)
    def test_a_container_that_azure_takes_is_taken(self, name):
        assert settings_of(container_name=name)['container_name'] == name
        assert settings_of(f'{URL}?container_name={quote(name)}')['container_name'] == name
        assert settings_of(URL, name)['container_name'] == name

    @pytest.mark.parametrize('name', BAD_CONTAINERS)
    def test_a_container_that_azure_refuses_is_refused(self, name):
        refused_in_the_configuration('container_name', name, 'must have 3 to 63 characters')
        with pytest.raises(ImproperlyConfigured, match='AzureBlockBlobBackend: container_name must have 3 to 63'):
            settings_of(URL, name)

    @pytest.mark.parametrize('name', texts(BAD_CONTAINERS))
    def test_a_container_that_azure_refuses_is_refused_in_the_url(self, name):
        refused_in_the_url('container_name', name, 'the option container_name must have 3 to 63 characters')

    @pytest.mark.parametrize('path', GOOD_BASE_PATHS)
    def test_a_base_path_that_names_blobs_is_taken(self, path):
        assert settings_of(base_path=path)['base_path'] == path

    @pytest.mark.parametrize('path', texts(GOOD_BASE_PATHS))
    def test_a_base_path_that_names_blobs_is_taken_in_the_url(self, path):
        assert settings_of(f'{URL}?base_path={quote(path)}')['base_path'] == path

    @pytest.mark.parametrize('path', BAD_BASE_PATHS)
    def test_a_base_path_that_azure_refuses_or_changes_is_refused(self, path):
        refused_in_the_configuration('base_path', path, 'must ')

    @pytest.mark.parametrize('path', texts(BAD_BASE_PATHS))
    def test_a_base_path_that_azure_refuses_or_changes_is_refused_in_the_url(self, path):
        refused_in_the_url('base_path', path, 'the option base_path must ')

    @pytest.mark.parametrize('value', BAD_SECONDS)
    @pytest.mark.parametrize('name', SECONDS)
    def test_what_is_no_number_of_seconds_is_refused(self, name, value):
        refused_in_the_configuration(name, value, 'must be a number of seconds, more than 0')

    @pytest.mark.parametrize('value', texts(BAD_SECONDS))
    @pytest.mark.parametrize('name', SECONDS)
    def test_what_is_no_number_of_seconds_is_refused_in_the_url(self, name, value):
        refused_in_the_url(name, value, f'the option {name} must be a number of seconds, more than 0')

    def test_a_pause_may_be_zero_but_not_less(self):
        assert settings_of(f'{URL}?retry_initial_backoff_sec=0.0')['retry_initial_backoff_sec'] == 0
        refused_in_the_configuration('retry_initial_backoff_sec', -1, 'must be a number of seconds, 0 or more')

    @pytest.mark.parametrize('value', BAD_COUNTS)
    @pytest.mark.parametrize('name', COUNTS)
    def test_what_is_no_count_is_refused(self, name, value):
        refused_in_the_configuration(name, value, 'must be a whole number, 0 or more')

    @pytest.mark.parametrize('value', texts(BAD_COUNTS))
    @pytest.mark.parametrize('name', COUNTS)
    def test_what_is_no_count_is_refused_in_the_url(self, name, value):
        refused_in_the_url(name, value, f'the option {name} must be a whole number, 0 or more')

    @pytest.mark.parametrize('value', [0, '0', -1, 1.5, True])
    def test_at_least_one_thread_reads(self, value):
        refused_in_the_configuration('max_concurrency', value, 'must be a whole number, 1 or more')

    @pytest.mark.parametrize('value', ['maybe', '', 2, [], b'true'])
    def test_what_is_neither_true_nor_false_is_refused(self, value):
        refused_in_the_configuration('native_chords', value, 'must be true or false')

    @pytest.mark.parametrize('value', [
        5, b'azure.identity.AzureCliCredential', ['azure.identity'], '', 'DefaultAzureCredential', 'a b.c', '.a',
        'a.', 'a..b', 'a-b.c', '1.a', 'a.b\n', f'eyJhbGci.{"e" * 100}.signature',
        'azureblockblob://DefaultAzureCredential@myaccount', 'AccountName=myaccount;AccountKey=a2V5',
    ])
    def test_what_leads_to_no_credential_is_refused(self, value):
        with pytest.raises(ImproperlyConfigured, match='such as azure.identity.DefaultAzureCredential') as caught:
            settings_of(ACCOUNT_URL, credential=value)
        assert not value or str(value) not in str(caught.value).replace('azure.identity.DefaultAzureCredential', '')

    @pytest.mark.parametrize('name', OTHER)
    def test_an_error_does_not_repeat_the_value(self, name):
        with pytest.raises(ImproperlyConfigured) as caught:
            settings_of(ACCOUNT_URL, **{'credential': give_credential, name: '\\c2VjcmV0\\'})
        assert 'c2VjcmV0' not in str(caught.value)


class test_Expiry:
    """Celery's own settings, which this backend checks since they would be wrong once a day otherwise."""

    @pytest.mark.parametrize(('value', 'seconds'), [
        (None, None), (0, 0), (False, 0), (1, 1), (0.5, 0.5), ('86400', 86400), ('1e5', 100000),
        (timedelta(days=2), 172800), (float('inf'), float('inf'))])
    def test_seconds_are_taken(self, value, seconds):
        app = Celery('azure', set_as_current=False)
        app.conf.update(result_expires=value)
        assert AzureBlockBlobBackend(app=app, url=URL).expires == seconds
        app.conf.update(result_expires=None)
        assert AzureBlockBlobBackend(app=app, url=URL, expires=value).expires == seconds

    @pytest.mark.parametrize('name', ['result_expires', 'result_chord_expires'])
    @pytest.mark.parametrize('value', [
        -1, '-1', 'soon', '', float('nan'), True, 10 ** 400, [1], {}, timedelta(days=-1)])
    def test_all_else_is_refused(self, name, value):
        app = Celery('azure', set_as_current=False)
        app.conf.update({name: value})
        with pytest.raises(ImproperlyConfigured, match=f'Configuration: {name} must be a number of seconds'):
            AzureBlockBlobBackend(app=app, url=URL)


class test_Hints:

    @pytest.mark.parametrize(('word', 'known'), [
        ('clientid', 'client_id'), ('CLIENT_ID', 'client_id'), ('client-id', 'client_id'),
        ('clinet_id', 'client_id'), ('basepath', 'base_path'), ('container', 'container_name'),
    ])
    def test_the_nearest_name_is_found(self, word, known):
        assert nearest(word, [*SETTINGS, 'client_id', 'tenant_id']) == f': did you mean {known}?'

    @pytest.mark.parametrize('word', ['', 'x', 'colour', 'c2VjcmV0' * 11])
    def test_what_resembles_nothing_gets_no_hint(self, word):
        assert nearest(word, SETTINGS) == ''
