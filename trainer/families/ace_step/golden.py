"""ACE-Step's golden cases; see ``trainer.families.verify``."""

from typing import Any

import torch
from torch import Tensor

from trainer.codecs import dcae
from trainer.codecs.adamos import LogMel, Vocoder, VocoderConfig
from trainer.families.verify import Case

from .generate import Sampler, follow, generate
from .network import AceStepNetwork, Conditions, Config, Frames
from .objective import (
    clean,
    noisy,
    sampling_sigmas,
    squared_error,
    ssl_distance,
    timestep_index,
    training_sigmas,
)


def run(case: Case) -> dict[str, Tensor]:
    """Our outputs of ``case``."""
    kinds = {
        "logit_std": _sigmas,
        "infer_steps": _generate,
        "encoder_block_types": _dcae,
        "upsample_rates": _mel_vocoder,
    }
    if "velocity" in case.inputs:
        return _samplers(case)
    return next((outputs for told, outputs in kinds.items() if told in case.config), _train)(case)


def _sigmas(case: Case) -> dict[str, Tensor]:
    shift, timesteps = case.config["shift"], case.config["num_train_timesteps"]
    table = training_sigmas(shift, timesteps)
    draws = case.inputs["draw"] * case.config["logit_std"] + case.config["logit_mean"]
    index = timestep_index(draws, timesteps)
    found = {
        "train_sigmas": table,
        "train_timesteps": timesteps * table,
        "index": index,
        "sigma": table[index],
        "timestep": timesteps * table[index],
    }
    for steps in case.config["steps"]:
        sigmas = sampling_sigmas(steps, shift, timesteps)
        found |= {f"sigmas_{steps}": sigmas, f"timesteps_{steps}": timesteps * sigmas[:-1]}
    return found


def _samplers(case: Case) -> dict[str, Tensor]:
    return {**_followed(case, "euler"), **_followed(case, "heun"), **_followed(case, "pingpong")}


def _followed(case: Case, sampler: str) -> dict[str, Tensor]:
    given, config = case.inputs, case.config
    everywhere = torch.ones(len(given["start"]), given["start"].shape[-1], dtype=torch.bool)
    velocities, timesteps = iter(given["velocity"]), list[Tensor]()

    def flow(_: Tensor, sigma: Tensor) -> Tensor:
        timesteps.append(config["num_train_timesteps"] * sigma)
        return next(velocities)

    settings = Sampler(sampler, config["infer_steps"], 1.0, omega=config["omega_scale"], omega_over_batch=True)
    sigmas = sampling_sigmas(settings.steps, config["shift"], config["num_train_timesteps"])
    noise = iter([given["start"], *given["added"]])
    steps = list(follow(flow, noise, sigmas, Frames(everywhere, everywhere), settings))
    return {sampler: torch.stack([latents for _, latents in steps]), f"{sampler}_timesteps": torch.stack(timesteps)}


@torch.no_grad()
def _train(case: Case) -> dict[str, Tensor]:
    given, network = case.inputs, _network(case)
    mask = given["attention_mask"].bool()
    tapped: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        return lambda _module, _given, out: tapped.update({name: out})

    network.transformer_blocks[min(network.config.ssl_encoder_depths)].register_forward_hook(tap("inner_hidden"))
    network.transformer_blocks[0].get_submodule("attn").register_forward_hook(tap("linear"))
    noised = noisy(given["latents"], given["noise"], given["sigma"])
    context = network.encode(_conditions(given))
    frames = Frames(mask, torch.ones_like(mask))
    v, guesses = network(noised, given["timestep"], _conditions(given), frames, project=True)
    found = clean(noised, v, given["sigma"])
    errors = squared_error(found, given["latents"], mask) / found[0].numel() * mask.float().mean(1)
    features = ([*given["mert"]], [x[:n] for x, n in zip(given["mhubert"], given["mhubert_length"], strict=True)])
    ssl = [
        torch.stack([ssl_distance(*pair) / len(pair[1]) for pair in zip(guess, wanted, strict=True)]).mean()
        for guess, wanted in zip(guesses, features, strict=True)
    ]
    return {
        **tapped,
        "context": context.hidden * context.mask[..., None],
        "context_mask": context.mask.float(),
        "v": v,
        "x0_hat": found,
        "mse_per_sample": errors,
        "mse": errors.mean(),
        "ssl_mert": ssl[0],
        "ssl_mhubert": ssl[1],
        "loss": errors.mean() + case.config["ssl_weight"] * torch.stack(ssl).mean(),
    }


