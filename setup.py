"""Where the packages of the distribution lie; all else about it is in ``pyproject.toml``."""
from setuptools import setup

setup(
    # celery/ belongs to Celery, which must not be overwritten: our modules are installed under a name of their own,
    # and the plugin makes them parts of celery.backends (see extra/plugin/celery_azureblockblob).
    package_dir={'': 'extra/plugin', '_celery_azureblockblob': 'celery/backends'},
    py_modules=['celery_azureblockblob_command'],
    packages=['celery_azureblockblob', '_celery_azureblockblob', '_celery_azureblockblob.azurestorage'],
)
