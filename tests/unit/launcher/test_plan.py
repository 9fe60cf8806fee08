import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.memory import Load, activations, memory, most_positions
from launcher.plan import plan
from launcher.profiles import GIB, find_profile
from trainer.families.musicgen.spec import MusicGen
from trainer.spec import Job, JobError
from trainer.spec.cluster import Budget, Kubernetes, Local
from trainer.spec.families import FAMILIES

Jobs = Callable[..., Job]


def on(job: Job, profile: str, workers: int, **changes: object) -> Job:
    """The same job with MusicGen-large on another profile, of which this machine has none."""
    model = MusicGen(family="musicgen", pretrained="s3://models/musicgen-large")
    train = job.train.model_copy(update=changes)
    return job.model_copy(update={"model": model, "train": train, "cluster": Local(profile=profile, workers=workers)})


def load(**changes: object) -> Load:
    dims = FAMILIES["musicgen"].dims
    whole = Load(dims, dims.parameters, 0, 0, "bf16", "ddp", 4, 1500, checkpointing=False, gpu=True)
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter_and_zero3_spreads_them_all() -> None:
    parameters = load().trained
    alone, spread = memory(load()), memory(load(strategy="zero3"))
    assert alone.weights + alone.gradients + alone.optimizer == 16 * parameters
    assert spread.weights + spread.gradients + spread.optimizer == pytest.approx(20 * parameters / 4, abs=16)
    assert alone.activations == spread.activations


def test_zero2_spreads_gradients_and_optimizer_but_not_weights() -> None:
    ddp, zero2 = memory(load()), memory(load(strategy="zero2"))
    assert zero2.weights == ddp.weights
    assert zero2.gradients == ddp.gradients // 4


def test_a_frozen_base_takes_its_precision_and_no_gradients() -> None:
    frozen = memory(load(trained=0, frozen=1_000_000, precision="fp16"))
    assert (frozen.weights, frozen.gradients, frozen.optimizer) == (2_000_000, 0, 0)


def test_checkpointing_keeps_a_small_share_of_the_activations() -> None:
    assert activations(load(checkpointing=True)) < activations(load()) / 8


def test_modules_that_are_trained_in_full_are_told_and_targets_in_them_left_out(job: Jobs) -> None:
    ace = (
        "model={family: ace_step, pretrained: random:full}",
        "validation={}",
        "cluster={backend: local, profile: a100}",
    )
    beside = ("method={type: lora, train_also: [{modules: lyric_encoder}]}",)
    plain, both = (plan(job(*ace, *method)) for method in ((), beside))
    assert both.method.endswith("on to_q, to_k, to_v, to_out.0; lyric_encoder in full")
    left_out = "method.train_also: trains linear_q, linear_k, linear_v in full with all around them"
    assert any(left_out in check for check in both.checks) and not any(left_out in check for check in plain.checks)
    assert both.trained - plain.trained == 82_934_784 - 6 * 3 * 16 * (1024 + 1024)


def test_most_positions_is_the_largest_that_fits() -> None:
    frozen = load(trained=0, frozen=load().trained)
    budget = 20 * GIB
    found = most_positions(frozen, budget)
    assert memory(replace(frozen, positions=found)).total <= budget < memory(replace(frozen, positions=found + 1)).total


def test_the_demo_plans_on_this_machine(job: Jobs) -> None:
    planned = plan(job())
    assert (planned.device, planned.ranks, planned.strategy, planned.precision) == ("cpu", 2, "ddp", "fp32")
    assert planned.micro_seconds == 30
    assert planned.hours is None
    assert planned.usd is None
    assert planned.trained == 2 * 16 * (4 * 2 * 2 * 64)


@pytest.mark.parametrize(("profile", "precision"), [("t4x4", "fp16"), ("a100", "bf16"), ("rtx4090", "bf16")])
def test_precision_follows_the_profile(job: Jobs, profile: str, precision: str) -> None:
    assert plan(on(job(), profile, 1, gradient_checkpointing=True)).precision == precision


def test_a_full_fine_tune_that_one_gpu_cannot_hold_is_spread(job: Jobs) -> None:
    full = on(job("method={type: full}"), "a100-40", 8)
    assert plan(full).strategy == "zero2"


def test_what_cannot_fit_is_refused_with_parts_and_cures(job: Jobs) -> None:
    full = on(job("method={type: full}"), "rtx4090", 1)
    with pytest.raises(JobError) as caught:
        plan(full)
    assert caught.value.problem.startswith("demo does not fit: 30 s of audio under ddp need ")
    assert "weights 12.1, gradients 12.1, optimizer 24.3" in caught.value.problem
    assert "a GeForce-RTX-4090 has 21.6 GiB to give" in caught.value.problem
    assert "use method: {type: lora}" in caught.value.cure


