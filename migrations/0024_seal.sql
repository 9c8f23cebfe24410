-- Sealed events: the payload of an event about a person is encrypted with a key of that person. Without the key's row nobody can read it
-- any more, wherever copies of it are. The table belongs into a database of its own, or out of the dumps of this one.

create table aftercommit.data_key (
    subject_kind text        not null,                              -- such as 'customer'
    subject_id   text        not null,
    key_ref      uuid        not null,                              -- what sealed events name; random, so it tells nothing
    wrapped_key  bytea       not null,                              -- the data key, encrypted with a master key
    key_id       text        not null,                              -- which master key that is
    created_at   timestamptz not null default clock_timestamp(),
    primary key (subject_kind, subject_id),
    constraint data_key_ref_is_unique unique (key_ref),
    constraint data_key_kind_size check (octet_length(subject_kind) between 1 and 100),
    constraint data_key_id_size check (octet_length(subject_id) between 1 and 500),
    constraint data_key_master_size check (octet_length(key_id) between 1 and 100),
    constraint data_key_wrapped_size check (octet_length(wrapped_key) between 1 and 500)
);
create index data_key_master on aftercommit.data_key (key_id, key_ref);

-- Keys that were forgotten, so that an erased event differs from one whose key is in another database.
create table aftercommit.forgotten_key (
    key_ref      uuid        primary key,
    forgotten_at timestamptz not null default clock_timestamp()
);

-- Forgets the data key of a subject; false when it has none. A function, because who may delete rows of a table may lock it, and with
-- it everybody who seals.
create function aftercommit.forget_data_key(kind text, id text) returns boolean
    language plpgsql security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    with gone as (
        delete from aftercommit.data_key k where k.subject_kind = kind and k.subject_id = id returning k.key_ref
    )
    insert into aftercommit.forgotten_key (key_ref) select g.key_ref from gone g;
    return found;
end
$$;
revoke all on function aftercommit.forget_data_key from public;
