-- Forgetting what events hold: payload and headers become a tombstone, in the outbox and wherever else this database has
-- copies. A tombstone is published like any event, so subscribers learn of it. Rows of the outbox are never updated otherwise.

-- Who wanted what forgotten, and how far that has come. What is not ended is gone on with, whoever died over it.
create table aftercommit.forget_request (
    id           bigint      generated always as identity primary key,
    who          text        not null,
    role         text        not null default session_user,
    why          text        not null,
    event_ids    uuid[],                                 -- all of what is set must fit
    key          text,
    key_prefix   text,
    type         text,
    requested_at timestamptz not null default clock_timestamp(),
    last_id      bigint      not null,                   -- later events of the outbox are not meant
    up_to        bigint      not null default 0,         -- the outbox has been gone through up to this id
    tables_at    timestamptz,                            -- since when the tables of this database have only tombstones
    tables_xid   xid8,                                   -- transactions that ran then may have written more later
    late         boolean     not null default false,     -- whether those have ended, and the tables are gone through once more
    late_at      timestamptz,                            -- since when that is done
    stream_to    bigint,                                 -- the stream has been gone through up to this sequence
    published_at timestamptz,                            -- since when tombstones are published, or queued to be
    ended_at     timestamptz,                            -- since when the stream has nothing else either
    messages     bigint,                                 -- messages of the stream that were erased
    constraint forget_request_says_what check (num_nonnulls(event_ids, key, key_prefix, type) > 0),
    constraint forget_request_says_why check (who <> '' and why <> ''),
    constraint forget_request_means_something check (key_prefix <> '' and cardinality(event_ids) > 0)
);
create index forget_request_open on aftercommit.forget_request (id) where ended_at is null;

create table aftercommit.tombstone (
    event_id       uuid        primary key,
    request        bigint      references aftercommit.forget_request,  -- null: another database's outbox said so
    outbox_id      bigint,                                             -- null: it is not in the outbox of this database
    digest         bytea,                                              -- of the whole event: tells its message from a forgery
    payload_sha256 bytea,
    payload_bytes  integer,
    erased_at      timestamptz not null default clock_timestamp()
);
create index tombstone_request on aftercommit.tombstone (request, event_id);

-- An event whose payload was erased before its subscriber handled it.
alter table aftercommit.inbox drop constraint inbox_outcome_is_known;
alter table aftercommit.inbox add constraint inbox_outcome_is_known check (outcome in ('handled', 'dead', 'discarded', 'erased'))
    not valid;

-- Copies are looked up by their events.
create index dead_letter_event on aftercommit.dead_letter (event_id);
create index redrive_event on aftercommit.redrive (event_id);
create index attempt_event on aftercommit.attempt (event_id);
create index finding_event on aftercommit.finding (event_id) where event_id is not null;

-- What a tombstone has in place of the payload.
create function aftercommit.tombstone_payload(payload bytea, erased_at timestamptz) returns bytea
    language sql immutable
    set search_path = pg_catalog, pg_temp
    set timezone = 'UTC'
as $$
    select convert_to(jsonb_build_object('erased_at', erased_at, 'payload_sha256', encode(sha256(payload), 'hex'))::text, 'UTF8')
$$;

-- What an event is made of, as the programs compute it of a message: SHA-256 over its parts, each with its length in front.
create function aftercommit.event_digest(event aftercommit.outbox) returns bytea
    language sql stable
    set search_path = pg_catalog, pg_temp
    set timezone = 'UTC'
as $$
    select sha256(string_agg(int8send(octet_length(part)) || part, ''::bytea order by n, name collate "C", m))
      from (select 1 as n, '' as name, 1 as m, convert_to(event.type, 'UTF8') as part
            union all select 2, '', 1, int4send(event.version)
            union all select 3, '', 1, case when event.key is null then ''::bytea else '\x01'::bytea end
            union all select 4, '', 1, convert_to(coalesce(event.key, ''), 'UTF8')
            union all select 5, '', 1, convert_to(event.content_type, 'UTF8')
            union all select 6, '', 1, int8send((extract(epoch from event.created_at) * 1000000)::bigint)
            union all select 7, '', 1, sha256(event.payload)
            union all
            select 8, h.name, m, convert_to(case m when 1 then h.name else btrim(h.value, ' ') end, 'UTF8')
              from jsonb_each_text(event.headers) as h(name, value), (values (1), (2)) as pair(m)
             where h.name !~* '^(nats|ce|aftercommit)-') as parts
