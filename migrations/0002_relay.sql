-- Who does what a single process must do at a time: lead an outbox, serve a subscriber. Times are the database's.
-- The epoch grows with every change of hands and never repeats.
create table aftercommit.lease (
    name       text        primary key,
    holder     text        not null,
    epoch      bigint      not null,
    expires_at timestamptz not null
);

-- The relay's progress, one row per state, the newest `seq` valid. Rows are only inserted: a row that many
-- transactions update slows down while any snapshot is held, a log does not. The primary key is the fence: a writer
-- appends at the successor of the state that it acted on, so of two leaders one fails.
--
-- A mark is a moment of the outbox in four parts: a snapshot, then the last value of the id sequence read after it,
-- then the next transaction id read after that. A row that the snapshot does not see has an id above the second, or
-- its transaction is one that was running then: in the snapshot's list, or from the snapshot's xmax up to the third.
-- The fourth is the floor: rows with ids up to there came from another cluster in a dump, so their transaction ids
-- mean nothing; the mark holds them all.
create table aftercommit.relay_log (
    seq               bigint      primary key,
    epoch             bigint      not null,
    settled           pg_snapshot not null,  -- everything that this mark holds has been handled
    settled_id        bigint      not null,
    settled_xid       xid8        not null,
    settled_floor     bigint      not null default 0,
    target            pg_snapshot,           -- open window: what this mark holds and `settled` does not
    target_id         bigint,
    target_xid        xid8,
    floor             bigint      not null default 0,  -- the floor of the target and of every later mark
    stream            text,                  -- where it goes; null before the first window
    stream_created    timestamptz,           -- tells a stream from another one of the same name
    base_sequence     bigint,                -- what is settled lies at or before this sequence, the rest behind it
    scattered         boolean     not null default false,  -- what lies behind it is in no known order: look each up
    system_identifier bigint      not null,  -- the cluster that this state was written in
    created_at        timestamptz not null default clock_timestamp(),

    constraint relay_log_window_is_whole check (num_nulls(target, target_id, target_xid) in (0, 3)),
    constraint relay_log_base_is_whole check (num_nulls(stream, stream_created, base_sequence) in (0, 3)),
    constraint relay_log_window_has_a_base check (target is null or stream is not null)
);

-- The first state: nothing is settled.
insert into aftercommit.relay_log (seq, epoch, settled, settled_id, settled_xid, system_identifier)
select 0, 0, pg_current_snapshot(), 0, pg_snapshot_xmax(pg_current_snapshot()), system_identifier
  from pg_control_system();

-- What the leading relay tells about itself, written with its heartbeat.
create table aftercommit.relay_status (
    only_row      boolean     primary key default true check (only_row),
    holder        text        not null,
    epoch         bigint      not null,
    stream        text        not null,
    last_id       bigint      not null,      -- the outbox id of the last event stored in the stream, 0 before the first
    last_sequence bigint      not null,      -- and its stream sequence
    published     bigint      not null,      -- events stored by this leader since it took over
    state         text        not null,      -- 'publishing', 'idle', or what it waits for
    updated_at    timestamptz not null default clock_timestamp()
);

-- Events that the stream will never take, and with policy `block` the later events of their keys behind them.
create table aftercommit.parked (
    outbox_id  bigint      primary key,
    event_id   uuid        not null unique,
    type       text        not null,
    key        text,
    code       bigint,                       -- JetStream's error number; null for one that waits behind another
    reason     text        not null,
    state      text        not null default 'parked',
    parked_at  timestamptz not null default clock_timestamp(),
    changed_at timestamptz not null default clock_timestamp(),
    sequence   bigint,                       -- where it went in the end
    constraint parked_state_is_known check (state in ('parked', 'released', 'published', 'discarded'))
);
create index parked_open on aftercommit.parked (key, outbox_id) where state in ('parked', 'released');

-- What operators have switched off: `relay`, `subscriber:<name>`, `subscriber:*` for all of them.
create table aftercommit.pause (
    name      text        primary key,
    paused_at timestamptz not null default clock_timestamp(),
    paused_by text        not null default current_user,
    reason    text
);
