"""The two endpoints answer the real classes of azure-identity, and refuse what the real ones refuse."""
from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlencode

import pytest
from azure.core.exceptions import ClientAuthenticationError
from azure.identity import (
    CertificateCredential,
    EnvironmentCredential,
    ManagedIdentityCredential,
    WorkloadIdentityCredential,
)

from t.services.authority import ASSERTION_TYPE, GRANT_TYPE, Authority
from t.services.identity import API_VERSION, IdentityEndpoint
from t.services.service import HOST, wait_until
from t.services.tokens import AUDIENCE, TENANT, read_claims

SCOPE = f'{AUDIENCE}/.default'
CLIENT_ID = '5d2f7a0e-1c55-4f0b-9f0e-4e6f8f0a7d21'


def ask(url, *, form=None, headers=None, certificates=None):
    """Return status and JSON body of an answer."""
    context = ssl.create_default_context(cafile=certificates.bundle) if certificates else None
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    data = urlencode(form).encode() if form is not None else None
    try:
        response = opener.open(urllib.request.Request(url, data, headers or {}), timeout=30)
    except urllib.error.HTTPError as exc:
        response = exc
    with response:
        return response.status, json.load(response)


@pytest.fixture
def identity(enter):
    with IdentityEndpoint() as service:
        enter(service)
        yield service


@pytest.fixture
def authority(enter, certificates):
    with Authority(certificates) as service:
        enter(service)
        yield service


class test_IdentityEndpoint:

    asked = {'api-version': API_VERSION, 'resource': AUDIENCE}

    def ask(self, identity, secret=IdentityEndpoint.secret, **parameters):
        return ask(f'{identity.url}/msi/token?{urlencode(self.asked | parameters)}',
                   headers={'X-IDENTITY-HEADER': secret})

    @pytest.mark.parametrize(('config', 'parameter'), [
        ({}, {}),
        ({'client_id': CLIENT_ID}, {'client_id': CLIENT_ID}),
        ({'identity_config': {'object_id': 'O'}}, {'object_id': 'O'}),
        ({'identity_config': {'resource_id': '/subscriptions/s'}}, {'mi_res_id': '/subscriptions/s'}),
    ])
    def test_sees_which_identity_is_meant(self, config, parameter, identity):
        with ManagedIdentityCredential(**config) as credential:
            token = credential.get_token(SCOPE)
        assert [request.parameters for request in identity.requests] == [self.asked | parameter]
        claims = read_claims(token.token)
        assert claims['aud'] == AUDIENCE
        assert claims['exp'] == pytest.approx(token.expires_on, abs=2)
        if 'client_id' in parameter:
            assert claims['appid'] == CLIENT_ID

    def test_refuses_those_who_do_not_know_the_header(self, identity):
        status, answer = self.ask(identity, secret='guessed')
        assert status == answer['statusCode'] == 401
        assert 'X-IDENTITY-HEADER' in answer['message']

    def test_refuses_another_version_of_the_protocol(self, identity):
        assert self.ask(identity, **{'api-version': '2017-09-01'})[0] == 400

    def test_refuses_when_told_to_and_notes_who_asked(self, identity):
        identity.status = 503
        assert self.ask(identity)[0] == 503
        assert len(identity.requests) == 1

    def test_hands_out_bad_tokens_when_told_to(self, identity):
        identity.lifetime, identity.tenant, identity.issuer = -60, 'alien', 'https://example.org/'
        _, answer = self.ask(identity)
        claims = read_claims(answer['access_token'])
        assert claims['exp'] < time.time()
        assert int(answer['expires_on']) < time.time()
        assert (claims['tid'], claims['iss']) == ('alien', 'https://example.org/')

    def test_is_slow_when_told_to(self, identity):
        identity.delay = 0.2
        begin = time.monotonic()
        assert self.ask(identity)[0] == 200
        assert time.monotonic() - begin >= 0.2

    def test_stop_does_not_wait_for_slow_answers_and_leaves_no_thread(self):
        threads = set(threading.enumerate())
        begin = time.monotonic()
        with IdentityEndpoint(delay=120) as identity:
            client = threading.Thread(target=self.ask, args=(identity,))
            client.start()
            wait_until(lambda: identity.requests, 'the request is there', 30)
        client.join()
        assert time.monotonic() - begin < 60
        assert set(threading.enumerate()) == threads

    def test_goes_away_and_comes_back_at_the_same_address(self, identity):
        url = identity.url
        identity.stop()
        with pytest.raises(urllib.error.URLError):
            self.ask(identity)
        identity.start()
        assert identity.url == url
        assert self.ask(identity)[0] == 200


