//! What a spec may say, and what is refused before anything is touched.

use aftercommit::prune::{Association, Child, Condition, Prune, PruneErrorKind, Spec};
use chrono::Utc;

use crate::sessions::{Sessions, whole};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_refused_by_name() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table pairs (a int, b int, primary key (a, b)); create table heap (a int); create view looks as select 1 as a;
             create table of_pairs (pair int); create table base (id int primary key); create table heir () inherits (base);
             create table tree (id int primary key, above int references tree)",
        )
        .await;
    use PruneErrorKind::{CompositePrimaryKey, Spec as Wrong};
    for (spec, kind, told) in [
        (Spec::new("nowhere", "true"), Wrong, "no table \"nowhere\""),
        (Spec::new("public.sessions; drop table sessions", "true"), Wrong, "no table"),
        (Spec::new("", "true"), Wrong, "1 to 200 bytes"),
        (Spec::new("a.b.c.d", "true"), Wrong, "no table"),
        (Spec::new("looks", "true"), Wrong, "public.looks is no table"),
        (Spec::new("heap", "true"), Wrong, "no primary key"),
        (Spec::new("base", "true"), Wrong, "other tables inherit from public.base"),
        (Spec::new("aftercommit.outbox", "true"), Wrong, "belongs to PostgreSQL or to aftercommit"),
        (Spec::new("pg_catalog.pg_cast", "true"), Wrong, "belongs to PostgreSQL or to aftercommit"),
        (Spec::new("tree", "true").child(Child::new("tree", "above")), Wrong, "public.tree cannot be its own child"),
        (Spec::new("pairs", "true"), CompositePrimaryKey, "2 columns (a, b)"),
        (Spec::new("sessions", ""), Wrong, "is empty"),
        (Spec::new("sessions", "true").limit(0), Wrong, "limit"),
        (Spec::new("sessions", "true").limit(100_001), Wrong, "limit"),
        (Spec::new("sessions", "true").before_column("ended"), Wrong, "no column \"ended\""),
        (Spec::new("sessions", "true").before_column("status"), Wrong, "must be a timestamp"),
        (Spec::new("sessions", "true").order_column("ended"), Wrong, "no column \"ended\""),
        (Spec::new("sessions", "true").child(Child::new("nowhere", "x")), Wrong, "no table \"nowhere\""),
        (
            Spec::new("sessions", "true").child(Child::new("kernels", "session")),
            Wrong,
            "public.kernels has no column \"session\"",
        ),
        (
            Spec::new("sessions", "true").child(Child::new("kernels", "session_id").references("nr")),
            Wrong,
            "public.sessions has no column \"nr\"",
        ),
        (
            Spec::new("sessions", "true").child(Child::new("pairs", "a").child(Child::new("of_pairs", "pair"))),
            CompositePrimaryKey,
            "public.pairs has 2 columns",
        ),
        (
            Spec::new("sessions", "true").association(Association::new("associations", "kind", "entity_id", "session")),
            Wrong,
            "public.associations has no column \"kind\"",
        ),
    ] {
        let mut tx = sessions.pool.begin().await.unwrap();
        let error = Prune::of(&spec).run(&mut tx).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(told), "{error}");
        let error = Prune::of(&spec).plan(&mut tx).await.unwrap_err();
        assert!(error.to_string().contains(told), "{error}");
        tx.commit().await.unwrap();
    }
    assert_eq!(sessions.count("sessions").await, 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_call_is_refused_before_the_database_is_asked() {
    let sessions = Sessions::new().await;
    let (no_time, whole) = (Spec::new("sessions", "true"), whole());
    for (prune, told) in [
        (Prune::of(&no_time).before(Utc::now()), "no before_column"),
        (Prune::of(&whole).limit(0), "limit of 0"),
        (Prune::of(&whole).only(Condition::new("id = $1")), "placeholders up to $1, and 0 values"),
    ] {
        let error = prune.run(&mut sessions.pool.begin().await.unwrap()).await.unwrap_err();
        assert!(error.kind() == PruneErrorKind::Spec && error.to_string().contains(told), "{error}");
    }
    let wrong = Prune::of(&whole).only(Condition::new("id = 'x'::int"));
    let error = wrong.run(&mut sessions.pool.begin().await.unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), PruneErrorKind::Database);
    assert!(!error.to_string().contains("\"x\""), "values are not told: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_quoted_names_and_other_schemas_work() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create schema \"Büro\";
             create table \"Büro\".\"Select\" (\"a \"\"b\"\"\" int, part int, done date, primary key (part)) partition by range (part);
             create table \"Büro\".one partition of \"Büro\".\"Select\" for values from (0) to (50);
             create table \"Büro\".two partition of \"Büro\".\"Select\" for values from (50) to (200);
             insert into \"Büro\".\"Select\" select n % 2, n, current_date - n from generate_series(1, 100) n",
        )
        .await;
    let spec =
        Spec::new("\"Büro\".\"Select\"", "\"a \"\"b\"\"\" = 1").before_column("done").before_zone("UTC").name("büro");
    let mut tx = sessions.pool.begin().await.unwrap();
    let prune = Prune::of(&spec).before(Utc::now() - chrono::Duration::days(60)).limit(10);
    let pruned = prune.run(&mut tx).await.unwrap();
    assert_eq!((pruned.count, pruned.ids[0].as_str()), (10, "99"), "the oldest first");
    let next = Prune::of(&spec).from(pruned.next.unwrap()).limit(2).run(&mut tx).await.unwrap();
    assert_eq!(next.ids, ["79", "77"]);
    tx.commit().await.unwrap();
}
