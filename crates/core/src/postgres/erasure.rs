//! What is known of erasures, in the requester's database.

use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::job::ours;

/// An erasure that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Known {
    /// Its job.
    pub id: Uuid,
    /// How that stands.
    pub status: String,
}

/// The last job of a kind about a subject.
pub async fn last(connection: &mut PgConnection, kind: &str, subject: &Value) -> Result<Option<Known>, sqlx::Error> {
    sqlx::query_as(ours(
        "select id, status from aftercommit.job
          where request ? 'subject' and request -> 'subject' = $2::jsonb and kind = $1
          order by requested_at desc limit 1",
    ))
    .bind(kind)
    .bind(Json(subject))
    .persistent(false)
    .fetch_optional(connection)
    .await
}
