"""Why a run stands as it does: the likeliest cause first, each with the line that shows it and what to do about it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from statistics import median
from typing import Any

from launcher.backends.kubernetes import standing
from launcher.backends.kubernetes_api import Json
from launcher.backends.kubernetes_checks import has_labels, lets_in
from launcher.render import inside
from launcher.snapshot import Objects, Snapshot, waits_for_node, when

QUIET_SECONDS = 300.0
"""A run that trains and from which nothing is heard for so long, and for ten times its usual pause, hangs."""
UNSEEN_SECONDS = 30.0
"""KubeRay takes up a RayJob within a second where it runs at all."""
_GIVEN_BACK = "submitting the job again continues at the last checkpoint"


@dataclass(frozen=True)
class Cause:
    """One cause.

    Attributes:
        what: has happened, in a sentence.
        evidence: the line it was read from, with its place.
        cure: what to do about it.
    """

    what: str
    evidence: str
    cure: str

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def diagnose(seen: Snapshot) -> list[Cause]:
    """What keeps a run from going well, likeliest first; nothing if it is finished or goes well.

    A run that stands still for no reason known here gets a cause that says so, with what was last heard.
    """
    if seen.status.state == "finished":
        return []
    rules: tuple[Callable[[Snapshot], Iterator[Cause]], ...] = (_reported, _on_kubernetes, _in_logs, _hang, _stopped)
    found: dict[str, Cause] = {}
    for rule in rules:
        for cause in rule(seen):
            found.setdefault(cause.what, cause)
    what_passes_comes_last = sorted(found.values(), key=lambda cause: cause.cure.startswith("nothing"))
    return what_passes_comes_last or list(_otherwise(seen))


# What the trainer itself says


def _reported(seen: Snapshot) -> Iterator[Cause]:
    """The reason that the trainer has left; where it had none of its own words for it, the texts it met decide."""
    if seen.failure is None:
        return
    problem, cure = str(seen.failure["problem"]), str(seen.failure["cure"])
    evidence = _of_log(seen, _last_words(problem)) or f"failure.json: exit code {seen.failure['exit_code']}"
    known = _known(problem)
    if known:
        yield Cause(known[0], f"failure.json: {problem}", known[1])
    elif raised := _raised(seen, problem):
        yield raised
    else:
        yield Cause(problem, evidence, cure)


def _last_words(problem: str) -> str:
    """What of a reported problem is found in a log: its beginning, on one line."""
    return problem.splitlines()[0][:80]


def _raised(seen: Snapshot, told: str) -> Cause | None:
    """An error of the code, with the last frame of its traceback, where a log has one."""
    error = re.search(r"an error of its own: (.*)", told)
    if error is None:
        return None
    for name, lines in _newest_first(seen):
        frames = [line.strip() for line in lines if re.search(r'^(\(\w+ [^)]*\))?\s*File "', line)]
        if frames and any(error[1] in line for line in lines):
            return Cause(
                f"the code raised an error: {error[1]}", f"{name}: {frames[-1]}", "correct it, then submit again"
            )
    return None


def _newest_first(seen: Snapshot) -> Iterator[tuple[str, list[str]]]:
    """Names and lines of the logs, and of the submitter's, which tells of a driver that could keep none."""
    for name, log in sorted(seen.logs.items(), key=lambda item: -item[1].modified):
        yield name, log.lines
    if seen.objects:
        yield "submitter", seen.objects.submitter


