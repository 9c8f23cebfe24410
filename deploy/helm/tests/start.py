"""Starts what the chart renders. Arguments: helm, and the directory of the programs.

The values are those of values/secured.yaml, which docs/deploy.md builds. PostgreSQL and nats-server are private ones, with TLS, the roles of roles.sql
and the accounts of accounts.conf. Each container becomes a process with the rendered command, variables, files, user and groups, on a root
file system of its own that is read-only, without capabilities. What a kubelet and a network do beside that is not shown.
"""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import rendered
from rendered import ROOT, argv, container, environment, name, pod

helm, programs = sys.argv[1], sys.argv[2]
PG = os.environ["AFTERCOMMIT_PG_BIN"]
NATS = os.environ["AFTERCOMMIT_NATS_SERVER"]
VALUES = rendered.CHART.parent / "tests/values/secured.yaml"
SOON = 60

# As docs/deploy.md has them: the login and its role.
LOGINS = {
    "shop_owner": "aftercommit_owner",
    "shop_service": "aftercommit_publisher, aftercommit_eraser",
    "shop_relay": "aftercommit_relay, aftercommit_outbox_reconciler",
    "shop_provisioner": "aftercommit_operator",
    "shop_eraser": "aftercommit_eraser",
    "shop_pruner": "aftercommit_pruner",
    "receipts_worker": "aftercommit_worker, aftercommit_inbox_reconciler",
}
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


class Failed(Exception):
    pass


def say(text):
    print(f"  {text}", flush=True)


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise Failed(f"{command[0]}: {done.stdout}{done.stderr}")
    return done.stdout


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def eventually(what, condition):
    deadline = time.monotonic() + SOON
    while True:
        seen = condition()
        if seen is True:
            return
        if time.monotonic() > deadline:
            raise Failed(f"not within {SOON} s: {what}; last seen: {seen}")
        time.sleep(0.1)


def certificates(directory):
    """A CA, and one certificate for both servers."""
    quiet = {"cwd": directory}
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.crt", **quiet)
    run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr", **quiet)
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    run("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2", "-extfile", "names", "-out", "server.crt", **quiet)


class Servers:
    """PostgreSQL and nats-server with TLS, which end with this process."""

    def __init__(self, directory, stack):
        self.directory = directory
        self.postgres_port, self.nats_port = free_port(), free_port()
        self.passwords = {login: secrets.token_hex(12) for login in [*LOGINS, "admin"]}
        users = ("system", "provisioner", "relay", "outbox_reconciler", "branch_balance", "receipts", "receipts_reconciler", "eraser", "operator")
        # A bare value of nats-server's configuration that begins with a digit would be a number.
        self.nats_passwords = {user: "p" + secrets.token_hex(12) for user in users}
        certificates(directory)
        self.start_postgres(stack)
        self.start_nats(stack)

    def start_postgres(self, stack):
        data = self.directory / "postgres"
        data.mkdir()
        for file in ("server.crt", "server.key", "ca.crt"):
            shutil.copy(self.directory / file, data)
            os.chmod(data / file, 0o600)
        cluster = data / "data"
        run("chown", "-R", "postgres", str(data))
        as_postgres = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
        run(*as_postgres, f"{PG}/initdb", "--pgdata", str(cluster), "--auth", "peer", "--encoding", "UTF8", "--no-sync", cwd="/")
        (cluster / "pg_hba.conf").write_text("local all all peer\nhostssl all all 127.0.0.1/32 scram-sha-256\nhostssl all all ::1/128 scram-sha-256\n")
        settings = {"port": self.postgres_port, "listen_addresses": "localhost", "unix_socket_directories": data, "ssl": "on",
                    "ssl_cert_file": data / "server.crt", "ssl_key_file": data / "server.key", "fsync": "off"}
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        log = open(self.directory / "postgres.log", "wb")
        server = subprocess.Popen([*as_postgres, f"{PG}/postgres", "-D", str(cluster), *options], stdout=log, stderr=log, cwd="/")
        stack.callback(stop, server, signal.SIGINT)
        self.as_postgres, self.socket = as_postgres, data
        eventually("PostgreSQL starts", lambda: subprocess.run([f"{PG}/pg_isready", "-h", str(data), "-p", str(self.postgres_port)], capture_output=True).returncode == 0)

    def start_nats(self, stack):
        directory = self.directory / "nats"
        directory.mkdir()
        shutil.copy(ROOT / "deploy/nats/accounts.conf", directory)
        (directory / "nats-server.conf").write_text(
            f'listen: "127.0.0.1:{self.nats_port}"\njetstream {{ store_dir: "{directory}/store", sync_interval: always }}\n'
            f'tls {{ cert_file: "{self.directory}/server.crt", key_file: "{self.directory}/server.key" }}\ninclude "accounts.conf"\n')
        variables = {f"AFTERCOMMIT_{user.upper()}_PASSWORD": password for user, password in self.nats_passwords.items()}
        log = open(self.directory / "nats.log", "wb")
        server = subprocess.Popen([NATS, "--config", str(directory / "nats-server.conf")], env={**os.environ, **variables}, stdout=log, stderr=log)
        stack.callback(stop, server, signal.SIGTERM)

        def answers():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.nats_port), 1):
                return True
        eventually("nats-server starts", answers)

    def psql(self, sql, database="shop"):
        """As the superuser, over the socket."""
        return run(*self.as_postgres, f"{PG}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", str(self.socket), "-p", str(self.postgres_port),
                   "-d", database, "-c", sql, cwd="/").strip()

    def psql_as(self, login, sql):
        """As a service does: over TLS, with a password."""
        env = {**os.environ, "PGPASSWORD": self.passwords[login]}
        url = f"host=localhost port={self.postgres_port} dbname=shop user={login} sslmode=verify-full sslrootcert={self.directory}/ca.crt"
        return run(f"{PG}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", url, "-c", sql, env=env, cwd="/").strip()

    def secrets(self):
        """The existing secrets that the values name: name, key, content."""
        url = lambda login: {"url": f"postgres://{login}:{self.passwords[login]}@localhost:{self.postgres_port}/shop?sslmode=verify-full\n"}
        service = f"[aftercommit]\nhost=localhost\nport={self.postgres_port}\ndbname=shop\nuser=admin\npassword={self.passwords['admin']}\nsslmode=verify-full\n"
        all = {login.replace("_", "-"): url(login) for login in LOGINS}
        all |= {f"nats-{user}": {"password": password} for user, password in self.nats_passwords.items()}
        all["shop-admin"] = {"pg_service.conf": service}
        all["servers-ca"] = {"ca.crt": (self.directory / "ca.crt").read_text()}
        return all


