"""Writing the patch, against a source distribution made of the installed Celery."""
import subprocess
import tarfile
from pathlib import Path

import pytest

import celery
from celery.app import defaults, utils
from upstream import diff, source
from upstream.edits import EDITS, PlaceNotFound, modules

DOCUMENTS = {
    'docs/userguide/configuration.rst':
        '.. _conf-azureblockblob-result-backend:\n\nOld section\n\n.. _conf-gcs-result-backend:\n\nGCS section\n',
    'docs/internals/reference/index.rst':
        '    celery.backends.azureblockblob\n    celery.backends.rpc\n',
}


@pytest.fixture(autouse=True)
def release(tmp_path, monkeypatch):
    """A release whose source distribution holds the files that the patch changes."""
    monkeypatch.setattr(source, 'CACHE', tmp_path / 'cache')
    monkeypatch.setattr(source, 'BUILD', tmp_path / 'build')
    tree = tmp_path / f'celery-{celery.__version__}'
    modules = [Path(defaults.__file__), Path(utils.__file__)]
    files = DOCUMENTS | {f'celery/app/{module.name}': module.read_text() for module in modules}
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    source.CACHE.mkdir()
    with tarfile.open(source.CACHE / f'{tree.name}.tar.gz', 'w:gz') as archive:
        archive.add(tree, tree.name)
    return celery.__version__


@pytest.fixture(autouse=True)
def manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(diff, 'MANIFEST', tmp_path / 'manifest.txt')
    diff.MANIFEST.write_text('# ours\ncelery/backends/azurestorage/*.py\nrequirements/extras/azureblockblob.txt\n')
    return diff.MANIFEST


def changed_files(patch):
    return {line.removeprefix('+++ b/') for line in patch.read_text().splitlines() if line.startswith('+++ ')}


class test_patch:

    def test_holds_the_files_of_the_manifest_and_the_edited_ones(self, release):
        assert diff.write(release) == 0
        ours = {path.relative_to(source.ROOT).as_posix()
                for path in (source.ROOT / 'celery' / 'backends' / 'azurestorage').glob('*.py')}
        pages = {f'docs/internals/reference/{module}.rst' for module in modules()}
        assert changed_files(diff.path(release)) == {*ours, *pages, 'requirements/extras/azureblockblob.txt', *EDITS}

    def test_applies_to_the_release(self, release, tmp_path):
        diff.write(release)
        tree = source.unpack(release, tmp_path / 'again')
        diff.apply(diff.path(release), tree)
        assert 'max_concurrency=Option(10' in (tree / 'celery' / 'app' / 'defaults.py').read_text()
        assert 'Old section' not in (tree / 'docs' / 'userguide' / 'configuration.rst').read_text()

    def test_is_refused_by_a_source_that_has_it(self, release, tmp_path):
        diff.write(release)
        tree = source.unpack(release, tmp_path / 'again')
        diff.apply(diff.path(release), tree)
        with pytest.raises(subprocess.SubprocessError, match='git apply failed'):
            diff.apply(diff.path(release), tree)

    def test_does_not_depend_on_the_git_of_the_user(self, release, monkeypatch):
        diff.write(release)
        expected = diff.path(release).read_bytes()
        monkeypatch.setenv('GIT_DIR', 'nowhere')
        monkeypatch.setenv('GIT_CONFIG_COUNT', '1')
        monkeypatch.setenv('GIT_CONFIG_KEY_0', 'diff.noprefix')
        monkeypatch.setenv('GIT_CONFIG_VALUE_0', 'true')
        diff.write(release)
        assert diff.path(release).read_bytes() == expected

    def test_needs_every_file_of_the_manifest(self, release, manifest):
        manifest.write_text('celery/backends/gone.py\n')
        with pytest.raises(LookupError, match='no file matches celery/backends/gone.py'):
            diff.write(release)

    def test_names_the_file_where_an_edit_finds_no_place(self, release, monkeypatch):
        def lost(text):
            raise PlaceNotFound('0 places, not 1')

        monkeypatch.setattr(diff, 'EDITS', {'celery/app/utils.py': lost})
        with pytest.raises(PlaceNotFound, match='celery/app/utils.py: 0 places, not 1'):
            diff.write(release)


@pytest.mark.parametrize('release', ['', '5.7', '../5.7.0', '5.7.0 --pre'])
def test_only_a_version_of_celery_is_downloaded(release, tmp_path):
    with pytest.raises(LookupError, match='no version of Celery'):
        source.unpack(release, tmp_path)
