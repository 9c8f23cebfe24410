//! The tables that most tests prune: sessions with kernels, and associations that name either by type and id.

use aftercommit::prune::{Association, Child, Spec};
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::Database;

/// A database with five terminated sessions, of which three ended two hours ago, and three active ones, with two kernels each.
pub struct Sessions {
    pub database: Database,
    pub pool: PgPool,
}

const TABLES: &str = "
create table sessions (
    id            bigint primary key,
    status        text not null,
    terminated_at timestamptz
);
create table kernels (
    id         bigint primary key,
    session_id bigint not null references sessions,
    name       text not null default ''
);
create index on kernels (session_id);
create table associations (entity_type text not null, entity_id text not null, primary key (entity_type, entity_id));
insert into sessions
select n, case when n <= 5 then 'terminated' else 'active' end,
       case when n <= 3 then now() - interval '2 hours' when n <= 5 then now() - interval '5 minutes' end
  from generate_series(1, 8) n;
insert into kernels (id, session_id) select n, (n + 1) / 2 from generate_series(1, 16) n;
insert into associations select 'session', n::text from generate_series(1, 8) n;
insert into associations select 'vfolder', n::text from generate_series(1, 8) n;
";

impl Sessions {
    pub async fn new() -> Self {
        let database = Database::migrated().await;
        database.execute(TABLES).await;
        let pool = database.pool().await;
        Self { database, pool }
    }

    /// How many rows a table has for which this holds.
    pub async fn count(&self, rows: &str) -> i64 {
        let sql = AssertSqlSafe(format!("select count(*) from {rows}"));
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// The payloads of the `rows.pruned` events, in order.
    pub async fn told(&self) -> Vec<serde_json::Value> {
        let events = "select data from aftercommit.events where type = 'rows.pruned' order by id";
        sqlx::query_scalar(events).fetch_all(&self.pool).await.unwrap()
    }
}

/// The table alone.
pub fn bare() -> Spec {
    Spec::new("public.sessions", "status = 'terminated'").name("sessions").before_column("terminated_at")
}

/// With children and associations.
pub fn whole() -> Spec {
    bare().child(Child::new("public.kernels", "session_id")).association(Association::new(
        "public.associations",
        "entity_type",
        "entity_id",
        "session",
    ))
}
