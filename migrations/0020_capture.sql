-- Capture: triggers that write an event for each changed row of a table, whoever changes it. docs/sql-contract.md is the
-- contract. What is installed is what the catalog says: one function for each table, in the table's schema, with the
-- settings as its comment. A dump has all of it, and there is no table beside it that could say something else.
--
-- Nobody waits for this migration: it makes functions and a view.

-- The same ids in less than half the time. The body is parsed here, so it needs no search path of its own and is inlined
-- into the statement that calls it.
create or replace function aftercommit.new_event_id() returns uuid
    language sql volatile parallel safe
    return (overlay(lpad(to_hex((date_part('epoch', clock_timestamp()) * 1000000)::bigint * 512 / 125), 15, '0')
                    placing '7' from 13 for 0)
            || '-' || right(gen_random_uuid()::text, 17))::uuid;

-- ------------------------------------------------------------------------------------ what triggers call

-- A payload of more bytes than the outbox takes, as the policy says: without its largest columns, without any, or refused.
create function aftercommit.capture_fit(payload text, oversize text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    most constant integer := 1000000;
    whole constant json := payload;
    changed constant text := coalesce(whole ->> 'changed', 'null');
    key_text text := coalesce(whole ->> 'key', 'null');
    frame text;
    new_text text;
    old_text text;
    truncated text[];
begin
    if oversize = 'fail' then
        raise exception 'an event of the table % has % bytes, and the outbox takes at most %',
            whole ->> 'table', octet_length(payload), most
            using errcode = 'program_limit_exceeded',
                  hint = 'Capture fewer columns, or with oversize => ''truncate-columns'' or ''key-only''.';
    end if;
    -- A key of this size is in the event's own key, as its hash.
    if octet_length(key_text) > most / 4 then
        key_text := 'null';
    end if;
    frame := format('{"op":%s,"table":%s,"key":%s,"new":null,"old":null,"changed":%s,"truncated":[]}',
                    whole -> 'op', whole -> 'table', key_text, changed);
    -- The largest columns go, and a column stays once those that are larger make room enough by going. Each has a colon and a
    -- comma where it stays, and a comma after its name where it goes.
    with member as (select * from json_each((whole ->> 'new')::json) union all select * from json_each((whole ->> 'old')::json)),
         size as (select key, octet_length(to_json(key)::text) + 1 as name, sum(octet_length(to_json(key)::text || value) + 2) as bytes
                    from member group by key),
         running as (select key, sum(bytes) over () - sum(bytes - name) over (order by bytes desc, key) + bytes - name as bytes from size)
    select coalesce(array_agg(key order by key)
                        filter (where oversize = 'key-only' or octet_length(frame) + bytes > most), '{}')
      into truncated from running;
    select '{' || string_agg(to_json(key)::text || ':' || value, ',') || '}' into new_text
      from json_each((whole ->> 'new')::json) where key <> all (truncated);
    select '{' || string_agg(to_json(key)::text || ':' || value, ',') || '}' into old_text
      from json_each((whole ->> 'old')::json) where key <> all (truncated);
    return format('{"op":%s,"table":%s,"key":%s,"new":%s,"old":%s,"changed":%s,"truncated":%s}',
                  whole -> 'op', whole -> 'table', key_text, coalesce(new_text, 'null'), coalesce(old_text, 'null'), changed,
                  array_to_json(truncated));
end
$$;

-- A value as a header can carry it: bytes other than printable ASCII, and then spaces and percent signs, percent-encoded.
create function aftercommit.capture_header(value text) returns text
    language sql immutable strict
    set search_path = pg_catalog, pg_temp
as $$
    select case when octet_length(coalesce(encoded, value)) > 512 then 'sha256:' || encode(sha256(convert_to(value, 'UTF8')), 'hex') else encoded end
      from (select case when octet_length(value) > 512 then null
                        when value ~ '^([!-$&-~]([ !-$&-~]*[!-$&-~])?)?$' then value
                        else (select string_agg(case when byte between 33 and 126 and byte <> 37 then chr(byte)
                                                     else '%' || upper(lpad(to_hex(byte), 2, '0')) end, '' order by at)
                                from generate_series(0, octet_length(value) - 1) as at,
                                     get_byte(convert_to(value, 'UTF8'), at) as byte)
                   end as encoded) as whole
$$;

-- ------------------------------------------------------------------------------- the text of a function

-- The type behind domains and arrays.
create function aftercommit.capture_base_type(type oid) returns oid
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    with recursive below(oid, depth) as (
        select type, 0
        union all
        select case when t.typtype = 'd' then t.typbasetype else t.typelem end, depth + 1
          from below join pg_type t on t.oid = below.oid
         where t.typtype = 'd' or (t.typcategory = 'A' and t.typlen = -1 and t.typelem <> 0)
    )
    select oid from below order by depth desc limit 1
$$;

-- Settings of the session that the text of such values depends on, as a function pins them. Not named here: types whose
-- JSON depends on none.
create function aftercommit.capture_pins(relation regclass, columns text[], as_text text[]) returns text[]
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    with pin(setting, types) as (values
             ('DateStyle=ISO, YMD', null),
             ('IntervalStyle=iso_8601', array['interval']),
             ('TimeZone=UTC', array['timestamptz']),
             ('bytea_output=hex', array['bytea']),
             ('extra_float_digits=1', array['float4', 'float8']),
             ('lc_monetary=C', array['money']),
             ('xmlbinary=base64', null)),
         used as (
             select case when t.typtype = 'e' then 'text' when t.typnamespace = 'pg_catalog'::regnamespace then t.typname else 'another' end as type,
                    a.attname = any (as_text) as as_text
               from pg_attribute a join pg_type t on t.oid = aftercommit.capture_base_type(a.atttypid)
              where a.attrelid = relation and a.attnum > 0 and a.attname = any (columns || as_text)),
         plain(types) as (values (array['bool', 'int2', 'int4', 'int8', 'numeric', 'text', 'varchar', 'bpchar', 'name', 'uuid', 'json', 'jsonb', 'oid', 'inet', 'cidr']))
    select array['search_path=pg_catalog, pg_temp'] || coalesce(array_agg(setting order by setting) filter (where
               exists (select from used, plain where type <> all (plain.types)
                          and (used.type = any (pin.types) or as_text
                               or type <> all (array['date', 'time', 'timestamp', 'timestamptz', 'interval', 'bytea', 'float4', 'float8', 'money'])))), '{}')
      from pin
$$;

-- How a changed value is told from an unchanged one: by the type's own equality, and by its text where there is none of
-- PostgreSQL's own that tells all values apart.
create function aftercommit.capture_differs(relation regclass, columns text[]) returns text[]
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select array_agg(case when t.typtype in ('e', 'r', 'm') or (t.typnamespace = 'pg_catalog'::regnamespace and coalesce(c.collisdeterministic, true)
                               and exists (select from pg_opclass o join pg_am m on m.oid = o.opcmethod and m.amname in ('btree', 'hash')
                                            where o.opcdefault and (o.opcintype = t.oid or exists (
                                                select from pg_cast b where b.castsource = t.oid and b.casttarget = o.opcintype
                                                                        and b.castmethod = 'b' and b.castcontext = 'i'))))
                          then format('old.%1$I is distinct from new.%1$I', a.attname)
                          else format('old.%1$I::text collate "C" is distinct from new.%1$I::text collate "C"', a.attname) end order by at)
      from unnest(columns) with ordinality as given(name, at)
      join pg_attribute a on a.attrelid = relation and a.attname = given.name and a.attnum > 0
      join pg_type t on t.oid = aftercommit.capture_base_type(a.atttypid)
      left join pg_collation c on c.oid = a.attcollation
$$;

-- Columns of a row under a name of their own, for row_to_json(): that takes any number and half the time of json_build_object().
create function aftercommit.capture_object(row_name text, columns text[], name text) returns text
    language sql immutable
    set search_path = pg_catalog, pg_temp
as $$
    select format('(select %s) as %I', string_agg(format('%s.%I', row_name, "column"), ', ' order by at), name)
      from unnest(columns) with ordinality as given("column", at)
$$;

-- The headers of an event: constants, and values of columns.
create function aftercommit.capture_headers(row_name text, headers jsonb) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select format('%L::jsonb', coalesce(jsonb_object_agg(key, aftercommit.capture_header(value #>> '{}'))
                                            filter (where jsonb_typeof(value) = 'string'), '{}'))
        || coalesce(' || jsonb_strip_nulls(jsonb_build_object('
               || string_agg(format('%L, aftercommit.capture_header(%s.%I::text)', key, row_name, value ->> 'column'), ', ' order by key)
                      filter (where jsonb_typeof(value) = 'object') || '))', '')
      from jsonb_each(headers)
$$;

-- The statement that writes the events of one operation: of all rows of a statement, or of one.
create function aftercommit.capture_insert(relation regclass, settings jsonb, op text, per text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    -- `new`, and of a deleted row `old`, are rows of the transition tables here and records of PL/pgSQL there.
    row_name constant text := case op when 'delete' then 'old' else 'new' end;
    keys constant text[] := array(select jsonb_array_elements_text(settings -> 'key'));
    columns constant text[] := array(select jsonb_array_elements_text(settings -> 'columns'));
    watch constant text[] := array(select jsonb_array_elements_text(settings -> 'watch'));
    pairs constant boolean := per = 'statement' and op = 'update';
    key text := format('%s.%I::text', row_name, keys[1]);
    new_object text := '''null''';
    old_object text := '''null''';
    changed text := '''null''';
    rows text[] := '{}';
begin
    if cardinality(keys) > 1 then
        key := format('json_build_array(%s)::text', (select string_agg(format('%s.%I', row_name, name), ', ' order by at)
                                                       from unnest(keys) with ordinality as k(name, at)));
    end if;
    if pairs then
        -- Both tables have their rows in the same order. A full join, because it never becomes a loop within a loop: the plan
        -- is kept, and may have been made for a statement with one row.
        rows := array['(select row_number() over () as "aftercommit row", r.* from new_rows as r) as new'
                      ' full join (select row_number() over () as "aftercommit row", r.* from old_rows as r) as old'
                      ' using ("aftercommit row")'];
    elsif per = 'statement' then
        rows := array[format('%s_rows as %1$s', row_name)];
    end if;
    rows := rows || aftercommit.capture_object(row_name, keys, 'key object');
    if op <> 'delete' then
        new_object := 'row_to_json("new object")::text';
        rows := rows || aftercommit.capture_object('new', columns, 'new object');
    end if;
    if op = 'delete' or (op = 'update' and (settings ->> 'old')::boolean) then
        old_object := 'row_to_json("old object")::text';
        rows := rows || aftercommit.capture_object('old', columns, 'old object');
    elsif op = 'update' then
        old_object := format('case when %s then row_to_json("old object")::text else ''null'' end',
                             array_to_string(aftercommit.capture_differs(relation, keys), ' or '));
        rows := rows || aftercommit.capture_object('old', keys, 'old object');
    end if;
    if op = 'update' then
        changed := (select format(E'''['' || substr(\n                %s, 2) || '']''',
                                  string_agg(format('case when %s then %L else '''' end', d, ',' || to_json(name)), E' ||\n                ' order by at))
                      from unnest(watch, aftercommit.capture_differs(relation, watch)) with ordinality as w(name, d, at));
    end if;
    -- PostgreSQL shows the statement beside an error. A hint of our own would cost a subtransaction for each write.
    return format($insert$    insert /* After a change of the table: select * from aftercommit.capture_check() */
      into aftercommit.outbox (event_id, type, key, headers, payload)
    select aftercommit.new_event_id(), %L,
           case when octet_length(key) > 512 then 'sha256:' || encode(sha256(convert_to(key, 'UTF8')), 'hex') else nullif(key, '') end,
           headers,
           convert_to(case when octet_length(payload) > 1000000 then aftercommit.capture_fit(payload, %L) else payload end, 'UTF8')
      from (
        select %s as key,
            %s as headers,
            %L || row_to_json("key object")::text
            || ',"new":' || %s
            || ',"old":' || %s
            || ',"changed":' || %s || '}' as payload%s
          from %s%s
        offset 0) as event%s;
$insert$,
        (settings ->> 'type') || case op when 'insert' then '.inserted' when 'update' then '.updated' else '.deleted' end,
        settings ->> 'oversize', key, aftercommit.capture_headers(row_name, settings -> 'headers'),
        format('{"op":"%s","table":%s,"key":', op, to_json(relation::text)), new_object, old_object, changed,
        case when pairs then ', "aftercommit row"' end, array_to_string(rows, E'\n         cross join lateral '),
        case op when 'update' then E'\n         where ' || array_to_string(aftercommit.capture_differs(relation, watch), E'\n            or ') end,
        case when pairs then E'\n     order by "aftercommit row"' end);
end
$$;

-- The body of a table's function.
create function aftercommit.capture_source(relation regclass, settings jsonb, per text) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    ops constant text[] := array(select jsonb_array_elements_text(settings -> 'on'));
    levels constant text[] := case when per = 'row' then '{row}' when (settings ->> 'always')::boolean then '{statement,row}' else '{statement}' end;
    source text := E'\n-- Made by aftercommit.capture(); to change it, call that again.\n#variable_conflict use_column\nbegin\n';
    branch text := 'if';
    op text;
    level text;
begin
    foreach level in array levels loop
        foreach op in array ops loop
            source := source || format(E'%s tg_level = %L and tg_op = %L then\n', branch, upper(level), upper(op))
                || aftercommit.capture_insert(relation, settings, op, level);
            branch := 'elsif';
        end loop;
    end loop;
    if 'delete' = any (ops) then
        source := source || format(
            E'elsif tg_op = ''TRUNCATE'' then\n    insert into aftercommit.outbox (event_id, type, headers, payload)\n'
            '    values (aftercommit.new_event_id(), %L, %s, convert_to(%L, ''UTF8''));\n',
            (settings ->> 'type') || '.truncated',
            aftercommit.capture_headers('old', (select coalesce(jsonb_object_agg(key, value), '{}') from jsonb_each(settings -> 'headers')
                                                 where jsonb_typeof(value) = 'string')),
            format('{"op":"truncate","table":%s,"key":null,"new":null,"old":null,"changed":null}', to_json(relation::text)));
    end if;
    return source || E'end if;\nreturn null;\nend\n';
end
$$;

-- ------------------------------------------------------------------------------------ what is installed

-- What the names of functions begin with, behind a `_`, and those of triggers, behind a `!`. That sorts before all names that
-- people give: a trigger of the table that changes the same row again fires behind ours, so that events of a row have the
-- order of its changes.
create function aftercommit.capture_prefix(first text) returns text
    language sql immutable
    set search_path = pg_catalog, pg_temp
as $$
    select first || case when length('aftercommit') <= 24 then 'aftercommit' else left(md5('aftercommit'), 24) end || '_capture_'
$$;

-- The settings of a function that captures; null of any other one.
create function aftercommit.capture_settings(function oid) returns jsonb
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    settings jsonb;
begin
    settings := (select obj_description(oid, 'pg_proc') from pg_proc
                  where oid = function and starts_with(proname, aftercommit.capture_prefix('_')) and prorettype = 'trigger'::regtype);
    return case when settings ? 'capture' then settings end;
exception when others then
    return null;
end
$$;

-- The function that captures a table: the one of its triggers, else one that has lost them.
create function aftercommit.capture_function(relation regclass) returns oid
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select p.oid
      from pg_proc p
      left join pg_trigger t on t.tgfoid = p.oid and not t.tgisinternal
     where starts_with(p.proname, aftercommit.capture_prefix('_')) and aftercommit.capture_settings(p.oid) is not null
       and (t.tgrelid = relation or (t.oid is null and aftercommit.capture_settings(p.oid) ->> 'table' = relation::text))
     order by t.oid nulls last limit 1
$$;

-- Row by row, or all rows of a statement at once, which is several times faster. Not at once, where a trigger on the table
-- would miss rows (partitions, children), or where another row trigger may change the rows again before.
create function aftercommit.capture_per(relation regclass) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when relkind = 'p' or exists (select from pg_inherits where inhrelid = relation)
                  or exists (select from pg_trigger
                              where tgrelid = relation and not tgisinternal and tgenabled in ('O', 'A') and tgtype & 67 = 1
                                and not starts_with(tgname, aftercommit.capture_prefix('!')))
                then 'row' else 'statement' end
      from pg_class where oid = relation
$$;

-- For which of both a function was made; null when for none.
create function aftercommit.capture_per_now(function oid) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when strpos(prosrc, 'tg_level = ''STATEMENT''') > 0 then 'statement' when strpos(prosrc, 'tg_level = ''ROW''') > 0 then 'row' end
      from pg_proc where oid = function
$$;

-- The columns of a table's primary key; empty when it has none.
create function aftercommit.capture_primary_key(relation regclass) returns text[]
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select array(select a.attname::text from pg_index i cross join lateral unnest(i.indkey::int2[]) with ordinality as k(attnum, at)
                   join pg_attribute a on a.attrelid = relation and a.attnum = k.attnum
                  where i.indrelid = relation and i.indisprimary order by k.at)
$$;

-- The call that captures a table as these settings say, with what is left of its columns; null where they are of no table.
create function aftercommit.capture_call_with(relation regclass, settings jsonb) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    with list as (
             select max(names) filter (where name = 'key') as key, max(names) filter (where name = 'columns') as columns,
                    max(names) filter (where name = 'watch') as watch, max(names) filter (where name = 'allow') as allow
               from (select name, array(select "column" from jsonb_array_elements_text(settings -> name) with ordinality as c("column", at)
                                         where exists (select from pg_attribute where attrelid = relation and attname = "column" and attnum > 0 and not attisdropped)
                                         order by at) as names
                       from unnest(array['key', 'columns', 'watch', 'allow']) as name) as lists)
    select 'select ' || 'aftercommit' || format('.capture(%L, type => %L', relation::text, settings ->> 'type')
        || case when (settings ->> 'primary')::boolean and aftercommit.capture_primary_key(relation) <> '{}' or key = '{}' then ''
                else format(', key => %L', (select string_agg(quote_ident(name), ', ' order by at) from unnest(key) with ordinality as k(name, at))) end
        || case when (settings ->> 'all')::boolean then '' else format(', columns => %L', columns) end
        || case when settings -> 'watch' = settings -> 'columns' then '' else format(', watch => %L', watch) end
        || case when (settings ->> 'old')::boolean then ', old => true' else '' end
        || case when settings -> 'headers' = '{}' then '' else format(', headers => %L', settings ->> 'headers') end
        || case when jsonb_array_length(settings -> 'on') = 3 then ''
                else format(', "on" => %L', array(select jsonb_array_elements_text(settings -> 'on'))) end
        || case when allow = '{}' then '' else format(', allow => %L', allow) end
        || case when settings ->> 'oversize' = 'truncate-columns' then '' else format(', oversize => %L', settings ->> 'oversize') end
        || case when (settings ->> 'always')::boolean then '' else ', always => false' end || ');'
      from list where relation is not null
$$;

-- The call that captures a table in the way in which it is captured; null when it is not.
create function aftercommit.capture_call(relation regclass) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select aftercommit.capture_call_with(relation, aftercommit.capture_settings(aftercommit.capture_function(relation)))
     where aftercommit.capture_function(relation) is not null
$$;

-- The partitions of a table that are captured by themselves: triggers of one name cannot come from the parent as well.
create function aftercommit.capture_partitions(relation regclass) returns regclass[]
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select array(select distinct tree.relid from pg_partition_tree(relation) as tree
                   join pg_trigger t on t.tgrelid = tree.relid and t.tgparentid = 0 and starts_with(t.tgname, aftercommit.capture_prefix('!'))
                  where tree.level > 0 order by tree.relid)
$$;

-- The triggers that a table has to have, each as PostgreSQL tells it, and when it fires.
create function aftercommit.capture_triggers(relation regclass, settings jsonb, per text, function regproc)
    returns table (name text, definition text, enabled "char")
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    with op(op, transition) as (
        select op, case op when 'insert' then ' REFERENCING NEW TABLE AS new_rows' when 'delete' then ' REFERENCING OLD TABLE AS old_rows'
                           else ' REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows' end
          from jsonb_array_elements_text(settings -> 'on') as op),
    wanted(suffix, event, rest, enabled) as (
        select op, upper(op), transition || ' FOR EACH STATEMENT', 'O' from op where per = 'statement'
        union all
        -- Row by row besides, for sessions that apply what another server sends: a statement's triggers do not fire there.
        select 'row', string_agg(upper(op), ' OR ' order by array_position('{insert,delete,update}', op)), ' FOR EACH ROW',
               case when not (settings ->> 'always')::boolean then 'O' when per = 'row' then 'A' else 'R' end
          from op where per = 'row' or (settings ->> 'always')::boolean having count(*) > 0
        union all
        select 'truncate', 'TRUNCATE', ' FOR EACH STATEMENT', case when (settings ->> 'always')::boolean then 'A' else 'O' end
          from op where op = 'delete')
    select aftercommit.capture_prefix('!') || suffix,
           format('CREATE TRIGGER %I AFTER %s ON %s%s EXECUTE FUNCTION %s()', aftercommit.capture_prefix('!') || suffix, event, relation, rest, function),
           enabled::"char"
      from wanted
$$;

-- Why a table cannot be captured; null when it can.
create function aftercommit.capture_refusal(relation regclass) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case
        when n.nspname = 'aftercommit' then 'it belongs to ' || 'aftercommit' || ' itself'
        when n.nspname in ('pg_catalog', 'information_schema', 'pg_toast') then 'it is a system table'
        when c.relkind = 'v' then 'it is a view: capture the tables behind it'
        when c.relkind = 'm' then 'it is a materialized view: capture the tables behind it'
        when c.relkind = 'f' then 'it is a foreign table: capture it where it is'
        when c.relkind not in ('r', 'p') then 'it is no table'
        when c.relpersistence = 't' then 'it is a temporary table'
        when c.relispartition then format('it is a partition: capture %s%s', root,
            case when exists (select from pg_trigger where tgrelid = c.oid and tgparentid = 0 and starts_with(tgname, aftercommit.capture_prefix('!')))
                 then format(', after select ' || 'aftercommit' || '.capture_remove(%L)', relation) end)
        when c.relkind = 'r' and exists (select from pg_inherits where inhparent = c.oid)
            then format('other tables inherit from it (%s), and triggers of a parent do not see their rows: capture those instead',
                        (select string_agg(inhrelid::regclass::text, ', ' order by inhrelid) from pg_inherits where inhparent = c.oid))
        else (select format('its column %I has a name that captures use themselves: rename it', min(attname)) from pg_attribute
               where attrelid = c.oid and attnum > 0 and not attisdropped
                 and attname in ('aftercommit row', 'key object', 'new object', 'old object') having count(*) > 0)
        end
      from pg_class c join pg_namespace n on n.oid = c.relnamespace
     cross join lateral (select case when c.relispartition then pg_partition_root(c.oid) end as root) as above
     where c.oid = relation
$$;

-- Which right the table's owner lacks, with whose rights the events are written; null when none.
create function aftercommit.capture_lacks(relation regclass) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select format('its owner %I may not %s: grant it the publisher role of roles.sql (grant aftercommit_publisher to %1$I)', r.rolname, lacks)
      from pg_class c join pg_roles r on r.oid = c.relowner
     cross join lateral (select case
            when not has_schema_privilege(r.oid, 'aftercommit', 'usage') then 'use the schema ' || 'aftercommit'
            when exists (select from unnest(array['event_id', 'type', 'key', 'headers', 'payload']) as name
                          where not has_column_privilege(r.oid, 'aftercommit.outbox', name, 'insert')) then 'insert into aftercommit.outbox'
            else (select 'call ' || string_agg(p.oid::regprocedure::text, ', ') from pg_proc p
                   where p.pronamespace = (select oid from pg_namespace where nspname = 'aftercommit')
                     and p.proname in ('new_event_id', 'capture_fit', 'capture_header')
                     and not has_function_privilege(r.oid, p.oid, 'execute'))
            end as lacks) as rights
     where c.oid = relation and lacks is not null
$$;

-- How what is installed differs from what the settings and the table's columns of now ask for.
create function aftercommit.capture_problems(relation regclass, function oid, settings jsonb) returns text[]
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    wanted constant text := aftercommit.capture_per(relation);
    per constant text := coalesce(aftercommit.capture_per_now(function), wanted);
    keys constant text[] := array(select jsonb_array_elements_text(settings -> 'key'));
    primary_key constant text[] := aftercommit.capture_primary_key(relation);
    named constant text[] := array(select distinct jsonb_array_elements_text(settings -> name) from unnest(array['columns', 'key', 'watch']) as name
                                   union select value ->> 'column' from jsonb_each(settings -> 'headers') where jsonb_typeof(value) = 'object');
    gone text[];
    found pg_proc;
    problems text[] := '{}';
begin
    if relation is null then
        return array[format('its table is gone: drop function %s', function::regprocedure)];
    end if;
    select * into found from pg_proc where oid = function;
    gone := array(select name from unnest(named) as name where not exists (
        select from pg_attribute where attrelid = relation and attname = name and attnum > 0 and not attisdropped));
    problems := array_remove(array[
        case when (settings -> 'capture') <> '1' then format('another version of aftercommit made it (%s)', settings -> 'capture') end,
        aftercommit.capture_refusal(relation), aftercommit.capture_lacks(relation),
        case when settings ->> 'table' <> relation::text
             then format('it was renamed from %s, and its events still have that name: call capture() again', settings ->> 'table') end,
        case when (settings ->> 'primary')::boolean and primary_key <> keys then format('its events have the key (%s), and %s', array_to_string(keys, ', '),
             case when primary_key = '{}' then 'it has no primary key any more: call capture() again with a key'
                  else format('its primary key is (%s) now: call capture() again', array_to_string(primary_key, ', ')) end) end,
        case when gone <> '{}' then format('it has no column %s any more, and a write to it may fail: call capture() again', array_to_string(gone, ', ')) end,
        case when found.proowner <> (select relowner from pg_class where oid = relation) then 'its function belongs to another role than the table' end,
        case when not found.prosecdef then 'its function is no longer security definer' end], null);
    if problems <> '{}' then
        return problems;
    end if;
    if per <> wanted then
        problems := array[case when per = 'row' then 'it has no row triggers any more: call capture() again, and its events are written faster'
            else coalesce((select format('a row trigger (%s) was added since: call capture() again, events of one row may be out of order until then',
                                         string_agg(tgname, ', ' order by tgname)) from pg_trigger
                            where tgrelid = relation and not tgisinternal and tgenabled in ('O', 'A') and tgtype & 67 = 1
                              and not starts_with(tgname, aftercommit.capture_prefix('!')) having count(*) > 0),
                          'it inherits from another table since: call capture() again') end];
    end if;
    if found.proconfig is distinct from aftercommit.capture_pins(relation, array(select jsonb_array_elements_text(settings -> 'columns')), named)
       or found.prosrc <> aftercommit.capture_source(relation, settings, per) then
        problems := problems || array['its function is not the one that the settings and the columns of now would make'];
    end if;
    return problems || array(
        select format('its trigger %s is %s', coalesce(t.tgname, w.name),
                      case when t.oid is null then 'gone' when w.name is null then 'not wanted'
                           when pg_get_triggerdef(t.oid) <> w.definition then 'another one'
                           when t.tgenabled = 'D' then 'disabled' else 'enabled in another way' end)
          from aftercommit.capture_triggers(relation, settings, per, function) as w
          full join (select * from pg_trigger where tgrelid = relation and starts_with(tgname, aftercommit.capture_prefix('!'))) as t on t.tgname = w.name
         where t.oid is null or w.name is null or pg_get_triggerdef(t.oid) <> w.definition or t.tgenabled <> w.enabled
            or exists (with recursive copy(oid, enabled) as (
                           select oid, tgenabled from pg_trigger where tgparentid = t.oid
                           union all select c.oid, c.tgenabled from copy join pg_trigger c on c.tgparentid = copy.oid)
                       select from copy where enabled <> w.enabled)
         order by 1);
end
$$;

-- All captures. No name is looked up: that would take rights on the table's schema.
create function aftercommit.capture_all() returns table (relation regclass, "table" text, function oid, signature text, settings jsonb)
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select t.relation, coalesce(t.relation::text, p.settings ->> 'table'), p.oid, p.oid::regprocedure::text, p.settings
      from (select oid, aftercommit.capture_settings(oid) as settings from pg_proc
             where starts_with(proname, aftercommit.capture_prefix('_')) and prorettype = 'trigger'::regtype) as p
     cross join lateral (select coalesce(
            (select min(tgrelid) from pg_trigger where tgfoid = p.oid and tgparentid = 0),
            (select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
              where format('%I.%I', n.nspname, c.relname) = p.settings ->> 'table'))::regclass as relation) as t
     where p.settings is not null
$$;

-- What is captured and how. Everybody sees it who may use the schema: it is in the catalog.
create view aftercommit.captures as
    select "table", settings ->> 'type' as type, settings -> 'key' as key,
           settings -> 'columns' as columns, settings -> 'watch' as watch, (settings ->> 'old')::boolean as old,
           settings -> 'headers' as headers, settings -> 'on' as "on", settings ->> 'oversize' as oversize,
           (settings ->> 'always')::boolean as always, (settings -> 'capture')::integer as version, signature as function,
           aftercommit.capture_call_with(relation, settings) as call
      from aftercommit.capture_all();

-- What to run where a capture is not as it should be; null where something else has to be done first, which the problem says.
create function aftercommit.capture_remedy(relation regclass, function oid, settings jsonb) returns text
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when relation is null then format('drop function %s;', function::regprocedure)
                when relispartition then format('select ' || 'aftercommit' || '.capture_remove(%L);', relation)
                     || coalesce(' ' || case when aftercommit.capture_function(root) is null then aftercommit.capture_call_with(root, settings) end, '')
                when aftercommit.capture_refusal(relation) is null and aftercommit.capture_lacks(relation) is null
                     then aftercommit.capture_call_with(relation, settings) end
      from (select) as one left join pg_class c on c.oid = relation
     cross join lateral (select case when relispartition then pg_partition_root(relation) end as root) as above
$$;

-- Compares every capture with its table.
create function aftercommit.capture_check() returns table ("table" text, ok boolean, problems text[], notes text[], remedy text)
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select c."table", p.problems = '{}', p.problems,
           array(select format('its column %s came later and is not captured: call capture() again to have it', a.attname) from pg_attribute a
                  where (c.settings ->> 'all')::boolean and a.attrelid = c.relation and a.attnum > 0 and not a.attisdropped
                    and a.attgenerated = '' and not c.settings -> 'columns' ? a.attname order by a.attnum),
           case when p.problems <> '{}' then aftercommit.capture_remedy(c.relation, c.function, c.settings) end
      from aftercommit.capture_all() as c
     cross join lateral aftercommit.capture_problems(c.relation, c.function, c.settings) as p(problems)
     order by 1
$$;

-- ---------------------------------------------------------------------------------- install and remove

-- Column names out of a text: one name as it is, or SQL identifiers separated by commas. Null when it is neither.
create function aftercommit.capture_names(relation regclass, list text) returns text[]
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when exists (select from pg_attribute where attrelid = relation and attname = list and attnum > 0 and not attisdropped) then array[list]
                when list ~ '^\s*("([^"]|"")+"|[^",\s][^",]*)\s*(,\s*("([^"]|"")+"|[^",\s][^",]*)\s*)*$'
                then array(select case when starts_with(name, '"') then replace(substr(name, 2, length(name) - 2), '""', '"') else lower(name) end
                             from regexp_matches(list, '"(?:[^"]|"")+"|[^",]+', 'g') as part, trim(part[1]) as name where name <> '') end
$$;

-- The settings of a capture, checked and complete.
create function aftercommit.capture_checked(
    relation regclass, type text, key text, columns text[], watch text[], old boolean, headers jsonb, ops text[], allow text[],
    oversize text, always boolean) returns jsonb
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    -- Of a name in small letters, with a `_` before each word of camelCase.
    secret constant text := '(passw(or)?d|passphrase|secret|token(?!i[sz])|credential|api_?key|private_?key|access_?key|card_?number|credit_?card)'
                            '|(^|[^a-z])(pwd|ssn|cvv|cvc|pin|otp|salt|hash|iban)([^a-z]|$)';
    invalid constant text := 'invalid_parameter_value';
    all_columns constant text[] := array(select attname from pg_attribute where attrelid = relation and attnum > 0 and not attisdropped order by attnum);
    generated constant text[] := array(select attname from pg_attribute where attrelid = relation and attnum > 0 and attgenerated <> '');
    keys text[] := aftercommit.capture_names(relation, key);
    chosen text[] := columns;
    watched text[] := watch;
    named text[];
    wrong text;
begin
    if relation is null then
        raise exception 'the table to capture is null' using errcode = invalid, hint = 'capture(''public.orders'', type => ''order'')';
    end if;
    wrong := (select string_agg(name, ', ') from (values ('columns', array_ndims(columns)), ('watch', array_ndims(watch)),
                                                         ('"on"', array_ndims(ops)), ('allow', array_ndims(allow))) as list(name, dimensions)
               where dimensions > 1);
    if wrong is not null then
        raise exception 'arrays within an array are not understood in % for %', wrong, relation using errcode = invalid,
            hint = 'Give names: columns => ''{id,state}''.';
    end if;
    chosen := coalesce(chosen, array(select name from unnest(all_columns) as name where name <> all (generated)));
    watched := coalesce(watched, chosen);
    wrong := aftercommit.capture_refusal(relation);
    if wrong is not null then
        raise exception 'the table % cannot be captured: %', relation, wrong using errcode = 'wrong_object_type';
    end if;
    if aftercommit.capture_partitions(relation) <> '{}' then
        raise exception 'the table % cannot be captured: its partition % is captured by itself', relation,
            array_to_string(aftercommit.capture_partitions(relation), ', ') using errcode = 'wrong_object_type',
            hint = (select string_agg(format('select ' || 'aftercommit' || '.capture_remove(%L);', partition), ' ')
                      from unnest(aftercommit.capture_partitions(relation)) as partition);
    end if;
    if not pg_has_role(current_user, (select relowner from pg_class where oid = relation), 'usage') then
        raise exception 'the table % cannot be captured by %, who does not own it', relation, current_user using errcode = 'insufficient_privilege';
    end if;
    if not has_schema_privilege((select relnamespace from pg_class where oid = relation), 'create') then
        raise exception 'the table % cannot be captured by %, who may not make functions in its schema', relation, current_user
            using errcode = 'insufficient_privilege', hint = 'Grant create on the schema, or let a superuser do it.';
    end if;
    wrong := aftercommit.capture_lacks(relation);
    if wrong is not null then
        raise exception 'the table % cannot be captured: %', relation, wrong using errcode = 'insufficient_privilege';
    end if;
    if octet_length(type) > 190 or type !~ '^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$' or type is null then
        raise exception 'the type % cannot be that of events of %', quote_nullable(type), relation using errcode = invalid,
            hint = 'A type has tokens of A-Z a-z 0-9 _ -, separated by dots, and at most 190 bytes.';
    end if;
    if ops is null or cardinality(ops) = 0 or exists (select from unnest(ops) as op where coalesce(op, '') not in ('insert', 'update', 'delete')) then
        raise exception 'the operations % of % are not known', ops, relation using errcode = invalid,
            hint = 'Give some of insert, update and delete: "on" => ''{insert,delete}''.';
    end if;
    if oversize is null or oversize not in ('fail', 'truncate-columns', 'key-only') then
        raise exception 'the policy % for events of % that are too large is not known', quote_nullable(oversize), relation using errcode = invalid,
            hint = 'Give fail, truncate-columns or key-only.';
    end if;
    if key is null then
        keys := aftercommit.capture_primary_key(relation);
    elsif keys is null then
        raise exception 'the key % of events of % is not understood', quote_literal(key), relation using errcode = invalid,
            hint = 'key => ''column'', or key => ''column, another''';
    end if;
    if cardinality(keys) = 0 then
        raise exception 'the table % has no primary key, so the key of its events must be named', relation using errcode = invalid,
            hint = 'key => ''column'', or key => ''column, another''';
    end if;
    if old is null or always is null then
        raise exception 'old and always must be true or false for %', relation using errcode = invalid;
    end if;
    wrong := aftercommit.capture_wrong_header(headers);
    if wrong is not null then
        raise exception 'the headers of events of % are not right: %', relation, wrong using errcode = invalid,
            hint = 'headers => ''{"origin": "billing", "tenant-id": {"column": "tenant_id"}}''';
    end if;
    named := array(select unnest(keys || chosen || watched) union
                   select value ->> 'column' from jsonb_each(headers) where jsonb_typeof(value) = 'object');
    wrong := (select string_agg(distinct coalesce(name, 'null'), ', ') from unnest(named || allow) as name where name is null or name <> all (all_columns));
    if wrong is not null then
        raise exception 'the table % has no column %', relation, wrong using errcode = 'undefined_column';
    end if;
    wrong := (select coalesce(min(name), '') from (select name from unnest(chosen) as name group by name having count(*) > 1
                                     union select name from unnest(keys) as name group by name having count(*) > 1) as twice);
    if wrong <> '' then
        raise exception 'the column % of % is named twice', wrong, relation using errcode = invalid;
    end if;
    wrong := (select string_agg(name, ', ') from unnest(named) as name where name = any (generated));
    if wrong is not null then
        raise exception 'the column % of % is generated and cannot be captured', wrong, relation using errcode = invalid,
            hint = 'Capture the columns that it is made of.';
    end if;
    wrong := (select string_agg(name, ', ' order by name) from unnest(named) as name where lower(regexp_replace(name, '([a-z0-9])([A-Z])', '\1_\2', 'g')) ~ secret and name <> all (coalesce(allow, '{}')));
    if wrong is not null then
        raise exception 'the column % of % looks like a secret', wrong, relation using errcode = invalid,
            hint = format('Choose the columns without it, columns => array[...], or allow it: allow => %L.', string_to_array(wrong, ', '));
    end if;
    if 'update' = any (ops) and cardinality(watched) = 0 then
        raise exception 'no column of % is watched, so no update would be published', relation using errcode = invalid,
            hint = 'Name columns in watch, or take update out of "on".';
    end if;
    return jsonb_build_object('capture', 1, 'table', relation::text, 'type', type, 'key', keys, 'primary', key is null, 'columns', chosen, 'all', columns is null,
        'watch', watched, 'old', old, 'headers', headers, 'allow', coalesce(allow, '{}'), 'oversize', oversize, 'always', always,
        'on', array(select op from unnest(array['insert', 'update', 'delete']) as op where op = any (ops)));
end
$$;

-- What is wrong with headers; null when nothing is.
create function aftercommit.capture_wrong_header(headers jsonb) returns text
    language plpgsql immutable
    set search_path = pg_catalog, pg_temp
as $$
declare
    wrong text;
    most integer;
begin
    if headers is null or jsonb_typeof(headers) <> 'object' then
        return 'they are an object of names and values';
    end if;
    select format('the name %s is not legal, or reserved', quote_literal(key)) into wrong
      from jsonb_object_keys(headers) as key where key !~ '^[A-Za-z0-9_-]+$' or key ~* '^(nats|ce|aftercommit)-' limit 1;
    if wrong is not null then
        return wrong;
    end if;
    select format('the value of %s is neither a text nor {"column": "..."}', key) into wrong from jsonb_each(headers) as h(key, value)
     where jsonb_typeof(value) <> 'string'
       and (jsonb_typeof(value) <> 'object' or jsonb_typeof(value -> 'column') is distinct from 'string' or value - 'column' <> '{}') limit 1;
    if wrong is not null then
        return wrong;
    end if;
    -- A column's value takes up to 512 bytes, and the outbox takes 16,384 for all.
    select sum(octet_length(key) + 6 + case when jsonb_typeof(value) = 'object' then 1024 else octet_length(value::text) end) into most
      from jsonb_each(headers) as h(key, value);
    return case when most > 16384 then 'they may take more bytes than the outbox allows; name fewer' end;
end
$$;

-- Publishes changes of a table as events, from now on. Called again, it does nothing when all is as it was asked for, and
-- otherwise replaces what is there. Returns what it did: installed, replaced or unchanged.
create function aftercommit.capture(
    relation regclass, type text, key text default null, columns text[] default null, watch text[] default null,
    old boolean default false, headers jsonb default '{}', "on" text[] default '{insert,update,delete}', allow text[] default '{}',
    oversize text default 'truncate-columns', always boolean default true) returns text
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    settings jsonb := aftercommit.capture_checked(relation, type, key, columns, watch, old, headers, "on", allow, oversize, always);
    function oid := aftercommit.capture_function(relation);
    existed boolean;
    per text;
    wanted record;
begin
    if aftercommit.capture_settings(function) = settings and aftercommit.capture_problems(relation, function, settings) = '{}' then
        return 'unchanged';
    end if;
    -- From here on nobody writes to the table and nobody else captures it; what is there is looked up again.
    execute format('lock table %s in share row exclusive mode', relation);
    settings := aftercommit.capture_checked(relation, type, key, columns, watch, old, headers, "on", allow, oversize, always);
    function := aftercommit.capture_function(relation);
    existed := function is not null;
    if existed and aftercommit.capture_settings(function) = settings and aftercommit.capture_problems(relation, function, settings) = '{}' then
        return 'unchanged';
    end if;
    per := aftercommit.capture_per(relation);
    function := aftercommit.capture_make_function(relation, function, settings, per);
    for wanted in
        select t.tgname as old_name, t.tgenabled as old_enabled, w.*, pg_get_triggerdef(t.oid) is not distinct from w.definition as same
          from aftercommit.capture_triggers(relation, settings, per, function) as w
          full join (select * from pg_trigger where tgrelid = relation and starts_with(tgname, aftercommit.capture_prefix('!'))) as t on t.tgname = w.name
    loop
        if wanted.old_name is not null and not wanted.same then
            execute format('drop trigger %I on %s', wanted.old_name, relation);
        end if;
        if wanted.name is not null and not wanted.same then
            execute wanted.definition;
        end if;
        if wanted.name is not null then
            execute format('alter table %s enable %s trigger %I', relation,
                           case wanted.enabled when 'A' then 'always' when 'R' then 'replica' else '' end, wanted.name);
        end if;
    end loop;
    return case when existed then 'replaced' else 'installed' end;
end
$$;

-- Makes or replaces the function of a table. It writes the outbox with the rights of the table's owner.
create function aftercommit.capture_make_function(relation regclass, existing oid, settings jsonb, per text) returns oid
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    place constant regnamespace := coalesce((select pronamespace from pg_proc where oid = existing),
                                            (select relnamespace from pg_class where oid = relation));
    owner constant regrole := (select relowner from pg_class where oid = relation);
    named constant text[] := array(select jsonb_array_elements_text(settings -> 'key')
                                   union select jsonb_array_elements_text(settings -> 'watch')
                                   union select value ->> 'column' from jsonb_each(settings -> 'headers') where jsonb_typeof(value) = 'object');
    pins constant text[] := aftercommit.capture_pins(relation, array(select jsonb_array_elements_text(settings -> 'columns')), named);
    name text := (select proname from pg_proc where oid = existing);
    function text;
    number integer := 1;
begin
    -- Up to 24 bytes of the table's name, cut at a character.
    name := coalesce(name, aftercommit.capture_prefix('_') || (
        select max(left(relname, n)) filter (where octet_length(left(relname, n)) <= 24) from pg_class, generate_series(1, 24) as n where oid = relation));
    while existing is null and exists (select from pg_proc where pronamespace = place and proname = name || coalesce('_' || nullif(number, 1), '')) loop
        number := number + 1;
    end loop;
    function := format('%s.%I', place, name || coalesce('_' || nullif(number, 1), ''));
    execute format('create or replace function %s() returns trigger language plpgsql volatile security definer %s as %L', function,
                   (select string_agg(format('set %s = %s', split_part(pin, '=', 1),
                        case when starts_with(pin, 'search_path') then split_part(pin, '=', 2) else quote_literal(split_part(pin, '=', 2)) end), ' ')
                      from unnest(pins) as pin),
                   aftercommit.capture_source(relation, settings, per));
    execute format('revoke all on function %s() from public', function);
    execute format('comment on function %s() is %L', function, settings);
    if (select proowner from pg_proc where oid = to_regprocedure(function || '()')) <> owner then
        execute format('alter function %s() owner to %s', function, owner);
    end if;
    return to_regprocedure(function || '()');
end
$$;

-- Captures a table no longer. Events that are in the outbox stay. Returns whether it was captured.
create function aftercommit.capture_remove(relation regclass) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    function constant oid := aftercommit.capture_function(relation);
    name text;
begin
    for name in select tgname from pg_trigger where tgrelid = relation and tgparentid = 0 and starts_with(tgname, aftercommit.capture_prefix('!')) loop
        execute format('drop trigger %I on %s', name, relation);
    end loop;
    if function is not null then
        execute format('drop function %s', function::regprocedure);
    end if;
    return function is not null;
end
$$;
