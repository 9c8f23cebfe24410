//! A reconciler's failed run is found in the log, by the reconciler's name and the result.

use std::time::Duration;

use crate::log::Log;
use crate::support::Database;
use aftercommit::reconciler::{Drift, ItemError, Reconciler, Runner};
use sqlx::PgTransaction;

struct Broken;

impl Reconciler for Broken {
    fn name(&self) -> &str {
        "broken"
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(60)
    }

    async fn page(&self, _: &mut PgTransaction<'_>, _: Option<&str>, _: i64) -> Result<Vec<String>, ItemError> {
        Err("the list of items is on fire".into())
    }

    async fn reconcile(&self, _: &mut PgTransaction<'_>, _: &str) -> Result<Drift, ItemError> {
        Ok(Drift::None)
    }
}

#[tokio::test]
async fn a_failed_run_is_one_line_in_the_log() {
    let log = Log::start();
    let database = Database::migrated().await;
    Runner::new(database.config.clone()).reconciler(Broken).run_if_due("broken").await.unwrap();
    let lines = log.lines("reconciler=\"broken\"");
    let failed: Vec<_> = lines.iter().filter(|line| line.contains("result=\"failed\"")).collect();
    assert_eq!(failed.len(), 1, "{lines:#?}");
    assert!(failed[0].contains("the list of items is on fire"), "{failed:?}");
}
