//! An eraser for rows of tables, without code.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aftercommit_worker::HandlerError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Connection, PgTransaction};

use super::eraser::{Eraser, Preview};
use super::plan::Plan;
use super::sweep::{self, Swept};
use super::{Subject, plan};
use crate::fanout::Step;

/// How many rows of tables one transaction deletes, unless it is told.
const CHUNK: u32 = 1000;
/// How long what the catalogue says of the tables is believed.
const FRESH: Duration = Duration::from_secs(10);
/// How often a step goes back to the first table because rows came late that refer to those that are to go.
const BACK: u32 = 3;

/// The tables of a service with rows of subjects. They are named children first: a table stands before those that its rows refer to.
///
/// ```
/// use aftercommit::erase::{Rows, Tables};
///
/// let orders = Tables::new("orders").of(
///     "tenant",
///     [
///         Rows::of("public.order_items").parent("order_id", "public.orders"),
///         Rows::of("public.orders").column("tenant_id"),
///         Rows::of("public.templates").column("tenant_id").keep("is_system"),
///         Rows::of("public.old_orders").column("tenant_id").optional(),
///         Rows::of("public.notes").condition("about = 'tenant:' || $1"),
///     ],
/// );
/// ```
///
/// Tables whose rows go by `on delete cascade` need not be named: their rows are deleted and counted before those that they refer to.
/// Triggers and foreign keys stay as they are.
#[derive(Debug)]
pub struct Tables {
    name: String,
    chunk: u32,
    pub(super) kinds: Vec<(String, Vec<Rows>)>,
    plans: Mutex<HashMap<String, (Instant, Arc<Plan>)>>,
    warned: Mutex<BTreeSet<String>>,
}

/// Rows of one table. Exactly one of [`column`](Self::column), [`condition`](Self::condition) and [`parent`](Self::parent) says which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    pub(super) table: String,
    pub(super) which: Vec<Which>,
    pub(super) keep: Option<String>,
    pub(super) optional: bool,
}

/// Which rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Which {
    Column(String),
    Condition(String),
    Parent { column: String, table: String, references: Option<String> },
}

impl Rows {
    /// Rows of this table, named as in SQL, best with its schema.
    pub fn of(table: impl Into<String>) -> Self {
        Self { table: table.into(), which: Vec::new(), keep: None, optional: false }
    }

    /// Those whose column is the subject's id.
    #[must_use]
    pub fn column(mut self, column: impl Into<String>) -> Self {
        self.which.push(Which::Column(column.into()));
        self
    }

    /// Those for which this SQL holds; `$1` is the subject's id as text, such as `tenant_id = $1::bigint`. It is code: never build it
    /// from what a user typed.
    #[must_use]
    pub fn condition(mut self, sql: impl Into<String>) -> Self {
        self.which.push(Which::Condition(sql.into()));
        self
    }

    /// Those whose column refers to rows of another table that go. That table is named further down. The column that it refers to is
    /// the one that the foreign key names, and without a foreign key the primary key.
    #[must_use]
    pub fn parent(mut self, column: impl Into<String>, table: impl Into<String>) -> Self {
        self.which.push(Which::Parent { column: column.into(), table: table.into(), references: None });
        self
    }

    /// As [`parent`](Self::parent), with the column that it refers to.
    #[must_use]
    pub fn parent_by(
        mut self,
        column: impl Into<String>,
        table: impl Into<String>,
        references: impl Into<String>,
    ) -> Self {
        let references = Some(references.into());
        self.which.push(Which::Parent { column: column.into(), table: table.into(), references });
        self
    }

    /// Rows for which this SQL is true stay, and are not counted, such as `is_system`. Rows that refer to them by
    /// [`parent`](Self::parent) stay, too.
    #[must_use]
    pub fn keep(self, sql: impl Into<String>) -> Self {
        Self { keep: Some(sql.into()), ..self }
    }

    /// When the table is not there, it counts 0, and the answer says so. Without this it is an error.
    #[must_use]
    pub fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

/// Where a step goes on: at which of how many tables.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Position {
    at: usize,
    of: usize,
    #[serde(default)]
    back: u32,
    /// The chosen rows of the [block](Plan::block) that it is in: their places.
    #[serde(default)]
    chosen: Vec<String>,
}

impl Tables {
    /// Those of the service with this name among the participants.
    pub fn new(name: impl Into<String>) -> Self {
        let (plans, warned) = (Mutex::default(), Mutex::default());
        Self { name: name.into(), chunk: CHUNK, kinds: Vec::new(), plans, warned }
    }

    /// The rows of subjects of a kind, such as `tenant`, children first. Subjects of other kinds are refused.
    #[must_use]
    pub fn of(mut self, kind: impl Into<String>, rows: impl IntoIterator<Item = Rows>) -> Self {
        self.kinds.push((kind.into(), rows.into_iter().collect()));
        self
    }

    /// How many rows one step deletes, at least 1; with [`each_step_commits`](crate::fanout::Participant::each_step_commits) that is one
    /// transaction. Defaults to 1,000.
    #[must_use]
    pub fn chunk(self, rows: u32) -> Self {
        Self { chunk: rows.max(1), ..self }
    }

