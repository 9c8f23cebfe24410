"""From nothing to a handled event and through two incidents, on the system of docker-compose.yml: what `status` and the alerts show, and the proof in the end.

Arguments: the program that knows the containers (docker or podman), and the command that stands for `docker compose`.
"""

import sys
import time

from system import ROOT, Failed, Publisher, System, commands

BROKEN = "create or replace function public.receipt(event jsonb) returns void language plpgsql as $$ begin raise exception 'the printer is on fire'; end $$"


class Demo:
    def __init__(self, system):
        self.system = system
        self.began = time.monotonic()

    def say(self, text):
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def show(self, command):
        """Types a command, and shows what it prints."""
        printed = self.system.type(command, check=False).rstrip()
        print(f"\n$ {command}\n{printed}\n", flush=True)
        return printed

    def until_shown(self, command, what):
        """Shows a command's output as soon as it says something."""
        self.system.eventually(f"{command} shows: {what}", lambda: what in self.system.type(command, check=False) or self.system.type(command, check=False))
        return self.show(command)

    def first_event(self):
        for command in commands("### 1. Start"):
            self.say(f"$ {command}")
            self.system.type(command)
        self.system.eventually("everything runs", self.system.all_well)
        self.say("everything runs: two relays, two workers, PostgreSQL, nats-server, Prometheus")
        publish, look, status, *_ = commands("### 2. Publish, and see it handled")
        self.show(publish)
        self.until_shown(look, '{"order": 7}')
        self.until_shown(status, "OK: everything flows")

    def broken_function(self):
        subscriber = commands("### 2. Publish, and see it handled")[3]
        self.say("INCIDENT 1: somebody breaks the subscriber's function. Orders go on meanwhile.")
        self.system.sql("receipts", BROKEN)
        self.until_shown(subscriber, "the printer is on fire")
        self.say("the function is mended, as deploy/compose/receipts.sql has it")
        self.system.sql("receipts", (ROOT / "deploy/compose/receipts.sql").read_text())
        self.until_shown(subscriber, "OK: everything flows")

    def no_nats(self):
        status = commands("### 2. Publish, and see it handled")[2]
        self.say("INCIDENT 2: nats-server is stopped. Orders are committed all the same.")
        self.show("docker compose stop nats")
        stopped = time.monotonic()
        self.until_shown(status, "STUCK")
        self.say("waiting for Prometheus to say so; that takes a minute or two")
        self.system.eventually("an alert fires", lambda: bool(self.system.alerts()))
        took = time.monotonic() - stopped
        fired = self.system.alerts()
        self.say(f"ALERT after {took:.0f} s: {', '.join(sorted(fired))}")
        for alert in self.system.ask_prometheus("alerts")["alerts"]:
            if alert["state"] == "firing":
                print(f"          {alert['annotations']['summary']}\n          {alert['annotations']['description']}", flush=True)
        self.show("docker compose start nats")
        self.say("nobody does anything else")
        self.until_shown(status, "OK: everything flows")
        self.system.eventually("no alert fires any more", lambda: self.system.alerts() == set() or self.system.alerts())
        self.say("no alert fires any more")
        return fired


def main(engine, compose):
    system = System(engine, compose)
    demo = Demo(system)
    try:
        demo.first_event()
        publisher = Publisher(system)
        publisher.start()
        demo.broken_function()
        fired = demo.no_nats()
        publisher.stop()
        system.eventually("everything is handled", system.nothing_missing)
        events, lost, doubled, late = system.account()
        if lost or doubled or late:
            raise Failed(f"lost {lost}, duplicated {doubled}, out of order {late}")
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        demo.say("removing it")
        system.remove()
    print(f"PROVED: {events} events, two incidents that status and alerts ({', '.join(sorted(fired))}) showed; lost 0, duplicated 0, out of order 0")


if __name__ == "__main__":
    main(*sys.argv[1:])
