//! Collects the subscribers and reconcilers of several crates, and finds what contradicts each other.

use std::collections::BTreeSet;
use std::error::Error as StdError;

use aftercommit_core::config::Naming;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::runner::{self, Definition, Reconciler};
use aftercommit_core::subscription::Subscription;

use super::subscriber::Subscriber;

/// The subscribers of an application, contributed by its crates.
///
/// Each crate has a function that returns its subscribers, and the application collects them. A name is taken once: the
/// very same definition may be contributed twice, when two crates bring along a third one's module. It is the same when it
/// was made at the same place in the code, with handlers of the same types and the same settings. Any other definition of
/// a name is an error that names both, when the worker starts; so is a name that comes twice in one list.
///
/// ```
/// # use aftercommit::Event;
/// # use aftercommit::worker::{Delivery, Handler, HandlerError};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// use aftercommit::worker::{Registry, Subscriber};
///
/// // In the crate `billing`:
/// pub fn subscribers() -> Result<Vec<Subscriber>, std::env::VarError> {
///     let _account = std::env::var("BILLING_ACCOUNT")?;
///     Ok(vec![Subscriber::new("invoices").on::<OrderPlaced>(SendReceipt)])
/// }
///
/// // In the application:
/// let registry = Registry::new()
///     .subscriber(Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt))
///     .module("billing", subscribers());
/// assert_eq!(registry.failed_modules()[0].name, "billing");
/// # assert!(registry.check().is_ok() && registry.strict().check().is_err());
/// ```
#[derive(Debug, Default)]
pub struct Registry {
    subscribers: Vec<Subscriber>,
    /// Two definitions of one name.
    conflicts: Vec<String>,
    failed: Vec<FailedModule>,
    strict: bool,
    reconcilers: Vec<Definition>,
}

/// A module whose subscribers are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailedModule {
    /// The name that it was registered under.
    pub name: String,
    /// Its error with the causes behind it.
    pub error: String,
}

/// What a module may be: a list of subscribers, or the error that kept it from making one.
pub trait Module {
    /// The module's subscribers.
    ///
    /// # Errors
    /// The module's own.
    fn into_subscribers(self) -> Result<Vec<Subscriber>, Box<dyn StdError + Send + Sync>>;
}

