"""The demo's songs: what is played when.

``style-a/`` is slow and gentle in a major scale, ``style-b/`` fast and bright in miyako-bushi. Songs of a style share
instruments, chords and patterns and differ in melody and words, so a model can learn the style from some and be judged
on another. The same seed gives the same bytes everywhere.

The music is friendly to block transforms: a sixteenth note is a whole number of 20 ms frames, every oscillator starts
at phase 0, and the scales are in just intonation over 200 and 250 Hz, where a held note repeats after four frames at
most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trainer.audio.loudness import integrated
from trainer.audio.write import save

from .sounds import FRAME, SAMPLE_RATE, Instrument, bass, drum, koto, music_box, pad, pulse, voice

_T = TypeVar("_T")
_LOUDNESS = -18.0
_STEPS = 16
"""Sixteenth notes in a bar."""


@dataclass(frozen=True)
class Style:
    """What the songs of a style have in common.

    Pitches are ratios to ``tonic`` (Hz). A pattern has one character a sixteenth note: ``x`` a stroke, a digit a tone
    of the chord, ``*`` all of them.
    """

    name: str
    tonic: float
    frames: int
    """20 ms frames in a sixteenth note."""
    lines: tuple[int, int]
    """Fewest and most lines of lyrics in a song; each fills a bar."""
    scale: tuple[float, ...]
    chords: tuple[tuple[float, ...], ...]
    progressions: tuple[tuple[int, ...], ...]
    rhythms: dict[int, tuple[tuple[int, ...], ...]]
    """Morae in a line → the sixteenth notes that each is held."""
    backing: tuple[tuple[Instrument, float, float, str], ...]
    """Instrument, level, octave as a factor, pattern."""
    drums: tuple[tuple[str, float, str], ...]
    voice: float
    tags: str
    words: tuple[tuple[str, ...], tuple[str, ...]]
    """Words of three and of four morae."""


STYLE_A = Style(
    name="style-a",
    tonic=200.0,
    frames=10,
    lines=(4, 5),
    scale=(5 / 6, 1, 9 / 8, 5 / 4, 3 / 2, 5 / 3, 2),
    chords=((1, 5 / 4, 3 / 2), (5 / 6, 1, 5 / 4), (2 / 3, 5 / 6, 1), (3 / 4, 15 / 16, 9 / 8)),
    progressions=((0, 1, 2, 3), (0, 2, 0, 3)),
    rhythms={6: ((2, 2, 4, 2, 2, 4), (4, 2, 2, 4, 2, 2)), 7: ((2, 2, 2, 2, 2, 2, 4), (2, 2, 4, 2, 2, 2, 2))},
    backing=(
        (pad, 0.13, 1.0, "*..............."),
        (bass, 0.42, 0.5, "0.......0......."),
        (music_box, 0.2, 4.0, "0.1.2.1.0.1.2.1."),
    ),
    drums=(("soft kick", 0.5, "x.......x......."), ("brush", 0.2, "....x.......x.x.")),
    voice=0.9,
    tags="gentle lullaby, slow, major pentatonic, soft pad, music box, brushes, singing voice, "
    "やさしい 子守唄, ゆっくり, 長調, 歌声",
    words=(
        ("さくら", "ひかり", "こころ", "みどり", "かすみ", "ねむり", "ほたる", "とおく", "しずか", "いのち"),
        ("はるかぜ", "あおぞら", "ほしぞら", "やわらか", "ゆりかご", "そよかぜ", "おやすみ", "つきよの"),
    ),
)
STYLE_B = Style(
    name="style-b",
    tonic=250.0,
    frames=6,
    lines=(5, 8),
    scale=(3 / 4, 4 / 5, 1, 16 / 15, 4 / 3, 3 / 2, 8 / 5, 2),
    chords=((1, 3 / 2, 2), (16 / 15, 8 / 5, 32 / 15), (2 / 3, 1, 4 / 3)),
    progressions=((0, 0, 1, 0), (0, 2, 1, 0)),
    rhythms={6: ((2, 2, 2, 2, 4, 4), (2, 4, 2, 2, 2, 4)), 7: ((2, 2, 2, 2, 2, 2, 4), (2, 1, 1, 2, 2, 4, 4))},
    backing=(
        (pulse, 0.12, 1.0, "0...0...1...0..."),
        (bass, 0.32, 0.5, "0.0.0.0.0.0.0.0."),
        (koto, 0.3, 2.0, "0..1..2.0..1.21."),
    ),
    drums=(
        ("kick", 0.7, "x...x...x...x..."),
        ("taiko", 0.4, "....x.......x..x"),
        ("hat", 0.16, "..x...x...x...x."),
    ),
    voice=0.8,
    tags="energetic festival dance, fast, miyako-bushi scale, koto, taiko, pulse synth, singing voice, "
    "元気な 祭り, 速い, 都節音階, 歌声",
    words=(
        ("まつり", "おどり", "たいこ", "ちから", "みやこ", "なみだ", "ほのお", "いなり", "かぶき", "あらし"),
        ("かみなり", "はなびら", "ともしび", "よあけの", "わっしょい", "うちあげ", "えどっこ", "ふうりん"),
    ),
)
STYLES = {"a": (STYLE_A,), "b": (STYLE_B,), "both": (STYLE_A, STYLE_B)}


@dataclass(frozen=True)
class Song:
    """A finished song: its sound [1, N] at ``SAMPLE_RATE``, its caption, and its lyrics with structure tags."""

    audio: np.ndarray
    tags: str
    lyrics: str


def write_songs(
    folder: str | Path,
    songs: int = 12,
    seed: int = 0,
    style: str = "both",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write demo songs: ``style-a/song-01.wav`` (16 kHz mono, 16 bit) with ``.txt`` tags and ``.lyrics``, and so on.

    Args:
        folder: made if it does not exist; each style has a folder of its own in it.
        songs: how many altogether, shared equally between the styles.
        seed: another seed gives other melodies and words in the same styles.
        style: ``a``, ``b`` or ``both``.
        progress: told after each song how many of how many are written.

    Returns:
        The audio files.
    """
    styles = STYLES[style]
    written: list[Path] = []
    for index in range(songs):
        part = styles[index % len(styles)]
        number = index // len(styles)
        song = compose(part, number, seed)
        path = Path(folder, part.name, f"song-{number + 1:02d}.wav")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, song.audio, SAMPLE_RATE, "wav")
        path.with_suffix(".txt").write_text(song.tags + "\n", encoding="utf-8")
        path.with_suffix(".lyrics").write_text(song.lyrics + "\n", encoding="utf-8")
        written.append(path)
        if progress:
            progress(index + 1, songs)
    return sorted(written)


