//! What subscribers learn.

use aftercommit::prune::{Prune, RowsPruned, Spec};
use chrono::{Duration, Utc};

use crate::sessions::{Sessions, whole};

#[tokio::test(flavor = "multi_thread")]
async fn one_event_tells_all_of_it_in_the_same_transaction() {
    let sessions = Sessions::new().await;
    let before = Utc::now() - Duration::hours(1);
    let mut tx = sessions.pool.begin().await.unwrap();
    let pruned = Prune::of(&whole()).before(before).run(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    let told = sessions.told().await;
    let [event] = told.as_slice() else { panic!("{told:?}") };
    let event: RowsPruned = serde_json::from_value(event.clone()).unwrap();
    let RowsPruned { spec, table, ids, count, children, associations, chunk, chunks, .. } = &event;
    assert_eq!((spec.as_str(), table.as_str(), *count, *chunk, *chunks), ("sessions", "public.sessions", 3, 1, 1));
    assert_eq!((ids, children, associations), (&pruned.ids, &pruned.children, &pruned.associations));
    assert_eq!(event.before.unwrap().timestamp_micros(), before.timestamp_micros());
    let row: (String, uuid::Uuid, String) = sqlx::query_as("select key, event_id, xid::text from aftercommit.outbox")
        .fetch_one(&sessions.pool)
        .await
        .unwrap();
    assert_eq!((row.0.as_str(), row.1), ("sessions", pruned.events[0].as_uuid()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_tells_nobody() {
    let sessions = Sessions::new().await;
    let mut tx = sessions.pool.begin().await.unwrap();
    assert_eq!(Prune::of(&whole()).run(&mut tx).await.unwrap().count, 5);
    tx.rollback().await.unwrap();
    assert_eq!((sessions.count("sessions").await, sessions.told().await.len()), (8, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_cannot_be_written_undoes_the_pruning() {
    let sessions = Sessions::new().await;
    sessions.database.execute("alter table aftercommit.outbox add check (type <> 'rows.pruned') not valid").await;
    let mut tx = sessions.pool.begin().await.unwrap();
    let error = Prune::of(&whole()).run(&mut tx).await.unwrap_err();
    assert_eq!(error.kind(), aftercommit::prune::PruneErrorKind::Event, "{error}");
    tx.commit().await.unwrap();
    assert_eq!((sessions.count("sessions").await, sessions.count("kernels").await), (8, 16));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_events_nothing_is_written() {
    let sessions = Sessions::new().await;
    let mut tx = sessions.pool.begin().await.unwrap();
    assert!(Prune::of(&whole().event(false)).run(&mut tx).await.unwrap().events.is_empty());
    tx.commit().await.unwrap();
    assert_eq!(sessions.told().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ids_come_in_several_events_of_one_batch() {
    let sessions = Sessions::new().await;
    sessions
        .database
        .execute(
            "create table wide (id text primary key);
             insert into wide select repeat('ä', 2000) || n from generate_series(1, 300) n;
             insert into wide select repeat(E'\\x01', 100) || n from generate_series(1, 300) n",
        )
        .await;
    let spec = Spec::new("wide", "true");
    let mut tx = sessions.pool.begin().await.unwrap();
    let pruned = Prune::of(&spec).run(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    let told: Vec<RowsPruned> =
        sessions.told().await.into_iter().map(|event| serde_json::from_value(event).unwrap()).collect();
    assert!(told.len() > 2 && told.len() == pruned.events.len());
    assert_eq!(told.iter().flat_map(|event| event.ids.clone()).collect::<Vec<_>>(), pruned.ids);
    for (index, event) in told.iter().enumerate() {
        assert_eq!((event.batch, event.count, event.chunks as usize), (told[0].batch, 600, told.len()));
        assert_eq!(event.chunk as usize, index + 1);
    }
}
