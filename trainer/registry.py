"""MLflow's model registry as a mirror of the store's champions; called by ``trainer.tracking``."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer.champion import champion_of
from trainer.rundir import RunDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
FOLDER = "champion"
_DOES_NOT_EXIST = "RESOURCE_DOES_NOT_EXIST"


def mirror(client: "MlflowClient", run_id: str, run: RunDirectory) -> None:
    """Show a retraining's report in its MLflow run; if the run is the champion, give a version of it the alias.

    The registered model is called like the job. A version's source is a small file in the MLflow run that says where
    the adapter is and what its files hash to: adapters stay in the store. Any number of times.
    """
    if report := run.store.get_or_none("report.md"):
        client.log_text(run_id, report.decode(), "report.md")
    champion = champion_of(run.job)
    if champion is None or champion.run != run.name:
        return
    name = run.job.name
    _make(client, name)
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = found[0] if found else None
    if version is None:
        files = run.store.at("adapter").manifest()
        client.log_dict(run_id, {**asdict(champion), **(files or {})}, f"{FOLDER}/champion.json")
        tags = {"utaforge.run": run.url, "utaforge.adapter": champion.adapter}
        version = client.create_model_version(name, f"runs:/{run_id}/{FOLDER}", run_id, tags, description=run.name)
    client.set_registered_model_alias(name, ALIAS, version.version)


def _make(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != _DOES_NOT_EXIST:
            raise
        client.create_registered_model(name, description="Champions of a utaforge job")
