"""``make check-wheel``: the wheel as users get it, in an environment with nothing but what it asks for.

Builds the source distribution, the wheel from that, and installs the wheel, with the newest Celery that it takes, in
an empty virtual environment. There a result is stored and read on Azurite, by account key and by managed identity.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from t.services.azurite import Azurite
from t.services.identity import IdentityEndpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Seconds for a build or an installation, and for storing and reading the results.
INSTALL_TIMEOUT, ROUNDTRIP_TIMEOUT = 600, 120


def main() -> None:
    """Build, install, and use the wheel.

    Raises:
        subprocess.CalledProcessError: if one of the steps fails; it has told why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        python = install(wheel, folder)
        use(python, folder)
    print(f'{wheel.name} works in an environment of its own.')


def build(folder: Path) -> Path:
    """Return the path of the wheel, built by way of the source distribution."""
    print('Building the wheel …', flush=True)
    run(sys.executable, '-m', 'build', '--outdir', folder, ROOT, stdout=subprocess.DEVNULL)
    [wheel] = folder.glob('*.whl')
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Return the interpreter of a new environment that has the wheel."""
    print('Installing it in an empty environment …', flush=True)
    venv.create(folder / 'venv', with_pip=True)
    python = folder / 'venv' / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '--quiet', wheel)
    return python


def use(python: Path, folder: Path) -> None:
    """Store and read a result by each URL, with `python`."""
    with Azurite(folder) as azurite, IdentityEndpoint() as identity:
        urls = [
            f'azureblockblob://{azurite.connection_string}',
            f'azureblockblob://ManagedIdentityCredential@{azurite.account_url}',
        ]
        # Isolated, so that nothing is imported from this repository.
        run(python, '-I', HERE / 'roundtrip.py', *urls, timeout=ROUNDTRIP_TIMEOUT, cwd=folder,
            env=os.environ | azurite.environ | identity.environ)


def run(*command: str | Path, timeout: float = INSTALL_TIMEOUT, **arguments: object) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True, timeout=timeout, **arguments)  # type: ignore[call-overload]


if __name__ == '__main__':
    main()
