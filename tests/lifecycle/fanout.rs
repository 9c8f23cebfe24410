//! Fan-out jobs. Events are handed from outbox to handlers by the test itself, so that it can repeat, delay and lose them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aftercommit::Event;
use aftercommit::fanout::{
    Asked, Coordinator, Ended, JobErrorKind, JobId, JobRequest, JobStatus, Jobs, Kind, Outcome, Overdue, Participant,
    Participants, Requested, Step, Work,
};
use aftercommit::reconciler::{Mode, Runner, Scope};
use aftercommit::worker::{Delivery, Handler, HandlerError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgPool, PgTransaction};

use crate::support::Database;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct DeleteTenant {
    tenant: i64,
}

#[derive(Debug)]
struct TenantDeletion;

impl Kind for TenantDeletion {
    const NAME: &'static str = "tenant.deletion";
    const REQUESTED: &'static str = "tenant.deletion.requested";
    const OUTCOME: &'static str = "tenant.deletion.outcome";
    const ENDED: &'static str = "tenant.deletion.ended";
    type Request = DeleteTenant;
}

/// Deletes a tenant's rows of a table, some in each step, and fails for as long as it shall.
struct DeleteRows {
    table: &'static str,
    fails: Arc<AtomicU32>,
}

impl DeleteRows {
    fn of(table: &'static str) -> Self {
        Self { table, fails: Arc::default() }
    }

    fn failing(table: &'static str, times: u32) -> (Self, Arc<AtomicU32>) {
        let fails = Arc::new(AtomicU32::new(times));
        (Self { table, fails: Arc::clone(&fails) }, fails)
    }
}

impl Work<TenantDeletion> for DeleteRows {
    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        request: &DeleteTenant,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let sql = format!(
            "with gone as (delete from {0} where id in (select id from {0} where tenant = $1 and id > $2 order by id limit 10) returning id)
             select count(*), max(id) from gone",
            self.table
        );
        let after = position.and_then(|position| position.as_i64()).unwrap_or(0);
        let (count, last): (i64, Option<i64>) =
            sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(request.tenant).bind(after).fetch_one(&mut **tx).await?;
        if self.fails.load(Ordering::Relaxed) > 0 {
            self.fails.fetch_sub(1, Ordering::Relaxed);
            sqlx::query("select nowhere").execute(&mut **tx).await?;
        }
        let step = Step::done([(self.table, count.unsigned_abs())]);
        Ok(if count == 10 { step.more(last.unwrap()) } else { step })
    }
}

/// A database in which requester and participants are side by side.
struct Stage {
    database: Database,
    pool: PgPool,
}

impl Stage {
    async fn new() -> Self {
        let database = Database::migrated().await;
        database
            .execute(
                "create table orders (id bigint primary key, tenant bigint); create table bills (id bigint primary key, tenant bigint);
                 insert into orders select n, n % 2 from generate_series(1, 70) n;
                 insert into bills select n, n % 2 from generate_series(1, 10) n",
            )
            .await;
        let pool = database.pool().await;
        Self { database, pool }
    }

    async fn request(&self, key: &str, begin_after: Option<Duration>) -> Asked {
        let mut tx = self.pool.begin().await.unwrap();
        let asked = Jobs::<TenantDeletion>::request(&mut tx, job(key, begin_after)).await.unwrap();
        tx.commit().await.unwrap();
        asked
    }

    /// The events of a type, in order.
    async fn events<E: Event>(&self) -> Vec<E> {
        let payloads: Vec<Vec<u8>> =
            sqlx::query_scalar("select payload from aftercommit.outbox where type = $1 order by id")
                .bind(E::TYPE)
                .fetch_all(&self.pool)
                .await
                .unwrap();
        payloads.iter().map(|payload| serde_json::from_slice(payload).unwrap()).collect()
    }

