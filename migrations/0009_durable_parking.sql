-- Whatever lets the relay pass an event is as durable as its log, and is looked up again after a failover.

-- The timeline of the cluster's write-ahead log: promoting a standby and recovering to a point in time begin a new one.
-- From the name of the file that is written to, because the control file learns of a promotion only with the next
-- checkpoint. 0 where the role may not ask.
create function aftercommit.timeline() returns bigint
    language plpgsql stable
    set search_path = pg_catalog
as $$
begin
    return ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint;
exception when insufficient_privilege then
    return 0;
end
$$;

-- A state of another timeline was written before a failover: what was parked after it may be forgotten.
alter table aftercommit.relay_log add column timeline bigint not null default aftercommit.timeline();

-- True, or an error when the statement that asks was sent to a standby, or sees less than `mark`: a proxy that sends
-- reads elsewhere would make the relay pass events that are not there yet.
create function aftercommit.reads_up_to(mark pg_snapshot) returns boolean
    language plpgsql stable
    set search_path = pg_catalog
as $$
begin
    if pg_is_in_recovery() then
        raise exception 'this statement was sent to a standby: connect to the primary, past any proxy that splits reads from writes'
            using errcode = 'read_only_sql_transaction';
    end if;
    if pg_snapshot_xmax(pg_current_snapshot()) < pg_snapshot_xmax(mark)
       or exists (select from pg_snapshot_xip(pg_current_snapshot()) as running where pg_visible_in_snapshot(running, mark)) then
        raise exception 'this statement sees less than the relay''s log: connect to the primary, past any proxy that splits reads from writes'
            using errcode = 'read_only_sql_transaction';
    end if;
    return true;
end
$$;

-- Released events go out in the order of their ids, a batch at a time, whatever was parked before.
create index parked_released on aftercommit.parked (outbox_id) where state = 'released';
create index parked_in_the_way on aftercommit.parked (key, outbox_id) where state = 'parked';

-- Messages of the stream that have the event's id and are not the event: the one that is published replaces them.
alter table aftercommit.repair add column replaces bigint[] not null default '{}';