def stop(process, how=signal.SIGTERM):
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


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
            self.mount(mount["name"], volume, servers.secrets(), maps, context["fsGroup"])
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
        say(f"{name(self.document)} is ready")

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


def prepare(servers):
    """What docs/deploy.md does by hand before the chart is installed."""
    servers.psql("create database shop", "postgres")
    servers.psql(f"create role admin superuser login password '{servers.passwords['admin']}'")
    psql = [*servers.as_postgres, f"{PG}/psql", "-X", "-h", str(servers.socket), "-p", str(servers.postgres_port), "-d", "shop"]
    shutil.copy(ROOT / "deploy/postgres/roles.sql", servers.socket / "roles.sql")
    run(*psql, "-f", str(servers.socket / "roles.sql"), cwd="/")
    for login, roles in LOGINS.items():
        servers.psql(f"create role {login} login password '{servers.passwords[login]}' in role {roles}")
    servers.psql("""
        create table public.receipts (id bigint generated always as identity, event_id uuid, what jsonb);
        create function public.receipt(event jsonb) returns void language sql as
            $$ insert into public.receipts (event_id, what) values ((event ->> 'id')::uuid, event -> 'data') $$;
        grant insert on public.receipts to receipts_worker""")


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


def publish(servers, number):
    servers.psql_as("shop_service", f"""select aftercommit.publish('order.placed', jsonb_build_object('order', {number}), key => 'order-{number}')""")


def handled(servers, count):
    eventually(f"{count} events are handled once", lambda: servers.psql("select count(*), count(distinct event_id) from receipts") == f"{count}|{count}"
               or servers.psql("select count(*) from receipts"))


def work(servers, stack):
    prepare(servers)
    jobs(servers)
    relays = [deployment(servers, "-relay", stack) for _ in range(2)]
    workers = [deployment(servers, "-worker-receipts", stack) for _ in range(2)]
    eraser, pruner = deployment(servers, "-eraser", stack), deployment(servers, "-pruner", stack)
    everybody = [*relays, *workers, pruner]
    for one in everybody:
        one.ready()
    for one in [*everybody, eraser]:
        one.confined()
    publish(servers, 1)
    handled(servers, 1)
    say("an event that was published with SQL is handled")

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

    servers.psql_as("shop_service", "select aftercommit.forget('orders', 'request 1', key => 'order-1')")
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
        for secret in (*servers.passwords.values(), *servers.nats_passwords.values()):
            if secret in one.log.read_text():
                raise Failed(f"{name(one.document)}: a password is in its log")


def main():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="chart-"))
    os.chmod(directory, 0o711)
    # PostgreSQL's own user reads there.
    try:
        with contextlib.ExitStack() as stack:
            work(Servers(directory, stack), stack)
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print("what the chart renders works: jobs, relays, workers, eraser, pruner, with the shipped roles and accounts, over TLS")


if __name__ == "__main__":
    main()
