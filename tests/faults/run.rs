//! One run: everything starts, is disturbed, heals and drains; then the history is judged.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aftercommit::testing::eventually;
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use super::check::{Verdict, check, story};
use super::disturb::{disturb, fingerprint, restart_nats, stored};
use super::history::{self, What};
use super::plan::{CONTROL, Plan};
use super::subscribers;
use super::system::{System, directory};

/// How long it may take at most until everything is handled, however busy the machine is.
const BOUND: Duration = Duration::from_secs(600);

/// What a run came to.
pub struct Outcome {
    pub seed: u64,
    pub replicas: usize,
    pub broken: Option<&'static str>,
    pub played: Duration,
    pub verdict: Verdict,
    /// The first violation with its story.
    pub story: Option<String>,
    pub drained: Option<f64>,
    /// Whether the NATS servers had to be restarted for that.
    pub restarted: bool,
    /// Journals and logs; they are removed when all is well.
    pub directory: PathBuf,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.verdict.counts;
        if let Some(mechanism) = self.broken {
            write!(f, "without {mechanism} | ")?;
        }
        write!(
            f,
            "seed {} | R{} | {:.1} min | {} faults | {} events written | {} commits, {} rollbacks, {} unknown | \
             {} messages ({} repeated, {} removed) | {} effects, {} dead, {} parked | drained in {}{} | {} violations",
            self.seed,
            self.replicas,
            self.played.as_secs_f64() / 60.0,
            counts.faults,
            counts.written,
            counts.committed,
            counts.rolled_back,
            counts.unknown,
            counts.stored,
            counts.repeated,
            counts.removed,
            counts.effects,
            counts.dead,
            counts.parked,
            self.drained.map_or("never".into(), |seconds| format!("{seconds:.1} s")),
            if self.restarted { " after a restart of NATS" } else { "" },
            self.verdict.violations.len(),
        )
    }
}

/// Plays a plan to its end.
pub async fn run(plan: Plan) -> Outcome {
    let directory = directory(plan.seed);
    let schedule: String = plan.steps.iter().map(|step| format!("{step:?}\n")).collect();
    std::fs::write(directory.join("schedule"), schedule).unwrap();
    let system = System::new(&plan, directory.clone()).await;
    let started = Instant::now();
    let steps = plan.steps.iter().map(|step| {
        let system = &system;
        async move {
            tokio::time::sleep_until((started + step.at).into()).await;
            disturb(system, *step).await;
        }
    });
    let end = tokio::time::sleep_until((started + plan.length).into());
    tokio::select! {
        _ = futures_util::future::join(futures_util::future::join_all(steps), end) => {}
        () = supervise(&system, false) => {}
    }
    let played = started.elapsed();
    for publisher in &system.publishers {
        publisher.end().await;
    }
    let drained = tokio::select! {
        drained = drain(&system, &plan) => drained,
        () = supervise(&system, true) => None,
    };
    system.journal.write(What::Drained { seconds: drained });
    if drained.is_some() {
        complaints(&system).await;
    }
    for part in system.parts() {
        part.end().await;
    }
    survey(&system).await;
    let history = history::read(&directory);
    let verdict = check(&history, &subscribers::ALL);
    let story = verdict.violations.first().map(|first| {
        let told = first.event.map(|event| story(&history, event)).unwrap_or_default();
        let which = first.event.map(|event| format!(", event {event}")).unwrap_or_default();
        format!("{}{which}: {}\n{told}", first.invariant, first.says)
    });
    if (story.is_none() || plan.broken.is_some_and(|mechanism| mechanism != CONTROL))
        && std::env::var_os("FAULTS_KEEP").is_none()
    {
        _ = std::fs::remove_dir_all(&directory);
    }
    Outcome {
        seed: plan.seed,
        replicas: plan.replicas,
        broken: plan.broken,
        played,
        verdict,
        story,
        drained,
        restarted: history.iter().any(|entry| entry.what == What::NatsRestarted),
        directory,
    }
}

