//! What is pruned: a table, which of its rows are finished, and what goes with them.

use crate::condition::Condition;
use crate::error::PruneError;

/// The most rows of the table that one transaction deletes, and how many by default.
pub const MAX_LIMIT: u32 = 100_000;

/// A table whose finished rows can go, with what goes with them. Written once, in code or in `prune.toml`; each
/// [`Prune`](crate::Prune) of it can only narrow it.
///
/// ```
/// use aftercommit::prune::{Association, Child, Spec};
///
/// let sessions = Spec::new("public.sessions", "status = 'terminated'")
///     .before_column("terminated_at")
///     .child(Child::new("public.kernels", "session_id").child(Child::new("public.kernel_logs", "kernel_id")))
///     .association(Association::new("public.associations", "entity_type", "entity_id", "session"));
/// ```
#[derive(Debug, Clone)]
pub struct Spec {
    pub(crate) name: String,
    pub(crate) table: String,
    pub(crate) finished: Condition,
    pub(crate) before_column: Option<String>,
    pub(crate) before_zone: Option<String>,
    pub(crate) order_column: Option<String>,
    pub(crate) children: Vec<Child>,
    pub(crate) associations: Vec<Association>,
    pub(crate) limit: u32,
    pub(crate) event: bool,
}

impl Spec {
    /// Rows of `table` for which `finished` holds, such as `status = 'terminated'`. The table is named as in SQL, best with its
    /// schema, and has a primary key of one column.
    pub fn new(table: impl Into<String>, finished: impl Into<String>) -> Self {
        let table = table.into();
        Self {
            name: table.clone(),
            table,
            finished: Condition::new(finished),
            before_column: None,
            before_zone: None,
            order_column: None,
            children: Vec::new(),
            associations: Vec::new(),
            limit: MAX_LIMIT,
            event: true,
        }
    }

    /// What it is called in events, metrics and `aftercommit prune status`. Defaults to the table as it was named.
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The column that says when a row was finished, for [`Prune::before`](crate::Prune::before). A row in which it is NULL is never
    /// before anything. Defaults to none: then `before` is refused.
    pub fn before_column(self, column: impl Into<String>) -> Self {
        Self { before_column: Some(column.into()), ..self }
    }

    /// The time zone in which a `before_column` without one is written, such as `UTC` or `Europe/Berlin`. It must be given for a
    /// `timestamp` or a `date`, and does nothing for a `timestamptz`. Defaults to none.
    pub fn before_zone(self, zone: impl Into<String>) -> Self {
        Self { before_zone: Some(zone.into()), ..self }
    }

    /// The column by which the oldest rows go first; an index should begin with it. Defaults to
    /// [`before_column`](Self::before_column), and without one to the primary key.
    pub fn order_column(self, column: impl Into<String>) -> Self {
        Self { order_column: Some(column.into()), ..self }
    }

    /// A table whose rows go with the rows that they refer to. Those named first go first.
    pub fn child(mut self, child: Child) -> Self {
        self.children.push(child);
        self
    }

    /// Rows elsewhere that name the pruned ones by their type and id.
    pub fn association(mut self, association: Association) -> Self {
        self.associations.push(association);
        self
    }

    /// The most rows of the table in one transaction, from 1 to 100,000. Defaults to 100,000.
    pub fn limit(self, limit: u32) -> Self {
        Self { limit, ..self }
    }

    /// Whether `rows.pruned` events tell what went, written in the same transaction. Defaults to true.
    pub fn event(self, event: bool) -> Self {
        Self { event, ..self }
    }

    /// What can be said without the database.
    pub(crate) fn check(&self) -> Result<(), PruneError> {
        let refuse = |problem: &str| Err(PruneError::spec(format!("the spec {:?}: {problem}", self.name)));
        if self.name.is_empty() || self.name.len() > 200 {
            return refuse("its name must have 1 to 200 bytes");
        }
        if self.limit == 0 || self.limit > MAX_LIMIT {
            return refuse("limit must be from 1 to 100000");
        }
        self.finished.check()
    }
}

/// A table whose rows refer to rows that are pruned, and go first.
#[derive(Debug, Clone)]
pub struct Child {
    pub(crate) table: String,
    pub(crate) column: String,
    pub(crate) references: Option<String>,
    pub(crate) children: Vec<Child>,
}

impl Child {
    /// Rows of `table` whose `column` is the primary key of a row that goes.
    pub fn new(table: impl Into<String>, column: impl Into<String>) -> Self {
        Self { table: table.into(), column: column.into(), references: None, children: Vec::new() }
    }

    /// The parent's column that ours refers to. Defaults to the one that its foreign key names, and without a foreign key to the
    /// parent's primary key.
    pub fn references(self, column: impl Into<String>) -> Self {
        Self { references: Some(column.into()), ..self }
    }

    /// A table whose rows refer to these rows, and go before them.
    pub fn child(mut self, child: Child) -> Self {
        self.children.push(child);
        self
    }
}

/// Rows that name an entity by its type and its id as text, such as those of a table of permissions, without a foreign key.
#[derive(Debug, Clone)]
pub struct Association {
    pub(crate) table: String,
    pub(crate) type_column: String,
    pub(crate) id_column: String,
    pub(crate) entity_type: String,
}

impl Association {
    /// Rows of `table` in which `type_column` is `entity_type` and `id_column` is the id of a row that goes, as text.
    pub fn new(
        table: impl Into<String>,
        type_column: impl Into<String>,
        id_column: impl Into<String>,
        entity_type: impl Into<String>,
    ) -> Self {
        Self {
            table: table.into(),
            type_column: type_column.into(),
            id_column: id_column.into(),
            entity_type: entity_type.into(),
        }
    }
}
