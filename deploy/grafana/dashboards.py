"""Writes the dashboards: `scripts/alerts --update`, or python3 deploy/grafana/dashboards.py. With --check it only says whether they are as they should be.

What is not known is shown as ? and never as 0: there is no `or vector(0)`, and NaN is mapped."""

import json
import pathlib
import sys

DASHBOARDS = pathlib.Path(__file__).resolve().parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24
NOT_KNOWN = [{"type": "special", "options": {"match": match, "result": {"text": "?", "color": "orange", "index": index}}} for index, match in enumerate(("nan", "null"))]
# Which series: of the chosen namespace, stream, subscriber.
HERE = 'namespace=~"$namespace"'
STREAM = f'{{{HERE},stream=~"$stream"}}'
SUBSCRIBER = f'{{{HERE},subscriber=~"$subscriber"}}'
ALL = f"{{{HERE}}}"


def steps(*limits):
    """Colours: green, and from each limit on the next one."""
    colours = ["yellow", "red"] if len(limits) > 1 else ["red"]
    return [{"color": "green", "value": None}, *({"color": colour, "value": limit} for colour, limit in zip(colours, limits))]


def panel(kind, title, description, unit, queries, width=8, height=7, thresholds=None, mappings=(), options=None, custom=None):
    """`queries` are pairs of expression and legend."""
    instant = kind in ("stat", "table")
    targets = [{"refId": chr(65 + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend, "instant": instant, "range": not instant,
                "format": "table" if kind == "table" else "time_series"} for index, (expr, legend) in enumerate(queries)]
    defaults = {"unit": unit, "noValue": "?", "mappings": [*mappings, *NOT_KNOWN], "custom": custom or {},
                "color": {"mode": "thresholds" if thresholds else "palette-classic"}, "thresholds": {"mode": "absolute", "steps": thresholds or steps()[:1]}}
    return {"type": kind, "title": title, "description": description, "datasource": SOURCE, "gridPos": {"w": width, "h": height},
            "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options or {}, "targets": targets}


def stat(title, description, unit, expr, legend, **more):
    options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "textMode": more.pop("text_mode", "auto"), "colorMode": "background",
               "graphMode": "none", "justifyMode": "auto", "orientation": "auto"}
    return panel("stat", title, description, unit, [(expr, legend)], width=more.pop("width", 4), height=5, options=options, **more)


def graph(title, description, unit, *queries, **more):
    options = {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}, "tooltip": {"mode": "multi", "sort": "desc"}}
    # A gap is a gap.
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 5, "spanNulls": False, "showPoints": "never"}
    return panel("timeseries", title, description, unit, queries, options=options, custom=custom, **more)


