"""The cluster's programs with their settings, in the order in which they need each other."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

from .credentials import Authority
from .layout import Layout
from .programs import Program, command, web

NODE = "utaforge"
S3_ACCESS_KEY, S3_SECRET_KEY = "utaforge", "utaforge-secret"
REGISTRY_USER, REGISTRY_PASSWORD = "utaforge", "utaforge"
REGISTRY_PASSWORD_BCRYPT = "$2b$05$Fke7pNpZkoscbXCUJRPeAuPD5jmQ78gyHut8teVE3UwbV88Hhio7u"
PAUSE_IMAGE = "pause:1"
KWOK_STAGES = (
    "node/fast/node-initialize",
    "node/heartbeat-with-lease/node-heartbeat-with-lease",
    "pod/fast/pod-ready",
    "pod/fast/pod-complete",
    "pod/fast/pod-delete",
)
OPERATOR = "kuberay-operator"


def stages(layout: Layout) -> list[list[Program]]:
    """Programs by stage: each needs those before."""
    authority = Authority(layout.state / "keys")
    authority.kubeconfig(layout.kubeconfig, layout.api, "admin", "system:masters")

    def kubeconfig(name: str, user: str, group: str | None = None) -> Path:
        return authority.kubeconfig(layout.state / f"{name}.kubeconfig", layout.api, user, group)

    return [
        [
            _etcd(layout),
            _containerd(layout),
            _registry(layout),
            _private_registry(layout),
            _dockerd(layout),
        ],
        [_api_server(layout, authority), _s3(layout)],
        [
            _controller_manager(layout, authority, kubeconfig),
            _scheduler(layout, kubeconfig),
            _kubelet(layout, authority, kubeconfig),
            _proxy(layout, kubeconfig),
            _coredns(layout),
        ],
    ]


def operators(layout: Layout) -> list[Program]:
    """What watches objects of the API server that have to be there first."""
    authority = Authority(layout.state / "keys")
    config = authority.kubeconfig(layout.state / "ray-operator.kubeconfig", layout.api, OPERATOR)
    ray = (
        layout.programs / "ray-operator",
        f"-kubeconfig={config}",
        "-use-kubernetes-proxy",
        "-enable-leader-election=false",
        f"-metrics-addr={layout.node}:8090",
        f"-health-probe-bind-address={layout.node}:8091",
    )
    stages = layout.programs / "kwok-manifests"
    kwok = (
        layout.programs / "kwok",
        f"--kubeconfig={layout.kubeconfig}",
        *(f"--config={stages}/{name}.yaml" for name in KWOK_STAGES),
        "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
        "--node-lease-duration-seconds=40",  # without leases Kubernetes takes a node for lost after 50 seconds
        f"--server-address={layout.node}:8092",
    )
    return [
        Program("ray-operator", ray, web(f"http://{layout.node}:8091/readyz")),
        Program("kwok", kwok, web(f"http://{layout.node}:8092/healthz")),
    ]


def _etcd(layout: Layout) -> Program:
    argv = (
        "etcd",
        f"--data-dir={layout.state}/etcd",
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        f"--listen-metrics-urls=http://{layout.node}:2381",
    )
    return Program("etcd", argv, web(f"http://{layout.node}:2381/health"))


def _containerd(layout: Layout) -> Program:
    state = layout.state
    config = f"""
        version = 2
        root = "{layout.images}/containerd"
        state = "{state}/containerd-state"
        [grpc]
          address = "{layout.containerd}"
        [plugins."io.containerd.grpc.v1.cri"]
          sandbox_image = "{layout.registry}/{PAUSE_IMAGE}"
          restrict_oom_score_adj = true
          netns_mounts_under_state_dir = true
          [plugins."io.containerd.grpc.v1.cri".cni]
            bin_dir = "/usr/lib/cni"
            conf_dir = "{state}/cni"
          [plugins."io.containerd.grpc.v1.cri".registry]
            config_path = "{state}/registries"
        [plugins."io.containerd.internal.v1.opt"]
          path = "{state}/containerd-opt"
        """
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": f"{state}/cni-addresses",
                    "ranges": [[{"subnet": layout.subnet, "rangeStart": layout.address(16), "gateway": layout.node}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    _write(state / "cni" / "10-pods.conflist", json.dumps(network))
    for registry in (layout.registry, layout.private_registry):
        hosts = f'server = "http://{registry}"\n[host."http://{registry}"]\n'
        _write(state / "registries" / registry / "hosts.toml", hosts)
    path = _write(state / "containerd.toml", config)
    return Program("containerd", ("containerd", "--config", path), command("ctr", "-a", layout.containerd, "version"))


def _registry(layout: Layout) -> Program:
    config = f"""
        version: 0.1
        log: {{level: warn}}
        storage:
          filesystem: {{rootdirectory: {layout.images}/registry}}
          delete: {{enabled: true}}
        http: {{addr: "{layout.registry}"}}
        """
    path = _write(layout.state / "registry.yaml", config)
    return Program("registry", ("docker-registry", "serve", path), web(f"http://{layout.registry}/v2/"))


def _private_registry(layout: Layout) -> Program:
    users = _write(layout.state / "registry-users", f"{REGISTRY_USER}:{REGISTRY_PASSWORD_BCRYPT}\n")
    config = f"""
        version: 0.1
        log: {{level: warn}}
        storage:
          filesystem: {{rootdirectory: {layout.images}/registry}}
        http: {{addr: "{layout.private_registry}"}}
        auth:
          htpasswd: {{realm: utaforge, path: {users}}}
        """
    path = _write(layout.state / "private-registry.yaml", config)
    healthy = web(f"http://{layout.private_registry}/v2/", status=401)
    return Program("private-registry", ("docker-registry", "serve", path), healthy)


def _s3(layout: Layout) -> Program:
    for folder in ("objects", "attributes"):
        (layout.state / folder).mkdir(exist_ok=True)
    argv = (
        layout.programs / "versitygw",
        f"--port={layout.node}:7070",
        f"--access={S3_ACCESS_KEY}",
        f"--secret={S3_SECRET_KEY}",
        "--region=us-east-1",
        "--health=/health",
        "--quiet",
        "posix",
        f"--sidecar={layout.state}/attributes",
        layout.state / "objects",
    )
    return Program("versitygw", argv, web(f"{layout.s3}/health"))


def _dockerd(layout: Layout) -> Program:
    argv = (
        "/usr/sbin/dockerd",
        f"--host={layout.docker}",
        f"--data-root={layout.images}/docker",
        f"--exec-root={layout.state}/docker",
        f"--pidfile={layout.state}/dockerd.pid",
        f"--cgroup-parent=/{layout.name}/docker",
        f"--insecure-registry={layout.subnet}",
        "--iptables=false",
        "--bridge=none",
    )
    return Program("dockerd", argv, command("/usr/bin/docker", "-H", layout.docker, "version"), network=False)


def _api_server(layout: Layout, authority: Authority) -> Program:
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    serving = authority.issue("api-server", "kube-apiserver", addresses=(*names, layout.node, layout.api_service))
    client = authority.issue("api-server-client", "kube-apiserver-kubelet-client", "system:masters")
    accounts = authority.issue("service-accounts", "service-accounts").with_suffix(".key")
    argv = (
        layout.programs / "kube-apiserver",
        f"--bind-address={layout.node}",
        f"--advertise-address={layout.node}",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--service-cluster-ip-range={layout.services}",
        f"--client-ca-file={authority.certificate}",
        f"--tls-cert-file={serving}",
        f"--tls-private-key-file={serving.with_suffix('.key')}",
        f"--kubelet-certificate-authority={authority.certificate}",
        f"--kubelet-client-certificate={client}",
        f"--kubelet-client-key={client.with_suffix('.key')}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={accounts}",
        f"--service-account-signing-key-file={accounts}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
    )
    return Program("kube-apiserver", argv, web(f"{layout.api}/readyz"))


Kubeconfig = Callable[..., Path]


def _controller_manager(layout: Layout, authority: Authority, kubeconfig: Kubeconfig) -> Program:
    accounts = authority.issue("service-accounts", "service-accounts").with_suffix(".key")
    argv = (
        layout.programs / "kube-controller-manager",
        f"--kubeconfig={kubeconfig('controller-manager', 'system:kube-controller-manager')}",
        f"--bind-address={layout.node}",
        "--leader-elect=false",
        f"--root-ca-file={authority.certificate}",
        f"--service-account-private-key-file={accounts}",
        "--use-service-account-credentials=true",
        "--resource-quota-sync-period=5s",  # else a quota of RayJobs made right after their CRD is unknown for minutes
    )
    return Program("kube-controller-manager", argv, web(f"https://{layout.node}:10257/healthz"))


def _scheduler(layout: Layout, kubeconfig: Kubeconfig) -> Program:
    argv = (
        layout.programs / "kube-scheduler",
        f"--kubeconfig={kubeconfig('scheduler', 'system:kube-scheduler')}",
        f"--bind-address={layout.node}",
        "--leader-elect=false",
    )
    return Program("kube-scheduler", argv, web(f"https://{layout.node}:10259/healthz"))


def _kubelet(layout: Layout, authority: Authority, kubeconfig: Kubeconfig) -> Program:
    serving = authority.issue("kubelet", f"system:node:{NODE}", "system:nodes", (NODE, layout.node))
    resolver = _write(layout.state / "resolv.conf", f"nameserver {layout.node}\n")
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": layout.node,
        "healthzBindAddress": layout.node,
        "tlsCertFile": str(serving),
        "tlsPrivateKeyFile": str(serving.with_suffix(".key")),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.name}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{layout.containerd}",
        "clusterDNS": [layout.node],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolver),
        "readOnlyPort": 0,
        "registryPullQPS": 0,
        "serializeImagePulls": False,
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
    }
    path = _write(layout.state / "kubelet.json", json.dumps(config))
    argv = (
        layout.programs / "kubelet",
        f"--config={path}",
        f"--kubeconfig={kubeconfig('kubelet', f'system:node:{NODE}', 'system:nodes')}",
        f"--hostname-override={NODE}",
        f"--node-ip={layout.node}",
    )
    return Program("kubelet", argv, web(f"http://{layout.node}:10248/healthz"))


def _proxy(layout: Layout, kubeconfig: Kubeconfig) -> Program:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(kubeconfig("proxy", "system:kube-proxy"))},
        "hostnameOverride": NODE,
        "bindAddress": layout.node,
        "healthzBindAddress": f"{layout.node}:10256",
        "metricsBindAddress": f"{layout.node}:10249",
        "mode": "iptables",
        "clusterCIDR": layout.subnet,
        "iptables": {"masqueradeAll": True},  # else answers of pods on the same bridge bypass the translation back
        "conntrack": {"maxPerCore": 0},
    }
    path = _write(layout.state / "proxy.json", json.dumps(config))
    return Program(
        "kube-proxy", (layout.programs / "kube-proxy", f"--config={path}"), web(f"http://{layout.node}:10256/healthz")
    )


def _coredns(layout: Layout) -> Program:
    config = f"""
        .:53 {{
            bind {layout.node}
            errors
            health {layout.node}:8080
            ready {layout.node}:8181
            kubernetes cluster.local in-addr.arpa {{
                kubeconfig {layout.kubeconfig}
                ttl 5
            }}
        }}
        """
    path = _write(layout.state / "Corefile", config)
    return Program("coredns", (layout.programs / "coredns", "-conf", path), web(f"http://{layout.node}:8181/ready"))


def _write(path: Path, text: str) -> Path:
    text = textwrap.dedent(text).lstrip()
    if not path.exists() or path.read_text() != text:  # kube-proxy ends when its file is written again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path
