//! Counting and deleting the rows of a plan.

use aftercommit_core::postgres::job::Counts;
use sqlx::{AssertSqlSafe, PgConnection, PgTransaction};

use super::plan::{Cascade, Entry, Plan, Problem};

/// What a chunk did.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Rows of the table that were to go; 0 when there are no more.
    pub(super) selected: u32,
    /// Rows that are gone, by table.
    pub(super) counts: Counts,
}

/// Counts what there is of each table.
pub(super) async fn count(tx: &mut PgTransaction<'_>, plan: &Plan, id: &str) -> Result<Counts, Problem> {
    let mut counts: Counts = plan.labels().map(|label| (label.to_string(), 0)).collect();
    for entry in &plan.entries {
        let sql = format!("select count(*) from {} as t where {}", entry.name, entry.condition);
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(sql))
            .bind(id)
            .persistent(false)
            .fetch_one(&mut **tx)
            .await
            .map_err(|error| Problem::failed(&entry.label, error))?;
        *counts.entry(entry.label.clone()).or_default() += count.unsigned_abs();
    }
    Ok(counts)
}

/// Rows by their place: the table, which matters where it has partitions, and the place in it.
#[derive(Debug, Default, PartialEq)]
struct Places {
    tables: Vec<String>,
    places: Vec<String>,
}

impl Places {
    /// Which rows of the table as `t` these are, with [`bind`](Self::bind).
    fn condition(entry: &Entry) -> &'static str {
        if entry.partitioned {
            "t.ctid = any(($1::pg_catalog.text[])::pg_catalog.tid[])
             and t.tableoid::pg_catalog.text || t.ctid::pg_catalog.text = any($2::pg_catalog.text[])"
        } else {
            "t.ctid = any(($1::pg_catalog.text[])::pg_catalog.tid[]) and $2::pg_catalog.text[] is not null"
        }
    }

    async fn of(
        connection: &mut PgConnection,
        entry: &Entry,
        sql: String,
        id: &str,
        chosen: Option<&[String]>,
    ) -> Result<Self, Problem> {
        let mut query = sqlx::query_as(AssertSqlSafe(sql)).bind(id);
        if let Some(chosen) = chosen {
            query = query.bind(chosen);
        }
        let rows: Vec<(String, String)> = query
            .persistent(false)
            .fetch_all(connection)
            .await
            .map_err(|error| Problem::failed(&entry.label, error))?;
        Ok(Self::from_rows(rows))
    }

    fn from_rows(rows: Vec<(String, String)>) -> Self {
        let (tables, places): (Vec<_>, Vec<_>) = rows.into_iter().map(|(table, place)| (table + &place, place)).unzip();
        Self { tables, places }
    }

    async fn run(&self, connection: &mut PgConnection, label: &str, sql: String) -> Result<u64, Problem> {
        let done = sqlx::query(AssertSqlSafe(sql))
            .bind(&self.places)
            .bind(&self.tables)
            .persistent(false)
            .execute(connection)
            .await
            .map_err(|error| Problem::failed(label, error))?;
        Ok(done.rows_affected())
    }

    async fn is_any(&self, connection: &mut PgConnection, label: &str, rows: &str) -> Result<bool, Problem> {
        sqlx::query_scalar(AssertSqlSafe(format!("select exists ({rows})")))
            .bind(&self.places)
            .bind(&self.tables)
            .persistent(false)
            .fetch_one(connection)
            .await
            .map_err(|error| Problem::failed(label, error))
    }
}

/// Places of up to `most` rows that are to go, with what refers to them. They are not locked: whoever changes one moves it to
/// another place, where it is chosen later.
pub(super) async fn choose(
    tx: &mut PgTransaction<'_>,
    entry: &Entry,
    id: &str,
    most: u32,
) -> Result<Vec<String>, Problem> {
    let sql = format!("select t.ctid::pg_catalog.text from {} as t where {} limit {most}", entry.name, entry.condition);
    let places = sqlx::query_scalar(AssertSqlSafe(sql)).bind(id).persistent(false).fetch_all(&mut **tx).await;
    places.map_err(|error| Problem::failed(&entry.label, error))
}

