"""Adapters are PEFT's, change nothing before training, and come back as they were."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer

from trainer.adapt import adapter_state, apply, load_adapter, parameter_groups, save_adapter
from trainer.families import open_family
from trainer.families.musicgen.network import MusicGenNetwork
from trainer.families.musicgen.weights import load_network, open_release
from trainer.families.songbloom.spec import SongBloom
from trainer.spec.errors import StoreError, TrainingError
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
    "embeddings": method(targets=("embed_tokens.0", "v_proj")),
    "embeddings, dora": method(targets=("embed_tokens.0", "v_proj"), dora=True),
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
    assert torch.allclose(logits(back.merge_and_unload()), wanted, atol=2e-5)


def test_training_continues_from_an_adapter_named_by_url(tmp_path: Path) -> None:
    trained = disturb(apply(base(), method(), SPEC))
    save_adapter(trained, tmp_path / "祭り")
    continued = apply(base(), method(init=f"file://{tmp_path / '祭り'}"), SPEC).eval()
    assert torch.equal(logits(continued), logits(trained))


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"rank": 8}, "has r = 4, the job's method asks for 8"),
        ({"alpha": 8}, "has lora_alpha = 12.0, the job's method asks for 8.0"),
        ({"targets": ("q_proj", "fc1")}, r"has target_modules = .* asks for \['fc1', 'q_proj'\]"),
        ({"dora": True}, "has use_dora = False, the job's method asks for True"),
        ({"train_also": ({"modules": "enc_to_dec_proj"},)}, r"asks for \['enc_to_dec_proj'\]"),
    ],
)
def test_continuing_from_the_adapter_of_another_method_is_refused_by_its_url(
    asked: dict, problem: str, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/祭り"
    save_adapter(apply(base(), method(), SPEC), tmp_path / "祭り")
    with pytest.raises(TrainingError, match=problem) as caught:
        apply(base(), method(init=url, **asked), SPEC)
    assert url in str(caught.value)
    assert "set method to what the adapter was trained with" in caught.value.cure


def test_continuing_from_the_adapter_of_another_network_is_refused_by_its_url(tmp_path: Path) -> None:
    songbloom = open_family(SongBloom(family="songbloom", pretrained="random:tiny")).network()
    pocket = load_network(open_release("builtin:pocket"), dropout=0.0)
    q = method(targets=("q_proj",))
    save_adapter(apply(songbloom, q, FAMILIES["songbloom"]), tmp_path / "他")
    save_adapter(apply(pocket, q, SPEC), tmp_path / "懐")
    for folder, problem in (
        ("他", r"missing: base_model\S+ and 7 more; unexpected: base"),
        ("懐", "of another shape: b"),
    ):
        with pytest.raises(TrainingError, match=f"{folder} was trained on another network: .*{problem}"):
            apply(base(), q.model_copy(update={"init": f"file://{tmp_path}/{folder}"}), SPEC)
    (tmp_path / "他" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(TrainingError, match="他 is IA3, not LORA"):
        apply(base(), q.model_copy(update={"init": f"file://{tmp_path}/他"}), SPEC)
    with pytest.raises(StoreError, match="無い"):
        apply(base(), q.model_copy(update={"init": f"file://{tmp_path}/無い"}), SPEC)


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


def test_embeddings_are_adapted_too_but_not_by_pissa() -> None:
    network = apply(base(), method(targets=("embed_tokens.0",)), SPEC)
    (a,) = (name for name, p in network.named_parameters() if p.requires_grad and "lora_embedding_B" in name)
    assert "embed_tokens.0" in a
    with pytest.raises(TrainingError, match=r"'embed_tokens.0' is an Embedding, and PEFT starts linear layers alone"):
        apply(base(), method(targets=("embed_tokens.0",), pissa=True), SPEC)


def test_targets_that_are_all_in_modules_trained_in_full_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"all of them are in modules that method\.train_also trains in full"):
        apply(base(), method(targets=("enc_to_dec_proj",), train_also=({"modules": "enc_to_dec_proj"},)), SPEC)


def test_lora_plus_has_the_rates_of_pefts_own_helper() -> None:
    network = apply(base(), method(lora_plus=16), SPEC)
    theirs = create_loraplus_optimizer(network, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    ours = parameter_groups(network, method(lora_plus=16), Optimizer(lr=1e-4))
    wanted = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    found = {id(p): 1e-4 * group["lr_scale"] for group in ours for p in group["params"]}
    assert found == pytest.approx(wanted)
    assert sorted(set(wanted.values())) == pytest.approx([1e-4, 16e-4])
