//! Does everybody who subscribes have a publisher, and every event a subscriber?
//!
//! One test of an application collects the declarations of all its crates:
//!
//! ```
//! # use aftercommit::Event;
//! # use aftercommit::worker::{Delivery, Handler, HandlerError};
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPaid { order: i64 }
//! # impl Event for OrderPaid { const TYPE: &'static str = "order.paid"; }
//! # struct SendReceipt;
//! # impl Handler<OrderPlaced> for SendReceipt {
//! #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
//! # }
//! use aftercommit::outbox::Publisher;
//! use aftercommit::testing::coverage::Coverage;
//! use aftercommit::worker::Subscriber;
//!
//! # fn main() -> Result<(), aftercommit::Error> {
//! Coverage::new()
//!     .publishers([Publisher::new("orders").publishes::<OrderPlaced>().publishes::<OrderPaid>()])
//!     .subscribers(vec![Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt)])
//!     .exempt::<OrderPaid>("the accounting service subscribes to it")
//!     .check()
//! # }
//! ```

use std::collections::{BTreeMap, BTreeSet};

use sqlx::PgConnection;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres;
use aftercommit_outbox::Publisher;
use aftercommit_outbox::event::Event;
use aftercommit_worker::Registry;

/// The check: declarations, subscribers and exemptions.
#[derive(Debug, Default)]
pub struct Coverage {
    /// Who declares to publish it, by type.
    published: BTreeMap<String, BTreeSet<String>>,
    /// Who subscribes to it, by type; `*` for those who take everything.
    subscribed: BTreeMap<String, BTreeSet<String>>,
    /// What was found in outboxes.
    found: BTreeSet<String>,
    /// The reason, by type.
    exempt: BTreeMap<String, String>,
    /// What is wrong with the subscribers themselves.
    problems: Vec<String>,
}

impl Coverage {
    /// Nothing to check yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds declarations.
    #[must_use]
    pub fn publishers(mut self, publishers: impl IntoIterator<Item = Publisher>) -> Self {
        for publisher in publishers {
            for event_type in publisher.types() {
                self.published.entry(event_type.into()).or_default().insert(publisher.name().into());
            }
        }
        self
    }

    /// Adds subscribers: a registry, or a list as `worker::read_file` gives it. Modules that failed and contradictions
    /// are errors here.
    #[must_use]
    pub fn subscribers(mut self, subscribers: impl Into<Registry>) -> Self {
        let registry = subscribers.into().strict();
        for subscriber in registry.subscribers() {
            for event_type in subscriber.types() {
                self.subscribed.entry(event_type.into()).or_default().insert(subscriber.name().into());
            }
        }
        self.problems.extend(registry.check().err().map(|error| error.report()));
        self
    }

    /// Adds the types that are in this outbox: each of them must be declared. Call it behind the tests that publish, and
    /// a call of `publish` without declaration is found.
    ///
    /// # Errors
    /// When the outbox cannot be read.
    pub async fn published_in(mut self, connection: &mut PgConnection) -> Result<Self, Error> {
        let found = postgres::testing::types(connection).await;
        self.found.extend(found.map_err(|error| postgres::database_error("the outbox cannot be read", error))?);
        Ok(self)
    }

    /// Lets a type pass for a reason, which must be written down. A type that would pass anyway must not be exempt.
    #[must_use]
    pub fn exempt<E: Event>(self, reason: &str) -> Self {
        self.exempt_type(E::TYPE, reason)
    }

    /// [`Self::exempt`] by name.
    #[must_use]
    pub fn exempt_type(mut self, event_type: &str, reason: &str) -> Self {
        self.exempt.insert(event_type.into(), reason.trim().into());
        self
    }

