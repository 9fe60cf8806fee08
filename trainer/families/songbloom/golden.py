"""SongBloom's golden cases; see ``trainer.families.verify``."""

import numpy as np
import torch
from torch import Tensor

from trainer.families.cross_entropy import NO_LABEL
from trainer.families.verify import Case

from .config import from_upstream
from .family import FLOW_WEIGHT
from .generate import Settings, generate
from .network import SongBloom
from .objective import Draws, flow_pairs, labels_of, valid_blocks
from .text import Vocabulary, lyric_batch


def run(case: Case) -> dict[str, Tensor]:
    """Our outputs of ``case``."""
    network = case.fill(SongBloom(from_upstream(case.config, max_seconds=150.0)))
    return _generated(case, network) if "generate" in case.told else _trained(case, network)


def _trained(case: Case, network: SongBloom) -> dict[str, Tensor]:
    given, config = case.inputs, network.config
    nothing = case.told["null_condition"]
    lyrics = _lyrics(network, [""] * len(given["x_len"]) if nothing else case.told["strings"]["lyrics"])
    prompt = given["prompt_latents"] * (not nothing)
    sketch, latents, length = given["x_sketch"], given["x_latent"], given["x_len"]
    prefix = network.condition_provider(lyrics, prompt)
    plan = network.plan(prefix, sketch, latents)
    ends = torch.ones_like(length, dtype=torch.bool)
    labels = labels_of(sketch, length, ends, config.eos)
    valid = valid_blocks(length, plan.h.shape[1], config.block)
    flow = flow_pairs(latents, valid, given["t"], given["noise"])
    kept = torch.ones(len(given["t"]), dtype=torch.bool)
    draws = Draws(given["t"], given["noise"], kept, kept)
    blocks = sketch.unflatten(1, (-1, config.block))[valid]
    predicted = network.velocity(plan.h[valid], blocks, flow.previous, flow.noised, given["t"], kept, kept)
    entropy, error = network("losses", lyrics, prompt, sketch, latents, length, ends, draws)
    ce, mse = entropy / (labels != NO_LABEL).sum(), error / given["noise"].numel()
    total = ce + FLOW_WEIGHT * mse
    network.zero_grad()
    total.backward()
    parameters = dict(network.named_parameters())
    norms = [_norm(parameters[key].grad) for key in case.told["grad_keys"]]
    return {
        "lyric_ids": lyrics[:, 0],
        "lyric_special_ids": lyrics[:, 1],
        "lyric_sentence_ids": lyrics[:, 2],
        "prefix": prefix,
        "ar_logits": network.skeleton_classifier(plan.states),
        "ar_target": labels.masked_fill(labels == NO_LABEL, config.pitches + 1),
        "h": plan.h[valid],
        "nar_noised": flow.noised,
        "nar_prev": flow.previous,
        "nar_pred": predicted,
        "nar_target": flow.target,
        "ce": ce,
        "mse": mse,
        "total": total,
        "grad_norm": torch.stack(norms),
    }


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "every parameter is in the loss"
    return gradient.norm()


class _Given:
    """A case's noise, and ids that are always the likeliest."""

    def __init__(self, noise: Tensor) -> None:
        self._noise = noise.numpy()

    def chances(self, block: int, count: int) -> np.ndarray:
        """Of no effect: one id remains."""
        return np.zeros(count)

    def noise(self, block: int, shape: tuple[int, int]) -> np.ndarray:
        """Of ``block``."""
        return self._noise[block].reshape(shape)


def _generated(case: Case, network: SongBloom) -> dict[str, Tensor]:
    told = case.told["generate"]
    guidance = told["cfg_coef"]
    plan_guidance, flow_guidance = guidance if isinstance(guidance, list) else (guidance, guidance)
    settings = Settings(
        plan_guidance=plan_guidance,
        flow_guidance=flow_guidance,
        temperature=1.0,
        top_k=1,
        steps=told["steps"],
        flow_temperature=told["diff_temp"],
        repetition_penalty=1.1 if told["penalty_repeat"] else 1.0,
        penalty_window=told.get("penalty_window", 50),
    )
    lyrics = _lyrics(network, [*case.told["strings"]["lyrics"], ""])
    frames, draws = [told["max_frames"]], [_Given(case.inputs["noise"])]
    [(sketch, latents)] = generate(network, lyrics, case.inputs["prompt_latents"], frames, draws, settings)
    return {"sketch": torch.from_numpy(sketch)[None], "latents": torch.from_numpy(latents)[None]}


def _lyrics(network: SongBloom, texts: list[str]) -> Tensor:
    vocabulary = Vocabulary(network.config.tokens, network.config.sentences)
    annotated = [vocabulary.annotate(vocabulary.encode(text)[0]) for text in texts]
    return torch.from_numpy(lyric_batch(annotated))
