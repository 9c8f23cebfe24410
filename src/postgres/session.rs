//! A connection to PostgreSQL, straight or through a pooler in transaction mode.
//!
//! Behind a pooler two statements may run in different sessions of the server, and a session is used by others in
//! between. A named prepared statement would be missing in one session and in the way of others in another, and even an
//! unnamed one takes two exchanges (prepare, run), which only a transaction keeps together. So behind a pooler each
//! statement is unnamed and runs in an explicit transaction. Without a pooler it is one exchange with a prepared
//! statement that stays.
//!
//! A connection can die without a word: the server's machine is gone, or something in between has forgotten it because
//! nobody used it for long. Then the kernel waits for a quarter of an hour. A session of a process that must go on waits
//! for a time of its own, and whatever it does not hear of in that time has failed as by an outage.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt, TryFutureExt, TryStreamExt};
use sqlx::postgres::{PgArguments, PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    AssertSqlSafe, Connection, Describe, Either, Error, Execute, Executor, PgConnection, PgTransaction, Postgres,
    SqlStr,
};
use tokio::time::{Instant, Sleep};

/// How long a process that must go on waits for a statement to be answered, or for the next row.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);

/// Runs single statements, each in a transaction of its own, and transactions. One that is cancelled while it begins
/// has done nothing, and ends with the next statement. After an outage it must not be used any more.
#[derive(Debug)]
pub(crate) struct Session {
    connection: PgConnection,
    pooled: bool,
    /// How long it waits for an answer; none for as long as it takes.
    patience: Option<Duration>,
}

impl Session {
    /// `pooled` when a pooler in transaction mode may stand in between.
    pub(super) fn new(connection: PgConnection, pooled: bool) -> Self {
        Self { connection, pooled, patience: None }
    }

    /// Waits for so long for each answer.
    pub(crate) fn patient_for(self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self }
    }

    /// Begins a transaction.
    pub(crate) async fn begin(&mut self) -> Result<Tx<'_>, Error> {
        let (pooled, patience) = (self.pooled, self.patience);
        Ok(Tx { tx: heard(patience, self.connection.begin()).await?, pooled, patience })
    }

    /// The same with other words than BEGIN.
    pub(super) async fn begin_with(&mut self, begin: String) -> Result<Tx<'_>, Error> {
        let (pooled, patience) = (self.pooled, self.patience);
        let begun = self.connection.begin_with(AssertSqlSafe(begin));
        Ok(Tx { tx: heard(patience, begun).await?, pooled, patience })
    }

    /// Runs a statement in a transaction of its own.
    async fn run_pooled<'q, E>(&mut self, query: E) -> Result<Vec<Either<PgQueryResult, PgRow>>, Error>
    where
        E: Execute<'q, Postgres> + 'q,
    {
        let mut tx = self.begin().await?;
        match tx.fetch_many(query).try_collect().await {
            Ok(answer) => tx.commit().await.map(|()| answer),
            Err(error) => {
                // Now, because the pooler cannot give the server's session to others before. What went wrong is the
                // statement; when the connection is gone too, the next one will say so.
                _ = tx.rollback().await;
                Err(error)
            }
        }
    }
}

impl<'c> Executor<'c> for &'c mut Session {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if !self.pooled {
            return heard_out(self.patience, self.connection.fetch_many(query));
        }
        let answer = self.run_pooled(query);
        Box::pin(answer.map_ok(|answer| stream::iter(answer.into_iter().map(Ok))).try_flatten_stream())
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if !self.pooled {
            return Box::pin(heard(self.patience, self.connection.fetch_optional(query)));
        }
        let answer = self.run_pooled(query);
        Box::pin(answer.map_ok(|answer| answer.into_iter().find_map(Either::right)))
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, Error>>
    where
        'c: 'e,
    {
        self.connection.prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Postgres>, Error>>
    where
        'c: 'e,
    {
        self.connection.describe(sql)
    }
}

/// An open transaction. Dropped, it is rolled back with the next statement of its session.
#[derive(Debug)]
pub(crate) struct Tx<'s> {
    tx: PgTransaction<'s>,
    pooled: bool,
    patience: Option<Duration>,
}

impl<'s> Tx<'s> {
    /// The transaction for code that is not ours. What it prepares is its own business.
    pub(crate) fn for_others(&mut self) -> &mut PgTransaction<'s> {
        &mut self.tx
    }

    /// Waits for as long as it takes, because somebody else watches it.
    pub(super) fn unhurried(self) -> Self {
        Self { patience: None, ..self }
    }

    pub(crate) async fn commit(self) -> Result<(), Error> {
        heard(self.patience, self.tx.commit()).await
    }

    pub(crate) async fn rollback(self) -> Result<(), Error> {
        heard(self.patience, self.tx.rollback()).await
    }
}

