"""The engine on one rank without a process group: what it refuses, skips, keeps and gives back."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.adapt import apply, parameter_groups
from trainer.engine import (
    SKIPS_IN_A_ROW,
    Engine,
    LossScale,
    TrainingState,
    learning_rate,
    load_state,
    remove_stale_locks,
    save_state,
)
from trainer.families import open_family
from trainer.families.base import Batch, Example
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.errors import TrainingError
from trainer.spec.families import FAMILIES
from trainer.spec.job import BatchSeconds, Train
from trainer.spec.model import Full, Lora, Optimizer, Schedule

FAMILY = open_family(MusicGen(family="musicgen", pretrained="random:tiny"))
METHOD = Lora(type="lora", rank=4, alpha=8)


def train(**options: Any) -> Train:
    return Train(**{"steps": 10, "batch": BatchSeconds(seconds=1), **options})


def engine(precision: str = "fp32", resume: TrainingState | None = None, **options: Any) -> Engine:
    section = train(optimizer=Optimizer(lr=1e-2), **options)
    network = apply(FAMILY.network(), METHOD, FAMILIES["musicgen"])
    groups = parameter_groups(network, METHOD, section.optimizer)
    place = {"strategy": "ddp", "precision": precision, "device": torch.device("cpu")}
    return Engine(network, FAMILY, section, groups, **place, resume=resume)


def batch(*lengths: int, seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    text = FAMILY.conditions([{"tags": "子守唄 slow"}])[0]
    arrays = [{"codes": draw.integers(0, 64, (4, length)).astype(np.uint16), **text} for length in lengths]
    return FAMILY.collate([Example("歌", array, {}, 0) for array in arrays], training=False)


def weights(of: Engine) -> list[torch.Tensor]:
    return [values["param"] for values in of.state().tensors.values()]


def poison(of: Engine) -> None:
    """Make every gradient infinite while the loss stays as it is."""
    for parameter in of.network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * torch.inf)


def test_accumulating_is_one_big_batch() -> None:
    whole, parts = engine(), engine()
    for _ in range(3):
        one = whole.step([(batch(30, 30), 1.0)], 1e-2)
        songs = [Batch({k: v[i : i + 1] for k, v in batch(30, 30).tensors.items()}, HALF, 30) for i in range(2)]
        two = parts.step([(song, 1.0) for song in songs] + [(batch(9), 0.0)], 1e-2)
        assert two.loss == pytest.approx(one.loss, rel=1e-6)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert (one.tokens, one.frames) == (two.tokens, two.frames) == (240, 60)


HALF = {term: 120.0 if term == "ce" else 30.0 for term in FAMILY.terms}


def test_evaluating_gives_the_loss_that_the_next_step_finds_and_moves_nothing() -> None:
    trained = engine()
    micro = [(batch(12, 5), 1.0), (batch(20), 1.0)]
    before = weights(trained)
    means = trained.evaluate(micro)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))
    assert trained.step(micro, 1e-2).loss == pytest.approx(means["loss"], rel=1e-6)
    assert means.keys() == {"loss", *FAMILY.terms}


def test_gradient_checkpointing_changes_no_number() -> None:
    plain, saving = engine(), engine(gradient_checkpointing=True)
    for _ in range(2):
        one, two = (either.step([(batch(25), 1.0)], 1e-2) for either in (plain, saving))
        assert (two.loss, two.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=1e-6)


def test_lora_plus_moves_the_b_matrices_so_many_times_as_far() -> None:
    method = METHOD.model_copy(update={"lora_plus": 16})
    network = apply(FAMILY.network(), method, FAMILIES["musicgen"])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)  # or the A matrices have no gradient
    section = train(optimizer=Optimizer(lr=1e-4, weight_decay=0.0, eps=1e-15))
    place = {"strategy": "ddp", "precision": "fp32", "device": torch.device("cpu")}
    fast = Engine(network, FAMILY, section, parameter_groups(network, method, section.optimizer), **place)
    before = fast.state().tensors
    fast.step([(batch(12), 1.0)], 1e-4)
    moved = {name: float((v["param"] - before[name]["param"]).abs().max()) for name, v in fast.state().tensors.items()}
    assert moved == {name: pytest.approx(16e-4 if "lora_B" in name else 1e-4, rel=0.01) for name in moved}


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_moves() -> None:
    trained = engine()
    trained.step([(batch(9), 1.0)], 1e-2)
    before = weights(trained)
    with torch.no_grad():
        bias = next(p for name, p in trained.network.named_parameters() if "layer_norm.bias" in name)
        bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 2: the loss is nan; the weights are those of step 1"):
        trained.step([(batch(9), 1.0)], 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_ends_the_run_before_anything_moves(precision: str) -> None:
    trained = engine(precision)
    poison(trained)
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (inf|nan)"):
        trained.step([(batch(9), 1.0)], 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))


def test_fp16_skips_an_overflow_and_gives_up_after_too_many() -> None:
    trained = engine("fp16")
    poison(trained)
    before = weights(trained)
    for step in range(1, SKIPS_IN_A_ROW):
        result = trained.step([(batch(9), 1.0)], 1e-2)
        assert result.skipped
        assert trained.scale.value == 2.0 ** (16 - step)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trained), strict=True))
    state = trained.state()
    assert (state.step, state.updates) == (SKIPS_IN_A_ROW - 1, 0)
    with pytest.raises(
        TrainingError, match=f"step {SKIPS_IN_A_ROW}: the gradient norm {SKIPS_IN_A_ROW} times in a row"
    ):
        trained.step([(batch(9), 1.0)], 1e-2)


def test_the_loss_scale_grows_after_long_peace() -> None:
    scale = LossScale(1024.0)
    for finite in [False] + [True] * LossScale.GROW_AFTER:
        scale.update(finite)
    assert (scale.value, scale.good, scale.skips) == (1024.0, 0, 0)


def test_a_state_comes_back_from_its_file_with_every_bit(tmp_path: Path) -> None:
    trained = engine("fp16")
    for seed in range(2):
        trained.step([(batch(9, seed=seed), 1.0)], 1e-2)
    state = trained.state()
    save_state(state, tmp_path / "状態.safetensors")
    back = load_state(tmp_path / "状態.safetensors")
    assert (back.step, back.updates, back.scale) == (2, 2, state.scale)
    assert back.tensors.keys() == state.tensors.keys()
    for name, values in state.tensors.items():
        assert all(torch.equal(back.tensors[name][key], value) for key, value in values.items()), name
    resumed = engine("fp16", resume=back)
    wanted, found = (either.step([(batch(9), 1.0)], 1e-2) for either in (trained, resumed))
    assert found == wanted


def test_a_state_of_another_method_is_refused() -> None:
    full = FAMILY.network()
    section = train()
    groups = parameter_groups(full, Full(type="full"), section.optimizer)
    place = {"strategy": "ddp", "precision": "fp32", "device": torch.device("cpu")}
    with pytest.raises(TrainingError, match="trains other parameters than this job"):
        Engine(full, FAMILY, section, groups, **place, resume=engine().state())


def test_dropout_follows_from_the_seed_of_the_step() -> None:
    losses = []
    for seed in (1, 1, 2):
        trained = engine()
        for module in trained.network.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.3
        losses.append(trained.step([(batch(30), 1.0)], 1e-2, seed=(0, seed)).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("name", "final", "wanted"),
    [
        ("cosine", 0.0, [0.5, 1.0, 1.0, 0.75, 0.25]),
        ("cosine", 0.1, [0.5, 1.0, 1.0, 0.775, 0.325]),
        ("constant", 0.0, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_its_schedule_says(name: str, final: float, wanted: list) -> None:
    section = train(steps=5, optimizer=Optimizer(lr=2.0), schedule=Schedule(name=name, warmup=2, final=final))
    assert [learning_rate(section, step) / 2 for step in range(1, 6)] == pytest.approx(wanted)


def test_only_locks_that_no_process_holds_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held = tmp_path / "py311" / "古い" / "lock", tmp_path / "held" / "lock"
    for lock in (stale, held):
        lock.parent.mkdir(parents=True)
    stale.touch()
    handle = os.open(held, os.O_CREAT | os.O_EXCL)
    try:
        remove_stale_locks()
    finally:
        os.close(handle)
    assert not stale.exists()
    assert held.exists()
