"""The demo's instruments: additive, at phase 0 at each onset, and a voice made of a source and a filter."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

SAMPLE_RATE = 16_000
FRAME = 320
"""Samples in 20 ms."""
Instrument = Callable[[float, int], np.ndarray]
"""(Hz, length in frames) → samples [N], at most about 1."""
_HIGHEST = 7_200.0
_FORMANTS = {  # centres in Hz, of the first three resonances of a Japanese speaker's vowels
    "a": (780.0, 1240.0, 2700.0),
    "i": (310.0, 2350.0, 3100.0),
    "u": (340.0, 1260.0, 2350.0),
    "e": (500.0, 1950.0, 2700.0),
    "o": (480.0, 850.0, 2600.0),
    "n": (260.0, 1000.0, 2200.0),
}
_BANDWIDTHS = (90.0, 130.0, 220.0)


@lru_cache(maxsize=256)
def pad(hz: float, frames: int) -> np.ndarray:
    """A soft triangle that swells and stays."""
    harmonics = np.arange(1, 8, 2)
    return _tone(hz, harmonics, 1.0 / harmonics**2, frames) * _envelope(frames, attack=3, release=2)


@lru_cache(maxsize=256)
def bass(hz: float, frames: int) -> np.ndarray:
    """A round bass: a sine and its first overtones, dying away slowly."""
    return _tone(hz, np.arange(1, 4), np.array([1.0, 0.35, 0.1]), frames) * _envelope(frames, decay=1.2)


@lru_cache(maxsize=256)
def music_box(hz: float, frames: int) -> np.ndarray:
    """A struck metal tongue, ringing on for a second whatever its length."""
    return _tone(hz, np.array([1, 4]), np.array([1.0, 0.15]), 50) * _envelope(50, decay=0.3)


@lru_cache(maxsize=256)
def koto(hz: float, frames: int) -> np.ndarray:
    """A plucked string: a saw whose overtones die first."""
    harmonics = np.arange(1, 16)
    return _tone(hz, harmonics, 0.8 / harmonics, 20, fading=True) * _envelope(20, decay=0.25)


@lru_cache(maxsize=256)
def pulse(hz: float, frames: int) -> np.ndarray:
    """A bright square, held."""
    harmonics = np.arange(1, 20, 2)
    return _tone(hz, harmonics, 1.0 / harmonics, frames) * _envelope(frames, release=1)


@lru_cache(maxsize=1024)
def voice(vowel: str, hz: float, frames: int) -> np.ndarray:
    """A sung vowel (``aiueo``), a hum (``n``) or a rest (``.``): a glottal source through three resonances."""
    if vowel == ".":
        return np.zeros(frames * FRAME)
    harmonics = np.arange(1, int(_HIGHEST / hz) + 1)
    s = 1j * harmonics * hz
    levels = 1.0 / harmonics.astype(np.float64)
    for centre, bandwidth in zip(_FORMANTS[vowel], _BANDWIDTHS, strict=True):
        pole = complex(-bandwidth / 2, centre)
        levels *= np.abs(pole * pole.conjugate() / ((s - pole) * (s - pole.conjugate())))
    levels *= 0.45 / np.sqrt(np.sum(levels**2))
    return _tone(hz, harmonics, levels, frames) * _envelope(frames, attack=2, release=2)


@lru_cache(maxsize=16)
def drum(name: str) -> np.ndarray:
    """One stroke of ``kick``, ``soft kick``, ``taiko``, ``brush`` or ``hat``, always the same."""
    match name:
        case "kick":
            return _skin(50.0, 100.0, falling=0.03, decay=0.09)
        case "soft kick":
            return _skin(50.0, 40.0, falling=0.04, decay=0.1)
        case "taiko":
            return 0.8 * _skin(100.0, 60.0, falling=0.05, decay=0.12) + 0.2 * _noise(0.05, brightness=0)
        case "brush":
            return _noise(0.08, brightness=1)
        case "hat":
            return _noise(0.03, brightness=2)
    raise AssertionError(name)


def _tone(hz: float, harmonics: np.ndarray, levels: np.ndarray, frames: int, *, fading: bool = False) -> np.ndarray:
    """A sum of sines at multiples of ``hz``; with ``fading``, the higher the sooner gone."""
    seconds = np.arange(frames * FRAME) / SAMPLE_RATE
    sound = np.zeros(frames * FRAME)
    for harmonic, level in zip(harmonics, levels, strict=True):
        if harmonic * hz > _HIGHEST:
            break
        partial = level * np.sin(2 * np.pi * ((harmonic * hz * seconds) % 1.0))
        sound += partial * np.exp(-seconds * 2.0 * (harmonic - 1)) if fading else partial
    return sound


def _envelope(frames: int, *, attack: float = 0.25, release: float = 0.5, decay: float | None = None) -> np.ndarray:
    """Level over a note: ``attack`` and ``release`` in frames, ``decay`` as a time constant in seconds."""
    place = np.arange(frames * FRAME)
    rise = np.minimum(1.0, (place + 0.5) / (attack * FRAME))
    fall = np.minimum(1.0, (frames * FRAME - place - 0.5) / (release * FRAME))
    level = rise * fall
    return level if decay is None else level * np.exp(-place / (decay * SAMPLE_RATE))


def _skin(hz: float, sweep: float, *, falling: float, decay: float) -> np.ndarray:
    """A drum skin: a sine that falls from ``hz + sweep`` to ``hz``; ``falling`` and ``decay`` in seconds."""
    seconds = np.arange(20 * FRAME) / SAMPLE_RATE
    cycles = hz * seconds + sweep * falling * (1.0 - np.exp(-seconds / falling))
    return np.sin(2 * np.pi * cycles) * _envelope(20, attack=0.05, decay=decay)


def _noise(decay: float, *, brightness: int) -> np.ndarray:
    """The same stroke of noise each time, tilted up by 6 dB an octave for each degree of ``brightness``."""
    noise = np.random.Generator(np.random.PCG64(7)).random(20 * FRAME + brightness) * 2 - 1
    for _ in range(brightness):
        noise = np.diff(noise) * 0.7
    return noise * _envelope(20, attack=0.05, decay=decay)
