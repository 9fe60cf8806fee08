"""A Kubernetes API server: paths in, plain values out, and every refusal in words that people can act on.

Reference: https://kubernetes.io/docs/reference/using-api/api-concepts/.
"""

import binascii
import importlib
import json
import logging
import os
import re
import sys
import time
import types
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from trainer.spec.errors import ClusterError

log = logging.getLogger(__name__)
TIMEOUT = (5.0, 30.0)
"""Seconds to connect, and to answer."""
PATIENCE_SECONDS = 20.0
"""How long a server that is overloaded or unreachable is tried again."""
_PASSING = (429, 500, 502, 503, 504)
Json = dict[str, Any]


class Refused(ClusterError):
    """The server answered, and not with what was asked for.

    Args:
        code: of HTTP.
    """

    def __init__(self, code: int, problem: str, cure: str) -> None:
        super().__init__(problem, cure)
        self.code = code

    @property
    def passing(self) -> bool:
        """Whether it may answer otherwise in a moment: it is overloaded, or has not counted for a new quota yet."""
        return self.code in _PASSING or "status unknown for quota" in self.problem

    @property
    def lacks_right(self) -> str | None:
        """What the account may not do: ``get secrets``; None if it is something else that was refused."""
        said = re.search(r'cannot (\w+) resource "([^"]+)"', self.problem)
        return f"{said[1]} {said[2]}" if said and self.code == HTTPStatus.FORBIDDEN else None


