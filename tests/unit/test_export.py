"""``utaforge export``: adapters in upstream's own formats compute what they compute here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from torch import Tensor, nn

from launcher.cli import run as utaforge
from tests.unit.conftest import Learnt
from trainer.families import open_family
from trainer.families.ace_step.network import AceStepNetwork
from trainer.families.base import Example
from trainer.merge import export, main
from trainer.spec.errors import UtaforgeError
from trainer.validation.generate import load

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 12},
    "rslora": {"rank": 4, "alpha": 12, "rslora": True},
    "pissa": {"rank": 4, "alpha": 12, "pissa": True},
}


@pytest.mark.parametrize("kind", [*KINDS, "preset"])
def test_fish_speech_merges_the_exported_adapter_to_the_same_weights(kind: str, learnt: Learnt, tmp_path: Path) -> None:
    run = learnt("fish_speech", **KINDS.get(kind, {"preset": "fish-speech/r8a16"}))
    rank = {"pissa": 8, "preset": 8}.get(kind, 4)
    settings = f"r_{rank}_alpha_{2 * rank}.yaml"
    assert export(run, f"file://{tmp_path}/出力") == ["lora.ckpt", settings]
    told = (tmp_path / "出力" / settings).read_text()
    assert told.splitlines()[1:3] == [f"r: {rank}", f"lora_alpha: {2 * rank}"]
    state = torch.load(tmp_path / "出力" / "lora.ckpt", weights_only=True)["state_dict"]
    network = open_family(run.job.model).network()
    _, adapted = load(run, "last")
    wanted = adapted.merge_and_unload().state_dict()  # type: ignore[operator]
    merged = _merged_by_loralib(network, {key.removeprefix("model."): value for key, value in state.items()})
    assert not torch.allclose(
        wanted["layers.0.attention.wo.weight"], network.get_parameter("layers.0.attention.wo.weight")
    )
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "dora"])
@torch.no_grad()
def test_ace_steps_pipeline_loads_the_exported_adapter_to_the_same_velocity(
    kind: str, learnt: Learnt, tmp_path: Path
) -> None:
    run = learnt("ace_step", **KINDS.get(kind, {"rank": 4, "alpha": 12, "dora": True}))
    assert export(run, f"file://{tmp_path}/出力", "10") == ["pytorch_lora_weights.safetensors"]
    family, ours = load(run, "last")
    base = open_family(run.job.model).network()

    class Upstream(PeftAdapterMixin, AceStepNetwork):
        """Upstream's network, with what diffusers adds to it."""

    theirs = Upstream(family.release.config)  # type: ignore[attr-defined]
    theirs.load_state_dict(base.state_dict())
    file = str(tmp_path / "出力" / "pytorch_lora_weights.safetensors")
    theirs.load_lora_adapter(file, adapter_name="ace_step_lora", with_alpha=True, prefix=None)
    set_weights_and_activate_adapters(theirs, ["ace_step_lora"], [1.0])
    (conditions,) = family.conditions([{"tags": "琴, 祭り", "lyrics": "sakura sakura"}])
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 24, generator=draw).numpy()
    batch = family.collate([Example("歌", {"latents": latents, **conditions}, {}, 0)], training=False)
    bare, wanted, found = (family.sums(network.eval(), batch)["mse"] for network in (base, ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert abs(float(bare / wanted) - 1) > 1e-4


@pytest.mark.parametrize(
    ("family", "method", "problem"),
    [
        ("fish_speech", {"dora": True}, "DoRA has no place in fish-speech's adapter format"),
        ("ace_step", {"train_also": ({"modules": "lyric_proj"},)}, r"lyric_proj\.\w+ has no place in ACE-Step's"),
        ("ace_step", {"targets": ("lyric_embs",)}, r"lyric_embs\.\w+ has no place in ACE-Step's"),
        ("musicgen", {}, "upstream has no adapter format for this family\n.*utaforge merge"),
        ("fish_speech", {"type": "full"}, "run sakura has trained every weight"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused_by_name(
    family: str, method: dict[str, Any], problem: str, learnt: Learnt, tmp_path: Path
) -> None:
    with pytest.raises(UtaforgeError, match=problem) as caught:
        export(learnt(family, **method), f"file://{tmp_path}/出力")
    assert "utaforge merge" in caught.value.cure
    assert not list((tmp_path / "出力").glob("*"))


def test_nothing_is_overwritten_and_the_command_exports(
    learnt: Learnt, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = learnt("fish_speech", rank=4)
    store = f"file://{tmp_path}"
    assert utaforge(["export", "sakura", "--store", store, "--to", f"file://{tmp_path}/出力"]) == 0
    assert "lora.ckpt, r_4_alpha_8.yaml" in capfd.readouterr().out
    assert main([run.url, f"file://{tmp_path}/出力", "--adapter"]) == 3
    assert "is not empty: it holds lora.ckpt" in capfd.readouterr().err


def _merged_by_loralib(network: nn.Module, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + 2 B A of every layer that upstream adapts, which all have to be in the file; for embeddings, transposed."""
    state = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            change = 2 * adapter.pop(f"{name}.lora_B") @ adapter.pop(f"{name}.lora_A")
            state[f"{name}.weight"] = layer.weight + (change.T if isinstance(layer, nn.Embedding) else change)
    assert not adapter
    return state
