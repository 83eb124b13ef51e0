"""What is missing is said in a sentence, with the way to get it."""
from __future__ import annotations

import pytest

from t.services.azurite import Azurite
from t.services.service import ServiceUnavailable


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Return a function that makes ``node`` say that it is of a version; without, there is none."""
    def node(version):
        program = tmp_path / 'node'
        program.write_text(f'#!/bin/sh\necho {version}\n')
        program.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    return node


class test_find_azurite:

    def start(self, tmp_path):
        Azurite(tmp_path, tls=False).start()

    def test_without_node(self, node, tmp_path):
        with pytest.raises(ServiceUnavailable, match='^Node.js is missing: install Node.js 18 or newer'):
            self.start(tmp_path)

    @pytest.mark.parametrize('version', ['v16.20.2', 'v0.12.0', 'none'])
    def test_with_an_old_node(self, version, node, tmp_path):
        node(version)
        with pytest.raises(ServiceUnavailable, match='too old: install Node.js 18 or newer'):
            self.start(tmp_path)

    def test_without_azurite(self, node, tmp_path, monkeypatch):
        node('v18.0.0')
        monkeypatch.setenv('AZURITE_BIN', str(tmp_path / 'azurite-blob'))
        with pytest.raises(ServiceUnavailable, match='^Azurite is missing .*: run "npm ci"'):
            self.start(tmp_path)
