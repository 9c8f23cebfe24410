"""For each alert: series on which it fires, from which moment on, with which summary; and series just below its limit, on which it does not."""

import json
import pathlib
import re
import tempfile

import yaml

ALERTS = pathlib.Path(__file__).resolve().parent.parent / "alerts.yml"
STEP = 15


def alerts():
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules}


class Fires:
    """`since` is the minute from which on the condition holds; the alert fires when it has held for as long as its rule says."""

    def __init__(self, alert, series, labels, summary, since=0):
        self.alert, self.series, self.labels, self.summary, self.since = alert, series, labels, summary, since


class Quiet:
    """The alert does not fire until minute `at`."""

    def __init__(self, alert, series, at=60, why=""):
        self.alert, self.series, self.at, self.why = alert, series, at, why


STREAM, RECEIPTS = {"stream": "EVENTS"}, {"subscriber": "receipts"}
HOURS = 2 * 60 * 4


def relay(metric, values, instance="a", more=""):
    return {f'aftercommit_relay_{metric}{{stream="EVENTS",instance="{instance}",job="aftercommit-relay"{more}}}': values}


def worker(metric, values, instance="a", more=""):
    return {f'aftercommit_worker_{metric}{{subscriber="receipts",instance="{instance}",job="aftercommit-worker"{more}}}': values}


def reconciler(metric, values, more=""):
    return {f'aftercommit_reconciler_{metric}{{reconciler="outbox",instance="a",job="aftercommit-relay"{more}}}': values}


def always(value, steps=HOURS):
    return f"{value}+0x{steps}"


def unknown(steps=HOURS):
    return " ".join(["NaN"] * steps)


def histogram(kind, buckets, labels="stream"):
    """A fifth of an event in each step, for each bound at or above `buckets`' own."""
    make = relay if kind.startswith("ack") else worker
    series = {}
    for bound, share in buckets.items():
        series |= make(f"{kind}_bucket", f"0+{share}x{HOURS}", more=f',le="{bound}"')
    return series


HEALTHY_RELAY = relay("leader", always(1)) | relay("seconds_since_progress", always(1)) | relay("backlog_events", always(0)) | relay("paused", always(0))
HEALTHY_WORKER = (worker("active", always(1)) | worker("seconds_since_progress", always(1)) | worker("pending", always(0))
                  | worker("in_flight", always(0)) | worker("paused", always(0)))

