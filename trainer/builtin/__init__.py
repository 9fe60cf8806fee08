"""``builtin:pocket``: a small base model and its codec, so that a first run needs no downloads."""
