"""Has helm install the chart, on a stand-in of Kubernetes' API that keeps nothing and says of each job that it is done, or that it has failed.

It shows the order in which helm makes things, and that a job that fails stops it. Argument: helm.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.parse

from rendered import CHART, NAMESPACE, RELEASE

helm = sys.argv[1]
VALUES = CHART.parent / "tests/values/secured.yaml"
KINDS = {
    "v1": ["Secret", "ConfigMap", "Service"],
    "apps/v1": ["Deployment"],
    "batch/v1": ["Job"],
    "policy/v1": ["PodDisruptionBudget"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "monitoring.coreos.com/v1": ["ServiceMonitor", "PrometheusRule"],
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def plural(kind):
    return re.sub("y$", "ie", kind.lower()) + "s"


class Api(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, code=200, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def missing(self):
        self.reply({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}, 404)

    def sent(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def place(self):
        """Version, kind and name in a path of objects, or None."""
        path = urllib.parse.urlparse(self.path).path
        match = re.fullmatch(r"/(?:api|apis)/(v1|[^/]+/[^/]+)/namespaces/[^/]+/([^/]+)(?:/([^/]+))?", path)
        kinds = {plural(kind): kind for kind in KINDS.get(match[1], [])} if match else {}
        return (match[1], kinds[match[2]], match[3]) if match and match[2] in kinds else None

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        version = re.sub("^/apis?/", "", url.path)
        if url.path == "/version":
            self.reply({"major": "1", "minor": "31", "gitVersion": "v1.31.0"})
        elif url.path == "/openapi/v2":
            # No schema: check.py has looked at those.
            self.reply(b"", kind="application/octet-stream")
        elif url.path == "/api":
            self.reply({"kind": "APIVersions", "versions": ["v1"]})
        elif url.path == "/apis":
            groups = [(one, dict(zip(("name", "version"), one.split("/")))) for one in KINDS if "/" in one]
            told = [{"name": parts["name"], "versions": [{"groupVersion": one, "version": parts["version"]}]} for one, parts in groups]
            self.reply({"kind": "APIGroupList", "apiVersion": "v1", "groups": told})
        elif version in KINDS:
            resources = [{"name": plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": VERBS} for kind in KINDS[version]]
            self.reply({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources})
        elif place := self.place():
            self.objects(place, urllib.parse.parse_qs(url.query))
        else:
            self.missing()

    def objects(self, place, query):
        version, kind, name = place
        objects = self.server.objects
        if name:
            one = objects.get((kind, name))
            self.reply(one) if one else self.missing()
            return
        found = [one for (other, _), one in objects.items() if other == kind]
        wanted = query.get("fieldSelector", [""])[0].removeprefix("metadata.name=")
        found = [one for one in found if wanted in ("", one["metadata"]["name"])]
        if "watch" not in query:
            self.reply({"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": found})
            return
        end = {"kind": kind, "apiVersion": version, "metadata": {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}}
        events = [{"type": "ADDED", "object": one} for one in found] + [{"type": "BOOKMARK", "object": end}]
        self.reply("".join(json.dumps(event) + "\n" for event in events).encode())

    def do_POST(self):
        place, sent = self.place(), self.sent()
        if place is None:
            self.missing()
        elif place[1] == "Secret":
            # The release itself, in a form of its own. The chart has no secret.
            self.reply(sent, kind=self.headers["Content-Type"])
        else:
            one = json.loads(sent)
            name = one["metadata"]["name"]
            one["metadata"].update(namespace=NAMESPACE, resourceVersion="1", uid=name)
            if place[1] == "Job":
                failed = self.server.failing is not None and self.server.failing in name
                one["status"] = {"conditions": [{"type": "Failed" if failed else "Complete", "status": "True", "reason": "Test"}]}
            self.server.objects[place[1], name] = one
            self.server.done.append(f"+ {place[1]} {name}")
            self.reply(one, 201)

    def do_PUT(self):
        self.reply(self.sent(), kind=self.headers["Content-Type"])

    def do_DELETE(self):
        place, _ = self.place(), self.sent()
        if place and self.server.objects.pop(place[1:], None):
            self.server.done.append(f"- {place[1]} {place[2]}")
            self.reply({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        else:
            self.missing()


def install(failing=None):
    """What helm made (+) and removed (-), what is there in the end, and helm's exit status."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.daemon_threads = True
    server.objects, server.done, server.failing = {}, [], failing
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as home:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        command = [helm, "--kube-apiserver", address, "--namespace", NAMESPACE, "install", RELEASE, str(CHART), "--values", str(VALUES), "--timeout", "60s"]
        done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HOME": home})
    server.shutdown()
    return server.done, set(server.objects), done


def main():
    name = f"{RELEASE}-aftercommit"
    problems = []
    acts, there, helms = install()
    if helms.returncode:
        sys.exit(f"helm install: {helms.stdout}{helms.stderr}\n{acts}")
    before = ["+ NetworkPolicy {}-jobs", "+ Job {}-migrate-shop", "+ ConfigMap {}-roles", "+ Job {}-roles-shop", "+ Job {}-provision",
              "+ ConfigMap {}-provision-receipts", "+ Job {}-provision-receipts"]
    before = [line.format(name) for line in before]
    if acts[: len(before)] != before:
        problems.append(f"helm made {acts[: len(before)]}, expected {before}")
    left = [line[2:] for line in before if tuple(line[2:].split()) in there]
    if left:
        problems.append(f"what is for the installation only is still there: {left}")
    if sum(kind == "Deployment" for kind, _ in there) != 4:
        problems.append(f"there is {sorted(there)}")

    for failing in ("migrate", "roles", "provision-receipts"):
        acts, there, helms = install(failing)
        if not helms.returncode or any(kind == "Deployment" for kind, _ in there):
            problems.append(f"the job {failing} fails, and helm goes on: {acts}")
        if not any(kind == "Job" and failing in one for kind, one in there):
            problems.append(f"the job {failing} fails, and its logs are gone: {acts}")
    if problems:
        sys.exit("\n".join(problems))
    print("helm installs in order, removes what was for the installation only, and stops at a job that fails")


if __name__ == "__main__":
    main()
