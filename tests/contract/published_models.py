"""Reads manifests into the models that Kubeflow publishes, in a virtual environment that has them, and writes them out again.

    python published_models.py < manifests.json > manifests.json

Standard input: a list of manifests. Output: each as its model says it, or `{"error": ...}`. What a model does not know is not
there any more.
"""

import importlib
import json
import sys
from typing import Any


def through_model(manifest: dict[str, Any]) -> Any:
    """A manifest, read into its model and out again."""
    if manifest["kind"] == "PyTorchJob":
        client = importlib.import_module("kubeflow.training").ApiClient()
        response = type("Response", (), {"data": json.dumps(manifest)})
        return client.sanitize_for_serialization(client.deserialize(response, "KubeflowOrgV1PyTorchJob"))
    model = getattr(importlib.import_module("kubeflow_trainer_api.models"), f"TrainerV1alpha1{manifest['kind']}")
    return model.from_dict(manifest).to_dict()


def attempt(manifest: dict[str, Any]) -> Any:
    """The same; a refusal is a result, too."""
    try:
        return through_model(manifest)
    except Exception as error:  # each model's own
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    json.dump([attempt(manifest) for manifest in json.load(sys.stdin)], sys.stdout)
