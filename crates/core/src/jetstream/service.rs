//! A micro service as NATS defines it (ADR-32), so that `nats micro ls`, `info` and `stats` find this process.
//!
//! Whoever asks a service names the subject of the answer, and the answer is published with the rights of the service.
//! A relay may publish to its stream, so a stranger could have it write there: answers go to inboxes only, which is why
//! this is not the client's own service, as that one answers anywhere.

use std::collections::BTreeMap;
use std::sync::Once;
use std::time::{Duration, Instant};

use async_nats::{Message, Subject};
use chrono::{SecondsFormat, Utc};
use futures_util::StreamExt;
use futures_util::stream::select_all;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Connection;
use crate::error::{Error, ErrorKind};

/// What is registered.
#[derive(Debug, Clone)]
pub struct Service {
    /// Name of the service, such as `aftercommit-relay`.
    pub name: &'static str,
    /// What it is, in a few words for `nats micro info`.
    pub description: &'static str,
    /// What else `nats micro info` shows of this process, such as its host.
    pub metadata: BTreeMap<&'static str, String>,
    /// The name of the only endpoint. Every instance answers, each for itself.
    pub endpoint: &'static str,
    /// The subject of the endpoint.
    pub subject: String,
}

/// Answers questions until it is dropped. It is a convenience: without the permissions for it there is one warning.
pub async fn run(connection: Connection, service: Service, status: impl Fn() -> Value + Send) {
    let mut instance = Instance::new(service);
    if let Err(error) = instance.serve(&connection, status).await {
        tracing::warn!(error = error.report(), "not registered as a NATS micro service");
    }
}

struct Instance {
    service: Service,
    id: String,
    started: String,
    requests: u32,
    processing: Duration,
}

impl Instance {
    fn new(service: Service) -> Self {
        let started = Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true);
        Self { service, id: Uuid::new_v4().simple().to_string(), started, requests: 0, processing: Duration::ZERO }
    }

    async fn serve(&mut self, connection: &Connection, status: impl Fn() -> Value) -> Result<(), Error> {
        let mut subscriptions = Vec::new();
        for subject in self.subjects() {
            let subscription = connection.client.subscribe(subject).await;
            subscriptions.push(subscription.map_err(|error| {
                Error::with_source(ErrorKind::Broker, "cannot subscribe to the subjects of services", error)
            })?);
        }
        let mut questions = select_all(subscriptions);
        while let Some(Message { subject, reply, .. }) = questions.next().await {
            let Some(reply) = reply.filter(is_inbox) else { continue };
            let Some(answer) = self.answer(&subject, &status) else { continue };
            if connection.client.publish(reply, answer.to_string().into()).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn subjects(&self) -> Vec<String> {
        let Self { service: Service { name, subject, .. }, id, .. } = self;
        let mut subjects = vec![subject.clone()];
        for verb in ["PING", "INFO", "STATS"] {
            subjects.extend([
                format!("$SRV.{verb}"),
                format!("$SRV.{verb}.{name}"),
                format!("$SRV.{verb}.{name}.{id}"),
            ]);
        }
        subjects
    }

    fn answer(&mut self, subject: &Subject, status: impl Fn() -> Value) -> Option<Value> {
        if subject.as_str() == self.service.subject {
            let began = Instant::now();
            let answer = status();
            self.requests += 1;
            self.processing += began.elapsed();
            return Some(answer);
        }
        match subject.split('.').nth(1)? {
            "PING" => Some(self.head("ping")),
            "INFO" => Some(self.info()),
            "STATS" => Some(self.stats(status())),
            _ => None,
        }
    }

    fn head(&self, answer: &str) -> Value {
        let Service { name, metadata, .. } = &self.service;
        json!({
            "type": format!("io.nats.micro.v1.{answer}_response"),
            "name": name,
            "id": self.id,
            "version": env!("CARGO_PKG_VERSION"),
            "metadata": metadata,
        })
    }

    fn info(&self) -> Value {
        let Service { description, endpoint, subject, .. } = &self.service;
        let mut info = self.head("info");
        info["description"] = json!(description);
        info["endpoints"] = json!([{ "name": endpoint, "subject": subject, "queue_group": "", "metadata": {} }]);
        info
    }

    fn stats(&self, status: Value) -> Value {
        let Service { endpoint, subject, .. } = &self.service;
        let mut stats = self.head("stats");
        stats["started"] = json!(self.started);
        stats["endpoints"] = json!([{
            "name": endpoint,
            "subject": subject,
            "queue_group": "",
            "num_requests": self.requests,
            "num_errors": 0,
            "last_error": "",
            "processing_time": nanoseconds(self.processing),
            "average_processing_time": nanoseconds(self.processing.checked_div(self.requests).unwrap_or_default()),
            "data": status,
        }]);
        stats
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether an answer may go there: `_INBOX.…`, an inbox with a prefix such as `_INBOX_operator`, or what stands for an inbox
/// of another account, `_R_.…`. No client can name the latter: the server does, when an account imports this service.
pub(crate) fn is_inbox(reply: &Subject) -> bool {
    reply.starts_with("_INBOX") || reply.starts_with("_R_.")
}

/// Whether the server's error only says that this process may not be a service, or may not answer as one. The first
/// such error of each kind is reported here.
pub(super) fn explains(error: &str) -> bool {
    static NO_ANSWERS: Once = Once::new();
    static REPORTED: Once = Once::new();
    if error.contains("Permissions Violation for Subscription to \"aftercommit.outbox.") {
        NO_ANSWERS.call_once(|| {
            tracing::warn!(
                error,
                "the NATS user may not answer questions about the outbox; reconcilers of subscribers cannot ask"
            );
        });
        return true;
    }
    let denied =
        ["Subscription to \"$SRV.", "Subscription to \"aftercommit.", "Publish to \"_INBOX", "Publish to \"_R_."];
    let ours = denied.iter().any(|denied| error.contains(&format!("Permissions Violation for {denied}")));
    if ours {
        REPORTED.call_once(|| {
            tracing::warn!(
                error,
                "the NATS user may not act as a micro service, so `nats micro` does not show this process; all else works"
            );
        });
    }
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_go_to_inboxes_only() {
        for (reply, answered) in [
            ("_INBOX.abc.1", true),
            ("_INBOX_operator.abc", true),
            ("_R_.onB91Y.Eh8GcD", true),
            ("_R_", false),
            ("events.order.placed", false),
            ("$JS.API.STREAM.PURGE.EVENTS", false),
            ("aftercommit._INBOX.x", false),
        ] {
            assert_eq!(is_inbox(&reply.into()), answered, "{reply}");
        }
    }

    #[test]
    fn only_the_services_own_denials_are_explained_away() {
        assert!(explains(r#"nats: Permissions Violation for Subscription to "$SRV.PING""#));
        assert!(explains(r#"nats: Permissions Violation for Subscription to "aftercommit.relay.EVENTS.status""#));
        assert!(explains(r#"nats: Permissions Violation for Publish to "_INBOX.x.y""#));
        assert!(!explains(r#"nats: Permissions Violation for Subscription to "_INBOX_relay.x""#));
        assert!(!explains(r#"nats: Permissions Violation for Publish to "events.order.placed""#));
    }
}
