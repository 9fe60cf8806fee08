"""Manifests as values: pure functions, nothing is sent."""
