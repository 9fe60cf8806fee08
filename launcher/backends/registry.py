"""Whether an image can be pulled: asks its registry for the manifest, as a node would.

Reference: https://distribution.github.io/distribution/spec/api/ and https://distribution.github.io/distribution/spec/auth/token/.
"""

import base64
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.render import inside

Answer = Literal["there", "missing", "denied", "unknown"]
SECONDS = 5.0
_KINDS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)


@dataclass(frozen=True)
class Reference:
    """An image's name, taken apart.

    Attributes:
        host: of the registry.
        path: of the repository there.
        version: tag or digest.
    """

    host: str
    path: str
    version: str


def reference(image: str) -> Reference:
    """``ghcr.io/you/utaforge:1.0`` taken apart; without a registry it is Docker Hub's, without a tag ``latest``."""
    name, at, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    host = first if slash and re.search(r"[.:]|^localhost$", first) else ""
    path, colon, tag = (rest if host else name).partition(":")
    if host in ("", "docker.io"):
        host, path = "registry-1.docker.io", path if "/" in path else f"library/{path}"
    return Reference(host, path, digest if at else tag if colon else "latest")


def look(image: str, logins: Mapping[str, str] | None = None) -> Answer:
    """Whether the registry has ``image`` for those who have ``logins``.

    Args:
        image: its name.
        logins: registry's host → base64 of ``user:password``.

    Returns:
        ``unknown`` where the registry cannot be reached from here: a node may.
    """
    wanted = reference(image)
    login = (logins or {}).get(wanted.host)
    for scheme in ("https", "http"):
        try:
            return _ask(f"{scheme}://{wanted.host}/v2/{wanted.path}/manifests/{wanted.version}", login)
        except (OSError, http.client.HTTPException, ValueError):
            continue
    return "unknown"


def logins_of(secrets: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Host → login, from pull secrets (``kubernetes.io/dockerconfigjson``)."""
    found: dict[str, str] = {}
    for secret in secrets:
        data = base64.b64decode(inside(secret, "data", ".dockerconfigjson") or "e30=")
        auths: dict[str, Any] = inside(json.loads(data), "auths") or {}
        for host, entry in auths.items():
            login = entry.get("auth") or base64.b64encode(f"{entry['username']}:{entry['password']}".encode()).decode()
            found[re.sub(r"^https?://|/.*$", "", host)] = login
    return found


def _ask(url: str, login: str | None) -> Answer:
    code, challenge = _head(url, None)
    if code == http.HTTPStatus.UNAUTHORIZED:
        code, _ = _head(url, _authorization(challenge, login))
    if code == http.HTTPStatus.OK:
        return "there"
    if code == http.HTTPStatus.NOT_FOUND:
        return "missing"
    return "denied" if code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN) else "unknown"


def _head(url: str, authorization: str | None) -> tuple[int, str]:
    headers = {"Accept": _KINDS, **({"Authorization": authorization} if authorization else {})}
    request = urllib.request.Request(url, headers=headers, method="HEAD")  # noqa: S310  (http or https, made above)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("WWW-Authenticate", "")


def _authorization(challenge: str, login: str | None) -> str | None:
    """What the registry's challenge asks for: the login itself, or a token that its server gives for it."""
    basic = f"Basic {login}" if login else None
    if not challenge.lower().startswith("bearer"):
        return basic
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    url = f"{asked['realm']}?service={asked.get('service', '')}&scope={asked.get('scope', '')}"
    if not url.startswith(("https://", "http://")):
        return None
    request = urllib.request.Request(url, headers={"Authorization": basic} if basic else {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            told = json.loads(answer.read())
    except urllib.error.HTTPError:
        return None
    return f"Bearer {told.get('token') or told.get('access_token')}"
