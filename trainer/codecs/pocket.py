"""The demo's codec: small enough to ship, learned from the songs it has to play.

A lapped transform (MDCT with a sine window, Princen & Bradley 1986) turns each 20 ms into 320 coefficients; residual
vector quantisation (Zeghidour et al. 2021, arXiv:2107.03312, section III-C) turns those into four codes. As the
transform is orthogonal, the error of the codes is the error of the sound.

Measured SNR of the built-in codebooks with 1, 2, 3 and 4 codes a frame: 11.1, 15.6, 18.8, 21.0 dB on the demo songs of
style A and 9.4, 13.9, 17.0, 19.3 dB on those of style B, which they were learned from; on twelve other songs (seed 5)
9.0, 12.2, 14.3, 15.7 dB and 9.0, 12.8, 15.3, 17.0 dB. Other music, which these codebooks never heard, keeps its outline
(2.5 to 4.5 dB): learn codebooks from it.

``python -m trainer.codecs.pocket DIR OUT`` learns the codebooks from the songs in DIR.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.fft import dct

from trainer.audio.decode import SUFFIXES, load
from trainer.shapes import Float, Int
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec

log = logging.getLogger(__name__)
BUILTIN = Path(__file__).parents[1] / "builtin" / "pocket" / "codec.safetensors"
SAMPLE_RATE = 16_000
HOP = 320
CODEBOOKS = 4
VOCABULARY = 256
_HALF = HOP // 2
_ANGLES = np.pi / (4 * _HALF) * (np.arange(_HALF) + _HALF + 0.5)
_SIN, _COS = np.sin(_ANGLES).astype(np.float32), np.cos(_ANGLES).astype(np.float32)
_CHUNK = 4096
"""Frames quantised at a time, which bounds the memory that a long song needs."""


class PocketCodec:
    """16 kHz mono ⇄ 50 frames a second of 4 codes out of 256.

    Entry 0 of every codebook is silence, so silence stays silent.
    """

    name = "pocket"
    sample_rate = SAMPLE_RATE
    channels = 1
    frame_rate = SAMPLE_RATE / HOP
    codebooks = CODEBOOKS
    vocabulary = VOCABULARY
    timed = ("codes",)

    def __init__(self, books: Float[np.ndarray, "K V D"]) -> None:
        self._books = books.astype(np.float32)
        self.fingerprint = hashlib.sha256(books.astype("<f2").tobytes()).hexdigest()[:16]

    @classmethod
    def open(cls, model: BaseModelSpec) -> "PocketCodec":
        """The codec with the codebooks of ``model.codec.weights["codebooks"]`` (``file://``), or the built-in ones.

        Raises:
            DataError: the file is missing or holds something else.
        """
        url = model.codec.weights.get("codebooks")
        return cls(_read(BUILTIN if url is None else _local(url)))

    def encode(self, audio: Float[np.ndarray, "1 N"]) -> dict[str, np.ndarray]:
        """``codes`` [4, T] (uint8) of ``audio``; the last frame is filled up with silence: ``T = ceil(N / 320)``."""
        coefficients = mdct(audio[0])
        starts = range(0, max(len(coefficients), 1), _CHUNK)
        codes = np.concatenate([quantise(coefficients[i : i + _CHUNK], self._books)[0] for i in starts], axis=1)
        return {"codes": codes.astype(np.uint8)}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 N"]:
        """Audio of ``codes`` [K, T]: ``N = 320 · T``. With fewer than four rows, a coarser sound.

        Raises:
            DataError: a code is not in 0..255, or there are more than four rows.
        """
        codes = arrays["codes"]
        if codes.size and not (len(codes) <= CODEBOOKS and codes.min() >= 0 and codes.max() < VOCABULARY):
            raise DataError(
                f"codes of shape {codes.shape}, {codes.min()} to {codes.max()}, are not the pocket codec's",
                "decode them with the codec that made them",
            )
        coefficients = np.zeros((codes.shape[1], HOP), np.float32)
        for book, row in zip(self._books, codes, strict=False):
            coefficients += book[row]
        return inverse_mdct(coefficients)[None]


def mdct(samples: Float[np.ndarray, " N"]) -> Float[np.ndarray, "T 320"]:
    """Orthonormal MDCT of ``samples``, filled up with zeros to whole frames.

    Computed as rotations across each border between blocks (the window) and a DCT-IV of each block. At the two ends
    there is nothing to overlap with, so nothing is rotated and every sample is kept.
    """
    blocks = np.zeros((-(-len(samples) // HOP), HOP), np.float32)
    blocks.reshape(-1)[: len(samples)] = samples
    left, right = blocks[:-1, : -_HALF - 1 : -1], blocks[1:, :_HALF]
    left[...], right[...] = _SIN * left - _COS * right, _SIN * right + _COS * left
    return np.asarray(dct(blocks, type=4, norm="ortho", axis=1))


def inverse_mdct(coefficients: Float[np.ndarray, "T 320"]) -> Float[np.ndarray, " N"]:
    """Samples of ``mdct``'s coefficients."""
    blocks = np.asarray(dct(coefficients, type=4, norm="ortho", axis=1))
    left, right = blocks[:-1, : -_HALF - 1 : -1], blocks[1:, :_HALF]
    left[...], right[...] = _SIN * left + _COS * right, _SIN * right - _COS * left
    return blocks.reshape(-1)


def quantise(
    frames: Float[np.ndarray, "T D"], books: Float[np.ndarray, "K V D"]
) -> tuple[Int[np.ndarray, "K T"], Float[np.ndarray, "T D"]]:
    """Each frame's nearest entry in the first book, then what is left in the next; returns codes and the final rest."""
    codes = np.zeros((len(books), len(frames)), np.int16)
    rest = frames.astype(np.float32)
    for k, book in enumerate(books):
        codes[k] = _nearest(rest, book)
        rest = rest - book[codes[k]]
    return codes, rest


def learn(frames: Float[np.ndarray, "T D"], seed: int = 0, passes: int = 40) -> Float[np.ndarray, "K V D"]:
    """Codebooks for ``frames``: one k-means after another, each on what the earlier ones leave.

    Means move as exponential averages over batches (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1); an entry
    that no frame chooses any more is put where the error is largest.
    """
    dice = np.random.Generator(np.random.PCG64(seed))
    books = np.zeros((CODEBOOKS, VOCABULARY, frames.shape[1]), np.float32)
    rest = frames.astype(np.float32)
    for k in range(CODEBOOKS):
        books[k] = _cluster(rest, dice, passes).astype(np.float16)
        rest = quantise(rest, books[k : k + 1])[1]
        log.info("codebook %d learned", k + 1)
    return books


def signal_to_noise(frames: Float[np.ndarray, "T D"], books: Float[np.ndarray, "K V D"]) -> list[float]:
    """SNR in dB with the first codebook, the first two, …."""
    power = float(np.square(frames, dtype=np.float64).sum())
    rests = [quantise(frames, books[: k + 1])[1] for k in range(len(books))]
    return [10 * float(np.log10(power / np.square(rest, dtype=np.float64).sum())) for rest in rests]


def main(argv: list[str] | None = None) -> int:
    """``python -m trainer.codecs.pocket DIR OUT``: learn, print the SNR, write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.codecs.pocket", description="Learn the pocket codec.")
    parser.add_argument("folder", metavar="DIR", type=Path, help="songs, at any depth")
    parser.add_argument("out", metavar="OUT", type=Path, help="codec.safetensors")
    chosen = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        _learn_from(chosen.folder, chosen.out)
    except UtaforgeError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def _learn_from(source: Path, out: Path) -> None:
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{source}: holds no songs", "give a folder with audio files")
    songs = [mdct(load(path, SAMPLE_RATE, 1)[0]) for path in paths]
    books = learn(np.concatenate(songs))
    for folder in sorted({path.parent for path in paths}):
        part = np.concatenate([song for song, path in zip(songs, paths, strict=True) if path.parent == folder])
        log.info("%s: SNR by codebooks %s dB", folder.name, [round(snr, 1) for snr in signal_to_noise(part, books)])
    save_file({"codebooks": books.astype(np.float16)}, out)
    log.info("%s: %d bytes", out, out.stat().st_size)


def _read(path: Path) -> np.ndarray:
    cure = "give a file that `python -m trainer.codecs.pocket` wrote, or leave out model.codec.weights"
    if not path.is_file():
        raise DataError(f"{path}: no such codebooks", cure)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: is no safetensors file ({error})", cure) from error
    books = tensors.get("codebooks")
    if books is None or books.shape != (CODEBOOKS, VOCABULARY, HOP) or not np.isfinite(books).all():
        raise DataError(f"{path}: holds no codebooks of the pocket codec", cure)
    return books


def _local(url: str) -> Path:
    if not url.startswith("file://"):
        raise DataError(f"model.codec.weights.codebooks: {url} is not on this machine", "copy it and write file://…")
    return Path(url.removeprefix("file://"))


def _nearest(frames: np.ndarray, book: np.ndarray) -> np.ndarray:
    return np.argmin((book * book).sum(axis=1) - 2.0 * frames @ book.T, axis=1)


def _cluster(frames: np.ndarray, dice: np.random.Generator, passes: int, batch: int = 2048) -> np.ndarray:
    """EMA k-means of ``frames``; entry 0 is and stays zero."""
    book = _spread(frames, dice)
    counts, sums = np.ones(VOCABULARY, np.float32), book.copy()
    for index in range(passes):
        decay = 0.8 if index < passes - 5 else 0.95
        order = dice.permutation(len(frames))
        for start in range(0, len(frames), batch):
            part = frames[order[start : start + batch]]
            chosen = np.zeros((VOCABULARY, len(part)), np.float32)
            nearest = _nearest(part, book)
            chosen[nearest, np.arange(len(part))] = 1.0
            counts = decay * counts + (1 - decay) * chosen.sum(axis=1)
            sums = decay * sums + (1 - decay) * (chosen @ part)
            book[1:] = sums[1:] / np.maximum(counts[1:, None], 1e-6)
            dead = 1 + np.flatnonzero(counts[1:] < 0.05)
            error = np.square(part - book[nearest]).sum(axis=1)
            worst = np.argsort(-error, kind="stable")[: len(dead)]
            book[dead[: len(worst)]] = sums[dead[: len(worst)]] = part[worst]
            counts[dead[: len(worst)]] = 1.0
    return book


def _spread(frames: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """First entries far from one another (k-means++, Arthur & Vassilvitskii 2007), beginning with zero."""
    book = np.zeros((VOCABULARY, frames.shape[1]), np.float32)
    distance = np.square(frames).sum(axis=1)
    for index in range(1, VOCABULARY):
        cumulative = np.cumsum(distance, dtype=np.float64)
        place = min(int(np.searchsorted(cumulative, dice.random() * cumulative[-1])), len(frames) - 1)
        book[index] = frames[place]
        distance = np.minimum(distance, np.square(frames - book[index]).sum(axis=1))
    return book


if __name__ == "__main__":
    sys.exit(main())
