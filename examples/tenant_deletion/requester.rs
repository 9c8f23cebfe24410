//! Who has the tenants and asks for a deletion: its process replies to its caller, writes answers down and tells the end.

use std::io::BufRead;
use std::time::Duration;

use aftercommit::erase::{self, Coordinator, Request, Subject, Verified};
use aftercommit::reconciler::Runner;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber, Worker};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, PgTransaction};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_util::sync::CancellationToken;

use super::seat::Seat;
use super::services::TENANT;
use super::{Error, REQUESTER};

/// Its tables: five tenants.
pub const TABLES: &str = "
create table tenants (id bigint primary key, name text not null, state text not null default 'active', times_deleted int not null default 0);
create table admins (tenant_id bigint references tenants, email text, primary key (tenant_id, email));
insert into tenants select n, 'tenant ' || n from generate_series(1, 5) n;
insert into admins select n, 'admin@' || n from generate_series(1, 5) n;
";

/// After so long a service that has not answered is asked once more.
const PATIENCE: Duration = Duration::from_secs(8);
/// After so long everybody looks once more. In earnest it is longer than any transaction of a service.
const VERIFY_AFTER: Duration = Duration::from_secs(2);

/// What the caller gets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The job.
    pub job: String,
    /// False when nothing was asked, because it was asked before.
    pub new: bool,
    /// How the job stands.
    pub status: String,
}

/// Runs until the process is ended.
pub async fn run(seat: &Seat) -> Result<(), Error> {
    let pool = PgPoolOptions::new().max_connections(2).connect(&seat.database.url).await?;
    let naming = seat.naming()?;
    let mut worker = Worker::new(seat.database.clone(), seat.nats.clone(), naming).max_connections(8);
    for service in &seat.participants {
        // A stream has one owner, so each service has its own, and each of them is read.
        let stream = seat.naming_of(service)?;
        let coordinator = Coordinator::new().verify_after(VERIFY_AFTER);
        let subscriber = Subscriber::new(format!("answers-of-{service}"));
        let subscriber = subscriber.stream(stream.stream).prefix(stream.prefix).concurrency(1);
        worker = worker.subscriber(subscriber.on::<erase::Outcome>(coordinator));
    }
    worker = worker.subscriber(Subscriber::new("tenants").on::<Verified>(Tenants).concurrency(1));
    worker.provision().await?;
    let overdue = Runner::new(seat.database.clone()).reconciler(erase::Overdue::new(PATIENCE));
    let stop = CancellationToken::new();
    tokio::select! {
        done = async { tokio::try_join!(seat.relay()?, worker.run(stop.clone()), overdue.run(stop.clone())).map_err(Error::from) } => {
            done?;
        }
        done = answer(seat, &pool, calls()) => done?,
    }
    Ok(())
}

/// The lines of the process's input.
fn calls() -> UnboundedReceiver<String> {
    let (call, calls) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            // Fails when nobody listens any more.
            _ = call.send(line);
        }
    });
    calls
}

/// Answers calls, such as `delete 3`.
async fn answer(seat: &Seat, pool: &PgPool, mut calls: UnboundedReceiver<String>) -> Result<(), Error> {
    while let Some(call) = calls.recv().await {
        let tenant = call.strip_prefix("delete ").ok_or("a call is unknown")?.parse()?;
        let reply = delete(seat, pool, tenant).await?;
        if let Some(file) = &seat.holds {
            std::fs::write(file, "committed")?;
            std::future::pending::<()>().await;
        }
        println!("reply {}", serde_json::to_string(&reply)?);
    }
    Ok(())
}

/// The tenant's state and the request are one transaction.
async fn delete(seat: &Seat, pool: &PgPool, tenant: i64) -> Result<Reply, Error> {
    let mut tx = pool.begin().await?;
    let asked = Request::new(Subject::new(TENANT, tenant), format!("admin@{tenant}"))
        .participants(seat.participants.clone())
        .named(format!("tenant {tenant}"), "select name from tenants where id = $1::bigint")
        .none_left("other admins", "select count(*) - 1 from admins where tenant_id = $1::bigint")
        .ask(&mut tx)
        .await?;
    if asked.new {
        sqlx::query("update tenants set state = 'deleting' where id = $1").bind(tenant).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(Reply { job: asked.job.to_string(), new: asked.new, status: asked.status })
}

/// The last thing to go is what the requester has itself.
struct Tenants;

impl Handler<Verified> for Tenants {
    async fn handle(&self, tx: &mut PgTransaction<'_>, verified: &Delivery<Verified>) -> Result<(), HandlerError> {
        let Verified { subject, status, .. } = &verified.event;
        if status != "verified" {
            return Ok(());
        }
        sqlx::query("delete from admins where tenant_id = $1::bigint").bind(&subject.id).execute(&mut **tx).await?;
        let gone =
            "update tenants set state = 'deleted', name = '', times_deleted = times_deleted + 1 where id = $1::bigint";
        sqlx::query(gone).bind(&subject.id).execute(&mut **tx).await?;
        Ok(())
    }
}

/// How a tenant stands: its state, and how often it was deleted.
pub async fn tenant(pool: &PgPool, tenant: i64) -> Result<(String, i32), Error> {
    let sql = "select state, times_deleted from tenants where id = $1";
    Ok(sqlx::query_as(sql).bind(tenant).fetch_one(pool).await?)
}

/// The process of one of the fleet.
pub async fn process(seat: &Seat) -> Result<(), Error> {
    if seat.name == REQUESTER { run(seat).await } else { super::service::run(seat).await }
}
