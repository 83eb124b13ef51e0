"""The stand-in for ``az`` answers the real AzureCliCredential."""
from __future__ import annotations

import time

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import AzureCliCredential, CredentialUnavailableError

from t.services.azure_cli import AzureCli
from t.services.tokens import AUDIENCE, read_claims

SCOPE = f'{AUDIENCE}/.default'


@pytest.fixture
def cli(tmp_path, enter):
    directory = tmp_path / "it's a folder"
    directory.mkdir()
    cli = AzureCli(directory)
    enter(cli)
    return cli


class test_AzureCli:

    def test_gives_a_token_and_notes_the_arguments(self, cli):
        token = AzureCliCredential(tenant_id='tenant', subscription='subscription').get_token(SCOPE)
        assert read_claims(token.token)['exp'] == pytest.approx(token.expires_on, abs=2)
        assert cli.calls == [f'account get-access-token --output json --resource {AUDIENCE} '
                             '--tenant tenant --subscription subscription']

    def test_gives_the_token_that_it_was_told_to_give(self, cli):
        cli.answer(lifetime=-60, issuer='https://example.org/')
        token = AzureCliCredential().get_token(SCOPE)
        assert token.expires_on < time.time()
        assert read_claims(token.token)['iss'] == 'https://example.org/'

    def test_fails_like_one_that_nobody_has_logged_in_to(self, cli):
        cli.fail("Please run 'az login' to set up an account.")
        with pytest.raises(CredentialUnavailableError, match="Please run 'az login'"):
            AzureCliCredential().get_token(SCOPE)

    def test_fails_with_a_message_of_its_own(self, cli):
        cli.fail('AADSTS50173: the grant has expired')
        with pytest.raises(ClientAuthenticationError, match='AADSTS50173'):
            AzureCliCredential().get_token(SCOPE)

    def test_hangs_until_it_is_given_up(self, cli):
        cli.hang()
        with pytest.raises(CredentialUnavailableError, match='Failed to invoke the Azure CLI'):
            AzureCliCredential(process_timeout=1).get_token(SCOPE)
