//! Which subscribers a command is about.

use std::path::PathBuf;

use clap::Args;

use crate::worker::read_file;
use aftercommit_core::config::{Naming, NatsConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::subscription::Subscription;
use aftercommit_worker::Registry;

/// Subscribers by name or by their definition.
#[derive(Args)]
pub(super) struct SubscriberArgs {
    /// The worker.toml with the subscribers; all of them without --subscriber
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The subscriber; without --config it is taken as its consumer shows it
    #[arg(long, value_name = "NAME")]
    subscriber: Option<String>,
}

impl SubscriberArgs {
    /// Whether any are given.
    pub(super) fn any(&self) -> bool {
        self.config.is_some() || self.subscriber.is_some()
    }

    pub(super) async fn subscriptions(&self, nats: &NatsConfig, naming: &Naming) -> Result<Vec<Subscription>, Error> {
        let config = |text: String| Err(Error::new(ErrorKind::Config, text));
        let wanted = self.subscriber.as_deref();
        let Some(file) = &self.config else {
            return match wanted {
                Some(name) => Ok(vec![Subscription::discover(nats, naming, name).await?]),
                None => {
                    config("no subscriber is meant: name it with --subscriber, or its definition with --config".into())
                }
            };
        };
        let registry = Registry::from(read_file(file)?);
        let all = registry.subscribers().iter().map(|subscriber| subscriber.subscription(naming));
        let found: Vec<Subscription> = all.filter(|one| wanted.is_none_or(|name| name == one.name())).collect();
        match (found.is_empty(), wanted) {
            (true, Some(name)) => config(format!("{} has no subscriber {name}", file.display())),
            (true, None) => config(format!("{} has no subscriber", file.display())),
            _ => Ok(found),
        }
    }
}