_TEXTS: tuple[tuple[str, str, str], ...] = (
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|CUDA error: out of memory|Cuda failure \d+ 'out of memory'",
        "the GPU ran out of memory",
        "lower train.batch.micro_seconds, set train.gradient_checkpointing: true, or take GPUs with more memory",
    ),
    (
        r"Bus error|/dev/shm|shared memory (segment|object|file)|posix_fallocate|</torch_|shared memory\(shm\)",
        "a pod ran out of shared memory (/dev/shm)",
        "it has a quarter of the profile's ram_gib: write a profile of your own with more",
    ),
    (
        r"OutOfMemoryError|ran out of memory|low on memory|low on resource: memory|OOMKilled|oom-kill|MemoryError"
        r"|Cannot allocate memory",
        "a pod ran out of memory",
        "write a profile of your own with more ram_gib, or lower train.batch.micro_seconds",
    ),
    (
        r"No space left on device|disk is full|low on resource: ephemeral-storage|exceeds the (total )?limit"
        r"|exceeded its local ephemeral storage limit",
        "the disk ran full",
        "write a profile of your own with more disk_gib, or lower checkpoint.keep",
    ),
    (
        r"the clocks differ too much",
        "a clock is wrong: the store refuses what comes from where the run is",
        "have the nodes set their clocks by NTP (chrony), the store's server too; then submit again",
    ),
    (
        r"permission was refused|AccessDenied|credentials (are wrong|were found)|InvalidAccessKeyId",
        "the store refuses the run",
        "correct the keys in the secrets that cluster.secrets names, and what they may do; then submit again",
    ),
    (
        r"cannot (read|write|list) \S+: the server cannot be reached",
        "the store cannot be reached from where the run is",
        "give its address as pods see it: AWS_ENDPOINT_URL in one of cluster.secrets",
    ),
)
"""What programs say → what has happened, and the cure; the first that fits.

torch 2.11: ``MapAllocator.cpp`` (its files in shared memory are called /torch_…), ``CUDACachingAllocator.cpp``,
``alloc_cpu.cpp``, ``DataLoader.cpp``. NCCL: ``misc/shmutils.cc``, ``checks.h``. Ray 2.60: its memory monitor.
Kubernetes 1.34: ``pkg/kubelet/eviction/helpers.go``. The rest are words of ``trainer.store`` and ``trainer.driver``.
"""


def _known(text: str) -> tuple[str, str] | None:
    return next(((what, cure) for pattern, what, cure in _TEXTS if re.search(pattern, text)), None)


def _in_logs(seen: Snapshot) -> Iterator[Cause]:
    """What the last lines of logs tell, where the trainer had no time to say it."""
    if seen.failure:
        return
    for name, lines in _newest_first(seen):
        for line in reversed(lines):
            if known := _known(line):
                yield Cause(known[0], f"{name}: {line.strip()}", known[1])
                break
            if raised := _raised(seen, line):
                yield raised
                break
    if taken := _of_log(seen, "a machine is being taken away"):
        yield _preempted("machine", taken)
    if lost := _of_log(seen, "a rank was lost"):
        yield Cause(
            "a rank was lost; the ranks went on from the last checkpoint",
            lost,
            "nothing is to be done if it goes on; if it happens again and again, see the causes above and the logs",
        )


def _of_log(seen: Snapshot, text: str) -> str | None:
    """The newest line with ``text`` in any log."""
    for name, log in sorted(seen.logs.items(), key=lambda item: -item[1].modified):
        line = next((line for line in reversed(log.lines) if text in line), None)
        if line:
            return f"{name}: {line.strip()}"
    return None


# What Kubernetes says


def _on_kubernetes(seen: Snapshot) -> Iterator[Cause]:
    objects = seen.objects
    if objects is None or seen.failure:
        return
    if objects.unreachable:
        yield Cause(
            "the cluster cannot be asked", objects.unreachable, "see kubectl version; the run itself does not mind"
        )
        return
    yield from hindrances(objects, seen.now)
    yield from _taken(seen, objects)
    if objects.rayjob:
        yield from _verdict(objects, objects.rayjob)
    elif not seen.attempt or not seen.attempt.stopped:
        yield Cause(
            "its RayJob is gone: somebody has deleted it",
            f"there is no RayJob {seen.attempt.submission if seen.attempt else ''}",
            _GIVEN_BACK,
        )


