"""Knows clusters: plans a job, brings up Ray, submits, follows and tells. Never imports torch or Ray."""
