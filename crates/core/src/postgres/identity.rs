//! Which database this is.

use super::session::Session;
use crate::owner::Owner;

/// The database that a connection leads to.
pub async fn owner(connection: &mut Session) -> Result<Owner, sqlx::Error> {
    let schema = connection.schema().clone();
    let (cluster, database, name): (String, i64, String) = sqlx::query_as(
        "select (select system_identifier::text from pg_control_system()), oid::bigint, datname::text
           from pg_database where datname = current_database()",
    )
    .fetch_one(connection)
    .await?;
    Ok(Owner { cluster, database: u32::try_from(database).unwrap_or_default(), name, schema })
}
