"""launch/k8s/train.yaml against the schemas of Kubernetes."""

from pathlib import Path

import pytest
import yaml

from tinyflux.util import cli

kubernetes_validate = pytest.importorskip("kubernetes_validate")
FILE = Path(__file__).parents[2] / "launch" / "k8s" / "train.yaml"


def test_the_job_and_its_service():
    service, job = yaml.safe_load_all(FILE.read_text())
    for document in (service, job):
        for version in ("1.29", "1.37"):
            kubernetes_validate.validate(document, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert int(env["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}  # fmt: skip
    assert codes == {"Ignore": [cli.SAVED], "FailJob": [cli.REFUSED]}
    job["spec"]["completion"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)
