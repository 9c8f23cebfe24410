//! Whoever may create something in a schema of the search path plants functions, operators, types and relations with the names of
//! PostgreSQL's own, and a search path that finds them first. None of them is ever run with the rights of another role.

use aftercommit::config::Schema;
use aftercommit::operator;
use sqlx::PgPool;

use crate::stage::{Stage, server};
use crate::support::{Database, succeeded};
use crate::work::every_process_works;

/// Counts the call, whatever becomes of the transaction.
const TRAP: &str = "create schema planted;
    grant usage on schema planted to public;
    create sequence planted.caught;
    create function planted.trap(what text) returns boolean language plpgsql security definer set search_path = pg_catalog
    as $$ begin
        perform nextval('planted.caught');
        raise warning 'a look-alike was run: %', what;
        return true;
    end $$;";

/// A look-alike of each function and aggregate that can be written in PL/pgSQL, with the same arguments, and where those may
/// be of any type, with usual ones, which fit better.
const FUNCTIONS: &str = "do $do$
    declare
        f record;
        usual constant text[] := array['text', 'int4', 'int8', 'uuid', 'xid8', 'bytea', 'jsonb', 'timestamptz', 'text[]',
                                       'int4[]', 'int8[]', 'uuid[]', 'xid8[]', 'bytea[]', 'jsonb[]', 'timestamptz[]'];
    begin
        for f in
            select p.proname, pg_get_function_identity_arguments(p.oid) as arguments, p.proretset,
                   format_type(p.prorettype, null) as result
              from pg_proc p
             where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind in ('f', 'a')
               and not exists (select from unnest(p.proargtypes::oid[] || p.prorettype) as a(oid) join pg_type t using (oid)
                                where t.typtype = 'p' and t.typname <> 'record')
            union all
            select p.proname, u, p.proretset,
                   case when t.typtype <> 'p' then format_type(t.oid, null)
                        when t.typname = 'anyelement' then replace(u, '[]', '') else u end
              from pg_proc p join pg_type t on t.oid = p.prorettype
             cross join unnest(usual) as u
             where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind in ('f', 'a') and p.pronargs = 1
               and p.proargtypes[0] in (select oid from pg_type where typname like 'any%')
               and (t.typtype <> 'p' or t.typname like 'any%')
        loop
            begin
                execute format('create function planted.%I(%s) returns %s%s language plpgsql set search_path = pg_catalog
                                as $f$ begin perform planted.trap(%L); raise exception ''a look-alike''; end $f$',
                               f.proname, f.arguments, case when f.proretset then 'setof ' else '' end, f.result,
                               f.proname || '(' || f.arguments || ')');
            exception when others then
                continue;
            end;
        end loop;
    end $do$;";

/// A look-alike of each operator, and of those for any array.
const OPERATORS: &str = "do $do$
    declare
        o record;
        name text;
    begin
        for o in
            select oprname, format_type(oprleft, null) as l, format_type(oprright, null) as r,
                   format_type(oprresult, null) as result
              from pg_operator
             where oprnamespace = 'pg_catalog'::regnamespace and oprkind = 'b'
               and not exists (select from pg_type t where t.oid in (oprleft, oprright) and t.typtype = 'p')
            union all
            select oprname, u, u, format_type(oprresult, null)
              from pg_operator cross join unnest(array['text[]', 'int8[]', 'uuid[]', 'xid8[]']) as u
             where oprnamespace = 'pg_catalog'::regnamespace and oprleft = 'anyarray'::regtype and oprright = oprleft
               and oprresult <> oprleft
        loop
            name := 'trap_' || md5(o.l || ' ' || o.r || ' ' || o.result);
            begin
                execute format('create or replace function planted.%I(%s, %s) returns %s language plpgsql
                                set search_path = pg_catalog
                                as $f$ begin perform planted.trap(%L); raise exception ''a look-alike''; end $f$',
                               name, o.l, o.r, o.result, 'an operator of ' || o.l || ' and ' || o.r);
                execute format('create operator planted.%s (leftarg = %s, rightarg = %s, function = planted.%I)',
                               o.oprname, o.l, o.r, name);
            exception when others then
                continue;
            end;
        end loop;
    end $do$;";

/// Types that nothing can be cast to, and relations that count who reads them.
const NAMES: &str = "do $do$
    declare
        n text;
    begin
        for n in select relname from pg_class
                  where relnamespace = 'pg_catalog'::regnamespace and relkind in ('r', 'v')
        loop
            execute format('create view planted.%I as select planted.trap(%L) as trap', n, n);
        end loop;
        foreach n in array array['text', 'uuid', 'jsonb', 'bytea', 'xid8', 'pg_snapshot', 'timestamptz', 'name', 'oid',
                                 'int8', 'int4', 'float8', 'bool', 'regclass', 'regnamespace', 'regprocedure', 'regtype']
        loop
            execute format('create type planted.%I as (trap pg_catalog.int4)', n);
        end loop;
    end $do$;";

/// A database where somebody has planted all that. Only the role of the tests keeps a path of its own.
async fn planted() -> Database {
    let database = Database::empty().await;
    let (_, name) = database.config.url.rsplit_once('/').unwrap();
    database
        .execute(&format!(
            "alter role postgres in database {name} set search_path = pg_catalog, public;
             alter database {name} set search_path = planted, pg_catalog, public"
        ))
        .await;
    for sql in [TRAP, FUNCTIONS, OPERATORS, NAMES] {
        database.execute(sql).await;
    }
    let planted: (i64, i64) = sqlx::query_as(
        "select (select count(*) from pg_proc where pronamespace = 'planted'::regnamespace),
                (select count(*) from pg_operator where oprnamespace = 'planted'::regnamespace)",
    )
    .fetch_one(&database.pool().await)
    .await
    .unwrap();
    assert!(planted.0 > 2000 && planted.1 > 700, "{planted:?}");
    database
}

async fn caught(pool: &PgPool) -> bool {
    sqlx::query_scalar("select is_called from planted.caught").fetch_one(pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_look_alike_is_run_by_processes_or_administrators() {
    let stage = Stage::on(planted().await, server(None).await.unwrap()).await.provision().await;
    every_process_works(&stage).await;
    let reconciler = stage.run("aftercommit", "relay", "operator", &["doctor", "--role", "relay"]);
    assert!(!String::from_utf8_lossy(&reconciler.stdout).contains("look-alike"));
    assert!(!caught(&stage.database.pool().await).await, "a look-alike was run");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_look_alike_is_run_by_the_printed_script() {
    let database = planted().await;
    succeeded(database.psql(&format!(
        "set search_path = planted, pg_catalog, public;\n{}",
        operator::migrations_sql(&Schema::default())
    )));
    assert!(!caught(&database.pool().await).await, "a look-alike was run");
    assert_eq!(operator::migrate(&database.config).await.unwrap(), Vec::<String>::new());
}

/// The look-alikes are ones: who looks names up as they come runs them.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_not_pinned_runs_them() {
    let database = planted().await;
    let pool = database.pool().await;
    for sql in ["select unnest(array['1']::pg_catalog.text[])", "select 1 = 1", "select from pg_class"] {
        let answer = database.psql(&format!("set search_path = planted, pg_catalog, public;\n{sql}"));
        let caught: bool = caught(&pool).await;
        assert!(caught, "{sql}: {}", String::from_utf8_lossy(&answer.stderr));
        database.execute("select setval('planted.caught', 1, false)").await;
    }
}
