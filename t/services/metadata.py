"""The endpoint that gives a managed identity its tokens, as virtual machines and Kubernetes nodes have it."""
from __future__ import annotations

from .server import Answer, Request, TokenServer
from .tokens import CLIENT_ID, OBJECT_ID

PATH = '/metadata/identity/oauth2/token'
API_VERSION = '2018-02-01'


class MetadataService(TokenServer):
    """Azure's Instance Metadata Service, which azure-identity looks for at 169.254.169.254 unless told otherwise.

    A request says which identity is meant: by ``client_id``, ``object_id``, ``msi_res_id`` (its resource id), or by
    none of them, for the one that the system has.

    Source: https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token
    """

    @property
    def environ(self) -> dict[str, str]:
        """The environment variable by which azure-identity finds it."""
        return super().environ | {'AZURE_POD_IDENTITY_AUTHORITY_HOST': self.url}

    def answer(self, request: Request) -> Answer:
        """Return a token for the identity that is asked for."""
        asked = request.parameters
        if self.status:
            return self.refuse(self.status, 'Identity not found')
        if request.path != PATH or request.headers.get('Metadata') != 'true':
            return self.refuse(400, 'Required metadata header not specified')
        if asked.get('api-version') != API_VERSION or 'resource' not in asked:
            return self.refuse(400, f'resource and api-version {API_VERSION} are wanted')
        token = self.make_token(audience=asked['resource'], client_id=asked.get('client_id', CLIENT_ID),
                                object_id=asked.get('object_id', OBJECT_ID))
        return 200, {'access_token': token, 'expires_in': str(self.lifetime), 'resource': asked['resource'],
                     'token_type': 'Bearer'}

    def refuse(self, status: int, reason: str) -> Answer:
        """Return a refusal as the metadata service words it."""
        return status, {'error': 'invalid_request', 'error_description': reason}
