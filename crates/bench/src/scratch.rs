//! A database and a stream for one run of one arm.

use uuid::Uuid;

use crate::bench::Bench;
use crate::counts::{Counts, Place};
use crate::jetstream::Arrival;
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::jetstream::{self, Connection};
use aftercommit_core::postgres;
use aftercommit_outbox::subject::SubjectPrefix;

/// The keys of the events; as many as a machine has aggregates that change at the same time.
const KEYS: u64 = 1000;
/// Connections that fill an outbox, and rows that they write in a transaction.
const WRITERS: u64 = 4;
const FILL: u64 = 50_000;

/// An outbox with a stream, both empty at first.
pub(crate) struct Scratch {
    pub(crate) postgres: PostgresConfig,
    pub(crate) nats: NatsConfig,
    pub(crate) naming: Naming,
    connection: Connection,
    pub(crate) stream: StreamReader,
}

impl Bench {
    /// Does some work on a database and a stream that are removed afterwards, however it ends. The outbox is empty.
    pub(crate) async fn scratch<T>(
        &self,
        nats: &NatsConfig,
        work: impl AsyncFnOnce(&Scratch) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.scratch_like(nats, "template1", work).await
    }

    /// The same with what is in another one's database, to which nobody may be connected.
    pub(crate) async fn copy<T>(
        &self,
        of: &Scratch,
        nats: &NatsConfig,
        work: impl AsyncFnOnce(&Scratch) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.scratch_like(nats, &of.naming.prefix.to_string(), work).await
    }

    async fn scratch_like<T>(
        &self,
        nats: &NatsConfig,
        template: &str,
        work: impl AsyncFnOnce(&Scratch) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let name = format!("aftercommit_bench_{}", Uuid::now_v7().simple());
        let postgres =
            PostgresConfig { url: with_database(&self.config.postgres.url, &name), ..self.config.postgres.clone() };
        let mut server = postgres::connect(&self.config.postgres, "aftercommit-bench").await?;
        postgres::database::copy(&mut server, template, &name).await?;
        let working = async { work(&Scratch::make(postgres, nats, &name).await?).await };
        let result = tokio::select! {
            result = working => result,
            () = self.interrupted.cancelled() => {
                Err(Error::new(ErrorKind::Fenced, "interrupted; the database and the stream of the bench are removed"))
            }
        };
        let removed = async {
            postgres::database::drop(&mut server, &name).await?;
            let connection = jetstream::connect(nats, "aftercommit-bench", "_INBOX").await?;
            crate::jetstream::delete(&connection, &name.to_uppercase()).await
        };
        match (result, removed.await) {
            (Ok(value), Ok(())) => Ok(value),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }
}

impl Scratch {
    /// Makes everything and connects.
    async fn make(postgres: PostgresConfig, nats: &NatsConfig, name: &str) -> Result<Self, Error> {
        let prefix = SubjectPrefix::new(name)
            .map_err(|error| Error::with_source(ErrorKind::Config, "a scratch name is illegal", error))?;
        let naming = Naming { stream: name.to_uppercase(), prefix, source: "/bench".into() };
        aftercommit_operator::migrate(&postgres).await?;
        aftercommit_operator::provision(nats, &naming).await?;
        let connection = jetstream::connect(nats, "aftercommit-bench", "_INBOX").await?;
        let stream = StreamReader::new(&connection, &naming.stream);
        Ok(Self { postgres, nats: nats.clone(), naming, connection, stream })
    }

    /// Commits so many events, from several connections.
    pub(crate) async fn fill(&self, events: u64) -> Result<(), Error> {
        let writers = (0..WRITERS).map(|writer| async move {
            let mut session = postgres::connect(&self.postgres, "aftercommit-bench").await?;
            let chunks = (0..events.div_ceil(FILL)).filter(|chunk| chunk % WRITERS == writer);
            for chunk in chunks {
                let numbers = chunk * FILL..events.min((chunk + 1) * FILL);
                crate::postgres::fill(&mut session, writer, numbers, KEYS / WRITERS).await?;
            }
            Ok::<_, Error>(())
        });
        futures_util::future::try_join_all(writers).await?;
        let mut session = postgres::connect(&self.postgres, "aftercommit-bench").await?;
        crate::postgres::come_to_rest(&mut session).await
    }

    /// Events per second from the first to the last message of the stream, by the clock of the server that stored them.
    pub(crate) async fn rate(&self) -> Result<f64, Error> {
        let extent = self.stream.extent().await?;
        let took = crate::jetstream::time_between(&self.stream, extent.first, extent.last).await?;
        Ok((extent.last - extent.first) as f64 / took.as_secs_f64())
    }

    /// The seconds from one message of the stream to another.
    pub(crate) async fn seconds_between(&self, first: u64, last: u64) -> Result<f64, Error> {
        Ok(crate::jetstream::time_between(&self.stream, first, last).await?.as_secs_f64())
    }

    /// Compares what was committed, up to so many events, with what is in the stream.
    pub(crate) async fn counts(&self, events: u64) -> Result<Counts, Error> {
        let mut session = postgres::connect(&self.postgres, "aftercommit-bench").await?;
        let committed = crate::postgres::event_ids(&mut session, events).await?;
        let place = |event: Envelope| Place { event_id: event.id.as_uuid(), outbox_id: event.sequence, key: event.key };
        let arrived: Vec<Place> = self.arrived().await?.into_iter().map(|arrival| place(arrival.event)).collect();
        Ok(Counts::compare(&committed, &arrived))
    }

    /// What is in the stream, in order.
    pub(crate) async fn arrived(&self) -> Result<Vec<Arrival>, Error> {
        crate::jetstream::contents(&self.connection, &self.naming.stream).await
    }
}

/// The URL of another database on the same server.
fn with_database(url: &str, name: &str) -> String {
    let (url, parameters) = url.split_once('?').map_or((url, String::new()), |(url, rest)| (url, format!("?{rest}")));
    let server = match url.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| url.len() - rest.len() + at))
    {
        Some(at) => &url[..at],
        None => url,
    };
    format!("{server}/{name}{parameters}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_url_changes() {
        for (url, expected) in [
            ("postgres://me:pw@host:5432/app?sslmode=require", "postgres://me:pw@host:5432/x?sslmode=require"),
            ("postgres://host", "postgres://host/x"),
            ("postgres://host/", "postgres://host/x"),
            ("postgres://[::1]:5432/app", "postgres://[::1]:5432/x"),
        ] {
            assert_eq!(with_database(url, "x"), expected);
        }
    }
}
