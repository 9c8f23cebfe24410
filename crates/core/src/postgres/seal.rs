//! Data keys of sealed events, wrapped by a master key that is not in the database. The statements run where the caller's keys are, so
//! they name the schema of the process.

use aftercommit_outbox::schema::published;
use sqlx::{AssertSqlSafe, FromRow, PgConnection, PgExecutor, Row};
use uuid::Uuid;

/// The data key of a subject.
#[derive(Clone, FromRow)]
pub struct DataKey {
    /// The kind of subject.
    pub subject_kind: String,
    /// Its id.
    pub subject_id: String,
    /// What sealed events name.
    pub key_ref: Uuid,
    /// The key, encrypted with a master key.
    pub wrapped_key: Vec<u8>,
    /// Which master key that is.
    pub key_id: String,
}

/// What there is about a key.
#[derive(Clone)]
pub enum Found {
    /// It is there.
    Key(DataKey),
    /// It was forgotten.
    Forgotten,
    /// This database has never had it.
    Unknown,
}

/// A statement for the schema of this process.
fn ours(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(published().sql(sql).into_owned())
}

/// The key of a subject.
pub async fn of_subject(connection: &mut PgConnection, kind: &str, id: &str) -> Result<Option<DataKey>, sqlx::Error> {
    sqlx::query_as(ours(
        "select subject_kind, subject_id, key_ref, wrapped_key, key_id from aftercommit.data_key
          where subject_kind = $1 and subject_id = $2",
    ))
    .bind(kind)
    .bind(id)
    .persistent(false)
    .fetch_optional(connection)
    .await
}

/// Writes a key, unless the subject has one. False when it has; another transaction that writes one is waited for.
pub async fn insert(connection: &mut PgConnection, key: &DataKey) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(ours(
        "insert into aftercommit.data_key (subject_kind, subject_id, key_ref, wrapped_key, key_id)
         values ($1, $2, $3, $4, $5) on conflict (subject_kind, subject_id) do nothing",
    ))
    .bind(&key.subject_kind)
    .bind(&key.subject_id)
    .bind(key.key_ref)
    .bind(&key.wrapped_key)
    .bind(&key.key_id)
    .persistent(false)
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The key that a sealed event names.
pub async fn find(executor: impl PgExecutor<'_>, key_ref: Uuid) -> Result<Found, sqlx::Error> {
    // Both tables in one statement: between two of them it could be forgotten.
    let row = sqlx::query(ours(
        "select wanted.key_ref, k.subject_kind, k.subject_id, k.wrapped_key, k.key_id,
                k.key_ref is not null as known, f.key_ref is not null as forgotten
           from (select $1::uuid as key_ref) as wanted
           left join aftercommit.data_key k on k.key_ref = wanted.key_ref
           left join aftercommit.forgotten_key f on f.key_ref = wanted.key_ref",
    ))
    .bind(key_ref)
    .persistent(false)
    .fetch_one(executor)
    .await?;
    Ok(match (row.try_get("known")?, row.try_get("forgotten")?) {
        (true, _) => Found::Key(DataKey::from_row(&row)?),
        (false, true) => Found::Forgotten,
        (false, false) => Found::Unknown,
    })
}

/// Forgets the key of a subject. False when it has none.
pub async fn forget(connection: &mut PgConnection, kind: &str, id: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(ours("select aftercommit.forget_data_key($1, $2)"))
        .bind(kind)
        .bind(id)
        .persistent(false)
        .fetch_one(connection)
        .await
}

/// Up to `limit` keys that another master key wraps, locked. What others have locked is left out.
pub async fn wrapped_by_others(
    connection: &mut PgConnection,
    key_id: &str,
    limit: i64,
) -> Result<Vec<DataKey>, sqlx::Error> {
    sqlx::query_as(ours(
        "select subject_kind, subject_id, key_ref, wrapped_key, key_id from aftercommit.data_key where key_id <> $1
          order by key_id, key_ref limit $2 for update skip locked",
    ))
    .bind(key_id)
    .bind(limit)
    .persistent(false)
    .fetch_all(connection)
    .await
}

/// Writes a key that is wrapped anew.
pub async fn rewrap(connection: &mut PgConnection, key: &DataKey) -> Result<(), sqlx::Error> {
    sqlx::query(ours("update aftercommit.data_key set wrapped_key = $2, key_id = $3 where key_ref = $1"))
        .bind(key.key_ref)
        .bind(&key.wrapped_key)
        .bind(&key.key_id)
        .persistent(false)
        .execute(connection)
        .await
        .map(drop)
}