    /// Hands an event to a handler as a worker does: in a transaction that commits when it is handled.
    async fn hand<E: Event>(&self, handler: &impl Handler<E>, event: E, attempt: u32) -> Result<(), HandlerError> {
        let mut tx = self.pool.begin().await.unwrap();
        let mut delivery = Delivery::new(event);
        delivery.attempt = attempt;
        match handler.handle(&mut tx, &delivery).await {
            Ok(()) => {
                tx.commit().await.unwrap();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The last request to a participant, again and again until it has answered.
    async fn works<W: Work<TenantDeletion>>(&self, participant: &Participant<TenantDeletion, W>) -> u32 {
        for attempt in 1.. {
            let event = self.events::<Requested<TenantDeletion>>().await.pop().unwrap();
            if self.hand(participant, event, attempt).await.is_ok() {
                return attempt;
            }
        }
        unreachable!()
    }

    /// All answers so far, to the coordinator.
    async fn coordinate(&self) {
        for outcome in self.events::<Outcome<TenantDeletion>>().await {
            self.hand(&Coordinator::<TenantDeletion>::new(), outcome, 1).await.unwrap();
        }
    }

    async fn status(&self, job: JobId) -> JobStatus {
        let mut tx = self.pool.begin().await.unwrap();
        Jobs::<TenantDeletion>::status(&mut tx, job).await.unwrap()
    }

    async fn count(&self, rows: &str) -> i64 {
        let sql = sqlx::AssertSqlSafe(format!("select count(*) from {rows}"));
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }
}

fn job(key: &str, begin_after: Option<Duration>) -> JobRequest<DeleteTenant> {
    JobRequest {
        key: key.into(),
        request: DeleteTenant { tenant: 1 },
        requested_by: "ann".into(),
        participants: ["orders", "bills"].into(),
        due_after: Some(Duration::from_secs(3600)),
        begin_after,
        parent: None,
    }
}

fn orders() -> Participant<TenantDeletion, DeleteRows> {
    Participant::new("orders", DeleteRows::of("orders"))
}

fn bills() -> Participant<TenantDeletion, DeleteRows> {
    Participant::new("bills", DeleteRows::of("bills"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_is_the_same_job_and_a_rollback_is_none() {
    let stage = Stage::new().await;
    let mut tx = stage.pool.begin().await.unwrap();
    Jobs::<TenantDeletion>::request(&mut tx, job("t1", None)).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!((stage.count("aftercommit.job").await, stage.count("aftercommit.outbox").await), (0, 0));
    let first = stage.request("t1", None).await;
    let second = stage.request("t1", None).await;
    assert_eq!((first.new, second.new, first.job), (true, false, second.job));
    assert!(stage.request("t2", None).await.new);
    assert_eq!((stage.count("aftercommit.job").await, stage.count("aftercommit.outbox").await), (2, 2));
    for (wrong, told) in [
        (JobRequest { participants: [""; 0].into(), ..job("x", None) }, "at least one participant"),
        (JobRequest { participants: ["a", "a"].into(), ..job("x", None) }, "\"a\" is named twice"),
        (JobRequest { key: String::new(), ..job("x", None) }, "1 to 500 bytes"),
        (JobRequest { participants: [""].into(), ..job("x", None) }, "a participant's name"),
    ] {
        let error = Jobs::<TenantDeletion>::request(&mut stage.pool.begin().await.unwrap(), wrong).await.unwrap_err();
        assert!(error.kind() == JobErrorKind::Request && error.to_string().contains(told), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_completes_once_with_what_was_committed() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    assert_eq!(stage.works(&orders()).await, 1);
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.completed.as_str(), status.total), ("running", "1/2", 35));
    stage.works(&bills()).await;
    // Answers come again, and once more.
    stage.coordinate().await;
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.completed.as_str(), status.total), ("completed", "2/2", 40));
    let ended = stage.events::<Ended<TenantDeletion>>().await;
    let [ended] = ended.as_slice() else { panic!("{ended:?}") };
    assert_eq!((ended.completed, ended.counts["orders"], ended.counts["bills"]), ((2, 2), 35, 5));
    assert_eq!((stage.count("orders").await, stage.count("bills").await), (35, 5), "another tenant's stay");
    // A request that comes again is answered, and nothing is done.
    stage.works(&orders()).await;
    stage.coordinate().await;
    assert_eq!(stage.status(asked.job).await.total, 40);
    assert_eq!(stage.events::<Ended<TenantDeletion>>().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_participant_that_fails_can_be_asked_anew_alone() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    let (work, fails) = DeleteRows::failing("bills", 3);
    let failing = Participant::new("bills", work).attempts(3);
    stage.works(&orders()).await;
    assert_eq!(stage.works(&failing).await, 3, "the third attempt answers");
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.completed.as_str(), status.failed), ("partial", "1/2", 1));
    let bills = &status.participants[0];
    assert!(bills.error.as_ref().unwrap().contains("nowhere") && bills.attempts == Some(3), "{bills:?}");
    assert_eq!((stage.count("bills").await, status.total), (10, 35), "what was rolled back is not counted");

    let mut tx = stage.pool.begin().await.unwrap();
    assert_eq!(Jobs::<TenantDeletion>::retry(&mut tx, asked.job, Some("bills")).await.unwrap(), ["bills"]);
    let error = Jobs::<TenantDeletion>::retry(&mut tx, asked.job, None).await.unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::State, "{error}");
    tx.commit().await.unwrap();
    // The old answer comes once more: it is of the round before.
    stage.coordinate().await;
    assert_eq!(stage.status(asked.job).await.job.status, "running");
    assert_eq!(fails.load(Ordering::Relaxed), 0);
    stage.works(&failing).await;
    stage.works(&orders()).await;
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.total, stage.count("bills").await), ("completed", 40, 5));
    let ended: Vec<String> =
        stage.events::<Ended<TenantDeletion>>().await.into_iter().map(|ended| ended.status).collect();
    assert_eq!(ended, ["partial", "completed"]);
    let mut tx = stage.pool.begin().await.unwrap();
    let unknown = Jobs::<TenantDeletion>::retry(&mut tx, JobId(uuid::Uuid::nil()), None).await;
    assert_eq!(unknown.unwrap_err().kind(), JobErrorKind::Unknown);
}

