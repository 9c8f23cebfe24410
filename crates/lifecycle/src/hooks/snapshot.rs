//! A hook that is one statement.

use std::error::Error as StdError;

use serde_json::Value;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, PgTransaction};

use super::registry::DeleteHook;

/// Takes what a query answers: one row with one column of the type `jsonb` or `json`, for the id in `$1`, which is text. No row, and
/// NULL, are `null`.
///
/// The SQL is code: never build it from what a user typed.
///
/// ```
/// use aftercommit::hooks::SqlSnapshot;
///
/// let stewards = SqlSnapshot::new(
///     "select jsonb_agg(jsonb_build_object('user', user_id)) from stewards where system_id = $1::bigint",
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlSnapshot(String);

impl SqlSnapshot {
    /// With this query.
    pub fn new(sql: impl Into<String>) -> Self {
        Self(sql.into())
    }
}

impl DeleteHook for SqlSnapshot {
    async fn before_delete(
        &self,
        tx: &mut PgTransaction<'_>,
        id: &str,
    ) -> Result<Value, Box<dyn StdError + Send + Sync>> {
        let query = sqlx::query_scalar(AssertSqlSafe(self.0.clone())).bind(id).persistent(false);
        let answer: Option<Option<Json<Value>>> = query.fetch_optional(&mut **tx).await?;
        Ok(answer.flatten().map_or(Value::Null, |Json(value)| value))
    }

    fn is_same(&self, other: &Self) -> bool {
        self == other
    }
}
