"""Tokens claim what they are told to claim."""
from __future__ import annotations

import time

import pytest

from t.services.tokens import make_token, read_claims


class test_make_token:

    def test_has_three_parts_of_which_the_signature_is_empty(self):
        header, claims, signature = make_token().split('.')
        assert header
        assert claims
        assert signature == ''

    def test_is_for_the_tenant_and_identity_that_are_given(self):
        claims = read_claims(make_token(tenant='T', client_id='C', object_id='O', audience='A'))
        assert (claims['tid'], claims['appid'], claims['oid'], claims['aud']) == ('T', 'C', 'O', 'A')
        assert claims['iss'] == 'https://sts.windows.net/T/'

    def test_may_come_from_elsewhere(self):
        assert read_claims(make_token(issuer='https://example.org/'))['iss'] == 'https://example.org/'

    @pytest.mark.parametrize('lifetime', [3600, 1, -60])
    def test_expires_when_it_should(self, lifetime):
        claims = read_claims(make_token(lifetime=lifetime))
        assert claims['exp'] - time.time() == pytest.approx(lifetime, abs=30)
        assert claims['nbf'] < claims['exp']
