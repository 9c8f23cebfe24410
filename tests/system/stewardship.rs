//! The stewardship example: all its modes end in the same state, and what its parts promise alone.

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/stewardship.rs"]
mod example;

use aftercommit::reconciler::{Mode, Scope};
use aftercommit::worker::{Delivery, Handler};
use example::derived::{Stewardship, converge};
use example::events::MonitorInheritanceFlagChanged;
use example::stage::Stage;
use example::{Error, modes, repository as repo};
use sqlx::PgTransaction;

/// The state in which all modes end.
const STATE: &str = "7cc5802bcd782ace59f48e83922fc3de";

#[tokio::test(flavor = "multi_thread")]
async fn events_alone_keep_the_state() {
    assert_eq!(modes::events(Stage::new().await.unwrap()).await.unwrap(), STATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reconciler_alone_repairs_the_state() {
    assert_eq!(modes::no_events(Stage::new().await.unwrap()).await.unwrap(), STATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_events_does_not_matter() {
    assert_eq!(modes::shuffled(Stage::new().await.unwrap()).await.unwrap(), STATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_poisoned_is_healed_by_the_reconciler() {
    assert_eq!(modes::poison(Stage::new().await.unwrap()).await.unwrap(), STATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_system_leaves_nothing_behind() {
    assert_eq!(modes::delete(Stage::new().await.unwrap()).await.unwrap(), STATE);
}

async fn step<T>(stage: &Stage, work: impl AsyncFnOnce(&mut PgTransaction<'_>) -> Result<T, Error>) -> T {
    let mut tx = stage.pool.begin().await.unwrap();
    let done = work(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
    done
}

/// A system with two stewards, whose connection two monitors watch; one of them inherits.
async fn small() -> Stage {
    let stage = Stage::new().await.unwrap();
    step(&stage, async |tx| {
        for system in ["a", "b"] {
            repo::create_system(tx, system).await?;
        }
        repo::link(tx, "a", "c").await?;
        repo::upsert_monitor(tx, "on", "c", true).await?;
        repo::upsert_monitor(tx, "off", "c", false).await?;
        repo::add_steward(tx, "a", 1).await?;
        repo::add_steward(tx, "a", 2).await
    })
    .await;
    stage
}

impl Stage {
    async fn rows(&self, sql: &'static str) -> Vec<String> {
        sqlx::query_scalar(sql).fetch_all(&self.pool).await.unwrap()
    }

    /// What was published since the last call, without what is the same for all.
    async fn published(&self) -> Vec<String> {
        let rows = "select data::text from aftercommit.events order by id";
        let events = self.rows(rows).await;
        sqlx::query("truncate aftercommit.outbox").execute(&self.pool).await.unwrap();
        events
    }

    async fn stewards(&self) -> Vec<String> {
        let rows = "select concat_ws(' ', monitor_key, user_id, source, nullif(source_system, ''))
                      from monitor_steward order by 1";
        self.rows(rows).await
    }

    async fn monitors_of(&self, user: i64) -> Vec<String> {
        let sql = "select monitors from client where user_id = $1";
        sqlx::query_scalar(sql).bind(user).fetch_one(&self.pool).await.unwrap()
    }

    /// How many messages the stream holds.
    async fn stored(&self) -> Result<u64, Error> {
        let context = async_nats::jetstream::new(async_nats::connect(&self.nats.url).await?);
        Ok(context.get_stream(&self.naming.stream).await?.cached_info().state.messages)
    }

    async fn converge(&self, monitor: &str) -> u64 {
        step(self, async |tx| Ok(converge(tx, monitor).await?)).await
    }
}

#[tokio::test]
async fn a_change_that_changes_nothing_publishes_nothing() {
    let stage = small().await;
    stage.published().await;
    step(&stage, async |tx| {
        repo::add_steward(tx, "a", 1).await?;
        repo::remove_steward(tx, "a", 7).await?;
        repo::link(tx, "a", "c").await?;
        repo::unlink(tx, "a", "never").await?;
        repo::replace_for_user(tx, 1, &["a"]).await
    })
    .await;
    assert_eq!(stage.published().await, [""; 0]);
}

#[tokio::test]
async fn replacing_publishes_exactly_the_difference() {
    let stage = small().await;
    step(&stage, async |tx| repo::create_system(tx, "z").await).await;
    step(&stage, async |tx| repo::replace_for_user(tx, 1, &["a", "b"]).await).await;
    stage.published().await;
    step(&stage, async |tx| repo::replace_for_user(tx, 1, &["b", "z"]).await).await;
    assert_eq!(
        stage.published().await,
        [
            r#"{"change": "removed", "user_id": 1, "system_id": "a"}"#,
            r#"{"change": "added", "user_id": 1, "system_id": "z"}"#
        ]
    );
    step(&stage, async |tx| repo::replace_for_user(tx, 1, &[]).await).await;
    assert_eq!(stage.published().await.len(), 2);
}

#[tokio::test]
async fn only_a_change_of_the_flag_is_published() {
    let stage = Stage::new().await.unwrap();
    for (inherit, published) in [(true, 1), (true, 0), (false, 1), (false, 0), (true, 1)] {
        step(&stage, async |tx| repo::upsert_monitor(tx, "m", "c", inherit).await).await;
        assert_eq!(stage.published().await.len(), published, "{inherit}");
    }
    step(&stage, async |tx| repo::upsert_monitor(tx, "other", "c", false).await).await;
    assert_eq!(stage.published().await.len(), 0, "a new monitor begins with false");
}

#[tokio::test]
async fn the_difference_is_written_and_explicit_rows_stay() {
    let stage = small().await;
    step(&stage, async |tx| repo::add_explicit(tx, "on", 2).await).await;
    step(&stage, async |tx| {
        repo::link(tx, "b", "c").await?;
        repo::add_steward(tx, "b", 2).await
    })
    .await;
    stage.converge("on").await;
    assert_eq!(stage.stewards().await, ["on 1 inherited a", "on 2 explicit", "on 2 inherited a", "on 2 inherited b"]);
    assert_eq!(stage.converge("on").await, 0, "nothing is left to do");
    step(&stage, async |tx| {
        repo::remove_steward(tx, "a", 1).await?;
        repo::unlink(tx, "b", "c").await
    })
    .await;
    assert_eq!(stage.converge("on").await, 3, "two stewards and the list of user 1");
    assert_eq!(stage.stewards().await, ["on 2 explicit", "on 2 inherited a"]);
    assert_eq!((stage.monitors_of(1).await, stage.monitors_of(2).await), (vec![], vec!["on".to_string()]));
}

#[tokio::test]
async fn the_flag_as_it_is_now_decides_whatever_the_events_say() {
    for order in [[true, false], [false, true]] {
        for flag in [true, false] {
            let stage = small().await;
            step(&stage, async |tx| repo::add_explicit(tx, "on", 5).await).await;
            stage.converge("on").await;
            step(&stage, async |tx| repo::upsert_monitor(tx, "on", "c", flag).await).await;
            for enabled in order {
                let event = MonitorInheritanceFlagChanged { monitor_config_key: "on".into(), enabled };
                step(&stage, async |tx| {
                    Stewardship.handle(tx, &Delivery::new(event)).await.map_err(|error| format!("{error:?}").into())
                })
                .await;
            }
            let expected: &[&str] =
                if flag { &["on 1 inherited a", "on 2 inherited a", "on 5 explicit"] } else { &["on 5 explicit"] };
            assert_eq!(stage.stewards().await, expected, "{order:?}, now {flag}");
        }
    }
}

#[tokio::test]
async fn a_monitor_that_is_gone_is_no_error() {
    let stage = small().await;
    stage.converge("on").await;
    sqlx::query("delete from monitor where key = 'on'").execute(&stage.pool).await.unwrap();
    let event = MonitorInheritanceFlagChanged { monitor_config_key: "on".into(), enabled: true };
    step(&stage, async |tx| {
        Stewardship.handle(tx, &Delivery::new(event)).await.map_err(|error| format!("{error:?}").into())
    })
    .await;
    assert_eq!(stage.monitors_of(1).await, [""; 0]);
    assert_eq!(stage.converge("never-was").await, 0);
}

/// Rows that were inherited stay behind when the flag is turned off and nobody hears of it: a sweep over the monitors
/// that inherit would never find them.
#[tokio::test]
async fn the_sweep_finds_inherited_rows_whose_flag_is_off() {
    let stage = small().await;
    stage.reconcile().await.unwrap();
    sqlx::query("update monitor set inherit = false").execute(&stage.pool).await.unwrap();
    sqlx::query("update client set monitors = '{}'").execute(&stage.pool).await.unwrap();
    let summary = stage.reconcile().await.unwrap();
    assert_eq!((summary.scanned, summary.repaired), (1, 2), "{summary}");
    assert_eq!(stage.stewards().await, [""; 0]);
    assert_eq!(stage.reconcile().await.unwrap().scanned, 0);
}

#[tokio::test]
async fn one_monitor_can_be_reconciled_now() {
    let stage = small().await;
    sqlx::query("update monitor set inherit = true").execute(&stage.pool).await.unwrap();
    let scope = Scope::Keys(vec!["off".into()]);
    let summary = stage.runner().run_now(Stewardship::NAME, scope, Mode::Repair).await.unwrap();
    assert_eq!((summary.scanned, summary.repaired), (1, 4));
    assert_eq!(stage.stewards().await, ["off 1 inherited a", "off 2 inherited a"]);
}

/// What the event of a deletion remembers is what the deleting transaction saw, and both commit or neither.
#[tokio::test]
async fn a_deletion_publishes_what_it_deletes_or_nothing() {
    let stage = small().await;
    stage.published().await;
    let mut tx = stage.pool.begin().await.unwrap();
    let deleted = repo::delete_system(&mut tx, "a").await.unwrap();
    assert_eq!((deleted.stewards, deleted.connections), (vec![1, 2], vec!["c".to_string()]));
    tx.rollback().await.unwrap();
    assert_eq!(stage.published().await.len(), 0);
    step(&stage, async |tx| repo::delete_system(tx, "a").await).await;
    let expected = r#"{"stewards": [1, 2], "system_id": "a", "connections": ["c"]}"#;
    assert_eq!(stage.published().await, [expected]);
}

/// Another monitor's operation does not wait for the burst.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_operations_is_counted_once() {
    let stage = small().await;
    for _ in 0..30 {
        step(&stage, async |tx| repo::complete_operation(tx, "on", "classified").await).await;
    }
    step(&stage, async |tx| repo::complete_operation(tx, "off", "classified").await).await;
    // All of them are in the stream before the subscriber comes: four events made the monitors.
    let _relay = stage.relay();
    let stored = async || stage.stored().await.is_ok_and(|stored| stored >= 35);
    aftercommit::testing::eventually(crate::support::SOON, "the events are in the stream", stored).await.unwrap();
    let _worker = stage.worker().await.unwrap();
    assert_eq!(stage.drained(&stage.pool).await.unwrap(), 0);
    let counted = "select concat_ws(' ', monitor_key, operations) from monitor_stat order by 1";
    assert_eq!(stage.rows(counted).await, ["off 1", "on 30"]);
    // Rows of one transaction have one xmin.
    let transactions = "select key || ' ' || count(distinct inbox.xmin::text)
        from aftercommit.inbox join aftercommit.outbox using (event_id)
        where subscriber = 'stewardship-stats' group by key order by 1";
    assert_eq!(stage.rows(transactions).await, ["monitor-off 1", "monitor-on 1"]);
}