class Api:
    """One API server, by kubeconfig or from inside its cluster.

    Args:
        context: of the kubeconfig; None: its current one, or, where there is no kubeconfig, the cluster around us.
        patience: seconds for which a server that does not answer is tried again.

    Attributes:
        context: the one in use; None inside the cluster.
        server: its address.
        now: its clock at its last answer, seconds since 1970; None before that.

    Raises:
        ClusterError: there is no such context, or no cluster is known here.
    """

    def __init__(self, context: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        client, config = _official()
        settings = client.Configuration()
        settings.retries = False
        self.context = _configure(config, settings, context)
        self.server = str(settings.host)
        self.now: float | None = None
        self._patience = patience
        self._settings, self._transport = settings, client.rest.RESTClientObject(settings)

    def get(self, path: str, **query: str) -> Json | None:
        """What is at ``path``; None if nothing is."""
        try:
            return self._ask("GET", path, query)
        except Refused as refused:
            if refused.code == 404:
                return None
            raise

    def text(self, path: str, **query: str) -> str:
        """The plain text at ``path``: a log."""
        return self._request("GET", path, query, None).decode("utf-8", "replace")

    def list(self, path: str, **query: str) -> list[Json]:
        """The items of the collection at ``path``; none if there is no such collection."""
        return list((self.get(path, **query) or {}).get("items") or ())

    def create(self, path: str, body: Mapping[str, Any], **query: str) -> Json | None:
        """Make an object, with no field that the server does not know; None if one of that name is there already."""
        try:
            return self._ask("POST", path, {"fieldValidation": "Strict", **query}, body)
        except Refused as refused:
            if refused.code == 409 and "already exists" in refused.problem:
                return None
            raise

    def delete(self, path: str) -> None:
        """Delete an object and, after it, what it owns; it may be gone already."""
        try:
            self._ask("DELETE", path, {"propagationPolicy": "Background"})
        except Refused as refused:
            if refused.code != 404:
                raise

    def _ask(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None = None) -> Json:
        begun, pause = time.monotonic(), 0.2
        while True:
            try:
                return self._once(method, path, query, body)
            except Refused as refused:
                if not refused.passing or time.monotonic() - begun > self._patience:
                    raise
                failure = refused.problem
            except ClusterError as unreachable:
                if time.monotonic() - begun > self._patience:
                    raise
                failure = unreachable.problem
            log.debug("asking again: %s", failure)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _once(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None) -> Json:
        return _decoded(self._request(method, path, query, body))

    def _request(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None) -> bytes:
        import urllib3

        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        headers |= {each["key"]: each["value"] for each in self._settings.auth_settings().values()}
        url = f"{self.server}{quote(path)}?{urlencode(query)}"
        try:
            answer = self._transport.pool_manager.request(
                method,
                url,
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(*TIMEOUT),
                retries=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from None
        if date := answer.headers.get("Date"):
            self.now = parsedate_to_datetime(date).timestamp()
        if answer.status >= 400:
            told = _decoded(answer.data).get("message")
            raise self._refusal(answer.status, str(told or "no reason given"), path)
        return answer.data

    def _refusal(self, code: int, message: str, path: str) -> Refused:
        for pattern, cure in _CURES:
            if re.search(pattern, f"{code} {message}"):
                return Refused(code, f"the Kubernetes at {self.server} refused: {message}", cure)
        return Refused(code, f"the Kubernetes at {self.server} answered {code} to {path}: {message}", "see its logs")

    def _unreachable(self, error: Exception) -> ClusterError:
        expired = re.search("certificate|PEM", str(error), re.IGNORECASE)
        return ClusterError(
            f"the Kubernetes at {self.server} cannot be reached: {_reason(error)}",
            "its certificate or yours does not fit: get a new kubeconfig from whoever runs it"
            if expired
            else "see that it runs and can be reached from here (kubectl version); cluster.context names another one",
        )


_CURES = (
    (r"^401", "your credentials have expired or are wrong: log in again, until kubectl get pods works"),
    (r"^403 .*exceeded quota", "ask for more in the namespace's ResourceQuota, or take fewer cluster.workers"),
    (r"^403 .*status unknown for quota", "a new ResourceQuota is not counted for yet: try again in 5 minutes"),
    (r"^403 .*violates PodSecurity", "the namespace wants something else than pods without rights: report this"),
    (r"^403", "whoever runs this cluster has to give that right: k8s/base has the role of the launcher"),
    (r"^404 .*namespaces? .*not found", "create it, kubectl create namespace NAME, or correct cluster.namespace"),
    (r"^404", "the cluster lacks KubeRay: install its operator, version 1.6 or newer (https://docs.ray.io, KubeRay)"),
    (r"^400 .*unknown field", "the cluster's KubeRay is too old: it has to be 1.6 or newer, with its CRDs"),
    (r"^(400|422)", "this cluster wants something else: see the message; report it if the job is right"),
    (r"^409", "try again"),
    (r"^(429|5\d\d)", "the API server is overloaded or broken; try again in a minute"),
)
"""Code and message of a refusal → what to do about it; the first that fits."""


def _official() -> tuple[Any, Any]:
    """The official client's transport and its reading of kubeconfigs.

    Its packages import 700 generated models, which takes 2 seconds and serves nothing here; so they are entered past
    their ``__init__``.
    """
    found = find_spec("kubernetes")
    if found is None or not found.submodule_search_locations:
        raise ClusterError("the package kubernetes is not installed", "run: pip install 'utaforge[kubernetes]'")
    names = ("kubernetes", "kubernetes.client")
    if names[1] not in sys.modules:
        for name in names:
            package = types.ModuleType(name)
            package.__path__ = [str(Path(found.submodule_search_locations[0], *name.split(".")[1:]))]
            sys.modules[name] = package
    try:
        client: Any = sys.modules[names[1]]
        client.rest = importlib.import_module("kubernetes.client.rest")
        client.Configuration = importlib.import_module("kubernetes.client.configuration").Configuration
        client.ApiClient = getattr(client, "ApiClient", None)
        return client, importlib.import_module("kubernetes.config")
    finally:
        for name in names:
            if sys.modules[name].__spec__ is None:
                del sys.modules[name]


def _configure(config: Any, settings: Any, context: str | None) -> str | None:
    """Fill ``settings``; returns the context in use."""
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    readable = any(Path(name).expanduser().is_file() for name in files.split(os.pathsep))
    inside = "KUBERNETES_SERVICE_HOST" in os.environ
    if not readable and not (inside and context is None):
        raise ClusterError(
            f"no cluster is known here: there is no kubeconfig at {files}",
            "get one from whoever runs the cluster, and set KUBECONFIG to it",
        )
    try:
        if not readable:
            config.load_incluster_config(client_configuration=settings)
            return None
        _load(config, settings, files, context)
        return context or str(config.list_kube_config_contexts(files)[1]["name"])
    except Exception as error:  # noqa: BLE001  (the client meets a broken file with whatever comes first)
        raise ClusterError(
            f"the kubeconfig at {files} does not lead to a cluster: {_fault(error)}",
            "mend it, or get a new one, until kubectl get pods works; kubectl config get-contexts shows its contexts, "
            f"and cluster.context is {context or 'not given'}",
        ) from None


def _load(config: Any, settings: Any, files: str, context: str | None) -> None:
    """Read a kubeconfig; a plug-in for credentials that fails, which the client only logs, is an error."""
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    try:
        config.load_kube_config(files, context=context, client_configuration=settings)
    finally:
        logging.getLogger().removeHandler(listener)
    if told and not settings.api_key and not settings.cert_file:
        raise config.ConfigException(f"its plug-in gives no credentials: {told[-1]}")


def _fault(error: Exception) -> str:
    """What is wrong with a kubeconfig, without what it holds: the client and YAML quote its secrets."""
    if mark := getattr(error, "problem_mark", None):
        return f"line {mark.line + 1} is no YAML"
    if isinstance(error, binascii.Error):
        return f"a certificate or key in it is no base64: {error}"
    if isinstance(error, (AttributeError, KeyError, TypeError)):
        return "it has not the fields of a kubeconfig"
    return re.sub(r"/?\{.*", "", str(error), flags=re.DOTALL).strip() or type(error).__name__


def _decoded(data: bytes) -> Json:
    try:
        told: Json = json.loads(data)
    except ValueError:
        told = {"message": data.decode("utf-8", "replace").strip()[:300]}
    return told


def _reason(error: Exception) -> str:
    """Without what ``urllib3`` wraps around it."""
    return str(error).rpartition(": ")[2].strip() or type(error).__name__
