"""A stand-in for the Azure CLI."""
from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path

from .tokens import LIFETIME, TENANT, make_token

SCRIPT = '''#!/bin/sh
printf '%s\\n' "$*" >>{calls}
case "$*" in
    "account get-access-token --output json --resource "*) {answer} ;;
    *) echo "only account get-access-token is known here" >&2; exit 2 ;;
esac
'''


class AzureCli:
    """An executable ``az`` in a directory, which answers with a token, fails or hangs, as it was told last.

    Arguments:
        directory: Where to put it; must exist.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._calls = directory / 'calls'
        self._calls.touch()
        self.answer()

    @property
    def environ(self) -> dict[str, str]:
        """The environment variable that makes this the ``az`` of a process."""
        return {'PATH': f'{self.directory}{os.pathsep}{os.environ["PATH"]}'}

    @property
    def calls(self) -> list[str]:
        """The arguments of each call so far, joined by blanks."""
        return self._calls.read_text().splitlines()

    def answer(self, *, tenant: str = TENANT, lifetime: int = LIFETIME, **claims: str) -> None:
        """Answer with a token; see :func:`.make_token` for what it can be like."""
        expires = int(time.time()) + lifetime
        answer = {'accessToken': make_token(tenant=tenant, lifetime=lifetime, **claims), 'expires_on': expires,
                  'expiresOn': time.strftime('%Y-%m-%d %H:%M:%S.000000', time.localtime(expires)),
                  'tenant': tenant, 'tokenType': 'Bearer'}
        self._write(_say(json.dumps(answer)))

    def fail(self, message: str, status: int = 1) -> None:
        """Write `message` to the standard error and end with `status`."""
        self._write(f'{_say(message)} >&2; exit {status}')

    def hang(self, seconds: int = 60) -> None:
        """Say nothing for some time."""
        self._write(f'exec sleep {seconds}')

    def _write(self, answer: str) -> None:
        script = self.directory / 'az'
        script.write_text(SCRIPT.format(calls=shlex.quote(str(self._calls)), answer=answer))
        script.chmod(0o755)


def _say(text: str) -> str:
    return f"printf '%s\\n' {shlex.quote(text)}"