def hindrances(objects: Objects, now: float) -> Iterator[Cause]:
    """What keeps pods from coming up, ``now`` by the clock of the API server."""
    yield from _refused(objects)
    for pod in objects.pods:
        yield from _container(objects, pod)
    yield from _scheduling(objects)
    rayjob: Json = objects.rayjob or {}
    made = inside(rayjob, "metadata", "creationTimestamp")
    if made and not rayjob.get("status") and now - _seconds(made) > UNSEEN_SECONDS:
        yield Cause(
            "KubeRay has not looked at the RayJob yet",
            f"RayJob {rayjob['metadata']['name']}, made {made}: no status",
            "see that its operator runs and watches this namespace; its log (kuberay-operator) may say why",
        )


def _refused(objects: Objects) -> Iterator[Cause]:
    """Pods that could not even be made."""
    conditions = [each for cluster in objects.clusters for each in inside(cluster, "status", "conditions") or ()]
    told = [each["message"] for each in conditions if each["type"] == "ReplicaFailure" and each["status"] == "True"]
    if not objects.clusters:
        told = [each["message"] for each in objects.events if re.fullmatch(r"FailedToCreate\w+Pod", each["reason"])]
    for message in reversed(told):
        line = " ".join(message.split())
        for pattern, what, cure in _REFUSALS:
            if match := re.search(pattern, line):
                yield Cause(what.format(*match.groups()), line, cure.format(*match.groups()))
                return
        yield Cause("pods of the run cannot be made", line, "see the message; whoever runs the cluster may know more")
        return


_REFUSALS = (
    (
        r"exceeded quota: ([\w.-]+),",
        "the namespace's ResourceQuota {0} leaves no room for the run's pods",
        "take other runs down (utaforge list), ask for more, or take fewer cluster.workers or a smaller profile",
    ),
    (
        r'serviceaccount "([^"]+)" not found',
        "there is no service account {0} in the namespace",
        "make it (kubectl apply -k k8s/base does), or correct cluster.service_account; the run then goes on by itself",
    ),
    (
        r"violates PodSecurity",
        "the namespace's Pod Security does not let the run's pods in",
        "report this: they ask for no rights",
    ),
    (
        r"(maximum|minimum) (\S+) usage per (Pod|Container)",
        "a LimitRange of the namespace does not let the run's pods in ({0} {1})",
        "ask for another LimitRange, or write a profile of your own that fits",
    ),
)
"""Why the API server takes no pod → what has happened, and the cure."""


def _container(objects: Objects, pod: Json) -> Iterator[Cause]:
    kind = _kind(pod)
    for container in _containers(pod):
        waiting: Json = inside(container, "state", "waiting") or {}
        message = waiting.get("message") or ""
        if waiting.get("reason") in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
            yield _image(container["image"], _pull_message(objects, pod, message))
        elif match := re.search(r'(secret|configmap) "([^"]+)" not found', message):
            yield Cause(
                f"there is no {match[1]} {match[2]} in the namespace",
                f"{kind}: {waiting['reason']}: {message}",
                "make it (k8s/README.md shows how), or correct cluster.secrets; the run then goes on by itself",
            )
        elif waiting.get("reason") == "CrashLoopBackOff":
            code = inside(container, "lastState", "terminated", "exitCode")
            yield Cause(
                f"the {kind}'s program ends again and again",
                f"{kind}: CrashLoopBackOff: exit code {code}",
                "127 and 126 mean that the image is not the trainer's (make image); else see kubectl logs --previous",
            )
        elif waiting.get("reason") in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            yield Cause(f"the {kind} cannot start", f"{waiting['reason']}: {message}", "see the message")
        for state in ("state", "lastState"):
            yield from _ended(kind, container, inside(container, state, "terminated") or {})
    if inside(pod, "status", "reason") == "Evicted":
        message = pod["status"].get("message", "")
        known = _known(_shm(message))
        what, cure = known or (f"the {kind} was put off its node", _GIVEN_BACK)
        yield Cause(what, f"{kind}: Evicted: {message}", cure)


