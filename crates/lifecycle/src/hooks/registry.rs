//! The hooks of an entity.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use sqlx::PgTransaction;

use super::error::{DeleteError, DeleteErrorKind};

/// How long a hook may take unless something else is said.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// Looks at a row that is about to be deleted, and at what its cascade will take.
///
/// It runs in the deleting transaction, before the delete, with the row locked: what it returns stands in the event
/// `<entity>.deleted` under the hook's name. It may write, too. It has a savepoint of its own, so when it fails, only what it
/// did itself is undone.
///
/// It must not block the thread; for long computations there is `tokio::task::spawn_blocking`. [`SqlSnapshot`](super::SqlSnapshot) is a
/// hook of one statement.
pub trait DeleteHook: Send + Sync + 'static {
    /// What to write into the event about the row whose primary key is `id`, as text.
    ///
    /// # Errors
    /// Any error. The [`HookPolicy`] says what it does to the delete. Its text stands in the event and in the log, so it must hold
    /// no secrets.
    fn before_delete(
        &self,
        tx: &mut PgTransaction<'_>,
        id: &str,
    ) -> impl Future<Output = Result<Value, Box<dyn StdError + Send + Sync>>> + Send;

    /// Whether another hook of this type, registered under the same name, is the same. Defaults to true; a hook with settings
    /// compares them.
    fn is_same(&self, _other: &Self) -> bool {
        true
    }
}

/// What a hook that fails does to the delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HookPolicy {
    /// It is logged, the event says it under `failed`, and the delete goes on.
    #[default]
    BestEffort,
    /// Nothing is deleted.
    Required,
}

/// Whether a hook is new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registered {
    /// It is there now.
    New,
    /// The same hook was there already under that name; nothing changed.
    Already,
}

/// The hooks of one kind of entity, in the order in which they were registered.
///
/// ```
/// use std::error::Error;
///
/// use aftercommit::hooks::{DeleteHook, DeleteHooks, HookPolicy, SqlSnapshot};
/// use serde_json::Value;
/// use sqlx::PgTransaction;
///
/// struct Stewards;
///
/// impl DeleteHook for Stewards {
///     async fn before_delete(
///         &self,
///         tx: &mut PgTransaction<'_>,
///         id: &str,
///     ) -> Result<Value, Box<dyn Error + Send + Sync>> {
///         let stewards: Vec<String> = sqlx::query_scalar("select user_id from stewards where system_id = $1")
///             .bind(id)
///             .fetch_all(&mut **tx)
///             .await?;
///         Ok(stewards.into())
///     }
/// }
///
/// let mut hooks = DeleteHooks::new("system", "public.systems");
/// hooks.register("stewards", HookPolicy::Required, Stewards)?;
/// let links = SqlSnapshot::new("select jsonb_agg(connection_id) from links where system_id = $1::uuid");
/// hooks.register("links", HookPolicy::BestEffort, links)?;
/// # Ok::<(), aftercommit::hooks::DeleteError>(())
/// ```
pub struct DeleteHooks {
    pub(super) entity: String,
    pub(super) table: String,
    pub(super) hooks: Vec<Hook>,
}

/// One of them.
pub(super) struct Hook {
    pub(super) name: String,
    pub(super) policy: HookPolicy,
    pub(super) time_limit: Duration,
    pub(super) run: Box<dyn ErasedHook>,
}

/// A [`DeleteHook`] of a type that is not known any more.
pub(super) trait ErasedHook: Send + Sync {
    fn run<'a>(
        &'a self,
        tx: &'a mut PgTransaction<'_>,
        id: &'a str,
    ) -> BoxFuture<'a, Result<Value, Box<dyn StdError + Send + Sync>>>;
    fn as_any(&self) -> &dyn Any;
    fn is_same(&self, other: &dyn ErasedHook) -> bool;
}

