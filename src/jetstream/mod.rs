//! Everything that speaks NATS. One module per concern.

pub(crate) mod ack;
pub(crate) mod consumer;
pub(crate) mod feed;
pub(crate) mod stored;

use async_nats::jetstream::Context;
use async_nats::{ConnectOptions, Event as ClientEvent, HeaderMap};
use bytes::Bytes;

use crate::config::NatsConfig;
use crate::envelope::{Envelope, EnvelopeError};
use crate::error::{Error, ErrorKind};

pub(crate) use async_nats::Client;

/// Connects once, and from then on reconnects for ever. `name` is what `nats server report connections` shows;
/// `inbox_prefix` is where answers come, so that permissions can tell roles apart.
pub(crate) async fn connect(config: &NatsConfig, name: &str, inbox_prefix: &str) -> Result<Client, Error> {
    let mut options =
        ConnectOptions::new().name(name).custom_inbox_prefix(inbox_prefix).event_callback(|event| async move {
            match event {
                ClientEvent::Connected => tracing::info!("connected to nats"),
                other => tracing::warn!(event = %other, "nats connection"),
            }
        });
    if let Some(creds) = &config.creds {
        options = options.credentials_file(creds).await.map_err(|error| {
            Error::with_source(
                ErrorKind::Config,
                format!("the NATS credentials file {} cannot be read", creds.display()),
                error,
            )
        })?;
    }
    let servers: Vec<&str> = config.url.split(',').map(str::trim).filter(|url| !url.is_empty()).collect();
    options.connect(servers).await.map_err(|error| {
        Error::with_source(ErrorKind::Broker, "cannot connect to NATS (NATS_URL or --nats-url)", error)
    })
}

/// JetStream on a connection.
pub(crate) fn context(client: &Client) -> Context {
    async_nats::jetstream::new(client.clone())
}

/// The event in a message.
fn envelope(headers: Option<&HeaderMap>, payload: Bytes) -> Result<Envelope, EnvelopeError> {
    let all = headers.into_iter().flat_map(HeaderMap::iter);
    let pairs = all.flat_map(|(name, values)| values.iter().map(|value| (name.as_ref(), value.as_str())));
    Envelope::from_headers(pairs, payload)
}
