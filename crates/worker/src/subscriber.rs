//! What a worker serves: named subscribers, their handlers and settings.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::Location;
use std::time::Duration;

use aftercommit_core::backoff::Backoff;
use aftercommit_core::config::{Naming, check_stream};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::consumer::ConsumerSpec;
use aftercommit_core::postgres::function::FunctionName;
use aftercommit_core::subscription::{Subscription, check_name, is_name};
use aftercommit_outbox::event::Event;
use aftercommit_outbox::subject::{SubjectPrefix, check_tokens};

use super::batch::BatchHandler;
use super::handler::Handler;
#[cfg(feature = "cli")]
use super::http::Endpoint;
use super::route::Route;
use super::start::Start;

/// A named, durable reader of events with its own progress, retries and dead letters.
///
/// The name is the JetStream consumer's name and the key of the inbox: renaming a subscriber makes a new one that starts
/// at the beginning of the stream.
pub struct Subscriber {
    pub(super) name: String,
    pub(super) work: Work,
    pub(super) settings: Settings,
    /// Where it was defined, as `file:line:column`, or the file and line of a worker.toml.
    pub(super) place: String,
    /// Mistakes in the definition, reported when the worker starts.
    problems: Vec<String>,
}

/// Longer than anybody keeps an inbox, and short enough for PostgreSQL to subtract it from the time.
const MAX_RETENTION: Duration = Duration::from_hours(36_500 * 24);
/// The longest wait, of settings and of what a handler asks for: the clock cannot add any length.
pub(super) const MAX_WAIT: Duration = Duration::from_hours(365 * 24);

/// The queue of subscribers that name none.
pub(super) const DEFAULT_QUEUE: &str = "default";

/// How a subscriber runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    pub(super) queue: String,
    /// None for the worker's.
    pub(super) stream: Option<String>,
    /// None for the worker's.
    pub(super) prefix: Option<SubjectPrefix>,
    pub(super) concurrency: usize,
    pub(super) max_attempts: u32,
    pub(super) max_crashes: u32,
    pub(super) max_batch: usize,
    pub(super) backoff: Backoff,
    pub(super) failure_policy: FailurePolicy,
    pub(super) debounce: Option<Duration>,
    pub(super) ack_wait: Duration,
    pub(super) time_limit: Duration,
    pub(super) inbox_retention: Duration,
    pub(super) start: Start,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue: DEFAULT_QUEUE.into(),
            stream: None,
            prefix: None,
            concurrency: 8,
            max_attempts: 10,
            max_crashes: 3,
            max_batch: 100,
            backoff: Backoff::default(),
            failure_policy: FailurePolicy::default(),
            debounce: None,
            ack_wait: Duration::from_secs(30),
            time_limit: Duration::from_secs(60),
            inbox_retention: Duration::from_hours(30 * 24),
            start: Start::All,
        }
    }
}

/// What becomes of the later events of a key while one of it waits for its next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FailurePolicy {
    /// They wait, so the order of the key holds.
    #[default]
    Block,
    /// They go on, and the failed one comes behind those that ran meanwhile. Never do two of a key run at once. An event
    /// that was snoozed, or waits for the end of an outage, still holds back its key.
    Skip,
}