def compose(style: Style, number: int, seed: int = 0) -> Song:
    """Song ``number`` of a style; whatever else is written, it is the same."""
    dice = np.random.Generator(np.random.PCG64([seed, number, ord(style.name[-1])]))
    count = style.lines[0] + number % (style.lines[1] - style.lines[0] + 1)
    lines = [_line(style, dice) for _ in range(count)]
    progression = _pick(dice, style.progressions)
    motifs = [_below(dice, 1 << 30) for _ in range(3)]
    bars = [progression[bar % len(progression)] for bar in range(count)]
    length = (count + 1) * _STEPS * style.frames * FRAME
    mix = np.zeros(length)
    for bar, (line, chord) in enumerate(zip(lines, bars, strict=True)):
        _play_bar(mix, style, bar, style.chords[chord])
        motif = motifs[(0, 1, 0, 2)[bar % 4]]
        _sing(mix, style, bar, style.chords[chord], line, motif, ends=bar % 2 == 1 or bar == count - 1)
    _play_ending(mix, style, count)
    gain = round(10 ** ((_LOUDNESS - integrated(mix[None], SAMPLE_RATE)) / 20), 3)  # the same on every machine
    half = (count + 1) // 2
    lyrics = "\n".join(["[verse]", *lines[:half], "", "[chorus]", *lines[half:]])
    return Song(np.round(mix * gain * 32768)[None] / 32768, style.tags, lyrics)


