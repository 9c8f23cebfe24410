"""Starts the system of docker-compose.yml as docs/deploy.md says, and kills, stops and upgrades what is in it while events flow.

Arguments: the program that knows the containers (docker or podman), the command that stands for `docker compose`, our image.
"""

import pathlib
import re
import sys

import system as composed
from system import OURS, SERVERS, Failed, Publisher, System, commands


def say(text):
    print(f"  {text}", flush=True)


def start(system):
    for command in commands("### 1. Start"):
        system.type(command)
    system.eventually("everything runs and is healthy", system.all_well)
    say("started with the commands of the page; everything runs and is healthy")


def see(system):
    """The page's second step: each command, and what it shows."""
    publish, look, status, subscriber, doctor = commands("### 2. Publish, and see it handled")
    if not re.search(r"[0-9a-f-]{36}", system.type(publish)):
        raise Failed("publishing prints no id")
    system.eventually("the event is handled", lambda: '{"order": 7}' in system.type(look) or system.type(look))
    for command in (status, subscriber):
        system.eventually(f"{command}: all is well", lambda: system.type(command).startswith("OK: everything flows") or system.type(command))
    said = system.type(doctor)
    checks = re.findall(r"^(\S+) +(\w+(?: \w+)*)  ", said, re.M)
    # One nats-server is what this is.
    if len(checks) < 20 or any(judged != "OK" for judged, check in checks):
        raise Failed(f"{doctor}:\n{said}")
    say(f"published with psql, handled; status is OK; doctor: {said.splitlines()[-1]}")


def confined(system):
    """Each container is as confined as the file says, and no other machine can reach any."""
    for service in [*OURS, *SERVERS]:
        found = system.inspect(service)
        status = pathlib.Path(f"/proc/{found['State']['Pid']}/status").read_text() if system.engine == "podman" else ""
        if not found["HostConfig"]["ReadonlyRootfs"]:
            raise Failed(f"{service} may write to its root")
        if status and not (re.search(r"^CapBnd:\s+0+$", status, re.M) and re.search(r"^NoNewPrivs:\s+1$", status, re.M) and not re.search(r"^Uid:\s+0\b", status, re.M)):
            raise Failed(f"{service} is not confined:\n{status}")
        for bindings in (found["HostConfig"]["PortBindings"] or {}).values():
            if any(binding["HostIp"] != "127.0.0.1" for binding in bindings or []):
                raise Failed(f"{service} is open to other machines")
    for service in OURS:
        user = system.inspect(service)["Config"]["User"]
        if not re.fullmatch(r"100\d\d:100\d\d", user):
            raise Failed(f"{service} runs as {user}")
    # A process reads the secrets of its role only.
    shown = system.run("exec", system.container("nats"), "/bin/sh", "-c", "cat /secrets/relay/* /secrets/postgres/* 2>&1; ls /secrets/owner 2>&1; true")
    if "postgres://" in shown or "Permission denied" not in shown:
        raise Failed(f"nats reads secrets of others: {shown}")
    say("read-only, without capabilities, each with its own secrets; ports at 127.0.0.1 only")


def scraped(system):
    def up():
        targets = system.ask_prometheus("targets")["activeTargets"]
        return all(target["health"] == "up" for target in targets) or [(target["scrapeUrl"], target["health"]) for target in targets]
    system.eventually("Prometheus gets metrics of all", up)
    rules = [rule for group in system.ask_prometheus("rules")["groups"] for rule in group["rules"]]
    if not rules or any(rule["health"] == "err" for rule in rules):
        raise Failed(f"Prometheus cannot evaluate: {rules}")
    system.eventually("no alert fires", lambda: system.alerts() == set() or system.alerts())
    say(f"Prometheus gets metrics of all, knows {len(rules)} alerts, and none fires")


def flows(system, what):
    """Something more comes through."""
    before = int(system.sql("receipts", "select count(*) from public.receipts"))
    system.eventually(f"events flow {what}", lambda: int(system.sql("receipts", "select count(*) from public.receipts")) > before + 5)