/// What is done with the events.
pub(super) enum Work {
    /// A Rust handler per event type.
    Handlers(BTreeMap<&'static str, Route>),
    /// One SQL function for the listed types, or for all when there are none. With `raw` it takes payloads that are not
    /// what their content type says, as bytes.
    Function { function: FunctionName, types: Vec<String>, raw: bool },
    /// One HTTP endpoint for the listed types, or for all when there are none.
    #[cfg(feature = "cli")]
    Http { endpoint: Box<Endpoint>, types: Vec<String> },
}

impl Subscriber {
    /// A subscriber without handlers. `name` is 1 to 64 letters, digits, `_` and `-`.
    #[track_caller]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            work: Work::Handlers(BTreeMap::new()),
            settings: Settings::default(),
            place: Location::caller().to_string(),
            problems: Vec::new(),
        }
    }

    /// A subscriber that calls the SQL function `function(event jsonb)` in the inbox transaction for every event of
    /// `types`; `*` stands for all. `event` is the CloudEvent in its JSON format.
    ///
    /// # Errors
    /// When the function's name or a type is malformed.
    #[track_caller]
    pub fn sql(
        name: impl Into<String>,
        function: &str,
        types: impl IntoIterator<Item = impl Into<String>>,
    ) -> Result<Self, Error> {
        let name = name.into();
        let config = |text: String| Error::new(ErrorKind::Config, format!("subscriber {name}: {text}"));
        let function = FunctionName::parse(function).map_err(&config)?;
        let mut types: Vec<String> = types.into_iter().map(Into::into).collect();
        check_types(&types).map_err(&config)?;
        types.retain(|event_type| event_type != "*");
        Ok(Self { work: Work::Function { function, types, raw: false }, ..Self::new(name) })
    }

    /// The SQL function takes payloads as they are: one that is no JSON, although its content type says so, comes as
    /// `data_base64`. Without it such an event is a dead letter at once, because a function that looks for `data` would do
    /// nothing with it. It is for subscribers with an SQL function.
    #[must_use]
    pub fn raw_payloads(mut self) -> Self {
        match &mut self.work {
            Work::Function { raw, .. } => *raw = true,
            _ => self.problems.push("raw payloads are for subscribers with an SQL function".into()),
        }
        self
    }

    /// A subscriber that posts every event of `types` to an HTTP endpoint; `*` stands for all. Each event has a transaction
    /// of its own, because with the transaction of several all of them would be posted again.
    #[cfg(feature = "cli")]
    #[track_caller]
    pub(super) fn http(name: impl Into<String>, endpoint: Endpoint, mut types: Vec<String>) -> Self {
        types.retain(|event_type| event_type != "*");
        Self { work: Work::Http { endpoint: Box::new(endpoint), types }, ..Self::new(name) }.max_batch(1)
    }

    /// Handles events of type `E` with `handler`. One handler per type.
    #[must_use]
    #[track_caller]
    pub fn on<E: Event>(self, handler: impl Handler<E>) -> Self {
        self.route(E::TYPE, Route::new(handler))
    }

    /// Handles events of type `E` with `handler`, which gets all of a transaction at once. One handler per type; others
    /// of the subscriber may get theirs one by one.
    #[must_use]
    #[track_caller]
    pub fn on_batch<E: Event>(self, handler: impl BatchHandler<E>) -> Self {
        self.route(E::TYPE, Route::batch(handler))
    }

    fn route(mut self, event_type: &'static str, route: Route) -> Self {
        match &mut self.work {
            Work::Function { function, .. } => {
                self.problems.push(format!("it calls {function} and cannot have the handler {} too", route.handler))
            }
            #[cfg(feature = "cli")]
            Work::Http { endpoint, .. } => {
                self.problems.push(format!("it posts to {endpoint} and cannot have the handler {} too", route.handler))
            }
            Work::Handlers(routes) => match routes.get(event_type) {
                Some(other) => self.problems.push(format!(
                    "it has two handlers for {}: {} ({}) and {} ({}); make one of them a subscriber of its own",
                    event_type, other.handler, other.place, route.handler, route.place
                )),
                None => {
                    routes.insert(event_type, route);
                }
            },
        }
        self
    }

    /// The queue that it belongs to: a worker serves the subscribers of all queues, or of those that it is told to, so
    /// that heavy work can have processes of its own. A name is made as a subscriber's. Defaults to `default`.
    #[must_use]
    pub fn queue(mut self, name: impl Into<String>) -> Self {
        self.settings.queue = name.into();
        self
    }

    /// The JetStream stream that it reads. Defaults to the worker's ([`Naming::stream`]). It is part of the identity, as
    /// the name is: on another stream the subscriber starts at the beginning.
    #[must_use]
    pub fn stream(mut self, name: impl Into<String>) -> Self {
        self.settings.stream = Some(name.into());
        self
    }

    /// The first tokens of the subjects in that stream. Defaults to the worker's ([`Naming::prefix`]).
    #[must_use]
    pub fn prefix(mut self, prefix: SubjectPrefix) -> Self {
        self.settings.prefix = Some(prefix);
        self
    }

    /// How many transactions run at the same time; events of one key never do. Each uses a database connection.
    /// Defaults to 8.
    #[must_use]
    pub fn concurrency(mut self, transactions: usize) -> Self {
        self.settings.concurrency = transactions;
        self
    }

    /// After how many failed attempts an event becomes a dead letter. Defaults to 10.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.settings.max_attempts = attempts;
        self
    }

    /// After how many deaths of the worker's process (abort, out of memory) while an event runs with nothing beside it in the
    /// process the event becomes a dead letter. An event that ran when the process died runs again in a transaction of its
    /// own, and from the second time on with nothing beside it: only those deaths tell on it. Crashes of PostgreSQL count
    /// with them. At least 2. Defaults to 3.
    #[must_use]
    pub fn max_crashes(mut self, crashes: u32) -> Self {
        self.settings.max_crashes = crashes;
        self
    }

    /// The wait between attempts. Defaults to 1 second, doubling up to 5 minutes, plus jitter.
    #[must_use]
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        self.settings.backoff = backoff;
        self
    }

    /// Whether a failed event holds back the later ones of its key until it is handled or given up. Defaults to
    /// [`FailurePolicy::Block`].
    #[must_use]
    pub fn failure_policy(mut self, policy: FailurePolicy) -> Self {
        self.settings.failure_policy = policy;
        self
    }

    /// Lets the first event of a key wait for `window`, and then runs all events of the key that have arrived meanwhile
    /// in one transaction, up to `max_batch` of them: so that a [`BatchHandler`] recomputes once per key and window
    /// instead of once per event. Each transaction has events of one key only. Events without a key do not wait.
    /// Defaults to no waiting.
    #[must_use]
    pub fn debounce(mut self, window: Duration) -> Self {
        self.settings.debounce = Some(window);
        self
    }

    /// The most events in one transaction. Defaults to 100; 1 gives each event a transaction of its own.
    #[must_use]
    pub fn max_batch(mut self, events: usize) -> Self {
        self.settings.max_batch = events;
        self
    }

    /// How long JetStream waits for a sign of life of a delivered message before it delivers it again; a running
    /// handler gives such signs by itself. Set on the consumer by `aftercommit provision`. Defaults to 30 seconds.
    #[must_use]
    pub fn ack_wait(mut self, wait: Duration) -> Self {
        self.settings.ack_wait = wait;
        self
    }

    /// How long one handler may run, or one transaction wait for the handler's next statement. Longer counts as a
    /// failed attempt. It also bounds how long a worker that was cut off can keep others waiting for its locks.
    /// Defaults to 1 minute.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.settings.time_limit = limit;
        self
    }

    /// With which event it starts when its consumer is made for the first time, by [`Worker::provision`](super::Worker::provision)
    /// or `aftercommit provision`. That is written down in its database: a consumer that is made anew starts there again, and
    /// reconcilers do not miss what lies before. A later change of it changes nothing. Defaults to [`Start::All`].
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.settings.start = start;
        self
    }

    /// How long the inbox remembers an event that is done, at least; the active instance removes older rows. A row stays
    /// as long as the stream holds the event's message, and as long as its dead letter exists. It must be longer than
    /// the outbox's retention and the stream's `max_age` together, because a stream that was lost is filled again from
    /// the outbox; [`Worker::provision`](super::Worker::provision) refuses what is not longer than `max_age`. Defaults to 30 days.
    #[must_use]
    pub fn inbox_retention(mut self, retention: Duration) -> Self {
        self.settings.inbox_retention = retention;
        self
    }

    /// The durable name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The event types that it handles; `*` alone when it handles all.
    pub fn types(&self) -> Vec<&str> {
        match &self.work {
            Work::Handlers(routes) => routes.keys().copied().collect(),
            Work::Function { types, .. } => listed(types),
            #[cfg(feature = "cli")]
            Work::Http { types, .. } => listed(types),
        }
    }

    /// What its reconcilers need to know of it, in a worker with that naming.
    pub fn subscription(&self, naming: &Naming) -> Subscription {
        let types = self.types().into_iter().filter(|event_type| *event_type != "*").map(str::to_string);
        Subscription {
            spec: self.spec(naming),
            types: types.collect(),
            inbox_retention: self.settings.inbox_retention,
            remedy: "run `aftercommit provision --config worker.toml`, or the service with --provision".into(),
        }
    }

    /// The consumer that it needs, in a worker with that naming.
    pub(super) fn spec(&self, naming: &Naming) -> ConsumerSpec {
        let prefix = self.settings.prefix.as_ref().unwrap_or(&naming.prefix);
        let subject = |event_type: &str| match event_type {
            "*" => prefix.wildcard(),
            event_type => prefix.subject(event_type),
        };
        ConsumerSpec {
            stream: self.settings.stream.clone().unwrap_or_else(|| naming.stream.clone()),
            name: self.name.clone(),
            subjects: self.types().into_iter().map(subject).collect(),
            ack_wait: self.settings.ack_wait,
            start: None,
        }
    }

    /// Whether the other one is the very same definition, contributed a second time: made at the same place, of the
    /// same handlers and settings.
    pub(super) fn is(&self, other: &Self) -> bool {
        let same = |this: &Self| (this.place.clone(), format!("{:?}", this.work));
        same(self) == same(other) && self.settings == other.settings && self.problems == other.problems
    }

    /// Finds what cannot work.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let problem = self.problems.first().cloned().or_else(|| self.problem());
        match problem {
            Some(problem) => {
                let text = format!("subscriber {} ({}): {problem}", self.name, self.place);
                Err(Error::new(ErrorKind::Config, text))
            }
            None => Ok(()),
        }
    }

    /// Reads what the handlers need besides their definition.
    pub(super) fn prepare(&self) -> Result<(), Error> {
        #[cfg(feature = "cli")]
        if let Work::Http { endpoint, .. } = &self.work {
            let named = |error| Error::with_source(ErrorKind::Config, format!("subscriber {}", self.name), error);
            endpoint.prepare().map_err(named)?;
        }
        Ok(())
    }

    fn problem(&self) -> Option<String> {
        if let Err(problem) = check_name(&self.name) {
            return Some(problem);
        }
        if let Work::Handlers(routes) = &self.work {
            if routes.is_empty() {
                return Some("it has no handler: add one with `on`".into());
            }
            if let Some(error) = routes.keys().find_map(|event_type| check_tokens(event_type).err()) {
                return Some(format!("an event type {error}"));
            }
        }
        #[cfg(feature = "cli")]
        if let Work::Http { endpoint, .. } = &self.work
            && endpoint.timeout > self.settings.time_limit
        {
            return Some("the timeout of http must not be longer than time_limit".into());
        }
        self.settings.problem()
    }
}

