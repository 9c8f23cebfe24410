"""Plays the incidents of incidents.py, each on servers of its own, scrapes /metrics as Prometheus does, and writes the series of the metrics that
alerts.yml names into recorded/, as input of promtool. Which alerts fire on them, and when, is written there by check.py."""

import contextlib
import http.server
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

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
import check
from incidents import ALL, INCIDENTS, message
from servers import NATS, PG, ROOT, Failed, eventually, free_port, run, stop

STEP = 15
BIN = pathlib.Path(os.environ.get("AFTERCOMMIT_BIN", ROOT / "target/debug"))
WORKER = """
[[subscriber]]
name = "receipts"
types = ["order.placed"]
sql.function = "receipt"
concurrency = 2
max_batch = 1
max_attempts = 1000
backoff = { first = "1s", max = "10s" }

[[subscriber]]
name = "webhook"
types = ["order.placed"]
http.url = "http://127.0.0.1:ENDPOINT/"
backoff = { first = "1s", max = "10s" }

[[subscriber]]
name = "labels"
types = ["order.label"]
sql.function = "receipt"
max_attempts = 2
backoff = { first = "1s", max = "1s" }

[[coordinator]]
subscriber = "erasures"
ask_again = "10s"
"""
TABLES = """
create table control (fails boolean, sleeps double precision);
insert into control values (false, 0);
create table receipts (id bigint generated always as identity, event jsonb);
create function nothing(event jsonb) returns void language sql as '';
create function receipt(event jsonb) returns void language plpgsql as $$
declare now control;
begin
    if event -> 'data' ? 'poison' then
        raise exception 'there is no such order';
    end if;
    select * into now from control;
    if now.fails then raise exception 'the printer is on fire'; end if;
    perform pg_sleep(now.sleeps);
    insert into receipts (event) values (event);
end $$;
"""


class Process:
    """One of ours, or a server: the same command each time."""

    def __init__(self, name, command, directory, ready, env=None, how=signal.SIGTERM, port=None):
        self.name, self.command, self.env, self.ready, self.how, self.port = name, command, env, ready, how, port
        self.log = open(directory / f"{name}.log", "ab")
        self.start()

    def start(self):
        self.child = subprocess.Popen(self.command, env=self.env, stdout=self.log, stderr=self.log, cwd="/")
        if self.ready:
            eventually(f"{self.name} starts", self.ready)

    def stop(self):
        stop(self.child, self.how)

    def kill(self):
        self.child.kill()
        self.child.wait()


class Endpoint:
    """Takes events with a status."""

    def __init__(self, stack):
        self.status = 204

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                handler.rfile.read(int(handler.headers.get("content-length", 0)))
                handler.send_response(self.status)
                handler.send_header("content-length", "0")
                handler.end_headers()

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)


