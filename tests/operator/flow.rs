//! What waits where, and who gets what: `aftercommit backlog` and `aftercommit coverage`.

use crate::support::{Number, Record, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::Subscriber;
use serde_json::{Value, json};

/// What the operator's tool prints, and its exit status.
fn said(work: &Work, arguments: &[&str]) -> (Option<i32>, String) {
    let output = work.outbox.operator(arguments);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backlog_tells_what_waits_where() {
    let work = Work::shared().await;
    work.worker_with(Subscriber::new("idle").on::<Number>(Record::good())).provision().await.unwrap();
    work.send_many(&["a"], 3).await;
    work.outbox.publish("order.placed", "{}", None).await;
    let (code, text) = said(&work, &["backlog"]);
    assert_eq!(code, Some(0));
    let line = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(line("outbox")[..6], ["outbox", "1", "-", "-", "-", "-"], "{text}");
    assert_eq!(line("parked")[..2], ["parked", "0"], "{text}");
    // This database has never served it: what it alone could know is not known.
    assert_eq!(line("idle")[..6], ["idle", "3", "0", "?", "?", "?"], "{text}");

    let worker = work.run(Subscriber::new("idle").on::<Number>(Record::good())).await;
    eventually(SOON, "nothing waits for it any more", async || {
        let json: Value = serde_json::from_str(&said(&work, &["backlog", "--json"]).1).unwrap();
        let one = &json["subscribers"]["idle"];
        assert_eq!(json["backlog"]["events"], 1, "{json}");
        (&one["pending"], &one["in_flight"], &one["failing"], &one["dead_letters"])
            == (&json!(0), &json!(0), &json!(0), &json!(0))
    })
    .await
    .unwrap();
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_gets_nothing_and_what_nobody_gets_is_told() {
    let work = Work::shared().await;
    let mails = |types: &[&str]| Subscriber::sql("mails", "see", types.to_vec()).unwrap();
    work.worker_with(mails(&["test.number"])).provision().await.unwrap();
    work.send("a", 1).await;
    let complete = "types in the stream: 1\ntypes without subscriber: 0\nsubscribers without publisher: 0\n";
    assert_eq!(said(&work, &["coverage", "--check"]), (Some(0), complete.into()));

    let mut paid = work.envelope(None, 2);
    paid.event_type = "order.paid".into();
    work.put(&paid).await;
    work.worker_with(mails(&["test.number", "order.lost"])).provision().await.unwrap();
    let text = "types in the stream: 2\ntypes without subscriber: 1\n  order.paid\n\
                subscribers without publisher: 1\n  mails: order.lost\n";
    assert_eq!(said(&work, &["coverage"]), (Some(0), text.into()));
    assert_eq!(said(&work, &["coverage", "--check"]), (Some(1), text.into()));

    // A subscriber that is not provisioned yet counts when its file is named.
    let file = std::env::temp_dir().join(format!("{}.toml", work.outbox.naming.stream));
    let toml = "[[subscriber]]\nname = 'payments'\nsql.function = 'pay'\ntypes = ['order.paid']\n";
    std::fs::write(&file, toml).unwrap();
    let config = file.display().to_string();
    let json: Value = serde_json::from_str(&said(&work, &["coverage", "--json", "--config", &config]).1).unwrap();
    let expected = json!({
        "types": ["order.paid", "test.number"],
        "types_without_subscriber": [],
        "subscribers_without_publisher": [{ "subscriber": "mails", "type": "order.lost" }],
    });
    assert_eq!(json, expected);
}
