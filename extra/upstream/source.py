"""The source of a Celery release, from its source distribution."""
from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

#: The repository.
ROOT = Path(__file__).resolve().parents[2]

#: Downloads and test environments; not kept in git.
CACHE = ROOT / '.cache' / 'upstream'

#: What the tools make; not kept in git.
BUILD = ROOT / 'build'

#: Seconds that a download may take.
DOWNLOAD_TIMEOUT = 600


def unpack(release: str, folder: Path) -> Path:
    """Unpack a release of Celery, downloading it the first time.

    Arguments:
        release: Its version, for instance ``5.7.0``.
        folder: Where to put it.

    Returns:
        The root of its source tree.
    """
    with tarfile.open(_fetch(release)) as archive:
        archive.extraction_filter = getattr(tarfile, 'data_filter', None)  # Python 3.10.0 to 3.10.11 have none
        archive.extractall(folder)
    return folder / f'celery-{release}'


def _fetch(release: str) -> Path:
    if not re.fullmatch(r'\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?', release):
        raise LookupError(f'{release!r} is no version of Celery.')
    archive = CACHE / f'celery-{release}.tar.gz'
    if not archive.exists():
        print(f'Downloading the source of Celery {release} …', flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            _download(release, folder)
            Path(folder, archive.name).rename(archive)
    return archive


def _download(release: str, folder: str) -> None:
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '-qq', '--no-deps', '--no-binary', 'celery', '--dest', folder,
         f'celery=={release}'],
        check=True, timeout=DOWNLOAD_TIMEOUT)
