"""Starts a system that works, and Prometheus with the shipped alerts beside it: every rule is evaluated and none fires, every process is scraped, its metrics
are as promtool wants them, and every query of the dashboards has an answer, but those about what is not there."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request

import record
from servers import Failed, eventually, free_port

sys.path.insert(0, str(record.HERE.parents[1] / "grafana"))
import dashboards

# Nothing fires, nothing is found, no job runs.
WITHOUT_ANSWER = ("ALERTS{", "aftercommit_reconciler_findings", "aftercommit_jobs_overdue")


def live(directory, stack):
    system = record.System(directory, stack)
    system.traffic()
    for target in system.targets:
        metrics = lambda: urllib.request.urlopen(f"http://127.0.0.1:{target.port}/metrics").read()

        def is_well():
            with contextlib.suppress(OSError):
                return b"_epoch{" in metrics()
        eventually(f"{target.name} serves metrics", is_well)
        checked = subprocess.run(["promtool", "check", "metrics"], input=metrics(), capture_output=True)
        if checked.returncode:
            raise Failed(f"{target.name}: {checked.stdout.decode()}{checked.stderr.decode()}")
    port = free_port()
    jobs = [{"job_name": f"aftercommit-{target.name}", "static_configs": [{"targets": [f"127.0.0.1:{target.port}"]}]} for target in system.targets]
    config = directory / "prometheus.json"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(record.check.ALERTS)], "scrape_configs": jobs}))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={directory}/tsdb", f"--web.listen-address=127.0.0.1:{port}"]
    prometheus = record.Process("prometheus", command, directory, None)
    stack.callback(prometheus.stop)

    def ask(path, **parameters):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            return json.load(answer)["data"]

    def unanswered():
        with contextlib.suppress(OSError):
            found = []
            for name, title, query in dashboards.expressions():
                query = query.replace("[1m]", "[10s]").replace("[5m]", "[10s]").replace("[5m:]", "[10s:1s]")
                if not ask("query", query=query)["result"] and not any(part in query for part in WITHOUT_ANSWER):
                    found.append(f"{name}: {title}: {query}")
            return not found or "\n".join(found)
    eventually("every query has an answer", unanswered)
    rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    if wrong := [f"{rule['name']} is {rule['health']} and {rule['state']}" for rule in rules if rule["health"] != "ok" or rule["state"] == "firing"]:
        raise Failed("\n".join(wrong))
    print(f"Prometheus evaluates {len(rules)} alerts, none of which fires; {len(list(dashboards.expressions()))} queries are answered")


def main():
    directory = pathlib.Path(tempfile.mkdtemp(prefix="live-"))
    os.chmod(directory, 0o711)
    try:
        with contextlib.ExitStack() as stack:
            live(directory, stack)
    except Failed as error:
        sys.exit(str(error))
    finally:
        record.shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
