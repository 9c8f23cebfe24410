//! aftercommit with its defaults.

use aftercommit::operator;
use aftercommit::relay::{Relay, RelayConfig};
use tokio_util::sync::CancellationToken;

use super::Stop;
use crate::scratch::Scratch;

pub const INSERT: &str = "insert into aftercommit.outbox (event_id, type, key, payload, content_type) \
     select gen_random_uuid(), 'bench', key, convert_to(payload::text, 'utf8'), 'application/json' from events";

pub async fn migrate(scratch: &Scratch) -> anyhow::Result<()> {
    operator::migrate(&scratch.postgres()).await?;
    Ok(())
}

pub fn start(scratch: &Scratch) -> anyhow::Result<Stop> {
    let stop = CancellationToken::new();
    let config = RelayConfig::new(scratch.postgres(), scratch.nats(), scratch.naming()?);
    let relay = tokio::spawn(Relay::new(config).run(stop.clone()));
    Ok(Box::pin(async move {
        stop.cancel();
        Ok(relay.await??)
    }))
}
