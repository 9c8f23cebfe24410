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
//!
//! It is connections that rest which are forgotten so. A session that has rested asks first whether its connection is
//! still there, and takes another one to the same server when no answer comes at once. Nothing is lost with the old one:
//! no state of a session is relied upon.

use std::borrow::Cow;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{TryFutureExt, TryStreamExt};
use sqlx::postgres::{PgArguments, PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    AssertSqlSafe, Connection, Describe, Either, Error, Execute, Executor, PgConnection, PgTransaction, Postgres,
    SqlSafeStr, SqlStr,
};
use tokio::time::Instant;

use super::patience::{heard, heard_out};
use super::pins::{self, Server};
use super::{Opened, Way};
use aftercommit_outbox::schema::Schema;

/// How long a process that must go on waits for a statement to be answered, or for the next row.
const SILENCE: Duration = Duration::from_secs(60);
/// A connection that was not used for so long may have been forgotten by something on the way.
const REST: Duration = Duration::from_secs(2);
/// How long such a connection may take to answer until another one is opened beside it.
const PROBE: Duration = Duration::from_millis(250);

/// So much sooner than we give a statement up, its server does.
const HASTE: Duration = Duration::from_secs(5);
/// How long a statement may run on the server of which nobody hears any more.
const END_WITH_CLIENT: &str = "set client_connection_check_interval = '5s'";

