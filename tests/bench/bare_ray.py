"""The rival of ``submit``: two ``TorchTrainer`` workers that print a line."""

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def _line() -> None:
    import ray.train

    print(f"line of rank {ray.train.get_context().get_world_rank()}", flush=True)


if __name__ == "__main__":
    import sys

    TorchTrainer(
        _line, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(name="bare", storage_path=sys.argv[1])
    ).fit()
