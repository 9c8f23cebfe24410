-- What operators want to know of workers without asking each process: who serves a subscriber, since when, what keeps it
-- from working; and why each failed attempt of an event failed.

-- One row per subscriber and process that serves it or stands by. The lease says who is active; this says the rest.
create table aftercommit.worker_status (
    subscriber   text        not null,
    instance     text        not null,                            -- as in the lease: host:process:random
    active       boolean     not null,
    since        timestamptz not null default clock_timestamp(),  -- since when it is active, or not
    phase        text        not null,                            -- connecting, standing_by, leading, paused, stopped
    ready        boolean     not null,                            -- false when something keeps it from working
    state        text        not null,                            -- what it does or waits for
    max_attempts bigint      not null,
    notes        jsonb       not null default '{}',               -- single events that wait or run for long; a bounded number
    seen_at      timestamptz not null default clock_timestamp(),
    primary key (subscriber, instance)
);

-- Failed attempts of an event at a subscriber: the last ten, for as long as the inbox keeps its rows, a week at most.
create table aftercommit.failure (
    subscriber text        not null,
    event_id   uuid        not null,
    at         timestamptz not null default clock_timestamp(),
    attempt    integer     not null,
    error      text        not null,
    retry_at   timestamptz not null,                              -- the next attempt does not begin before
    primary key (event_id, subscriber, at)
);
create index failure_age on aftercommit.failure (subscriber, at);

-- Since when a relay leads.
alter table aftercommit.relay_status add column since timestamptz not null default clock_timestamp();

-- An edit that changes nothing is no act.
drop trigger recorded_update on aftercommit.dead_letter;
create trigger recorded_update after update of headers, payload on aftercommit.dead_letter
    for each row when (old.headers is distinct from new.headers or old.payload is distinct from new.payload)
    execute function aftercommit.record_letter();
