"""Starts what the chart renders. Arguments: helm, and the directory of the programs.

Values, secrets, logins and rights are those of docs/deploy.md, whose commands are run. PostgreSQL and nats-server are private ones, with TLS. Each container becomes a process with the rendered command, variables, files, user and groups, on a root
file system of its own that is read-only, without capabilities. What a kubelet and a network do beside that is not shown.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import rendered
from rendered import ROOT, argv, container, environment, name, pod

sys.path.insert(0, str(ROOT / "deploy/tests"))
from servers import PG, SOON, Failed, blocks, eventually, free_port, handled, prepare, publish, say, section, see_it_work, stop, with_servers  # noqa: E402

helm, programs = sys.argv[1], sys.argv[2]
VALUES = rendered.CHART.parent / "tests/values/secured.yaml"

# What a container finds as its root: everything of it is read-only.
ROOT_SCRIPT = """
set -e
root=$1 files=$2 programs=$3; shift 3
mount -t tmpfs -o mode=755 tmpfs "$root"
mkdir "$root/usr" "$root/etc" "$root/dev" "$root/proc"
mount --rbind /usr "$root/usr"
for link in bin lib lib64 sbin; do
    if [ -L "/$link" ]; then ln -s "usr/$link" "$root/$link"; elif [ -d "/$link" ]; then mkdir "$root/$link"; mount --bind "/$link" "$root/$link"; fi
done
for file in hosts nsswitch.conf resolv.conf; do [ ! -e "/etc/$file" ] || cp "/etc/$file" "$root/etc/$file"; done
for device in null urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/usr/local/bin"
for program in $programs; do touch "$root/usr/local/bin/${program##*/}"; mount --bind "$program" "$root/usr/local/bin/${program##*/}"; done
for volume in "$files"/*; do
    mkdir -p "$root/etc/aftercommit/${volume##*/}"
    mount --bind "$volume" "$root/etc/aftercommit/${volume##*/}"
    mount -o remount,bind,ro "$root/etc/aftercommit/${volume##*/}"
done
mount -o remount,bind,ro "$root/usr"
mount -o remount,ro "$root/usr/local/bin"
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""


def existing(servers):
    """The secrets that the page has people create: name, key, content."""
    created = re.findall(r"create secret generic (\S+) --from-file=(\S+?)=(\S+)", section("### 1. Namespace and secrets"))
    return {name: {key: (servers.checkout / file).read_text()} for name, key, file in created}