$$;

-- Whether a request means events with this type and key.
create function aftercommit.forget_means(request aftercommit.forget_request, type text, key text) returns boolean
    language sql immutable
    set search_path = pg_catalog, pg_temp
as $$
    select (request.type is null or request.type = type)
       and (request.key is null or coalesce(request.key = key, false))
       and (request.key_prefix is null or coalesce(starts_with(key, request.key_prefix), false))
$$;

-- Makes tombstones of what this database has of these events beside the outbox.
create function aftercommit.forget_copies(events uuid[], by_whom text) returns void
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- The audit trail tells who changed a dead letter.
    perform set_config('aftercommit.action', 'forget', true), set_config('aftercommit.who', by_whom, true);
    update aftercommit.dead_letter
       set payload = aftercommit.tombstone_payload(payload, clock_timestamp()), headers = '{}',
           content_type = 'application/vnd.aftercommit-tombstone+json', reason = 'erased'
     where event_id = any(events) and content_type <> 'application/vnd.aftercommit-tombstone+json';
    perform set_config('aftercommit.action', '', true), set_config('aftercommit.who', '', true);
    update aftercommit.redrive
       set payload = aftercommit.tombstone_payload(payload, clock_timestamp()), headers = '{}',
           content_type = 'application/vnd.aftercommit-tombstone+json'
     where event_id = any(events) and content_type <> 'application/vnd.aftercommit-tombstone+json';
    update aftercommit.attempt set last_error = 'erased' where event_id = any(events) and last_error <> 'erased';
    update aftercommit.failure set error = 'erased' where event_id = any(events) and error <> 'erased';
    update aftercommit.audit set detail = detail - '{payload_base64,headers,reason}'::text[]
     where event_id = any(events) and detail ?| '{payload_base64,headers,reason}'::text[];
    update aftercommit.parked set reason = 'erased' where event_id = any(events) and reason <> 'erased';
    update aftercommit.repair r set reason = 'erased'
      from aftercommit.tombstone t
     where t.event_id = any(events) and r.outbox_id = t.outbox_id and r.event_id = t.event_id and r.reason <> 'erased';
    update aftercommit.finding set detail = 'erased' where event_id = any(events) and detail <> 'erased';
end
$$;

-- What is written of an event after it was forgotten: by a worker that had its payload in memory, or by an operator's act.
create function aftercommit.keep_forgotten() returns trigger
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if new.event_id is null or not exists (select from aftercommit.tombstone t where t.event_id = new.event_id) then
        return new;
    end if;
    if tg_table_name in ('dead_letter', 'redrive') then
        if tg_op = 'UPDATE' and old.content_type = 'application/vnd.aftercommit-tombstone+json' then
            if new.payload is distinct from old.payload then
                raise exception 'event % was forgotten: there is nothing to edit', new.event_id
                    using errcode = 'object_not_in_prerequisite_state';
            end if;
        elsif new.content_type <> 'application/vnd.aftercommit-tombstone+json' then
            new.payload := aftercommit.tombstone_payload(new.payload, clock_timestamp());
        end if;
        new.headers := '{}';
        new.content_type := 'application/vnd.aftercommit-tombstone+json';
    end if;
    case tg_table_name
        when 'dead_letter' then new.reason := 'erased';
        when 'redrive' then null;
        when 'attempt' then new.last_error := 'erased';
        when 'failure' then new.error := 'erased';
        when 'audit' then new.detail := new.detail - '{payload_base64,headers,reason}'::text[];
        when 'parked' then new.reason := 'erased';
        else new.detail := 'erased';
    end case;
    return new;
end
$$;
revoke all on function aftercommit.keep_forgotten from public;

create trigger keep_forgotten before insert or update on aftercommit.dead_letter
    for each row execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert or update on aftercommit.redrive
    for each row execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert or update on aftercommit.attempt
    for each row execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert or update on aftercommit.failure
    for each row execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert on aftercommit.audit
    for each row when (new.event_id is not null) execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert or update of reason on aftercommit.parked
    for each row execute function aftercommit.keep_forgotten();