/// Deletes up to `limit` rows of a table, and what has come since that would go with them by cascade. With `chosen` only rows that go
/// with these of its [block](Plan::block).
pub(super) async fn chunk(
    tx: &mut PgTransaction<'_>,
    entry: &Entry,
    id: &str,
    chosen: Option<&[String]>,
    limit: u32,
) -> Result<Swept, Problem> {
    let Entry { name, label, .. } = entry;
    let (chosen, condition) = match (chosen, &entry.chosen) {
        (Some(chosen), Some(condition)) => (Some(chosen), condition),
        _ => (None, &entry.condition),
    };
    let sql = format!(
        "select t.tableoid::pg_catalog.text, t.ctid::pg_catalog.text from {name} as t where {condition} limit {limit} for update of t"
    );
    // Locked, so that nobody adds rows that refer to them.
    let mut places = Places::of(tx, entry, sql, id, chosen).await?;
    let mut swept = Swept { selected: u32::try_from(places.places.len()).unwrap_or(u32::MAX), ..Swept::default() };
    if places.places.is_empty() {
        return Ok(swept);
    }
    for own in entry.cascades.iter().filter(|cascade| cascade.name == *name) {
        places = with_descendants(tx, entry, own, places).await?;
    }
    let chosen = Places::condition(entry);
    for cascade in entry.cascades.iter().filter(|cascade| cascade.name != *name) {
        take(tx, &places, cascade, name, chosen, &mut swept.counts).await?;
    }
    let expected = places.places.len() as u64;
    let gone = places.run(tx, label, format!("delete from {name} as t where {chosen}")).await?;
    if gone < expected {
        let kept = expected - gone;
        return Err(Problem::Wrong(format!("a trigger or a rule keeps {kept} rows of {label} that are to go")));
    }
    *swept.counts.entry(label.clone()).or_default() += gone;
    Ok(swept)
}

/// With rows of the same table that refer to these, and so on, locked.
async fn with_descendants(
    tx: &mut PgTransaction<'_>,
    entry: &Entry,
    own: &Cascade,
    mut places: Places,
) -> Result<Places, Problem> {
    let Entry { name, label, .. } = entry;
    let Cascade { columns, references, .. } = own;
    let chosen = Places::condition(entry);
    loop {
        // `union` ends where rows refer to each other in a circle.
        let sql = format!(
            "with recursive gone as (
                 select t.tableoid as gone_table, t.ctid as gone_place, row({references}) as gone_key from {name} as t where {chosen}
                 union
                 select t.tableoid, t.ctid, row({references}) from {name} as t join gone on row({columns}) = gone.gone_key)
             select t.tableoid::pg_catalog.text, t.ctid::pg_catalog.text from {name} as t
              where (t.tableoid, t.ctid) in (select gone_table, gone_place from gone) for update of t"
        );
        let rows: Vec<(String, String)> = sqlx::query_as(AssertSqlSafe(sql))
            .bind(&places.places)
            .bind(&places.tables)
            .persistent(false)
            .fetch_all(&mut **tx)
            .await
            .map_err(|error| Problem::failed(label, error))?;
        let more = Places::from_rows(rows);
        // What was added while the others were being locked.
        if more.places.len() <= places.places.len() {
            return Ok(more);
        }
        places = more;
    }
}

/// Deletes what would go by cascade, deepest first, so that it is counted. `chosen` are the rows of `above` that go.
async fn take(
    tx: &mut PgTransaction<'_>,
    places: &Places,
    cascade: &Cascade,
    above: &str,
    chosen: &str,
    counts: &mut Counts,
) -> Result<(), Problem> {
    let Cascade { name, label, columns, references, keep, below, .. } = cascade;
    let rows = format!("({columns}) in (select {references} from {above} as t where {chosen})");
    if !places.is_any(tx, label, &format!("select from {name} as t where {rows}")).await? {
        return Ok(());
    }
    if let Some(keep) = keep {
        let kept = format!("select from {name} as t where {rows} and ({keep}) is true");
        if places.is_any(tx, label, &kept).await? {
            let problem = format!("rows of {label} are to stay, and would go by cascade with those of {above}");
            return Err(Problem::Wrong(problem));
        }
    }
    for deeper in below.iter().filter(|deeper| deeper.name != *name) {
        Box::pin(take(tx, places, deeper, name, &rows, counts)).await?;
    }
    let gone = places.run(tx, label, format!("delete from {name} as t where {rows}")).await?;
    *counts.entry(label.clone()).or_default() += gone;
    Ok(())
}
