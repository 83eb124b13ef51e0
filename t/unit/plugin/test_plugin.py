"""The installed plugin: one backend class under one name, in environments made by ``pip install``."""
import json
import shutil
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SETUP = """
    import json
    import pickle

    from celery import Celery

    URL = 'azureblockblob://DefaultEndpointsProtocol=https;AccountName=someaccount;AccountKey=c29tZSBrZXk='
"""


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def installation(request, tmp_path_factory):
    return Installation(tmp_path_factory.mktemp(request.param), editable=request.param == 'editable')


class Installation:
    """A virtual environment with the plugin and the libraries of the running one. Made without the network."""

    def __init__(self, folder, editable):
        self.python = folder / 'venv' / 'bin' / 'python'
        self.source = copy_source(folder / 'source')
        venv.create(folder / 'venv')
        [libraries] = (folder / 'venv').glob('lib/python*/site-packages')
        link_libraries(libraries)
        self.modules = self.source / 'celery' / 'backends' if editable else libraries / '_celery_azureblockblob'
        subprocess.run(
            [self.python, '-m', 'pip', 'install', '-qq', '--no-index', '--no-deps', '--no-build-isolation',
             *(['--editable'] if editable else []), self.source],
            check=True, timeout=120)

    def run(self, code):
        """Return what `code` assigns to ``seen``, in a process of its own."""
        code = textwrap.dedent(SETUP) + textwrap.dedent(code) + '\nprint(json.dumps(seen))'
        done = subprocess.run([self.python, '-c', code], cwd=self.python.parent, timeout=60, check=True,
                              capture_output=True, text=True)
        return json.loads(done.stdout)


def copy_source(folder):
    for name in ('celery', 'extra/plugin', 'requirements'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.egg-info'))
    for name in ('LICENSE', 'MANIFEST.in', 'README.rst', 'pyproject.toml', 'setup.py'):
        shutil.copy(ROOT / name, folder)
    return folder


def link_libraries(folder):
    for path in {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}:
        for library in Path(path).iterdir():
            if 'celery_azureblockblob' not in library.name and not (folder / library.name).exists():
                (folder / library.name).symlink_to(library)


class test_plugin:

    def test_the_app_the_import_and_a_pickled_result_have_one_class(self, installation):
        assert installation.run("""
            app = Celery(backend=URL)
            backend = type(app.backend)
            from celery.backends.azureblockblob import AzureBlockBlobBackend
            result = pickle.loads(pickle.dumps(app.AsyncResult('some-id')))
            seen = [backend is AzureBlockBlobBackend, type(result.backend) is AzureBlockBlobBackend]
        """) == [True, True]

    def test_the_class_is_ours_and_keeps_celerys_name(self, installation):
        file, name = installation.run("""
            import inspect
            backend = type(Celery(backend=URL).backend)
            seen = [inspect.getfile(backend), f'{backend.__module__}.{backend.__qualname__}']
        """)
        assert Path(file).resolve() == (installation.modules / 'azureblockblob.py').resolve()
        assert name == 'celery.backends.azureblockblob.AzureBlockBlobBackend'

    def test_the_class_is_ours_for_a_scheme_with_a_plus(self, installation):
        assert installation.run("""
            app = Celery(backend='azureblockblob+https://DefaultAzureCredential@someaccount.blob.core.windows.net')
            backend = type(app.backend)
            import celery.backends.azureblockblob as module
            seen = [backend is module.AzureBlockBlobBackend, module.__file__]
        """) == [True, str(installation.modules / 'azureblockblob.py')]

    def test_celerys_own_module_gives_way_when_it_was_imported_before(self, installation):
        before, after, same = installation.run("""
            import celery.backends.azureblockblob
            before = celery.backends.azureblockblob.__file__
            backend = type(Celery(backend=URL).backend)
            from celery.backends import azureblockblob
            from celery.backends.azureblockblob import AzureBlockBlobBackend
            seen = [before, azureblockblob.__file__, backend is AzureBlockBlobBackend]
        """)
        assert Path(before).parent.parts[-2:] == ('celery', 'backends')
        assert Path(before).parent != installation.modules
        assert Path(after) == installation.modules / 'azureblockblob.py'
        assert same

    def test_nothing_changes_when_it_is_imported_again(self, installation):
        assert installation.run("""
            import importlib, sys
            import celery.backends
            import celery_azureblockblob
            modules, path = dict(sys.modules), list(celery.backends.__path__)
            importlib.reload(celery_azureblockblob)
            seen = [modules == sys.modules, path == celery.backends.__path__]
        """) == [True, True]

    def test_nothing_is_forgotten_when_our_modules_are_there_already(self, installation):
        assert installation.run(f"""
            import celery.backends
            celery.backends.__path__.insert(0, {str(installation.modules)!r})
            from celery.backends.azureblockblob import AzureBlockBlobBackend
            import celery_azureblockblob
            seen = celery_azureblockblob.AzureBlockBlobBackend is AzureBlockBlobBackend
        """) is True

    def test_other_backends_are_still_celerys(self, installation):
        assert installation.run("""
            seen = type(Celery(backend='cache+memory://').backend).__name__
        """) == 'CacheBackend'

    def test_no_file_goes_into_celerys_folder(self, installation):
        files = installation.run("""
            from importlib.metadata import files
            seen = [str(file) for file in files('celery-azureblockblob')]
        """)
        assert files
        assert not [file for file in files if file.startswith('celery/')]
