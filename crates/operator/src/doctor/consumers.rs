//! What the consumers of the stream mean to the subscribers: those that are missing, another database's, or too hasty.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{BrokerFacts, Check, DoctorConfig, span};
use crate::status::Status;
use aftercommit_core::jetstream::doctor::{Consumer, Stream};
use aftercommit_core::owner::Owner;
use aftercommit_core::postgres::upkeep::Remembered;

/// With less, the server delivers again what is being handled.
const HASTY: Duration = Duration::from_secs(1);

/// The database that was asked.
pub(super) struct Here {
    /// Which one it is; none when the role may not ask.
    pub(super) owner: Option<Owner>,
    /// How long its inboxes remember, as far as that is on record.
    pub(super) remembered: Vec<Remembered>,
}

/// `here` is none when the database did not answer; `status` says who works in it.
pub(super) fn judge(
    broker: &BrokerFacts,
    here: Option<&Here>,
    status: Option<&Status>,
    config: &DoctorConfig,
) -> Vec<Check> {
    let Ok(stream) = &broker.stream else { return Vec::new() };
    let mut checks = missing(stream, config);
    checks.extend(stream.consumers.iter().filter_map(hasty));
    let served = |name: &str| {
        config.subscribers.iter().any(|one| one.name() == name)
            || status.and_then(|status| status.subscribers.get(name)).is_some_and(|one| one.failing.is_some())
    };
    if let Some(Here { owner, remembered }) = here {
        let served = stream.consumers.iter().filter(|one| served(&one.name));
        checks.extend(served.filter_map(|one| foreign(one, owner.as_ref()?)));
        checks.extend(memory(stream, remembered, config));
    }
    checks
}

/// Subscribers of a worker.toml that the stream has no consumer for.
fn missing(stream: &Stream, config: &DoctorConfig) -> Vec<Check> {
    let there = |name: &str| stream.consumers.iter().any(|consumer| consumer.name == name);
    let missing = config.subscribers.iter().filter(|one| one.spec.stream == config.naming.stream && !there(one.name()));
    missing
        .map(|one| {
            let finding = format!("{} has no consumer {}: this subscriber gets nothing", one.spec.stream, one.name());
            Check::fail("consumer", finding, "`aftercommit provision --config worker.toml`")
        })
        .collect()
}

fn hasty(consumer: &Consumer) -> Option<Check> {
    (consumer.ours && consumer.ack_wait < HASTY).then(|| {
        let finding = format!(
            "{} has an ack_wait of {:?}: the server delivers again what is still being handled, for ever",
            consumer.name, consumer.ack_wait
        );
        let remedy =
            "`aftercommit provision --config worker.toml`, with an ack_wait of seconds (30s when nothing is said)";
        Check::warn("consumer", finding, remedy)
    })
}

fn foreign(consumer: &Consumer, ours: &Owner) -> Option<Check> {
    let theirs = consumer.owner.as_ref().filter(|theirs| *theirs != ours)?;
    Some(Check::fail(
        "consumer",
        format!("{} feeds the inbox of {theirs}, and this is {ours}: its worker does not start here", consumer.name),
        "give this subscriber another name; or, if its database was restored or moved here and no worker serves the other one \
         any more, `aftercommit provision --config worker.toml --adopt`",
    ))
}

/// What an inbox has forgotten takes effect again when it comes again.
fn memory(stream: &Stream, remembered: &[Remembered], config: &DoctorConfig) -> Vec<Check> {
    const NAME: &str = "inbox";
    let declared = config.subscribers.iter().map(|one| (one.name(), one.inbox_retention));
    let kept = remembered.iter().map(|one| (one.subscriber.as_str(), one.age));
    // A file that was changed counts as well as the worker that has not read it yet.
    let mut inboxes: BTreeMap<&str, Duration> = BTreeMap::new();
    for (name, age) in declared.chain(kept) {
        inboxes.entry(name).and_modify(|least| *least = age.min(*least)).or_insert(age);
    }
    let Some(max_age) = stream.max_age else {
        return Vec::new();
    };
    let needed = max_age + config.retention;
    let mut checks: Vec<Check> = inboxes
        .iter()
        .filter(|(_, age)| **age < needed)
        .map(|(name, age)| {
            let finding = format!(
                "the inbox of {name} remembers events for {}, and outbox and stream keep them for {} together: one that comes \
                 again later takes effect again",
                span(*age),
                span(needed)
            );
            let days = needed.as_secs().div_ceil(86_400);
            Check::warn(NAME, finding, format!("inbox_retention = \"{days}d\" or longer in worker.toml, or Subscriber::inbox_retention"))
        })
        .collect();
    if checks.is_empty() && !inboxes.is_empty() {
        checks.push(Check::ok(NAME, "events are remembered for longer than outbox and stream keep them"));
    }
    if inboxes.is_empty() && stream.consumers.iter().any(|consumer| consumer.ours) {
        let remedy = "ask the subscriber's database (DATABASE_URL), or name its worker.toml with --config";
        checks.push(Check::unknown(
            NAME,
            "no inbox of this database has been pruned yet, so how long it remembers is not on record",
            remedy,
        ));
    }
    checks
}