create trigger keep_forgotten before insert or update of detail on aftercommit.finding
    for each row when (new.event_id is not null) execute function aftercommit.keep_forgotten();

-- Begins to forget, in the caller's transaction, and returns the request's number. aftercommit.forget_more() does it.
create function aftercommit.forget_begin(who text, why text, event_ids uuid[] default null, key text default null,
                                         key_prefix text default null, type text default null) returns bigint
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    new_id bigint;
begin
    if num_nonnulls(event_ids, key, key_prefix, type) = 0 then
        raise exception 'nothing is forgotten: give event ids, a key, the beginning of keys, or a type'
            using errcode = 'invalid_parameter_value';
    end if;
    if coalesce(who, '') = '' or coalesce(why, '') = '' then
        raise exception 'nothing is forgotten: say who wants it and why' using errcode = 'invalid_parameter_value';
    end if;
    if key_prefix = '' or cardinality(event_ids) = 0 then
        raise exception 'nothing is forgotten: the beginning of keys, and the list of event ids, must not be empty'
            using errcode = 'invalid_parameter_value';
    end if;
    insert into aftercommit.forget_request (who, why, event_ids, key, key_prefix, type, last_id)
    select forget_begin.who, forget_begin.why, forget_begin.event_ids, forget_begin.key, forget_begin.key_prefix,
           forget_begin.type,
           -- Rows that logical replication or a restore brought have ids that the sequence has not given.
           greatest(case when s.is_called then s.last_value else 0 end, (select max(id) from aftercommit.outbox))
      from aftercommit.outbox_id_seq s
    returning id into new_id;
    insert into aftercommit.audit (who, action, detail)
    values (forget_begin.who, 'forget', jsonb_strip_nulls(jsonb_build_object(
                'request', new_id, 'why', why, 'events', cardinality(event_ids), 'key', key, 'key_prefix', key_prefix, 'type', type)));
    return new_id;
end
$$;
revoke all on function aftercommit.forget_begin from public;

-- Goes on with a request in the tables of this database, for about `look` rows of the outbox. True when all is done here.
create function aftercommit.forget_more(request_id bigint, look integer default 10000) returns boolean
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    request aftercommit.forget_request;
    looked_to bigint;
    ids bigint[];
    events uuid[];
begin
    select * into request from aftercommit.forget_request f where f.id = request_id for update;
    if not found then
        raise exception 'there is no request % to forget something', request_id using errcode = 'no_data_found';
    end if;
    if request.late_at is not null or (request.tables_at is not null and request.up_to >= request.last_id) then
        return true;
    end if;
    if request.event_ids is not null then
        ids := array(select o.id from aftercommit.outbox o
                      where o.event_id = any(request.event_ids) and aftercommit.forget_means(request, o.type, o.key)
                      order by o.id);
    else
        select max(id), array_agg(id order by id) filter (where aftercommit.forget_means(request, type, key))
          into looked_to, ids
          from (select o.id, o.type, o.key from aftercommit.outbox o
                 where o.id > request.up_to and o.id <= request.last_id order by o.id limit look) as looked;
    end if;
    -- In the order of their ids, as others lock them.
    perform from aftercommit.outbox o where o.id = any(ids) order by o.id for update;
    insert into aftercommit.tombstone as t (event_id, request, outbox_id, digest, payload_sha256, payload_bytes)
    select o.event_id, request_id, o.id, aftercommit.event_digest(o), sha256(o.payload), octet_length(o.payload)
      from aftercommit.outbox o
     where o.id = any(ids) and o.content_type <> 'application/vnd.aftercommit-tombstone+json'
    on conflict (event_id) do update
       set request = excluded.request, outbox_id = excluded.outbox_id, digest = excluded.digest,
           payload_sha256 = excluded.payload_sha256, payload_bytes = excluded.payload_bytes, erased_at = excluded.erased_at;
    -- Those that were forgotten before are looked for in the stream once more.
    update aftercommit.tombstone t set request = request_id
      from aftercommit.outbox o where o.id = any(ids) and t.event_id = o.event_id and t.request is distinct from request_id;
    update aftercommit.outbox o
       set payload = aftercommit.tombstone_payload(o.payload, clock_timestamp()), headers = '{}',
           content_type = 'application/vnd.aftercommit-tombstone+json'
     where o.id = any(ids) and o.content_type <> 'application/vnd.aftercommit-tombstone+json';
    events := array(select o.event_id from aftercommit.outbox o where o.id = any(ids));
    perform aftercommit.forget_copies(events, request.who);
    if looked_to is not null and looked_to < request.last_id then
        update aftercommit.forget_request set up_to = looked_to where id = request_id;
        return false;
    end if;
    -- What the outbox does not have (any more), or what is another outbox's.
    if request.event_ids is not null and num_nulls(request.key, request.key_prefix, request.type) = 3 then
        events := request.event_ids;
    else
        -- Not those that the outbox of this database has: they were meant above, or are later ones. Of another outbox the time tells.
        events := array(select l.event_id from aftercommit.dead_letter l
                         where aftercommit.forget_means(request, l.type, l.key) and l.time <= request.requested_at
                           and (request.event_ids is null or l.event_id = any(request.event_ids))
                           and not exists (select from aftercommit.outbox o where o.event_id = l.event_id)
                        union
                        select r.event_id from aftercommit.redrive r
                         where aftercommit.forget_means(request, r.type, r.key) and r.time <= request.requested_at
                           and (request.event_ids is null or r.event_id = any(request.event_ids))
                           and not exists (select from aftercommit.outbox o where o.event_id = r.event_id));
    end if;
    insert into aftercommit.tombstone as t (event_id, request) select unnest(events), request_id
    on conflict (event_id) do update set request = excluded.request;
    perform aftercommit.forget_copies(events, request.who);
    update aftercommit.forget_request
       set up_to = request.last_id, tables_at = coalesce(tables_at, clock_timestamp()),
           tables_xid = coalesce(tables_xid, pg_current_xact_id())
     where id = request_id;
    return true;
