"""Checks the units against the programs. Arguments: the directory of the programs, or nothing.

Problems go to standard error. What systemd says of the units, scripts/units asks systemd.
"""

import pathlib
import re
import subprocess
import sys

import unit
from unit import ROOT, UNITS


def hardening(path):
    """The lines between LimitCORE and [Install]: the same in all units."""
    return path.read_text().partition("LimitCORE=0\n")[2].partition("[Install]")[0]


def problems(programs):
    if len({hardening(path) for path in UNITS}) != 1:
        yield "the units differ in what confines them"
    deadline = int(re.search(r"STOP_DEADLINE: Duration = Duration::from_secs\((\d+)\)", (ROOT / "src/cli/mod.rs").read_text()).group(1))
    for path in UNITS:
        service = unit.Unit(path, "receipts", "/credentials")
        if int(service.one("TimeoutStopSec").rstrip("s")) <= deadline:
            yield f"{path.name}: is killed before it has stopped"
        handed = {line.partition(":")[0] for line in service.all("LoadCredential")}
        named = set(re.findall(r"/credentials/([\w.-]+)", " ".join([service.one("ExecStart"), *service.all("Environment")])))
        if handed != named:
            yield f"{path.name}: loads {sorted(handed)}, uses {sorted(named)}"
        example = (service.example / "env").read_text()
        if re.search(r"^#?(DATABASE_URL|NATS_PASSWORD|NATS_TOKEN|PGPASSWORD)=", example, re.M):
            yield f"{path.name}: its example names a secret in the environment file"
        if not programs:
            continue
        words = service.one("ExecStart").split()
        command = [word for word in words if not word.startswith(("-", "/credentials", "10s"))]
        help = subprocess.run([f"{programs}/{pathlib.Path(command[0]).name}", *command[1:], "--help"], capture_output=True, text=True, check=True).stdout
        flags = set(re.findall(r"--[a-z][-a-z]*", help))
        for word in words:
            if word.startswith("--") and word not in flags:
                yield f"{path.name}: {' '.join(command)} has no flag {word}"
        for variable in set(re.findall(r"^#?([A-Z_]+)=", example, re.M)) | set(service.environment()):
            documented = variable.startswith("PG") and f"`{variable}`" in (ROOT / "docs/connections.md").read_text()
            if f"[env: {variable}" not in help and not documented:
                yield f"{path.name}: {' '.join(command)} does not read {variable}"


if __name__ == "__main__":
    found = list(problems(sys.argv[1] if len(sys.argv) > 1 else ""))
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    sys.exit(bool(found))