def timeline(title, description, expr, legend, mappings, **more):
    options = {"mergeValues": True, "showValue": "auto", "alignValue": "left", "rowHeight": 0.8, "tooltip": {"mode": "single", "sort": "none"},
               "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False}}
    return panel("state-timeline", title, description, "none", [(expr, legend)], mappings=mappings, options=options, custom={"fillOpacity": 80}, **more)


def values(**texts):
    """Words for numbers, such as n0="stands by"."""
    return [{"type": "value", "options": {number[1:]: {"text": text, "color": colour, "index": index}}}
            for index, (number, (text, colour)) in enumerate(texts.items())]


def quantiles(metric, selector, by):
    """Median and 99th percentile of a histogram."""
    rate = f"sum by ({by}, le) (rate({metric}_bucket{selector}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"{name} {{{{{by}}}}}") for q, name in ((0.5, "p50"), (0.99, "p99"))]


def greatest(metric, selector, by):
    """What is the same at every instance."""
    return f"max by ({by}) ({metric}{selector})"


def overview():
    return [
        "Is it working?",
        stat("Alerts", "Alerts that fire now. docs/runbook.md has a section for each. `none` is also what a Prometheus without the rules says.", "none",
             f'count(ALERTS{{alertname=~"Aftercommit.*",alertstate="firing",{HERE}}})', "", thresholds=steps(1)) | {"no_value": "none"},
        stat("Who leads", "The relay that publishes, of each stream; the others stand by. ? is nobody, or no metrics: AftercommitNoRelayLeads.", "none",
             f"aftercommit_relay_leader{ALL} == 1", "{{stream}}: {{instance}}", text_mode="name"),
        stat("Oldest waits to be published", "How long the oldest committed event has waited for its stream. Seconds are usual; it grows while nothing is published.", "s",
             greatest("aftercommit_relay_backlog_oldest_seconds", ALL, "stream"), "{{stream}}", thresholds=steps(60, 300)),
        stat("Wait for subscribers", "Events in the stream that are not done, of each subscriber: not delivered yet, or delivered.", "short",
             f"max by (subscriber) (aftercommit_worker_pending{ALL} + aftercommit_worker_in_flight{ALL})", "{{subscriber}}", thresholds=steps(100, 1000)),
        stat("Dead letters", "Events that subscribers gave up on, until somebody decides: `aftercommit dead list --group`.", "short",
             greatest("aftercommit_worker_dead_letters", ALL, "subscriber"), "{{subscriber}}", thresholds=steps(1)),
        stat("Parked", "Events that the stream will never take, and those behind them, until somebody decides: `aftercommit parked list`.", "short",
             greatest("aftercommit_relay_parked", ALL, "stream"), "{{stream}}", thresholds=steps(1)),
        "What flows",
        graph("Committed and published", "Events per second. Committed is what was published and what the backlog grew by; where it is above what is published, events wait.",
              "cps",
              (f"sum by (stream) (rate(aftercommit_relay_published_total{ALL}[5m])) + on (stream) deriv(max by (stream) (aftercommit_relay_backlog_events{ALL})[5m:])", "committed {{stream}}"),
              (f"sum by (stream) (rate(aftercommit_relay_published_total{ALL}[5m]))", "published {{stream}}"), width=12),
        graph("Handled", "Events per second that took effect, of each subscriber. It follows what is published of its types.", "cps",
              (f'sum by (subscriber) (rate(aftercommit_worker_events_total{{outcome="ok",{HERE}}}[5m]))', "{{subscriber}}"), width=12),
        graph("Waiting", "Events that wait: in the outbox for a relay, in the stream for a subscriber, and those that were delivered and are not done.", "short",
              (greatest("aftercommit_relay_backlog_events", ALL, "stream"), "outbox of {{stream}}"),
              (greatest("aftercommit_worker_pending", ALL, "subscriber"), "for {{subscriber}}"),
              (greatest("aftercommit_worker_in_flight", ALL, "subscriber"), "in flight at {{subscriber}}"), width=12),
        graph("From written to handled", "How long it takes from the write of an event until its effects are committed (p99).", "s",
              quantiles("aftercommit_worker_latency_seconds", ALL, "subscriber")[1], width=12),
        "What needs somebody",
        graph("Without progress", "For how long the relay that leads and the active workers have made no progress. Without events that wait it stays near 0.", "s",
              (f"max by (stream) (aftercommit_relay_seconds_since_progress{ALL} and aftercommit_relay_leader{ALL} == 1)", "relay of {{stream}}"),
              (f"max by (subscriber) (aftercommit_worker_seconds_since_progress{ALL} and aftercommit_worker_active{ALL} == 1)", "{{subscriber}}")),
        graph("Failing, dead, found", "Events that are tried again, dead letters, and differences that reconcilers found and nobody has put right.", "short",
              (greatest("aftercommit_worker_failing", ALL, "subscriber"), "failing {{subscriber}}"),
              (greatest("aftercommit_worker_dead_letters", ALL, "subscriber"), "dead {{subscriber}}"),
              (greatest("aftercommit_reconciler_findings", ALL, "reconciler, kind"), "found {{reconciler}} {{kind}}")),
        panel("table", "Alerts that fire", "Which, and whom they are about. No rows: none fires.", "none",
              [(f'ALERTS{{alertname=~"Aftercommit.*",alertstate="firing",{HERE}}}', "")], options={"showHeader": True}),
    ]


def relay():
    leads = values(n0=("stands by or connects", "blue"), n1=("leads", "green"))
    return [
        "Who",
        timeline("Relays", "Which relay leads the stream. None for more than seconds: AftercommitNoRelayLeads.", f"aftercommit_relay_leader{STREAM}", "{{stream}} {{instance}}", leads),
        timeline("Paused", "Whether an operator has paused the relay: `aftercommit relay resume`.", f"max by (stream) (aftercommit_relay_paused{STREAM})", "{{stream}}",
                 values(n0=("no", "green"), n1=("paused", "orange"))),
        graph("Epoch", "It grows with each change of leader. Many steps: leaders lose their lease.", "none", (greatest("aftercommit_relay_epoch", STREAM, "stream"), "{{stream}}")),
        "What waits",
        graph("Backlog", "Events that are committed and not in the stream.", "short", (greatest("aftercommit_relay_backlog_events", STREAM, "stream"), "{{stream}}")),
        graph("Oldest", "How long ago the oldest of them was written.", "s", (greatest("aftercommit_relay_backlog_oldest_seconds", STREAM, "stream"), "{{stream}}")),
        graph("Since progress", "Since each relay published something, found nothing to publish, or found another one leading.", "s",
              (f"aftercommit_relay_seconds_since_progress{STREAM}", "{{stream}} {{instance}}")),
        graph("Parked", "Events that the stream will never take, and those that wait behind them.", "short", (greatest("aftercommit_relay_parked", STREAM, "stream"), "{{stream}}")),
        graph("Interruptions", "How often publishing was interrupted, by class: docs/metrics.md says what each means.", "short",
              (f"sum by (stream, class) (increase(aftercommit_relay_interruptions_total{STREAM}[5m]))", "{{stream}} {{class}}")),
        graph("Published", "Events per second that the stream has acknowledged.", "cps",
              (f"sum by (stream) (rate(aftercommit_relay_published_total{STREAM}[$__rate_interval]))", "{{stream}}")),
        "How fast",
        graph("Acknowledgement", "From sending a message until it and all before it are acknowledged. Slow: the storage of NATS, or a replica.", "s",
              *quantiles("aftercommit_relay_ack_seconds", STREAM, "stream")),
        graph("From written to published", "From an event's creation until it is in the stream, with the rest of its transaction.", "s",
              *quantiles("aftercommit_relay_latency_seconds", STREAM, "stream")),
        graph("In flight", "Messages that are sent and not acknowledged, and how many may be.", "short",
              (greatest("aftercommit_relay_in_flight", STREAM, "stream"), "in flight {{stream}}"),
              (greatest("aftercommit_relay_in_flight_limit", STREAM, "stream"), "limit {{stream}}")),
        graph("Events per window", "Many large windows mean that the relay is behind.", "short", *quantiles("aftercommit_relay_window_events", STREAM, "stream")),
    ]


def subscriber():
    return [
        "Who",
        timeline("Workers", "Which worker is active for the subscriber. None for more than seconds: AftercommitNoWorkerActive.",
                 f"aftercommit_worker_active{SUBSCRIBER}", "{{subscriber}} {{instance}}", values(n0=("stands by or connects", "blue"), n1=("active", "green"))),
        timeline("Paused", "Whether an operator has paused the subscriber: `aftercommit worker resume`.", f"max by (subscriber) (aftercommit_worker_paused{SUBSCRIBER})",
                 "{{subscriber}}", values(n0=("no", "green"), n1=("paused", "orange"))),
        graph("Epoch", "It grows with each change of hands. Many steps: workers lose their lease, or crash.", "none",
              (greatest("aftercommit_worker_epoch", SUBSCRIBER, "subscriber"), "{{subscriber}}")),
        "What waits",
        graph("Not delivered", "Events in the stream that were not delivered to the subscriber yet.", "short",
              (greatest("aftercommit_worker_pending", SUBSCRIBER, "subscriber"), "{{subscriber}}")),
        graph("Delivered and not done", "They run, or wait for their next attempt, or behind another event of their key. Held are those that wait for a point in time.", "short",
              (greatest("aftercommit_worker_in_flight", SUBSCRIBER, "subscriber"), "in flight {{subscriber}}"),
              (f"sum by (subscriber) (aftercommit_worker_held{SUBSCRIBER})", "held {{subscriber}}")),
        graph("Since progress", "Since each worker decided about an event, found nothing to do, or found another one active.", "s",
              (f"aftercommit_worker_seconds_since_progress{SUBSCRIBER}", "{{subscriber}} {{instance}}")),
        "What fails",
        graph("Failing", "Events with failed attempts that are tried again.", "short", (greatest("aftercommit_worker_failing", SUBSCRIBER, "subscriber"), "{{subscriber}}")),
        graph("Dead letters and redrive", "Events that the subscriber gave up on, and those that an operator has sent back and that have not run since.", "short",
              (greatest("aftercommit_worker_dead_letters", SUBSCRIBER, "subscriber"), "dead {{subscriber}}"),
              (greatest("aftercommit_worker_redrive", SUBSCRIBER, "subscriber"), "redrive {{subscriber}}")),
        graph("Outcomes", "What became of events, per second. `interrupted`: a service that the handler needs is not available.", "cps",
              (f"sum by (subscriber, outcome) (rate(aftercommit_worker_events_total{SUBSCRIBER}[$__rate_interval]))", "{{subscriber}} {{outcome}}")),
        "How fast",
        graph("Handler", "How long a handler ran.", "s", *quantiles("aftercommit_worker_handler_seconds", SUBSCRIBER, "subscriber")),
        graph("From written to handled", "From an event's write until its effects were committed.", "s", *quantiles("aftercommit_worker_latency_seconds", SUBSCRIBER, "subscriber")),
        graph("Events per transaction", "How many events were committed together.", "short", *quantiles("aftercommit_worker_batch_events", SUBSCRIBER, "subscriber")),
        graph("Delivered again", "Messages per second that JetStream did not deliver for the first time.", "cps",
              (f"sum by (subscriber) (rate(aftercommit_worker_redelivered_total{SUBSCRIBER}[$__rate_interval]))", "{{subscriber}}")),
    ]


def database():
    return [
        "What is kept open and removed",
        graph("Oldest transaction", "The longest open transaction of the outbox's database. vacuum waits for it; the relay does not.", "s",
              (greatest("aftercommit_relay_oldest_transaction_seconds", ALL, "stream"), "{{stream}}")),
        graph("Removed rows", "Old rows per second that sweeps removed, by category.", "cps",
              (f"sum by (category) (rate(aftercommit_pruned_rows_total{ALL}[$__rate_interval]))", "{{category}}")),
        graph("Sweeps", "How sweeps ended. `failed` again and again: AftercommitSweepsFail.", "short",
              (f"sum by (category, result) (increase(aftercommit_sweeps_total{ALL}[5m]))", "{{category}} {{result}}")),
        "Reconcilers",
        graph("Last success", "How long ago a reconciler last succeeded, and how often it is to run.", "s",
              (greatest("aftercommit_reconciler_last_success_seconds", ALL, "reconciler"), "{{reconciler}}"),
              (greatest("aftercommit_reconciler_interval_seconds", ALL, "reconciler"), "interval {{reconciler}}")),
        graph("Accounted for", "How far back lies the time up to which everything is accounted for.", "s",
              (f"time() - max by (reconciler) (aftercommit_reconciler_up_to_timestamp_seconds{ALL})", "{{reconciler}}")),
        graph("Runs", "How runs ended.", "short", (f"sum by (reconciler, result) (increase(aftercommit_reconciler_runs_total{ALL}[5m]))", "{{reconciler}} {{result}}")),
        graph("Failures in a row", "3 and more: AftercommitReconcilerFails.", "short", (greatest("aftercommit_reconciler_failures", ALL, "reconciler"), "{{reconciler}}")),
        graph("Findings", "What they found and what is not settled, by kind.", "short",
              (greatest("aftercommit_reconciler_findings", ALL, "reconciler, kind"), "{{reconciler}} {{kind}}")),
        graph("Found and repaired", "Differences that were found and that were repaired, and items that could not be reconciled.", "short",
              (f"sum by (reconciler) (increase(aftercommit_reconciler_drift_total{ALL}[5m]))", "found {{reconciler}}"),
              (f"sum by (reconciler) (increase(aftercommit_reconciler_repaired_total{ALL}[5m]))", "repaired {{reconciler}}"),
              (f"sum by (reconciler) (increase(aftercommit_reconciler_failed_items_total{ALL}[5m]))", "failed {{reconciler}}")),
        "Jobs",
        graph("Overdue jobs", "Jobs that are past the time they were due: `aftercommit job list --overdue`.", "short",
              (greatest("aftercommit_jobs_overdue", ALL, "kind"), "{{kind}}")),
        "Telemetry",
        graph("Lost telemetry", "What could not be given to the collector of OpenTelemetry, by signal. Events are not touched by it.", "short",
              (f"sum by (signal) (increase(aftercommit_telemetry_lost_total{ALL}[5m]))", "{{signal}}")),
    ]


def choice(name, label, query, multi=True):
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name}, "refresh": 2,
            "includeAll": True, "multi": multi, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}, "options": [], "sort": 1, "hide": 0,
            "regex": "", "skipUrlSync": False}


