//! A connection to PostgreSQL, straight or through a pooler in transaction mode.
//!
//! Behind a pooler two statements may run in different sessions of the server, and a session is used by others in
//! between. A named prepared statement would be missing in one session and in the way of others in another, and even an
//! unnamed one takes two exchanges (prepare, run), which only a transaction keeps together. So behind a pooler each
//! statement is unnamed and runs in an explicit transaction. Without a pooler it is one exchange with a prepared
//! statement that stays.

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{TryFutureExt, TryStreamExt};
use sqlx::postgres::{PgArguments, PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    AssertSqlSafe, Connection, Describe, Either, Error, Execute, Executor, PgConnection, PgTransaction, Postgres,
    SqlStr,
};

/// Runs single statements, each in a transaction of its own, and transactions. One that is cancelled while it begins
/// has done nothing, and ends with the next statement.
#[derive(Debug)]
pub(crate) struct Session {
    connection: PgConnection,
    pooled: bool,
}

impl Session {
    /// `pooled` when a pooler in transaction mode may stand in between.
    pub(super) fn new(connection: PgConnection, pooled: bool) -> Self {
        Self { connection, pooled }
    }

    /// Begins a transaction.
    pub(crate) async fn begin(&mut self) -> Result<Tx<'_>, Error> {
        Ok(Tx { tx: self.connection.begin().await?, pooled: self.pooled })
    }

    /// The same with other words than BEGIN.
    pub(super) async fn begin_with(&mut self, begin: String) -> Result<Tx<'_>, Error> {
        Ok(Tx { tx: self.connection.begin_with(AssertSqlSafe(begin)).await?, pooled: self.pooled })
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
            return self.connection.fetch_many(query);
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
            return self.connection.fetch_optional(query);
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
}

impl<'s> Tx<'s> {
    /// The transaction for code that is not ours. What it prepares is its own business.
    pub(crate) fn for_others(&mut self) -> &mut PgTransaction<'s> {
        &mut self.tx
    }

    pub(crate) async fn commit(self) -> Result<(), Error> {
        self.tx.commit().await
    }

    pub(crate) async fn rollback(self) -> Result<(), Error> {
        self.tx.rollback().await
    }
}

impl<'c, 's> Executor<'c> for &'c mut Tx<'s> {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        self.tx.fetch_many(Statement { query, pooled: self.pooled })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        self.tx.fetch_optional(Statement { query, pooled: self.pooled })
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
