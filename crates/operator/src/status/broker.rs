//! What NATS knows.

use chrono::Utc;
use futures_util::StreamExt;
use serde::Serialize;

use aftercommit_core::config::{Naming, NatsConfig};
use aftercommit_core::error::Error;
use aftercommit_core::jetstream;
use aftercommit_core::jetstream::stream::{ConsumerPosition, StreamReader};

/// Consumers that are looked at at the same time.
const LOOKS: usize = 16;

/// The stream's extent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamStatus {
    /// Its name.
    pub name: String,
    /// Messages in it.
    pub messages: u64,
    /// The first sequence that is still there.
    pub first_stream_sequence: u64,
    /// The last sequence.
    pub last_stream_sequence: u64,
}

pub(super) struct Broker {
    pub(super) stream: StreamStatus,
    pub(super) consumers: Vec<Consumer>,
}

pub(super) struct Consumer {
    pub(super) position: ConsumerPosition,
    /// For how long the oldest message that it has not acknowledged is there; none when there is none, or it is not known.
    pub(super) oldest_seconds: Option<f64>,
}

pub(super) async fn look(nats: &NatsConfig, naming: &Naming) -> Result<Broker, Error> {
    let connection = jetstream::connect(nats, "aftercommit-status", "_INBOX_operator").await?;
    let look = async {
        let reader = StreamReader::new(&connection, &naming.stream);
        let state = reader.info().await?.state;
        let stream = StreamStatus {
            name: naming.stream.clone(),
            messages: state.messages,
            first_stream_sequence: state.first_sequence,
            last_stream_sequence: state.last_sequence,
        };
        let positions = reader.consumers().await?;
        let consumers = futures_util::stream::iter(positions).map(|position| aged(&reader, position));
        Ok(Broker { stream, consumers: consumers.buffered(LOOKS).collect().await })
    };
    // What the server refuses it says on another way.
    look.await.map_err(|error: Error| match connection.complaint() {
        Some(complaint) => Error::with_source(error.kind(), error.report(), complaint),
        None => error,
    })
}

async fn aged(reader: &StreamReader, position: ConsumerPosition) -> Consumer {
    let mut oldest_seconds = None;
    if position.pending + position.in_flight > 0 {
        // An age is good to have; who may not read messages goes without.
        let stored = reader.oldest_behind(&position).await.ok().flatten();
        oldest_seconds = stored.map(|stored| (Utc::now() - stored).as_seconds_f64().max(0.0));
    }
    Consumer { position, oldest_seconds }
}
