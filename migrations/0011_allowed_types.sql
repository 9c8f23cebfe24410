-- Which role may publish what, where services share a database and should not be able to forge each other's events. It is
-- off: the trigger below is there and disabled. docs/security.md says how to switch it on.

create table aftercommit.allowed_type (
    role       name not null,
    type       text not null,               -- a type, 'order.*' for all that begin with 'order.', or '*'
    key_prefix text not null default '',    -- what the key begins with; without a key only ''
    primary key (role, type, key_prefix)
);

-- With the rights of who publishes, so that current_user is the role that counts.
create function aftercommit.check_allowed() returns trigger
    language plpgsql
    set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from aftercommit.allowed_type a join pg_roles r on r.rolname = a.role
                where pg_has_role(r.oid, 'usage')
                  and (a.type = '*' or a.type = new.type
                       or (right(a.type, 2) = '.*' and starts_with(new.type, left(a.type, -1))))
                  and starts_with(coalesce(new.key, ''), a.key_prefix)) then
        return null;
    end if;
    raise exception 'the role % may not publish events of type % with this key: aftercommit.allowed_type says what it may',
        current_user, new.type using errcode = 'insufficient_privilege';
end
$$;

-- A time that CloudEvents can tell. Not valid, so that the rows that are there are not looked through; the programs read a
-- time outside of it as the nearest one within. Before the trigger: who has the stronger lock waits for no other.
alter table aftercommit.outbox add constraint outbox_created_at_can_be_told check (
    created_at between '0001-01-01 00:00:00+00' and '9999-12-31 23:59:59.999999+00') not valid;

create trigger allowed_types after insert on aftercommit.outbox
    for each row execute function aftercommit.check_allowed();
alter table aftercommit.outbox disable trigger allowed_types;
