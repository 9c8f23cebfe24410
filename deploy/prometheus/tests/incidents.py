"""Incidents on a private system of servers, relays and workers, and the alerts that each of them is to fire: no others."""

import json

ALL = ("receipts", "webhook", "labels", "erasures")
MINUTE = 4  # steps


def no_more_nats(system):
    """NATS is stopped for six minutes while events are published."""
    system.traffic()
    system.steps(2 * MINUTE)
    system.note("NATS is stopped")
    system.nats.stop()
    system.steps(6 * MINUTE)
    system.note("NATS is started")
    system.nats.start()
    system.steps(4 * MINUTE)
    # Reconcilers run every 20 seconds here, so they have failed three times long before.
    return {("AftercommitRelayStalled", "EVENTS"), *(("AftercommitSubscriberStalled", name) for name in ALL),
            *(("AftercommitReconcilerFails", f"{kind}:{name}") for kind in ("consumer", "inbox") for name in ALL), ("AftercommitReconcilerFails", "outbox")}


def no_more_database(system):
    """PostgreSQL is stopped for eight minutes."""
    system.traffic()
    system.steps(2 * MINUTE)
    system.note("PostgreSQL is stopped")
    system.postgres.stop()
    system.steps(8 * MINUTE)
    system.note("PostgreSQL is started")
    system.postgres.start()
    system.steps(4 * MINUTE)
    return {("AftercommitNoRelayLeads", "EVENTS"), ("AftercommitBacklogUnknown", "EVENTS"),
            # Their workers hold on to what they have; nothing waits for them.
            *(("AftercommitSubscriberTablesUnknown", name) for name in ALL)}


def processes_end(system):
    """An idle hour, a rolling restart and the death of a leader wake nobody; the death of all relays does."""
    system.steps(2 * MINUTE)
    system.note("nothing happens for an hour")
    system.hold(60 * MINUTE)
    system.traffic()
    system.steps(MINUTE)
    for process in system.processes():
        system.note(f"{process.name} is restarted")
        process.stop()
        process.start()
        system.steps(2)
    system.steps(MINUTE)
    for process in system.processes():
        system.note(f"{process.name} is killed, and started a minute later")
        process.kill()
        system.steps(MINUTE)
        process.start()
        system.steps(2)
    system.steps(2 * MINUTE)
    system.note("all relays are killed")
    for process in system.relays:
        process.kill()
    system.steps(6 * MINUTE)
    system.note("they are started")
    for process in system.relays:
        process.start()
    system.steps(4 * MINUTE)
    # Inboxes are compared with what relays say of the outbox.
    return {("AftercommitNoRelayLeads", "EVENTS"), ("AftercommitProcessDown", "relay-1"), ("AftercommitProcessDown", "relay-2"),
            *(("AftercommitReconcilerFails", f"inbox:{name}") for name in ALL)}


def handlers_fail(system):
    """An event that nobody can handle, a handler that fails, an endpoint that is away, a handler that is slow."""
    system.traffic()
    system.steps(MINUTE)
    system.note("an event fails until it is a dead letter")
    system.publish("order.label", {"poison": True}, "poison")
    system.steps(3 * MINUTE)
    system.note("the letter is discarded")
    system.operator("dead", "discard", "--all", "--yes")
    system.steps(2 * MINUTE)
    system.note("a handler fails for half an hour")
    system.psql("update control set fails = true")
    system.steps(MINUTE)
    system.quiet()
    system.steps(2 * MINUTE)
    system.hold(30 * MINUTE)
    system.note("its cause is mended")
    system.psql("update control set fails = false")
    system.steps(3 * MINUTE)
    system.note("an endpoint answers 503 to the only event that there is, for forty minutes")
    system.endpoint.status = 503
    system.publish("order.placed", {}, "one")
    system.steps(5 * MINUTE)
    system.hold(40 * MINUTE, of=4 * MINUTE)
    system.note("it answers again")
    system.endpoint.status = 204
    # As long as increase() looks back.
    system.steps(3 * MINUTE)
    system.hold(14 * MINUTE)
    system.note("a handler is slow, and many events come")
    system.psql("update control set sleeps = 0.5")
    system.psql("select count(aftercommit.publish('order.placed', '{}', key => 'one')) from generate_series(1, 1500)")
    system.steps(2 * MINUTE)
    system.hold(20 * MINUTE)
    system.psql("update control set sleeps = 0")
    system.note("it is fast again")
    system.steps(4 * MINUTE)
    return {("AftercommitDeadLetters", "labels"), ("AftercommitEventsFailing", "receipts"), ("AftercommitSubscriberStalled", "webhook"),
            ("AftercommitServiceUnavailable", "webhook"), ("AftercommitSubscriberBehind", "receipts")}


def somebody_has_to_decide(system):
    """What waits for an operator: a pause, a parked event, a subscriber without a worker, a finding, a job that is overdue."""
    config = "[[subscriber]]\nname = 'ledger'\ntypes = ['*']\nsql.function = 'nothing'\n"
    ledgers = [system.worker(f"ledger-{n}", config) for n in (1, 2)]
    system.traffic()
    system.steps(2 * MINUTE)
    system.note("the relay is paused for eight minutes")
    system.operator("relay", "pause", "--reason", "a drill")
    system.steps(8 * MINUTE)
    system.note("it goes on")
    system.operator("relay", "resume")
    system.steps(2 * MINUTE)
    system.note("an event is too large for the stream")
    system.stream("max_msg_size", 4096)
    system.publish("order.large", {"text": "x" * 5000}, "large")
    system.steps(2 * MINUTE)
    system.note("it is released, after the limit is raised")
    system.stream("max_msg_size", -1)
    system.operator("parked", "release", "--all", "--yes")
    system.steps(2 * MINUTE)
    system.note("all workers of the subscriber ledger stop, and their targets are taken from Prometheus")
    for ledger in ledgers:
        ledger.stop()
        system.targets.remove(ledger)
    system.steps(3 * MINUTE)
    system.note("they are there again")
    for ledger in ledgers:
        system.targets.append(ledger)
        ledger.start()
    system.steps(2 * MINUTE)
    system.note("a message is gone from the stream, and nothing repairs; a job gets no answer; receipts is paused; for 75 minutes")
    system.quiet()
    system.steps(2)
    system.delete_message()
    # Only a full comparison looks so far back. It fails, because it finds something.
    system.operator("reconcile", "--comparison", "outbox", "--full", fails=True)
    system.erase_with_nobody()
    system.operator("worker", "pause", "--subscriber", "receipts", "--reason", "a drill")
    system.steps(4 * MINUTE)
    system.hold(75 * MINUTE)
    system.note("it is put right")
    system.operator("worker", "resume", "--subscriber", "receipts")
    system.operator("reconcile", "--comparison", "outbox", "--repair", "--full")
    system.psql("update aftercommit.job set due_at = null")
    system.steps(4 * MINUTE)
    return {("AftercommitBacklogOld", "EVENTS"), ("AftercommitParkedEvents", "EVENTS"), ("AftercommitNoWorkerActive", "ledger"),
            ("AftercommitFindings", "outbox"), ("AftercommitJobsOverdue", "erasure"), ("AftercommitSubscriberPaused", "receipts")}


def message(value):
    return json.dumps(value).replace("'", "''")


INCIDENTS = {function.__name__: function for function in
             (no_more_nats, no_more_database, processes_end, handlers_fail, somebody_has_to_decide)}