def _ended(kind: str, container: Json, ended: Json) -> Iterator[Cause]:
    code, reason = ended.get("exitCode"), ended.get("reason")
    evidence = f"{kind}: container {container['name']} ended: {reason}, exit code {code}"
    if reason == "OOMKilled" or (code == 137 and reason == "Error"):
        yield Cause(
            f"the {kind} ran out of memory" if reason == "OOMKilled" else f"the {kind} was killed",
            evidence,
            "write a profile of your own with more ram_gib, or lower train.batch.micro_seconds",
        )
    elif code == 135:
        yield Cause(f"the {kind} ran out of shared memory (/dev/shm)", f"{evidence} (SIGBUS)", _TEXTS[1][2])


def _shm(message: str) -> str:
    return "/dev/shm" if '"shared-memory"' in message else message  # noqa: S108


def _pull_message(objects: Objects, pod: Json, message: str) -> str:
    """What the registry said; a pod that waits for its next try tells only that it waits."""
    name = pod["metadata"]["name"]
    for event in reversed(objects.events):
        if event["involvedObject"].get("name") == name and event["message"].startswith("Failed to pull image"):
            return event["message"]
    return message


def _image(image: str, message: str) -> Cause:
    if re.search(r"InvalidImageName|invalid reference format|couldn't parse image", message):
        return Cause(f"{image} is no image's name", message, "correct cluster.image, then submit again")
    if re.search(r"401|403|[Uu]nauthorized|denied|authorization failed|no basic auth|credentials", message):
        return Cause(
            f"the registry does not give {image} to the cluster",
            message,
            "name a secret with a login in cluster.pull_secrets (k8s/README.md shows how), or correct cluster.image",
        )
    if re.search(r"[Nn]ot ?[Ff]ound|manifest unknown|does not exist", message):
        return Cause(
            f"there is no image {image}",
            message,
            "push it (make image PUSH=1), or correct cluster.image and submit again",
        )
    return Cause(
        f"the image {image} cannot be pulled",
        message,
        "see that the nodes reach its registry, by this name and over TLS",
    )


def _scheduling(objects: Objects) -> Iterator[Cause]:
    """Pods that no node takes; what no waiting cures comes first."""
    waiting = [(pod, message) for pod in objects.pods if (message := waits_for_node(pod))]
    for pod, message in sorted(waiting, key=lambda item: "Insufficient" in item[1]):
        if objects.nodes:
            taints = _taints(objects.nodes, pod)
            told = f"untolerated taints {{{taints}}}" if taints else "other labels, and a taint"
            message = re.sub(r"untolerated taint(\(s\))?", told, message)
        yield _unschedulable(_kind(pod), message)


def _taints(nodes: list[Json], pod: Json) -> str:
    """Those that keep a pod off the nodes with the labels it wants."""
    fitting = [node for node in nodes if has_labels(node, pod["spec"]) and not lets_in(node, pod["spec"])]
    found = [taint for node in fitting for taint in node["spec"]["taints"]]
    return ", ".join(sorted({f"{taint['key']}={taint.get('value', '')}".rstrip("=") for taint in found}))


def _unschedulable(kind: str, message: str) -> Cause:
    told = re.split(r" (?:preemption:|no new claims)", message)[0].strip()
    for pattern, what, cure in _OBSTACLES:
        if match := re.search(pattern, told):
            return Cause(what.format(kind, *match.groups("")).strip(), told, cure)
    return Cause(f"no node takes the {kind}", told, "see the message; kubectl describe nodes tells what they have")


