use aftercommit::outbox::{self, RawEvent};
use sqlx::PgConnection;

async fn without_transaction(connection: &mut PgConnection) {
    let _ = outbox::publish_raw(connection, RawEvent::new("a", "text/plain", "")).await;
}

fn main() {}
