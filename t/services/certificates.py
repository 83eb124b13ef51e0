"""A throwaway certificate authority, and what it signs."""
from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: What the server's certificate is good for.
SERVER_NAMES = x509.SubjectAlternativeName([
    x509.DNSName('localhost'),
    x509.IPAddress(ipaddress.ip_address('127.0.0.1')),
    x509.IPAddress(ipaddress.ip_address('::1')),
])

#: What the authority's key may be used for; Python 3.13 wants to know.
MAY_SIGN = x509.KeyUsage(
    key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)

LIFETIME = timedelta(days=2)


@dataclass(frozen=True)
class Certificates:
    """Where the files are, all in PEM.

    Attributes:
        bundle: The authority's certificate, for those who are to trust what it signed.
        server: The server's certificate, for 127.0.0.1, ::1 and localhost.
        server_key: Its key.
        client: Key and certificate of an application in one file, as azure-identity reads them.
    """

    bundle: Path
    server: Path
    server_key: Path
    client: Path

    @property
    def environ(self) -> dict[str, str]:
        """The environment variable that makes requests, and so the Azure SDK, trust the server."""
        return {'REQUESTS_CA_BUNDLE': str(self.bundle)}


def make_certificates(directory: Path) -> Certificates:
    """Make an authority and its certificates in `directory`. The authority's own key is not kept."""
    files = Certificates(*(directory / name for name in ('ca.pem', 'server.pem', 'server.key', 'client.pem')))
    authority_key, server_key, client_key = _make_key(), _make_key(), _make_key()
    authority = _name('Throwaway authority')
    certificate = _sign(authority, authority_key, authority, authority_key,
                        x509.BasicConstraints(ca=True, path_length=0), MAY_SIGN)
    files.bundle.write_bytes(_pem(certificate))
    server = _sign(_name('localhost'), server_key, authority, authority_key,
                   SERVER_NAMES, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]))
    files.server.write_bytes(_pem(server))
    files.server_key.write_bytes(_key_pem(server_key))
    client = _sign(_name('Application'), client_key, authority, authority_key)
    files.client.write_bytes(_key_pem(client_key) + _pem(client))
    return files


#: Extensions that nobody may overlook.
CRITICAL = (x509.BasicConstraints, x509.KeyUsage)


def _make_key() -> rsa.RSAPrivateKey:
    # RSA, since azure-identity signs with nothing else.
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _sign(subject: x509.Name, key: rsa.RSAPrivateKey, issuer: x509.Name, issuer_key: rsa.RSAPrivateKey,
          *extensions: x509.ExtensionType) -> x509.Certificate:
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - LIFETIME, now + LIFETIME)
    # Python 3.13 takes no certificate without the two identifiers.
    identifiers = (x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                   x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()))
    for extension in (*identifiers, *extensions):
        builder = builder.add_extension(extension, critical=isinstance(extension, CRITICAL))
    return builder.sign(issuer_key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
