-- The outbox: an append-only log that services write inside their own transactions.
-- A reader needs three things of a row: `xid`, to ask whether a snapshot sees it; `id`, taken from a sequence
-- with CACHE 1, so that ids of one key follow the commit order of writers that lock a common row; and the index on
-- both, to find the rows of a transaction that committed after newer ids.

do $$
begin
    if current_setting('server_encoding') <> 'UTF8' then
        raise exception 'aftercommit needs a database with the encoding UTF8, this one has %',
            current_setting('server_encoding');
    end if;
end
$$;

create schema if not exists aftercommit;

-- The constraints refuse what could not be published. They call no function of this schema, so that a restore can
-- load rows in any order and a writer needs no right but INSERT. The Rust library checks the same before it writes.
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
    constraint outbox_headers_are_an_object check (jsonb_typeof(headers) = 'object'),
    constraint outbox_headers_size check (octet_length(headers::text) <= 16384),
    constraint outbox_header_names_are_legal check (
        not headers @? '$.keyvalue() ? (!(@.key like_regex "^[A-Za-z0-9_-]+$"))'),
    -- NATS keeps `Nats-*` for itself, and the relay writes the CloudEvents attributes as `ce-*`.
    constraint outbox_header_names_are_not_reserved check (
        not headers @? '$.keyvalue() ? (@.key like_regex "^(nats|ce)-" flag "i")'),
    -- Strings of printable ASCII without a space at either end: the rest may reach a subscriber changed.
    constraint outbox_header_values_are_legal check (
        not headers @? 'strict $.* ? (@.type() != "string" || @ like_regex "^ | $|[^ -~]" flag "s")'),
    constraint outbox_payload_size check (octet_length(payload) <= 1000000),
    constraint outbox_content_type_is_legal check (
        content_type <> '' and octet_length(content_type) <= 128 and content_type !~ '^ | $|[^ -~]')
);
create index outbox_xid_id on aftercommit.outbox (xid, id);

comment on table aftercommit.outbox is
    'Events written in business transactions; rows are never updated. Insert here or call aftercommit.publish().';

-- A version 7 UUID (RFC 9562): 48 bits of Unix milliseconds, the version, the fraction of the millisecond in 12 bits
-- (section 6.2, method 3), the variant and 62 random bits (both out of a version 4 UUID).
create function aftercommit.new_event_id() returns uuid
    language sql volatile parallel safe
    set search_path = pg_catalog
as $$
    select encode(
               substring(int8send(now.us / 1000) from 3)
               || substring(int8send(28672 + now.us % 1000 * 4096 / 1000) from 7)  -- 28672 is 0x7000
               || substring(uuid_send(gen_random_uuid()) from 9),
               'hex')::uuid
      from (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us) as now
$$;

-- Writes one event in the caller's transaction, with the caller's rights, and returns its id. For triggers and
-- services in other languages.
create function aftercommit.publish(type text, payload jsonb, key text default null, headers jsonb default '{}')
    returns uuid
    language plpgsql volatile security invoker
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

-- JSON text as jsonb; null when the bytes are not JSON or are more than jsonb can hold, so that one such payload does
-- not break the view. Not parallel safe: before PostgreSQL 17 no parallel worker may catch an exception.
create function aftercommit.payload_json(payload bytea) returns jsonb
    language plpgsql immutable
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
           case when content_type ~* '^(application/json|[^;]*\+json) *(;|$)' then aftercommit.payload_json(payload) end as data,
           content_type, octet_length(payload) as payload_bytes, created_at, xid
      from aftercommit.outbox;

comment on view aftercommit.events is 'The outbox with JSON payloads readable as jsonb.';