    /// Compares.
    ///
    /// # Errors
    /// With a list of the types that are subscribed to and declared by no publisher, that are published and subscribed to
    /// by nobody, and that were found and are not declared; of exemptions without reason, and of those that exempt
    /// nothing. Also when there is nothing to compare.
    pub fn check(self) -> Result<(), Error> {
        let refuse = |text: String| Err(Error::new(ErrorKind::Integrity, text));
        if self.published.is_empty() && self.subscribed.is_empty() {
            return refuse("the coverage check got neither publishers nor subscribers".into());
        }
        let orphans = self.subscribed.keys().filter(|name| *name != "*" && !self.published.contains_key(*name));
        let everything = self.subscribed.contains_key("*");
        let unheard = self.published.keys().filter(|name| !everything && !self.subscribed.contains_key(*name));
        let undeclared = self.found.iter().filter(|name| !self.published.contains_key(*name));
        let [orphans, unheard, undeclared] =
            [Vec::from_iter(orphans), Vec::from_iter(unheard), Vec::from_iter(undeclared)];
        let gaps: BTreeSet<&String> = [&orphans, &unheard, &undeclared].into_iter().flatten().copied().collect();

        let by = |of: &BTreeMap<String, BTreeSet<String>>, name: &String| {
            let names = of.get(name).into_iter().flatten().map(String::as_str);
            format!("{name} ({})", Vec::from_iter(names).join(", "))
        };
        let open = |types: Vec<&String>, show: &dyn Fn(&String) -> String| -> Vec<String> {
            types.into_iter().filter(|name| !self.exempt.contains_key(*name)).map(show).collect()
        };
        let exempt = |keep: &dyn Fn(&String, &String) -> bool| -> Vec<String> {
            self.exempt.iter().filter(|(name, reason)| keep(name, reason)).map(|(name, _)| name.clone()).collect()
        };
        let sections = [
            ("subscribers are wrong", self.problems.clone()),
            ("subscribed to, declared by no publisher", open(orphans, &|name| by(&self.subscribed, name))),
            ("published, subscribed to by nobody", open(unheard, &|name| by(&self.published, name))),
            ("in the outbox, declared by no publisher", open(undeclared, &String::clone)),
            ("exempt without a written reason", exempt(&|_, reason| reason.is_empty())),
            ("exempt although nothing is missing: take the exemption away", exempt(&|name, _| !gaps.contains(name))),
        ];
        let lines: Vec<String> = sections
            .into_iter()
            .filter(|(_, entries)| !entries.is_empty())
            .map(|(title, entries)| format!("\n- {title}: {}", entries.join("; ")))
            .collect();
        if lines.is_empty() {
            Ok(())
        } else {
            refuse(format!("publishers and subscribers do not match:{}", lines.concat()))
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::PgTransaction;

    use super::*;
    use aftercommit_worker::{Delivery, Handler, HandlerError, Subscriber};

    macro_rules! event {
        ($name:ident, $event_type:literal) => {
            #[derive(serde::Serialize, serde::Deserialize)]
            struct $name {}

            impl Event for $name {
                const TYPE: &'static str = $event_type;
            }

            impl Handler<$name> for Nothing {
                async fn handle(&self, _: &mut PgTransaction<'_>, _: &Delivery<$name>) -> Result<(), HandlerError> {
                    Ok(())
                }
            }
        };
    }

    struct Nothing;

    event!(Placed, "order.placed");
    event!(Paid, "order.paid");
    event!(Shipped, "order.shipped");

    fn publishers() -> [Publisher; 2] {
        [Publisher::new("orders").publishes::<Placed>().publishes::<Paid>(), Publisher::new("till").publishes::<Paid>()]
    }

    fn receipts() -> Vec<Subscriber> {
        vec![Subscriber::new("receipts").on::<Placed>(Nothing).on::<Shipped>(Nothing)]
    }

    fn all() -> Vec<Subscriber> {
        vec![Subscriber::sql("audit", "public.audit", ["*"]).unwrap()]
    }

    fn text(coverage: Coverage) -> String {
        coverage.check().unwrap_err().to_string()
    }

    #[test]
    fn what_matches_passes() {
        let paid = vec![Subscriber::new("paid").on::<Paid>(Nothing)];
        let placed = vec![Subscriber::new("placed").on::<Placed>(Nothing)];
        Coverage::new().publishers(publishers()).subscribers(paid).subscribers(placed).check().unwrap();
        Coverage::new().publishers(publishers()).subscribers(all()).check().unwrap();
    }

    #[test]
    fn gaps_are_listed_with_who_has_them() {
        let expected = "publishers and subscribers do not match:\
            \n- subscribed to, declared by no publisher: order.shipped (receipts)\
            \n- published, subscribed to by nobody: order.paid (orders, till)";
        assert_eq!(text(Coverage::new().publishers(publishers()).subscribers(receipts())), expected);
        // Who takes everything needs no publisher, and makes none for others.
        let found = text(Coverage::new().publishers(publishers()).subscribers(receipts()).subscribers(all()));
        assert!(found.contains("order.shipped") && !found.contains("order.paid"), "{found}");
        let mut coverage = Coverage::new().publishers(publishers()).subscribers(all());
        coverage.found.extend(["order.placed".to_string(), "order.lost".into()]);
        assert!(text(coverage).ends_with("\n- in the outbox, declared by no publisher: order.lost"));
    }

    #[test]
    fn an_exemption_needs_a_reason_and_a_gap() {
        let coverage = || Coverage::new().publishers(publishers()).subscribers(receipts());
        let shipped = || coverage().exempt::<Shipped>("the old system publishes it");
        shipped().exempt_type("order.paid", "accounting subscribes to it").check().unwrap();
        let found = text(shipped().exempt_type("order.paid", "  "));
        assert!(found.contains("without a written reason: order.paid") && !found.contains("shipped"), "{found}");
        let found = text(shipped().exempt::<Paid>("x").exempt::<Placed>("x").exempt_type("order.gone", "x"));
        assert!(found.ends_with("take the exemption away: order.gone; order.placed"), "{found}");
    }

    #[test]
    fn what_could_not_start_does_not_pass() {
        assert!(text(Coverage::new()).contains("neither"));
        let failed =
            Registry::new().module("billing", Err::<Vec<Subscriber>, _>("no account")).subscriber(all().remove(0));
        assert!(text(Coverage::new().publishers(publishers()).subscribers(failed)).contains("billing"));
    }
}
