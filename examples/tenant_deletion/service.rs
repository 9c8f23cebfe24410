//! A service as a process of its own: a relay for what it publishes, a worker for what it is asked.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use aftercommit::backoff::Backoff;
use aftercommit::erase::{self, Eraser, Preview, Subject, Tables};
use aftercommit::fanout::Step;
use aftercommit::relay::{Relay, RelayConfig};
use aftercommit::worker::{HandlerError, Subscriber, Worker};
use serde_json::{Value, json};
use sqlx::PgTransaction;
use sqlx::postgres::PgPoolOptions;
use tokio_util::sync::CancellationToken;

use super::Error;
use super::seat::Seat;
use super::services;

/// Runs until the process is ended.
pub async fn run(seat: &Seat) -> Result<(), Error> {
    let service = services::service(&seat.name).ok_or("there is no such service")?;
    let tables = service.tables(seat.chunk);
    match seat.name.as_str() {
        "training" => serve(seat, Training { tables, directory: seat.files.clone() }).await,
        _ => serve(seat, tables).await,
    }
}

async fn serve(seat: &Seat, eraser: impl Eraser) -> Result<(), Error> {
    let pool = PgPoolOptions::new().max_connections(2).connect(&seat.database.url).await?;
    let eraser = Disturbed { eraser, fails: AtomicU32::new(seat.fails), pause: seat.pause };
    let requester = seat.naming_of(super::REQUESTER)?;
    let subscriber = Subscriber::new(format!("{}-erasures", seat.name))
        .stream(requester.stream)
        .prefix(requester.prefix)
        .on::<erase::Requested>(erase::participant(eraser).each_step_commits(pool).rest(seat.rest.unwrap_or(0.0)))
        .backoff(Backoff { first: Duration::from_millis(500), max: Duration::from_secs(5) })
        .concurrency(1);
    let worker = Worker::new(seat.database.clone(), seat.nats.clone(), seat.naming()?);
    let worker = worker.subscriber(subscriber).max_connections(4);
    worker.provision().await?;
    tokio::try_join!(seat.relay()?, worker.run(CancellationToken::new()))?;
    Ok(())
}

impl Seat {
    /// Publishes what the service writes into its outbox.
    pub fn relay(&self) -> Result<impl Future<Output = Result<(), aftercommit::Error>> + use<>, Error> {
        let mut config = RelayConfig::new(self.database.clone(), self.nats.clone(), self.naming()?);
        // Thirteen of them share this machine.
        config.idle_poll = Duration::from_millis(100);
        Ok(Relay::new(config).run(CancellationToken::new()))
    }
}

/// Fails for as long as it shall, with what it has deleted rolled back, and takes its time.
struct Disturbed<E> {
    eraser: E,
    fails: AtomicU32,
    pause: Duration,
}

impl<E: Eraser> Eraser for Disturbed<E> {
    fn name(&self) -> &str {
        self.eraser.name()
    }

    async fn preview(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        self.eraser.preview(tx, subject).await
    }

    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let step = self.eraser.step(tx, subject, position).await?;
        tokio::time::sleep(self.pause).await;
        let fails = self.fails.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        if fails.is_ok() {
            return Err(HandlerError::retry("the example lets this attempt fail"));
        }
        Ok(step)
    }

    async fn verify(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        self.eraser.verify(tx, subject).await
    }
}

/// Models have files beside their rows. A file is deleted before its row: a crash in between deletes a file that is gone already.
struct Training {
    tables: Tables,
    directory: PathBuf,
}

impl Training {
    const FILES: &str = "artefacts";

    /// Files of this tenant, whether they are in the table or not.
    async fn left(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<u64, HandlerError> {
        let rows: i64 = sqlx::query_scalar("select count(*) from artefacts where tenant_id = $1::bigint")
            .bind(&subject.id)
            .fetch_one(&mut **tx)
            .await?;
        let files = match std::fs::read_dir(self.directory.join(format!("tenant-{}", subject.id))) {
            Ok(files) => files.count() as u64,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error.into()),
        };
        Ok(files.max(rows.unsigned_abs()))
    }
}

impl Eraser for Training {
    fn name(&self) -> &str {
        self.tables.name()
    }

    async fn preview(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        let mut preview = self.tables.preview(tx, subject).await?;
        preview.counts.insert(Self::FILES.into(), self.left(tx, subject).await?);
        Ok(preview)
    }

    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let files = json!("files");
        if position.as_ref().is_some_and(|position| *position != files) {
            return self.tables.step(tx, subject, position).await;
        }
        let paths: Vec<String> = sqlx::query_scalar(
            "delete from artefacts where path in
                 (select path from artefacts where tenant_id = $1::bigint order by path limit 10) returning path",
        )
        .bind(&subject.id)
        .fetch_all(&mut **tx)
        .await?;
        if paths.is_empty() {
            return self.tables.step(tx, subject, None).await;
        }
        for path in &paths {
            match std::fs::remove_file(self.directory.join(path)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(Step::done([(Self::FILES, paths.len() as u64)]).more(files))
    }
}
