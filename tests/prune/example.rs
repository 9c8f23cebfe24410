//! The example `prune_sessions`, with a small backlog.

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/prune_sessions.rs"]
mod prune_sessions;

#[tokio::test(flavor = "multi_thread")]
async fn the_example_checks_itself() {
    prune_sessions::small().await.unwrap();
    prune_sessions::backlog(20_000).await.unwrap();
}