/// These types, or `*` when there are none.
fn listed(types: &[String]) -> Vec<&str> {
    match types {
        [] => vec!["*"],
        types => types.iter().map(String::as_str).collect(),
    }
}

impl Settings {
    fn problem(&self) -> Option<String> {
        let second = Duration::from_secs(1);
        let at_least = |name: &str, least: &str| Some(format!("{name} must be at least {least}"));
        match self {
            Self { concurrency: 0, .. } => at_least("concurrency", "1"),
            Self { max_attempts: 0, .. } => at_least("max_attempts", "1"),
            Self { max_crashes: 0 | 1, .. } => at_least("max_crashes", "2"),
            Self { max_batch: 0, .. } => at_least("max_batch", "1"),
            Self { ack_wait, .. } if *ack_wait < second => at_least("ack_wait", "1s"),
            Self { time_limit, .. } if *time_limit < second => at_least("time_limit", "1s"),
            Self { inbox_retention, .. } if *inbox_retention < second => at_least("inbox_retention", "1s"),
            Self { inbox_retention, .. } if *inbox_retention > MAX_RETENTION => {
                Some("inbox_retention must be at most 36500 days".into())
            }
            Self { queue, .. } if !is_name(queue) => {
                Some(format!("{queue:?} is not the name of a queue: use 1 to 64 letters, digits, '_' and '-'"))
            }
            Self { stream: Some(stream), .. } if check_stream(stream).is_err() => check_stream(stream).err(),
            Self { backoff, .. } if backoff.max < backoff.first => {
                Some("the backoff's max must not be below its first wait".into())
            }
            Self { ack_wait, time_limit, backoff, debounce, .. } => {
                let waits = [*ack_wait, *time_limit, backoff.max, debounce.unwrap_or_default()];
                let names = ["ack_wait", "time_limit", "the backoff's max", "debounce"];
                let too_long = names.into_iter().zip(waits).find(|(_, wait)| *wait > MAX_WAIT);
                too_long.map(|(name, _)| format!("{name} must be at most 365 days"))
            }
        }
    }
}

