"""Access tokens for Azure Storage that are signed by nobody; Azurite's ``--oauth basic`` takes them.

It checks the form, the times, that the issuer begins with one of Microsoft Entra's addresses, and the audience.
"""
from __future__ import annotations

import base64
import json
import time
from typing import Any

TENANT = '3f0c4a52-6f43-4d0e-9d27-5a7b8b6f1c11'
CLIENT_ID = '8d0b7a7e-2f0a-4c58-9a63-0c7f5d1be2a4'
OBJECT_ID = 'c5a1c7d0-58b4-4a0b-8d2f-7a60be9c3e55'
AUDIENCE = 'https://storage.azure.com'

#: Seconds that a token is good for, unless said otherwise.
LIFETIME = 3600


def make_token(*, tenant: str = TENANT, client_id: str = CLIENT_ID, object_id: str = OBJECT_ID,
               audience: str = AUDIENCE, issuer: str | None = None, lifetime: int = LIFETIME) -> str:
    """Return an unsigned JSON Web Token.

    Arguments:
        tenant: The tenant that it is for.
        client_id: The application, or managed identity, that it is for.
        object_id: The same one's object id.
        audience: The service that it is meant for.
        issuer: Who gave it; by default Microsoft Entra, for `tenant`.
        lifetime: Seconds until it expires; of an expired one, negative.
    """
    now = int(time.time())
    claims = {
        'aud': audience, 'iss': issuer or f'https://sts.windows.net/{tenant}/', 'tid': tenant, 'appid': client_id,
        'oid': object_id, 'iat': now - LIFETIME, 'nbf': now - LIFETIME, 'exp': now + lifetime,
    }
    return f'{_encode({"alg": "none", "typ": "JWT"})}.{_encode(claims)}.'


def read_claims(token: str) -> dict[str, Any]:
    """Return what a token claims, unchecked."""
    part = token.split('.')[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + '=' * (-len(part) % 4)))
    return claims


def _encode(part: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b'=').decode()
