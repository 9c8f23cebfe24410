//! The code of the guides in docs/guides, which is tested here: each of their Rust blocks is in this file as it is there.

use std::time::Duration;

use aftercommit::outbox::{Publisher, RawEvent};
use aftercommit::testing::coverage::Coverage;
use aftercommit::testing::{self, Environment};
use aftercommit::worker::{BatchError, BatchHandler, Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{Event, EventId, outbox};
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, PgTransaction};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct OrderPlaced {
    order: i64,
    customer: i64,
    cents: i64,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "order.placed";

    // Events of one order reach each subscriber in the order of their commits.
    fn key(&self) -> Option<String> {
        Some(format!("order-{}", self.order))
    }
}

struct Orders;

impl Orders {
    async fn place(tx: &mut PgTransaction<'_>, order: i64, customer: i64, cents: i64) -> Result<EventId, Error> {
        sqlx::query("insert into orders (id, customer, cents) values ($1, $2, $3)")
            .bind(order)
            .bind(customer)
            .bind(cents)
            .execute(&mut **tx)
            .await?;
        Ok(outbox::publish(tx, &OrderPlaced { order, customer, cents }).await?)
    }
}

struct CountRevenue;

impl Handler<OrderPlaced> for CountRevenue {
    async fn handle(&self, tx: &mut PgTransaction<'_>, placed: &Delivery<OrderPlaced>) -> Result<(), HandlerError> {
        let OrderPlaced { order, cents, .. } = placed.event;
        sqlx::query("insert into revenue (order_id, cents) values ($1, $2) on conflict (order_id) do nothing")
            .bind(order)
            .bind(cents)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

struct SendReceipt;

impl Handler<OrderPlaced> for SendReceipt {
    async fn handle(&self, tx: &mut PgTransaction<'_>, placed: &Delivery<OrderPlaced>) -> Result<(), HandlerError> {
        let address: Option<String> = sqlx::query_scalar("select address from customer where id = $1")
            .bind(placed.event.customer)
            .fetch_optional(&mut **tx)
            .await?; // an error: again after the backoff, and after max_attempts a dead letter
        let Some(address) = address else {
            // Customers have keys of their own, so theirs may come later. This costs no attempt.
            return Err(HandlerError::snooze(Duration::from_secs(5)));
        };
        if !address.contains('@') {
            // No later attempt would succeed: a dead letter now. The reason is logged, so it holds no data.
            return Err(HandlerError::reject("the customer's address is not a mail address"));
        }
        sqlx::query("insert into mail (id, recipient, order_id) values ($1, $2, $3) on conflict do nothing")
            .bind(placed.id.as_uuid())
            .bind(address)
            .bind(placed.event.order)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

struct SumRevenue;

impl BatchHandler<OrderPlaced> for SumRevenue {
    async fn handle(&self, tx: &mut PgTransaction<'_>, placed: &[Delivery<OrderPlaced>]) -> Result<(), BatchError> {
        let (orders, cents): (Vec<i64>, Vec<i64>) =
            placed.iter().map(|placed| (placed.event.order, placed.event.cents)).unzip();
        if let Some(at) = cents.iter().position(|cents| *cents < 0) {
            return Err(BatchError::at(at, HandlerError::reject("an order cannot have a negative total")));
        }
        sqlx::query("insert into revenue select * from unnest($1::bigint[], $2::bigint[]) on conflict do nothing")
            .bind(orders)
            .bind(cents)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

fn batch_subscribers() -> [Subscriber; 2] {
    [
        Subscriber::new("revenue").on_batch::<OrderPlaced>(SumRevenue).max_batch(500),
        // Gathers the events of an order for ten seconds, and then handles them at once.
        Subscriber::new("totals").on_batch::<OrderPlaced>(SumRevenue).debounce(Duration::from_secs(10)),
    ]
}

fn subscribers() -> Vec<Subscriber> {
    vec![
        Subscriber::new("revenue").on::<OrderPlaced>(CountRevenue).concurrency(16),
        Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt).max_attempts(5).time_limit(Duration::from_secs(10)),
    ]
}

#[derive(Serialize, Deserialize)]
struct VisibilityChanged {
    item: i64,
}

impl Event for VisibilityChanged {
    const TYPE: &'static str = "item.visibility_changed";
}

struct ShowInWindow;

impl Handler<VisibilityChanged> for ShowInWindow {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        changed: &Delivery<VisibilityChanged>,
    ) -> Result<(), HandlerError> {
        // Makes the shop window what the item says now. An item that is gone leaves it.
        sqlx::query(
            "with gone as (
                delete from shop_window where item = $1 and not exists (select from item where id = $1 and visible))
             insert into shop_window (item) select id from item where id = $1 and visible on conflict do nothing",
        )
        .bind(changed.event.item)
        .execute(&mut **tx)
        .await?;
        Ok(())
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct InvoiceSent {
    invoice: i64,
    cents: i64,
    // New in version 2. Version 1 has no such field, and still can be read.
    #[serde(default = "euro")]
    currency: String,
}

fn euro() -> String {
    "EUR".into()
}

impl Event for InvoiceSent {
    const TYPE: &'static str = "invoice.sent";
    const VERSION: u32 = 2;
}

const TABLES: &str = "
    create table orders (id bigint primary key, customer bigint, cents bigint not null);
    create table customer (id bigint primary key, address text not null);
    create table revenue (order_id bigint primary key, cents bigint not null);
    create table mail (id uuid primary key, recipient text not null, order_id bigint not null);
    create table item (id bigint primary key, visible boolean not null);
    create table shop_window (item bigint primary key);
    insert into customer values (1, 'ann@example.org')";

async fn environment() -> Result<Environment, Error> {
    let environment = Environment::start().await?;
    sqlx::raw_sql(TABLES).execute(environment.pool()).await?;
    Ok(environment)
}

async fn pool() -> Result<PgPool, Error> {
    Ok(environment().await?.pool().clone())
}

#[tokio::test]
async fn placing_an_order_publishes_it() -> Result<(), Error> {
    let mut tx = pool().await?.begin().await?;
    let id = Orders::place(&mut tx, 7, 1, 990).await?;

    let placed = testing::assert_published::<OrderPlaced>(&mut tx).times(1).await;
    assert_eq!(placed[0].id, id);
    assert_eq!(placed[0].event, OrderPlaced { order: 7, customer: 1, cents: 990 });

    // From here on only what comes now counts.
    testing::clear(&mut tx).await?;
    Orders::place(&mut tx, 8, 1, 10).await?;
    testing::assert_published::<OrderPlaced>(&mut tx).matching(|placed| placed.order == 7).never().await;
    Ok(())
}

#[tokio::test]
async fn a_receipt_needs_an_address() -> Result<(), Error> {
    let mut tx = pool().await?.begin().await?;
    sqlx::query("insert into customer values (2, 'nowhere')").execute(&mut *tx).await?;
    let placed = Delivery::new(OrderPlaced { order: 7, customer: 2, cents: 990 });
    let answer = SendReceipt.handle(&mut tx, &placed).await;
    assert!(matches!(answer, Err(HandlerError::Reject { .. })));
    Ok(())
}

#[tokio::test]
async fn handlers_may_run_again() -> Result<(), Error> {
    let mut tx = pool().await?.begin().await?;
    let placed = Delivery::new(OrderPlaced { order: 7, customer: 1, cents: 990 });
    testing::run_twice(&mut tx, &CountRevenue, &placed).await?;
    testing::run_twice(&mut tx, &SendReceipt, &placed).await?;
    Ok(())
}

#[tokio::test]
async fn an_order_is_counted_and_receipted() -> Result<(), Error> {
    let pool = pool().await?;
    let mut tx = pool.begin().await?;
    let id = Orders::place(&mut tx, 7, 1, 990).await?;
    tx.commit().await?;

    let drained = testing::drain(&pool, subscribers()).await?;
    drained.assert_all_handled();
    assert_eq!(drained["revenue"].handled, [id]);
    let mails: i64 = sqlx::query_scalar("select count(*) from mail where order_id = 7").fetch_one(&pool).await?;
    assert_eq!(mails, 1);
    Ok(())
}

#[tokio::test]
async fn orders_are_counted_in_batches_and_a_negative_one_fails_alone() -> Result<(), Error> {
    let pool = pool().await?;
    let mut tx = pool.begin().await?;
    for (order, cents) in [(1, 10), (2, -1), (3, 30)] {
        Orders::place(&mut tx, order, 1, cents).await?;
    }
    tx.commit().await?;
    let drained = testing::drain(&pool, batch_subscribers()).await?;
    assert_eq!((drained["revenue"].handled.len(), drained["revenue"].dead.len()), (2, 1));
    let sum: i64 = sqlx::query_scalar("select sum(cents)::bigint from revenue").fetch_one(&pool).await?;
    assert_eq!(sum, 40);
    Ok(())
}

#[tokio::test]
async fn a_receipt_waits_for_its_customer() -> Result<(), Error> {
    let pool = pool().await?;
    let mut tx = pool.begin().await?;
    let id = Orders::place(&mut tx, 7, 2, 990).await?;
    tx.commit().await?;
    assert_eq!(testing::drain(&pool, subscribers()).await?["receipts"].snoozed, [(id, Duration::from_secs(5))]);

    sqlx::query("insert into customer values (2, 'bob@example.org')").execute(&pool).await?;
    assert_eq!(testing::drain(&pool, subscribers()).await?["receipts"].handled, [id]);
    Ok(())
}

#[tokio::test]
async fn an_order_goes_all_the_way() -> Result<(), Error> {
    let environment = environment().await?;
    let relay = environment.relay();
    let worker = environment.worker(subscribers()).await?;

    let mut tx = environment.pool().begin().await?;
    let id = Orders::place(&mut tx, 7, 1, 990).await?;
    tx.commit().await?;

    environment.handled("revenue", id).await?;
    environment.handled("receipts", id).await?;
    worker.stop().await?;
    relay.stop().await?;
    Ok(())
}

fn publisher() -> Publisher {
    Publisher::new("orders").publishes::<OrderPlaced>().publishes::<InvoiceSent>()
}

#[test]
fn everybody_who_waits_is_served() -> Result<(), aftercommit::Error> {
    Coverage::new()
        .publishers([publisher()])
        .subscribers(subscribers())
        .exempt::<InvoiceSent>("the accounting service subscribes to it")
        .check()
}

/// Whatever the order of two changes, the window shows the last state.
#[tokio::test]
async fn handlers_that_re_read_state_converge() -> Result<(), Error> {
    let mut tx = pool().await?.begin().await?;
    let changed = Delivery::new(VisibilityChanged { item: 7 });
    for (visible, shown) in [(Some(true), 1), (Some(false), 0), (Some(true), 1), (None, 0), (None, 0)] {
        match visible {
            Some(visible) => {
                sqlx::query("insert into item values (7, $1) on conflict (id) do update set visible = $1").bind(visible)
            }
            None => sqlx::query("delete from item"),
        }
        .execute(&mut *tx)
        .await?;
        // The events of earlier changes come late, and again.
        for _ in 0..2 {
            ShowInWindow.handle(&mut tx, &changed).await.map_err(|error| format!("{error:?}"))?;
            let found: i64 = sqlx::query_scalar("select count(*) from shop_window").fetch_one(&mut *tx).await?;
            assert_eq!(found, shown, "{visible:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn older_payloads_are_read_and_newer_ones_are_dead_letters() -> Result<(), Error> {
    struct Book;
    impl Handler<InvoiceSent> for Book {
        async fn handle(&self, _: &mut PgTransaction<'_>, sent: &Delivery<InvoiceSent>) -> Result<(), HandlerError> {
            assert_eq!((sent.version, sent.event.currency.as_str()), (1, "EUR"));
            Ok(())
        }
    }
    let pool = pool().await?;
    let mut tx = pool.begin().await?;
    let payload = r#"{"invoice": 1, "cents": 990}"#;
    let mut ids = Vec::new();
    for version in [1, 3] {
        let event = RawEvent::new("invoice.sent", "application/json", payload).version(version);
        ids.push(outbox::publish_raw(&mut tx, event).await?);
    }
    tx.commit().await?;
    let drained = testing::drain(&pool, [Subscriber::new("books").on::<InvoiceSent>(Book)]).await?;
    assert_eq!(drained["books"].handled, [ids[0]]);
    assert_eq!(drained["books"].dead[0].id, ids[1]);
    assert!(drained["books"].dead[0].reason.contains("version 3"));
    Ok(())
}
