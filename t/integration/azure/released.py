"""Results and a group as a client sees them; run as a program, with Celery's own module, as it is released.

``python -m t.integration.azure.released store|read CONNECTION_STRING CONTAINER SERIALIZER``
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable

from celery import Celery, states

VALUE = {'text': 'ünï → 漢字', 'numbers': [1, 2.5, None, True]}


def build_app(serializer: str, **settings: object) -> Celery:
    """Return an app with this serializer."""
    app = Celery('released', set_as_current=False)
    app.conf.update(result_serializer=serializer, accept_content=['json', serializer], **settings)
    return app


def store(app: Celery) -> dict[str, object]:
    """Store a value, an error and a group. Return what `read` is to find."""
    app.backend.store_result('value', VALUE, states.SUCCESS)
    app.backend.store_result('error', KeyError('bad', 1), states.FAILURE, traceback='Traceback: …')
    app.GroupResult('group', [app.AsyncResult('value'), app.AsyncResult('error')]).save()
    return {'value': VALUE, 'error': "KeyError('bad', 1)", 'traceback': 'Traceback: …', 'group': ['value', 'error']}


def read(app: Celery) -> dict[str, object]:
    """Return the value, the error and the group."""
    error = app.AsyncResult('error')
    return {
        'value': app.AsyncResult('value').get(timeout=10),
        'error': repr(error.result), 'traceback': error.traceback,
        'group': [member.id for member in app.GroupResult.restore('group').results]}


def main(action: str, connection_string: str, container: str, serializer: str) -> None:
    """Do as a client of released Celery does; print the file of its module, and what came of it."""
    from celery.backends import azureblockblob  # nobody has put another one in its place in this process

    def make_backend(app: Celery, url: None) -> azureblockblob.AzureBlockBlobBackend:
        return azureblockblob.AzureBlockBlobBackend(
            app=app, url=f'azureblockblob://{connection_string}', container_name=container)

    actions: dict[str, Callable[[Celery], dict[str, object]]] = {'store': store, 'read': read}
    found = actions[action](build_app(serializer, result_backend=make_backend))
    print(json.dumps({'file': azureblockblob.__file__, 'found': found}))


if __name__ == '__main__':
    main(*sys.argv[1:])
