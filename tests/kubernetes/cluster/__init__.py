"""A real Kubernetes with KubeRay, a registry and an S3 server on one Linux machine, for the tests.

Kubernetes is a handful of programs, and all of them run here as ordinary processes:

==============================  ==================================================================================
etcd                            keeps every object
kube-apiserver                  the only door to etcd; what ``kubectl`` and everybody else talks to
kube-controller-manager         makes pods of Jobs, of Deployments and so on
kube-scheduler                  chooses a node for each pod
kubelet                         the node: starts the pods' containers, through containerd
kube-proxy                      makes services' addresses work, by iptables
coredns                         names of services
ray-operator                    KubeRay: makes Ray clusters of RayJobs
kwok                            plays nodes that do not exist, such as those with GPUs
registry, versitygw, dockerd    images, S3, and ``docker build``
==============================  ==================================================================================

They live in a network and a mount namespace of their own (``sandbox.py``), so bridges, mounts and iptables rules never
show outside and vanish with the last process. One device leads in: through it this machine reaches the API server,
the registry, the S3 server and every pod. Files are in one folder (``layout.py``); programs come from Debian's
packages and from Go modules with pinned sums (``install.py``).

``python -m tests.kubernetes.cluster up | down | status | env``
"""
