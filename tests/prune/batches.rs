//! One pruning in a transaction: what the original's tests say, and what it did wrong.

use aftercommit::prune::{Condition, Prune, PruneErrorKind, Pruned};
use chrono::{Duration, Utc};
use sqlx::{PgTransaction, Row};

use crate::sessions::{Sessions, bare, whole};
use crate::support::SOON;

async fn committed(sessions: &Sessions, prune: Prune<'_>) -> Pruned {
    let mut tx = sessions.pool.begin().await.unwrap();
    let pruned = prune.run(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    pruned
}

#[tokio::test(flavor = "multi_thread")]
async fn terminal_rows_go_and_are_returned() {
    let sessions = Sessions::new().await;
    let pruned = committed(&sessions, Prune::of(&whole())).await;
    assert_eq!(pruned.count, 5);
    assert_eq!(pruned.ids, ["1", "2", "3", "4", "5"], "by the time at which they ended");
    assert_eq!(pruned.children["public.kernels"], 10);
    assert_eq!(pruned.associations["public.associations"], 5);
    assert_eq!(sessions.count("sessions where status = 'active'").await, 3);
    assert_eq!(sessions.count("sessions").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_finished_is_nothing_pruned() {
    let sessions = Sessions::new().await;
    sessions.database.execute("update sessions set status = 'active'").await;
    assert_eq!(committed(&sessions, Prune::of(&whole())).await, Pruned::default());
    sessions.database.execute("truncate sessions cascade").await;
    assert_eq!(committed(&sessions, Prune::of(&whole())).await, Pruned::default(), "an empty table");
    assert_eq!(sessions.told().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_of_the_caller_only_narrows() {
    let sessions = Sessions::new().await;
    let spec = whole();
    let cutoff = Utc::now() - Duration::hours(1);
    let old = Condition::new("terminated_at < $1").bind(cutoff);
    assert_eq!(committed(&sessions, Prune::of(&spec).only(old)).await.ids, ["1", "2", "3"]);
    for wide in ["true or status = 'active'", "status = 'active'"] {
        committed(&sessions, Prune::of(&spec).only(Condition::new(wide))).await;
        assert_eq!(sessions.count("sessions where status = 'active'").await, 3, "{wide}");
    }
    let mut tx = sessions.pool.begin().await.unwrap();
    let error = Prune::of(&spec).only(Condition::new("true) or (true")).run(&mut tx).await.unwrap_err();
    assert_eq!(error.kind(), PruneErrorKind::Spec, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_two_conditions_do_not_mix() {
    let sessions = Sessions::new().await;
    let (first, second) =
        (Condition::new("id > $1").bind(1_i64), Condition::new("id < $1 or id = $2").bind(3_i64).bind(5_i64));
    let pruned = committed(&sessions, Prune::of(&whole()).only(first).only(second).before(Utc::now())).await;
    assert_eq!(pruned.ids, ["2", "5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn before_goes_by_the_column_and_null_is_never_before() {
    let sessions = Sessions::new().await;
    sessions.database.execute("update sessions set terminated_at = null where id = 1").await;
    let spec = whole();
    assert_eq!(committed(&sessions, Prune::of(&spec).before(Utc::now() - Duration::hours(1))).await.ids, ["2", "3"]);
    assert_eq!(
        committed(&sessions, Prune::of(&spec)).await.ids,
        ["4", "5", "1"],
        "without a time it is finished all the same"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_caps_and_repeated_calls_drain() {
    let sessions = Sessions::new().await;
    let spec = whole();
    let mut counts = Vec::new();
    loop {
        let pruned = committed(&sessions, Prune::of(&spec).limit(2)).await;
        counts.push((pruned.count, sessions.count("sessions").await));
        if !pruned.more {
            break;
        }
    }
    assert_eq!(counts, [(2, 6), (2, 4), (1, 3)]);
    let narrow = whole().limit(1);
    sessions.database.execute("update sessions set status = 'terminated'").await;
    assert_eq!(committed(&sessions, Prune::of(&narrow).limit(50)).await.count, 1, "the spec's limit stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn children_of_live_parents_stay() {
    let sessions = Sessions::new().await;
    committed(&sessions, Prune::of(&whole())).await;
    assert_eq!(sessions.count("kernels").await, 6);
    assert_eq!(sessions.count("kernels k join sessions s on s.id = k.session_id where s.status = 'active'").await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_child_is_a_typed_error_and_nothing_goes() {
    let sessions = Sessions::new().await;
    let spec = whole();
    let mut tx = sessions.pool.begin().await.unwrap();
    let error = Prune::of(&spec).without_children().run(&mut tx).await.unwrap_err();
    assert_eq!(error.kind(), PruneErrorKind::ForeignKey);
    assert_eq!((error.constraint(), error.table()), (Some("kernels_session_id_fkey"), Some("kernels")));
    assert!(error.to_string().contains("name the table that still refers to it as a child"), "{error}");
    // The transaction goes on, and what was done in it before stays.
    sqlx::query("insert into sessions values (9, 'active')").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((sessions.count("sessions").await, sessions.count("associations").await), (9, 16));
    assert_eq!(sessions.told().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_a_childs_own_children_is_typed_too() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute("create table logs (id int primary key, kernel bigint constraint of_kernel references kernels)")
        .await;
    sessions.database.execute("insert into logs values (1, 1)").await;
    let mut tx = sessions.pool.begin().await.unwrap();
    let error = Prune::of(&whole()).run(&mut tx).await.unwrap_err();
    assert_eq!((error.kind(), error.constraint()), (PruneErrorKind::ForeignKey, Some("of_kernel")));
    for (trigger, kind) in [
        ("raise exception 'no' using errcode = 'check_violation', constraint = 'c'", PruneErrorKind::Check),
        ("raise exception 'no' using errcode = 'unique_violation', constraint = 'c'", PruneErrorKind::Unique),
        ("raise exception 'no' using errcode = 'not_null_violation', constraint = 'c'", PruneErrorKind::NotNull),
        ("raise exception 'no' using errcode = 'exclusion_violation', constraint = 'c'", PruneErrorKind::Exclusion),
        ("raise exception 'no' using errcode = 'deadlock_detected', constraint = 'c'", PruneErrorKind::Busy),
        ("raise exception 'no' using constraint = 'c'", PruneErrorKind::Database),
    ] {
        let sql = format!(
            "create or replace function refuse() returns trigger language plpgsql as $$ begin {trigger}; end $$;
             create or replace trigger refuse before delete on kernels for each row execute function refuse();
             delete from logs"
        );
        sessions.database.execute(&sql).await;
        let error = Prune::of(&whole()).run(&mut sessions.pool.begin().await.unwrap()).await.unwrap_err();
        assert_eq!((error.kind(), error.constraint()), (kind, Some("c")), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn associations_go_by_type_and_only_when_asked() {
    let sessions = Sessions::new().await;
    let (with, without) = (whole(), bare().child(aftercommit::prune::Child::new("kernels", "session_id")));
    let first = Condition::new("id = 1");
    assert_eq!(committed(&sessions, Prune::of(&with).without_associations().only(first)).await.associations.len(), 0);
    assert_eq!(sessions.count("associations").await, 16, "off");
    committed(&sessions, Prune::of(&without).only(Condition::new("id = 2"))).await;
    assert_eq!(sessions.count("associations").await, 16, "the spec has none");
    committed(&sessions, Prune::of(&with)).await;
    assert_eq!(sessions.count("associations where entity_type = 'session'").await, 5);
    assert_eq!(sessions.count("associations where entity_type = 'vfolder'").await, 8, "another type with the same ids");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_levels_go_from_the_bottom_and_are_counted() {
    use aftercommit::prune::Child;
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table \"Läufe, neu\" (a int, b int, kernel bigint references kernels, primary key (a, b));
             create table notes (id serial primary key, run_a int, run_b int, foreign key (run_a, run_b) references \"Läufe, neu\");
             insert into \"Läufe, neu\" select n, n, n from generate_series(1, 16) n;
             create table by_name (kernel_name text)",
        )
        .await;
    sessions
        .database
        .execute("update kernels set name = 'k' || id; insert into by_name select name from kernels")
        .await;
    let spec = bare().child(
        Child::new("kernels", "session_id")
            .child(Child::new("\"Läufe, neu\"", "kernel"))
            .child(Child::new("by_name", "kernel_name").references("name")),
    );
    let pruned = committed(&sessions, Prune::of(&spec)).await;
    let counts: Vec<(&str, u64)> = pruned.children.iter().map(|(table, count)| (table.as_str(), *count)).collect();
    assert_eq!(counts, [("public.Läufe, neu", 10), ("public.by_name", 10), ("public.kernels", 10)]);
    assert_eq!((sessions.count("\"Läufe, neu\"").await, sessions.count("by_name").await), (6, 6));
}

/// The pid that a transaction has, to ask who waits for whom.
async fn pid(tx: &mut PgTransaction<'_>) -> i32 {
    sqlx::query("select pg_backend_pid()").fetch_one(&mut **tx).await.unwrap().get(0)
}

async fn waits(sessions: &Sessions, pid: i32) -> bool {
    let sql = "select cardinality(pg_blocking_pids($1)) > 0";
    sqlx::query_scalar(sql).bind(pid).fetch_one(&sessions.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_becomes_alive_while_it_is_waited_for_stays() {
    let sessions = Sessions::new().await;
    let mut revives = sessions.pool.begin().await.unwrap();
    sqlx::query("update sessions set status = 'active' where id = 2").execute(&mut *revives).await.unwrap();
    let mut tx = sessions.pool.begin().await.unwrap();
    let pid = pid(&mut tx).await;
    let pruning = tokio::spawn(async move {
        let pruned = Prune::of(&whole()).run(&mut tx).await.unwrap();
        tx.commit().await.unwrap();
        pruned
    });
    aftercommit::testing::eventually(SOON, "it waits for the row", async || waits(&sessions, pid).await).await.unwrap();
    revives.commit().await.unwrap();
    assert_eq!(pruning.await.unwrap().ids, ["1", "3", "4", "5"]);
    assert_eq!(sessions.count("kernels where session_id = 2").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_comes_during_it_waits_and_is_refused() {
    let sessions = Sessions::new().await;
    let mut tx = sessions.pool.begin().await.unwrap();
    Prune::of(&whole()).run(&mut tx).await.unwrap();
    let mut other = sessions.pool.begin().await.unwrap();
    let pid = pid(&mut other).await;
    let inserting =
        tokio::spawn(
            async move { sqlx::query("insert into kernels values (100, 1)").execute(&mut *other).await.map(drop) },
        );
    aftercommit::testing::eventually(SOON, "it waits for the parent", async || waits(&sessions, pid).await)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let error = inserting.await.unwrap().unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "23503");
}

/// The original locks without SKIP LOCKED (D19): the second pruner waits for the first.
#[tokio::test(flavor = "multi_thread")]
async fn two_pruners_take_disjoint_batches_at_once() {
    let sessions = Sessions::new().await;
    let spec = whole();
    let (mut one, mut two) = (sessions.pool.begin().await.unwrap(), sessions.pool.begin().await.unwrap());
    let original = "select id from sessions where status = 'terminated' order by terminated_at limit 2 for update";
    sqlx::query(original).fetch_all(&mut *one).await.unwrap();
    sqlx::query("set local lock_timeout = '200ms'").execute(&mut *two).await.unwrap();
    let error = sqlx::query(original).fetch_all(&mut *two).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().unwrap(), "55P03", "the original waits");
    drop((one, two));
    let (mut one, mut two) = (sessions.pool.begin().await.unwrap(), sessions.pool.begin().await.unwrap());
    let first = Prune::of(&spec).limit(2).skip_locked().run(&mut one).await.unwrap();
    let second = Prune::of(&spec).skip_locked().run(&mut two).await.unwrap();
    assert_eq!((first.ids, second.ids), (vec!["1".into(), "2".into()], vec!["3".into(), "4".into(), "5".into()]));
    two.commit().await.unwrap();
    one.commit().await.unwrap();
    assert_eq!(sessions.count("sessions").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_is_told_to_try_again() {
    let sessions = Sessions::new().await;
    let mut holds = sessions.pool.begin().await.unwrap();
    sqlx::query("select from kernels where id = 1 for update").execute(&mut *holds).await.unwrap();
    let mut tx = sessions.pool.begin().await.unwrap();
    sqlx::query("set local lock_timeout = '100ms'").execute(&mut *tx).await.unwrap();
    let error = Prune::of(&whole()).skip_locked().run(&mut tx).await.unwrap_err();
    assert_eq!(error.kind(), PruneErrorKind::Busy, "{error}");
    tx.commit().await.unwrap();
    assert_eq!(sessions.count("sessions").await, 8);
}

/// Otherwise its children would be gone, and the row would stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_kept_refuses_the_batch() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create function keep() returns trigger language plpgsql as $$ begin
                 if old.id = 3 then return null; end if; return old; end $$;
             create trigger keep before delete on sessions for each row execute function keep()",
        )
        .await;
    let mut tx = sessions.pool.begin().await.unwrap();
    let error = Prune::of(&whole()).run(&mut tx).await.unwrap_err();
    assert_eq!(error.kind(), PruneErrorKind::Kept);
    assert!(
        error.to_string().contains("1 rows of public.sessions were kept") && error.to_string().contains("such as 3"),
        "{error}"
    );
    tx.commit().await.unwrap();
    assert_eq!(
        (sessions.count("sessions").await, sessions.count("kernels").await, sessions.told().await.len()),
        (8, 16, 0)
    );
    assert_eq!(committed(&sessions, Prune::of(&whole()).without(["3"])).await.ids, ["1", "2", "4", "5"]);
}

/// A foreign key may refer to another column than the primary key: then that is what is compared.
#[tokio::test(flavor = "multi_thread")]
async fn children_go_by_the_column_that_their_foreign_key_names() {
    use aftercommit::prune::{Child, Spec};
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table fp (id int primary key, code int unique, done bool);
             create table fc (id int primary key, code int references fp (code));
             insert into fp values (1, 2, true), (2, 3, false), (3, 1, false); insert into fc values (10, 2), (11, 3), (12, 1)",
        )
        .await;
    let spec = Spec::new("fp", "done").child(Child::new("fc", "code"));
    let pruned = committed(&sessions, Prune::of(&spec)).await;
    assert_eq!((pruned.ids, pruned.children["public.fc"]), (vec!["1".to_string()], 1));
    assert_eq!((sessions.count("fp").await, sessions.count("fc where id in (11, 12)").await), (2, 2));
}

/// A column without a time zone means nothing until somebody says in which one it is written.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_without_a_zone_is_compared_as_a_clock_there_shows_it() {
    use aftercommit::prune::Spec;
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table la (id int primary key, ts timestamp, day date);
             insert into la select n, (now() at time zone 'America/Los_Angeles') - n * interval '1 hour',
                                   ((now() - n * interval '1 day') at time zone 'America/Los_Angeles')::date
               from generate_series(0, 5) n",
        )
        .await;
    let spec = |column: &str| Spec::new("la", "true").before_column(column);
    for column in ["ts", "day"] {
        let error = Prune::of(&spec(column)).run(&mut sessions.pool.begin().await.unwrap()).await.unwrap_err();
        assert!(error.kind() == PruneErrorKind::Spec && error.to_string().contains("before_zone"), "{error}");
    }
    let zoned = spec("ts").before_zone("America/Los_Angeles");
    let old = Prune::of(&zoned).before(Utc::now() - Duration::minutes(90));
    assert_eq!(committed(&sessions, old).await.count, 4);
    let days = spec("day").before_zone("America/Los_Angeles");
    assert_eq!(committed(&sessions, Prune::of(&days).before(Utc::now())).await.ids, ["1"], "the day of today stays");
    let nowhere = spec("ts").before_zone("Nowhere'; drop table la;--");
    let error =
        Prune::of(&nowhere).before(Utc::now()).run(&mut sessions.pool.begin().await.unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("time zone"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_any_type_and_hundred_thousand_at_once() {
    let sessions = Sessions::new().await;
    for (kind, value) in [
        ("uuid", "gen_random_uuid()"),
        ("text", "'it''s {a,\"b\\' || n"),
        ("timestamptz(3)", "now() + n * interval '1 s'"),
        ("numeric(20, 3)", "n + 0.125"),
        ("bytea", "int4send(n)"),
        ("float8", "n / 3.0"),
        ("varchar(40)", "n::text"),
    ] {
        sessions
            .database
            .execute(&format!(
                "drop table if exists t; create table t (\"the key\" {kind} primary key, gone bool not null);
                 insert into t select {value}, n <= 100 from generate_series(1, 101) n"
            ))
            .await;
        let spec = aftercommit::prune::Spec::new("t", "gone");
        let pruned = committed(&sessions, Prune::of(&spec)).await;
        assert_eq!((pruned.count, sessions.count("t").await), (100, 1), "{kind}");
    }
    sessions
        .database
        .execute("create table many (id int primary key); insert into many select generate_series(1, 100500)")
        .await;
    let spec = aftercommit::prune::Spec::new("many", "true");
    let pruned = committed(&sessions, Prune::of(&spec)).await;
    assert_eq!((pruned.count, pruned.ids.len(), sessions.count("many").await), (100_000, 100_000, 500));
    assert!(pruned.events.len() >= 10, "in pieces of at most 10,000 ids");
}