impl<H: DeleteHook> ErasedHook for H {
    fn run<'a>(
        &'a self,
        tx: &'a mut PgTransaction<'_>,
        id: &'a str,
    ) -> BoxFuture<'a, Result<Value, Box<dyn StdError + Send + Sync>>> {
        Box::pin(self.before_delete(tx, id))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn is_same(&self, other: &dyn ErasedHook) -> bool {
        other.as_any().downcast_ref::<H>().is_some_and(|other| DeleteHook::is_same(self, other))
    }
}

impl DeleteHooks {
    /// Without hooks yet. `entity` names the event: `system` publishes `system.deleted`. The table is named as in SQL, best with
    /// its schema, and has a primary key of one column.
    pub fn new(entity: impl Into<String>, table: impl Into<String>) -> Self {
        Self { entity: entity.into(), table: table.into(), hooks: Vec::new() }
    }

    /// Adds a hook that may take 5 seconds for each row.
    ///
    /// # Errors
    /// As [`register_within`](Self::register_within).
    pub fn register<H: DeleteHook>(
        &mut self,
        name: impl Into<String>,
        policy: HookPolicy,
        hook: H,
    ) -> Result<Registered, DeleteError> {
        self.register_within(TIME_LIMIT, name, policy, hook)
    }

    /// Adds a hook that may take this long for each row. The same hook under the same name a second time changes nothing.
    ///
    /// # Errors
    /// [`Name`](DeleteErrorKind::Name) when another hook, or the same with another policy or limit, has that name.
    pub fn register_within<H: DeleteHook>(
        &mut self,
        time_limit: Duration,
        name: impl Into<String>,
        policy: HookPolicy,
        hook: H,
    ) -> Result<Registered, DeleteError> {
        let hook = Hook { name: name.into(), policy, time_limit, run: Box::new(hook) };
        match self.hooks.iter().find(|known| known.name == hook.name) {
            None => {
                self.hooks.push(hook);
                Ok(Registered::New)
            }
            Some(known)
                if known.run.is_same(&*hook.run) && known.policy == policy && known.time_limit == time_limit =>
            {
                Ok(Registered::Already)
            }
            Some(_) => {
                let (entity, name) = (&self.entity, &hook.name);
                let problem = format!("{entity} has another hook called {name:?}: give each a name of its own");
                Err(DeleteError::new(DeleteErrorKind::Name, problem))
            }
        }
    }

    /// The names of the hooks, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.hooks.iter().map(|hook| hook.name.as_str())
    }
}

impl fmt::Debug for DeleteHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.names().collect();
        f.debug_struct("DeleteHooks")
            .field("entity", &self.entity)
            .field("table", &self.table)
            .field("hooks", &names)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::SqlSnapshot;
    use super::*;

    struct Nothing;

    impl DeleteHook for Nothing {
        async fn before_delete(
            &self,
            _: &mut PgTransaction<'_>,
            _: &str,
        ) -> Result<Value, Box<dyn StdError + Send + Sync>> {
            Ok(Value::Null)
        }
    }

    #[test]
    fn the_same_hook_twice_is_one_and_another_is_refused() {
        let mut hooks = DeleteHooks::new("system", "systems");
        let mut add = |name: &str, policy, sql: &str| hooks.register(name, policy, SqlSnapshot::new(sql));
        assert_eq!(add("a", HookPolicy::Required, "select 1").unwrap(), Registered::New);
        assert_eq!(add("b", HookPolicy::Required, "select 1").unwrap(), Registered::New);
        assert_eq!(add("a", HookPolicy::Required, "select 1").unwrap(), Registered::Already);
        for (policy, sql) in [(HookPolicy::Required, "select 2"), (HookPolicy::BestEffort, "select 1")] {
            let error = add("a", policy, sql).unwrap_err();
            assert_eq!(error.kind(), DeleteErrorKind::Name, "{error}");
        }
        assert!(hooks.register("a", HookPolicy::Required, Nothing).is_err(), "of another type");
        assert_eq!(hooks.register("c", HookPolicy::Required, Nothing).unwrap(), Registered::New);
        let other = hooks.register_within(Duration::from_secs(1), "c", HookPolicy::Required, Nothing);
        assert!(other.is_err(), "with another limit");
        assert_eq!(hooks.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    }
}
