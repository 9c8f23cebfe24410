//! Tables whose changes become events: by a capture, and by triggers written by hand with the same effect.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use super::failed;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::{database_error, options};

/// The tables, each with its way of telling changes.
pub(crate) const TABLES: [&str; 4] = ["captured", "by_hand", "published", "bare"];

/// As a careful programmer writes it: only real changes, the columns by name, one INSERT.
const BY_HAND: &str = "
    create function bench.by_hand() returns trigger language plpgsql as $$
    declare
        changed text[] := array_remove(array[
            case when old.id is distinct from new.id then 'id' end,
            case when old.name is distinct from new.name then 'name' end,
            case when old.balance is distinct from new.balance then 'balance' end,
            case when old.state is distinct from new.state then 'state' end], null);
    begin
        if changed <> '{}' then
            insert into aftercommit.outbox (event_id, type, key, payload)
            values (aftercommit.new_event_id(), 'account.updated', new.id::text, convert_to(json_build_object(
                'op', 'update', 'table', 'bench.by_hand', 'key', json_build_object('id', new.id),
                'new', json_build_object('id', new.id, 'name', new.name, 'balance', new.balance, 'state', new.state),
                'old', null, 'changed', changed)::text, 'UTF8'));
        end if;
        return null;
    end $$;
    create trigger by_hand after update on bench.by_hand for each row execute function bench.by_hand();";

/// The same with the function that is there for triggers.
const PUBLISHED: &str = "
    create function bench.published() returns trigger language plpgsql as $$
    declare
        changed text[] := array_remove(array[
            case when old.id is distinct from new.id then 'id' end,
            case when old.name is distinct from new.name then 'name' end,
            case when old.balance is distinct from new.balance then 'balance' end,
            case when old.state is distinct from new.state then 'state' end], null);
    begin
        if changed <> '{}' then
            perform aftercommit.publish('account.updated', jsonb_build_object(
                'op', 'update', 'table', 'bench.published', 'key', jsonb_build_object('id', new.id), 'new', to_jsonb(new),
                'old', null, 'changed', changed), new.id::text);
        end if;
        return null;
    end $$;
    create trigger published after update on bench.published for each row execute function bench.published();";

/// A connection of the service.
pub(crate) struct Service(PgConnection);

impl Service {
    pub(crate) async fn connect(config: &PostgresConfig) -> Result<Self, Error> {
        let connected = options(config, "aftercommit-bench")?.connect().await;
        connected.map(Self).map_err(|error| database_error("cannot connect to PostgreSQL", error))
    }

    async fn run(&mut self, sql: &str) -> Result<(), Error> {
        self.0.execute(sqlx::raw_sql(AssertSqlSafe(sql.to_string()))).await.map(drop).map_err(failed)
    }

    /// Makes the tables with so many rows, and the events of one change of each row.
    pub(crate) async fn create(&mut self, rows: u64) -> Result<(), Error> {
        self.run("create schema bench").await?;
        for table in TABLES {
            self.run(&format!(
                "create table bench.{table} (id bigint primary key, name text not null, balance bigint not null, state text);
                 insert into bench.{table} select n, 'account ' || n, 0, 'open' from generate_series(1, {rows}) as n"
            ))
            .await?;
        }
        self.run(&format!("{BY_HAND} {PUBLISHED} select aftercommit.capture('bench.captured', type => 'account')"))
            .await?;
        self.run("update bench.captured set balance = balance + 1").await?;
        self.run("create table bench.event as select type, key, headers, payload from aftercommit.outbox order by id")
            .await?;
        self.rest().await
    }

    /// Lets every run find the same.
    pub(crate) async fn rest(&mut self) -> Result<(), Error> {
        self.run("truncate aftercommit.outbox").await?;
        for table in TABLES {
            self.run(&format!("vacuum (analyze) bench.{table}")).await?;
        }
        self.run("checkpoint").await
    }

    /// Changes all rows of a table in one statement.
    pub(crate) async fn update_all(&mut self, table: &str) -> Result<(), Error> {
        self.run(&format!("update bench.{table} set balance = balance + 1")).await
    }

    /// Makes and writes the same events in one statement.
    pub(crate) async fn insert_all(&mut self) -> Result<(), Error> {
        self.run(
            "insert into aftercommit.outbox (event_id, type, key, headers, payload)
             select aftercommit.new_event_id(), 'account.updated', a.id::text, '{}',
                    convert_to('{\"op\":\"update\",\"table\":\"bench.captured\",\"key\":' || row_to_json(k)::text || ',\"new\":'
                        || row_to_json(a)::text || ',\"old\":null,\"changed\":[\"balance\"]}', 'UTF8')
               from bench.captured as a cross join lateral (select a.id) as k",
        )
        .await
    }

    /// Writes events that were made before in one statement.
    pub(crate) async fn copy_all(&mut self) -> Result<(), Error> {
        self.run(
            "insert into aftercommit.outbox (event_id, type, key, headers, payload)
             select aftercommit.new_event_id(), type, key, headers, payload from bench.event",
        )
        .await
    }

    /// Changes one row in a transaction of its own.
    pub(crate) async fn update_one(&mut self, table: &str, row: u64) -> Result<(), Error> {
        let sql = format!("update bench.{table} set balance = balance + 1 where id = $1");
        let done = sqlx::query(AssertSqlSafe(sql)).bind(row.cast_signed()).execute(&mut self.0).await;
        done.map(drop).map_err(failed)
    }

    /// That so many events were written.
    pub(crate) async fn expect(&mut self, events: u64) -> Result<(), Error> {
        let found: i64 = sqlx::query_scalar("select count(*) from aftercommit.outbox")
            .fetch_one(&mut self.0)
            .await
            .map_err(failed)?;
        if found == events.cast_signed() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Integrity, format!("{found} events were written for {events} changes")))
    }
}
