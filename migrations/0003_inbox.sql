-- The subscriber's side. It lives in the subscriber's database, beside the effects of its handlers.

-- One row per event that a subscriber is done with, written in the transaction of the handler's effects.
create table aftercommit.inbox (
    subscriber  text        not null,
    event_id    uuid        not null,
    stream_seq  bigint      not null,
    outcome     text        not null default 'handled',
    handled_at  timestamptz not null default clock_timestamp(),
    primary key (subscriber, event_id),
    constraint inbox_outcome_is_known check (outcome in ('handled', 'dead'))
);

-- Failed attempts of events that are still to be retried.
create table aftercommit.attempt (
    subscriber      text        not null,
    event_id        uuid        not null,
    attempts        integer     not null,
    last_error      text        not null,
    first_failed_at timestamptz not null default clock_timestamp(),
    last_failed_at  timestamptz not null default clock_timestamp(),
    primary key (subscriber, event_id)
);

-- Events that a subscriber gave up on, with all that is needed to handle them later.
create table aftercommit.dead_letter (
    id              bigint      generated always as identity primary key,
    subscriber      text        not null,
    event_id        uuid        not null,
    type            text        not null,
    version         integer     not null,
    key             text,
    source          text        not null,
    time            timestamptz not null,
    sequence        bigint,
    headers         jsonb       not null,
    payload         bytea       not null,
    content_type    text        not null,
    stream          text        not null,
    stream_seq      bigint      not null,
    attempts        integer     not null,
    reason          text        not null,
    first_failed_at timestamptz not null,
    dead_at         timestamptz not null default clock_timestamp(),
    constraint dead_letter_event_unique unique (subscriber, event_id)
);
