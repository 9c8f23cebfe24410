"""Checks what the chart renders. Arguments: helm, and the directory of the programs, or nothing.

Each check returns the problems that it sees; at the end each is shown to see one, on an object that was damaged for it.
"""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions

import rendered
from rendered import CHART, ROOT, argv, container, environment, name, pod

TESTS = CHART.parent / "tests"
OLDEST = (1, 29)
SECRET = {"DATABASE_URL", "OUTBOX_DATABASE_URL", "SUBSCRIBER_DATABASE_URL", "NATS_PASSWORD", "NATS_TOKEN", "PGPASSWORD"}
OURS = re.compile(r"^(AFTERCOMMIT_|NATS_|DATABASE_|OUTBOX_|SUBSCRIBER_|PG)")

helm, programs = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""


def in_step():
    """Copies and numbers that stand in two places."""
    for copied, original in [("alerts.yml", "deploy/prometheus/alerts.yml"), ("roles.sql", "deploy/postgres/roles.sql")]:
        if (CHART / "files" / copied).read_bytes() != (ROOT / original).read_bytes():
            yield f"deploy/helm/aftercommit/files/{copied} differs from {original}: run scripts/chart --update"
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    if chart["appVersion"] != version:
        yield f"Chart.yaml has the appVersion {chart['appVersion']}, Cargo.toml the version {version}"
    [values] = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/deploy.md").read_text(), re.M | re.S)
    if yaml.safe_load(values) != yaml.safe_load((TESTS / "values/secured.yaml").read_text()):
        yield "the values of docs/deploy.md differ from deploy/helm/tests/values/secured.yaml"
    # The example in a comment is what people copy.
    text = (CHART / "values.yaml").read_text()
    example = re.search(r"^workers: \[\]\n((?:#.*\n)+)", text, re.M).group(1)
    [worker] = yaml.safe_load(re.sub(r"^#", "", example, flags=re.M))
    schema = json.loads((CHART / "values.schema.json").read_text())
    try:
        jsonschema.validate(worker, {"$ref": "#/$defs/worker", "$defs": schema["$defs"]})
    except jsonschema.ValidationError as error:
        yield f"the example of a worker in values.yaml: {error.message}"
    unnamed = set(schema["$defs"]["worker"]["properties"]) - set(worker)
    if unnamed:
        yield f"the example of a worker in values.yaml lacks {sorted(unnamed)}"
    unnamed = set(schema["properties"]) - set(yaml.safe_load(text)) - {"global"}
    if unnamed:
        yield f"values.yaml lacks {sorted(unnamed)}"


