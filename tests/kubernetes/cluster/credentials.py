"""Keys and certificates: by them the programs know each other, and Kubernetes knows who asks."""

import base64
import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID = datetime.timedelta(days=365)


class Authority:
    """Signs certificates into one folder, each made once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True, mode=0o700)
        self._folder = folder
        if not self.certificate.exists():
            self._write("authority", "utaforge tests", None, ())

    @property
    def certificate(self) -> Path:
        """What to trust."""
        return self._folder / "authority.crt"

    def issue(self, name: str, user: str, group: str | None = None, addresses: tuple[str, ...] = ()) -> Path:
        """``NAME.crt`` beside ``NAME.key``: for ``user`` of ``group``, and for a server at ``addresses``."""
        if not (self._folder / f"{name}.crt").exists():
            self._write(name, user, group, addresses)
        return self._folder / f"{name}.crt"

    def kubeconfig(self, path: Path, server: str, user: str, group: str | None = None) -> Path:
        """A file by which ``user`` reaches the API server."""
        if path.exists():
            return path
        certificate = self.issue(path.name, user, group)

        def text(file: Path) -> str:
            return base64.b64encode(file.read_bytes()).decode()

        name = "utaforge-test"
        who = {
            "client-certificate-data": text(certificate),
            "client-key-data": text(certificate.with_suffix(".key")),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": name, "cluster": {"server": server, "certificate-authority-data": text(self.certificate)}}
            ],
            "users": [{"name": name, "user": who}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=1))
        return path

    def _write(self, name: str, user: str, group: str | None, addresses: tuple[str, ...]) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, user)]
        if group:
            subject.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
        is_root = name == "authority"
        signer = key if is_root else self._root_key()
        usage = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(x509.Name(subject) if is_root else self._root().subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if addresses:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(a) for a in addresses]), False)
        signed = builder.sign(signer, hashes.SHA256())
        secret = self._folder / f"{name}.key"
        secret.touch(mode=0o600)
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        (self._folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _root(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.certificate.read_bytes())

    def _root_key(self) -> ec.EllipticCurvePrivateKey:
        key = serialization.load_pem_private_key((self._folder / "authority.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def _alternative(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