SOURCES = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1, "includeAll": False, "multi": False,
           "current": {}, "options": [], "hide": 0, "regex": "", "skipUrlSync": False}
# Without Kubernetes there is no such label, and `All` finds what has none.
NAMESPACE = choice("namespace", "Namespace", "label_values({__name__=~\"aftercommit_relay_leader|aftercommit_worker_active\"}, namespace)")


def placed(parts):
    """Side by side as long as they fit, with a row for each heading."""
    panels, x, y, tallest = [], 0, 0, 0
    for number, part in enumerate(parts, 1):
        if isinstance(part, str):
            x, y, tallest = 0, y + tallest, 0
            panels.append({"id": number, "type": "row", "title": part, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}, "panels": []})
            y += 1
            continue
        no_value = part.pop("no_value", None)
        if no_value:
            part["fieldConfig"]["defaults"]["noValue"] = no_value
        size = part["gridPos"]
        if x + size["w"] > WIDTH:
            x, y, tallest = 0, y + tallest, 0
        panels.append({"id": number} | part | {"gridPos": {"x": x, "y": y} | size})
        x, tallest = x + size["w"], max(tallest, size["h"])
    return panels


def dashboard(name, title, description, parts, *variables):
    links = [{"type": "dashboards", "tags": ["aftercommit"], "title": "aftercommit", "asDropdown": True, "includeVars": True, "keepTime": True, "targetBlank": False,
              "icon": "external link", "tooltip": "", "url": ""}]
    return {"uid": f"aftercommit-{name}", "title": f"aftercommit: {title}", "description": description, "tags": ["aftercommit"], "schemaVersion": 39, "version": 1,
            "editable": False, "graphTooltip": 1, "refresh": "30s", "time": {"from": "now-3h", "to": "now"}, "timezone": "browser", "links": links,
            "annotations": {"list": []}, "templating": {"list": [SOURCES, NAMESPACE, *variables]}, "panels": placed(parts)}