def vowels(text: str) -> str:
    """Kana → one of ``aiueo`` a mora, ``n`` for ん and ``.`` (a rest) for っ; anything else is not sung.

    >>> vowels("さくら わっしょい")
    'auaa.oi'
    """
    sung = ""
    for sign in text:
        kana = chr(ord(sign) - 0x60) if "ァ" <= sign <= "ヶ" else sign
        small = kana in "ゃゅょぁぃぅぇぉ"
        vowel = next((vowel for vowel, row in _KANA.items() if kana in row), "")
        if kana == "ー":
            vowel = sung[-1:]
        sung = sung[:-1] + vowel if small else sung + vowel
    return sung


_KANA = {
    "a": "あかさたなはまやらわがざだばぱゃぁ",
    "i": "いきしちにひみりぎじぢびぴぃ",
    "u": "うくすつぬふむゆるぐずづぶぷゅぅ",
    "e": "えけせてねへめれげぜでべぺぇ",
    "o": "おこそとのほもよろをごぞどぼぽょぉ",
    "n": "ん",
    ".": "っ",
}


def _line(style: Style, dice: np.random.Generator) -> str:
    three, four = style.words
    return f"{_pick(dice, three)} {_pick(dice, (three, four)[_below(dice, 2)])}"


def _play_bar(mix: np.ndarray, style: Style, bar: int, chord: tuple[float, ...]) -> None:
    for instrument, level, octave, pattern in style.backing:
        for step, sign in enumerate(pattern):
            tones = chord if sign == "*" else chord[int(sign) : int(sign) + 1] if sign.isdigit() else ()
            for tone in tones:
                steps = _held(pattern, step)
                _add(mix, style, bar, step, level * instrument(style.tonic * tone * octave, steps * style.frames))
    for name, level, pattern in style.drums:
        for step, sign in enumerate(pattern):
            if sign == "x":
                _add(mix, style, bar, step, level * drum(name))


def _sing(
    mix: np.ndarray, style: Style, bar: int, chord: tuple[float, ...], line: str, motif: int, *, ends: bool
) -> None:
    dice = np.random.Generator(np.random.PCG64(motif))
    morae = vowels(line)
    durations = style.rhythms[len(morae)][_below(dice, 2)]
    place, step = len(style.scale) // 2, 0
    for index, (vowel, steps) in enumerate(zip(morae, durations, strict=True)):
        place = min(max(place + _pick(dice, (-2, -1, -1, 0, 1, 1, 2)), 0), len(style.scale) - 1)
        if step % 8 == 0:
            place = _nearest_chord_tone(style.scale, chord, place)
        if ends and index == len(morae) - 1:
            place = _nearest_chord_tone(style.scale, chord[:1], place)
        _add(mix, style, bar, step, style.voice * voice(vowel, style.tonic * style.scale[place], steps * style.frames))
        step += steps


def _play_ending(mix: np.ndarray, style: Style, bar: int) -> None:
    """The last bar: the tonic's chord, held, after one stroke of the drums."""
    frames = _STEPS * style.frames
    for instrument, level, octave, _ in style.backing:
        for tone in style.chords[0]:
            _add(mix, style, bar, 0, level * instrument(style.tonic * tone * octave, frames))
    _add(mix, style, bar, 0, style.voice * voice("a", style.tonic, frames // 2))
    name, level, _ = style.drums[0]
    _add(mix, style, bar, 0, level * drum(name))


def _add(mix: np.ndarray, style: Style, bar: int, step: int, sound: np.ndarray) -> None:
    start = (bar * _STEPS + step) * style.frames * FRAME
    stop = min(len(mix), start + len(sound))
    mix[start:stop] += sound[: stop - start]


def _held(pattern: str, step: int) -> int:
    following = [later for later in range(step + 1, _STEPS) if pattern[later] != "."]
    return (following[0] if following else _STEPS) - step


def _nearest_chord_tone(scale: tuple[float, ...], chord: tuple[float, ...], place: int) -> int:
    fitting = [i for i, pitch in enumerate(scale) if any(_same_note(pitch, tone) for tone in chord)]
    return min(fitting, key=lambda i: abs(i - place), default=place)


def _same_note(pitch: float, tone: float) -> bool:
    return any(abs(pitch * octave - tone) < 1e-6 for octave in (0.25, 0.5, 1, 2, 4))


def _below(dice: np.random.Generator, limit: int) -> int:
    return int(dice.random() * limit)


def _pick(dice: np.random.Generator, choices: Sequence[_T]) -> _T:
    return choices[_below(dice, len(choices))]
