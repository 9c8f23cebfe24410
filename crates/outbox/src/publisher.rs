//! What a service declares to publish.

use std::collections::BTreeSet;

use crate::event::Event;
use crate::subject::{SubjectError, check_tokens, problem};

/// Declares which types of events a service publishes. It has no effect at runtime: it is there to be looked at, above
/// all by the coverage check of the testing kit (`aftercommit::testing::coverage`), which finds subscribers whose events
/// nobody publishes.
///
/// A crate that publishes has a function that returns it, beside the one that returns its subscribers:
///
/// ```
/// # use aftercommit::Event;
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPaid { order: i64 }
/// # impl Event for OrderPaid { const TYPE: &'static str = "order.paid"; }
/// use aftercommit::outbox::Publisher;
///
/// pub fn publisher() -> Publisher {
///     Publisher::new("orders").publishes::<OrderPlaced>().publishes::<OrderPaid>()
/// }
/// assert_eq!(publisher().types().collect::<Vec<_>>(), ["order.paid", "order.placed"]);
/// ```
///
/// An event whose type could not be published does not compile here:
///
/// ```compile_fail,E0080
/// # use aftercommit::Event;
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct Wrong {}
/// impl Event for Wrong {
///     const TYPE: &'static str = "order placed";
/// }
/// aftercommit::outbox::Publisher::new("orders").publishes::<Wrong>();
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publisher {
    name: String,
    types: BTreeSet<String>,
}

impl Publisher {
    /// A publisher of nothing. `name` is for people: a service, a module or a repository.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), types: BTreeSet::new() }
    }

    /// Declares a type. Again is as good as once.
    #[must_use]
    pub fn publishes<E: Event>(mut self) -> Self {
        const { assert!(problem(E::TYPE).is_none(), "the TYPE of this event cannot be published") };
        self.types.insert(E::TYPE.into());
        self
    }

    /// Declares a type that has no Rust type here, such as one that a trigger publishes.
    ///
    /// # Errors
    /// When `event_type` could not be published.
    pub fn publishes_type(mut self, event_type: &str) -> Result<Self, SubjectError> {
        check_tokens(event_type)?;
        self.types.insert(event_type.into());
        Ok(self)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The declared types, sorted.
    pub fn types(&self) -> impl Iterator<Item = &str> {
        self.types.iter().map(String::as_str)
    }
}
