"""Private PostgreSQL and nats-server with TLS, the roles of roles.sql and the accounts of accounts.conf, for the checks of the chart and of the units."""

import contextlib
import os
import pathlib
import re
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


def section(title):
    """A part of docs/deploy.md, up to the next heading of the same level."""
    page = (ROOT / "docs/deploy.md").read_text()
    level = title.partition(" ")[0]
    body = page.split(f"\n{title}\n", 1)[1]
    # Not what is a comment in a block.
    return re.split(rf"(?m)^#{{2,{len(level)}}} (?=[\dA-Z])", body)[0]


def blocks(title, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.M | re.S)


class Servers:
    """PostgreSQL and nats-server with TLS, which end with this process. What docs/deploy.md makes of logins and rights is made by its own commands."""

    def __init__(self, directory, stack):
        self.directory = directory
        self.postgres_port, self.nats_port = free_port(), free_port()
        self.admin = secrets.token_hex(12)
        certificates(directory)
        # The checkout in which one types.
        self.checkout = directory / "checkout"
        self.checkout.mkdir()
        for part in ("deploy", "target"):
            (self.checkout / part).symlink_to(ROOT / part)
        shutil.copy(directory / "ca.crt", self.checkout)
        self.start_postgres(stack)
        self.typed = ""
        self.type("".join(blocks("### 1. A password for each process", "sh")))
        self.start_nats(stack)

    def here(self, text):
        """What the page says, of these servers."""
        text = text.replace("db.example.com:5432", f"localhost:{self.postgres_port}").replace("5432", str(self.postgres_port))
        return text.replace("db.example.com", "localhost").replace("nats.example.com:4222", f"localhost:{self.nats_port}")

    def type(self, commands, programs=""):
        """Runs commands of the page in the shell in which those before were run: what they have exported is still there."""
        script = f"set -euo pipefail\n{self.typed}\n{self.here(commands)}"
        path = f"{PG}:{programs}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(self.directory)}
        output = run("bash", "-c", script, cwd=self.checkout, env=env, input=f"{self.admin}\n")
        self.typed += "".join(line + "\n" for line in self.here(commands).splitlines() if "export " in line or line.startswith(("umask", "deploy=")))
        return output

    def secret(self, name):
        return (self.checkout / "secrets" / name).read_text()

    def hidden(self):
        """All passwords, for looking into logs."""
        return [self.admin, *re.findall(r"[0-9a-f]{48}", "".join(file.read_text() for file in (self.checkout / "secrets").iterdir()))]

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
        variables = dict(line.split("=", 1) for line in self.secret("nats-server.env").splitlines())
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
        env = {**os.environ, "PGSSLROOTCERT": str(self.directory / "ca.crt")}
        return run(f"{PG}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.secret(f"{login}.url").strip(), "-c", sql, env=env, cwd="/").strip()


def stop(process, how=signal.SIGTERM):
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def prepare(servers):
    """The page's logins and rights."""
    servers.psql("create database shop", "postgres")
    servers.psql(f"alter role postgres password '{servers.admin}'")
    servers.type("".join(blocks("### 3. PostgreSQL", "sh")))


def publish(servers, number):
    servers.psql_as("shop_service", f"""select aftercommit.publish('order.placed', jsonb_build_object('order', {number}), key => 'order-{number}')""")


def handled(servers, count):
    eventually(f"{count} events are handled once", lambda: servers.psql("select count(*), count(distinct event_id) from receipts") == f"{count}|{count}"
               or servers.psql("select count(*) from receipts"))


def see_it_work(servers, programs):
    """The page's last section."""
    servers.type("".join(blocks("## See it work", "sh")), programs)
    handled(servers, 1)
    say("an event that was published with SQL is handled")
    status = lambda: servers.type("aftercommit status || true", programs)
    eventually("`aftercommit status` says that all is well", lambda: status().startswith("OK: everything flows") or status())
    say("`aftercommit status` says: OK: everything flows")


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
