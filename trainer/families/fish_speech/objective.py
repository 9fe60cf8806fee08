"""What is predicted from what, and the two losses.

Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/conversation.py, fish_speech/datasets/semantic.py,
fish_speech/models/text2semantic/lit_module.py, and inference.py beside it for references; v1.4.3 was run and compared.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainer.families.cross_entropy import NO_LABEL, chunked_sum, labelled
from trainer.shapes import Float, Int

from .text import Tokenizer

if TYPE_CHECKING:
    from .network import Config


class Reference(NamedTuple):
    """A recording of a voice.

    Attributes:
        text: what is said in it.
        codes: as the codec gave them.
    """

    text: str
    codes: Int[Tensor, "K T"]


def prompt(
    tokenizer: Tokenizer, text: str, speaker: str, codebooks: int, reference: Reference | None = None
) -> Int[Tensor, "1+K P"]:
    """Everything before the first audio frame.

    Args:
        tokenizer: of 1.4 or 1.5, which have prompts of their own.
        text: what is spoken or sung.
        speaker: 1.4 knows the one who speaks by name; 1.5 does not listen to it.
        codebooks: rows of codes, which are 0 where there is text.
        reference: whose voice answers; it stands there as a turn that was answered before.
    """
    system, turn = tokenizer.system, tokenizer.turn(text, speaker)
    if reference is None:
        return _without_codes(tokenizer(system + turn), codebooks)
    before = _without_codes(tokenizer(system + tokenizer.turn(reference.text, speaker)), codebooks)
    after = _without_codes([tokenizer.end, *tokenizer(turn)], codebooks)
    return torch.cat([before, _audio(tokenizer, reference.codes), after], 1)


def example(
    tokenizer: Tokenizer, text: str, speaker: str, codes: Int[Tensor, "K T"], *, ends: bool = True
) -> tuple[Int[Tensor, "1+K S"], Int[Tensor, "1+K S"]]:
    """Inputs and labels of one song, ``S = P + T``; a position's label is what comes next.

    1.4 learns the prompt's tokens too, 1.5 those from ``<|voice|>`` on. After the last frame comes ``<|im_end|>``,
    whose codes have the label 0; where a song was cut nothing is learned of what comes next.

    Args:
        tokenizer: see ``prompt``.
        text: see ``prompt``.
        speaker: see ``prompt``.
        codes: as the codec gave them.
        ends: the song is over after them.
    """
    before = prompt(tokenizer, text, speaker, len(codes))
    audio, last = _audio(tokenizer, codes), _without_codes([tokenizer.end], len(codes))
    inputs = torch.cat([before, audio], 1)
    labels = torch.cat([before, audio, last], 1)[:, 1:]
    length = before.shape[1]
    labels[1:, : length - 1] = NO_LABEL
    labels[0, : tokenizer.unlearned(length) - 1] = NO_LABEL
    if not ends:
        labels[:, -1] = NO_LABEL
    return inputs, labels


def loss_sums(
    hidden: Float[Tensor, "B S D"],
    labels: Int[Tensor, "B 1+K S"],
    places: Int[Tensor, " N"],
    fast: Float[Tensor, "N K F"],
    head: Callable[[Tensor], Tensor],
    fast_head: Callable[[Tensor], Tensor],
    config: "Config",
) -> Float[Tensor, "2"]:
    """Summed cross entropies of tokens (``base``) and of codes (``semantic``), fp32.

    A position that the fast transformer has not seen has logits of 0: each of its labels costs ln(codebook size).

    Args:
        hidden: slow hidden states.
        labels: ``NO_LABEL`` where there is none.
        places: positions, in the flattened batch, that the fast transformer has seen.
        fast: its hidden states there.
        head: hidden states → logits of tokens.
        fast_head: the fast transformer's hidden states → logits of codes.
        config: of the network.
    """
    where, tokens = labelled(labels[:, 0])
    base = chunked_sum(hidden.flatten(0, 1)[where], tokens, head, config.vocabulary)
    code_labels = labels[:, 1:].mT.flatten(0, 1)
    where, codes = labelled(code_labels[places])
    semantic = chunked_sum(fast.flatten(0, 1)[where], codes, fast_head, config.codebook_size)
    unseen = code_labels.ne(NO_LABEL).sum() - len(codes)
    return torch.stack([base, semantic + unseen * math.log(config.codebook_size)])


def _without_codes(ids: Sequence[int], codebooks: int) -> Int[Tensor, "1+K P"]:
    return functional.pad(torch.tensor([ids]), (0, 0, 0, codebooks))


def _audio(tokenizer: Tokenizer, codes: Int[Tensor, "K T"]) -> Int[Tensor, "1+K T"]:
    return torch.cat([tokenizer.frame_tokens(codes)[None], codes + tokenizer.shift])