class System:
    """Servers, two relays, two workers, and what Prometheus sees of them."""

    def __init__(self, directory, stack):
        self.directory, self.stack, self.publishes = directory, stack, threading.Event()
        self.series, self.notes, self.step = {}, [], 0
        self.wanted = check.metrics_of_alerts()
        self.endpoint = Endpoint(stack)
        self.start_servers()
        self.env = {"PATH": os.environ["PATH"], "HOME": "/", "RUST_LOG": "info", "DATABASE_URL": self.url, "NATS_URL": f"nats://127.0.0.1:{self.nats_port}",
                    "AFTERCOMMIT_RECONCILE_EVERY": "20s", "AFTERCOMMIT_PARK_AFTER": "0s", "AFTERCOMMIT_OPERATOR": "recorder"}
        self.operator("migrate")
        self.psql(TABLES)
        self.operator("provision")
        self.targets = []
        self.note("Prometheus is there before anything is scraped")
        self.scrape()
        self.relays = [self.process(f"relay-{n}", "aftercommit-relay") for n in (1, 2)]
        config = WORKER.replace("ENDPOINT", str(self.endpoint.port))
        self.workers = [self.worker(f"worker-{n}", config) for n in (1, 2)]
        threading.Thread(target=self.write, daemon=True).start()
        self.due = time.monotonic()

    def start_servers(self):
        data = self.directory / "postgres"
        data.mkdir()
        self.pg_port, self.nats_port = free_port(), free_port()
        self.url = f"postgres://postgres@127.0.0.1:{self.pg_port}/postgres"
        as_postgres = []
        if os.getuid() == 0:
            run("chown", "postgres", str(data))
            as_postgres = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        run(*as_postgres, f"{PG}/initdb", "-D", str(data / "data"), "-U", "postgres", "--auth", "trust", "--no-sync", cwd="/")
        command = [*as_postgres, f"{PG}/postgres", "-D", str(data / "data"), "-c", f"port={self.pg_port}", "-c", "listen_addresses=127.0.0.1",
                   "-c", f"unix_socket_directories={data}", "-c", "fsync=off"]
        answers = lambda: subprocess.run([f"{PG}/pg_isready", "-h", "127.0.0.1", "-p", str(self.pg_port)], capture_output=True).returncode == 0
        self.postgres = Process("postgres-server", command, self.directory, answers, how=signal.SIGINT)
        self.stack.callback(self.postgres.stop)
        config = self.directory / "nats.conf"
        config.write_text(f'listen: "127.0.0.1:{self.nats_port}"\njetstream {{ store_dir: "{self.directory}/nats" }}\n')
        self.nats = Process("nats-server", [NATS, "--config", str(config)], self.directory, None)
        self.stack.callback(self.nats.stop)
        eventually("nats-server starts", lambda: "Server is ready" in (self.directory / "nats-server.log").read_text())

    def process(self, name, program, *arguments):
        port = free_port()
        process = Process(name, [str(BIN / program), "--http", f"127.0.0.1:{port}", *arguments], self.directory, None, env=self.env, port=port)
        self.stack.callback(process.stop)
        self.targets.append(process)
        return process

    def worker(self, name, config):
        file = self.directory / f"{name}.toml"
        file.write_text(config)
        self.operator("provision", "--config", str(file))
        return self.process(name, "aftercommit-worker", "--config", str(file))

    def processes(self):
        return self.relays + self.workers

    def psql(self, sql):
        return run(f"{PG}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", self.url, "-c", sql, cwd="/").strip()

    def operator(self, *arguments, fails=False):
        command = [str(BIN / "aftercommit"), *arguments]
        if fails:
            return subprocess.run(command, env=self.env, cwd=self.directory, capture_output=True)
        return run(str(BIN / "aftercommit"), *arguments, env=self.env, cwd=self.directory)

    def publish(self, event_type, data, key):
        self.psql(f"select aftercommit.publish('{event_type}', '{message(data)}'::jsonb, key => '{key}')")

    def stream(self, setting, value):
        # The client program's names of flags.
        flag = {"max_msg_size": "--max-msg-size"}[setting]
        self.nats_cli("stream", "edit", "EVENTS", f"{flag}={value}", "--force")

    def nats_cli(self, *arguments):
        return run("nats", "--server", f"nats://127.0.0.1:{self.nats_port}", *arguments, env={**self.env})

    def delete_message(self):
        last = self.psql("select count(*) from aftercommit.outbox")
        self.nats_cli("stream", "rmm", "EVENTS", str(int(last) // 2), "--force")

    def erase_with_nobody(self):
        (self.directory / "erase.toml").write_text("[[subject]]\nkind = 'tenant'\nparticipants = ['nobody']\ndue_after = '1s'\n")
        self.operator("erase", "request", "tenant", "7", "--config", "erase.toml")

    def traffic(self):
        self.publishes.set()

    def quiet(self):
        self.publishes.clear()

    def write(self):
        number = 0
        while True:
            self.publishes.wait()
            with contextlib.suppress(Failed):
                number += 1
                self.publish("order.placed", {"order": number}, f"order-{number % 7}")
            time.sleep(0.7)

    def note(self, text):
        self.notes.append((self.step, text))
        print(f"{self.directory.name}: {text}", flush=True)

    def steps(self, count):
        for _ in range(count):
            self.due = max(self.due + STEP, time.monotonic())
            time.sleep(max(0, self.due - time.monotonic()))
            self.scrape()

    def hold(self, count, of=4):
        """As if the last `of` steps came again and again; counters and ages go on growing."""
        grows = {}
        for name, values in self.series.items():
            values += [None] * (self.step - len(values))
            first, last = values[-1 - of], values[-1]
            numbers = isinstance(first, float) and isinstance(last, float)
            counter = numbers and name.split("{")[0].endswith(("_total", "_bucket"))
            age = numbers and "_seconds" in name and abs(last - first - of * STEP) < STEP / 2
            grows[name] = last - first if counter or age else 0
        for _ in range(count):
            for name, values in self.series.items():
                old = values[self.step - of]
                values.append(old + grows[name] if isinstance(old, float) else old)
            self.step += 1

    def scrape(self):
        for target in self.targets:
            job = "aftercommit-relay" if target.name.startswith("relay") else "aftercommit-worker"
            labels = f'instance="{target.name}",job="{job}"'
            seen = {}
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{target.port}/metrics", timeout=10) as answer:
                    seen = self.read(answer.read().decode(), labels)
                seen[f"up{{{labels}}}"] = 1.0
            except OSError:
                seen[f"up{{{labels}}}"] = 0.0
            for name in seen:
                self.series.setdefault(name, [])
            for name, values in self.series.items():
                if f"{{{labels}" in name:
                    values += [None] * (self.step - len(values))
                    gone = values and isinstance(values[-1], float)
                    values.append(seen.get(name, "stale" if gone else None))
        names = [f'instance="{target.name}"' for target in self.targets]
        for name, values in self.series.items():
            if not any(instance in name for instance in names):
                values.append("stale" if values and isinstance(values[-1], float) else None)
        self.step += 1

    def read(self, text, labels):
        """The samples of metrics that some alert is about."""
        seen = {}
        for line in text.splitlines():
            found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
            if found and found[1] in self.wanted:
                seen[f"{found[1]}{{{labels},{found[2]}}}"] = float(found[3])
        return seen


def play(name, failed):
    directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-"))
    os.chmod(directory, 0o711)
    try:
        with contextlib.ExitStack() as stack:
            system = System(directory, stack)
            expected = INCIDENTS[name](system)
            check.write(name, INCIDENTS[name].__doc__, system, expected, STEP)
        shutil.rmtree(directory, ignore_errors=True)
    except Exception as error:
        failed.append(f"{name}: {error!r}; logs are in {directory}")


def main():
    failed = []
    threads = [threading.Thread(target=play, args=(name, failed)) for name in sys.argv[1:] or INCIDENTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
