-- An SQL function that handles an event publishes in the trace of its handler: the worker sets the trace context for the
-- transaction, and aftercommit.publish() takes it over. A session of another language can set it, too:
-- select set_config('aftercommit.traceparent', $1, true).
--
-- It replaces one function and locks nothing; publishers do not wait.
create or replace function aftercommit.publish(type text, payload jsonb, key text default null, headers jsonb default '{}')
    returns uuid
    language plpgsql volatile security invoker
    set search_path = pg_catalog
as $$
declare
    new_id constant uuid := aftercommit.new_event_id();
    own jsonb := coalesce(publish.headers, '{}');
    parent constant text := coalesce(current_setting('aftercommit.traceparent', true), '');
    state constant text := coalesce(current_setting('aftercommit.tracestate', true), '');
begin
    -- What the caller gives stays, and what is no trace context is left out: tracing never makes a publish fail.
    if parent <> '' and parent ~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$' and jsonb_typeof(own) = 'object'
       and not own @? '$.keyvalue() ? (@.key like_regex "^trace(parent|state)$" flag "i")'
       and octet_length(own::text) < 15000 then
        own := own || jsonb_build_object('traceparent', parent);
        if length(state) <= 512 and state ~ '^[!-~]([ -~]*[!-~])?$' then
            own := own || jsonb_build_object('tracestate', state);
        end if;
    end if;
    insert into aftercommit.outbox (event_id, type, key, headers, payload)
    values (new_id, publish.type, publish.key, own, convert_to(publish.payload::text, 'UTF8'));
    return new_id;
end
$$;
