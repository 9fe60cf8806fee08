"""fish-speech's golden cases; see ``trainer.families.verify``."""

import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from trainer.codecs.firefly import Firefly, FireflyConfig
from trainer.families.cross_entropy import NO_LABEL
from trainer.families.fish_speech.spec import SPEC
from trainer.families.verify import Case

from .adapter import from_upstream, to_upstream
from .generate import Sampler, generate
from .network import Config, FishSpeechNetwork
from .protos import read_protos


def run(case: Case) -> dict[str, Tensor]:
    """Our outputs of ``case``."""
    if "expected.json" in case.told["outputs"]:
        return _protos(case)
    if "backbone" in case.config:
        return _firefly(case)
    if "lora" in case.told:
        return _lora(case)
    return _generate(case) if "generate" in case.told else _train(case, case.fill(_network(case)))


def _network(case: Case) -> FishSpeechNetwork:
    special = case.told["special"]
    if "semantic_id" in special:
        semantic = range(special["semantic_id"], special["semantic_id"] + 1)
    else:
        semantic = range(special["semantic_begin_id"], special["semantic_end_id"] + 1)
    return FishSpeechNetwork(Config.read(case.config), semantic)


def _train(case: Case, network: nn.Module) -> dict[str, Tensor]:
    inputs, labels = case.inputs["inp"], case.inputs["labels"]
    padding = case.inputs["key_padding_mask"].bool()
    with torch.no_grad():
        token_logits, codebook_logits = network(inputs, padding=padding)
    base, semantic = network(inputs, labels, padding)
    base, semantic = base / (labels[:, 0] != NO_LABEL).sum(), semantic / (labels[:, 1:] != NO_LABEL).sum()
    (base + semantic).backward()
    gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    if isinstance(network, PeftModel):
        gradients = to_upstream({name.replace(".default", ""): value for name, value in gradients.items()})
    return {
        "token_logits": token_logits,
        "codebook_logits": codebook_logits,
        "base_loss": base,
        "semantic_loss": semantic,
        "total": base + semantic,
        "grad_norm": torch.stack([gradients[key].norm() for key in case.told["grad_keys"]]),
    }


def _generate(case: Case) -> dict[str, Tensor]:
    told = case.told["generate"]
    sampler = Sampler(told["temperature"], told["top_p"], top_k=0, repetition_penalty=told["repetition_penalty"])
    frames, prompt = told["max_new_tokens"], case.inputs["prompt"]
    draws = torch.zeros(1, frames, len(prompt))
    (codes,) = generate(
        case.fill(_network(case)), [prompt], [frames], draws, sampler, case.told["special"]["im_end_id"]
    )
    return {"codes": codes}


def _lora(case: Case) -> dict[str, Tensor]:
    network, state, told = _network(case), case.state(), case.told["lora"]
    network.load_state_dict({key: value for key, value in state.items() if ".lora_" not in key}, strict=True)
    with torch.no_grad():
        base_logits, _ = network.eval()(case.inputs["inp"], padding=case.inputs["key_padding_mask"].bool())
    targets = list(SPEC.presets["fish-speech/r8a16"].targets)
    adapted = get_peft_model(network, LoraConfig(r=told["r"], lora_alpha=told["lora_alpha"], target_modules=targets))
    adapter = {key: value for key, value in state.items() if ".lora_" in key}
    assert not set_peft_model_state_dict(adapted, from_upstream(adapter)).unexpected_keys
    outputs = _train(case, adapted.eval())
    merged = adapted.merge_and_unload().state_dict()
    names = [name for name in case.told["outputs"] if name.startswith("merged/")]
    return {
        **outputs,
        "token_logits_base": base_logits,
        **{name: merged[name.removeprefix("merged/")] for name in names},
    }


@torch.no_grad()
def _firefly(case: Case) -> dict[str, Tensor]:
    network, given = case.fill(Firefly(FireflyConfig.read(case.config))), case.inputs
    audio, lengths = given["audio"][:, 0], given["audio_lengths"]
    codes, frames = network.encode(audio, lengths)
    waveform, samples = network.decode(codes, frames)
    decoded, decoded_samples = network.decode(given["indices"], given["indices_lengths"])
    return {
        "mel": network.spec_transform(audio),
        "features": network.features(audio, lengths),
        "codes": codes,
        "feature_lengths": frames,
        "z": network.quantizer.decode(codes),
        "waveform": waveform,
        "waveform_lengths": samples,
        "decoded": decoded,
        "decoded_lengths": decoded_samples,
    }


def _protos(case: Case) -> dict[str, Tensor]:
    """0 where the file says what ``expected.json`` says, else 1."""
    (file,) = case.folder.glob("*.protos")
    groups = [
        {
            "source": group.source,
            "name": group.name,
            "sentences": [{"texts": one.texts, "semantics": one.codes.tolist()} for one in group.sentences],
        }
        for group in read_protos(file)
    ]
    expected = json.loads((case.folder / "expected.json").read_text(encoding="utf-8"))
    return {"expected.json": torch.tensor([float(groups != expected["groups"])])}
