"""All tests run on this tree's backend, which the plugin puts into the released Celery."""
from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure() -> None:
    """End the run where the tests would see another backend than this tree's."""
    try:
        import celery_azureblockblob
    except ModuleNotFoundError:
        pytest.exit('The plugin is not installed: run `make install`, or `pip install -e .`', returncode=4)
    installed = Path(celery_azureblockblob.find_modules())
    modules = HERE / 'celery' / 'backends'
    names = [str(file.relative_to(modules)) for file in modules.rglob('*.py')]
    _, changed, missing = filecmp.cmpfiles(modules, installed, names, shallow=False)
    if changed or missing:
        pytest.exit(f'The plugin in {installed} is not this tree: install it again. '
                    f'It differs in {", ".join(changed + missing)}.', returncode=4)