def killed(system):
    for service in [*OURS, "nats", "postgres", "prometheus"]:
        system.crash(service)
        system.eventually(f"{service} is back after SIGKILL", lambda: system.running(service) and (service == "eraser" or system.healthy(service)))
        flows(system, f"after {service} was killed")
        say(f"{service} is killed, and back")


def settled(system, what):
    system.eventually("everything is handled", system.nothing_missing)
    events, lost, doubled, late = system.account()
    if lost or doubled or late:
        raise Failed(f"{what}: lost {lost}, doubled {doubled}, out of order {late}")
    say(f"{what}: {events} events, 0 lost, 0 doubled, 0 out of order")


def rotated(system):
    """New passwords for a login of each server."""
    files = {"/secrets/receipts/database.url": "", "/secrets/relay/nats.password": ""}
    read = lambda file: system.type(f"docker compose run --rm --no-deps --entrypoint cat prepare {file}")
    for file in files:
        files[file] = read(file)
        system.type(f"docker compose run --rm --no-deps --entrypoint rm prepare {file}")
    system.compose("up", "--detach", "--wait")
    system.compose("restart", "nats")
    for file, before in files.items():
        if len(read(file)) < 40 or read(file) == before:
            raise Failed(f"{file} is not new")
    for service in ("relay-1", "relay-2", "worker-1", "worker-2"):
        system.crash(service)
    system.eventually("everything runs with new passwords", system.all_well)
    flows(system, "with new passwords")
    say("passwords of a login of each server are changed")


def down_and_up(system):
    system.compose("down")
    if system.run("ps", "--quiet", "--filter", f"name={system.project}").strip():
        raise Failed("something runs after `docker compose down`")
    system.compose("up", "--detach", "--wait")
    system.eventually("everything runs again", system.all_well)


def upgraded(system, image):
    """Another image, as a newer version brings one."""
    newer = f"localhost/aftercommit:trial-{system.project}"
    system.run("tag", image, newer)
    try:
        system.environment["AFTERCOMMIT_IMAGE"] = newer
        servers = [system.inspect(service)["Id"] for service in SERVERS]
        system.compose("up", "--detach", "--wait")
        system.eventually("everything runs with the newer image", system.all_well)
        for service in OURS:
            if newer not in (system.inspect(service).get("ImageName", ""), system.inspect(service)["Config"]["Image"]):
                raise Failed(f"{service} has the old image")
        # podman's engine reports networks in other words than Docker's, so Compose believes that those of all have changed.
        if system.engine == "docker" and servers != [system.inspect(service)["Id"] for service in SERVERS]:
            raise Failed("the upgrade took the servers away")
        flows(system, "with the newer image")
    finally:
        system.newer = newer


def main(engine, compose, image):
    system = System(engine, compose)
    try:
        start(system)
        see(system)
        confined(system)
        scraped(system)
        publisher = Publisher(system)
        publisher.start()
        killed(system)
        upgraded(system, image)
        rotated(system)
        publisher.stop()
        settled(system, "killed one by one, upgraded, passwords changed")
        # Commits of which nobody has heard yet.
        system.sql("shop", "select aftercommit.publish('order.placed', jsonb_build_object('order', n), key => 'order-' || n % 7) from generate_series(1, 500) as n")
        down_and_up(system)
        settled(system, "stopped with a backlog, and started again")
        see_again = commands("### 2. Publish, and see it handled")[2]
        system.eventually("status is OK", lambda: system.type(see_again).startswith("OK: everything flows") or system.type(see_again))
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        system.remove()
        if getattr(system, "newer", None):
            system.run("untag", image, system.newer, check=False) if engine == "podman" else system.run("rmi", system.newer, check=False)
    print("docker-compose.yml is as it should be")


if __name__ == "__main__":
    composed.sys.stdout.reconfigure(line_buffering=True)
    main(*sys.argv[1:])
