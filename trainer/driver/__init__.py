"""Ray Train around ``worker``: what the launcher submits, as ``python -m trainer.driver RUN_URL``."""