_OBSTACLES = (
    (
        r"Insufficient nvidia\.com/gpu",
        "no node has enough free GPUs for the {0}",
        "wait until others free some, add nodes, or take another cluster.profile or fewer cluster.workers",
    ),
    (
        r"Insufficient ([^\s,.]+)",
        "no node has enough free {1} for the {0}",
        "wait until others free some, add nodes, or take a smaller cluster.profile or fewer cluster.workers",
    ),
    (
        r"untolerated taints? ?(?:\{([^}]*)\})?",
        "the nodes for the {0} have taints that it does not tolerate {1}",
        "add them to tolerations in a profile of your own beside the job (profiles/NAME.yaml), then submit again",
    ),
    (
        r"didn't match Pod's node affinity|didn't match node selector|other labels",
        "no node has the labels that the {0}'s profile looks for: no such machine, or other labels",
        "kubectl get nodes --show-labels; put yours into a profile of your own beside the job (profiles/NAME.yaml)",
    ),
    (
        r"(unschedulable|not ready|unreachable)",
        "the nodes for the {0} are {1}",
        "kubectl get nodes; wait until they are back, or kubectl uncordon them",
    ),
)
"""What the scheduler says of nodes → what has happened, and the cure. It looks at taints, then labels, then room, so
what it says last of any node is nearest to a fit and comes first here."""


def _taken(seen: Snapshot, objects: Objects) -> Iterator[Cause]:
    """Pods of the cluster at work that were taken away."""
    if seen.status.state != "running" or objects.rayjob is None:
        return
    own = f"-{(inside(objects.rayjob, 'status', 'rayClusterName') or '').rpartition('-')[2]}-"
    for pod in objects.pods:
        if own not in pod["metadata"]["name"]:
            continue
        disrupted = next(
            (each for each in inside(pod, "status", "conditions") or () if each["type"] == "DisruptionTarget"), None
        )
        if disrupted:
            yield _preempted(_kind(pod), f"{disrupted.get('reason')}: {disrupted.get('message', '')}")
        elif pod["metadata"].get("deletionTimestamp"):
            yield _preempted(_kind(pod), f"pod {pod['metadata']['name']} is being deleted")
    here = {pod["metadata"]["name"] for pod in objects.pods}
    for event in objects.events:
        gone = event["involvedObject"].get("name", "")
        if event["reason"] in ("Killing", "Preempted", "TaintManagerEviction", "Evicted", "NodeNotReady") and (
            gone not in here and "-worker-" in gone and own in gone
        ):
            yield _preempted("worker", f"{when(event)} {gone}: {event['reason']}: {event['message']}")


def _preempted(kind: str, evidence: str) -> Cause:
    return Cause(
        f"a {kind} was taken away",
        evidence,
        "nothing: a new one is made, and its ranks go on from the last checkpoint; without cluster.spot it is rarer",
    )


def _verdict(objects: Objects, rayjob: Json) -> Iterator[Cause]:
    """What KubeRay says of the whole."""
    status: Json = inside(rayjob, "status") or {}
    state, reason, message = (str(status.get(name) or "") for name in ("jobDeploymentStatus", "reason", "message"))
    told = ": ".join(part for part in ("RayJob", state, reason, message.strip()[-500:]) if part)
    if state == "ValidationFailed":
        yield Cause("KubeRay refuses the RayJob", told, "report this")
    elif reason == "DeadlineExceeded" and "reRunning" not in message:
        yield Cause(
            "the budget's hours are over",
            told,
            "raise budget.hours and submit again: it continues at the last checkpoint",
        )
    elif "eadline" in reason:
        yield from _kept(objects)
        yield Cause("its pods did not come up in time", told, "cure what kept them, then submit again")
    elif rayjob["spec"].get("suspend") or state == "Suspended":
        labels: Mapping[str, str] = rayjob["metadata"].get("labels") or {}
        queue = next((value for key, value in labels.items() if key.endswith("queue-name")), "")
        yield Cause(
            f"it waits in the queue {queue}".rstrip(),
            f"RayJob: {state or 'not started'}, spec.suspend: {json.dumps(rayjob['spec'].get('suspend', False))}",
            "wait; the queue's own state (kubectl describe localqueue) tells for what",
        )
    lost = int(status.get("failed") or 0) - (reason == "DeadlineExceeded")  # it counts the one that it ended, too
    if state == "Failed" and reason == "AppFailed":
        known = _known(message)
        yield Cause(
            known[0] if known else "the program failed", told, known[1] if known else f"see the logs; {_GIVEN_BACK}"
        )
    elif lost:
        most = int(rayjob["spec"].get("backoffLimit") or 0) + 1
        over = standing(rayjob).over
        yield Cause(
            f"{lost} of {most} clusters were lost: the head was gone, or pods did not come up in time",
            told or f"RayJob: failed {lost}",
            _GIVEN_BACK if over else "nothing: KubeRay makes the next one, which goes on at the last checkpoint",
        )
    elif state == "Failed" and "eadline" not in reason:
        yield Cause("the program failed without a word", told, f"see the logs; {_GIVEN_BACK}")