end
$$;
revoke all on function aftercommit.forget_more from public;

-- All of it in the caller's transaction: for a service that deletes what an event is about, in any language. The stream is
-- erased afterwards, by `aftercommit forget --resume`.
create function aftercommit.forget(who text, why text, event_ids uuid[] default null, key text default null,
                                   key_prefix text default null, type text default null) returns bigint
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    new_id constant bigint := aftercommit.forget_begin(who, why, event_ids, key, key_prefix, type);
begin
    while not aftercommit.forget_more(new_id) loop
    end loop;
    return new_id;
end
$$;
revoke all on function aftercommit.forget from public;

-- Goes through the tables once more, for what transactions have written that ran when that was done before: events that could
-- not be seen, and copies. `waits` while one of them runs, `more` while there is more to do, then `done`.
create function aftercommit.forget_late(request_id bigint, look integer default 10000) returns text
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    request aftercommit.forget_request;
    events uuid[];
    after uuid := '00000000-0000-0000-0000-000000000000';
begin
    select * into request from aftercommit.forget_request f where f.id = request_id for update;
    if request.late_at is not null then
        return 'done';
    end if;
    if request.tables_xid is null or pg_snapshot_xmin(pg_current_snapshot()) <= request.tables_xid then
        return 'waits';
    end if;
    if not request.late then
        -- Ids up to `last_id` were given before; whoever has one has ended.
        update aftercommit.forget_request set up_to = 0, late = true where id = request_id;
        return 'more';
    end if;
    if not aftercommit.forget_more(request_id, look) then
        return 'more';
    end if;
    loop
        events := array(select t.event_id from aftercommit.tombstone t
                         where t.request = request_id and t.event_id > after order by t.event_id limit 10000);
        exit when cardinality(events) = 0;
        perform aftercommit.forget_copies(events, request.who);
        after := events[cardinality(events)];
    end loop;
    update aftercommit.forget_request set late_at = clock_timestamp() where id = request_id;
    return 'done';
end
$$;
revoke all on function aftercommit.forget_late from public;

