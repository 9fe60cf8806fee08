"""Songs of our own making, so that nobody needs a data set to begin: a small sequencer and a voice that sings vowels.

``python -m trainer.data.demo DIR`` writes them.
"""

from .songs import Song, compose, write_songs

__all__ = ["Song", "compose", "write_songs"]