def _seconds(clock: str) -> float:
    return datetime.fromisoformat(clock).timestamp()


def _kept(objects: Objects) -> Iterator[Cause]:
    """What kept pods that are gone from coming up: the newest of what was told about them."""
    for event in reversed(objects.events):
        name, message = event["involvedObject"].get("name", ""), event["message"]
        if image := re.match(r'Failed to pull image "([^"]+)"', message):
            yield _image(image[1], message)
            return
        if event["reason"] == "FailedScheduling":
            yield _unschedulable("worker" if "-worker-" in name else "head", message)
            return


def _kind(pod: Json) -> str:
    return str(pod["metadata"]["labels"].get("ray.io/node-type", "submitter"))


def _containers(pod: Json) -> Iterator[Json]:
    for kind in ("initContainerStatuses", "containerStatuses"):
        yield from inside(pod, "status", kind) or ()


# What silence says


def _hang(seen: Snapshot) -> Iterator[Cause]:
    if seen.status.state != "running" or seen.journal is None or seen.status.step >= seen.status.steps:
        return
    ranks = {name: log for name, log in seen.logs.items() if name.startswith("rank-")}
    silent = seen.now - max([seen.journal, *(log.modified for log in ranks.values())])
    if silent < max(QUIET_SECONDS, 10 * _usual_pause(seen)):
        return
    name, log = max(ranks.items(), key=lambda item: item[1].modified, default=("its ranks", None))
    last = log.lines[-1].strip() if log and log.lines else "nothing"
    yield Cause(
        f"it hangs: nothing was heard of its ranks for {silent / 60:.0f} minutes",
        f"{name}, {silent / 60:.0f} minutes ago: {last}",
        "wait: a rank that does not answer is started again after ten minutes, one that waits for another after an "
        "hour; or utaforge cancel, and submit again: it continues at the last checkpoint",
    )


def _usual_pause(seen: Snapshot) -> float:
    """Seconds between the lines of progress, as the logs tell them."""
    rates = [
        float(match[1])
        for log in seen.logs.values()
        for line in log.lines
        if (match := re.search(r"([\d.]+) steps/s", line)) and float(match[1])
    ]
    return 1 / median(rates) if rates else 0.0


def _stopped(seen: Snapshot) -> Iterator[Cause]:
    attempt = seen.attempt
    if attempt is None:
        yield Cause("it was never submitted to a cluster", "attempts/ is empty", "submit its job")
    elif attempt.stopped:
        yield Cause("somebody has stopped it", f"attempt {attempt.number}: stopped", _GIVEN_BACK)


def _otherwise(seen: Snapshot) -> Iterator[Cause]:
    """Nothing known: what was last heard, if the run does not simply go well."""
    if seen.status.state == "running" and seen.logs:
        return
    name, log = max(seen.logs.items(), key=lambda item: item[1].modified, default=("logs", None))
    last = f"{name}: {log.lines[-1].strip()}" if log and log.lines else "it has no logs"
    if seen.status.state == "running":
        pods = [f"{_kind(pod)} {inside(pod, 'status', 'phase')}" for pod in (seen.objects.pods if seen.objects else ())]
        yield Cause("it is starting", ", ".join(pods) or last, "wait; utaforge logs -f follows it")
        return
    yield Cause(
        "no cause is known: its program ended without a word",
        last,
        f"see utaforge logs {seen.status.name}; {_GIVEN_BACK}",
    )
