use aftercommit::outbox::{self, RawEvent};
use sqlx::PgPool;

async fn late(pool: PgPool) {
    let mut tx = pool.begin().await.unwrap();
    tx.rollback().await.unwrap();
    let _ = outbox::publish_raw(&mut tx, RawEvent::new("a", "text/plain", "")).await;
}

fn main() {}
