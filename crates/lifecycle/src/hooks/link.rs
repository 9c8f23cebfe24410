//! Rows that join two entities: who changes them tells it, when something was written.

use aftercommit_core::postgres::quoted;
use aftercommit_outbox::{EventId, RawEvent, publish_raw};
use aftercommit_prune::{PruneError, Table};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, Connection, PgTransaction};

use super::error::DeleteError;

/// A table that joins two entities, and the event that tells of its changes. Each call writes in the caller's transaction, and
/// publishes only when a row was added or removed.
///
/// ```no_run
/// # async fn change(tx: &mut sqlx::PgTransaction<'_>) -> Result<(), aftercommit::hooks::DeleteError> {
/// use aftercommit::hooks::Links;
///
/// let stewards = Links::new("system.stewards_changed", "public.stewards", "system_id", "user_id");
/// stewards.add(tx, 7, ["ann"]).await?;
/// stewards.set(tx, 7, ["ann", "bob"]).await?; // tells that bob was added
/// stewards.remove(tx, 7, ["carl"]).await?; // nobody was removed: it tells nothing
/// stewards.remove_everywhere(tx, "ann").await?; // one event for each system
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Links {
    event_type: String,
    table: String,
    owner: String,
    member: String,
}

/// The payload of a link's event: what was added to and removed from one owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkChange {
    /// The owner's id as text, such as the system's. It is the event's key.
    pub owner: String,
    /// The ids of members that were added, as text.
    pub added: Vec<String>,
    /// The ids of members that were removed, as text.
    pub removed: Vec<String>,
}

impl Links {
    /// Rows of `table` whose columns `owner` and `member` are unique together.
    pub fn new(
        event_type: impl Into<String>,
        table: impl Into<String>,
        owner: impl Into<String>,
        member: impl Into<String>,
    ) -> Self {
        Self { event_type: event_type.into(), table: table.into(), owner: owner.into(), member: member.into() }
    }

    /// Adds members to an owner. None when all of them were there.
    ///
    /// # Errors
    /// [`Refused`](super::DeleteErrorKind::Refused) when the database or the event refuses it. Nothing is written then.
    pub async fn add(
        &self,
        tx: &mut PgTransaction<'_>,
        owner: impl ToString,
        members: impl IntoIterator<Item = impl ToString>,
    ) -> Result<Option<EventId>, DeleteError> {
        self.change(tx, &owner.to_string(), &texts(members), Act::Add).await
    }

