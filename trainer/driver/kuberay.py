"""What the driver has to know of KubeRay. Imports the standard library alone."""

import json
import os
import time

STOP_SECONDS = 60.0
"""How long Ray may take to end this process once asked."""


def under_kuberay() -> bool:
    """Whether KubeRay has started this program."""
    return "KUBERAY_GEN_RAY_START_CMD" in os.environ


def stop_for_good() -> None:
    """End as stopped, not as failed: KubeRay would try what has failed again, on a new cluster."""
    from ray.job_submission import JobSubmissionClient

    told = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    JobSubmissionClient("http://127.0.0.1:8265").stop_job(told["metadata"]["job_submission_id"])
    time.sleep(STOP_SECONDS)
