//! G5 at the relay: what an operator sees of it over HTTP and NATS, in good times and in bad ones.

use std::fs;
use std::process::Stdio;

use crate::support::{Outbox, RelayProcess, SOON, answers, free_address, get, reaches};
use aftercommit::operator;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use async_nats::service::{Info, PingResponse, Stats};
use serde_json::Value;

async fn database() -> String {
    Postgres::shared().await.unwrap().create_database().await.unwrap()
}

async fn shared() -> Outbox {
    Outbox::new(database().await, Nats::shared().await.unwrap().url()).await
}

/// The relay's program with HTTP, impatient.
fn start(outbox: &Outbox) -> (RelayProcess, String) {
    let address = free_address();
    let mut command = outbox.relay_command();
    let child = command.args(["--http", &address, "--unhealthy-after", "1s"]).spawn().unwrap();
    (RelayProcess(child), address)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_is_ready_and_counts_what_it_publishes() {
    let outbox = shared().await;
    let (_relay, address) = start(&outbox);
    answers(&address, "/readyz", 200, "leading").await;
    answers(&address, "/healthz", 200, "leading").await;
    for _ in 0..10 {
        outbox.publish("order.placed", "{}", None).await;
    }
    let stream = format!("{{stream=\"{}\"}}", outbox.naming.stream);
    reaches(&address, &format!("aftercommit_relay_published_total{stream}"), |events| events == 10.0).await;
    reaches(&address, &format!("aftercommit_relay_ack_seconds_count{stream}"), |events| events == 10.0).await;
    reaches(&address, &format!("aftercommit_relay_latency_seconds_count{stream}"), |events| events == 10.0).await;
    reaches(&address, &format!("aftercommit_relay_window_events_sum{stream}"), |events| events == 10.0).await;
    reaches(&address, &format!("aftercommit_relay_backlog_events{stream}"), |events| events == 0.0).await;
    reaches(&address, &format!("aftercommit_relay_leader{stream}"), |leader| leader == 1.0).await;
    reaches(&address, &format!("aftercommit_relay_epoch{stream}"), |epoch| epoch == 1.0).await;
    reaches(&address, &format!("aftercommit_relay_in_flight{stream}"), |messages| messages == 0.0).await;
    reaches(&address, &format!("aftercommit_relay_seconds_since_progress{stream}"), |seconds| seconds < 1.0).await;
    let metrics = get(&address, "/metrics").await.unwrap().1;
    assert!(metrics.contains("# TYPE aftercommit_relay_ack_seconds histogram"), "{metrics}");
    assert_eq!(get(&address, "/").await.unwrap().0, 404);

    let mut open = outbox.pool.begin().await.unwrap();
    sqlx::query("select pg_current_xact_id()").execute(&mut *open).await.unwrap();
    reaches(&address, &format!("aftercommit_relay_oldest_transaction_seconds{stream}"), |age| age > 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_healthy_and_takes_over() {
    let outbox = shared().await;
    let (mut leader, leading) = start(&outbox);
    answers(&leading, "/readyz", 200, "leading").await;
    let (_standby, standing_by) = start(&outbox);
    answers(&standing_by, "/readyz", 200, "standing by").await;
    answers(&standing_by, "/healthz", 200, "standing by").await;
    let labels = format!("aftercommit_relay_leader{{stream=\"{}\"}}", outbox.naming.stream);
    reaches(&standing_by, &labels, |leader| leader == 0.0).await;
    leader.kill();
    answers(&standing_by, "/healthz", 200, "leading").await;
    reaches(&standing_by, &labels, |leader| leader == 1.0).await;
}

/// It asks for the lease twice a second, for months perhaps.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_uses_up_no_transaction_ids() {
    let settings = vec![("autovacuum".to_string(), "off".to_string())];
    let postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let held = "insert into aftercommit.lease values ('relay', 'somebody', 1, clock_timestamp() + interval '1 minute')";
    sqlx::raw_sql(held).execute(&outbox.pool).await.unwrap();
    let (_standby, address) = start(&outbox);
    answers(&address, "/readyz", 200, "standing by").await;
    let looks = "select (select max(query_start)::text from pg_stat_activity
                          where application_name = 'aftercommit-relay' and query like '%aftercommit.lease%'),
                        pg_snapshot_xmax(pg_current_snapshot())::text";
    let mut seen = Vec::new();
    eventually(SOON, "it asks again and again", async || {
        let look: (Option<String>, String) = sqlx::query_as(looks).fetch_one(&outbox.pool).await.unwrap();
        if look.0.is_some() && seen.last() != Some(&look) {
            seen.push(look);
        }
        seen.len() > 6
    })
    .await
    .unwrap();
    assert!(seen.iter().all(|look| look.1 == seen[0].1), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_nats_is_named_and_passes() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::new(database().await, nats.url()).await;
    let (_relay, address) = start(&outbox);
    answers(&address, "/readyz", 200, "leading").await;
    nats.kill().await.unwrap();
    answers(&address, "/readyz", 503, "not connected to NATS").await;
    for _ in 0..3 {
        outbox.publish("order.placed", "{}", None).await;
    }
    answers(&address, "/healthz", 503, "3 events waiting").await;
    answers(&address, "/healthz", 503, "not connected to NATS").await;
    let waiting = format!("aftercommit_relay_backlog_events{{stream=\"{}\"}}", outbox.naming.stream);
    reaches(&address, &waiting, |events| events == 3.0).await;
    nats.restart().await.unwrap();
    answers(&address, "/healthz", 200, "leading").await;
    answers(&address, "/readyz", 200, "leading").await;
    reaches(&address, &waiting, |events| events == 0.0).await;
    outbox.assert_complete().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_postgres_is_named_and_passes() {
    let mut postgres = Postgres::start(Default::default()).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let address = free_address();
    let mut command = outbox.relay_command();
    let command =
        command.args(["--http", &address, "--unhealthy-after", "1s"]).env("AFTERCOMMIT_RECONCILE_EVERY", "1s");
    let _relay = RelayProcess(command.spawn().unwrap());
    answers(&address, "/readyz", 200, "leading").await;
    let waiting = format!("aftercommit_relay_backlog_events{{stream=\"{}\"}}", outbox.naming.stream);
    reaches(&address, &waiting, |events| events == 0.0).await;
    let reconciled = "aftercommit_reconciler_last_success_seconds{reconciler=\"outbox\"}";
    reaches(&address, reconciled, |seconds| seconds >= 0.0).await;
    reaches(&address, "aftercommit_reconciler_interval_seconds{reconciler=\"outbox\"}", |seconds| seconds == 1.0).await;
    postgres.kill().await.unwrap();
    answers(&address, "/readyz", 503, "PostgreSQL").await;
    answers(&address, "/healthz", 503, "cannot connect to PostgreSQL").await;
    reaches(&address, &waiting, f64::is_nan).await;
    reaches(&address, reconciled, f64::is_nan).await;
    postgres.restart().await.unwrap();
    answers(&address, "/healthz", 200, "leading").await;
}

/// Of a process that has just started nothing looks healthy that nobody has looked at, and what is counted has not happened yet.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_looked_at_is_not_0() {
    let mut outbox = shared().await;
    outbox.postgres.url = "postgres://nobody@127.0.0.1:9/nowhere".into();
    let (_relay, address) = start(&outbox);
    answers(&address, "/healthz", 503, "cannot connect to PostgreSQL").await;
    let stream = &outbox.naming.stream;
    for gauge in ["backlog_events", "backlog_oldest_seconds", "parked", "oldest_transaction_seconds"] {
        reaches(&address, &format!("aftercommit_relay_{gauge}{{stream=\"{stream}\"}}"), f64::is_nan).await;
    }
    for class in ["alarm", "back_pressure", "fenced", "park", "retry", "unknown"] {
        let counter = format!("aftercommit_relay_interruptions_total{{stream=\"{stream}\",class=\"{class}\"}}");
        reaches(&address, &counter, |times| times == 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_relay_is_healthy_and_says_so() {
    let outbox = shared().await;
    let (_relay, address) = start(&outbox);
    answers(&address, "/readyz", 200, "leading").await;
    let paused = format!("aftercommit_relay_paused{{stream=\"{}\"}}", outbox.naming.stream);
    operator::relay::pause(&outbox.postgres, "test", None).await.unwrap();
    reaches(&address, &paused, |paused| paused == 1.0).await;
    outbox.publish("order.placed", "{}", None).await;
    answers(&address, "/healthz", 200, "paused, 1 event waiting").await;
    answers(&address, "/readyz", 200, "paused").await;
    operator::relay::resume(&outbox.postgres, "test").await.unwrap();
    reaches(&address, &paused, |paused| paused == 0.0).await;
    answers(&address, "/healthz", 200, "leading").await;
    outbox.assert_complete().await;
}

/// The server takes smaller messages than the outbox: such an event can never be stored.
#[tokio::test(flavor = "multi_thread")]
async fn parked_events_are_counted() {
    let nats = Nats::start(NatsOptions { config: "max_payload: 4096".into(), ..Default::default() }).await.unwrap();
    let outbox = Outbox::new(database().await, nats.url()).await;
    let (_relay, address) = start(&outbox);
    outbox.publish("order.placed", &format!("\"{}\"", "x".repeat(5_000)), Some("key")).await;
    outbox.publish("order.placed", "{}", Some("key")).await;
    let labels = format!("{{stream=\"{}\"}}", outbox.naming.stream);
    reaches(&address, &format!("aftercommit_relay_parked{labels}"), |events| events == 2.0).await;
    reaches(&address, &format!("aftercommit_relay_backlog_events{labels}"), |events| events == 0.0).await;
    let labels = format!("{{stream=\"{}\",class=\"park\"}}", outbox.naming.stream);
    reaches(&address, &format!("aftercommit_relay_interruptions_total{labels}"), |times| times == 1.0).await;
    answers(&address, "/healthz", 200, "leading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_a_wrong_setting() {
    let outbox = shared().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = outbox.relay_command().env("AFTERCOMMIT_HTTP", &address).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&address) && said.contains("AFTERCOMMIT_HTTP"), "{said}");
}

/// The first answer to a question, as JSON.
async fn ask(client: &async_nats::Client, subject: String) -> Vec<u8> {
    let mut answer = None;
    eventually(SOON, &format!("somebody answers {subject}"), async || {
        answer = client.request(subject.clone(), "".into()).await.ok();
        answer.is_some()
    })
    .await
    .unwrap();
    answer.unwrap().payload.to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn relays_are_found_and_asked_over_nats() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::new(database().await, nats.url()).await;
    let relay = outbox.relay();
    outbox.publish("order.placed", "{}", None).await;
    outbox.assert_complete().await;
    let client = async_nats::connect(&outbox.nats.url).await.unwrap();
    let stream = &outbox.naming.stream;

    let ping: PingResponse = serde_json::from_slice(&ask(&client, "$SRV.PING".into()).await).unwrap();
    assert_eq!((ping.kind.as_str(), ping.name.as_str()), ("io.nats.micro.v1.ping_response", "aftercommit-relay"));
    assert_eq!(ping.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(&ping.metadata["stream"], stream);
    assert!(ping.metadata.contains_key("holder"));

    let info: Info = serde_json::from_slice(&ask(&client, "$SRV.INFO.aftercommit-relay".into()).await).unwrap();
    assert_eq!((&info.id, info.kind.as_str()), (&ping.id, "io.nats.micro.v1.info_response"));
    assert_eq!(info.endpoints[0].subject, format!("aftercommit.relay.{stream}.status"));

    let mut status = Value::Null;
    eventually(SOON, "the status tells of the event", async || {
        status = serde_json::from_slice(&ask(&client, info.endpoints[0].subject.clone()).await).unwrap();
        status["published"] == 1 && status["backlog"] == 0
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {status}"));
    assert_eq!(status["leader"], true);
    assert_eq!(status["epoch"], 1);
    assert_eq!(status["phase"], "leading");
    assert_eq!(status["last_sequence"], 1);
    assert_eq!(status["holder"], ping.metadata["holder"].as_str());

    let by_id = format!("$SRV.STATS.aftercommit-relay.{}", ping.id);
    let stats: Stats = serde_json::from_slice(&ask(&client, by_id).await).unwrap();
    assert_eq!(stats.endpoints[0].name, "status");
    assert!(stats.endpoints[0].requests >= 1);
    assert_eq!(stats.endpoints[0].data.as_ref().unwrap()["leader"], true);

    relay.stop().await.unwrap();
    eventually(SOON, "nobody answers any more", async || client.request("$SRV.PING", "".into()).await.is_err())
        .await
        .unwrap();
}

/// Who asks a service chooses where the answer goes; the relay may publish to its stream, so it must not be had so.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_makes_the_relay_answer_into_its_stream() {
    let outbox = shared().await;
    let relay = outbox.relay();
    let client = async_nats::connect(&outbox.nats.url).await.unwrap();
    let status = format!("aftercommit.relay.{}.status", outbox.naming.stream);
    ask(&client, status.clone()).await;
    for subject in ["$SRV.PING", "$SRV.INFO", "$SRV.STATS", status.as_str()] {
        let forged = format!("{}.order.placed", outbox.naming.prefix);
        client.publish_with_reply(subject.to_string(), forged, "".into()).await.unwrap();
    }
    // Answered after the others were seen.
    ask(&client, status).await;
    client.flush().await.unwrap();
    assert_eq!(outbox.stored().await, 0);
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_services_permissions_there_is_one_warning_each() {
    let config = "no_auth_user: admin
    authorization { users: [
        { user: admin, password: admin },
        { user: relay, password: relay, permissions: {
            publish: [ \"*.order.placed\", \"$JS.API.STREAM.INFO.*\", \"$JS.API.DIRECT.GET.>\" ],
            subscribe: [ \"_INBOX_relay.>\" ]
        } }
    ] }";
    let mut nats = Nats::start(NatsOptions { config: config.into(), ..Default::default() }).await.unwrap();
    let outbox = Outbox::new(database().await, nats.url()).await;
    let log = std::env::temp_dir().join(unique_name("aftercommit-log"));
    let mut command = outbox.relay_command();
    command.env("NATS_USER", "relay").env("NATS_PASSWORD", "relay").env("RUST_LOG", "info,async_nats=warn");
    command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
    let _relay = RelayProcess(command.spawn().unwrap());
    outbox.publish("order.placed", "{}", None).await;
    outbox.assert_complete().await;
    let said = || fs::read_to_string(&log).unwrap();
    let warned = async || said().contains("micro service") && said().contains("questions about the outbox");
    eventually(SOON, "the relay warns", warned).await.unwrap();

    nats.restart().await.unwrap();
    outbox.publish("order.placed", "{}", None).await;
    outbox.assert_complete().await;
    let said = said();
    fs::remove_file(&log).unwrap();
    assert_eq!(said.matches("micro service").count(), 1, "{said}");
    assert_eq!(said.matches("questions about the outbox").count(), 1, "{said}");
    assert_eq!(said.matches("Permissions Violation").count(), 2, "{said}");
}
