"""The CronJob as a value, and as the YAML of the command."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import run
from launcher.render.cronjob import as_yaml, cronjob
from trainer.spec import Job, JobError, load_job

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "k8s" / "retrain"


@pytest.fixture
def job() -> Job:
    return load_job(EXAMPLE / "job.yaml", to_run=False)


def script(manifests: list[dict[str, Any]]) -> str:
    (container,) = manifests[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return container["command"][2]


def test_the_schedule_is_the_jobs_and_never_two_at_once(job: Job) -> None:
    _, made = cronjob(job, "")
    assert (made["apiVersion"], made["kind"]) == ("batch/v1", "CronJob")
    spec = made["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 3 * * 0", "Asia/Tokyo", "Forbid")
    assert spec["startingDeadlineSeconds"] == 3600
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 3)
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] == 7 * 24 * 3600


def test_the_longest_name_of_a_job_still_makes_a_name_for_a_cronjob(job: Job) -> None:
    _, made = cronjob(job.model_copy(update={"name": "u" * 36}), "")
    assert len(made["metadata"]["name"]) <= 52


def test_the_pod_is_admitted_by_pod_security_restricted_and_may_only_write_to_tmp(job: Job) -> None:
    _, made = cronjob(job, "", image="registry/歌:1")
    pod = made["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "utaforge-launcher"
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["image"] == "registry/歌:1"
    assert container["envFrom"] == [{"secretRef": {"name": "utaforge-store"}}]
    assert [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")] == ["/tmp"]


@pytest.mark.parametrize(
    ("code", "seen"), [(0, 0), (10, 0), (11, 0), (12, 0), (1, 1), (2, 2), (3, 3), (6, 6), (130, 130)]
)
def test_only_a_failure_is_a_failed_kubernetes_job(job: Job, tmp_path: Path, code: int, seen: int) -> None:
    command = tmp_path / "utaforge"
    command.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit {code}\n')
    command.chmod(0o755)
    made = cronjob(job, "", overrides=("validation.prompts.0.tags=祭り さくら",))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["/bin/sh", "-c", script(made)], env={"PATH": path}, check=False)
    assert done.returncode == seen
    told = (tmp_path / "arguments").read_text(encoding="utf-8")
    assert told == "retrain /etc/utaforge/job.yaml --set validation.prompts.0.tags=祭り さくら\n"


def test_a_private_launcher_image_is_pulled_with_the_jobs_pull_secrets(job: Job) -> None:
    def pod(job: Job) -> dict[str, Any]:
        return cronjob(job, "")[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]

    cluster = job.cluster.model_copy(update={"pull_secrets": ("registry",)})
    assert pod(job.model_copy(update={"cluster": cluster}))["imagePullSecrets"] == [{"name": "registry"}]
    assert "imagePullSecrets" not in pod(job)


@pytest.mark.parametrize(("field", "value"), [("context", "歌の箱"), ("code", ".")])
def test_what_is_of_the_laptop_alone_is_taken_back_in_the_pod(job: Job, field: str, value: str) -> None:
    overridden = (f"cluster.{field}={value}",)
    of_a_laptop = load_job(EXAMPLE / "job.yaml", overridden, to_run=False)
    line = script(cronjob(of_a_laptop, "", overrides=overridden)).splitlines()[0]
    given = [each for each in shlex.split(line)[3:] if each != "--set"]
    assert given == [*overridden, f"cluster.{field}=null"]
    assert getattr(load_job(EXAMPLE / "job.yaml", given, to_run=False).cluster, field) is None


def test_the_job_file_reaches_the_pod_as_it_is(job: Job) -> None:
    text = "# 春の歌\nname: 'x'\n\n  two: spaces  \n\ttab\n"
    (config, _) = yaml.safe_load_all(as_yaml(cronjob(job, text)))
    assert config["data"]["job.yaml"] == text


def test_a_profile_of_ones_own_comes_with_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profiles").mkdir()
    text = "# 私の\ncores: 2\nram_gib: 4\ndisk_gib: 9\n"
    (tmp_path / "profiles" / "mine.yaml").write_text(text, encoding="utf-8")
    path = tmp_path / "job.yaml"
    path.write_text((EXAMPLE / "job.yaml").read_text(encoding="utf-8").replace("t4x4", "mine"), encoding="utf-8")
    assert run(["render", "cronjob", str(path)]) == 0
    config, made = yaml.safe_load_all(capsys.readouterr().out)
    volumes = {each["name"]: each for each in made["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]}
    mounted = {each["path"]: config["data"][each["key"]] for each in volumes["job"]["configMap"]["items"]}
    assert mounted == {"job.yaml": path.read_text(encoding="utf-8"), "profiles/mine.yaml": text}


def test_a_job_without_a_schedule_or_off_kubernetes_is_refused(job: Job) -> None:
    with pytest.raises(JobError, match="has no retrain section"):
        cronjob(job.model_copy(update={"retrain": None}), "")
    local = load_job(EXAMPLE / "job.yaml", ["cluster={backend: local}"], to_run=False)
    with pytest.raises(JobError, match="runs on backend local, which a CronJob cannot reach"):
        cronjob(local, "")


def test_the_committed_example_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["render", "cronjob", str(EXAMPLE / "job.yaml")]) == 0
    committed = (EXAMPLE / "cronjob.yaml").read_text(encoding="utf-8")
    assert committed.partition("\n")[2] == capsys.readouterr().out


def test_kustomize_takes_the_example_and_replaces_the_image_by_name() -> None:
    kustomization = yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["resources"] == ["cronjob.yaml"]
    assert [image["name"] for image in kustomization["images"]] == ["utaforge-launcher"]