impl Module for Vec<Subscriber> {
    fn into_subscribers(self) -> Result<Vec<Subscriber>, Box<dyn StdError + Send + Sync>> {
        Ok(self)
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync>>> Module for Result<Vec<Subscriber>, E> {
    fn into_subscribers(self) -> Result<Vec<Subscriber>, Box<dyn StdError + Send + Sync>> {
        self.map_err(Into::into)
    }
}

impl Registry {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// All subscribers as their reconcilers and `operator::coverage` see them; `naming` is the stream of those that name none.
    ///
    /// # Errors
    /// When the subscribers contradict each other.
    pub fn subscriptions(&self, naming: &Naming) -> Result<Vec<Subscription>, Error> {
        if !self.subscribers.is_empty() {
            self.ready()?;
        }
        Ok(self.subscribers.iter().map(|subscriber| subscriber.subscription(naming)).collect())
    }

    /// Adds a subscriber.
    #[must_use]
    pub fn subscriber(mut self, subscriber: Subscriber) -> Self {
        match self.subscribers.iter().find(|other| other.name == subscriber.name) {
            None => self.subscribers.push(subscriber),
            Some(other) if other.is(&subscriber) => {}
            Some(other) => self.conflicts.push(conflict(other, &subscriber)),
        }
        self
    }

    fn list(mut self, subscribers: Vec<Subscriber>) -> Self {
        // A loop makes them all at one place; what tells them apart may be within their handlers.
        for (n, subscriber) in subscribers.iter().enumerate() {
            let other = subscribers[..n].iter().find(|other| other.name == subscriber.name);
            self.conflicts.extend(other.map(|other| conflict(other, subscriber)));
        }
        subscribers.into_iter().fold(self, Self::subscriber)
    }

    /// Adds the subscribers of a module. A module that failed is left out: the worker says so in its log, and serves the
    /// others, unless the registry is [strict](Self::strict).
    #[must_use]
    pub fn module(mut self, name: impl Into<String>, module: impl Module) -> Self {
        match module.into_subscribers() {
            Ok(subscribers) => self.list(subscribers),
            Err(error) => {
                let failed = FailedModule { name: name.into(), error: aftercommit_core::error::with_causes(&*error) };
                if !self.failed.contains(&failed) {
                    self.failed.push(failed);
                }
                self
            }
        }
    }

    /// Makes a module that failed an error of the whole.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Adds a reconciler of the service's own, which works in the same database as the subscribers. `worker::main`
    /// runs it beside them, whatever queues the process serves, once per interval in one of the processes;
    /// [`crate::Worker::own_reconcilers`] has it for a service that runs its worker itself.
    #[must_use]
    pub fn reconciler(mut self, reconciler: impl Reconciler) -> Self {
        self.reconcilers.push(Definition::of(reconciler));
        self
    }

    pub(super) fn reconcilers(&self) -> &[Definition] {
        &self.reconcilers
    }

    /// All subscribers, in the order in which they came.
    pub fn subscribers(&self) -> &[Subscriber] {
        &self.subscribers
    }

    /// The modules that failed.
    pub fn failed_modules(&self) -> &[FailedModule] {
        &self.failed
    }

    /// Finds contradictions, as the worker does at its start.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when there is no subscriber, when one of them or a reconciler is wrong in itself, when two
    /// subscribers share a name without being the same, when two reconcilers share one, or when a module failed and the
    /// registry is strict.
    pub fn check(&self) -> Result<(), Error> {
        let config = |text: String| Err(Error::new(ErrorKind::Config, text));
        if let (true, Some(failed)) = (self.strict, self.failed.first()) {
            return config(format!("the module {} failed: {}", failed.name, failed.error));
        }
        if let Some(conflict) = self.conflicts.first() {
            return config(conflict.clone());
        }
        if self.subscribers.is_empty() {
            return config(format!("the worker has no subscriber{}", self.missing()));
        }
        self.subscribers.iter().try_for_each(Subscriber::validate)?;
        runner::check(&self.reconcilers)
    }

    /// Checks, and says which modules are missing.
    pub(super) fn ready(&self) -> Result<(), Error> {
        self.check()?;
        for FailedModule { name, error } in &self.failed {
            tracing::error!(module = name, error, "a module failed, its subscribers are not served");
        }
        Ok(())
    }

    /// The subscribers of these queues.
    pub fn served(self, queues: &Queues) -> Result<Vec<Subscriber>, Error> {
        self.ready()?;
        let known: BTreeSet<&str> = self.subscribers.iter().map(|found| found.settings.queue.as_str()).collect();
        let config = |text: String| Err(Error::new(ErrorKind::Config, text));
        if let Some(unknown) = queues.named().iter().find(|name| !known.contains(name.as_str())) {
            let known = Vec::from_iter(known).join(", ");
            return config(format!(
                "no subscriber belongs to the queue {unknown:?}; there are: {known}{}",
                self.missing()
            ));
        }
        if !self.subscribers.iter().any(|subscriber| queues.have(subscriber)) {
            return config(format!("no subscriber matches the selected queues: {queues:?}"));
        }
        Ok(self.subscribers.into_iter().filter(|subscriber| queues.have(subscriber)).collect())
    }

    /// The same while the registry is still needed.
    pub(super) fn of(&self, queues: &Queues) -> impl Iterator<Item = &Subscriber> {
        self.subscribers.iter().filter(|subscriber| queues.have(subscriber))
    }

    fn missing(&self) -> String {
        match self.failed.iter().map(|failed| failed.name.as_str()).collect::<Vec<_>>() {
            none if none.is_empty() => String::new(),
            names => format!(" (modules that failed: {})", names.join(", ")),
        }
    }
}

impl From<Subscriber> for Registry {
    fn from(subscriber: Subscriber) -> Self {
        Self::new().subscriber(subscriber)
    }
}

impl From<Vec<Subscriber>> for Registry {
    fn from(subscribers: Vec<Subscriber>) -> Self {
        Self::new().list(subscribers)
    }
}

impl<const N: usize> From<[Subscriber; N]> for Registry {
    fn from(subscribers: [Subscriber; N]) -> Self {
        Self::new().list(subscribers.into())
    }
}

fn conflict(one: &Subscriber, other: &Subscriber) -> String {
    format!(
        "two subscribers are called {}: {:?} ({}) and {:?} ({}); each needs a name of its own",
        one.name, one.work, one.place, other.work, other.place
    )
}

/// Which queues' subscribers a worker serves. A name that no subscriber has is an error when the worker starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Queues {
    /// All of them.
    #[default]
    All,
    /// These only.
    Only(Vec<String>),
    /// All but these.
    Except(Vec<String>),
}

impl Queues {
    fn named(&self) -> &[String] {
        match self {
            Self::All => &[],
            Self::Only(names) | Self::Except(names) => names,
        }
    }