/// Who has not answered is asked once more; the first request fails, and the second one finds what made it fail gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_failed_is_not_run_again() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    let (work, _) = DeleteRows::failing("bills", 1);
    let failing = Participant::new("bills", work).attempts(1);
    stage.works(&orders()).await;
    stage.works(&failing).await;
    stage.coordinate().await;
    stage.works(&failing).await;
    stage.coordinate().await;
    assert_eq!(stage.count("bills").await, 10, "nobody would count what is done now");
    let answers = stage.events::<Outcome<TenantDeletion>>().await;
    let [.., first, again] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!((again.status.as_str(), &again.error), ("failed", &first.error));
    let mut tx = stage.pool.begin().await.unwrap();
    Jobs::<TenantDeletion>::retry(&mut tx, asked.job, None).await.unwrap();
    tx.commit().await.unwrap();
    stage.works(&failing).await;
    stage.coordinate().await;
    assert_eq!((stage.status(asked.job).await.completed.as_str(), stage.count("bills").await), ("2/2", 5));
}

/// A step that fails while another instance does the same work.
struct Overtaken(PgPool);

impl Work<TenantDeletion> for Overtaken {
    async fn step(&self, tx: &mut PgTransaction<'_>, _: &DeleteTenant, _: Option<Value>) -> Result<Step, HandlerError> {
        // Its own transaction ends, as when the server ends it; the row is free.
        sqlx::raw_sql("rollback; begin").execute(&mut **tx).await?;
        let payload: Vec<u8> =
            sqlx::query_scalar("select payload from aftercommit.outbox order by id limit 1").fetch_one(&self.0).await?;
        let delivery = Delivery::new(serde_json::from_slice(&payload)?);
        let mut other = self.0.begin().await?;
        bills().handle(&mut other, &delivery).await?;
        other.commit().await?;
        Err(HandlerError::reject("the server has ended the transaction"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_does_not_hide_what_another_instance_did() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    stage.works(&orders()).await;
    stage.works(&Participant::new("bills", Overtaken(stage.pool.clone())).each_step_commits(stage.pool.clone())).await;
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.completed.as_str(), status.total, stage.count("bills").await), ("2/2", 40, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_that_commit_go_on_where_they_were() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    let (work, fails) = DeleteRows::failing("orders", 0);
    let steps = Participant::new("orders", work).each_step_commits(stage.pool.clone());
    // It fails at its third step.
    let event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    fails.store(1, Ordering::Relaxed);
    assert!(stage.hand(&steps, event, 1).await.is_err());
    assert_eq!(stage.count("orders where tenant = 1").await, 35, "the first step failed");
    sqlx::raw_sql(
        "create function late() returns trigger language plpgsql as $$ begin
             if old.id > 45 then raise exception 'not yet'; end if; return old; end $$;
         create trigger late before delete on orders for each row execute function late()",
    )
    .execute(&stage.pool)
    .await
    .unwrap();
    let event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    assert!(stage.hand(&steps, event, 2).await.is_err());
    assert_eq!(stage.count("orders where tenant = 1").await, 15, "two steps are committed");
    assert_eq!(stage.count("aftercommit.job_work where ended_at is null and position = '39'").await, 1);
    sqlx::raw_sql("drop trigger late on orders").execute(&stage.pool).await.unwrap();
    stage.works(&steps).await;
    stage.works(&bills()).await;
    stage.coordinate().await;
    assert_eq!(stage.status(asked.job).await.participants[1].counts["orders"], 35);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_until_somebody_begins() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", Some(Duration::from_secs(600))).await;
    let event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    assert!(matches!(stage.hand(&orders(), event, 1).await, Err(HandlerError::Snooze(_))), "not before its time");
    // One begins all the same, because its clock is ahead.
    let mut event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    event.not_before = None;
    stage.hand(&orders(), event, 1).await.unwrap();
    let mut tx = stage.pool.begin().await.unwrap();
    assert_eq!(Jobs::<TenantDeletion>::cancel(&mut tx, asked.job).await.unwrap(), ["bills", "orders"]);
    tx.commit().await.unwrap();
    let mut cancels = stage.events::<Requested<TenantDeletion>>().await;
    assert_ne!(cancels[0].key(), cancels[1].key(), "it does not wait behind what it cancels");
    for participant in [orders(), bills()] {
        let event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
        stage.hand(&participant, event, 1).await.unwrap();
    }
    // The request wakes up, and is cancelled.
    let mut late = cancels.remove(0);
    late.not_before = None;
    stage.hand(&bills(), late, 1).await.unwrap();
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    let each: Vec<&str> = status.participants.iter().map(|participant| participant.status.as_str()).collect();
    assert_eq!((status.job.status.as_str(), each), ("partial", vec!["cancelled", "done"]));
    assert_eq!((stage.count("bills").await, stage.count("orders").await), (10, 35));
    let error = Jobs::<TenantDeletion>::cancel(&mut stage.pool.begin().await.unwrap(), asked.job).await.unwrap_err();
    assert!(error.kind() == JobErrorKind::State && error.to_string().contains("partial"), "{error}");
}

/// Until it begins it can be cancelled, also when somebody is asked once more meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_asked_once_more_still_waits_to_begin() {
    let stage = Stage::new().await;
    stage.request("t1", Some(Duration::from_secs(600))).await;
    stage.database.execute("update aftercommit.job_participant set asked_at = now() - interval '2 minutes'").await;
    let runner = Runner::new(stage.database.config.clone());
    let runner = runner.reconciler(Overdue::<TenantDeletion>::new(Duration::from_secs(60)));
    assert_eq!(runner.run_now("job-tenant-deletion", Scope::Full, Mode::Repair).await.unwrap().repaired, 2);
    let requests = stage.events::<Requested<TenantDeletion>>().await;
    assert_eq!(requests.len(), 2);
    for event in requests {
        assert!(matches!(stage.hand(&orders(), event, 1).await, Err(HandlerError::Snooze(_))));
    }
    assert_eq!(stage.count("orders where tenant = 1").await, 35);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_answer_is_asked_again_and_nobody_else() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    stage.works(&orders()).await;
    stage.coordinate().await;
    let runner = Runner::new(stage.database.config.clone());
    let runner = runner.reconciler(Overdue::<TenantDeletion>::new(Duration::from_secs(60)));
    let summary = runner.run_now("job-tenant-deletion", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(summary.repaired, 0, "it is not late yet");
    stage.database.execute("update aftercommit.job_participant set asked_at = now() - interval '2 minutes'").await;
    let summary = runner.run_now("job-tenant-deletion", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(summary.repaired, 1, "{summary}");
    let again = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    assert_eq!(again.participants, [("bills".to_string(), 1)]);
    // Both requests are answered; the work is done once.
    stage.works(&bills()).await;
    stage.works(&bills()).await;
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.total), ("completed", 40));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_strangers_change_nothing() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    stage.works(&Participant::new("stranger", DeleteRows::of("orders"))).await;
    assert_eq!(stage.count("orders where tenant = 1").await, 35, "who is not asked does nothing");
    stage.works(&orders()).await;
    let mut outcome = stage.events::<Outcome<TenantDeletion>>().await.pop().unwrap();
    outcome.participant = "stranger".into();
    stage.hand(&Coordinator::<TenantDeletion>::new(), outcome, 1).await.unwrap();
    let mut outcome = stage.events::<Outcome<TenantDeletion>>().await.pop().unwrap();
    outcome.job = uuid::Uuid::now_v7();
    stage.hand(&Coordinator::<TenantDeletion>::new(), outcome, 1).await.unwrap();
    assert_eq!(stage.status(asked.job).await.completed, "0/2");
}

/// Of two answers that are last at the same time one ends the job.
#[tokio::test(flavor = "multi_thread")]
async fn two_last_answers_at_once_end_it_once() {
    for _ in 0..10 {
        let stage = Stage::new().await;
        stage.request("t1", None).await;
        stage.works(&orders()).await;
        stage.works(&bills()).await;
        let mut outcomes = stage.events::<Outcome<TenantDeletion>>().await;
        let (second, first) = (outcomes.pop().unwrap(), outcomes.pop().unwrap());
        let coordinator = Coordinator::<TenantDeletion>::new();
        let (one, two) = tokio::join!(stage.hand(&coordinator, first, 1), stage.hand(&coordinator, second, 1));
        assert!(one.is_ok() && two.is_ok());
        assert_eq!(stage.events::<Ended<TenantDeletion>>().await.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_registers_while_a_job_runs_is_asked_too() {
    let stage = Stage::new().await;
    let mut tx = stage.pool.begin().await.unwrap();
    let request = JobRequest { participants: Participants::Registered, ..job("t1", None) };
    let error = Jobs::<TenantDeletion>::request(&mut tx, request.clone()).await.unwrap_err();
    assert!(error.to_string().contains("named or registered"), "{error}");
    for name in ["orders", "bills"] {
        assert!(Jobs::<TenantDeletion>::register(&mut tx, name).await.unwrap());
        assert!(!Jobs::<TenantDeletion>::register(&mut tx, name).await.unwrap(), "it is there");
    }
    let asked = Jobs::<TenantDeletion>::request(&mut tx, request).await.unwrap();
    assert!(Jobs::<TenantDeletion>::register(&mut tx, "late").await.unwrap());
    assert_eq!(Jobs::<TenantDeletion>::registered(&mut tx).await.unwrap(), ["bills", "late", "orders"]);
    tx.commit().await.unwrap();
    // A job that named its participants is not joined by itself.
    let named = stage.request("t2", None).await;
    let runner = Runner::new(stage.database.config.clone());
    let runner = runner.reconciler(Overdue::<TenantDeletion>::new(Duration::from_secs(60)));
    let run = async || runner.run_now("job-tenant-deletion", Scope::Full, Mode::Repair).await.unwrap().repaired;
    assert_eq!((run().await, run().await), (1, 0));
    let event = stage.events::<Requested<TenantDeletion>>().await.pop().unwrap();
    assert_eq!((event.job, event.participants.as_slice()), (asked.job.0, [("late".to_string(), 1)].as_slice()));
    assert_eq!(stage.status(asked.job).await.completed, "0/3");
    assert_eq!(stage.status(named.job).await.completed, "0/2");

    let mut tx = stage.pool.begin().await.unwrap();
    assert!(Jobs::<TenantDeletion>::join(&mut tx, named.job, "pos").await.unwrap());
    assert!(!Jobs::<TenantDeletion>::join(&mut tx, named.job, "pos").await.unwrap(), "it takes part already");
    tx.commit().await.unwrap();
    for participant in [orders(), bills(), Participant::new("pos", DeleteRows::of("bills"))] {
        for event in stage.events::<Requested<TenantDeletion>>().await {
            stage.hand(&participant, event, 1).await.unwrap();
        }
    }
    stage.coordinate().await;
    assert_eq!(stage.status(named.job).await.completed, "3/3");
    let mut tx = stage.pool.begin().await.unwrap();
    let error = Jobs::<TenantDeletion>::join(&mut tx, named.job, "too-late").await.unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::State, "{error}");
    assert!(Jobs::<TenantDeletion>::unregister(&mut tx, "late").await.unwrap());
    assert!(!Jobs::<TenantDeletion>::unregister(&mut tx, "late").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_only_when_those_that_belong_to_it_have_ended() {
    let stage = Stage::new().await;
    let parent = stage.request("t1", None).await;
    let mut tx = stage.pool.begin().await.unwrap();
    let child = JobRequest { parent: Some(parent.job), participants: ["bills"].into(), ..job("child", None) };
    let child = Jobs::<TenantDeletion>::request(&mut tx, child).await.unwrap();
    let grandchild = JobRequest { parent: Some(child.job), participants: ["orders"].into(), ..job("grandchild", None) };
    let grandchild = Jobs::<TenantDeletion>::request(&mut tx, grandchild).await.unwrap();
    tx.commit().await.unwrap();
    let answer = async |job: JobId, participant: &Participant<TenantDeletion, DeleteRows>| {
        for event in stage.events::<Requested<TenantDeletion>>().await {
            if event.job == job.0 {
                stage.hand(participant, event, 1).await.unwrap();
            }
        }
        stage.coordinate().await;
    };
    answer(parent.job, &orders()).await;
    answer(parent.job, &bills()).await;
    answer(child.job, &bills()).await;
    let status = stage.status(parent.job).await;
    assert_eq!((status.job.status.as_str(), status.completed.as_str()), ("running", "2/2"));
    assert_eq!(status.children.iter().map(|child| child.id).collect::<Vec<_>>(), [child.job.0]);
    let mut tx = stage.pool.begin().await.unwrap();
    let error = Jobs::<TenantDeletion>::cancel(&mut tx, parent.job).await.unwrap_err();
    assert!(error.to_string().contains("waits for jobs that belong to it"), "{error}");
    drop(tx);
    // The last one fails: those above are done in part, until it is asked anew.
    let (work, _) = DeleteRows::failing("orders", 1);
    answer(grandchild.job, &Participant::new("orders", work).attempts(1)).await;
    let words = async || {
        let mut words = Vec::new();
        for job in [grandchild.job, child.job, parent.job] {
            words.push(stage.status(job).await.job.status);
        }
        words
    };
    assert_eq!(words().await, ["failed", "partial", "partial"]);
    let mut tx = stage.pool.begin().await.unwrap();
    Jobs::<TenantDeletion>::retry(&mut tx, grandchild.job, None).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(words().await, ["running", "running", "running"]);
    answer(grandchild.job, &orders()).await;
    assert_eq!(words().await, ["completed", "completed", "completed"]);
    assert_eq!(stage.events::<Ended<TenantDeletion>>().await.len(), 6);
    let mut tx = stage.pool.begin().await.unwrap();
    let late = JobRequest { parent: Some(parent.job), ..job("late", None) };
    let error = Jobs::<TenantDeletion>::request(&mut tx, late).await.unwrap_err();
    assert!(error.kind() == JobErrorKind::State && error.to_string().contains("is completed"), "{error}");
}

/// What the command printed.
fn cli(stage: &Stage, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    let output = command.args(arguments).env("DATABASE_URL", &stage.database.config.url).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_jobs_ask_anew_and_cancel() {
    let stage = Stage::new().await;
    assert_eq!(cli(&stage, &["job", "list"]), (Some(0), "there are no such jobs\n".into()));
    let asked = stage.request("t1", None).await;
    let id = asked.job.to_string();
    let (work, _) = DeleteRows::failing("bills", 1);
    let failing = Participant::new("bills", work).attempts(1);
    stage.works(&orders()).await;
    assert_eq!(cli(&stage, &["job", "retry", &id]).0, Some(1), "nobody has failed");
    stage.works(&failing).await;
    stage.coordinate().await;
    let (_, shown) = cli(&stage, &["job", "show", &id]);
    assert!(shown.contains("services_completed: 1/2, services_failed: 1, total: 35"), "{shown}");
    assert!(shown.contains("  bills  failed") && shown.contains("nowhere"), "{shown}");
    let (_, json) = cli(&stage, &["job", "show", &id, "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["status"], &json["services_completed"], &json["participants"][1]["counts"]["orders"]),
        (&"partial".into(), &"1/2".into(), &35.into())
    );
    let (_, listed) = cli(&stage, &["job", "list", "--status", "partial", "--kind", "tenant.deletion"]);
    assert!(
        listed.starts_with(&format!("{id}  tenant.deletion  t1  partial  requested ")) && listed.contains(" by ann"),
        "{listed}"
    );
    assert_eq!(cli(&stage, &["job", "list", "--overdue"]).1, "there are no such jobs\n");
    assert!(cli(&stage, &["job", "list", "--status", "wrong"]).1.contains("running, completed, partial"));

    let (status, said) = cli(&stage, &["job", "retry", &id, "--participant", "orders"]);
    assert!(status == Some(1) && said.contains("orders has not failed"), "{said}");
    assert_eq!(cli(&stage, &["job", "retry", &id, "--participant", "bills"]), (Some(0), "asked anew: bills\n".into()));
    stage.works(&bills()).await;
    stage.coordinate().await;
    assert_eq!(stage.status(asked.job).await.job.status, "completed");
    let (status, said) = cli(&stage, &["job", "cancel", &id]);
    assert!(status == Some(1) && said.contains("has ended, it is completed"), "{said}");
    let second = stage.request("t2", Some(Duration::from_secs(600))).await.job.to_string();
    let (status, said) = cli(&stage, &["job", "cancel", &second]);
    assert!(status == Some(0) && said.starts_with("asked not to begin: bills, orders"), "{said}");
    for participant in [orders(), bills()] {
        stage.works(&participant).await;
    }
    stage.coordinate().await;
    assert!(cli(&stage, &["job", "show", &second]).1.contains("cancelled"));
    let unknown = uuid::Uuid::nil().to_string();
    assert!(cli(&stage, &["job", "show", &unknown]).1.contains("there is no job"));
    let acts: Vec<String> =
        sqlx::query_scalar("select action from aftercommit.audit order by id").fetch_all(&stage.pool).await.unwrap();
    assert_eq!(acts, ["job retry", "job cancel"]);
}

/// A process of a test that works, and perhaps dies on the way.
#[tokio::test]
#[ignore = "a process of a test"]
async fn child() {
    let Ok(url) = std::env::var("CHILD_DATABASE") else { return };
    let pool = PgPool::connect(&url).await.unwrap();
    let payload: Vec<u8> =
        sqlx::query_scalar("select payload from aftercommit.outbox where type = 'tenant.deletion.requested' limit 1")
            .fetch_one(&pool)
            .await
            .unwrap();
    let participant = orders().each_step_commits(pool.clone());
    let mut tx = pool.begin().await.unwrap();
    participant.handle(&mut tx, &Delivery::new(serde_json::from_slice(&payload).unwrap())).await.unwrap();
    tx.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_it_goes_on_and_counts_right() {
    let stage = Stage::new().await;
    let asked = stage.request("t1", None).await;
    // A step that was killed before its commit is done again, one that was killed behind it is not.
    for fault in ["job-step:1", "job-stepped:1", "job-step:2", "job-stepped:2", "job-answered:1", "none:1"] {
        let died = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fanout::child", "--ignored"])
            .env("CHILD_DATABASE", &stage.database.config.url)
            .env("AFTERCOMMIT_FAULT", fault)
            .output()
            .unwrap();
        assert_eq!(died.status.success(), fault == "none:1", "{fault}: {}", String::from_utf8_lossy(&died.stdout));
    }
    stage.works(&bills()).await;
    stage.coordinate().await;
    let status = stage.status(asked.job).await;
    assert_eq!((status.job.status.as_str(), status.total), ("completed", 40));
    assert_eq!(stage.events::<Outcome<TenantDeletion>>().await.len(), 2, "one answer of each");
}
