//! One pruning: the rows are locked once, what refers to them goes first, then they go themselves, and an event tells it.

use std::collections::{BTreeMap, HashSet};

use aftercommit_core::fault;
use aftercommit_outbox::EventId;
use chrono::{DateTime, Utc};
use sqlx::postgres::PgArguments;
use sqlx::query::{Query, QueryScalar};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgTransaction, Postgres};
use uuid::Uuid;

use crate::condition::Condition;
use crate::error::{PruneError, PruneErrorKind};
use crate::event::{self, RowsPruned};
use crate::spec::{MAX_LIMIT, Spec};
use crate::sql::catalogue::{Resolved, ResolvedChild};
use crate::sql::indexes;
use crate::sql::statement::{self, ChildRows, Locking, Selected, Selection};

/// One pruning of a [`Spec`], in the caller's transaction.
///
/// ```no_run
/// # async fn prune(tx: &mut sqlx::PgTransaction<'_>) -> Result<(), aftercommit::prune::PruneError> {
/// use aftercommit::prune::{Prune, Spec};
/// use chrono::{Duration, Utc};
///
/// let sessions = Spec::new("public.sessions", "status = 'terminated'").before_column("terminated_at");
/// let pruned = Prune::of(&sessions).before(Utc::now() - Duration::days(30)).limit(1000).skip_locked().run(tx).await?;
/// println!("{} sessions went, with {:?}", pruned.count, pruned.children);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Prune<'a> {
    spec: &'a Spec,
    conditions: Vec<Condition>,
    before: Option<DateTime<Utc>>,
    from: Option<String>,
    without: Vec<String>,
    limit: u32,
    locking: Locking,
    cascade: bool,
    associations: bool,
}

/// What went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// How many rows of the table.
    pub count: u64,
    /// Their ids, as text, in the order in which they were found.
    pub ids: Vec<String>,
    /// The rows that went with them, by table.
    pub children: BTreeMap<String, u64>,
    /// The associations that went with them, by table.
    pub associations: BTreeMap<String, u64>,
    /// The ids of the `rows.pruned` events.
    pub events: Vec<EventId>,
    /// Whether as many rows as the limit allows were found, so that there may be more.
    pub more: bool,
    /// Where the next one can go on, see [`Prune::from`]; none when there is no more, and behind rows whose place is NULL.
    pub next: Option<String>,
}

/// What would go. Nothing was locked or changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Plan {
    /// How many rows of the table, up to the limit.
    pub count: u64,
    /// Whether the limit was reached, so that there may be more.
    pub limited: bool,
    /// The rows that would go with them, by table.
    pub children: BTreeMap<String, u64>,
    /// The associations that would go with them, by table.
    pub associations: BTreeMap<String, u64>,
    /// What would make it slow, or delete rows that are not in the spec.
    pub warnings: Vec<String>,
}

impl<'a> Prune<'a> {
    /// All finished rows of the spec, up to its limit.
    pub fn of(spec: &'a Spec) -> Self {
        Self {
            spec,
            conditions: Vec::new(),
            before: None,
            from: None,
            without: Vec::new(),
            limit: spec.limit,
            locking: Locking::Wait,
            cascade: true,
            associations: true,
        }
    }

    /// Only those for which this holds too. Several narrow it further.
    pub fn only(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }

    /// Only those that were finished before this time, by the spec's
    /// [`before_column`](Spec::before_column).
    pub fn before(self, time: DateTime<Utc>) -> Self {
        Self { before: Some(time), ..self }
    }

    /// Only those from this place on, which [`Pruned::next`] of the batch before says. It spares the server from reading what
    /// went before and is not cleaned up yet. Rows that were passed over because they were locked lie before it.
    pub fn from(self, place: impl Into<String>) -> Self {
        Self { from: Some(place.into()), ..self }
    }

    /// Leaves these rows alone, by their ids as text.
    pub fn without(mut self, ids: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.without.extend(ids.into_iter().map(Into::into));
        self
    }

    /// At most so many rows of the table. A limit above the spec's is lowered to that.
    pub fn limit(self, limit: u32) -> Self {
        Self { limit: limit.min(self.spec.limit).min(MAX_LIMIT), ..self }
    }

    /// Passes over rows that others have locked, so that several pruners share a table. By default it waits for them.
    pub fn skip_locked(self) -> Self {
        Self { locking: Locking::SkipLocked, ..self }
    }

    /// Leaves children alone. A foreign key of theirs then refuses, or does what it says on delete. By default they go.
    pub fn without_children(self) -> Self {
        Self { cascade: false, ..self }
    }

