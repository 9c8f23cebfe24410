-- What pruning has done, one row for each category: old events of the outbox, the inbox of a subscriber, a table of the
-- application. `aftercommit prune status` shows it.
create table aftercommit.sweep (
    category      text        primary key,
    swept_by      text        not null,                             -- host, process and a random part
    period        interval,                                         -- how long rows are kept; null: not by age
    started_at    timestamptz not null default clock_timestamp(),
    last_swept_at timestamptz,                                      -- when a sweep last came to its end
    result        text,                                             -- of the last one; null while it runs, or it died
    error         text,
    removed       bigint      not null default 0,                   -- rows, by the last sweep
    removed_total bigint      not null default 0,
    place         text,                                             -- where the next one goes on; null: at the start
    constraint sweep_category_size check (octet_length(category) between 1 and 300),
    constraint sweep_result_is_known check (result in ('done', 'budget', 'stopped', 'busy', 'failed'))
);
