"""Adapters are PEFT's, change nothing before training, and come back as they were."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from trainer.adapt import adapter_state, apply, load_adapter, parameter_groups, save_adapter
from trainer.families.musicgen.network import MusicGenNetwork
from trainer.families.musicgen.weights import load_network, open_release
from trainer.spec.errors import TrainingError
from trainer.spec.families import FAMILIES
from trainer.spec.model import Full, Lora, Optimizer

SPEC = FAMILIES["musicgen"]


def base() -> MusicGenNetwork:
    return load_network(open_release("random:tiny"), dropout=0.0).eval()


def method(**options) -> Lora:
    return Lora(type="lora", **{"rank": 4, "alpha": 12, **options})


def logits(network: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (2, 4, 9), generator=draw)
    with torch.no_grad():
        return network(ids, torch.randn(2, 3, 64, generator=draw), torch.ones(2, 3, dtype=torch.bool))


def disturb(network: PeftModel) -> PeftModel:
    """As if it had been trained."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return network.eval()


KINDS = {
    "lora": method(),
    "rslora": method(rslora=True),
    "dora": method(dora=True),
    "pissa": method(pissa=True),
    "pissa, rslora": method(pissa=True, rslora=True),
    "all targets": method(targets=("q_proj", "fc1", "fc2", "enc_to_dec_proj")),
    "a module beside": method(train_also=({"modules": "enc_to_dec_proj", "optimizer": {"lr": 1e-3}},)),
}


def test_before_training_the_adapted_network_is_the_base_exactly() -> None:
    for kind in ("lora", "rslora", "all targets", "a module beside"):
        assert torch.equal(logits(apply(base(), KINDS[kind], SPEC).eval()), logits(base())), kind
    for kind in ("dora", "pissa"):
        assert torch.allclose(logits(apply(base(), KINDS[kind], SPEC).eval()), logits(base()), atol=1e-5), kind


def test_only_the_adapter_is_trained_and_in_fp32() -> None:
    network = apply(base(), method(dora=True), SPEC)
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 2 * 8
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_loaded_by_peft_alone_and_by_us(kind: str, tmp_path: Path) -> None:
    trained = disturb(apply(base(), KINDS[kind], SPEC, seed=1))
    wanted = logits(trained)
    assert not torch.allclose(wanted, logits(base()), atol=1e-3)
    save_adapter(trained, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    alone = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    assert torch.allclose(logits(alone), wanted, atol=2e-5)
    back = apply(base(), KINDS[kind], SPEC, seed=2).eval()
    load_adapter(back, tmp_path)
    assert torch.allclose(logits(back), wanted, atol=2e-5)
    for name, value in adapter_state(trained).items():
        assert torch.equal(adapter_state(back)[name], value), name


def test_training_continues_from_an_adapter_named_by_url(tmp_path: Path) -> None:
    trained = disturb(apply(base(), method(), SPEC))
    save_adapter(trained, tmp_path / "祭り")
    continued = apply(base(), method(init=f"file://{tmp_path / '祭り'}"), SPEC).eval()
    assert torch.equal(logits(continued), logits(trained))


def test_a_saved_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_adapter(apply(base(), method(rank=4), SPEC), tmp_path)
    with pytest.raises(TrainingError, match="has r = 4, the job's method asks for 8"):
        load_adapter(apply(base(), method(rank=8), SPEC), tmp_path)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("proj", "has no linear layer named 'proj'"),
        ("歌_proj", "has no linear layer named '歌_proj'"),
        ("self_attn", "'self_attn' is a MusicgenAttention, not a linear layer"),
    ],
)
def test_a_target_that_is_not_there_is_answered_with_those_that_are(target: str, problem: str) -> None:
    with pytest.raises(TrainingError) as caught:
        apply(base(), method(targets=("q_proj", target)), SPEC)
    assert problem in str(caught.value)
    assert "choose from enc_to_dec_proj, fc1, fc2, k_proj, out_proj, q_proj, v_proj" in str(caught.value)


def test_ranks_draw_the_same_matrices_whatever_was_drawn_before() -> None:
    first = adapter_state(apply(base(), method(), SPEC, seed=3))
    torch.randn(5)
    second = adapter_state(apply(base(), method(), SPEC, seed=3))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_plus_and_weight_decay_are_in_the_groups() -> None:
    network = apply(base(), method(dora=True, lora_plus=16), SPEC)
    groups = parameter_groups(network, method(lora_plus=16), Optimizer(weight_decay=0.1))
    assert sorted((g["weight_decay"], g["lr_scale"], len(g["params"])) for g in groups) == [
        (0.0, 1.0, 16),
        (0.1, 1.0, 16),
        (0.1, 16.0, 16),
    ]
    full = parameter_groups(base(), Full(type="full"), Optimizer(weight_decay=0.1))
    assert [g["lr_scale"] for g in full] == [1.0, 1.0]
    assert sum(len(g["params"]) for g in full) == len(list(base().parameters()))


def test_a_module_beside_the_adapter_learns_at_its_own_rate_and_is_in_its_files(tmp_path: Path) -> None:
    network = apply(base(), KINDS["a module beside"], SPEC)
    groups = parameter_groups(network, KINDS["a module beside"], Optimizer(lr=1e-4))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    own = {names[id(p)] for group in groups if group["lr_scale"] == 10 for p in group["params"]}
    place = "base_model.model.enc_to_dec_proj.modules_to_save.default"
    assert own == {f"{place}.weight", f"{place}.bias"}
    assert {group["lr_scale"] for group in groups} == {1, 10}
    save_adapter(disturb(network), tmp_path / "編曲")
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "編曲")).eval()
    assert torch.equal(logits(loaded), logits(network))


def test_a_module_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(TrainingError, match=r"no module named 'lyric_encoder'\n.*decoder, enc_to_dec_proj"):
        apply(base(), method(train_also=({"modules": "lyric_encoder"},)), SPEC)


def test_embeddings_are_adapted_too() -> None:
    network = apply(base(), method(targets=("embed_tokens.0",)), SPEC)
    (a,) = (name for name, p in network.named_parameters() if p.requires_grad and "lora_embedding_B" in name)
    assert "embed_tokens.0" in a
    with pytest.raises(TrainingError, match="is a Embedding"):
        apply(base(), method(targets=("embed_tokens.0",), dora=True), SPEC)
