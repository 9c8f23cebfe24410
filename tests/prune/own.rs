//! Aftercommit's own tables, swept by who works on them or by `aftercommit prune run`.

use std::time::Duration;

use aftercommit::prune::{PruneConfig, Pruner, SweepStatus, status};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::servers::{Nats, Postgres};
use tokio_util::sync::CancellationToken;

use crate::support::{Database, Outbox, RunningRelay, SOON};

async fn of(database: &aftercommit::config::PostgresConfig, category: &str) -> Option<SweepStatus> {
    status(database).await.unwrap().into_iter().find(|status| status.category == category)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_removed_is_on_record() {
    let (postgres, nats) = (Postgres::shared().await.unwrap(), Nats::shared().await.unwrap());
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), nats.url()).await;
    for n in 0..25 {
        outbox.publish("old", &n.to_string(), None).await;
    }
    let config = RelayConfig {
        retention: Duration::from_millis(1),
        prune_interval: Duration::from_millis(50),
        ..outbox.relay_config()
    };
    let relay = RunningRelay::start(config);
    let removed = async || of(&outbox.postgres, "outbox").await.is_some_and(|status| status.removed_total == 25);
    aftercommit::testing::eventually(SOON, "the outbox is pruned, and it is on record", removed).await.unwrap();
    relay.stop().await.unwrap();
    let found = of(&outbox.postgres, "outbox").await.unwrap();
    assert!(found.period_seconds == Some(0.001) && found.error.is_none(), "{found:?}");
    for category in ["parked", "repairs", "relay-log"] {
        assert!(of(&outbox.postgres, category).await.is_some(), "{category}");
    }
    let left: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.outbox").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_trail_has_a_period_of_its_own_or_stays() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute(
            "insert into aftercommit.audit (at, who, action)
             select now() - n * interval '10 days', 'me', 'x' from generate_series(20, 0, -1) n",
        )
        .await;
    let entries = async || -> i64 {
        sqlx::query_scalar("select count(*) from aftercommit.audit").fetch_one(&pool).await.unwrap()
    };
    let stop = CancellationToken::new();
    Pruner::new(&database.config, PruneConfig::default()).unwrap().sweep(&stop).await.unwrap();
    assert_eq!(entries().await, 21, "kept for ever unless somebody says how long");
    let config = PruneConfig { audit: Some(Duration::from_secs(100 * 86_400 + 60)), ..PruneConfig::default() };
    let pruner = Pruner::new(&database.config, config).unwrap();
    pruner.sweep(&stop).await.unwrap();
    assert_eq!(entries().await, 12, "and one that says it");
    let told: serde_json::Value =
        sqlx::query_scalar("select detail from aftercommit.audit where action = 'audit prune'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(told["removed"], 10);
    assert_eq!(of(&database.config, "audit").await.unwrap().removed_total, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_of_the_dead_go_and_no_others() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute(
            "insert into aftercommit.lease (name, holder, epoch, expires_at) values
                 ('relay', 'a', 7, now() - interval '1 year'), ('subscriber:gone', 'b', 1, now() - interval '91 days'),
                 ('subscriber:stopped', 'c', 1, to_timestamp(0)), ('subscriber:works', 'd', 1, now() + interval '4 s'),
                 ('subscriber:rests', 'e', 1, now() - interval '89 days'), ('prune:gone', 'f', 1, to_timestamp(0))",
        )
        .await;
    let stop = CancellationToken::new();
    Pruner::new(&database.config, PruneConfig::default()).unwrap().sweep(&stop).await.unwrap();
    let left: Vec<String> =
        sqlx::query_scalar("select name from aftercommit.lease order by name").fetch_all(&pool).await.unwrap();
    assert_eq!(left, ["prune:leases", "relay", "subscriber:rests", "subscriber:stopped", "subscriber:works"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_deletes_what_was_written_in_the_last_thirty_days() {
    let database = Database::migrated().await;
    let config = PruneConfig { audit: Some(Duration::from_secs(29 * 86_400)), ..PruneConfig::default() };
    let error = Pruner::new(&database.config, config).unwrap_err().to_string();
    assert!(error.contains("audit must be at least 30d"), "{error}");
    let pool = database.pool().await;
    for age in ["29 days", "-1 day", "0"] {
        let sql = "select aftercommit.prune_audit($1::interval, 10)";
        let error = sqlx::query(sql).bind(age).execute(&pool).await.unwrap_err().to_string();
        assert!(error.contains("at least 30 days"), "{error}");
    }
}
