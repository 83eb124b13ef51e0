"""How Celery's integration tests with this backend and with Redis are compared."""
import pytest

from upstream import integration
from upstream.pytest_upstream import OpenURL

PASSED, FAILED, SKIPPED = 'passed', 'failed', 'skipped'

#: How the tests that look into Redis end.
OURS = dict.fromkeys(integration.REDIS_ONLY, FAILED)
THEIRS = dict.fromkeys(integration.REDIS_ONLY, PASSED)


def complaints(ours, theirs):
    return integration.complaints(OURS | ours, THEIRS | theirs)


class test_comparison:

    def test_finds_nothing_when_only_tests_that_look_into_redis_differ(self):
        assert complaints({'a': PASSED}, {'a': PASSED}) == []

    def test_finds_nothing_when_a_test_fails_with_both(self):
        assert complaints({'a': FAILED}, {'a': FAILED}) == []

    def test_finds_nothing_when_a_test_passes_here_alone(self):
        assert complaints({'a': PASSED}, {'a': FAILED}) == []

    @pytest.mark.parametrize('ours', [{'a': FAILED}, {'a': SKIPPED}, {}])
    def test_finds_a_test_that_passes_with_redis_alone(self, ours):
        assert complaints(ours, {'a': PASSED}) == ['passes with Redis alone: a']

    @pytest.mark.parametrize('test', sorted(integration.REDIS_ONLY))
    def test_finds_an_exception_that_is_needed_no_more(self, test):
        assert complaints({test: PASSED}, {}) == [f'needs no exception any more: {test}']

    def test_finds_an_exception_for_a_test_that_is_not_there(self):
        assert len(integration.complaints({'a': PASSED}, {'a': PASSED})) == len(integration.REDIS_ONLY)


class test_report:

    def test_shows_both_sides_and_the_tests_that_differ(self, capsys):
        ours, theirs = OURS | {'a': FAILED, 'b': PASSED}, THEIRS | {'a': PASSED, 'b': PASSED}
        assert integration.report('5.7.0', ours, theirs) == 1
        lines = capsys.readouterr().out.splitlines()
        assert '    1 | 5     passed' in lines
        assert '    4 | 0     failed' in lines
        assert ' failed | passed  a' in lines
        assert not any(line.endswith(' b') for line in lines)

    def test_passes_without_a_complaint(self, capsys):
        assert integration.report('5.7.0', OURS, THEIRS) == 0
        assert 'but for what looks into it' in capsys.readouterr().out


class test_open_url:

    @pytest.mark.parametrize('prefix', ['redis', ('rpc', 'redis')])
    def test_takes_itself_for_redis(self, prefix):
        assert OpenURL('azureblockblob://…').startswith(prefix)

    def test_stays_what_it_is_to_everyone_else(self):
        url = OpenURL('azureblockblob://…')
        assert url.startswith('azureblockblob://')
        assert not url.startswith('redis://')
        assert not url.startswith(('rpc', 'cache'))
        assert url == 'azureblockblob://…'
