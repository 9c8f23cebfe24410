"""Private PostgreSQL and nats-server with TLS, the roles of roles.sql and the accounts of accounts.conf, for the checks of the chart and of the units."""

import contextlib
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

ROOT = pathlib.Path(__file__).resolve().parents[2]
PG = os.environ.get("AFTERCOMMIT_PG_BIN", "")
NATS = os.environ.get("AFTERCOMMIT_NATS_SERVER", "")
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


def publish(servers, number):
    servers.psql_as("shop_service", f"""select aftercommit.publish('order.placed', jsonb_build_object('order', {number}), key => 'order-{number}')""")


def handled(servers, count):
    eventually(f"{count} events are handled once", lambda: servers.psql("select count(*), count(distinct event_id) from receipts") == f"{count}|{count}"
               or servers.psql("select count(*) from receipts"))


def with_servers(work, done):
    """Runs it with new servers, and says what failed or that it is done."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="aftercommit-"))
    # PostgreSQL's own user has to get in.
    os.chmod(directory, 0o711)
    try:
        with contextlib.ExitStack() as stack:
            work(Servers(directory, stack), stack)
    except Failed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(done)
