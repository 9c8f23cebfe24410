-- What a worker needs beyond the inbox: to find events that kill it, to forget what is old, and to run events again that
-- an operator sends back.

-- The event's place in its publisher's outbox, so that the two can be compared.
alter table aftercommit.inbox add column sequence bigint;
-- `discarded`: given up by an operator, who deleted the dead letter.
alter table aftercommit.inbox drop constraint inbox_outcome_is_known;
alter table aftercommit.inbox add constraint inbox_outcome_is_known check (outcome in ('handled', 'dead', 'discarded'));
-- Rows come nearly in the order of each of these, so one small index finds ranges of all three.
create index inbox_ranges on aftercommit.inbox using brin (handled_at, stream_seq, sequence) with (autosummarize = on);

-- How often the process died while the event ran.
alter table aftercommit.attempt alter column attempts set default 0;
alter table aftercommit.attempt add column crashes integer not null default 0;

-- What a worker's lanes run at present, written before a batch and removed by the transaction that commits it. What is
-- left of an earlier epoch was running when its worker died. Unlogged, so that writing it costs nearly nothing: when
-- PostgreSQL itself crashes it is emptied, and then the worker was not the one that died.
create unlogged table aftercommit.running (
    subscriber  text   not null,
    epoch       bigint not null,
    lane        bigint not null,
    events      uuid[] not null,
    primary key (subscriber, epoch, lane)
);

-- Events that shall run again at one subscriber, from here and not from the stream, in the order of their ids. The
-- subscriber's active worker removes a row in the transaction in which the event is done.
create table aftercommit.redrive (
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
    requested_at    timestamptz not null default clock_timestamp(),
    requested_by    text        not null,
    constraint redrive_event_unique unique (subscriber, event_id)
);
create index redrive_order on aftercommit.redrive (subscriber, id);
-- Live events of a key wait while rows of it do. A hash, because the keys of foreign publishers may be long.
create index redrive_key on aftercommit.redrive using hash (key);

-- What operators did: who, when, what.
create table aftercommit.audit (
    id          bigint      generated always as identity primary key,
    at          timestamptz not null default clock_timestamp(),
    who         text        not null,                       -- as the operator's tool was told, or found out
    role        text        not null default session_user,  -- as PostgreSQL knows it
    action      text        not null,                       -- such as 'dead retry'
    subscriber  text,
    event_id    uuid,
    detail      jsonb       not null default '{}'
);
create index audit_event on aftercommit.audit (event_id) where event_id is not null;
