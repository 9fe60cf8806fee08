"""MusicGen's golden cases; see ``trainer.families.verify``."""

import torch
from torch import Tensor
from transformers import EncodecConfig, EncodecModel

from trainer.codecs.encodec import decode, encode
from trainer.families.verify import Case

from .network import MusicGenNetwork
from .objective import delay
from .weights import Release


def run(case: Case) -> dict[str, Tensor]:
    """Our outputs of ``case``."""
    return _encodec(case) if "upsampling_ratios" in case.config else _delay(case)


@torch.no_grad()
def _delay(case: Case) -> dict[str, Tensor]:
    text = {"d_model": case.config["text_encoder_d_model"]}
    release = Release("golden", None, {"decoder": case.config["decoder"], "text_encoder": text})
    network = case.fill(MusicGenNetwork(release.decoder_config(dropout=0.0), release.text_width))
    given = case.inputs
    ids, labels = delay(given["codes"], given["codes_length"], network.pad)
    mask = given["text_mask"].bool()
    sums = network(ids, given["text_hidden"], mask, labels=labels)
    frames = given["codes_length"].sum()
    return {
        "decoder_input_ids": ids,
        "labels": labels,
        "mask": (labels >= 0).long(),
        "logits": network(ids, given["text_hidden"], mask),
        "ce_sum": sums,
        "count": frames.expand(len(sums)),
        "loss_per_codebook": sums / frames,
        "loss": (sums / frames).mean(),
    }


@torch.no_grad()
def _encodec(case: Case) -> dict[str, Tensor]:
    model = case.fill(EncodecModel(EncodecConfig(**case.config)))
    codes = encode(model, case.inputs["waveform"])
    return {
        "embeddings": model.encoder(case.inputs["waveform"]),
        "codes": codes,
        "quantized": model.quantizer.decode(codes.transpose(0, 1)),
        "audio": decode(model, codes),
    }
