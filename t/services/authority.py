"""The token endpoint of Microsoft Entra, for applications: with a secret, a certificate or a federated token."""
from __future__ import annotations

from collections.abc import Mapping

from .server import Answer, Request, TokenServer

GRANT_TYPE = 'client_credentials'
ASSERTION_TYPE = 'urn:ietf:params:oauth:client-assertion-type:jwt-bearer'


class Authority(TokenServer):
    """Serves one tenant, over HTTPS: azure-identity takes no authority over HTTP.

    Credentials want ``disable_instance_discovery=True`` with it, since msal otherwise asks Microsoft about it first.

    Source: https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
    """

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables by which azure-identity finds authority and tenant."""
        return super().environ | {'AZURE_AUTHORITY_HOST': self.url, 'AZURE_TENANT_ID': self.tenant}

    def answer(self, request: Request) -> Answer:
        """Return the tenant's configuration or a token."""
        tenant, _, endpoint = request.path.strip('/').partition('/')
        if tenant != self.tenant:
            return self.refuse(400, f'AADSTS90002: there is no tenant {tenant!r}')
        if endpoint == 'v2.0/.well-known/openid-configuration':
            return 200, self._configuration()
        if endpoint == 'oauth2/v2.0/token':
            return self._grant(request.parameters)
        return self.refuse(404, f'there is nothing at {request.path}')

    def refuse(self, status: int, reason: str) -> Answer:
        """Return a refusal as Microsoft Entra words it."""
        return status, {'error': 'invalid_request', 'error_description': reason}

    def _configuration(self) -> dict[str, object]:
        tenant = f'{self.url}/{self.tenant}'
        return {'issuer': f'{tenant}/v2.0', 'authorization_endpoint': f'{tenant}/oauth2/v2.0/authorize',
                'token_endpoint': f'{tenant}/oauth2/v2.0/token'}

    def _grant(self, form: Mapping[str, str]) -> Answer:
        if self.status:
            return self.refuse(self.status, 'no token for anybody')
        if form.get('grant_type') != GRANT_TYPE:
            return self.refuse(400, f'AADSTS70003: the grant type must be {GRANT_TYPE}')
        if not form.get('client_id') or not form.get('scope', '').endswith('/.default'):
            return self.refuse(400, 'AADSTS900144: client_id and a scope that ends in /.default are wanted')
        if not form.get('client_secret') and not _has_assertion(form):
            return self.refuse(401, 'AADSTS7000218: client_secret or client_assertion is wanted')
        token = self.make_token(audience=form['scope'].removesuffix('/.default'), client_id=form['client_id'])
        return 200, {'access_token': token, 'expires_in': self.lifetime, 'token_type': 'Bearer'}


def _has_assertion(form: Mapping[str, str]) -> bool:
    return bool(form.get('client_assertion')) and form.get('client_assertion_type') == ASSERTION_TYPE