-- Queues the tombstones of a request, which the leading relay publishes, so that subscribers learn of them. Returns how many
-- events the relay has not come to yet; then nothing is queued.
create function aftercommit.forget_publish(request_id bigint) returns bigint
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    waiting bigint;
begin
    -- Before the log is looked at: a relay that goes back at this moment takes away what is queued, or is waited for.
    lock table aftercommit.repair in row exclusive mode;
    select count(*) into waiting from aftercommit.forget_unsettled(request_id);
    if waiting > 0 then
        return waiting;
    end if;
    insert into aftercommit.repair as r (outbox_id, event_id, key, reason, queued_at)
    select o.id, o.event_id, o.key, 'erased',
           (select greatest(clock_timestamp(), max(queued_at) + interval '1 microsecond') from aftercommit.repair)
      from aftercommit.tombstone t join aftercommit.outbox o on o.id = t.outbox_id and o.event_id = t.event_id
     where t.request = request_id
       and not exists (select from aftercommit.parked p
                        where p.outbox_id = o.id and p.event_id = o.event_id and p.state <> 'published')
     order by o.id
    on conflict (outbox_id) do update
       set state = 'queued', times = r.times + 1, queued_at = excluded.queued_at, published_at = null, sequence = null,
           reason = excluded.reason, event_id = excluded.event_id, key = excluded.key
     where r.state <> 'queued';
    update aftercommit.forget_request set published_at = clock_timestamp() where id = request_id;
    return 0;
end
$$;

-- Events of a request that the relay has not come to: it may have read them before they were forgotten.
create function aftercommit.forget_unsettled(request_id bigint) returns setof uuid
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select t.event_id
      from aftercommit.tombstone t
      join aftercommit.outbox o on o.id = t.outbox_id and o.event_id = t.event_id
     cross join (select * from aftercommit.relay_log order by seq desc limit 1) as l
     where t.request = request_id
       and o.id > l.settled_floor
       and (o.id > l.settled_id or not pg_visible_in_snapshot(o.xid, l.settled))
       and not exists (select from aftercommit.parked p
                        where p.outbox_id = o.id and p.event_id = o.event_id and p.state in ('parked', 'discarded'))
$$;
revoke all on function aftercommit.forget_publish, aftercommit.forget_unsettled from public;

-- What the stream has of a request beside the outbox: events that were removed there.
create function aftercommit.forget_found(request_id bigint, events uuid[]) returns void
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    insert into aftercommit.tombstone (event_id, request) select distinct unnest(events), request_id
    on conflict (event_id) do nothing;
    perform aftercommit.forget_copies(events, (select f.who from aftercommit.forget_request f where f.id = request_id));
end
$$;
revoke all on function aftercommit.forget_found from public;

-- Of the events that a request names, those of which this database knows nothing.
create function aftercommit.forget_unknown(request_id bigint) returns setof uuid
    language sql stable security definer
    set search_path = pg_catalog, pg_temp
as $$
    select t.event_id from aftercommit.forget_request f join aftercommit.tombstone t on t.event_id = any(f.event_ids)
     where f.id = request_id and t.outbox_id is null
       and not exists (select from aftercommit.dead_letter l where l.event_id = t.event_id)
       and not exists (select from aftercommit.redrive r where r.event_id = t.event_id)
       and not exists (select from aftercommit.attempt a where a.event_id = t.event_id)
     order by t.event_id
$$;
revoke all on function aftercommit.forget_unknown from public;

create function aftercommit.forget_at(request_id bigint, sequence bigint) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update aftercommit.forget_request set stream_to = sequence where id = request_id and ended_at is null
$$;
revoke all on function aftercommit.forget_at from public;

create function aftercommit.forget_end(request_id bigint, erased bigint) returns void
    language sql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
    update aftercommit.forget_request set ended_at = clock_timestamp(), messages = erased
     where id = request_id and ended_at is null
$$;
revoke all on function aftercommit.forget_end from public;

-- What a worker does with tombstones that it receives, among a handler's statements: `fresh` are those that the subscriber had
-- not handled.
create function aftercommit.take_tombstones(subscriber text, events uuid[], fresh uuid[]) returns void
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    insert into aftercommit.tombstone (event_id) select distinct unnest(events) on conflict (event_id) do nothing;
    perform aftercommit.forget_copies(events, 'tombstone');
    update aftercommit.inbox i set outcome = 'erased'
     where i.subscriber = take_tombstones.subscriber and i.event_id = any(fresh);
end
$$;
revoke all on function aftercommit.take_tombstones from public;