    /// Leaves associations alone. By default they go.
    pub fn without_associations(self) -> Self {
        Self { associations: false, ..self }
    }

    fn selection(&'a self, locking: Option<Locking>) -> Result<Selection<'a>, PruneError> {
        let name = &self.spec.name;
        if self.before.is_some() && self.spec.before_column.is_none() {
            return Err(PruneError::spec(format!("the spec {name:?} has no before_column: `before` cannot be used")));
        }
        if self.limit == 0 {
            return Err(PruneError::spec(format!("pruning {name:?} with a limit of 0: it must be at least 1")));
        }
        let (spec, conditions, before, limit) = (self.spec, self.conditions.as_slice(), self.before, self.limit);
        let (from, without) = (self.from.as_deref(), self.without.as_slice());
        Ok(Selection { spec, conditions, before, from, without, limit, locking })
    }

    /// Deletes them, and writes the event. All of it happens or nothing: after an error the transaction is as it was before,
    /// and can go on.
    ///
    /// # Errors
    /// [`Spec`](crate::PruneErrorKind::Spec) and [`CompositePrimaryKey`](crate::PruneErrorKind::CompositePrimaryKey) before anything is
    /// done; kinds of integrity such as [`ForeignKey`](crate::PruneErrorKind::ForeignKey) with the constraint and its table;
    /// [`Busy`](crate::PruneErrorKind::Busy) when others were in the way.
    pub async fn run(&self, tx: &mut PgTransaction<'_>) -> Result<Pruned, PruneError> {
        let selection = self.selection(Some(self.locking))?;
        let failed = |error| PruneError::database(&self.spec.table, error);
        // What fails inside takes only what it did itself with it: dropped, it is rolled back before the next statement.
        let mut inner = tx.begin().await.map_err(failed)?;
        let pruned = self.within(&selection, &mut inner).await?;
        inner.commit().await.map_err(failed)?;
        Ok(pruned)
    }

    async fn within(&self, selection: &Selection<'_>, tx: &mut PgTransaction<'_>) -> Result<Pruned, PruneError> {
        let on = Resolved::of(tx, self.spec).await?;
        let rows = selection.rows(tx, &on).await?;
        if rows.is_empty() {
            return Ok(Pruned::default());
        }
        fault::point("prune-locked");
        let more = rows.len() == self.limit as usize;
        let next = rows.last().filter(|_| more).and_then(|row| row.place.clone());
        let ids = ids_of(rows);
        let mut pruned = Pruned { more, next, ..Pruned::default() };
        if self.cascade {
            for child in &on.children {
                let rows = ChildRows::of_parent(&on, child)?;
                delete_below(tx, &ids, child, &rows, &mut pruned.children).await?;
            }
        }
        fault::point("prune-children-deleted");
        if self.associations {
            for association in &on.associations {
                let statement = query(association.delete());
                let statement = statement.bind(&ids).bind(&association.association.entity_type);
                let failed = |error| PruneError::database(&association.table.label, error);
                let gone = statement.execute(&mut **tx).await.map_err(failed)?.rows_affected();
                *pruned.associations.entry(association.table.label.clone()).or_default() += gone;
            }
        }
        let failed = |error| PruneError::database(&on.table.label, error);
        let statement = sqlx::query_scalar(AssertSqlSafe(statement::delete_parents(&on)?)).persistent(false);
        let gone: Vec<String> = statement.bind(&ids).fetch_all(&mut **tx).await.map_err(failed)?;
        let gone: HashSet<String> = gone.into_iter().collect();
        fault::point("prune-deleted");
        if let Some(kept) = ids.iter().find(|id| gone.len() < ids.len() && !gone.contains(*id)) {
            return Err(PruneError::new(
                PruneErrorKind::Kept,
                format!(
                    "{} rows of {} were kept, by a trigger or a row-level policy, such as {kept}; this batch deleted nothing",
                    ids.len() - gone.len(),
                    on.table.label
                ),
            ));
        }
        pruned.count = gone.len() as u64;
        pruned.ids = ids;
        if self.spec.event {
            pruned.events = self.tell(tx, &on, &pruned).await?;
            fault::point("prune-told");
        }
        Ok(pruned)
    }

    async fn tell(
        &self,
        tx: &mut PgTransaction<'_>,
        on: &Resolved,
        pruned: &Pruned,
    ) -> Result<Vec<EventId>, PruneError> {
        let chunks = event::chunks(&pruned.ids);
        let batch = Uuid::now_v7();
        let mut events = Vec::new();
        let only_first =
            |index, counts: &BTreeMap<String, u64>| if index == 0 { counts.clone() } else { BTreeMap::new() };
        for (index, ids) in chunks.iter().enumerate() {
            let event = RowsPruned {
                spec: self.spec.name.clone(),
                table: on.table.label.clone(),
                ids: ids.to_vec(),
                count: pruned.count,
                children: only_first(index, &pruned.children),
                associations: only_first(index, &pruned.associations),
                before: self.before,
                batch,
                chunk: u32::try_from(index + 1).unwrap_or(u32::MAX),
                chunks: u32::try_from(chunks.len()).unwrap_or(u32::MAX),
            };
            let failed = |error| PruneError::event(&on.table.label, error);
            events.push(aftercommit_outbox::publish(tx, &event).await.map_err(failed)?);
        }
        Ok(events)
    }

    /// The id of the first row that [`run`](Self::run) would delete, locked as that does.
    pub(crate) async fn first(&self, connection: &mut PgConnection) -> Result<Option<String>, PruneError> {
        let selection = self.selection(Some(self.locking))?;
        let on = Resolved::of(connection, self.spec).await?;
        Ok(selection.rows(connection, &on).await?.into_iter().next().map(|row| row.id))
    }

    /// Counts what [`run`](Self::run) would delete, with the same selection, and changes and locks nothing.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn plan(&self, connection: &mut PgConnection) -> Result<Plan, PruneError> {
        let selection = self.selection(None)?;
        let on = Resolved::of(connection, self.spec).await?;
        let rows = selection.rows(connection, &on).await?;
        let limited = rows.len() == self.limit as usize;
        let mut plan = Plan { count: rows.len() as u64, limited, ..Plan::default() };
        let ids = ids_of(rows);
        if self.cascade {
            for child in &on.children {
                let rows = ChildRows::of_parent(&on, child)?;
                count_below(connection, &ids, child, &rows, &mut plan.children).await?;
            }
        }
        for association in on.associations.iter().filter(|_| self.associations) {
            let statement = count(association.count());
            let statement = statement.bind(&ids).bind(&association.association.entity_type);
            let failed = |error| PruneError::database(&association.table.label, error);
            let count: i64 = statement.fetch_one(&mut *connection).await.map_err(failed)?;
            *plan.associations.entry(association.table.label.clone()).or_default() += count.unsigned_abs();
        }
        plan.warnings = indexes::warnings(connection, &on, &selection).await?;
        let mut seen = HashSet::new();
        plan.warnings.retain(|warning| seen.insert(warning.clone()));
        Ok(plan)
    }
}