    /// What is wrong with what it says, as far as that can be told without the database.
    ///
    /// # Errors
    /// What is wrong, by the name of the table.
    pub fn check(&self) -> Result<(), String> {
        for (n, (kind, rows)) in self.kinds.iter().enumerate() {
            if self.kinds[..n].iter().any(|(other, _)| other == kind) {
                return Err(format!("the kind {kind:?} is given twice"));
            }
            plan::check(rows)?;
        }
        if self.kinds.is_empty() {
            return Err("it names no tables".into());
        }
        Ok(())
    }

    async fn plan(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Arc<Plan>, HandlerError> {
        let refuse = |problem: String| HandlerError::reject(format!("the eraser {}: {problem}", self.name));
        let known = |plans: &HashMap<String, (Instant, Arc<Plan>)>| {
            let (read, plan) = plans.get(&subject.kind)?;
            (read.elapsed() < FRESH).then(|| Arc::clone(plan))
        };
        if let Some(plan) = known(&self.plans.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(plan);
        }
        self.check().map_err(refuse)?;
        let (_, rows) = self
            .kinds
            .iter()
            .find(|(kind, _)| *kind == subject.kind)
            .ok_or_else(|| refuse(format!("it has no tables for subjects of the kind {:?}", subject.kind)))?;
        let plan = Arc::new(Plan::read(tx, rows).await.map_err(|error| error.of(&self.name))?);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.insert(subject.kind.clone(), (Instant::now(), Arc::clone(&plan)));
        Ok(plan)
    }

    /// Each once per process.
    fn warn(&self, warnings: &[String]) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        for warning in warnings {
            if warned.insert(warning.clone()) {
                tracing::warn!(eraser = self.name, warning, "erasing will be slow");
            }
        }
    }

    fn forget_plans(&self) {
        self.plans.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Tables from the position on, until the chunk is full or none is left.
    async fn sweep(
        &self,
        tx: &mut PgTransaction<'_>,
        plan: &Plan,
        id: &str,
        mut position: Position,
    ) -> Result<Step, HandlerError> {
        let (mut step, mut left) = (Step::default(), self.chunk);
        while let Some(entry) = plan.entries.get(position.at) {
            let block = plan.block(position.at);
            if let Some(block) = block.as_ref().filter(|_| position.chosen.is_empty()) {
                let chosen = sweep::choose(tx, &plan.entries[*block.end()], id, self.chunk).await;
                position.chosen = chosen.map_err(|error| error.of(&self.name))?;
                position.at = if position.chosen.is_empty() { block.end() + 1 } else { *block.start() };
                continue;
            }
            // What fails takes only its own doing with it.
            let mut inner = tx.begin().await?;
            let chosen = block.as_ref().map(|_| position.chosen.as_slice());
            match sweep::chunk(&mut inner, entry, id, chosen, left).await {
                Ok(Swept { selected: 0, .. }) => {
                    inner.rollback().await?;
                    if block.is_some_and(|block| position.at == *block.end()) {
                        position.chosen.clear();
                    } else {
                        position.at += 1;
                    }
                    continue;
                }
                Ok(swept) => {
                    inner.commit().await?;
                    aftercommit_core::postgres::job::add(&mut step.counts, &swept.counts);
                    left = left.saturating_sub(swept.selected);
                }
                Err(error) if error.is_foreign_key() && position.at > 0 && position.back < BACK => {
                    inner.rollback().await?;
                    tracing::info!(
                        eraser = self.name,
                        table = entry.label,
                        "rows came late: once more from the first table"
                    );
                    position = Position { at: 0, back: position.back + 1, chosen: Vec::new(), ..position };
                    left = 0;
                }
                Err(error) => return Err(error.of(&self.name)),
            }
            if left == 0 {
                return Ok(step.more(serde_json::to_value(position)?));
            }
        }
        for label in plan.labels() {
            step.counts.entry(label.into()).or_default();
        }
        step.notes.clone_from(&plan.notes);
        Ok(step)
    }
}

impl Eraser for Tables {
    fn name(&self) -> &str {
        &self.name
    }

    async fn preview(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        // What the catalogue says now.
        self.forget_plans();
        let plan = self.plan(tx, subject).await?;
        plan.check_id(tx, &subject.id).await.map_err(|error| error.of(&self.name))?;
        let warnings = plan.warnings(tx, &subject.id).await.map_err(|error| error.of(&self.name))?;
        self.warn(&warnings);
        let counts = sweep::count(tx, &plan, &subject.id).await.map_err(|error| error.of(&self.name))?;
        Ok(Preview { counts, notes: [plan.notes.clone(), warnings].concat() })
    }

    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let begins = position.is_none();
        if begins {
            self.forget_plans();
        }
        let plan = self.plan(tx, subject).await?;
        if begins {
            plan.check_id(tx, &subject.id).await.map_err(|error| error.of(&self.name))?;
        }
        let of = plan.entries.len();
        // Other tables than before: from the beginning, what is gone is gone.
        let known = position.and_then(|position| serde_json::from_value::<Position>(position).ok());
        let position = known.filter(|position| position.of == of).unwrap_or(Position { of, ..Position::default() });
        let swept = self.sweep(tx, &plan, &subject.id, position).await;
        if swept.is_err() {
            self.forget_plans();
        }
        swept
    }

    async fn verify(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        self.forget_plans();
        let plan = self.plan(tx, subject).await?;
        plan.check_id(tx, &subject.id).await.map_err(|error| error.of(&self.name))?;
        let counts = sweep::count(tx, &plan, &subject.id).await.map_err(|error| error.of(&self.name))?;
        Ok(Preview { counts, notes: plan.notes.clone() })
    }
}
