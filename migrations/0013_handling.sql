-- A handler must leave the worker's transaction open: with a COMMIT of its own the inbox would have events that nobody has
-- handled yet. So the commit fails, unless the worker has said that all handlers have run.

create function aftercommit.check_handled() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
    -- The handlers' sessions have their own.
    set standard_conforming_strings = on
as $$
declare
    -- Not where SET CONSTRAINTS has it run earlier.
    statement text := regexp_replace(current_query(), '/\*.*?\*/|--[^\n]*', ' ', 'g');
begin
    if current_setting('aftercommit.handling', true) = 'on'
       and statement ~* '(^|;)\s*(commit|end|prepare\s+transaction)\y' then
        raise exception 'the handler committed the worker''s transaction' using errcode = 'invalid_transaction_termination';
    end if;
    return null;
end
$$;

-- The worker removes the marker of a batch in the transaction in which the batch is handled.
create constraint trigger handled after delete on aftercommit.running
    deferrable initially deferred
    for each row when (current_setting('aftercommit.handling', true) = 'on')
    execute function aftercommit.check_handled();
