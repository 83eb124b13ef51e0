"""Directives that make the reference from the tables in the code: ``credential-table`` and ``setting-table``."""
from collections.abc import Iterator

from docutils.nodes import literal
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import celery_azureblockblob  # noqa: F401  (makes the modules below those of this tree)
from celery.backends.azurestorage.credentials import CREDENTIALS, CredentialType
from celery.backends.azurestorage.options import SETTINGS, Option


def list_table(*rows: tuple[str, ...]) -> Iterator[str]:
    yield from ('.. list-table::', '   :header-rows: 1', '   :widths: auto', '')
    for row in rows:
        for position, cell in enumerate(row):
            yield f'   {"-" if position else "* -"} {cell}'.replace('   -', '     -')
    yield ''


def type_of(option: Option) -> str:
    return {'bool': 'true or false', 'int': f'number of {option.unit}', 'any': 'object or text'}.get(
        option.kind, 'text')


def describe_credential(name: str, row: CredentialType) -> Iterator[str]:
    yield from (f'.. rubric:: {name}', '', row.help, '')
    notes = [f'Needs {", ".join(f"``{option}``" for option in row.required)}.'] if row.required else []
    notes += [f'At most one of {", ".join(f"``{option}``" for option in rivals)}.' for rivals in row.one_of]
    notes += [f'``{option}`` may come from the environment variable ``{variable}``.'
              for option, variable in row.environment.items()]
    yield from (' '.join(notes), '')
    yield from list_table(('Option', 'Value', 'Effect'), *(
        (f'``{option}``', type_of(value), value.help) for option, value in row.options.items()))


class CredentialTable(SphinxDirective):
    """Each credential with its options."""

    def run(self):
        lines = [line for name, row in CREDENTIALS.items() for line in describe_credential(name, row)]
        return self.parse_text_to_nodes('\n'.join(lines))


class SettingTable(SphinxDirective):
    """Each setting with its default."""

    def run(self):
        rows = (
            (f':setting:`azureblockblob_{name}`', f'``{option.default!r}``', option.unit or '–', option.help)
            for name, option in SETTINGS.items())
        return self.parse_text_to_nodes('\n'.join(list_table(('Setting', 'Default', 'Unit', 'Effect'), *rows)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('credential-table', CredentialTable)
    app.add_directive('setting-table', SettingTable)
    app.add_generic_role('pypi', literal)  # Celery's own documentation links it
    app.add_crossref_type('setting', 'setting', indextemplate='pair: %s; setting')
    return {'parallel_read_safe': True}