    fn have(&self, subscriber: &Subscriber) -> bool {
        let named = self.named().contains(&subscriber.settings.queue);
        match self {
            Self::All => true,
            Self::Only(_) => named,
            Self::Except(_) => !named,
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::PgTransaction;

    use super::*;
    use crate::{Delivery, Handler, HandlerError};
    use aftercommit_outbox::event::Event;

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Placed {}

    impl Event for Placed {
        const TYPE: &'static str = "order.placed";
    }

    struct Receipt;
    struct Audit;

    impl Handler<Placed> for Receipt {
        async fn handle(&self, _: &mut PgTransaction<'_>, _: &Delivery<Placed>) -> Result<(), HandlerError> {
            Ok(())
        }
    }

    impl Handler<Placed> for Audit {
        async fn handle(&self, _: &mut PgTransaction<'_>, _: &Delivery<Placed>) -> Result<(), HandlerError> {
            Ok(())
        }
    }

    fn receipts() -> Vec<Subscriber> {
        vec![Subscriber::new("receipts").on::<Placed>(Receipt)]
    }

    fn audit() -> Vec<Subscriber> {
        vec![Subscriber::new("audit").on::<Placed>(Audit).queue("heavy")]
    }

    fn names(subscribers: &[Subscriber]) -> Vec<&str> {
        subscribers.iter().map(Subscriber::name).collect()
    }

    #[test]
    fn the_same_module_twice_counts_once() {
        let registry = Registry::new().module("a", receipts()).module("b", audit()).module("c", receipts());
        registry.check().unwrap();
        assert_eq!(names(registry.subscribers()), ["receipts", "audit"]);
        let looped = (0..2).map(|_| Subscriber::new("same").on::<Placed>(Audit)).collect::<Vec<_>>();
        assert!(Registry::from(looped).check().unwrap_err().to_string().contains("called same"));
    }

    #[test]
    fn another_definition_of_a_name_is_refused_and_both_are_named() {
        let other = Subscriber::new("receipts").on::<Placed>(Audit);
        let place = format!("{}:{}:", file!(), line!() - 1);
        let error = Registry::new().module("a", receipts()).subscriber(other).check().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let text = error.to_string();
        for part in ["called receipts", "order.placed with", "::Receipt", "::Audit", &place] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.matches(file!()).count(), 2, "{text}");
        // The same handlers elsewhere, and other settings, are another definition, too.
        for other in [Subscriber::new("receipts").on::<Placed>(Receipt), receipts().remove(0).max_attempts(3)] {
            assert!(Registry::from(receipts()).subscriber(other).check().is_err());
        }
    }

    #[test]
    fn two_handlers_of_one_type_are_named() {
        let subscriber = Subscriber::new("receipts").on::<Placed>(Receipt);
        let subscriber = subscriber.on::<Placed>(Audit);
        let (first, second) = (line!() - 2, line!() - 1);
        let text = Registry::from(subscriber).check().unwrap_err().to_string();
        for part in ["receipts", "order.placed", "::Receipt", "::Audit", &format!(":{first}:"), &format!(":{second}:")]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_failing_module_takes_nobody_along_unless_asked() {
        let failing = || Err::<Vec<Subscriber>, _>("no account");
        let registry = || Registry::new().module("billing", failing()).module("mail", receipts());
        assert_eq!(names(registry().subscribers()), ["receipts"]);
        assert_eq!(registry().failed_modules(), [FailedModule { name: "billing".into(), error: "no account".into() }]);
        registry().check().unwrap();
        let text = registry().strict().check().unwrap_err().to_string();
        assert!(text.contains("billing") && text.contains("no account"), "{text}");
        let text = Registry::new().module("billing", failing()).check().unwrap_err().to_string();
        assert!(text.contains("no subscriber") && text.contains("billing"), "{text}");
    }

    #[test]
    fn a_queue_is_served_by_those_who_are_told_to() {
        let registry = || Registry::new().module("a", receipts()).module("b", audit());
        let served = |queues| registry().served(&queues).map(|found| names(&found).join(","));
        let heavy = || vec!["heavy".to_string()];
        assert_eq!(served(Queues::All).unwrap(), "receipts,audit");
        assert_eq!(served(Queues::Only(heavy())).unwrap(), "audit");
        assert_eq!(served(Queues::Except(heavy())).unwrap(), "receipts");
        for unknown in [Queues::Only(vec!["hevy".into()]), Queues::Except(vec!["hevy".into()])] {
            let text = served(unknown).unwrap_err().to_string();
            assert!(text.contains("\"hevy\"") && text.contains("default, heavy"), "{text}");
        }
        let nothing = Queues::Except(vec!["heavy".into(), "default".into()]);
        assert!(served(nothing).unwrap_err().to_string().contains("no subscriber matches"));
        assert!(served(Queues::Only(vec![])).unwrap_err().to_string().contains("no subscriber matches"));
        assert!(served(Queues::All).is_ok());
        let text = Registry::from(receipts().remove(0).queue("a b")).check().unwrap_err().to_string();
        assert!(text.contains("\"a b\"") && text.contains("queue"), "{text}");
    }
}