CASES = [
    Fires("AftercommitNothingScraped", {"up": always(0)}, {}, "Prometheus gets no metrics of aftercommit"),
    Quiet("AftercommitNothingScraped", worker("active", always(0)), why="a Prometheus that watches subscribers only"),
    Quiet("AftercommitNothingScraped", relay("leader", "_x19 0+0x240"), at=60, why="it has just been started"),

    Fires("AftercommitProcessDown", {'up{job="aftercommit-relay",instance="a"}': always(0)}, {"job": "aftercommit-relay", "instance": "a"},
          "A process of aftercommit is not reached at a"),
    Quiet("AftercommitProcessDown", {'up{job="aftercommit-relay",instance="a"}': "1+0x20 0+0x18 1+0x200"}, why="a restart"),
    Quiet("AftercommitProcessDown", {'up{job="node",instance="a"}': always(0)}, why="somebody else's process"),

    Fires("AftercommitNoRelayLeads", relay("leader", "1+0x39 0+0x40") | relay("leader", always(0, 80), "b"), STREAM,
          "No relay publishes the outbox of stream EVENTS", since=10),
    Fires("AftercommitNoRelayLeads", relay("leader", "1+0x39 stale") | {'aftercommit_relay_leader{stream="OTHER",instance="b"}': always(1)}, STREAM,
          "No relay publishes the outbox of stream EVENTS", since=10),
    Fires("AftercommitNoRelayLeads", relay("leader", "1+0x39 0+0x40", more=',namespace="live"') | relay("leader", always(1), more=',namespace="test"'),
          STREAM | {"namespace": "live"}, "No relay publishes the outbox of stream EVENTS", since=10),
    Quiet("AftercommitNoRelayLeads", relay("leader", "1+0x40 0 0 0 1+0x200"), why="a take-over takes less than a minute"),
    Quiet("AftercommitNoRelayLeads", relay("leader", "1+0x40 stale") | relay("leader", "0+0x41 1+0x200", "b"), why="another one has taken over"),
    Quiet("AftercommitNoRelayLeads", worker("active", always(1)), why="a Prometheus that watches subscribers only"),

    Fires("AftercommitTwoRelaysLead", relay("leader", always(1)) | relay("leader", always(1), "b"), STREAM, "Several relays claim to lead stream EVENTS"),
    Quiet("AftercommitTwoRelaysLead", relay("leader", always(1)) | relay("leader", "0+0x30 1+0x6 0+0x200", "b"), why="a process was halted for a minute"),
    Quiet("AftercommitTwoRelaysLead", relay("leader", always(1), more=',namespace="live"') | relay("leader", always(1), more=',namespace="test"'),
          why="two systems"),

    Fires("AftercommitRelayWithoutStandby", HEALTHY_RELAY, STREAM, "No second relay stands by for stream EVENTS"),
    Fires("AftercommitRelayWithoutStandby", HEALTHY_RELAY | relay("leader", always(0), "b") | relay("seconds_since_progress", "1+15x400", "b"), STREAM,
          "No second relay stands by for stream EVENTS", since=5),
    Quiet("AftercommitRelayWithoutStandby", HEALTHY_RELAY | relay("leader", always(0), "b") | relay("seconds_since_progress", "1+0x40 stale _x58 1+0x200", "b"),
          why="a standby that is restarted within a quarter of an hour"),
    Quiet("AftercommitRelayWithoutStandby", relay("leader", always(1)) | relay("seconds_since_progress", "1+15x400") | relay("leader", always(0), "b")
          | relay("seconds_since_progress", always(2), "b"), why="a leader that waits for NATS is another matter"),

    Fires("AftercommitRelayStalled", HEALTHY_RELAY | relay("backlog_events", always(5)) | relay("seconds_since_progress", "0+15x100"), STREAM,
          "The relay of stream EVENTS has made no progress for 2m 15s", since=1.25),
    Fires("AftercommitRelayStalled", HEALTHY_RELAY | relay("backlog_events", unknown()) | relay("seconds_since_progress", always(61)), STREAM,
          "The relay of stream EVENTS has made no progress for 1m 1s"),
    Quiet("AftercommitRelayStalled", HEALTHY_RELAY | relay("backlog_events", always(5)) | relay("seconds_since_progress", always(60))),
    Quiet("AftercommitRelayStalled", HEALTHY_RELAY | relay("seconds_since_progress", always(100)), why="nothing waits"),
    Quiet("AftercommitRelayStalled", HEALTHY_RELAY | relay("backlog_events", always(5)) | relay("paused", always(1)) | relay("seconds_since_progress", always(99)),
          why="it is paused"),
    Quiet("AftercommitRelayStalled", HEALTHY_RELAY | relay("backlog_events", always(5)) | relay("leader", always(0), "b")
          | relay("seconds_since_progress", always(999), "b"), why="a standby that has lost its way"),

    Fires("AftercommitBacklogOld", relay("backlog_oldest_seconds", always(5400)), STREAM, "Events for stream EVENTS have waited for 1h 30m 0s"),
    Quiet("AftercommitBacklogOld", relay("backlog_oldest_seconds", always(300))),
    Quiet("AftercommitBacklogOld", relay("backlog_oldest_seconds", unknown())),

    Quiet("AftercommitBacklogOld", relay("backlog_oldest_seconds", "0+0x10 400+0x6 0+0x200"), why="it drains"),

    Fires("AftercommitBacklogUnknown", relay("backlog_events", unknown()), STREAM | {"instance": "a", "job": "aftercommit-relay"},
          "A relay of stream EVENTS cannot read the backlog of the outbox"),
    Quiet("AftercommitBacklogUnknown", relay("backlog_events", " ".join(["NaN"] * 19) + " 0+0x240"), why="a start or a short outage"),

    Fires("AftercommitParkedEvents", relay("parked", always(3)), STREAM, "Events for stream EVENTS are parked: 3"),
    Fires("AftercommitParkedEvents", relay("parked", always(1234567)), STREAM, "Events for stream EVENTS are parked: 1234567"),
    Quiet("AftercommitParkedEvents", relay("parked", always(0)) | relay("parked", unknown(), "b")),

    Fires("AftercommitRelayInterrupted", relay("interruptions_total", "0+0x20 1+0x400", more=',class="alarm"'), STREAM | {"class": "alarm"},
          "Stream EVENTS does not take events as it should: alarm", since=5.25),
    Fires("AftercommitRelayInterrupted", relay("interruptions_total", "0+0x20 1+1x100", more=',class="back_pressure"'), STREAM | {"class": "back_pressure"},
          "Stream EVENTS does not take events as it should: back_pressure", since=5.25),
    Fires("AftercommitRelayInterrupted", relay("interruptions_total", "0+1x100", more=',class="fenced"'), STREAM | {"class": "fenced"},
          "Stream EVENTS does not take events as it should: fenced", since=1.5),
    Quiet("AftercommitRelayInterrupted", relay("interruptions_total", "0+0x20 2+0x20 4+0x400", more=',class="fenced"'), why="two changes of leader"),
    Quiet("AftercommitRelayInterrupted", relay("interruptions_total", "7+0x40 0+0x400", more=',class="alarm"'), why="the counter begins anew"),
    Quiet("AftercommitRelayInterrupted", relay("interruptions_total", "0+1x400", more=',class="unknown"'), why="outages heal by themselves"),

    Fires("AftercommitRelayFlapping", relay("epoch", "10+0x80 11+1x5 16+0x100"), STREAM,
          "The lead of stream EVENTS has changed hands 6 times in a quarter of an hour", since=21.5),
    Quiet("AftercommitRelayFlapping", relay("epoch", "10+0x80 11+1x4 15+0x100")),
    Quiet("AftercommitRelayFlapping", relay("epoch", "98+0x40 0 0 99+0x200") | relay("epoch", always(3), "b"), why="a leader that has just started"),
    Quiet("AftercommitRelayFlapping", relay("epoch", "98+0x40 0+0x3 99+0x200") | relay("epoch", "97+0x36 0+0x10 98+0x200", "b"), why="a rolling restart"),

    Fires("AftercommitSlowAcknowledgements", histogram("ack_seconds", {"1.0": 98, "2.5": 100, "+Inf": 100}), STREAM,
          "Stream EVENTS needs 1.75s to acknowledge (p99)", since=0.25),
    Quiet("AftercommitSlowAcknowledgements", histogram("ack_seconds", {"0.5": 99, "1.0": 100, "+Inf": 100})),
    Quiet("AftercommitSlowAcknowledgements", histogram("ack_seconds", {"1.0": 0, "2.5": 0, "+Inf": 0}), why="nothing is published"),

    Fires("AftercommitLongTransaction", relay("oldest_transaction_seconds", always(1801)), STREAM,
          "A transaction has been open for 30m 1s in the database of the outbox of stream EVENTS"),
    Quiet("AftercommitLongTransaction", relay("oldest_transaction_seconds", always(1800))),
    Quiet("AftercommitLongTransaction", relay("oldest_transaction_seconds", "1801+0x18 0+0x200")),

    Fires("AftercommitNoWorkerActive", worker("active", "1+0x39 0+0x40"), RECEIPTS, "No worker is active for subscriber receipts", since=10),
    Fires("AftercommitNoWorkerActive", worker("active", "1+0x39 stale") | {'aftercommit_worker_active{subscriber="other",instance="b"}': always(1)}, RECEIPTS,
          "No worker is active for subscriber receipts", since=10),
    Quiet("AftercommitNoWorkerActive", worker("active", "1+0x40 0 0 0 1+0x200"), why="a take-over takes less than a minute"),
    Quiet("AftercommitNoWorkerActive", worker("active", "1+0x39 stale _x60") | worker("active", "_x40 1+0x200", "pod-2"), why="a pod has a new name"),
    Quiet("AftercommitNoWorkerActive", relay("leader", always(1)), why="a Prometheus that watches publishers only"),

    Fires("AftercommitSubscriberWithoutStandby", HEALTHY_WORKER, RECEIPTS, "No second worker stands by for subscriber receipts"),
    Quiet("AftercommitSubscriberWithoutStandby", HEALTHY_WORKER | worker("active", always(0), "b") | worker("seconds_since_progress", always(299), "b")),

    Fires("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", "0+15x100") | worker("pending", always(3)), RECEIPTS,
          "Subscriber receipts has made no progress for 3m 15s although events wait", since=2.25),
    Fires("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", always(121)) | worker("in_flight", always(1)), RECEIPTS,
          "Subscriber receipts has made no progress for 2m 1s although events wait"),
    Fires("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", always(121)) | worker("pending", unknown()), RECEIPTS,
          "Subscriber receipts has made no progress for 2m 1s although events wait"),
    Quiet("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", always(120)) | worker("pending", always(3))),
    Quiet("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", always(500)), why="nothing waits"),
    Quiet("AftercommitSubscriberStalled", HEALTHY_WORKER | worker("seconds_since_progress", always(500)) | worker("pending", always(3)) | worker("paused", always(1)),
          why="it is paused"),

    Fires("AftercommitServiceUnavailable", worker("events_total", "0 0+1x400", more=',outcome="interrupted"'), RECEIPTS,
          "A service that handlers of subscriber receipts need is not available, again and again", since=0.5),
    Quiet("AftercommitServiceUnavailable", worker("events_total", "0+0x20 0+1x16 16+0x400", more=',outcome="interrupted"'), why="an outage of four minutes"),

    Fires("AftercommitSubscriberBehind", HEALTHY_WORKER | worker("pending", always(1234567)), RECEIPTS, "Subscriber receipts is 1.235M events behind"),
    Fires("AftercommitSubscriberBehind", HEALTHY_WORKER | worker("pending", always(500)) | worker("in_flight", always(501)), RECEIPTS,
          "Subscriber receipts is 1.001k events behind"),
    Quiet("AftercommitSubscriberBehind", HEALTHY_WORKER | worker("pending", always(1000))),
    Quiet("AftercommitSubscriberBehind", HEALTHY_WORKER | worker("pending", "5000+0x56 0+0x200"), why="it catches up"),

    Fires("AftercommitSubscriberLate", histogram("latency_seconds", {"300.0": 40, "600.0": 100, "+Inf": 100}), RECEIPTS,
          "Half of the events of subscriber receipts take effect more than 5m 50s late", since=0.25),
    Quiet("AftercommitSubscriberLate", histogram("latency_seconds", {"60.0": 10, "300.0": 51, "600.0": 100, "+Inf": 100})),
    Quiet("AftercommitSubscriberLate", histogram("latency_seconds", {"300.0": 0, "600.0": 0, "+Inf": 0}), why="there are no events"),

    Fires("AftercommitSubscriberFlapping", worker("epoch", "10+0x80 11+1x5 16+0x100"), RECEIPTS,
          "Subscriber receipts has changed hands 6 times in a quarter of an hour", since=21.5),
    Quiet("AftercommitSubscriberFlapping", worker("epoch", "10+0x80 11+1x4 15+0x100")),

    Fires("AftercommitSubscriberPaused", worker("paused", always(1)), RECEIPTS, "Subscriber receipts has been paused for an hour"),
    Quiet("AftercommitSubscriberPaused", worker("paused", "1+0x238 0+0x100"), at=90),

    Fires("AftercommitDeadLetters", worker("dead_letters", always(2)) | worker("dead_letters", always(2), "b"), RECEIPTS,
          "Subscriber receipts has given up on events: 2"),
    Quiet("AftercommitDeadLetters", worker("dead_letters", always(0)) | worker("dead_letters", unknown(), "b")),

    Fires("AftercommitEventsFailing", worker("failing", always(4)), RECEIPTS, "Subscriber receipts fails on events again and again: 4"),
    Quiet("AftercommitEventsFailing", worker("failing", "4+0x58 0+0x200"), why="the next attempt has succeeded"),

    Fires("AftercommitSubscriberTablesUnknown", worker("dead_letters", unknown()), RECEIPTS | {"instance": "a", "job": "aftercommit-worker"},
          "A worker cannot read the tables of subscriber receipts"),
    Quiet("AftercommitSubscriberTablesUnknown", worker("dead_letters", " ".join(["NaN"] * 19) + " 0+0x240"), why="a start or a short outage"),

    Fires("AftercommitReconcilerFails", reconciler("failures", always(3)), {"reconciler": "outbox"}, "Reconciler outbox failed 3 times in a row"),
    Quiet("AftercommitReconcilerFails", reconciler("failures", always(2))),
    Quiet("AftercommitReconcilerFails", reconciler("failures", "3+0x18 0+0x200")),

    Fires("AftercommitReconcilerOverdue", reconciler("last_success_seconds", always(631)) | reconciler("interval_seconds", always(300)), {"reconciler": "outbox"},
          "Reconciler outbox has not succeeded when it was due"),
    Fires("AftercommitReconcilerOverdue", reconciler("last_success_seconds", unknown()) | reconciler("interval_seconds", always(300)), {"reconciler": "outbox"},
          "Reconciler outbox has not succeeded when it was due"),
    Quiet("AftercommitReconcilerOverdue", reconciler("last_success_seconds", always(630)) | reconciler("interval_seconds", always(300))),
    Quiet("AftercommitReconcilerOverdue", reconciler("last_success_seconds", " ".join(["NaN"] * 39) + " 0+0x240") | reconciler("interval_seconds", always(300)),
          why="the first run takes a while"),

    Fires("AftercommitFindings", reconciler("findings", always(2), ',kind="missing_from_stream"'), {"reconciler": "outbox", "kind": "missing_from_stream"},
          "Reconciler outbox found missing_from_stream, and it is not put right: 2"),
    Quiet("AftercommitFindings", reconciler("findings", "2+0x118 0+0x200", ',kind="missing_from_stream"'), why="it is repaired"),

    Fires("AftercommitSweepsFail", {'aftercommit_sweeps_total{category="inbox",result="failed",instance="a"}': "0+1x400"}, {"category": "inbox"},
          "Old rows of inbox are not removed, because sweeps fail", since=0.75),
    Quiet("AftercommitSweepsFail", {'aftercommit_sweeps_total{category="inbox",result="failed",instance="a"}': "0+0x20 1+0x20 2+0x400"}),
    Quiet("AftercommitSweepsFail", {'aftercommit_sweeps_total{category="inbox",result="done",instance="a"}': "0+1x400"}),

    Fires("AftercommitJobsOverdue", {'aftercommit_jobs_overdue{kind="erasure",instance="a"}': always(2)}, {"kind": "erasure"},
          "Jobs are past the time they were due, of kind erasure: 2"),
    Quiet("AftercommitJobsOverdue", {'aftercommit_jobs_overdue{kind="erasure",instance="a"}': "2+0x18 0+0x200"}, why="the participant has answered"),
]


