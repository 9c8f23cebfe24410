//! Everything that speaks NATS. One module per concern.

mod access;
pub mod ack;
pub mod advisories;
pub mod api;
pub mod budget;
pub mod consumer;
pub mod doctor;
pub mod erase;
pub mod feed;
pub mod history;
pub mod moment;
pub mod monitoring;
pub mod publisher;
pub mod rights;
pub mod search;
mod seen;
pub mod service;
pub mod settings;
pub mod stored;
pub mod stream;
pub mod sweep;
pub mod topology;
pub mod witness;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::connection::State;
use async_nats::jetstream::Context;
use async_nats::{ClientError, Event as ClientEvent, HeaderMap, Server};
use bytes::Bytes;
use tokio::sync::watch;

use crate::config::NatsConfig;
use crate::envelope::{Envelope, EnvelopeError};
use crate::error::{Error, ErrorKind};

pub use async_nats::Client;

/// For how long an error that the server reports out of turn may explain that an answer does not come.
const COMPLAINT_AGE: Duration = Duration::from_secs(30);

/// How often the server is asked whether it is still there. When it has not answered three times, the connection is made
/// anew: it can have died without a word.
const PING: Duration = Duration::from_secs(10);

/// How long a new connection may take that is to tell what the server has changed.
const LOOK: Duration = Duration::from_secs(2);

/// A connection that heals itself, the count of times that it broke, and what the server complained of last.
#[derive(Clone)]
pub struct Connection {
    /// The client of async-nats, for calls that JetStream has no part in.
    pub client: Client,
    losses: watch::Receiver<u64>,
    complaint: watch::Receiver<Option<(Instant, String)>>,
    /// Why the last tries to connect failed.
    refusal: watch::Receiver<Option<String>>,
    /// The first tokens of JetStream's API.
    api: Arc<str>,
    config: Arc<NatsConfig>,
}

impl Connection {
    /// JetStream on this connection.
    pub fn jetstream(&self) -> Context {
        async_nats::jetstream::with_prefix(self.client.clone(), &self.api)
    }

    /// Returns when the connection breaks the next time after this call, whenever the result is polled. What was sent and
    /// not answered before is unknown then.
    pub fn lost(&self) -> impl Future<Output = ()> + use<> {
        let mut losses = self.losses.clone();
        losses.mark_unchanged();
        async move {
            if losses.changed().await.is_err() {
                // The client is gone, and with it whoever could tell.
                std::future::pending::<()>().await;
            }
        }
    }

    /// What the server has complained of lately. A publish without permission, for one, is not answered: the server
    /// only reports it beside.
    pub fn complaint(&self) -> Option<String> {
        let latest = self.complaint.borrow();
        latest.as_ref().filter(|(when, _)| when.elapsed() < COMPLAINT_AGE).map(|(_, text)| text.clone())
    }

    /// How many bytes a message may have now. A server may change that while it runs, and tells it to new connections only.
    pub async fn max_payload(&self) -> Result<usize, Error> {
        let (options, servers) = access::options(&self.config)?;
        let asked = tokio::time::timeout(LOOK, options.name("aftercommit-look").connect(servers)).await;
        let client = asked
            .map_err(|_| Error::new(ErrorKind::Broker, "no new connection to NATS in time"))?
            .map_err(|error| Error::with_source(ErrorKind::Broker, "cannot connect to NATS anew", error))?;
        Ok(client.max_payload())
    }

    /// Makes the connection anew, with which it learns what the server has changed since.
    pub async fn renew(&self) {
        let lost = self.lost();
        if self.client.force_reconnect().await.is_ok() {
            // If it does not stand by then, whoever uses it says why.
            _ = tokio::time::timeout(LOOK, async {
                lost.await;
                self.connected().await;
            })
            .await;
        }
    }

    /// Whether the connection stands.
    pub fn is_up(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Why the connection does not stand, as far as that is known; none when it does.
    pub fn outage(&self) -> Option<String> {
        (!self.is_up()).then(|| self.refusal.borrow().clone().unwrap_or_default())
    }

    /// Returns when the connection stands, at once if it does.
    pub async fn connected(&self) {
        while !self.is_up() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("up", &self.is_up()).finish_non_exhaustive()
    }
}

/// Connects once, and from then on reconnects for ever. `name` is what `nats server report connections` shows;
/// `inbox_prefix` is where answers come unless the configuration says so, so that permissions can tell roles apart.
pub async fn connect(config: &NatsConfig, name: &str, inbox_prefix: &str) -> Result<Connection, Error> {
    let (lost, losses) = watch::channel(0_u64);
    let (complain, complaint) = watch::channel(None);
    let (refuse, refusal) = watch::channel(None);
    let (options, servers) = access::options(config)?;
    let inbox_prefix = access::inbox_prefix(config)?.unwrap_or(inbox_prefix);
    let api = access::api_prefix(config)?.into();
    let config = Arc::new(config.clone());
    let options = options.name(name).custom_inbox_prefix(inbox_prefix).ping_interval(PING);
    let options = options.event_callback(move |event| {
        if matches!(event, ClientEvent::Disconnected) {
            lost.send_modify(|count| *count += 1);
        }
        let explained = match &event {
            ClientEvent::ServerError(error) => {
                let text = error.to_string();
                let explained = service::explains(&text);
                if !explained {
                    complain.send_replace(Some((Instant::now(), text)));
                }
                explained
            }
            _ => false,
        };
        async move {
            match event {
                ClientEvent::Connected => tracing::info!("connected to nats"),
                // A try to connect failed: `tell_failures` says why.
                ClientEvent::Closed | ClientEvent::ClientError(ClientError::Other(_)) => {}
                _ if explained => {}
                other => tracing::warn!(event = %other, "nats connection"),
            }
        }
    });
    // Asked before each round of tries. None: the client chooses by itself.
    let options = options.reconnect_to_server_callback(move |servers, _| {
        refuse.send_replace(tell_failures(&servers));
        std::future::ready(None)
    });
    let client = options.connect(servers).await.map_err(|error| {
        let hint = access::hint(&error.to_string());
        Error::with_source(ErrorKind::Broker, format!("cannot connect to NATS (NATS_URL or --nats-url){hint}"), error)
    })?;
    Ok(Connection { client, losses, complaint, refusal, api, config })
}

/// Says why the last tries to connect failed, which the client's events do not. Returns the last of it.
fn tell_failures(servers: &[Server]) -> Option<String> {
    let mut last = None;
    for Server { addr, last_error, .. } in servers {
        if let Some(error) = last_error {
            let error = format!("{error}{}", access::hint(error));
            tracing::warn!(server = %addr.as_url_str(), error, "cannot connect to nats");
            last = Some(error);
        }
    }
    last
}

/// Reads the settings, without connecting.
#[cfg(feature = "testing")]
pub fn check(config: &NatsConfig) -> Result<(), Error> {
    access::inbox_prefix(config)?;
    access::api_prefix(config)?;
    access::options(config).map(drop)
}

/// The servers that are not on this machine and to which the settings do not demand TLS.
pub fn in_clear(config: &NatsConfig) -> Result<Vec<String>, Error> {
    access::in_clear(config)
}

/// The event in a message.
pub fn envelope(headers: Option<&HeaderMap>, payload: Bytes) -> Result<Envelope, EnvelopeError> {
    let all = headers.into_iter().flat_map(HeaderMap::iter);
    let pairs = all.flat_map(|(name, values)| values.iter().map(|value| (name.as_ref(), value.as_str())));
    Envelope::from_headers(pairs, payload)
}