def _generate(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, case.config
    everywhere = torch.ones(len(given["noise"]), given["noise"].shape[-1], dtype=torch.bool)
    sampler = Sampler(
        sampler="euler",
        steps=config["infer_steps"],
        guidance=config["guidance_scale"],
        least_guidance=config["min_guidance_scale"],
        decay=config["guidance_interval_decay"],
        interval=config["guidance_interval"],
        momentum=config["apg_momentum"],
        norm=config["apg_norm_threshold"],
        parallel=config["apg_eta"],
        omega=config["omega_scale"],
        omega_over_batch=True,
        tau=config["erg_tau"],
        weak_lyric_layers=tuple(config["erg_lyric_layers"]) if config["use_erg_lyric"] else None,
        weak_blocks=tuple(config["erg_diffusion_layers"]) if config["use_erg_diffusion"] else None,
        shift=config["shift"],
        timesteps=config["num_train_timesteps"],
    )
    dim_text = given.get("text_hidden_null", torch.zeros_like(given["text_hidden"]))
    frames = Frames(everywhere, everywhere)
    steps = list(generate(_network(case), iter([given["noise"]]), _conditions(given), dim_text, frames, sampler))
    velocities, latents = zip(*steps, strict=True)
    return {"predictions": torch.stack(velocities), "latents": torch.stack(latents)}


def _network(case: Case) -> AceStepNetwork:
    return case.fill(AceStepNetwork(Config.of(case.config, str(case.folder))))


def _conditions(given: dict[str, Tensor]) -> Conditions:
    text_mask, lyric_mask = given["text_mask"].bool(), given["lyric_mask"].bool()
    length = torch.full((len(text_mask),), text_mask.shape[1])
    return Conditions(given["text_hidden"], text_mask, length, given["lyric_ids"], lyric_mask, given["speaker"])


@torch.no_grad()
def _dcae(case: Case) -> dict[str, Tensor]:
    given, config = case.inputs, {**case.config}
    names = {"least": "min_mel_value", "most": "max_mel_value", "shift": "shift_factor", "scale": "scale_factor"}
    scaling = dcae.Scaling(**{ours: config.pop(upstream) for ours, upstream in names.items()})
    network = case.fill(dcae.make_autoencoder(config))
    latents = dcae.encode(network, LogMel(VocoderConfig())(dcae.padded(given["waveform"]))[None], scaling)
    return {
        "mel_input": scaling.given(given["log_mel"]),
        "latents": latents,
        "latent_length": torch.tensor([dcae.whole_frames(given["waveform"].shape[1])]),
        "decoded_mel": dcae.decode(network, latents, scaling),
    }


@torch.no_grad()
def _mel_vocoder(case: Case) -> dict[str, Tensor]:
    vocoder = case.fill(Vocoder(VocoderConfig.of(case.config, str(case.folder))))
    log_mel = vocoder.mel_transform(dcae.padded(case.inputs["waveform"]))
    raw: list[Tensor] = []
    vocoder.head.conv_post.register_forward_hook(lambda _module, _given, out: raw.append(out[0]))
    audio = torch.cat([vocoder(channel[None]) for channel in log_mel])
    return {
        "log_mel": log_mel,
        "pre_tanh": torch.cat(raw)[:, : case.told["outputs"]["pre_tanh"]["shape"][1]],
        "audio": audio,
        "mel_filterbank_sum": vocoder.mel_transform.mel_scale.get_buffer("fb").sum(0),
    }
