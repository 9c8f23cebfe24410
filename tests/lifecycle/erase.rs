//! Erasing a tenant in several services. Events are handed from database to database by the test itself, so that it can repeat,
//! delay and lose them.

mod cli;
mod guards;
mod kills;
mod system;
mod tables;
mod verification;

use std::collections::BTreeMap;

use aftercommit::Event;
use aftercommit::erase::operate::{self, ErasureStatus};
use aftercommit::erase::{
    self, Coordinator, Eraser, Erasing, Erasure, Outcome, Request, Requested, Rows, Subject, Tables,
};
use aftercommit::fanout::{JobId, Participant};
use aftercommit::worker::{Delivery, Handler, HandlerError};
use sqlx::PgPool;

use crate::support::Database;

/// The tenant that is erased.
const TENANT: &str = "5d0f3a52-6b5b-4b1c-9a3e-0c6d1f2a3b41";
const OTHER: &str = "00000000-0000-0000-0000-000000000002";

/// Orders with children of children, what goes by cascade, and templates of which some stay.
const ORDERS: &str = "
    create table tenants (id uuid primary key, name text);
    create table orders (id bigint primary key, tenant_id uuid);
    create index on orders (tenant_id);
    create table items (id bigint primary key, order_id bigint references orders);
    create index on items (order_id);
    create table item_notes (id bigint primary key, item_id bigint references items);
    create index on item_notes (item_id);
    create table attachments (id bigint primary key, order_id bigint references orders on delete cascade);
    create index on attachments (order_id);
    create table pages (id bigint primary key, attachment_id bigint references attachments on delete cascade);
    create index on pages (attachment_id);
    create table templates (id bigint primary key, tenant_id uuid, is_system boolean);
    create index on templates (tenant_id);";

/// Half of the rows are the tenant's: 20 orders with 40 items, 40 notes, 20 attachments, 20 pages; 5 templates, 1 of which stays.
fn rows() -> String {
    format!(
        "insert into tenants values ('{TENANT}', 'Acme'), ('{OTHER}', 'Other');
         insert into orders select n, case n % 2 when 0 then '{TENANT}'::uuid else '{OTHER}' end from generate_series(1, 40) n;
         insert into items select n, (n + 1) / 2 from generate_series(1, 80) n;
         insert into item_notes select n, n from generate_series(1, 80) n;
         insert into attachments select n, n from generate_series(1, 40) n;
         insert into pages select n, n from generate_series(1, 40) n;
         insert into templates select n, '{TENANT}', nullif(n = 1, n = 2) from generate_series(1, 5) n"
    )
}

fn orders() -> Tables {
    Tables::new("orders").of(
        "tenant",
        [
            Rows::of("public.item_notes").parent("item_id", "public.items"),
            Rows::of("public.items").parent("order_id", "public.orders"),
            Rows::of("public.orders").column("tenant_id"),
            Rows::of("public.templates").column("tenant_id").keep("is_system"),
            Rows::of("public.old_orders").column("tenant_id").optional(),
        ],
    )
}

/// Bills, with another kind of condition.
fn bills() -> Tables {
    let rows = Rows::of("public.bills").condition("tenant = 'tenant:' || $1");
    Tables::new("bills").of("tenant", [rows])
}

/// What the orders of the tenant are, by table.
fn all_orders() -> BTreeMap<String, u64> {
    [("orders", 20), ("items", 40), ("item_notes", 40), ("attachments", 20), ("pages", 20), ("templates", 4)]
        .map(|(table, count)| (format!("public.{table}"), count))
        .into_iter()
        .chain([("public.old_orders".into(), 0)])
        .collect()
}

/// A requester and two services, each with a database of its own.
struct Fleet {
    requester: Database,
    pool: PgPool,
    orders: Service,
    bills: Service,
}

struct Service {
    database: Database,
    pool: PgPool,
}

impl Service {
    async fn new(sql: &str) -> Self {
        let database = Database::migrated().await;
        database.execute(sql).await;
        let pool = database.pool().await;
        Self { database, pool }
    }

    async fn count(&self, rows: &str) -> i64 {
        count(&self.pool, rows).await
    }
}

async fn count(pool: &PgPool, rows: &str) -> i64 {
    let sql = sqlx::AssertSqlSafe(format!("select count(*) from {rows}"));
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// The events of a type in an outbox, in order.
async fn events<E: Event>(pool: &PgPool) -> Vec<E> {
    let payloads: Vec<Vec<u8>> =
        sqlx::query_scalar("select payload from aftercommit.outbox where type = $1 order by id")
            .bind(E::TYPE)
            .fetch_all(pool)
            .await
            .unwrap();
    payloads.iter().map(|payload| serde_json::from_slice(payload).unwrap()).collect()
}

/// Hands an event to a handler as a worker does: in a transaction that commits when it is handled.
async fn hand<E: Event>(pool: &PgPool, handler: &impl Handler<E>, event: E, attempt: u32) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await.unwrap();
    let mut delivery = Delivery::new(event);
    delivery.attempt = attempt;
    handler.handle(&mut tx, &delivery).await?;
    tx.commit().await.unwrap();
    Ok(())
}

impl Fleet {
    async fn new() -> Self {
        let requester = Database::migrated().await;
        requester
            .execute(&format!(
                "create table tenants (id uuid primary key, name text);
            create table admins (tenant_id uuid, name text); insert into tenants values ('{TENANT}', 'Acme')"
            ))
            .await;
        let pool = requester.pool().await;
        let orders = Service::new(&(ORDERS.to_string() + &rows())).await;
        let bills = Service::new(&format!(
            "create table bills (id bigint primary key, tenant text); create index on bills (tenant);
             insert into bills select n, 'tenant:' || case n % 2 when 0 then '{TENANT}' else '{OTHER}' end from generate_series(1, 10) n"
        )).await;
        Self { requester, pool, orders, bills }
    }

    fn request() -> Request {
        Request::new(Subject::new("tenant", TENANT), "ann").participants(["orders", "bills"])
    }

    async fn ask(&self) -> JobId {
        let asked = operate::ask(&self.requester.config, Self::request()).await.unwrap();
        assert!(asked.new);
        asked.job
    }

    /// The last request, to a participant, again and again until it has answered.
    async fn works<E: Eraser>(&self, service: &Service, participant: &Participant<Erasure, Erasing<E>>) -> u32 {
        for attempt in 1..100 {
            let mut event = events::<Requested>(&self.pool).await.pop().unwrap();
            event.not_before = None;
            match hand(&service.pool, participant, event, attempt).await {
                Ok(()) => return attempt,
                Err(error) => eprintln!("attempt {attempt}: {error:?}"),
            }
        }
        panic!("it does not answer");
    }

    async fn both_work(&self) {
        self.works(&self.orders, &erase::participant(orders())).await;
        self.works(&self.bills, &erase::participant(bills())).await;
    }

    /// All answers so far of all services, to the coordinator.
    async fn coordinate(&self) {
        for service in [&self.orders, &self.bills] {
            for outcome in events::<Outcome>(&service.pool).await {
                hand(&self.pool, &Coordinator::new(), outcome, 1).await.unwrap();
            }
        }
    }

    async fn status(&self, job: JobId) -> ErasureStatus {
        operate::status(&self.requester.config, job).await.unwrap()
    }
}

/// What the command printed.
fn cli(database: &Database, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    let output = command.args(arguments).env("DATABASE_URL", &database.config.url).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}
