"""Sound as numpy arrays: read it, write it, level it, measure it.

Everywhere ``audio`` is ``[C, N]`` float32 in [-1, 1]: ``C`` channels, ``N`` samples.
"""
