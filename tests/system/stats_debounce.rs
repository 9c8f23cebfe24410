//! The example `stats_debounce`: a hundred events of a key cause one run.

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/stats_debounce.rs"]
mod example;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_events_cause_one_recomputation() {
    assert_eq!(example::hundred_sales().await.unwrap(), (100, 1));
}
