//! Answers to delivered messages.

use std::fmt;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Subject};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Where the answer to one message goes.
#[derive(Debug, Clone)]
pub struct Reply(pub(super) Subject);

/// What the server shall know of a delivered message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// Still busy: do not deliver it again yet.
    Working,
    /// Deliver it again at once.
    Again,
    /// Deliver it again after this time.
    Later(Duration),
    /// Never deliver it again, for this reason.
    Never(String),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("+ACK"),
            Self::Working => f.write_str("+WPI"),
            Self::Again => f.write_str("-NAK"),
            Self::Later(wait) => write!(f, "-NAK {{\"delay\": {}}}", wait.as_nanos()),
            Self::Never(reason) => write!(f, "+TERM {}", one_line(reason)),
        }
    }
}

/// Sends answers in the order they are given. A lost answer is no harm: the message comes again.
#[derive(Debug)]
pub struct Answers {
    queue: mpsc::UnboundedSender<(Subject, Bytes)>,
    client: Client,
    sender: JoinHandle<()>,
}

impl Answers {
    /// Starts the task that sends. While NATS is away answers gather there, at most some per message in memory.
    pub fn start(client: &Client) -> Self {
        let (queue, mut waiting) = mpsc::unbounded_channel::<(Subject, Bytes)>();
        let publisher = client.clone();
        let sender = tokio::spawn(async move {
            while let Some((subject, body)) = waiting.recv().await {
                if let Err(error) = publisher.publish(subject, body).await {
                    tracing::debug!(error = %error, "an answer was not sent");
                }
            }
        });
        Self { queue, client: client.clone(), sender }
    }

    /// Queues an answer.
    pub fn send(&self, reply: &Reply, answer: &Answer) {
        // Signs of life are worth nothing later.
        if *answer == Answer::Working && self.client.connection_state() != State::Connected {
            return;
        }
        // The receiver lives until `finish`.
        let _ = self.queue.send((reply.0.clone(), answer.to_string().into()));
    }

    /// Sends what is queued, for at most `limit`.
    pub async fn finish(self, limit: Duration) {
        drop(self.queue);
        let abort = self.sender.abort_handle();
        let sent = async {
            let _ = self.sender.await;
            self.client.flush().await
        };
        match tokio::time::timeout(limit, sent).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error = %error, "the last answers were not flushed"),
            Err(_) => abort.abort(),
        }
    }
}

fn one_line(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_what_the_server_parses() {
        assert_eq!(Answer::Later(Duration::from_millis(2)).to_string(), r#"-NAK {"delay": 2000000}"#);
        assert_eq!(Answer::Never("too\r\nbad".into()).to_string(), "+TERM too  bad");
    }
}
