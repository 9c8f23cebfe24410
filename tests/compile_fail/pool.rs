use aftercommit::outbox::{self, RawEvent};
use sqlx::PgPool;

async fn without_transaction(pool: PgPool) {
    let _ = outbox::publish_raw(&pool, RawEvent::new("a", "text/plain", "")).await;
}

fn main() {}