/// Checks a list of event types: legal ones, each once, or `*` alone.
pub(super) fn check_types(types: &[String]) -> Result<(), String> {
    if types.is_empty() {
        return Err("it names no event type; \"*\" stands for all".into());
    }
    for (n, event_type) in types.iter().enumerate() {
        if event_type == "*" {
            if types.len() > 1 {
                return Err("\"*\" already stands for all event types: leave out the others".into());
            }
            continue;
        }
        check_tokens(event_type).map_err(|error| error.to_string())?;
        if types[..n].contains(event_type) {
            return Err(format!("event type {event_type} is listed twice"));
        }
    }
    Ok(())
}

impl fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber").field("name", &self.name).field("work", &self.work).finish_non_exhaustive()
    }
}

/// `order.placed with mail::SendReceipt, order.paid with mail::SendThanks`, or the types with the function or endpoint.
impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handlers(routes) => {
                let routes: Vec<_> =
                    routes.iter().map(|(event_type, route)| format!("{event_type} with {}", route.handler)).collect();
                f.write_str(&routes.join(", "))
            }
            Self::Function { function, types, .. } => write!(f, "{} with {function}", listed(types).join(", ")),
            #[cfg(feature = "cli")]
            Self::Http { endpoint, types } => write!(f, "{} with {endpoint}", listed(types).join(", ")),
        }
    }
}