class test_Authority:

    secret = {'grant_type': GRANT_TYPE, 'client_id': CLIENT_ID, 'scope': SCOPE, 'client_secret': 'secret'}
    assertion = {'client_secret': '', 'client_assertion': 'signed', 'client_assertion_type': ASSERTION_TYPE}

    def ask(self, authority, form, tenant=TENANT):
        return ask(f'{authority.url}/{tenant}/oauth2/v2.0/token', form=form, certificates=authority.certificates)

    def check(self, authority, credential, *parameters):
        """The credential gets a token, and has sent `parameters` for it."""
        with credential:
            claims = read_claims(credential.get_token(SCOPE).token)
        assert (claims['appid'], claims['tid'], claims['aud']) == (CLIENT_ID, authority.tenant, AUDIENCE)
        assert set(parameters) <= set(authority.requests[-1].parameters)

    def test_takes_a_secret_from_the_environment(self, authority, monkeypatch):
        monkeypatch.setenv('AZURE_CLIENT_ID', CLIENT_ID)
        monkeypatch.setenv('AZURE_CLIENT_SECRET', 'secret')
        self.check(authority, EnvironmentCredential(disable_instance_discovery=True), 'client_secret')

    def test_takes_a_certificate(self, authority):
        credential = CertificateCredential(
            TENANT, CLIENT_ID, str(authority.certificates.client), disable_instance_discovery=True)
        self.check(authority, credential, 'client_assertion')

    def test_takes_a_federated_token(self, authority, tmp_path):
        (tmp_path / 'token').write_text('federated')
        credential = WorkloadIdentityCredential(
            client_id=CLIENT_ID, token_file_path=str(tmp_path / 'token'), disable_instance_discovery=True)
        self.check(authority, credential, 'client_assertion')

    def test_has_no_tenant_but_its_own(self, authority):
        credential = CertificateCredential(
            'alien', CLIENT_ID, str(authority.certificates.client), disable_instance_discovery=True)
        with credential, pytest.raises(ClientAuthenticationError, match='/alien'):
            credential.get_token(SCOPE)
        assert self.ask(authority, self.secret, tenant='alien')[0] == 400

    @pytest.mark.parametrize('form', [secret, secret | assertion])
    def test_gives_a_token(self, form, authority):
        status, answer = self.ask(authority, form)
        assert status == 200
        assert read_claims(answer['access_token'])['appid'] == CLIENT_ID

    @pytest.mark.parametrize(('form', 'code'), [
        (secret | {'grant_type': 'password'}, 'AADSTS70003'),
        (secret | {'client_id': ''}, 'AADSTS900144'),
        (secret | {'scope': AUDIENCE}, 'AADSTS900144'),
        (secret | {'client_secret': ''}, 'AADSTS7000218'),
        (secret | assertion | {'client_assertion_type': 'other'}, 'AADSTS7000218'),
    ])
    def test_refuses_incomplete_requests(self, form, code, authority):
        status, answer = self.ask(authority, form)
        assert status >= 400
        assert answer['error_description'].startswith(code)

    def test_refuses_tokens_when_told_to(self, authority):
        authority.status = 503
        assert self.ask(authority, self.secret)[0] == 503

    def test_is_not_trusted_without_its_bundle(self, authority):
        with pytest.raises(urllib.error.URLError, match='CERTIFICATE_VERIFY_FAILED'):
            ask(authority.url)

    def test_is_reached_by_name_too(self, authority):
        url = f'{authority.url.replace(HOST, "localhost")}/nowhere'
        assert ask(url, certificates=authority.certificates)[0] == 400
