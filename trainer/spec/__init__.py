"""The job schema: what a job file may say, and what is said about a wrong one. Imports neither torch nor numpy."""

from .errors import ClusterError, DataError, JobError, StoreError, TrainingError, UtaforgeError
from .job import Job
from .load import dump_job, job_from_json, job_schema, load_job, reveal

__all__ = [
    "ClusterError",
    "DataError",
    "Job",
    "JobError",
    "StoreError",
    "TrainingError",
    "UtaforgeError",
    "dump_job",
    "job_from_json",
    "job_schema",
    "load_job",
    "reveal",
]
