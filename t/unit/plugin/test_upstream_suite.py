"""How Celery's unit tests without and with the patch are compared."""
import pytest

from upstream import suite

PASSED, FAILED, SKIPPED = 'passed', 'failed', 'skipped'

XML = """<testsuites><testsuite>
  <testcase classname="t.unit.app.test_utils.test_Settings" name="test_find[a-b]" file="t/unit/app/test_utils.py"/>
  <testcase classname="t.unit.test_loops" name="test_loop" file="t/unit/test_loops.py"><failure/></testcase>
  <testcase classname="t.unit.test_loops" name="test_end" file="t/unit/test_loops.py"><error/></testcase>
  <testcase classname="t.unit.test_loops" name="test_win" file="t/unit/test_loops.py"><skipped/></testcase>
</testsuite></testsuites>"""


def complaints(pristine, patched, expected=()):
    return suite.judge(pristine, patched, expected).complaints()


class test_comparison:

    def test_finds_nothing_when_the_same_tests_fail(self):
        assert complaints({'a': PASSED, 'b': FAILED}, {'a': PASSED, 'b': FAILED, 'new': PASSED}) == []

    def test_finds_nothing_when_a_failing_test_passes(self):
        assert complaints({'a': FAILED}, {'a': PASSED}) == []

    def test_finds_a_test_that_fails_now(self):
        assert complaints({'a': PASSED}, {'a': FAILED}) == ['newly failing: a']

    def test_finds_a_new_test_that_fails(self):
        assert complaints({}, {'a': FAILED}) == ['newly failing: a']

    def test_finds_a_test_that_is_gone(self):
        assert complaints({'a[1]': PASSED, 'a[2]': FAILED}, {'b': PASSED}) == ['gone: a']

    def test_finds_a_test_that_is_skipped_now(self):
        assert complaints({'a': PASSED}, {'a': SKIPPED}) == ['newly skipped: a']

    def test_knows_the_tests_that_are_replaced(self):
        assert complaints({'a[1]': PASSED, 'a[2]': PASSED}, {'b': PASSED}, ['a']) == []

    def test_takes_no_offence_at_a_line_for_a_test_of_another_release(self):
        assert complaints({'a': PASSED}, {'a': PASSED}, ['of-another-release']) == []

    def test_finds_a_line_for_a_test_that_is_still_there(self):
        assert complaints({'a': PASSED}, {'a': PASSED}, ['a']) == ['listed but there: a']


class test_report:

    def test_counts_both_runs_and_fails_on_a_complaint(self, capsys):
        assert suite.report('5.7.0', {'a': PASSED, 'b': FAILED}, {'a': FAILED, 'b': FAILED}, []) == 1
        out = capsys.readouterr().out
        assert 'without the patch: 1 passed, 1 failed, 0 skipped' in out
        assert 'with the patch: 0 passed, 2 failed, 0 skipped' in out
        assert 'newly failing: a' in out

    def test_passes_without_a_complaint(self, capsys):
        assert suite.report('5.7.0', {'a': PASSED}, {'a': PASSED}, []) == 0
        assert 'Nothing fails that passed before' in capsys.readouterr().out


class test_outcomes:

    def test_are_read_from_what_pytest_writes(self, tmp_path):
        xml = tmp_path / 'result.xml'
        xml.write_text(XML)
        assert suite.outcomes(xml) == {
            't/unit/app/test_utils.py::test_Settings::test_find[a-b]': PASSED,
            't/unit/test_loops.py::test_loop': FAILED,
            't/unit/test_loops.py::test_end': FAILED,
            't/unit/test_loops.py::test_win': SKIPPED,
        }

    def test_of_no_test_are_an_error(self, tmp_path):
        xml = tmp_path / 'result.xml'
        xml.write_text('<testsuites/>')
        with pytest.raises(LookupError, match='holds no test'):
            suite.outcomes(xml)


class test_list_of_replaced_tests:

    @pytest.fixture
    def listing(self, tmp_path, monkeypatch):
        listing = tmp_path / 'replaced.txt'
        monkeypatch.setattr(suite, 'REPLACED', listing)
        return listing

    def test_names_each_with_its_file(self, listing):
        listing.write_text('# comment\n\nt/unit/test_a.py\n    reason\n        test_b\n        test_C::test_d\n')
        assert suite.replaced() == ['t/unit/test_a.py::test_b', 't/unit/test_a.py::test_C::test_d']

    @pytest.mark.parametrize('text', [
        't/unit/test_a.py\n        test_b\n',
        't/unit/test_a.py\n    reason\nt/unit/test_c.py\n        test_b\n',
        '    reason\n        test_b\n',
        't/unit/test_a.py\n    reason\n     test_b\n',
    ])
    def test_needs_a_file_and_a_reason_for_each(self, listing, text):
        listing.write_text(text)
        with pytest.raises(LookupError, match='file and reason must stand above (test_b|reason)'):
            suite.replaced()

    def test_of_this_repository_names_each_test_once(self):
        tests = suite.replaced()
        assert tests
        assert len(tests) == len(set(tests))
