//! Looking without touching.

use aftercommit::prune::{Child, Prune, Spec};

use crate::sessions::{Sessions, bare, whole};

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_the_same_rows_and_changes_none() {
    let sessions = Sessions::new().await;
    let spec = whole();
    let mut connection = sessions.pool.acquire().await.unwrap();
    // Nobody waits for a plan, and it waits for nobody.
    let mut holds = sessions.pool.begin().await.unwrap();
    sqlx::query("select from sessions for update").execute(&mut *holds).await.unwrap();
    let plan = Prune::of(&spec).limit(4).plan(&mut connection).await.unwrap();
    assert_eq!((plan.count, plan.limited), (4, true));
    assert_eq!((plan.children["public.kernels"], plan.associations["public.associations"]), (8, 4));
    holds.rollback().await.unwrap();
    assert_eq!(sessions.count("sessions").await, 8);
    let mut tx = sessions.pool.begin().await.unwrap();
    let pruned = Prune::of(&spec).limit(4).run(&mut tx).await.unwrap();
    assert_eq!(
        (pruned.count, &pruned.children, &pruned.associations),
        (plan.count, &plan.children, &plan.associations)
    );
}

async fn warnings(sessions: &Sessions, spec: &Spec) -> Vec<String> {
    let mut connection = sessions.pool.acquire().await.unwrap();
    Prune::of(spec).before(chrono::Utc::now()).plan(&mut connection).await.unwrap().warnings
}

#[tokio::test(flavor = "multi_thread")]
async fn it_warns_of_missing_indexes_and_of_what_goes_unseen() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table notes (session bigint references sessions on delete cascade);
             create table loose (kernel bigint)",
        )
        .await;
    let spec = bare().child(Child::new("kernels", "session_id").child(Child::new("loose", "kernel")));
    let found = warnings(&sessions, &spec).await.join("\n");
    for told in [
        "no index finds the finished rows of public.sessions",
        "public.notes.session refers to it and has no index",
        "public.notes.session is not in the spec: its rows go by ON DELETE CASCADE",
        "public.loose.kernel has no index",
    ] {
        assert!(found.contains(told), "{told}: {found}");
    }
    assert!(
        warnings(&sessions, &bare())
            .await
            .join("\n")
            .contains("public.kernels.session_id is not in the spec: a row of it")
    );
    sessions
        .database
        .execute(
            "create index on sessions (terminated_at) where status = 'terminated'; create index on notes (session);
             create index on loose (kernel)",
        )
        .await;
    let spec = spec.child(Child::new("notes", "session"));
    assert_eq!(warnings(&sessions, &spec).await, Vec::<String>::new());
    assert_eq!(sessions.count("sessions").await, 8);
}
