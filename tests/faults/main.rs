//! Everything at once: publishers, relays, workers and a reconciler on private servers, while a schedule that follows
//! from a seed kills, freezes, cuts off and spoils them; then a checker judges the history. See docs/reliability.md.

mod certificates;
mod check;
mod check_tests;
mod clocks;
mod disks;
mod disturb;
mod history;
mod live;
mod part;
mod plan;
mod power;
mod publishers;
mod run;
mod scenarios;
mod subscribers;
#[path = "../support/mod.rs"]
mod support;
mod system;
mod updates;

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::reconciler::{Mode, with_comparisons};
use aftercommit::subject::SubjectPrefix;
use aftercommit::worker::Worker;
use check::Invariant;
use plan::{CONTROL, Plan};
use run::{Outcome, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Not a test: the process of a publisher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of the runs"]
async fn publishing() {
    if let Some(publisher) = publishers::Publisher::from_environment().await {
        publisher.run().await;
    }
}

/// Not a test: the process of a worker with its reconcilers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of the runs"]
async fn working() {
    let Ok(reconciled) = std::env::var("FAULTS_RECONCILED") else { return };
    let setting = |name| std::env::var(name).unwrap();
    tracing_subscriber::fmt().with_env_filter(setting("RUST_LOG")).with_ansi(false).init();
    let naming = Naming {
        stream: setting("AFTERCOMMIT_STREAM"),
        prefix: SubjectPrefix::new(setting("AFTERCOMMIT_SUBJECT_PREFIX")).unwrap(),
        source: setting("AFTERCOMMIT_SOURCE"),
    };
    let nats = NatsConfig { url: setting("NATS_URL"), ..NatsConfig::default() };
    let database = PostgresConfig::new(setting("DATABASE_URL"));
    let worker = Worker::new(database, nats.clone(), naming).registry(subscribers::all());
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let mut term = signal(SignalKind::terminate()).unwrap();
    tokio::spawn(async move {
        term.recv().await;
        stopping.cancel();
    });
    if reconciled == "true" {
        let (own, every) = (worker.own_reconcilers(), Duration::from_secs(2));
        let runner = with_comparisons(own, &nats, worker.subscriptions(), every, Mode::Repair);
        tokio::spawn(runner.run(stop.clone()));
    }
    worker.run(stop).await.unwrap();
}

/// Plays plans, so many at a time, and prints a line for each.
async fn play(plans: impl IntoIterator<Item = Plan>, at_once: usize) -> Vec<Outcome> {
    // One test after the other, whatever the test runner would like: each needs a good part of the machine.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = TURN.lock().await;
    let (mut waiting, mut running, mut outcomes) =
        (plans.into_iter().collect::<VecDeque<_>>(), JoinSet::new(), Vec::new());
    let mut broken_off = 0;
    loop {
        while running.len() < at_once
            && let Some(plan) = waiting.pop_front()
        {
            // A thread of its own, so that it keeps no other run waiting.
            running.spawn_blocking(move || tokio::runtime::Handle::current().block_on(run(plan)));
        }
        let Some(outcome) = running.join_next().await else { break };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                println!("a run broke off: {error}");
                broken_off += 1;
                continue;
            }
        };
        println!("{outcome}");
        if let Some(story) = &outcome.story {
            let all = outcome.verdict.violations.iter().map(|violation| violation.invariant);
            println!("VIOLATED {story}\n  (all: {:?}; everything is in {})", count(all), outcome.directory.display());
        }
        outcomes.push(outcome);
    }
    assert_eq!(broken_off, 0, "runs broke off; those that did not:\n{}", summary(&outcomes));
    outcomes
}

fn count<T: Ord + std::fmt::Debug>(all: impl Iterator<Item = T>) -> std::collections::BTreeMap<T, usize> {
    all.fold(Default::default(), |mut counts: std::collections::BTreeMap<T, usize>, one| {
        *counts.entry(one).or_default() += 1;
        counts
    })
}

fn assert_clean<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) {
    let broken: Vec<u64> = outcomes.into_iter().filter(|one| one.story.is_some()).map(|one| one.seed).collect();
    assert!(broken.is_empty(), "violations with the seeds {broken:?}");
}

/// The short form.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_the_guarantees_hold() {
    let plans = [1, 4, 7].map(|seed| Plan::new(seed, Duration::from_secs(30), &[]));
    assert_clean(&play(plans, 2).await);
}

