"""``python -m upstream patch RELEASE``: the patch, as one unified diff."""
from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from upstream import source
from upstream.edits import EDITS, PlaceNotFound, modules, reference_page

#: Names the files that the patch carries whole.
MANIFEST = Path(__file__).with_name('manifest.txt')

#: Seconds that git may take for one step.
GIT_TIMEOUT = 300


def write(release: str) -> int:
    """Write the patch against a release of Celery, and see that ``git apply`` takes it.

    Arguments:
        release: The version of Celery.

    Returns:
        The exit status.

    Raises:
        LookupError: if a file is not where or as it should be, in this repository or in Celery's source.
        subprocess.SubprocessError: if pip or git fails.
    """
    patch = path(release)
    patch.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        repository = _Repository(Path(folder, 'git'))
        tree = source.unpack(release, Path(folder, 'edited'))
        pristine = repository.add(tree)
        edit(tree)
        edited = repository.add(tree)
        patch.write_text(repository.diff(pristine, edited), encoding='utf-8', newline='\n')

        tree = source.unpack(release, Path(folder, 'patched'))
        apply(patch, tree)
        if repository.add(tree) != edited:
            raise LookupError(f'{patch.name} does not make the tree that was edited.')
        files = repository.diff(pristine, edited, '--name-only').count('\n')
    print(f'{os.path.relpath(patch)}: {files} files; git apply takes it on the source of Celery {release}.')
    return 0


def path(release: str) -> Path:
    """Return where the patch against a release is."""
    return source.BUILD / f'celery-{release}-azureblockblob.patch'


def edit(tree: Path) -> None:
    """Make in `tree`, the source of Celery, the changes that the patch is made of.

    Raises:
        PlaceNotFound: if a file of Celery is not as an edit expects it.
    """
    for name in travellers():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.ROOT / name, target)
    for module in modules():
        page = tree / 'docs' / 'internals' / 'reference' / f'{module}.rst'
        page.write_text(reference_page(module), encoding='utf-8')
    for name, change in EDITS.items():
        file = tree / name
        try:
            file.write_text(change(file.read_text(encoding='utf-8')), encoding='utf-8')
        except PlaceNotFound as problem:
            raise PlaceNotFound(f'{name}: {problem}') from None


def travellers() -> list[str]:
    """Return the files of this repository that the patch carries whole.

    Raises:
        LookupError: if nothing matches a line of the manifest.
    """
    names = []
    for line in MANIFEST.read_text(encoding='utf-8').splitlines():
        pattern = line.partition('#')[0].strip()
        if pattern:
            found = sorted(file.relative_to(source.ROOT).as_posix() for file in source.ROOT.glob(pattern))
            if not found:
                raise LookupError(f'{MANIFEST.name}: no file matches {pattern}')
            names += found
    return names


def apply(patch: Path, tree: Path) -> None:
    """Apply the patch to `tree`, the source of a Celery release, which must lie outside of any git repository."""
    _git(tree, 'apply', '--check', str(patch))
    _git(tree, 'apply', str(patch))


class _Repository:
    """A git repository that compares trees which lie elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _git(folder.parent, 'init', '--quiet', '--bare', str(folder))

    def add(self, tree: Path) -> str:
        """Return the id of all that `tree` holds."""
        place = {'GIT_DIR': str(self.folder), 'GIT_WORK_TREE': str(tree)}
        _git(tree, 'add', '--all', '--force', '.', **place)
        return _git(tree, 'write-tree', **place).strip()

    def diff(self, before: str, after: str, form: str = '--patch') -> str:
        """Return how two ids differ."""
        return _git(self.folder, 'diff-tree', '-r', form, before, after)


def _git(folder: Path, *arguments: str, **environment: str) -> str:
    """Run git in `folder`, as if nobody had configured it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
    plain = {
        'GIT_CEILING_DIRECTORIES': str(folder.parent), 'GIT_CONFIG_GLOBAL': os.devnull, 'GIT_CONFIG_NOSYSTEM': '1'}
    done = subprocess.run(
        ['git', *arguments], cwd=folder, env=inherited | plain | environment, timeout=GIT_TIMEOUT,
        capture_output=True, encoding='utf-8')
    if done.returncode:
        raise subprocess.SubprocessError(f'git {arguments[0]} failed:\n{done.stderr}')
    return done.stdout
