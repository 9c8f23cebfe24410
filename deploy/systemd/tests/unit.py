"""A unit file as systemd reads it, as far as ours go."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[3]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


class Unit:
    """With `instance` for %i and `credentials` for %d."""

    def __init__(self, path, instance, credentials):
        self.name = path.name.replace("@.", f"@{instance}.")
        self.example = ROOT / "deploy/systemd/examples" / path.name.partition(".")[0].rstrip("@").removeprefix("aftercommit-")
        text = path.read_text().replace("%i", instance).replace("%d", str(credentials))
        self.lines = [tuple(line.split("=", 1)) for line in text.splitlines() if "=" in line]

    def all(self, key):
        return [value for name, value in self.lines if name == key]

    def one(self, key):
        [value] = self.all(key)
        return value

    def environment(self):
        return dict(value.split("=", 1) for value in self.all("Environment"))
