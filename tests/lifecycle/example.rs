//! The example `system_delete`: each of its ways ends in the same state.

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/system_delete.rs"]
mod system_delete;

use system_delete::{Stage, captures, hooks, reconciler};

#[tokio::test(flavor = "multi_thread")]
async fn events_alone_take_away_exactly_what_is_gone() {
    hooks(&Stage::new().await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_delete_is_told_by_captures() {
    captures(&Stage::new().await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reconciler_alone_takes_away_exactly_what_is_gone() {
    reconciler(&Stage::new().await.unwrap()).await.unwrap();
}
