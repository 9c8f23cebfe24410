"""The system of docker-compose.yml, under a project of its own, with the commands of docs/deploy.md."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests"))
from servers import ROOT, Failed, free_port, section  # noqa: E402

# One after the other, on a machine that may have two cores and no image in its cache.
SOON = 300
OURS = ["relay-1", "relay-2", "worker-1", "worker-2", "eraser", "pruner"]
SERVERS = ["postgres", "nats", "prometheus"]


def commands(title):
    """What the page has one type."""
    found = re.findall(r"^```console\n(.*?)^```$", section(title), re.M | re.S)
    return [line.removeprefix("$ ") for block in found for line in block.splitlines() if line.startswith("$ ")]


class System:
    """`compose` is the program that stands for `docker compose`, with its arguments; `engine` knows the containers."""

    def __init__(self, engine, compose):
        # What is started is removed, whoever ends this.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        self.engine = engine
        self.project = f"aftercommit-trial-{os.getpid()}"
        self.port = free_port()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="aftercommit-compose-"))
        # `docker compose …` of the page.
        shim = self.directory / "docker"
        shim.write_text(f'#!/bin/sh\nshift\nexec {compose} "$@"\n')
        shim.chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{self.directory}:{os.environ['PATH']}", "COMPOSE_PROJECT_NAME": self.project, "PROMETHEUS_PORT": str(self.port)}

    def type(self, command, check=True):
        """Runs a command of the page; returns what it prints."""
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise Failed(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.replace("\r\n", "\n")

    def compose(self, *arguments, check=True):
        return self.type("docker compose " + " ".join(arguments), check)

    def run(self, *command, check=True):
        done = subprocess.run([self.engine, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise Failed(f"{self.engine} {' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def container(self, service):
        names = self.run("ps", "--all", "--format", "{{.Names}}").split()
        name = f"{self.project}-{service}-1"
        if name not in names:
            raise Failed(f"there is no container of {service}")
        return name

    def inspect(self, service):
        return json.loads(self.run("inspect", self.container(service)))[0]

    def healthy(self, service):
        state = self.inspect(service)["State"]
        return (state.get("Health") or state.get("Healthcheck") or {}).get("Status") == "healthy"

    def running(self, service):
        return self.inspect(service)["State"]["Running"]

    def all_well(self):
        for service in [*OURS, *SERVERS]:
            if not self.running(service):
                return f"{service} does not run: {self.logs(service)}"
            # The eraser serves no health checks.
            if service != "eraser" and not self.healthy(service):
                return f"{service} is not healthy: {self.logs(service)}"
        return True

    def logs(self, service):
        done = subprocess.run([self.engine, "logs", "--tail", "5", self.container(service)], capture_output=True, text=True)
        return done.stdout + done.stderr

    def eventually(self, what, condition, soon=SOON):
        deadline = time.monotonic() + soon
        while True:
            try:
                seen = condition()
            except Failed as error:
                seen = error
            if seen is True:
                return
            if time.monotonic() > deadline:
                raise Failed(f"not within {soon} s: {what}; last seen: {seen}")
            time.sleep(0.5)

    def crash(self, service):
        """Ends its process as a crash does, of which the engine knows nothing before."""
        if self.engine == "podman":
            os.kill(self.inspect(service)["State"]["Pid"], signal.SIGKILL)
        else:
            self.run("kill", self.container(service))
            self.run("start", self.container(service))

    def sql(self, database, statement):
        """As the superuser, within PostgreSQL's container."""
        return self.run("exec", self.container("postgres"), "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", database, "-c", statement).strip()

    def ask_prometheus(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def alerts(self):
        """The names of those that fire."""
        return {alert["labels"]["alertname"] for alert in self.ask_prometheus("alerts")["alerts"] if alert["state"] == "firing"}

    def account(self):
        """How many events there are, and how many of them are lost, doubled, and out of the order of their key."""
        outbox = [line.split("|") for line in self.sql("shop", "select event_id, key from aftercommit.outbox where type = 'order.placed' order by id").splitlines()]
        receipts = self.sql("receipts", "select event_id from public.receipts order by id").splitlines()
        published = {event: (key, place) for place, (event, key) in enumerate(outbox)}
        late, last = 0, {}
        for event in receipts:
            key, place = published.get(event, (None, 0))
            late += key is not None and place < last.get(key, -1)
            last[key] = place
        return len(outbox), len(set(published) - set(receipts)), len(receipts) - len(set(receipts)), late

    def nothing_missing(self):
        _, lost, _, _ = self.account()
        return lost == 0 or f"{lost} events are not handled"

    def remove(self):
        self.compose("down", "--volumes", "--timeout", "1", check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


class Publisher(threading.Thread):
    """A service that goes on publishing, whatever happens to PostgreSQL, until it is stopped."""

    def __init__(self, system):
        super().__init__(daemon=True)
        self.system, self.stopping, self.start_at = system, threading.Event(), 0

    def run(self):
        while not self.stopping.is_set():
            self.start_at += 5
            statement = f"""select count(aftercommit.publish('order.placed', jsonb_build_object('order', n), key => 'order-' || n % 7))
                from generate_series({self.start_at}, {self.start_at + 4}) as n"""
            try:
                self.system.sql("shop", statement)
            except Failed:
                time.sleep(0.5)
            self.stopping.wait(0.1)

    def stop(self):
        self.stopping.set()
        self.join()