impl<'c, 's> Executor<'c> for &'c mut Tx<'s> {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        heard_out(self.patience, self.tx.fetch_many(Statement { query, pooled: self.pooled }))
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(heard(self.patience, self.tx.fetch_optional(Statement { query, pooled: self.pooled })))
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, Error>>
    where
        'c: 'e,
    {
        self.tx.prepare_with(sql, parameters)
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Postgres>, Error>>
    where
        'c: 'e,
    {
        self.tx.describe(sql)
    }
}

/// An answer, if it comes in time.
async fn heard<T>(patience: Option<Duration>, answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match patience {
        Some(patience) => tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| Err(silent())),
        None => answer.await,
    }
}

/// The same for each row of one.
fn heard_out<'e, T: Send + 'e>(
    patience: Option<Duration>,
    rows: BoxStream<'e, Result<T, Error>>,
) -> BoxStream<'e, Result<T, Error>> {
    match patience {
        Some(patience) => {
            let silence = Box::pin(tokio::time::sleep(patience));
            Box::pin(HeardOut { rows: Some(rows), patience, silence, heard: false })
        }
        None => rows,
    }
}

fn silent() -> Error {
    Error::Io(io::Error::new(io::ErrorKind::TimedOut, "PostgreSQL does not answer"))
}

/// Rows, and an error at the end when the next one does not come in time.
struct HeardOut<'e, T> {
    /// None behind the end.
    rows: Option<BoxStream<'e, T>>,
    patience: Duration,
    /// One timer for all rows: it is set anew only when one has to be waited for.
    silence: Pin<Box<Sleep>>,
    /// Whether something came since it was set.
    heard: bool,
}

impl<T> Stream for HeardOut<'_, Result<T, Error>> {
    type Item = Result<T, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(rows) = &mut this.rows else { return Poll::Ready(None) };
        if let Poll::Ready(next) = rows.poll_next_unpin(context) {
            this.heard = true;
            return Poll::Ready(next);
        }
        if std::mem::take(&mut this.heard) {
            this.silence.as_mut().reset(Instant::now() + this.patience);
        }
        match this.silence.as_mut().poll(context) {
            Poll::Ready(()) => {
                this.rows = None;
                Poll::Ready(Some(Err(silent())))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// A query whose prepared statement has no name behind a pooler, so that it is gone when the next one comes.
struct Statement<E> {
    query: E,
    pooled: bool,
}

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for Statement<E> {
    fn sql(self) -> SqlStr {
        self.query.sql()
    }

    fn statement(&self) -> Option<&PgStatement> {
        self.query.statement()
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, sqlx::error::BoxDynError> {
        self.query.take_arguments()
    }

    fn persistent(&self) -> bool {
        !self.pooled && self.query.persistent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that come after these pauses in seconds, heard with a patience of one minute: each row, or why there is
    /// none.
    async fn rows(pauses: &'static [u64], ends: bool) -> Vec<Result<u64, io::ErrorKind>> {
        let rows = stream::iter(pauses).then(async |pause| {
            tokio::time::sleep(Duration::from_secs(*pause)).await;
            Ok(*pause)
        });
        let rows = if ends { rows.boxed() } else { rows.chain(stream::pending()).boxed() };
        let heard = heard_out(Some(SILENCE), rows).map_err(|error| match error {
            Error::Io(error) => error.kind(),
            other => panic!("{other}"),
        });
        heard.collect().await
    }

    #[tokio::test(start_paused = true)]
    async fn rows_are_waited_for_one_by_one() {
        assert_eq!(rows(&[50, 59, 0, 59], true).await, [Ok(50), Ok(59), Ok(0), Ok(59)]);
        assert_eq!(rows(&[50, 61, 0], true).await, [Ok(50), Err(io::ErrorKind::TimedOut)], "and nothing behind it");
        assert_eq!(rows(&[], false).await, [Err(io::ErrorKind::TimedOut)]);
        assert_eq!(rows(&[1, 2], false).await, [Ok(1), Ok(2), Err(io::ErrorKind::TimedOut)]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_an_answer_may_take_hours() {
        let late = async {
            tokio::time::sleep(Duration::from_hours(5)).await;
            Ok(7)
        };
        assert_eq!(heard(None, late).await.unwrap(), 7);
        let silent = heard(Some(SILENCE), std::future::pending::<Result<(), Error>>()).await.unwrap_err();
        assert!(crate::postgres::is_outage(&silent), "{silent}");
    }
}
