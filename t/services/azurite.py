"""Azurite, the Azure Storage emulator."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from .certificates import Certificates, make_certificates
from .process import START_TIMEOUT, Process
from .service import HOST, ServiceUnavailable

ROOT = Path(__file__).resolve().parents[2]

#: The oldest Node.js that Azurite 3.35 was seen to run on.
NODE = 18

LISTENING = re.compile(r'listens on https?://[\d.]+:(\d+)\s')


class Azurite(Process):
    """Azurite's blob service on a free port, over TLS and with OAuth.

    It keeps port and data when it is stopped and started again; killed, it may lose the last five seconds.

    Arguments:
        directory: Where it keeps its data, its log and its certificates; must exist.
        certificates: Those that other services have, so that one bundle is enough; made here by default.
        tls: False for plain HTTP, where Azurite takes no tokens.
        in_memory: Keep the data in memory, which is faster, and forget them when it is stopped.
    """

    #: The account that Azurite has by itself, and its key, which is published and no secret.
    account_name = 'devstoreaccount1'
    account_key = 'Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=='

    def __init__(self, directory: Path, certificates: Certificates | None = None, *, tls: bool = True,
                 in_memory: bool = False):
        super().__init__(directory / 'azurite.log')
        self.directory = directory
        self.certificates = (certificates or make_certificates(directory)) if tls else None
        self.port = 0
        self._place = ['--inMemoryPersistence'] if in_memory else ['--location', str(directory)]

    @property
    def account_url(self) -> str:
        """The account's address."""
        return f'{self._protocol}://{HOST}:{self.port}/{self.account_name}'

    @property
    def connection_string(self) -> str:
        """Address and key of the account."""
        return (f'DefaultEndpointsProtocol={self._protocol};AccountName={self.account_name};'
                f'AccountKey={self.account_key};BlobEndpoint={self.account_url};')

    @property
    def ca_bundle(self) -> Path | None:
        """The file that ``REQUESTS_CA_BUNDLE`` must name."""
        return self.certificates.bundle if self.certificates else None

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that make the Azure SDK trust it."""
        return super().environ | (self.certificates.environ if self.certificates else {})

    def command(self) -> list[str]:
        """Return the command line, which asks for any free port at the first start.

        Raises:
            ServiceUnavailable: if Node.js or Azurite is missing, or Node.js too old.
        """
        command = [
            find_azurite(), '--blobHost', HOST, '--blobPort', str(self.port), *self._place,
            '--skipApiVersionCheck', '--disableTelemetry', '--silent']
        if self.certificates:
            command += ['--oauth', 'basic',
                        '--cert', str(self.certificates.server), '--key', str(self.certificates.server_key)]
        return command

    def is_ready(self) -> bool:
        """Whether it listens; then the port is known."""
        listening = LISTENING.search(self.log)
        if listening:
            self.port = int(listening[1])
        return listening is not None

    @property
    def _protocol(self) -> str:
        return 'https' if self.certificates else 'http'


def find_azurite() -> str:
    """Return the path of ``azurite-blob``: what ``AZURITE_BIN`` names, or what npm has installed in this repository.

    Raises:
        ServiceUnavailable: if it is not there, or Node.js is missing or too old.
    """
    _check_node()
    program = os.environ.get('AZURITE_BIN') or str(ROOT / 'node_modules' / '.bin' / 'azurite-blob')
    if not os.access(program, os.X_OK):
        raise ServiceUnavailable(f'Azurite is missing ({program}): run "npm ci".')
    return program


def _check_node() -> None:
    node = shutil.which('node')
    if node is None:
        raise ServiceUnavailable(f'Node.js is missing: install Node.js {NODE} or newer, then run "npm ci".')
    output = subprocess.run([node, '--version'], capture_output=True, text=True, timeout=START_TIMEOUT).stdout
    version = re.match(r'v(\d+)[\d.]*', output)
    if version is None or int(version[1]) < NODE:
        found = version[0] if version else 'of an unknown version'
        raise ServiceUnavailable(f'Node.js {found} is too old: install Node.js {NODE} or newer, then run "npm ci".')
