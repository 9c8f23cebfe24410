//! The bench works: every figure can be taken, no event goes wrong. How fast anything is is no matter here. It starts the
//! relay and the worker that were built beside it, so this test needs a build of the whole workspace.

use std::process::{Command, Stdio};

use aftercommit_testing::servers::{Nats, NatsOptions, Postgres};

#[tokio::test(flavor = "multi_thread")]
async fn a_smoke_run_takes_every_figure_and_loses_nothing() {
    let database_url = Postgres::shared().await.unwrap().url("postgres");
    let nats_url = Nats::shared().await.unwrap().url();
    let sync = NatsOptions { jetstream: "sync_interval: always".into(), ..NatsOptions::default() };
    let sync = Nats::start(sync).await.unwrap();
    let output = tokio::task::spawn_blocking(move || {
        Command::new(env!("CARGO_BIN_EXE_aftercommit-bench"))
            .args(["--quick", "--json"])
            .env("DATABASE_URL", database_url)
            .env("NATS_URL", nats_url)
            .env("NATS_SYNC_URL", sync.url())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    });
    let output = output.await.unwrap();
    let (report, progress) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{report}\n{progress}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    for row in report["rows"].as_array().unwrap() {
        assert!(row["result"]["median"].is_number(), "{row:#}");
        for wrong in ["lost", "doubled", "out_of_order", "unknown"] {
            assert_eq!(row["counts"][wrong], 0, "{row:#}");
        }
    }
}
