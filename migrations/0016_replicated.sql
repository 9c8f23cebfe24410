-- Rows that logical replication brings carry the transaction numbers of another cluster, which mean nothing here: those ahead of this
-- cluster's would wait until it has come so far, and others would be passed over. They get the number of the transaction that writes
-- them here. The trigger runs for replicated rows only, so publishing costs nothing more.

create function aftercommit.stamp_replicated() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    new.xid := pg_current_xact_id();
    return new;
end
$$;

create trigger stamp_replicated before insert on aftercommit.outbox
    for each row execute function aftercommit.stamp_replicated();
alter table aftercommit.outbox enable replica trigger stamp_replicated;