/// A suite that cannot fail proves nothing: without each mechanism, it must tell which guarantee is broken.
#[tokio::test(flavor = "multi_thread")]
async fn each_mechanism_that_is_taken_away_is_missed() {
    let workers = ["worker-killed", "worker-frozen", "worker-nats-deaf"];
    let mechanisms = [
        ("ack after commit", &workers[..1], 2, Invariant::NothingLost),
        ("inbox", &workers[..], 2, Invariant::OneEffect),
        ("order of keys", &[][..], 2, Invariant::KeyOrder),
        ("stragglers", &["transaction-held"][..], 2, Invariant::NothingLost),
        ("barrier", &["publisher-postgres-killed"][..], 5, Invariant::NoGhost),
    ];
    // The same faults with every mechanism in its place, to see that it is not the faults alone.
    let relays = ["relay-killed", "relay-frozen", "relay-nats-deaf", "nats-killed", "nats-all-killed", "stream-full"];
    let all = [&relays[..], &workers[..], &["transaction-held", "publisher-postgres-killed"]].concat();
    let mut control = Some(Plan::without(CONTROL, &all, 2, 1));
    let mut missing = Vec::from(mechanisms);
    // Whether a crash meets the moment that matters is chance, so what is not missed has another four runs.
    for seed in [1, 3, 5, 7, 9] {
        let plans = missing.iter().map(|(mechanism, only, apart, _)| Plan::without(mechanism, only, *apart, seed));
        let outcomes = play(plans.chain(control.take()).collect::<Vec<_>>(), 4).await;
        assert_clean(outcomes.iter().filter(|outcome| outcome.broken == Some(CONTROL)));
        missing.retain(|(mechanism, _, _, invariant)| {
            let outcome = outcomes.iter().find(|outcome| outcome.broken == Some(mechanism)).unwrap();
            !outcome.verdict.violations.iter().any(|violation| violation.invariant == *invariant)
        });
    }
    let missing: Vec<_> = missing.iter().map(|(mechanism, .., invariant)| (mechanism, invariant)).collect();
    assert!(missing.is_empty(), "taken away, and nobody noticed: {missing:?}");
}

/// The long form, which scripts/faults runs.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "scripts/faults"]
async fn on_demand() {
    let setting = |name: &str| std::env::var(name).unwrap_or_default();
    if setting("FAULTS_LIST") == "true" {
        return plan::names().for_each(|name| println!("{name}"));
    }
    let only: Vec<String> = setting("FAULTS_ONLY").split(',').filter(|name| !name.is_empty()).map(Into::into).collect();
    if let Some(name) = only.iter().find(|name| !plan::names().any(|known| known == name.as_str())) {
        panic!("there is no fault called {name}: scripts/faults --list");
    }
    let (first, last) = (setting("FAULTS_FIRST").parse().unwrap(), setting("FAULTS_LAST").parse::<u64>().unwrap());
    let length = Duration::from_secs_f64(setting("FAULTS_MINUTES").parse::<f64>().unwrap() * 60.0);
    let plans = (first..=last).map(|seed| Plan::new(seed, length, &only));
    let outcomes = play(plans, setting("FAULTS_AT_ONCE").parse().unwrap()).await;
    let summary = summary(&outcomes);
    println!("\n{summary}");
    if !setting("FAULTS_SUMMARY").is_empty() {
        std::fs::write(setting("FAULTS_SUMMARY"), &summary).unwrap();
    }
    assert_clean(&outcomes);
}

/// The table for docs/reliability.md.
fn summary(outcomes: &[Outcome]) -> String {
    let mut text = String::from("| Runs | Seeds | Minutes | Faults | Events | Messages | Effects | Violations |\n");
    text += "|---|---|---|---|---|---|---|---|\n";
    let sum = |of: fn(&Outcome) -> usize| outcomes.iter().map(of).sum::<usize>();
    let seeds = outcomes.iter().map(|one| one.seed);
    let minutes: f64 = outcomes.iter().map(|one| one.played.as_secs_f64() / 60.0).sum();
    _ = writeln!(
        text,
        "| {} | {}-{} | {minutes:.0} | {} | {} | {} | {} | {} |",
        outcomes.len(),
        seeds.clone().min().unwrap_or(0),
        seeds.max().unwrap_or(0),
        sum(|one| one.verdict.counts.faults),
        sum(|one| one.verdict.counts.written),
        sum(|one| one.verdict.counts.stored),
        sum(|one| one.verdict.counts.effects),
        sum(|one| one.verdict.violations.len()),
    );
    text
}
