"""Reads the dashboards with Grafana's own types and writes them again: a setting that Grafana does not know is lost on the way. Takes the Python package
grafana-foundation-sdk."""

import json
import pathlib
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARDS = pathlib.Path(__file__).resolve().parents[1] / "dashboards"


def lost(before, after, where=""):
    """What is not there any more, or something else."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key in after:
                yield from lost(value, after[key], f"{where}/{key}")
            # What says nothing need not come back.
            elif value not in (None, [], {}, ""):
                yield f"{where}/{key}"
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after)):
            yield from lost(*pair, f"{where}/{index}")
    elif before != after:
        yield where


register_default_plugins()
problems = []
for path in sorted(DASHBOARDS.glob("*.json")):
    content = json.loads(path.read_text())
    again = json.loads(JSONEncoder(sort_keys=True, indent=1).encode(Dashboard.from_json(content)))
    problems += [f"{path.name}: Grafana knows no {where}" for where in lost(content, again)]
if problems:
    sys.exit("\n".join(problems))
print("Grafana's types have every setting of the dashboards")
