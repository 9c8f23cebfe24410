-- The reconciler: what runs when, what the runs found, and what is repaired. The legs that look at the outbox keep this in
-- the publisher's database, the legs that look at an inbox in the subscriber's; users' own reconcilers in theirs.

-- One row per reconciler: `outbox`, `consumer:<subscriber>`, `inbox:<subscriber>`, or a user's own name. Who begins a run
-- locks it, so that there is one run at a time.
create table aftercommit.reconciler (
    name            text        primary key,
    last_attempt_at timestamptz,                        -- when a run last began
    last_success_at timestamptz,                        -- when a scheduled or full run last succeeded: the interval counts from here
    failures        integer     not null default 0,     -- in a row
    retry_at        timestamptz,                        -- after a failed run: not before
    reconciled_up_to timestamptz,                       -- everything committed before is accounted for
    full_sweep_at   timestamptz,                        -- when a sweep over everything last ended
    position        jsonb       not null default '{}',  -- where the next page or sweep goes on
    repaired_total  bigint      not null default 0
);

-- A run that has not ended is also the lease of the process that runs it, which prolongs it by the database's clock.
create table aftercommit.reconcile_run (
    id         bigint      generated always as identity primary key,
    name       text        not null,
    cause      text        not null,
    mode       text        not null,
    scope      text        not null,
    holder     text        not null,
    started_at timestamptz not null default clock_timestamp(),
    alive_until timestamptz not null,
    ended_at   timestamptz,                             -- null: it runs, or its process died
    result     text,
    error      text,
    scanned    bigint      not null default 0,
    found      bigint      not null default 0,
    repaired   bigint      not null default 0,
    failed     bigint      not null default 0,
    detail     jsonb       not null default '{}',
    constraint reconcile_run_cause_is_known check (cause in ('scheduled', 'demand')),
    constraint reconcile_run_mode_is_known check (mode in ('report', 'repair')),
    constraint reconcile_run_scope_is_known check (scope in ('new', 'full', 'keys')),
    constraint reconcile_run_result_is_known check (result in ('ok', 'failed', 'stopped'))
);
create index reconcile_run_name on aftercommit.reconcile_run (name, id);
create index reconcile_run_open on aftercommit.reconcile_run (name) where ended_at is null;

-- What runs found. One that is found again by a later run stays one row.
create table aftercommit.finding (
    id          bigint      generated always as identity primary key,
    name        text        not null,                   -- the reconciler
    kind        text        not null,                   -- such as 'missing_from_stream'
    item        text        not null,                   -- what it is about: an event id, a consumer, a user's key
    event_id    uuid,
    outbox_id   bigint,
    key         text,
    stream_seq  bigint,
    detail      text        not null default '',        -- one line for a person, no payload
    first_run   bigint      not null,
    last_run    bigint      not null,
    found_at    timestamptz not null default clock_timestamp(),
    state       text        not null default 'open',
    settled_at  timestamptz,
    constraint finding_state_is_known check (state in ('open', 'repairing', 'repaired', 'gone')),
    constraint finding_is_one unique (name, kind, item)
);
create index finding_open on aftercommit.finding (name, kind) where state in ('open', 'repairing');
create index finding_settled on aftercommit.finding (settled_at) where settled_at is not null;

-- Events of the outbox that the leading relay shall publish again, because the stream does not hold them (any more). It
-- stays the only writer. A row stays behind as the proof of what was done.
create table aftercommit.repair (
    outbox_id    bigint      primary key,
    event_id     uuid        not null,
    key          text,
    state        text        not null default 'queued',
    queued_at    timestamptz not null default clock_timestamp(),
    published_at timestamptz,
    sequence     bigint,                                -- where it is in the stream now
    times        integer     not null default 1,        -- how often it was missing; part of its message id
    reason       text,                                  -- why the stream will never take it
    constraint repair_state_is_known check (state in ('queued', 'published', 'refused'))
);
create index repair_queued on aftercommit.repair (outbox_id) where state = 'queued';
create index repair_refused on aftercommit.repair (key, outbox_id) where state = 'refused';
create index repair_sequence on aftercommit.repair (sequence);
create index repair_queued_at on aftercommit.repair (queued_at, outbox_id);
