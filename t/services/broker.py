"""A message broker that is a folder."""
from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Kombu's, but a message becomes visible whole: Kombu's own readers may meet a file that is not yet written."""

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        name = f'{time.time_ns()}_{uuid.uuid4()}.{queue}.msg'
        file = Path(self.data_folder_out, f'unfinished-{name}.tmp')
        file.write_text(dumps(message))
        file.rename(Path(self.data_folder_out, name))


class Transport(filesystem.Transport):
    """For the setting ``broker_transport``."""

    Channel = Channel


def broker_settings(directory: Path) -> dict[str, Any]:
    """Return what Celery must be told so that its broker is in `directory`, which must exist."""
    folders = {name: directory / name for name in ('messages', 'processed', 'control')}
    for folder in folders.values():
        folder.mkdir()
    return {
        'broker_url': 'filesystem://localhost/',
        'broker_transport': f'{__name__}:Transport',
        'broker_transport_options': {
            'data_folder_in': str(folders['messages']),
            'data_folder_out': str(folders['messages']),
            'store_processed': True,
            'processed_folder': str(folders['processed']),
            'control_folder': str(folders['control']),
            'polling_interval': 0.02,
        },
    }