DASHBOARDS_OF = {
    "overview": dashboard("overview", "overview", "Is it working, and if not, where? docs/runbook.md has what to do.", overview()),
    "relay": dashboard("relay", "relay", "From the outbox to the stream.", relay(), choice("stream", "Stream", "label_values(aftercommit_relay_leader, stream)")),
    "subscriber": dashboard("subscriber", "subscriber", "From the stream to the handlers.", subscriber(),
                            choice("subscriber", "Subscriber", "label_values(aftercommit_worker_active, subscriber)")),
    "database": dashboard("database", "database and upkeep",
                          "What aftercommit sees of the databases and does to keep them in order. What PostgreSQL itself does is shown by postgres_exporter's dashboards.", database()),
}


def problems():
    found = []
    for name, content in DASHBOARDS_OF.items():
        path = DASHBOARDS / f"{name}.json"
        if not path.is_file() or json.loads(path.read_text()) != content:
            found.append(f"{path.name} is not what dashboards.py writes: scripts/alerts --update")
    return found


def write():
    for name, content in DASHBOARDS_OF.items():
        (DASHBOARDS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def expressions():
    """All queries, with what Grafana puts in place of its variables."""
    for name, content in DASHBOARDS_OF.items():
        for one in content["panels"]:
            for target in one.get("targets", []):
                text = target["expr"].replace("$__rate_interval", "1m")
                for variable in ("namespace", "stream", "subscriber"):
                    text = text.replace(f"${variable}", ".*")
                yield name, one["title"], text


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(problems()) or 0)
    write()