def schemas(documents, version):
    """Kubernetes' own schemas, and those of custom resources beside this file."""
    for document in documents:
        custom = TESTS / "schemas" / f"{document['kind'].lower()}.json"
        try:
            if custom.exists():
                jsonschema.validate(document, json.loads(custom.read_text()))
            else:
                kubernetes_validate.validate(document, version, strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{name(document)}, Kubernetes {version}: {error.message}"


def restricted(documents):
    """The profile `restricted` of Kubernetes' pod security standards, and no service account token."""
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for document in filter(pod, documents):
        spec = pod(document)["spec"]
        say = lambda what: f"{name(document)}: {what}"
        if spec.get("automountServiceAccountToken") is not False:
            yield say("gets the token of a service account")
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield say("shares a namespace with its node")
        if spec["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield say("has no seccomp profile")
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= allowed:
                yield say(f"has the volume {volume}")
        for one in spec["containers"] + spec.get("initContainers", []):
            context = one.get("securityContext", {})
            if spec["securityContext"].get("runAsNonRoot") is not True or not spec["securityContext"].get("runAsUser"):
                yield say("may run as root")
            if context.get("runAsUser") == 0 or context.get("privileged"):
                yield say("is privileged")
            if context.get("allowPrivilegeEscalation") is not False:
                yield say("may gain privileges")
            if context.get("readOnlyRootFilesystem") is not True:
                yield say("writes to its root file system")
            if context.get("capabilities") != {"drop": ["ALL"]}:
                yield say("has capabilities")
            if not one.get("resources", {}).get("limits", {}).get("memory"):
                yield say("has no limit of memory")
            if one["image"].endswith(":latest") or not re.search(r":[\w][-\w.]*$|@sha256:", one["image"]):
                yield say(f"has the image {one['image']}")


def secrets(documents):
    for document in documents:
        if document["kind"] == "Secret":
            yield f"{name(document)}: the chart writes a secret"
        if re.search(r"://[^/@\s:]+:[^/@\s]+@", json.dumps(document)):
            yield f"{name(document)}: a URL with a password"
        for variable in container(document).get("env", []) if pod(document) else []:
            if variable["name"] in SECRET and "value" in variable:
                yield f"{name(document)}: {variable['name']} is written out"


def files(documents):
    """Each file that is named lies in something that is mounted, each mount has its volume, each ConfigMap is there."""
    maps = {(document["metadata"]["name"], "helm.sh/hook" in document["metadata"].get("annotations", {}))
            for document in documents if document["kind"] == "ConfigMap"}
    for document in filter(pod, documents):
        spec, one = pod(document)["spec"], container(document)
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounted = {}
        for mount in one.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{name(document)}: {mount['name']} is mounted and no volume"
                continue
            if not mount.get("readOnly"):
                yield f"{name(document)}: {mount['name']} is mounted for writing"
            source = volumes[mount["name"]]
            for item in source.get("secret", source.get("configMap", {})).get("items", []):
                mounted[f"{mount['mountPath']}/{item['path']}"] = item
        for unused in set(volumes) - {mount["name"] for mount in one.get("volumeMounts", [])}:
            yield f"{name(document)}: the volume {unused} is not mounted"
        values = [value for value in environment(document).values() if value] + [part.partition("=")[2] for part in argv(document)]
        for value in values:
            if value.startswith("/etc/aftercommit/") and value not in mounted:
                yield f"{name(document)}: nothing is mounted at {value}"
        # A job runs before the objects that are no hooks are there.
        hook = document["kind"] == "Job"
        for volume in volumes.values():
            wanted = volume.get("configMap", {}).get("name", "")
            if wanted.startswith(document["metadata"]["labels"]["app.kubernetes.io/instance"] + "-aftercommit") and (wanted, hook) not in maps:
                yield f"{name(document)}: there is no ConfigMap {wanted} when it starts"


def helps():
    """What each program says of its flags, variables and paths, once."""
    known = {}

    def ask(command):
        key = tuple(command)
        if key not in known:
            path = [f"{programs}/{command[0]}"] if command[0].startswith("aftercommit") else [command[0]]
            known[key] = subprocess.run(path + command[1:] + ["--help"], capture_output=True, text=True, check=True).stdout
        return known[key]

    return ask


ask = helps()


def known(documents):
    """Flags and variables that the program does not know would stop it, or be passed over."""
    connections = (ROOT / "docs/connections.md").read_text()
    for document in filter(pod, documents):
        words = argv(document)
        # A program of one's own around handlers has the worker's flags.
        own = words[0] == "shop-worker"
        command = [word for word in words[: 1 + sum(not word.startswith("-") for word in words[1:])]]
        try:
            help = ask(["aftercommit-worker"] if own else command)
        except (OSError, subprocess.CalledProcessError) as error:
            yield f"{name(document)}: {' '.join(command)} --help: {error}"
            continue
        flags = set(re.findall(r"--[a-z][-a-z]*", help)) | ({"--provision"} if own else set())
        for word in words[len(command):]:
            if word.partition("=")[0] not in flags:
                yield f"{name(document)}: {' '.join(command)} has no flag {word.partition('=')[0]}"
        for variable in environment(document):
            if not OURS.match(variable):
                continue
            in_help = f"[env: {variable}" in help
            if variable.startswith("PG"):
                # psql's manual names what libpq reads; ours are in the documentation.
                in_help = f"`{variable}`" in connections or command[0] == "psql" and variable in ("PGSERVICE", "PGSERVICEFILE")
            if not in_help:
                yield f"{name(document)}: {' '.join(command)} does not read {variable}"


def probes(documents):
    """Probes ask where the program listens, for what it serves. A program without such a port has none."""
    for document in filter(pod, documents):
        one = container(document)
        address = [word.partition("=")[2] for word in argv(document) if word.startswith("--http=")]
        asked = [one[kind]["httpGet"] for kind in ("livenessProbe", "readinessProbe", "startupProbe") if kind in one]
        if bool(address) != bool(asked):
            yield f"{name(document)}: it listens at {address} and is asked at {asked}"
        if not address:
            continue
        ports = {port["name"]: port["containerPort"] for port in one.get("ports", [])}
        if ports.get("http") != int(address[0].rpartition(":")[2]):
            yield f"{name(document)}: it listens at {address[0]} and the port is {ports}"
        words = argv(document)
        command = ["aftercommit-worker"] if words[0] == "shop-worker" else [word for word in words if not word.startswith("-")]
        served = re.search(r"Serve ([^;]*) here", ask(command)).group(1)
        for get in asked:
            if get["port"] not in ports:
                yield f"{name(document)}: a probe asks at the port {get['port']}"
            if get["path"] not in re.findall(r"/\w+", served):
                yield f"{name(document)}: a probe asks for {get['path']}; it serves {served}"


def names(documents):
    """Names that fit, once, and selectors that find what they are for."""
    seen = set()
    labels = [pod(document)["metadata"]["labels"] for document in filter(pod, documents)]
    targets = {document["metadata"]["name"]: document for document in documents if document["kind"] == "Deployment"}
    for document in documents:
        key = (document["kind"], document["metadata"]["name"], "helm.sh/hook" in document["metadata"].get("annotations", {}))
        if key in seen:
            yield f"{name(document)}: is there twice"
        seen.add(key)
        if len(key[1]) > 63:
            yield f"{name(document)}: the name is longer than 63 characters"
        for value in document["metadata"]["labels"].values():
            if not re.fullmatch(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?", str(value)):
                yield f"{name(document)}: the label {value}"
        spec = document.get("spec", {})
        selector = {"PodDisruptionBudget": lambda: spec["selector"]["matchLabels"], "Deployment": lambda: spec["selector"]["matchLabels"],
                    "Service": lambda: spec["selector"], "NetworkPolicy": lambda: spec["podSelector"]["matchLabels"]}.get(document["kind"])
        if selector and not any(selector().items() <= pod.items() for pod in labels):
            yield f"{name(document)}: selects no pod"
        if document["kind"] == "ServiceMonitor":
            services = [one["metadata"]["labels"] for one in documents if one["kind"] == "Service"]
            if not any(spec["selector"]["matchLabels"].items() <= one.items() for one in services):
                yield f"{name(document)}: selects no service"
        if document["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"):
            target = targets.get(spec["scaleTargetRef"]["name"])
            if target is None:
                yield f"{name(document)}: there is no Deployment {spec['scaleTargetRef']['name']}"
            elif "replicas" in target["spec"]:
                yield f"{name(document)}: each upgrade would set the replicas of {name(target)}"


def grace(documents):
    """Kubernetes waits longer than the programs need at most."""
    deadline = int(re.search(r"STOP_DEADLINE: Duration = Duration::from_secs\((\d+)\)", (ROOT / "src/cli/mod.rs").read_text()).group(1))
    for document in filter(pod, documents):
        if pod(document)["spec"]["terminationGracePeriodSeconds"] <= deadline:
            yield f"{name(document)}: is killed before it has stopped"


def order(documents):
    """Jobs in the order of docs/operations.md: schema, rights, stream, consumers; what they mount before."""
    jobs = [document for document in documents if "helm.sh/hook" in document["metadata"].get("annotations", {})]
    steps = ["NetworkPolicy", "migrate", "ConfigMap roles", "roles", "provision"]

    def step(document):
        component = document["metadata"]["labels"].get("app.kubernetes.io/component", "")
        if document["kind"] == "NetworkPolicy":
            return 0
        if document["kind"] == "ConfigMap":
            return 2 if component == "roles" else 4
        return steps.index(component)

    sequence = [step(document) for document in sorted(jobs, key=rendered.weight)]
    if sequence != sorted(sequence):
        yield f"the jobs run in the order {[steps[at] for at in sequence]}"


def refused():
    """What is wrong is refused, and what helm says names it."""
    for case in yaml.safe_load((TESTS / "refused.yaml").read_text()):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(case["values"], file)
            file.flush()
            try:
                rendered.template(helm, TESTS / "values/secured.yaml", file.name)
                yield f"not refused: {case['values']}"
            except subprocess.CalledProcessError as error:
                # The schema names places as '/relay/replicas', and unknown keys beside them.
                if case["says"] not in error.stderr:
                    yield f"refused, but not for {case['says']}: {case['values']}: {error.stderr.strip()}"


def notes(values):
    """NOTES.txt, which `helm template` leaves out: an error in it would stop an installation."""
    with tempfile.TemporaryDirectory() as directory:
        copied = shutil.copytree(CHART, f"{directory}/aftercommit")
        pathlib.Path(copied, "templates/notes.yaml").write_text(
            'apiVersion: v1\nkind: ConfigMap\nmetadata: { name: notes }\ndata:\n'
            '  notes: |\n    {{- include "aftercommit/templates/NOTES.txt" . | nindent 4 }}\n')
        try:
            documents = rendered.template(helm, values, chart=copied)
        except subprocess.CalledProcessError as error:
            yield f"NOTES.txt: {error.stderr}"
            return
    [text] = [document["data"]["notes"] for document in documents if document["metadata"]["name"] == "notes"]
    deployments = {document["metadata"]["name"] for document in documents if document["kind"] == "Deployment"}
    for named in set(re.findall(r"deployment/(\S+)", text)) - deployments:
        yield f"NOTES.txt names the deployment {named}"
    if "docs/deploy.md" not in text:
        yield f"NOTES.txt ends early: {text}"


def leaves(values, path=()):
    """The paths of what is no map and no list of maps."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, (*path, key))
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for index, value in enumerate(values):
            yield from leaves(value, (*path, index))
    else:
        yield path


def dead():
    """Each value of values/everything.yaml does something: without it something else is rendered, or nothing."""
    everything = yaml.safe_load((TESTS / "values/everything.yaml").read_text())
    whole = rendered.template(helm, TESTS / "values/everything.yaml")

    def same(path):
        values = copy.deepcopy(everything)
        parent = values
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        try:
            return rendered.template(helm, "-", input=yaml.safe_dump(values)) == whole
        except subprocess.CalledProcessError:
            return False

    paths = list(leaves(everything))
    with ThreadPoolExecutor(4) as pool:
        for path, unchanged in zip(paths, pool.map(same, paths)):
            if unchanged:
                yield f"values/everything.yaml: {'.'.join(map(str, path))} changes nothing"


CHECKS = [restricted, secrets, files, probes, known, names, grace, order]
if not programs:
    CHECKS = [check for check in CHECKS if check not in (probes, known)]


def damaged(documents):
    """One damage for each check, which has to see it."""
    relay = lambda all: next(one for one in all if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("-relay"))
    job = lambda all, part: next(one for one in all if one["kind"] == "Job" and part in one["metadata"]["name"])
    spec = lambda all: pod(relay(all))["spec"]

    def config_map_gone(all):
        all[:] = [one for one in all if not (one["kind"] == "ConfigMap" and "helm.sh/hook" in one["metadata"].get("annotations", {}))]

    damages = [
        (restricted, lambda all: spec(all).pop("automountServiceAccountToken")),
        (restricted, lambda all: spec(all)["securityContext"].pop("runAsNonRoot")),
        (restricted, lambda all: spec(all)["securityContext"].pop("seccompProfile")),
        (restricted, lambda all: container(relay(all))["securityContext"].update(readOnlyRootFilesystem=False)),
        (restricted, lambda all: container(relay(all))["securityContext"]["capabilities"].update(add=["NET_ADMIN"])),
        (restricted, lambda all: container(job(all, "migrate"))["securityContext"].pop("allowPrivilegeEscalation")),
        (restricted, lambda all: container(relay(all)).update(image="aftercommit:latest")),
        (restricted, lambda all: spec(all)["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
        (secrets, lambda all: container(relay(all))["env"].append({"name": "NATS_PASSWORD", "value": "x"})),
        (secrets, lambda all: container(relay(all))["args"].append("--database-url=postgres://a:b@c/d")),
        (files, lambda all: spec(all)["volumes"].pop()),
        (files, lambda all: container(relay(all))["volumeMounts"].pop()),
        (files, config_map_gone),
        (probes, lambda all: container(relay(all))["livenessProbe"]["httpGet"].update(path="/alive")),
        (probes, lambda all: container(relay(all))["readinessProbe"]["httpGet"].update(port="metrics")),
        (probes, lambda all: container(relay(all))["ports"][0].update(containerPort=1)),
        (known, lambda all: container(relay(all))["args"].append("--reconcile-evry=5m")),
        (known, lambda all: container(relay(all))["env"].append({"name": "NATS_PASS_FILE", "value": "x"})),
        (known, lambda all: container(job(all, "provision"))["args"].append("--reconcile-every=5m")),
        (names, lambda all: all.append(copy.deepcopy(relay(all)))),
        (names, lambda all: pod(relay(all))["metadata"]["labels"].clear()),
        (grace, lambda all: spec(all).update(terminationGracePeriodSeconds=25)),
        (order, lambda all: job(all, "migrate")["metadata"]["annotations"].update({"helm.sh/hook-weight": "0"})),
    ]
    for number, (check, damage) in enumerate(damages):
        if check not in CHECKS:
            continue
        broken = copy.deepcopy(documents)
        damage(broken)
        if not list(check(broken)):
            yield f"{check.__name__} does not see damage {number}"
    for kind in ("ServiceMonitor", "PrometheusRule", "Deployment"):
        broken = copy.deepcopy(next(one for one in documents if one["kind"] == kind))
        broken["spec"]["unknown"] = 1
        if not list(schemas([broken], "1.30")):
            yield f"the schema of {kind} does not see an unknown key"


def main():
    problems = list(in_step())
    versions = [version for version in all_versions() if tuple(map(int, version.split(".")[:2])) >= OLDEST]
    sets = sorted((TESTS / "values").glob("*.yaml"))
    objects = 0
    for values in sets:
        lint = subprocess.run([helm, "lint", "--strict", str(CHART), "--values", str(values)], capture_output=True, text=True)
        if lint.returncode or "Fail:" in lint.stdout + lint.stderr:
            problems.append(f"{values.name}: helm lint: {lint.stdout}{lint.stderr}")
        for version in versions:
            try:
                documents = rendered.template(helm, values, version=version if version.count(".") > 1 else f"{version}.0")
            except subprocess.CalledProcessError as error:
                problems.append(f"{values.name}: {error.stderr}")
                break
            objects += len(documents)
            problems += [f"{values.name}: {problem}" for problem in schemas(documents, version)]
        else:
            problems += [f"{values.name}: {problem}" for problem in notes(values)]
            for check in CHECKS:
                problems += [f"{values.name}: {problem}" for problem in check(documents)]
    long = rendered.template(helm, TESTS / "values/everything.yaml", release="a" * 53, sets=["fullnameOverride=", "workers[0].name=" + "b" * 20])
    problems += [f"a long release: {problem}" for problem in names(long)]
    problems += refused()
    problems += dead()
    problems += damaged(rendered.template(helm, TESTS / "values/secured.yaml"))
    for problem in problems:
        print(problem, file=sys.stderr)
    cases = len(yaml.safe_load((TESTS / "refused.yaml").read_text()))
    print(f"{len(sets)} value sets, Kubernetes {versions[0]} to {versions[-1]}, {objects} objects, {cases} refusals: {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
