"""Configuration of Sphinx."""
import os
import sys

sys.path.insert(0, os.path.abspath('_ext'))

import celery_azureblockblob

project = 'celery-azureblockblob'
version = release = celery_azureblockblob.__version__
copyright = 'the celery-azureblockblob contributors'

extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'azure_tables']
exclude_patterns = ['_build']
html_theme = 'furo'
napoleon_use_ivar = True
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': True, 'show-inheritance': True}
