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

-- Deletes up to `most` of the oldest entries of the audit trail that are older than `age`, and leaves an entry that says so.
-- Nobody may delete entries otherwise; those of the last 30 days nobody may delete at all.
create function aftercommit.prune_audit(age interval, most integer) returns bigint
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    removed bigint;
    up_to timestamptz;
begin
    if age is null or age < interval '30 days' then
        raise exception 'the audit trail must be kept for at least 30 days' using errcode = 'invalid_parameter_value';
    end if;
    with gone as (
        delete from aftercommit.audit where id = any(array(
            -- Ids are in the order of time.
            select first.id from (select a.id, a.at from aftercommit.audit a order by a.id limit most) as first
             where first.at < clock_timestamp() - age))
        returning at
    )
    select count(*), max(at) into removed, up_to from gone;
    if removed > 0 then
        insert into aftercommit.audit (who, action, detail)
        values (session_user, 'audit prune', jsonb_build_object('removed', removed, 'up_to', up_to));
    end if;
    return removed;
end
$$;
revoke all on function aftercommit.prune_audit from public;

-- Deletes up to `most` leases that ran out more than `age` ago, because their holder died and nobody came after it, and those of
-- categories that are swept no more. The relay's stays, because its epoch counts on; one that a subscriber gave back stays,
-- because the subscriber may come back: `aftercommit subscriber forget` removes it. A function, because who may delete rows of a
-- table may lock it, and with it everybody who needs a lease.
create function aftercommit.prune_leases(age interval, most integer) returns bigint
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    removed bigint;
begin
    if age is null or age < interval '1 day' then
        raise exception 'leases must be kept for at least a day' using errcode = 'invalid_parameter_value';
    end if;
    delete from aftercommit.lease where name = any(array(
        select l.name from aftercommit.lease l
         where l.expires_at < clock_timestamp() - age
           and (l.name <> 'relay' and l.expires_at > to_timestamp(0)
                or l.name like 'prune:%'
                and not exists (select from aftercommit.sweep s
                                 where l.name = 'prune:' || s.category and s.started_at > clock_timestamp() - age))
         order by l.name limit most));
    get diagnostics removed = row_count;
    return removed;
end
$$;
revoke all on function aftercommit.prune_leases from public;
