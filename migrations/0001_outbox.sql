-- The outbox: an append-only log that services write inside their own transactions.
-- A reader needs three things of a row: `xid`, to ask whether a snapshot sees it; `id`, taken from a sequence
-- with CACHE 1, so that ids of one key follow the commit order of writers that lock a common row; and the index on
-- both, to find the rows of a transaction that committed after newer ids.

create schema if not exists aftercommit;

-- True when `headers` is an object of strings whose names and values NATS can carry and which do not
-- use the names that NATS (`Nats-*`) and CloudEvents (`ce-*`) reserve.
create function aftercommit.headers_are_legal(headers jsonb) returns boolean
    language sql immutable parallel safe
    set search_path = pg_catalog
as $$
    select jsonb_typeof(headers) = 'object'
       and octet_length(headers::text) <= 16384
       and not exists (
            select from jsonb_each(case jsonb_typeof(headers) when 'object' then headers else '{}'::jsonb end) as h(name, value)
             where jsonb_typeof(h.value) <> 'string'
                or h.name !~ '^[A-Za-z0-9_-]{1,128}$'
                or h.name ~* '^(nats|ce)-'
                or h.value #>> '{}' ~ '[\u0001-\u001f\u007f]')
$$;

create table aftercommit.outbox (
    xid          xid8        not null default pg_current_xact_id(),
    id           bigint      generated always as identity (cache 1) primary key,
    event_id     uuid        not null,
    type         text        not null,
    version      integer     not null default 1,
    key          text,
    headers      jsonb       not null default '{}',
    payload      bytea       not null,
    content_type text        not null default 'application/json',
    created_at   timestamptz not null default clock_timestamp(),

    constraint outbox_event_id_unique unique (event_id),
    constraint outbox_type_is_a_subject check (octet_length(type) <= 200 and type ~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$'),
    constraint outbox_version_is_positive check (version >= 1),
    constraint outbox_key_size check (octet_length(key) between 1 and 512),
    constraint outbox_headers_are_legal check (aftercommit.headers_are_legal(headers)),
    constraint outbox_payload_size check (octet_length(payload) <= 1000000),
    constraint outbox_content_type_is_legal check (content_type ~ '^[!-~]([ -~]{0,126}[!-~])?$')
);
create index outbox_xid_id on aftercommit.outbox (xid, id);

comment on table aftercommit.outbox is
    'Events written in business transactions; rows are never updated. Insert here or call aftercommit.publish().';

-- A version 7 UUID: 48 bits of Unix milliseconds, then random bits (RFC 9562, section 5.7).
create function aftercommit.new_event_id() returns uuid
    language sql volatile parallel safe
    set search_path = pg_catalog
as $$
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                from 1 for 6),
            52, 1), 53, 1),
        'hex')::uuid
$$;

-- Writes one event in the caller's transaction and returns its id. For triggers and services in other languages.
create function aftercommit.publish(type text, payload jsonb, key text default null, headers jsonb default '{}')
    returns uuid
    language plpgsql volatile
    set search_path = pg_catalog
as $$
declare
    new_id constant uuid := aftercommit.new_event_id();
begin
    insert into aftercommit.outbox (event_id, type, key, headers, payload)
    values (new_id, publish.type, publish.key, coalesce(publish.headers, '{}'), convert_to(publish.payload::text, 'UTF8'));
    return new_id;
end
$$;

-- JSON text as jsonb; null when the bytes are not JSON, so that one such payload does not break the view.
create function aftercommit.payload_json(payload bytea) returns jsonb
    language plpgsql immutable parallel safe
    set search_path = pg_catalog
as $$
begin
    return convert_from(payload, 'UTF8')::jsonb;
exception when others then
    return null;
end
$$;

create view aftercommit.events as
    select id, event_id, type, version, key, headers,
           case when content_type ~* '^application/([a-z0-9.+-]+\+)?json' then aftercommit.payload_json(payload) end as data,
           content_type, octet_length(payload) as payload_bytes, created_at, xid
      from aftercommit.outbox;

comment on view aftercommit.events is 'The outbox with JSON payloads readable as jsonb.';
