-- Whoever takes a dead letter away, or changes what it holds, leaves an entry in the audit trail, with the tool or with SQL
-- by hand. So triggers write it, with the rights of the schema's owner: nobody else needs to write there about letters.

-- What the entries of this transaction say of the act, such as 'dead retry', and of who did it.
create function aftercommit.tell(action text, who text) returns void
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select set_config('aftercommit.action', action, true), set_config('aftercommit.who', who, true)
$$;

create function aftercommit.record_letter() returns trigger
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    what text := coalesce(nullif(current_setting('aftercommit.action', true), ''),
                          case tg_op when 'DELETE' then 'dead delete' else 'dead edit' end);
    detail jsonb := jsonb_build_object(
        'letter', old.id, 'type', old.type, 'key', old.key, 'reason', old.reason, 'attempts', old.attempts,
        'first_failed_at', old.first_failed_at, 'dead_at', old.dead_at, 'stream', old.stream,
        'stream_seq', old.stream_seq, 'payload_sha256', encode(sha256(old.payload), 'hex'));
begin
    if tg_op = 'UPDATE' then
        detail := detail || jsonb_build_object('payload_sha256_after', encode(sha256(new.payload), 'hex'));
    else
        detail := detail || jsonb_build_object('version', old.version, 'source', old.source, 'time', old.time,
                                               'sequence', old.sequence, 'content_type', old.content_type);
    end if;
    -- What waits to run again is kept there.
    if tg_op = 'UPDATE' or not exists (select from aftercommit.redrive r
                                        where r.subscriber = old.subscriber and r.event_id = old.event_id
                                          and r.payload = old.payload and r.headers = old.headers) then
        detail := detail || jsonb_build_object('headers', old.headers,
                                               'payload_base64', translate(encode(old.payload, 'base64'), e'\n', ''));
    end if;
    insert into aftercommit.audit (who, action, subscriber, event_id, detail)
    values (coalesce(nullif(current_setting('aftercommit.who', true), ''), session_user), what, old.subscriber,
            old.event_id, detail);
    return null;
end
$$;

create trigger recorded_delete after delete on aftercommit.dead_letter
    for each row execute function aftercommit.record_letter();
create trigger recorded_update after update of headers, payload on aftercommit.dead_letter
    for each row execute function aftercommit.record_letter();

-- An event that was sent back and is taken away before it has run would be as lost as a deleted letter. Looked at with the
-- commit, because who runs it takes the row away first.
create function aftercommit.record_redrive() returns trigger
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from aftercommit.inbox i where i.subscriber = old.subscriber and i.event_id = old.event_id)
       or exists (select from aftercommit.redrive r where r.subscriber = old.subscriber and r.event_id = old.event_id) then
        return null;
    end if;
    insert into aftercommit.audit (who, action, subscriber, event_id, detail)
    values (coalesce(nullif(current_setting('aftercommit.who', true), ''), session_user), 'redrive delete', old.subscriber,
            old.event_id,
            jsonb_build_object('type', old.type, 'version', old.version, 'key', old.key, 'source', old.source,
                               'time', old.time, 'sequence', old.sequence, 'content_type', old.content_type,
                               'stream', old.stream, 'stream_seq', old.stream_seq, 'requested_by', old.requested_by,
                               'headers', old.headers,
                               'payload_base64', translate(encode(old.payload, 'base64'), e'\n', '')));
    return null;
end
$$;

create constraint trigger recorded_delete after delete on aftercommit.redrive
    deferrable initially deferred
    for each row execute function aftercommit.record_redrive();
