//! A reconciler's failed run is found in the log, by the reconciler's name and the result. Alone in its process, because it
//! takes in everything that is logged.

mod support;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aftercommit::reconciler::{Drift, ItemError, Reconciler, Runner};
use sqlx::PgTransaction;
use support::Database;

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

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_failed_run_is_one_line_in_the_log() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let database = Database::migrated().await;
    Runner::new(database.config.clone()).reconciler(Broken).run_if_due("broken").await.unwrap();
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let failed: Vec<&str> = text.lines().filter(|line| line.contains("result=\"failed\"")).collect();
    assert_eq!(failed.len(), 1, "{text}");
    assert!(
        failed[0].contains("reconciler=\"broken\"") && failed[0].contains("the list of items is on fire"),
        "{text}"
    );
}
