"""Starts what the units start. Arguments: the directory of the programs.

There is no systemd here that could start units, so each becomes a process as the unit says: its command, its environment file, its credentials, a user
of its own without capabilities. Files are where the commands of docs/deploy.md put them, below another root. strace watches it, because a system call that the unit's filter refuses, or memory that
is writable and executable, would end it under systemd only.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import unit
from unit import ROOT, UNITS

sys.path.insert(0, str(ROOT / "deploy/tests"))
from servers import Failed, blocks, eventually, free_port, prepare,  run, say, see_it_work, stop, with_servers  # noqa: E402

programs = sys.argv[1]
# As DynamicUser chooses: one that nobody else has.
USER = 61999


def allowed():
    """What SystemCallFilter leaves, by the groups of this systemd."""
    text = run("systemd-analyze", "--no-pager", "syscall-filter")
    groups, current = {}, None
    for line in text.splitlines():
        if line.startswith("@"):
            groups[current := line.strip()] = []
        elif line.startswith(" ") and current and not line.strip().startswith("#"):
            groups[current].append(line.strip())

    def calls(name):
        return set().union(*(calls(member) if member.startswith("@") else {member} for member in groups[name]))

    some = unit.Unit(UNITS[0], "", "")
    left = set()
    for line in some.all("SystemCallFilter"):
        words = set().union(*map(calls, line.lstrip("~").split()))
        left = left - words if line.startswith("~") else left | words
    return left


class Process:
    """A unit as a process."""

    def __init__(self, path, servers, stack):
        self.kind = path.name.partition(".")[0].rstrip("@").removeprefix("aftercommit-")
        directory = servers.directory / self.kind
        credentials = directory / "credentials"
        credentials.mkdir(parents=True)
        self.unit = unit.Unit(path, "receipts", credentials)
        for line in self.unit.all("LoadCredential"):
            name, _, file = line.partition(":")
            shutil.copy(f"{servers.directory}/root{file}", credentials / name)
        # With what the page has people look through.
        env = servers.here(pathlib.Path(f"{servers.directory}/root{self.unit.one('EnvironmentFile')}").read_text())
        env = re.sub(r"^((?:NATS_CA|PGSSLROOTCERT)=)", rf"\g<1>{servers.directory}/root", env, flags=re.M)
        self.port = free_port()
        env = re.sub(r"^(AFTERCOMMIT_HTTP=127.0.0.1:).*", rf"\g<1>{self.port}", env, flags=re.M)
        self.serves = "AFTERCOMMIT_HTTP=" in env
        variables = dict(line.split("=", 1) for line in env.splitlines() if line and not line.startswith("#"))
        for file in [credentials, *credentials.iterdir()]:
            os.chown(file, USER, USER)
            os.chmod(file, 0o500 if file.is_dir() else 0o400)
        command = self.unit.one("ExecStart").split()
        command[0] = f"{programs}/{os.path.basename(command[0])}"
        self.trace, self.log = servers.directory / f"{self.kind}.trace", servers.directory / f"{self.kind}.log"
        self.said = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self.unit.one("Type") == "notify" else None
        notified = {}
        if self.said:
            self.said.bind(path := str(directory / "notify"))
            os.chown(path, USER, USER)
            # A period that the test sees the end of.
            notified = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000"}
        # -D: the program stays the child, and gets the signals.
        tracing = ["strace", "-D", "-f", "-q", "-o", str(self.trace)] if shutil.which("strace") else []
        confined = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", *tracing,
                    "env", "--ignore-environment", *(f"{name}={value}" for name, value in {**self.unit.environment(), **variables, **notified}.items()), *command]
        self.trace.touch()
        os.chown(self.trace, USER, USER)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(confined, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/")
        stack.callback(stop, self.process, signal.SIGKILL)

    def ready(self):
        def answer():
            if self.process.poll() is not None:
                raise Failed(f"{self.unit.name}: ended with status {self.process.returncode}: {self.log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as got:
                    return got.status == 200
            except urllib.error.HTTPError as error:
                return error.read().decode()
            except OSError as error:
                return str(error)
        eventually(f"{self.unit.name} is ready", answer)
        for line in ("READY=1", "WATCHDOG=1") if self.said else ():
            self.hear(line)
        say(f"{self.unit.name} is ready")

    def hear(self, line):
        """Waits until the process has told systemd that."""
        self.said.settimeout(30)
        try:
            while line not in self.said.recv(4096).decode().splitlines():
                pass
        except TimeoutError:
            raise Failed(f"{self.unit.name}: never says {line}") from None

    def end(self, left):
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(int(self.unit.one("TimeoutStopSec").rstrip("s")))
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.unit.name}: does not stop in time") from None
        if self.said:
            self.hear("STOPPING=1")
        if status:
            raise Failed(f"{self.unit.name}: ends with status {status}: {self.log.read_text()[-2000:]}")
        if not shutil.which("strace"):
            return
        ended = re.compile(rf"^{self.process.pid} .*exited with", re.M)
        eventually("strace has written", lambda: bool(ended.search(self.trace.read_text(errors="replace"))))
        lines = self.trace.read_text(errors="replace").splitlines()
        used = {match[1] for line in lines if (match := re.match(r"\d+\s+(\w+)\(", line))}
        if len(used) < 10:
            raise Failed(f"{self.unit.name}: strace has seen {sorted(used)} only")
        if used - left:
            raise Failed(f"{self.unit.name}: its SystemCallFilter refuses {sorted(used - left)}")
        if any("PROT_WRITE|PROT_EXEC" in line for line in lines):
            raise Failed(f"{self.unit.name}: MemoryDenyWriteExecute refuses what it does")
        say(f"{self.unit.name} has stopped; of {len(used)} system calls the unit refuses none")


def install(servers):
    """The page's installation below another root, as the user who types; root has what sudo installs."""
    root = servers.directory / "root"
    for directory in ("usr/bin", "etc/systemd/system"):
        (root / directory).mkdir(parents=True)
    commands = "".join(blocks("### 1. Programs, units, settings", "sh"))
    commands = commands.replace("sudo ", "").replace(" /etc/", f" {root}/etc/").replace(" /usr/bin/", f" {root}/usr/bin/").replace("target/release", programs)
    servers.type(commands)
    secrets = [file for file in (root / "etc/aftercommit").rglob("*") if file.name in ("database-url", "nats-password")]
    if len(secrets) != 7 or any(file.stat().st_mode & 0o077 for file in secrets):
        raise Failed(f"not for root alone: {secrets}")
    os.chmod(root, 0o755)


def work(servers, stack):
    prepare(servers)
    install(servers)
    servers.type("".join(blocks("### 2. Schema, rights, stream", "sh")), programs)
    left = allowed()
    processes = [Process(path, servers, stack) for path in UNITS]
    for one in processes:
        if one.serves:
            one.ready()
    see_it_work(servers, programs)
    servers.psql_as("shop_service", "select aftercommit.forget('orders', 'request 1', key => 'order-7')")
    eraser = next(one for one in processes if one.kind == "forget")
    eventually("the eraser is through", lambda: servers.psql("select count(*) from aftercommit.forget_request where ended_at is null") == "0"
               or eraser.log.read_text()[-500:])
    for one in processes:
        one.end(left)


if __name__ == "__main__":
    with_servers(work, "what the units start works, with the shipped roles and accounts, over TLS")