/// Starts again what has ended, as systemd would.
async fn supervise(system: &System, over: bool) {
    loop {
        let publishers = system.publishers.iter().map(|part| part.name.as_str()).collect::<Vec<_>>();
        for part in system.parts().filter(|part| !over || !publishers.contains(&part.name.as_str())) {
            if let Some(status) = part.supervise().await {
                system.journal.write(What::Note { text: format!("{} ended: {status}", part.name) });
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until every event that is in the ledger has come to every subscriber, and nothing is left to be acked.
async fn drain(system: &System, plan: &Plan) -> Option<f64> {
    let started = Instant::now();
    let (mut effects, mut progress, mut restarted) = (-1_i64, Instant::now(), false);
    // How much there is to do depends on the machine, so only standing still counts.
    while started.elapsed() < BOUND && progress.elapsed() < plan.patience {
        if is_drained(system).await.unwrap_or(false) {
            return Some(started.elapsed().as_secs_f64());
        }
        let now =
            sqlx::query_scalar("select count(*) from effect").fetch_one(&system.subscriber).await.unwrap_or(effects);
        if now != effects {
            (effects, progress) = (now, Instant::now());
        } else if !restarted && progress.elapsed() > plan.patience / 2 && system.replicas > 1 {
            // Now and then servers of a cluster that were killed do not come to read their stream again by themselves.
            restarted = true;
            system
                .journal
                .write(What::Note { text: "nothing went on, so the operator restarts the NATS servers".into() });
            restart_nats(system).await;
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    None
}

async fn is_drained(system: &System) -> Option<bool> {
    let count = async |sql: &'static str| sqlx::query_scalar::<_, i64>(sql).fetch_one(&system.publisher).await.ok();
    let expected =
        count("select count(*) from ledger").await? - count("select count(*) from aftercommit.parked").await?;
    for (name, _) in subscribers::ALL {
        let done = "select (select count(distinct event_id) from effect where subscriber = $1)
                         + (select count(distinct event_id) from aftercommit.dead_letter where subscriber = $1)";
        let done: i64 = sqlx::query_scalar(done).bind(name).fetch_one(&system.subscriber).await.ok()?;
        if done < expected {
            return Some(false);
        }
        let info = system.stream().await?.consumer_info(name).await.ok()?;
        if info.num_pending > 0 || info.num_ack_pending > 0 {
            return Some(false);
        }
    }
    let stream: i64 = sqlx::query_scalar("select count(*) from aftercommit.repair where state = 'queued'")
        .fetch_one(&system.publisher)
        .await
        .unwrap_or(0);
    Some(stream == 0)
}

/// Who is still not well a while after the end.
async fn complaints(system: &System) {
    for part in system.parts() {
        let mut last = None;
        let well = eventually(Duration::from_secs(30), "it is well", async || {
            last = part.complaint().await;
            last.is_none()
        });
        if well.await.is_err()
            && let Some(says) = last
        {
            system.journal.write(What::Unwell { who: part.name.clone(), says });
        }
    }
}

/// Writes down what is there at the end.
async fn survey(system: &System) {
    let journal = &system.journal;
    let rows: Vec<(Uuid, Option<String>, i64, String)> =
        sqlx::query_as("select event_id, key, version, digest from ledger order by id")
            .fetch_all(&system.publisher)
            .await
            .unwrap();
    for (event, key, version, digest) in rows {
        journal.write(What::Kept { event, key, version, digest });
    }
    let rows: Vec<(Uuid, Vec<u8>)> = sqlx::query_as("select event_id, payload from aftercommit.outbox order by id")
        .fetch_all(&system.publisher)
        .await
        .unwrap();
    for (event, payload) in rows {
        journal.write(What::Outboxed { event, bytes: fingerprint(&payload) });
    }
    let parked: Vec<(Uuid, String)> = sqlx::query_as(
        "select o.event_id, p.reason from aftercommit.parked p join aftercommit.outbox o on o.id = p.outbox_id",
    )
    .fetch_all(&system.publisher)
    .await
    .unwrap();
    for (event, reason) in parked {
        journal.write(What::Parked { event, reason });
    }
    let mut messages = None;
    let readable = eventually(Duration::from_secs(60), "the stream can be read", async || {
        messages = stored(system).await;
        messages.is_some()
    });
    if let Err(error) = readable.await {
        // All that should be in it counts as lost then.
        journal.write(What::Note { text: error.to_string() });
    }
    for (sequence, event, bytes) in messages.unwrap_or_default() {
        journal.write(What::Stored { sequence, event, bytes });
    }
    let effects = "select subscriber, event_id, key, version, digest from effect order by id";
    let rows: Vec<(String, Uuid, Option<String>, i64, String)> =
        sqlx::query_as(AssertSqlSafe(effects)).fetch_all(&system.subscriber).await.unwrap();
    for (subscriber, event, key, version, digest) in rows {
        journal.write(What::Effect { subscriber, event, key, version, digest });
    }
    let rows: Vec<(String, Uuid, String)> =
        sqlx::query_as("select subscriber, event_id, reason from aftercommit.dead_letter order by id")
            .fetch_all(&system.subscriber)
            .await
            .unwrap();
    for (subscriber, event, reason) in rows {
        journal.write(What::Dead { subscriber, event, reason });
    }
}