/// Lets the server look now and then, while a statement runs, whether somebody still waits for it: one that was given up
/// ends there, too, and its locks with it. Servers on systems that cannot tell refuse that, and go on as they did.
pub(super) async fn end_with_client(connection: &mut PgConnection) -> Result<bool, Error> {
    match sqlx::raw_sql(END_WITH_CLIENT).execute(connection).await {
        Ok(_) => Ok(true),
        Err(Error::Database(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Counts a session as used until it is dropped.
#[derive(Debug)]
pub(super) struct InUse(Arc<AtomicUsize>);

impl InUse {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs single statements, each in a transaction of its own, and transactions. One that is cancelled while it begins
/// has done nothing, and ends with the next statement. After an outage it must not be used any more.
#[derive(Debug)]
pub struct Session {
    connection: PgConnection,
    way: Arc<Way>,
    /// Where the connection leads.
    server: Server,
    /// What it began with: see [`pins::state`].
    state: String,
    /// Whether the server ends a statement whose client is gone.
    ends_with_client: bool,
    /// When it was last used.
    used: Instant,
    /// How long it waits for an answer; none for as long as it takes.
    patience: Option<Duration>,
    /// Counts it as used until it is dropped.
    _in_use: Option<InUse>,
}

impl Session {
    pub(super) async fn open(way: Arc<Way>) -> Result<Self, Error> {
        let Opened { connection, server, state, ends_with_client } = way.open().await?;
        Ok(Self {
            connection,
            way,
            server,
            state,
            ends_with_client,
            used: Instant::now(),
            patience: None,
            _in_use: None,
        })
    }

    /// Is counted as used, or as idle.
    pub(super) fn in_use(self, in_use: Option<InUse>) -> Self {
        Self { _in_use: in_use, ..self }
    }

    /// Whose statements it runs.
    pub(super) fn whose(&self) -> pins::Whose {
        self.way.whose
    }

    /// Where it leads.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The schema that its statements are for.
    pub fn schema(&self) -> &Schema {
        &self.way.schema
    }

    /// What it began with. None behind a pooler, where the sessions of the server change.
    pub fn state(&self) -> Option<&str> {
        Some(self.state.as_str()).filter(|_| !self.way.pooled)
    }

    /// Takes back what code that is not ours has made of it. Behind a pooler that is the pooler's business.
    pub(super) async fn reset(&mut self) -> Result<(), Error> {
        if self.way.pooled {
            return Ok(());
        }
        let reset = match self.ends_with_client {
            true => format!("{}; {END_WITH_CLIENT}", pins::RESET),
            false => pins::RESET.into(),
        };
        heard(self.patience, sqlx::raw_sql(AssertSqlSafe(reset)).execute(&mut self.connection)).await.map(drop)
    }

    /// For a process that must go on: waits for a minute for each answer.
    pub fn watched(self) -> Self {
        Self { patience: Some(SILENCE), ..self }
    }

    /// Makes sure, after a rest, that the connection is still there. One that does not answer at once gets company: what
    /// comes first is used, the answer or another connection.
    async fn wake(&mut self) -> Result<(), Error> {
        if self.used.elapsed() < REST {
            self.used = Instant::now();
            return Ok(());
        }
        let opened = {
            let mut asked = pin!(self.connection.ping());
            let another = async {
                tokio::time::sleep(PROBE).await;
                self.way.open().await
            };
            tokio::select! {
                biased;
                answer = &mut asked => answer.ok().map(|()| None),
                opened = another => match opened {
                    Ok(opened) => Some(Some(opened)),
                    // As long as there is no other one, this one may still answer.
                    Err(_) => Some(heard(self.patience, asked).await.map(|()| None)?),
                },
            }
        };
        let opened = match opened {
            Some(opened) => opened,
            None => Some(self.way.open().await?),
        };
        if let Some(opened) = opened {
            // What the process knows of the database may not be true of another server.
            if opened.server != self.server {
                return Err(pins::another_server());
            }
            (self.connection, self.state) = (opened.connection, opened.state);
        }
        // Only now: who is cancelled in the middle asks again.
        self.used = Instant::now();
        Ok(())
    }

    /// Begins a transaction of ours.
    pub async fn begin(&mut self) -> Result<Tx<'_>, Error> {
        self.begin_and("").await
    }

    /// The same with further statements, each with a semicolon before it, in the same exchange.
    pub async fn begin_and(&mut self, more: &str) -> Result<Tx<'_>, Error> {
        let pinned = self.way.pooled && self.whose() == pins::Whose::Ours;
        let begin = if pinned { pins::BEGIN_POOLED } else { "begin" };
        self.begin_with(format!("{begin}{more}")).await
    }

    /// Begins one with other words than BEGIN. Behind a pooler it has the settings of the role.
    pub async fn begin_with(&mut self, begin: String) -> Result<Tx<'_>, Error> {
        self.wake().await?;
        let (pooled, patience) = (self.way.pooled, self.patience);
        let begun = self.connection.begin_with(AssertSqlSafe(self.way.schema.sql(&begin).into_owned()));
        Ok(Tx { tx: heard(patience, begun).await?, pooled, patience, schema: self.way.schema.clone() })
    }

    /// Runs a statement in a transaction of its own.
    async fn run_pooled<'q, E>(&mut self, query: E) -> Result<Vec<Either<PgQueryResult, PgRow>>, Error>
    where
        E: Execute<'q, Postgres> + 'q,
    {
        let mut tx = match self.patience {
            // The pooler stands between, so the server cannot tell that nobody waits any more.
            Some(patience) => {
                let limit = patience.saturating_sub(HASTE).as_millis();
                self.begin_and(&format!("; set local statement_timeout = {limit}")).await?
            }
            None => self.begin().await?,
        };
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
        if !self.way.pooled {
            let answer = async {
                self.wake().await?;
                let statement = Statement { query, pooled: false, schema: self.way.schema.clone() };
                Ok(heard_out(self.patience, self.connection.fetch_many(statement)))
            };
            return Box::pin(answer.try_flatten_stream());
        }
        let answer = self.run_pooled(query);
        Box::pin(answer.map_ok(|answer| stream::iter(answer.into_iter().map(Ok))).try_flatten_stream())
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        if !self.way.pooled {
            return Box::pin(async {
                self.wake().await?;
                let statement = Statement { query, pooled: false, schema: self.way.schema.clone() };
                heard(self.patience, self.connection.fetch_optional(statement)).await
            });
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
pub struct Tx<'s> {
    tx: PgTransaction<'s>,
    pooled: bool,
    patience: Option<Duration>,
    schema: Schema,
}

impl<'s> Tx<'s> {
    /// The transaction for code that is not ours. What it prepares is its own business.
    pub fn for_others(&mut self) -> &mut PgTransaction<'s> {
        &mut self.tx
    }

    /// Waits for as long as it takes, because somebody else watches it.
    pub(super) fn unhurried(self) -> Self {
        Self { patience: None, ..self }
    }

    /// Commits. An error leaves open whether it is committed, unless the server has refused.
    pub async fn commit(self) -> Result<(), Error> {
        heard(self.patience, self.tx.commit()).await
    }

    /// A statement that was given up may fail only now, of its own limit or of anything else. That error is not of the
    /// rollback, which then goes with the next statement of the session. Only a session that is over fails it.
    pub async fn rollback(self) -> Result<(), Error> {
        match heard(self.patience, self.tx.rollback()).await {
            Err(error @ Error::Database(_)) if !super::ends_session(&error) => Ok(()),
            rolled_back => rolled_back,
        }
    }
}

impl<'c, 's> Executor<'c> for &'c mut Tx<'s> {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let statement = Statement { query, pooled: self.pooled, schema: self.schema.clone() };
        heard_out(self.patience, self.tx.fetch_many(statement))
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let statement = Statement { query, pooled: self.pooled, schema: self.schema.clone() };
        Box::pin(heard(self.patience, self.tx.fetch_optional(statement)))
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

/// A query for the schema that the session is for. Its prepared statement has no name behind a pooler, so that it is gone when
/// the next one comes.
struct Statement<E> {
    query: E,
    pooled: bool,
    schema: Schema,
}

impl<'q, E: Execute<'q, Postgres>> Execute<'q, Postgres> for Statement<E> {
    fn sql(self) -> SqlStr {
        let sql = self.query.sql();
        match self.schema.sql(sql.as_str()) {
            Cow::Borrowed(_) => sql,
            Cow::Owned(other) => AssertSqlSafe(other).into_sql_str(),
        }
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

    /// What the servers of these sessions still run.
    async fn still_runs(config: &crate::config::PostgresConfig, mark: &str) -> bool {
        let mut other = crate::postgres::connect(config, "aftercommit-test").await.unwrap();
        sqlx::query_scalar(
            "select exists (select from pg_stat_activity
                             where state = 'active' and pid <> pg_backend_pid() and query like '%' || $1 || '%')",
        )
        .bind(mark)
        .fetch_one(&mut other)
        .await
        .unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_statement_that_was_given_up_ends_on_the_server() {
        let postgres = aftercommit_testing::servers::Postgres::shared().await.unwrap();
        let config = crate::config::PostgresConfig::new(postgres.create_database().await.unwrap());
        let mut session = crate::postgres::connect(&config, "aftercommit-test").await.unwrap();
        session.patience = Some(Duration::from_secs(1));
        let given_up = sqlx::query("select pg_sleep(600), 'given up'").execute(&mut session).await.unwrap_err();
        assert!(crate::postgres::is_outage(&given_up), "{given_up}");
        assert!(still_runs(&config, "given up").await, "it was sent");
        // As whoever used it does after an outage.
        drop(session);
        let ended = async || !still_runs(&config, "given up").await;
        aftercommit_testing::eventually(Duration::from_secs(30), "it has ended on the server", ended).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn behind_a_pooler_the_server_gives_a_statement_up_first() {
        let postgres = aftercommit_testing::servers::Postgres::shared().await.unwrap();
        let url = postgres.create_database().await.unwrap();
        let config = crate::config::PostgresConfig { pooled: true, ..crate::config::PostgresConfig::new(url) };
        let mut session = crate::postgres::connect(&config, "aftercommit-test").await.unwrap();
        session.patience = Some(HASTE + Duration::from_secs(1));
        let error = sqlx::query("select pg_sleep(600)").execute(&mut session).await.unwrap_err();
        assert!(error.to_string().contains("statement timeout"), "{error}");
        let one: i32 = sqlx::query_scalar("select 1").fetch_one(&mut session).await.unwrap();
        assert_eq!(one, 1, "the session goes on");
    }
}
