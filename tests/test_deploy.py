"""The manifest for Kubernetes is one that it takes, and says what the program knows."""

from __future__ import annotations

import pathlib

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from diffulex_jax.cli import app


DEPLOY = pathlib.Path(__file__).parent.parent / "deploy"
JOB_SET, SERVICE = yaml.safe_load_all((DEPLOY / "jobset.yaml").read_text())
(REPLICATED,) = JOB_SET["spec"]["replicatedJobs"]
POD = REPLICATED["template"]["spec"]["template"]["spec"]


def job(**more):
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": REPLICATED["template"]["spec"] | more}


def test_a_schema_validator_takes_it():
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(SERVICE, version, strict=True)
    kubernetes_validate.validate(job(), version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job(paralelism=8), version, strict=True)
    assert (JOB_SET["apiVersion"], JOB_SET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOB_SET["spec"].keys() == {"network", "failurePolicy", "replicatedJobs"}
    assert SERVICE["spec"]["selector"].items() <= REPLICATED["template"]["spec"]["template"]["metadata"]["labels"].items()


def test_its_numbers_agree():
    """A v5e host of such a slice has four chips."""
    (container,), spec = POD["containers"], REPLICATED["template"]["spec"]
    rows, columns = map(int, POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    (mesh,) = [option.removeprefix("--mesh=") for option in container["args"] if option.startswith("--mesh=")]
    devices = 1
    for part in mesh.split(","):
        devices *= int(part.split("=")[1])
    assert rows * columns == devices == spec["completions"] * int(container["resources"]["limits"]["google.com/tpu"])
    assert spec["completions"] == spec["parallelism"]


def test_its_options_exist():
    (container,) = POD["containers"]
    known = {name for option in get_command(app).commands["serve"].params for name in option.opts}
    assert {option.split("=")[0] for option in container["args"]} <= known