def test_hours_on_gpus_are_a_lower_bound_that_says_so(job: Jobs) -> None:
    planned = plan(on(job(), "a100", 1))
    positions = 60 * 50 * 120
    assert planned.hours == pytest.approx(positions * (4 * planned.frozen + 6 * planned.trained) / 312e12 / 3600)
    assert planned.hours_basis.startswith("at least")


def test_a_budget_of_fewer_hours_than_it_takes_is_refused(job: Jobs) -> None:
    on_a_cluster = kubernetes(job("train.steps=100000"), "t4x4", 1, gradient_checkpointing=True)
    needs = plan(on_a_cluster).hours
    assert needs is not None
    enough, short = (on_a_cluster.model_copy(update={"budget": Budget(hours=needs * of)}) for of in (1.01, 0.99))
    assert plan(enough).hours == needs
    with pytest.raises(JobError, match=r"budget\.hours: .* are fewer than the .* that this takes at least"):
        plan(short)


def test_a_given_micro_batch_is_kept(job: Jobs) -> None:
    planned = plan(job("train.batch={seconds: 60, micro_seconds: 15}"))
    assert (planned.micro_seconds, planned.micro_batches) == (15, 2)


def test_odd_but_allowed_settings_are_noted(job: Jobs) -> None:
    checks = plan(job("train.schedule.warmup=100", "checkpoint.every=500", "validation.prompts=[]")).checks
    assert [check.split(":")[0] for check in checks if "workers" not in check] == [
        "train.schedule.warmup",
        "checkpoint.every",
        "validation.prompts",
    ]


def test_a_plan_is_json_with_what_the_trainer_reads(job: Jobs) -> None:
    told = json.loads(json.dumps(plan(job()).as_json()))
    assert {"device", "ranks", "strategy", "precision", "micro_seconds"} <= set(told)


def test_a_plan_says_what_songs_are_sampled_with(job: Jobs) -> None:
    said = plan(job("validation.sampling={guidance: 1}")).as_json()["sampling"]
    assert said == {"guidance": 1.0, "temperature": 1.0, "top_k": 250}, "what the job says, and upstream's"


@pytest.mark.parametrize(
    ("profile", "precision", "said"),
    [("cpu", "fp16", "fp16 needs a GPU, and profile cpu has none"), ("t4x4", "bf16", "a T4 has no bf16")],
)
def test_a_precision_that_the_profile_does_not_have_is_refused(
    job: Jobs, profile: str, precision: str, said: str
) -> None:
    with pytest.raises(JobError, match=f"train.precision: {said}"):
        plan(on(job(), profile, 1, precision=precision))


def kubernetes(job: Job, profile: str, workers: int | None, **changes: object) -> Job:
    cluster = Kubernetes(backend="kubernetes", profile=profile, workers=workers, spot=True)
    return on(job, "t4x4", 1, **changes).model_copy(update={"cluster": cluster})


def test_ranks_spread_evenly_over_machines_that_all_cost_money(job: Jobs) -> None:
    planned = plan(kubernetes(job(), "t4x4", 8, gradient_checkpointing=True))
    assert (planned.machines, planned.ranks) == (2, 8)
    assert planned.usd == pytest.approx(planned.hours * 2 * 3.912)
    assert planned.usd_basis.endswith("on demand, list price, from memory, 2025")
    assert planned.as_json()["machine"] == find_profile("t4x4").model_dump(mode="json")
    with pytest.raises(JobError, match="5 ranks do not spread evenly over 2 machines of 4 GPUs"):
        plan(kubernetes(job(), "t4x4", 5))


def test_spot_without_a_price_of_its_own_costs_at_most_the_price_on_demand(job: Jobs) -> None:
    spot = kubernetes(job(), "t4x4", 4, gradient_checkpointing=True)
    on_demand = spot.model_copy(update={"cluster": spot.cluster.model_copy(update={"spot": False})})
    assert plan(spot).usd == plan(on_demand).usd
    assert plan(spot).usd_basis.startswith("at most for these hours, since spot is cheaper: 1 × ")
    assert plan(on_demand).usd_basis.startswith("at least: 1 × ")


def test_a_worker_without_a_gpu_has_the_profiles_memory_not_this_machines(job: Jobs) -> None:
    on_pods = job().model_copy(update={"cluster": Kubernetes(backend="kubernetes", profile="cpu", workers=2)})
    assert (plan(on_pods).machines, plan(on_pods).device_bytes) == (2, 4 * GIB)
