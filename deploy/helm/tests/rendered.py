"""What helm renders, read again."""

import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy/helm/aftercommit"
RELEASE, NAMESPACE = "shop", "events"


def template(helm, *files, version="1.30.0", sets=(), release=RELEASE, input=None, chart=CHART):
    """The objects, in helm's order: hooks last. Raises CalledProcessError with what helm says."""
    command = [helm, "template", release, str(chart), "--namespace", NAMESPACE, "--kube-version", f"{version}"]
    for file in files:
        command += ["--values", str(file)]
    for value in sets:
        command += ["--set", value]
    output = subprocess.run(command, capture_output=True, text=True, check=True, input=input).stdout
    return [document for document in yaml.safe_load_all(output) if document]


def pod(document):
    """The template of a Deployment's or a Job's pods, or None."""
    return document["spec"]["template"] if document["kind"] in ("Deployment", "Job") else None


def container(document):
    [only] = pod(document)["spec"]["containers"]
    return only


def environment(document):
    return {variable["name"]: variable.get("value") for variable in container(document).get("env", [])}


def argv(document):
    one = container(document)
    return one["command"] + one["args"]


def name(document):
    return f"{document['kind']} {document['metadata']['name']}"


def weight(document):
    return int(document["metadata"].get("annotations", {}).get("helm.sh/hook-weight", "0"))