/// A statement that a pooler need not remember: behind one a named statement may be somebody else's.
fn query<'q>(sql: String) -> Query<'q, Postgres, PgArguments> {
    sqlx::query(AssertSqlSafe(sql)).persistent(false)
}

fn count<'q>(sql: String) -> QueryScalar<'q, Postgres, i64, PgArguments> {
    sqlx::query_scalar(AssertSqlSafe(sql)).persistent(false)
}

fn ids_of(rows: Vec<Selected>) -> Vec<String> {
    rows.into_iter().map(|row| row.id).collect()
}

/// Deletes rows of a child, and before them what refers to those.
async fn delete_below(
    tx: &mut PgTransaction<'_>,
    ids: &[String],
    child: &ResolvedChild,
    rows: &ChildRows,
    counts: &mut BTreeMap<String, u64>,
) -> Result<(), PruneError> {
    let failed = |error| PruneError::database(&child.table.label, error);
    if !child.children.is_empty() {
        let lock = query(rows.lock(child));
        lock.bind(ids).execute(&mut **tx).await.map_err(failed)?;
    }
    for grandchild in &child.children {
        Box::pin(delete_below(tx, ids, grandchild, &rows.below(child, grandchild), counts)).await?;
    }
    let delete = query(rows.delete(child));
    let gone = delete.bind(ids).execute(&mut **tx).await.map_err(failed)?.rows_affected();
    *counts.entry(child.table.label.clone()).or_default() += gone;
    Ok(())
}

async fn count_below(
    connection: &mut PgConnection,
    ids: &[String],
    child: &ResolvedChild,
    rows: &ChildRows,
    counts: &mut BTreeMap<String, u64>,
) -> Result<(), PruneError> {
    for grandchild in &child.children {
        Box::pin(count_below(connection, ids, grandchild, &rows.below(child, grandchild), counts)).await?;
    }
    let rows_of = count(rows.count(child));
    let failed = |error| PruneError::database(&child.table.label, error);
    let count: i64 = rows_of.bind(ids).fetch_one(connection).await.map_err(failed)?;
    *counts.entry(child.table.label.clone()).or_default() += count.unsigned_abs();
    Ok(())
}
