"""The endpoint that gives a managed identity its tokens, as Azure App Service has it."""
from __future__ import annotations

import time

from .server import Answer, Request, TokenServer
from .tokens import CLIENT_ID, OBJECT_ID

API_VERSION = '2019-08-01'


class IdentityEndpoint(TokenServer):
    """Speaks the protocol of App Service, which azure-identity finds through two environment variables.

    A request says which identity is meant: by ``client_id``, ``object_id``, ``mi_res_id`` (its resource id), or none
    of them, for the one that the system has.

    Source: https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference
    """

    #: The value that callers must send in the header X-IDENTITY-HEADER.
    secret = 'header-of-the-identity-endpoint'

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables by which azure-identity finds it."""
        return super().environ | {'IDENTITY_ENDPOINT': f'{self.url}/msi/token', 'IDENTITY_HEADER': self.secret}

    def answer(self, request: Request) -> Answer:
        """Return a token for the identity that is asked for."""
        asked = request.parameters
        if self.status:
            return self.refuse(self.status, 'no token for anybody')
        if request.headers.get('X-IDENTITY-HEADER') != self.secret:
            return self.refuse(401, 'the header X-IDENTITY-HEADER is missing or wrong')
        if asked.get('api-version') != API_VERSION or 'resource' not in asked:
            return self.refuse(400, f'resource and api-version {API_VERSION} are wanted')
        client_id = asked.get('client_id', CLIENT_ID)
        token = self.make_token(audience=asked['resource'], client_id=client_id,
                                object_id=asked.get('object_id', OBJECT_ID))
        return 200, {'access_token': token, 'expires_on': str(int(time.time()) + self.lifetime),
                     'resource': asked['resource'], 'token_type': 'Bearer', 'client_id': client_id}

    def refuse(self, status: int, reason: str) -> Answer:
        """Return a refusal as App Service words it."""
        return status, {'statusCode': status, 'message': reason}
