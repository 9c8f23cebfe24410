-- Who does what a single process must do at a time: lead an outbox, serve a subscriber. Times are the database's.
-- The epoch grows with every change of hands and never repeats.
create table aftercommit.lease (
    name       text        primary key,
    holder     text        not null,
    epoch      bigint      not null,
    expires_at timestamptz not null
);

-- The relay's progress, one row per state, newest `seq` valid. Rows are only inserted: a row that many transactions
-- update slows down while any snapshot is held, a log does not. The primary key is the fence: a writer appends at the
-- successor of the state that it acted on, so of two leaders one fails.
create table aftercommit.relay_log (
    seq               bigint      primary key,
    epoch             bigint      not null,
    settled           pg_snapshot not null,  -- all that it sees has been handled
    floor             bigint      not null,  -- the outbox sequence, read after `settled` was taken
    target            pg_snapshot,           -- open window: the rows that target sees and settled does not
    target_floor      bigint,                -- the outbox sequence, read after `target` was taken
    stream            text,                  -- where the open window goes
    base_sequence     bigint,                -- the stream's last sequence when the window was opened
    system_identifier bigint      not null,  -- the cluster in which the snapshots mean something
    created_at        timestamptz not null default clock_timestamp(),

    constraint relay_log_window_is_whole check (
        (target is null and target_floor is null and stream is null and base_sequence is null)
        or (target is not null and target_floor is not null and stream is not null and base_sequence is not null))
);

-- The first state: nothing is settled but what was before the outbox existed.
insert into aftercommit.relay_log (seq, epoch, settled, floor, system_identifier)
select 0, 0, pg_current_snapshot(), 0, system_identifier from pg_control_system();

-- What the leading relay tells about itself, written with its heartbeat.
create table aftercommit.relay_status (
    only_row      boolean     primary key default true check (only_row),
    holder        text        not null,
    epoch         bigint      not null,
    stream        text        not null,
    last_id       bigint,                    -- the outbox id of the last event stored in the stream
    last_sequence bigint,                    -- and its stream sequence
    published     bigint      not null,      -- events stored by this leader since it started
    state         text        not null,      -- 'publishing', 'idle', or why it waits
    updated_at    timestamptz not null default clock_timestamp()
);