class Pod:
    """The one container of a rendered pod as a process."""

    count = 0

    def __init__(self, document, documents, servers):
        Pod.count += 1
        self.document = document
        self.directory = servers.directory / f"pod-{Pod.count}"
        self.files = self.directory / "files"
        (self.directory / "root").mkdir(parents=True)
        self.files.mkdir()
        self.log = self.directory / "log"
        spec = pod(document)["spec"]
        context = spec["securityContext"]
        maps = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
        for mount in container(document).get("volumeMounts", []):
            [volume] = [one for one in spec["volumes"] if one["name"] == mount["name"]]
            assert mount["mountPath"] == f"/etc/aftercommit/{mount['name']}", mount
            self.mount(mount["name"], volume, existing(servers), maps, context["fsGroup"])
        variables = [f"{key}={value}" for key, value in environment(document).items()]
        inside = ["/usr/bin/setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}", f"--groups={context['fsGroup']}",
                  "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "/usr/bin/env", "--ignore-environment",
                  "PATH=/usr/local/bin:/usr/bin:/bin", *variables, *argv(document)]
        binaries = [f"{programs}/{one}" for one in ("aftercommit", "aftercommit-relay", "aftercommit-worker")] + [f"{PG}/psql"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", ROOT_SCRIPT, "sh", str(self.directory / "root"), str(self.files),
                 " ".join(os.path.realpath(one) for one in binaries), *inside], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def mount(self, name, volume, secrets, maps, group):
        """As a kubelet lays a volume down: files of root that the group of the pod reads."""
        directory = self.files / name
        directory.mkdir()
        source = volume.get("secret") or volume["configMap"]
        contents = secrets[source["secretName"]] if "secret" in volume else maps[source["name"]]
        for item in source["items"]:
            file = directory / item["path"]
            file.write_text(contents[item["key"]])
            os.chmod(file, source.get("defaultMode", 0o644))
            os.chown(file, 0, group)

    def fail(self, what):
        raise Failed(f"{name(self.document)}: {what}\n{self.log.read_text()[-3000:]}")

    def finish(self):
        try:
            status = self.process.wait(SOON)
        except subprocess.TimeoutExpired:
            self.fail("does not end")
        if status:
            self.fail(f"ends with status {status}")
        say(f"{name(self.document)} is done: {self.log.read_text().strip().splitlines()[-1:]}")

    def ask(self, probe):
        one = container(self.document)
        get = one[probe]["httpGet"]
        port = {port["name"]: port["containerPort"] for port in one["ports"]}[get["port"]]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{get['path']}", timeout=5) as answer:
                self.said = answer.read().decode().splitlines()[0]
                return answer.status == 200 or answer.status
        except urllib.error.HTTPError as error:
            return error.read().decode()
        except OSError as error:
            return str(error)

    def ready(self):
        def is_ready():
            if self.process.poll() is not None:
                self.fail(f"ended with status {self.process.returncode}")
            return self.ask("readinessProbe")
        try:
            eventually("its readiness probe succeeds", is_ready)
            eventually("its liveness probe succeeds", lambda: self.ask("livenessProbe"))
        except Failed as error:
            self.fail(error)
        say(f"{name(self.document)} is ready: {self.said}")

    def confined(self):
        """What the kernel says of the running process."""
        if self.process.poll() is not None:
            self.fail(f"ended with status {self.process.returncode}")
        status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        context = pod(self.document)["spec"]["securityContext"]
        seen = [status["Uid"].split()[0], int(status["CapBnd"], 16), int(status["CapEff"], 16), status["NoNewPrivs"].strip()]
        if seen != [str(context["runAsUser"]), 0, 0, "1"]:
            self.fail(f"runs with {seen}")

    def end(self):
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(pod(self.document)["spec"]["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            self.fail("does not end in its grace period")
        if status:
            self.fail(f"ends with status {status} after SIGTERM")
        say(f"{name(self.document)} ended {time.monotonic() - began:.1f} s after SIGTERM")


def render(servers, port):
    return rendered.template(helm, VALUES, sets=[f"nats.url=tls://localhost:{servers.nats_port}", f"http.port={port}"])


def jobs(servers):
    """The jobs in their order, each to its end, as helm does at an installation and at an upgrade."""
    documents = render(servers, 1)
    for document in sorted((one for one in documents if one["kind"] == "Job"), key=rendered.weight):
        Pod(document, documents, servers).finish()


def deployment(servers, part, stack):
    documents = render(servers, free_port())
    [document] = [one for one in documents if one["kind"] == "Deployment" and one["metadata"]["name"].endswith(part)]
    started = Pod(document, documents, servers)
    stack.callback(stop, started.process, signal.SIGKILL)
    return started


def work(servers, stack):
    prepare(servers)
    servers.type("".join(blocks("### 1. Namespace and secrets", "sh")))
    jobs(servers)
    relays = [deployment(servers, "-relay", stack) for _ in range(2)]
    workers = [deployment(servers, "-worker-receipts", stack) for _ in range(2)]
    eraser, pruner = deployment(servers, "-eraser", stack), deployment(servers, "-pruner", stack)
    everybody = [*relays, *workers, pruner]
    for one in everybody:
        one.ready()
    for one in [*everybody, eraser]:
        one.confined()
    see_it_work(servers, programs)

    # The upgrade of the chart, while everything runs.
    jobs(servers)
    publish(servers, 2)
    handled(servers, 2)
    for one in (relays[0], workers[0]):
        one.process.kill()
        one.process.wait()
    publish(servers, 3)
    handled(servers, 3)
    say("after a second run of the jobs, and with a relay and a worker killed, events are still handled, once")

    servers.psql_as("shop_service", "select aftercommit.forget('orders', 'request 1', key => 'order-7')")
    eventually("the eraser is through", lambda: servers.psql("select count(*) from aftercommit.forget_request where ended_at is null") == "0"
               or eraser.log.read_text()[-500:])
    say("what a service forgot with SQL, the eraser has erased from the stream")
    eventually("both reconcilers have run", lambda: servers.psql(
        "select count(distinct name) from aftercommit.reconcile_run where result = 'ok' and name in ('outbox', 'consumer:receipts')") == "2"
        or servers.psql("select name, result, error from aftercommit.reconcile_run"))
    say("the reconcilers have compared")
    for one in (relays[1], workers[1], eraser, pruner):
        one.end()
    for one in [*everybody, eraser]:
        for secret in servers.hidden():
            if secret in one.log.read_text():
                raise Failed(f"{name(one.document)}: a password is in its log")


if __name__ == "__main__":
    with_servers(work, "what the chart renders works: jobs, relays, workers, eraser, pruner, with the shipped roles and accounts, over TLS")
