use aftercommit::outbox::{self, RawEvent};
use sqlx::{Connection, PgPool};

// While a savepoint is open, an event cannot slip into the transaction around it.
async fn around_the_savepoint(pool: PgPool) {
    let mut tx = pool.begin().await.unwrap();
    let savepoint = tx.begin().await.unwrap();
    let _ = outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await;
    savepoint.rollback().await.unwrap();
}

fn main() {}
