"""``python -m tests.bench.picture RUN_DIRECTORY OUT.png``: the first prompt's spectrogram, before and after."""

import sys
from pathlib import Path

import matplotlib as mpl
import soundfile

mpl.use("Agg")
from matplotlib import pyplot as plt


def main(run: Path, out: Path) -> None:
    """Draw the song of the first and of the last validation side by side."""
    steps = sorted((run / "audio").iterdir())
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True, layout="constrained")
    for axis, folder, title in zip(axes, (steps[0], steps[-1]), ("before", "after"), strict=True):
        audio, rate = soundfile.read(next(folder.glob("prompt-00.*")))
        axis.specgram(audio, NFFT=1024, noverlap=768, Fs=rate, vmin=-130, vmax=-30, cmap="magma")
        axis.set(title=f"{title} (step {int(folder.name.removeprefix('step-'))})", xlabel="seconds", ylim=(0, 6000))
    axes[0].set_ylabel("Hz")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