def seconds(duration):
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([hms])", duration or "0s"))


def rendered(text, labels):
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels.get(found[1], ""), text)


def expected(case, rule):
    annotations = {name: rendered(text, case.labels) for name, text in rule["annotations"].items()}
    return {"exp_labels": rule["labels"] | case.labels, "exp_annotations": annotations | {"summary": case.summary}}


def tests(case, rule):
    begin = {"alertname": case.alert, "exp_alerts": []}
    if isinstance(case, Quiet):
        checks = [begin | {"eval_time": f"{second}s"} for second in range(0, case.at * 60 + 1, STEP)]
    else:
        at = round(case.since * 60) + seconds(rule.get("for"))
        checks = [begin | {"eval_time": f"{at - STEP}s"}] if at else []
        checks.append(begin | {"eval_time": f"{at}s", "exp_alerts": [expected(case, rule)]})
    return {"interval": f"{STEP}s", "input_series": [{"series": name, "values": values} for name, values in case.series.items()], "alert_rule_test": checks}


def problems():
    """A file for each alert, with its rule alone: that takes a tenth of the time."""
    from check import promtool
    found = []
    for name, rule in alerts().items():
        cases = [case for case in CASES if case.alert == name]
        if {type(case) for case in cases} != {Fires, Quiet}:
            found.append(f"{name}: nothing shows when it fires, or when it does not")
        with tempfile.TemporaryDirectory() as directory:
            # JSON is YAML.
            rules, file = pathlib.Path(directory, "rules.yml"), pathlib.Path(directory, "tests.yml")
            rules.write_text(json.dumps({"groups": [{"name": "one", "rules": [rule]}]}))
            file.write_text(json.dumps({"rule_files": [str(rules)], "evaluation_interval": f"{STEP}s", "tests": [tests(case, rule) for case in cases]}))
            ok, said = promtool("test", "rules", str(file))
        if not ok:
            found.append(f"{name}: {said}")
    return found
