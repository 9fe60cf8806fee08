"""Benches: each figure beside its rival or its limit, both from one run. ``python -m tests.bench [NAME…]``."""
