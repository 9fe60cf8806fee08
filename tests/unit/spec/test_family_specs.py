"""Sizes, targets and presets of the families agree with what upstream publishes and with what was measured."""

import json

import pytest

from trainer.families.fish_speech.spec import FishSpeech
from trainer.families.musicgen.spec import MusicGen
from trainer.families.songbloom.spec import SongBloom
from trainer.spec.errors import JobError
from trainer.spec.families import FAMILIES, dims_of, sampling_of
from trainer.spec.family import lora_parameters
from trainer.spec.model import Lora

MEASURED = [
    ("musicgen", 1, ("q_proj", "v_proj"), 786_432),
    ("musicgen", 1, FAMILIES["musicgen"].safe_targets, 1_572_864),
    ("musicgen", 16, FAMILIES["musicgen"].presets["musicgen/all"].targets, 40_894_464),
    ("songbloom", 16, ("q_proj", "v_proj"), 3_538_944),
    ("heartmula", 16, FAMILIES["heartmula"].presets["heartmula/attention"].targets, 10_207_232),
    ("ace_step", 1, FAMILIES["ace_step"].presets["ace-step/upstream"].targets, 1_022_976),
    ("fish_speech", 8, FAMILIES["fish_speech"].presets["fish-speech/r8a16"].targets, 6_171_136),
]


@pytest.mark.parametrize(("family", "rank", "targets", "count"), MEASURED)
def test_adapter_size_is_what_was_measured(family, rank, targets, count):
    assert lora_parameters(FAMILIES[family], FAMILIES[family].dims, rank, targets) == count


def test_adapter_of_fish_speech_1_4_is_what_was_measured():
    family = FAMILIES["fish_speech"]
    dims = dims_of(FishSpeech(family="fish_speech", pretrained="random:full", version="1.4"))
    assert dims.parameters == 494_462_976
    assert lora_parameters(family, dims, 8, family.presets["fish-speech/r8a16"].targets) == 5_050_368


def test_dora_adds_one_magnitude_for_each_output():
    family = FAMILIES["musicgen"]
    plain, dora = (lora_parameters(family, family.dims, 8, ("fc1",), dora=dora) for dora in (False, True))
    assert dora - plain == 48 * 8192


def test_layers_of_a_module_that_is_trained_in_full_have_no_adapter():
    family, targets = FAMILIES["ace_step"], FAMILIES["ace_step"].safe_targets
    whole, left = (
        lora_parameters(family, family.dims, 4, targets, train_also=also) for also in ((), ("lyric_encoder",))
    )
    assert whole - left == 6 * 3 * 4 * (1024 + 1024)
    assert lora_parameters(family, family.dims, 4, targets, train_also=("lyric_proj",)) == whole


def test_a_preset_has_upstreams_dropout_unless_the_job_says_otherwise():
    assert Lora(type="lora", preset="fish-speech/r8a16").dropout == 0.01
    assert Lora(type="lora", preset="fish-speech/r8a16", dropout=0).dropout == 0


def test_musicgen_large_counts_as_many_parameters_as_upstream():
    assert FAMILIES["musicgen"].dims.parameters == 3_255_382_016 + 1_574_912


def test_dims_come_from_the_configuration_in_a_local_folder(tmp_path):
    model = MusicGen(family="musicgen", pretrained=f"file://{tmp_path}")
    assert dims_of(model) == FAMILIES["musicgen"].dims
    decoder = {"hidden_size": 32, "num_hidden_layers": 3, "ffn_dim": 48, "vocab_size": 128, "num_codebooks": 2}
    (tmp_path / "config.json").write_text(json.dumps({"decoder": decoder, "text_encoder": {"d_model": 16}}))
    dims = dims_of(model)
    assert (dims.layers, dims.width, dims.ffn, dims.heads, dims.vocabulary, dims.codebooks) == (3, 32, 48, 16, 128, 2)
    (tmp_path / "config.json").write_text("歌")
    with pytest.raises(JobError, match=r"model\.pretrained: .*config.json is not the configuration of a MusicGen"):
        dims_of(model)


def test_every_target_and_preset_names_modules_that_exist():
    for family in FAMILIES.values():
        for targets in (family.safe_targets, *(preset.targets for preset in family.presets.values())):
            for target in targets:
                assert lora_parameters(family, family.dims, 1, (target,)) > 0, (family.name, target)
                assert family.harm(target) is None


UPSTREAM: dict[str, dict[str, float | str]] = {
    "musicgen": {"guidance": 3.0, "temperature": 1.0, "top_k": 250},  # audiocraft's recipe
    "songbloom": {  # ``inference:`` of the 150 s release; the penalty is in songbloom_mvsa.py@ef78022
        "guidance": 1.5, "temperature": 0.9, "top_k": 100, "steps": 36, "flow_temperature": 0.95,
        "repetition_penalty": 1.1,
    },
    "heartmula": {"guidance": 1.5, "temperature": 1.0, "top_k": 50},  # music_generation.py@3981c52
    "ace_step": {"guidance": 15.0, "sampler": "euler", "steps": 60},  # pipeline_ace_step.py@d612523
    "fish_speech": {"temperature": 0.7, "top_p": 0.7, "repetition_penalty": 1.2, "top_k": 0},  # v1.5.1, no top-k
}  # fmt: skip


def test_songs_are_sampled_as_upstream_samples_them():
    assert {name: family.sampling for name, family in FAMILIES.items()} == UPSTREAM


@pytest.mark.parametrize(
    ("told", "flow_temperature"),
    [
        ({"pretrained": "s3://歌/songbloom_full_150s"}, 0.95),
        ({"pretrained": "s3://歌/songbloom_full_240s"}, 0.9),
        ({"pretrained": "s3://歌/songbloom", "segment_seconds": 240}, 0.9),
    ],
)
def test_the_release_of_240_s_has_a_flow_temperature_of_its_own(told, flow_temperature):
    assert sampling_of(SongBloom(family="songbloom", **told)) == UPSTREAM["songbloom"] | {
        "flow_temperature": flow_temperature
    }


def test_harm_is_matched_by_whole_names():
    songbloom = FAMILIES["songbloom"]
    assert songbloom.harm("nar_dit.layers.0.self_attn.to_qkv")
    assert songbloom.harm("up_proj")
    assert songbloom.harm("mlp.up_proj") is None
    assert songbloom.harm("kv") is None


def test_targets_default_to_the_safe_set_and_follow_a_preset():
    family = FAMILIES["musicgen"]
    assert family.targets(Lora(type="lora")) == family.safe_targets
    assert family.targets(Lora(type="lora", preset="musicgen/all"))[-1] == "fc2"
