"""HeartMuLa's golden cases; see ``trainer.families.verify``."""

import torch
from torch import Tensor

from trainer.codecs.heartcodec import joined, read_config, window_latents
from trainer.codecs.heartcodec_network import HeartCodecNetwork
from trainer.families.verify import Case

from .generate import generate
from .llama import LlamaConfig
from .network import HeartMuLaConfig, HeartMuLaNetwork
from .objective import contexts


@torch.no_grad()
def run(case: Case) -> dict[str, Tensor]:
    """Our outputs of ``case``."""
    if "codes" in case.inputs:
        return _codec(case)
    return _generate(case) if "max_frames" in case.config else _train(case)


def _network(case: Case) -> HeartMuLaNetwork:
    told = case.config
    stacks = {stack: LlamaConfig(**told[stack]) for stack in ("backbone", "decoder")}
    sizes = ("text_vocab_size", "audio_vocab_size", "audio_num_codebooks", "muq_dim")
    ids = ("text_bos_id", "text_eos_id", "audio_eos_id")
    return case.fill(HeartMuLaNetwork(HeartMuLaConfig(**stacks, **{name: told[name] for name in sizes + ids})))


def _train(case: Case) -> dict[str, Tensor]:
    network, given = _network(case), case.inputs
    tokens, slot = given["tokens"], given["muq_index"]
    mask, frames, valid = (given[name].bool() for name in ("tokens_mask", "frame_mask", "valid_mask"))
    unconditional = _unconditional(case, network)
    embeddings = network.embed(tokens, mask, unconditional, slot)
    hidden = network.hidden(embeddings, mask)
    context, codes = contexts(hidden, tokens, frames)
    depth = network.depth(context, codes[:, :-1])
    books = range(1, codes.shape[1])
    means = network(tokens, mask, unconditional, slot) / len(context)
    return {
        "input_embeddings": embeddings * valid[..., None],
        "hidden": hidden * valid[..., None],
        "codebook0_logits": network.logits(0, context),
        "depth_logits": torch.stack([network.logits(book, depth[:, book]) for book in books], 1),
        "ce0": means[0],
        "ce_k": means[1:],
        "loss": means[0] + means[1:].mean(),
    }


def _unconditional(case: Case, network: HeartMuLaNetwork) -> Tensor:
    """The songs without text: a case says so in words alone, but the wanted row at their slot has no other value."""
    slot = case.inputs["muq_index"]
    rows = case.wanted["input_embeddings"][torch.arange(len(slot)), slot]
    return torch.isclose(rows, network.unconditional_text_embedding.weight).all(1)


def _generate(case: Case) -> dict[str, Tensor]:
    guided: list[Tensor] = []

    def take(_frame: int, _book: int, logits: Tensor) -> Tensor:
        guided.append(logits[0])
        return logits.argmax(-1)

    prompt, slot = case.inputs["tokens"], int(case.inputs["muq_index"])
    limit, guidance = case.config["max_frames"], case.config["cfg_scale"]
    (codes,) = generate(_network(case), [prompt], [slot], [limit], guidance, take)
    logits = torch.stack(guided).unflatten(0, (-1, len(codes)))
    return {"codes": torch.from_numpy(codes), "guided_logits": logits[: codes.shape[1]]}


def _codec(case: Case) -> dict[str, Tensor]:
    network = HeartCodecNetwork(read_config(case.config))
    flow = case.fill(network.flow_matching, "flow_matching.")
    case.fill(network.scalar_model["decoder"], "scalar_model.decoder.")
    codes, noise, told = case.inputs["codes"], case.inputs["noise"], case.config
    condition = flow.condition(codes[None])
    seen = case.told["outputs"]["estimator"]["shape"][1]
    start, mu = noise[0][:, :seen], condition.repeat_interleave(2, 1)[:, :seen]
    draws = iter(noise)
    setting = {"seconds": told["duration"], "steps": told["num_steps"], "guidance": told["guidance_scale"]}
    latents = list(window_latents(network, codes, lambda _: next(draws), **setting))
    return {
        "condition": condition,
        "estimator": flow.estimator(torch.cat([start, torch.zeros_like(start), mu], 2), torch.tensor([0.3])),
        "latents": torch.stack(latents)[:, None],
        "scalar_wave": network.waveform(case.inputs["decoder_latents"][0]),
        "waveform": joined(network, iter(latents), codes.shape[1], told["duration"]),
    }