    /// Removes members from an owner. None when none of them was there.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub async fn remove(
        &self,
        tx: &mut PgTransaction<'_>,
        owner: impl ToString,
        members: impl IntoIterator<Item = impl ToString>,
    ) -> Result<Option<EventId>, DeleteError> {
        self.change(tx, &owner.to_string(), &texts(members), Act::Remove).await
    }

    /// Makes these the members of an owner: adds those that are missing and removes all others. None when they were it already.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub async fn set(
        &self,
        tx: &mut PgTransaction<'_>,
        owner: impl ToString,
        members: impl IntoIterator<Item = impl ToString>,
    ) -> Result<Option<EventId>, DeleteError> {
        self.change(tx, &owner.to_string(), &texts(members), Act::Set).await
    }

    /// Removes a member from all its owners, with an event for each of them. Empty when it had none.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub async fn remove_everywhere(
        &self,
        tx: &mut PgTransaction<'_>,
        member: impl ToString,
    ) -> Result<Vec<EventId>, DeleteError> {
        let member = member.to_string();
        let mut inner = self.begin(tx).await?;
        let statements = Statements::of(&mut inner, self).await?;
        let mut owners =
            statements.changed(&mut inner, &statements.remove_member, "", std::slice::from_ref(&member)).await?;
        owners.sort();
        let mut events = Vec::new();
        for owner in owners {
            let change = LinkChange { owner, added: Vec::new(), removed: vec![member.clone()] };
            events.push(self.tell(&mut inner, &statements, change).await?);
        }
        inner.commit().await.map_err(|error| PruneError::database(&self.table, error))?;
        Ok(events)
    }

    /// What fails inside takes only what was done here with it: dropped, it is rolled back.
    async fn begin<'t>(&self, tx: &'t mut PgTransaction<'_>) -> Result<PgTransaction<'t>, DeleteError> {
        Ok(tx.begin().await.map_err(|error| PruneError::database(&self.table, error))?)
    }

    async fn change(
        &self,
        tx: &mut PgTransaction<'_>,
        owner: &str,
        members: &[String],
        act: Act,
    ) -> Result<Option<EventId>, DeleteError> {
        let mut inner = self.begin(tx).await?;
        let statements = Statements::of(&mut inner, self).await?;
        let removed = match act {
            Act::Add => Vec::new(),
            Act::Remove => statements.changed(&mut inner, &statements.remove, owner, members).await?,
            Act::Set => statements.changed(&mut inner, &statements.remove_others, owner, members).await?,
        };
        let added = match act {
            Act::Remove => Vec::new(),
            Act::Add | Act::Set => statements.changed(&mut inner, &statements.add, owner, members).await?,
        };
        let event = if added.is_empty() && removed.is_empty() {
            None
        } else {
            Some(self.tell(&mut inner, &statements, LinkChange { owner: owner.into(), added, removed }).await?)
        };
        inner.commit().await.map_err(|error| PruneError::database(&self.table, error))?;
        Ok(event)
    }

    /// Publishes, so that the events of one owner are in the order of their commits: of two transactions the second waits for the
    /// first here. The owner's row may be anywhere, so it is not that which is locked.
    async fn tell(
        &self,
        tx: &mut PgTransaction<'_>,
        statements: &Statements,
        change: LinkChange,
    ) -> Result<EventId, DeleteError> {
        sqlx::query("select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1 || chr(10) || $2, 0))")
            .persistent(false)
            .bind(&self.event_type)
            .bind(&change.owner)
            .execute(&mut **tx)
            .await
            .map_err(|error| PruneError::database(&statements.label, error))?;
        let failed = |error| PruneError::event(&statements.label, error);
        let event = RawEvent::json(self.event_type.as_str(), &change).map_err(failed)?;
        Ok(publish_raw(tx, event.key(change.owner)).await.map_err(failed)?)
    }
}

#[derive(Debug, Clone, Copy)]
enum Act {
    Add,
    Remove,
    Set,
}

fn texts(values: impl IntoIterator<Item = impl ToString>) -> Vec<String> {
    values.into_iter().map(|value| value.to_string()).collect()
}

/// The statements for a table of links: the owner is `$1`, members are the array `$2`, both as text.
struct Statements {
    label: String,
    add: String,
    remove: String,
    remove_others: String,
    remove_member: String,
}

impl Statements {
    async fn of(tx: &mut PgTransaction<'_>, links: &Links) -> Result<Self, DeleteError> {
        let table = Table::read(tx, &links.table).await?;
        let owner_type = table.column_type(&links.owner)?;
        let member_type = table.column_type(&links.member)?;
        let (name, owner, member) = (&table.name, quoted(&links.owner), quoted(&links.member));
        let the_owner = format!("$1::pg_catalog.text::{owner_type}");
        let members = format!("($2::pg_catalog.text[])::{member_type}[]");
        Ok(Self {
            add: format!(
                "insert into {name} ({owner}, {member}) select {the_owner}, m from pg_catalog.unnest({members}) as m
                 on conflict do nothing returning {member}::text"
            ),
            remove: format!(
                "delete from {name} as t where t.{owner} = {the_owner} and t.{member} = any({members}) returning t.{member}::text"
            ),
            remove_others: format!(
                "delete from {name} as t where t.{owner} = {the_owner} and t.{member} <> all({members}) returning t.{member}::text"
            ),
            // There is no owner: the first parameter is used, because each must have a type.
            remove_member: format!(
                "delete from {name} as t where $1::pg_catalog.text is not null and t.{member} = any({members})
                 returning t.{owner}::text"
            ),
            label: table.label,
        })
    }

    /// The ids in the rows that a statement wrote or deleted.
    async fn changed(
        &self,
        tx: &mut PgTransaction<'_>,
        sql: &str,
        owner: &str,
        members: &[String],
    ) -> Result<Vec<String>, DeleteError> {
        sqlx::query_scalar(AssertSqlSafe(sql.to_string()))
            .persistent(false)
            .bind(owner)
            .bind(members)
            .fetch_all(&mut **tx)
            .await
            .map_err(|error| PruneError::database(&self.label, error).into())
    }
}
