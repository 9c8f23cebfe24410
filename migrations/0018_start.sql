-- Where a subscriber starts that does not start with the oldest event, written down before its consumer is made. A consumer
-- that is made anew starts there again, and what lies before is not missed.
create table aftercommit.subscriber_start (
    subscriber     text        primary key,
    stream         text        not null,
    stream_created timestamptz not null,                            -- in another stream the sequence means nothing
    sequence       bigint      not null,                            -- of the first event that it gets
    starts_at      timestamptz not null,                            -- when that was, or will have been, stored
    asked          text        not null,                            -- such as 'new'
    recorded_at    timestamptz not null default clock_timestamp(),
    constraint subscriber_start_sequence_is_positive check (sequence > 0)
);
