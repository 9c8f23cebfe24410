//! The rights of each role, as deploy/postgres/roles.sql grants them, compared with those that the current role has.

use super::session::Session;

const SCRIPT: &str = include_str!("../../roles.sql");

/// One right. Several columns are several rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// `schema`, `table`, `sequence` or `function`.
    kind: &'static str,
    /// Without the schema's name, so empty for the schema itself.
    object: String,
    privilege: String,
    column: Option<String>,
}

/// What the script grants to these roles, named as in the script.
pub fn of(roles: &[&str]) -> Vec<Right> {
    // A command of psql ends the statement before it.
    let script = SCRIPT.replace(":\"schema\"", "aftercommit");
    let lines = script.lines().filter(|line| !line.starts_with("--"));
    let sql: String =
        lines.flat_map(|line| if line.starts_with('\\') { [";", ""] } else { [line.trim(), " "] }).collect();
    let mut rights = Vec::new();
    for statement in sql.split(';') {
        let grant = statement.trim().strip_prefix("grant ").and_then(|rest| rest.split_once(" on "));
        let Some((privileges, (objects, grantees))) =
            grant.and_then(|(privileges, rest)| Some((privileges, rest.split_once(" to ")?)))
        else {
            continue;
        };
        if roles.iter().any(|role| grantees.contains(&format!(":\"{role}\""))) {
            rights.extend(granted(privileges, objects));
        }
    }
    rights
}

fn granted(privileges: &str, objects: &str) -> Vec<Right> {
    let kinds = [("schema ", "schema"), ("sequence ", "sequence"), ("function ", "function"), ("", "table")];
    let (kind, objects) =
        kinds.iter().find_map(|(word, kind)| Some((*kind, objects.strip_prefix(word)?))).unwrap_or(("table", objects));
    let mut rights = Vec::new();
    for object in objects.split(',').map(|object| object.trim().trim_start_matches("aftercommit.")) {
        for (privilege, columns) in privileges_of(privileges) {
            let object = if kind == "schema" { "" } else { object };
            let right = |column| Right { kind, object: object.into(), privilege: privilege.into(), column };
            match columns {
                None => rights.push(right(None)),
                Some(columns) => rights.extend(columns.split(',').map(|column| right(Some(column.trim().into())))),
            }
        }
    }
    rights
}

/// The privileges of a list such as `select, update (a, b)`, with their columns.
fn privileges_of(list: &str) -> Vec<(&str, Option<&str>)> {
    let mut rest = list.trim();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let end = rest.find([',', '(']).unwrap_or(rest.len());
        let privilege = rest[..end].trim();
        let (columns, after) = match rest[end..].strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((columns, after)) => (Some(columns), after),
            None => (None, &rest[end..]),
        };
        found.push((privilege, columns));
        rest = after.trim_start_matches([',', ' ']);
    }
    found
}

/// How the current role's rights differ from what they should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// The statements that grant what is missing.
    pub missing: Vec<String>,
    /// What it may do besides, such as `select on aftercommit.outbox`.
    pub superfluous: Vec<String>,
}

/// Compares. It needs no right on the schema; what is not there is not missed.
pub async fn difference(connection: &mut Session, rights: &[Right]) -> Result<Difference, sqlx::Error> {
    let column = |field: fn(&Right) -> &str| rights.iter().map(field).collect::<Vec<_>>();
    // Row-level security hides all rows from a role that no policy names.
    let rows: Vec<(bool, String)> = sqlx::query_as(
        "with needed (kind, object, privilege, col) as (
             select * from unnest($1::text[], $2::text[], $3::text[], $4::text[])
         ), object (kind, oid, object, name) as (
             select 'schema', oid, '', 'schema aftercommit' from pg_namespace where nspname = 'aftercommit'
             union all
             select case relkind when 'S' then 'sequence' else 'table' end, oid, relname::text,
                    case relkind when 'S' then 'sequence ' else '' end || format('aftercommit.%I', relname)
               from pg_class
              where relkind in ('r', 'p', 'v', 'S')
                and relnamespace = (select oid from pg_namespace where nspname = 'aftercommit')
             union all
             select 'function', oid, proname::text, format('function aftercommit.%I', proname) from pg_proc
              where pronamespace = (select oid from pg_namespace where nspname = 'aftercommit')
         ), possible (kind, privilege) as (
             select 'table', unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger'])
             union all select 'sequence', unnest(array['usage', 'select', 'update'])
             union all select 'schema', unnest(array['usage', 'create'])
             union all select 'function', 'execute'
         ), held as (
             select o.kind, o.oid, o.object, o.name, p.privilege,
                    case o.kind when 'table' then has_table_privilege(o.oid, p.privilege)
                                when 'sequence' then has_sequence_privilege(o.oid, p.privilege)
                                when 'schema' then has_schema_privilege(o.oid, p.privilege)
                                else has_function_privilege(o.oid, p.privilege) end as whole
               from object o join possible p on p.kind = o.kind
         ), single as (
             select h.kind, h.object, h.name, h.privilege, null as col, h.whole as has,
                    exists (select from needed n where n.kind = h.kind and n.object = h.object
                               and n.privilege = h.privilege and n.col = '') as wanted
               from held h
             union all
             select h.kind, h.object, h.name, h.privilege, a.attname::text, has_column_privilege(h.oid, a.attnum, h.privilege),
                    exists (select from needed n where n.kind = h.kind and n.object = h.object
                               and n.privilege = h.privilege and n.col in ('', a.attname))
               from held h join pg_attribute a on a.attrelid = h.oid and a.attnum > 0 and not a.attisdropped
              where h.kind = 'table' and h.privilege in ('select', 'insert', 'update', 'references')
                and not h.whole and not exists (select from needed n where n.kind = h.kind and n.object = h.object
                                                   and n.privilege = h.privilege and n.col = '')
         ), different as (
             select name, privilege || coalesce(' (' || string_agg(col, ', ' order by col) || ')', '') as rights, wanted
               from single where has <> wanted group by name, privilege, wanted, col is null
         )
         select wanted, case when wanted
                then format('grant %s on %s to %I', string_agg(rights, ', ' order by rights), name, current_user)
                else format('%s on %s', string_agg(rights, ', ' order by rights), name) end
           from different group by wanted, name
         union all
         select true, format('grant execute on function pg_control_system() to %I', current_user)
          where exists (select from needed where object = 'relay_log' and privilege = 'insert')
            and not has_function_privilege('pg_catalog.pg_control_system()', 'execute')
         union all
         select true, format('run deploy/postgres/roles.sql again, and grant one of its roles to %I: row-level security of %s knows no other',
                             current_user, c.oid::regclass)
           from pg_class c join object o on o.oid = c.oid
          where row_security_active(c.oid) and exists (select from needed n where n.kind = 'table' and n.object = o.object)
            and not exists (select from pg_policy p where p.polrelid = c.oid
                               and exists (select from unnest(p.polroles) as r where r = 0 or pg_has_role(r, 'usage')))
         order by 1 desc, 2",
    )
    .bind(column(|right| right.kind))
    .bind(column(|right| &right.object))
    .bind(column(|right| &right.privilege))
    .bind(column(|right| right.column.as_deref().unwrap_or_default()))
    .fetch_all(connection)
    .await?;
    let mut found = Difference::default();
    for (wanted, text) in rows {
        if wanted { found.missing.push(text) } else { found.superfluous.push(text) }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_understood() {
        let publisher = of(&["publisher"]);
        let columns =
            publisher.iter().filter(|right| right.object == "outbox").filter_map(|right| right.column.as_deref());
        let columns: Vec<&str> = columns.collect();
        assert_eq!(columns, ["event_id", "type", "version", "key", "headers", "payload", "content_type"]);
        let functions: Vec<&str> =
            publisher.iter().filter(|right| right.kind == "function").map(|right| right.object.as_str()).collect();
        assert_eq!(functions[..3], ["publish", "new_event_id", "capture"]);
        let usage =
            |right: &Right| (right.kind, right.object.as_str(), right.privilege.as_str()) == ("schema", "", "usage");
        for role in [
            "publisher",
            "relay",
            "worker",
            "outbox_reconciler",
            "inbox_reconciler",
            "own_reconciler",
            "pruner",
            "requester",
            "eraser",
            "reader",
            "operator",
        ] {
            assert!(of(&[role]).iter().any(usage), "{role}");
        }
        let stamps = |right: &Right| {
            right.object == "outbox" && right.privilege == "update" && right.column.as_deref() == Some("xid")
        };
        assert!(of(&["relay"]).iter().any(stamps));
        assert!(of(&["worker"]).iter().any(|right| right.object == "lease"), "the first one behind a command of psql");
        assert_eq!(of(&["nobody"]), []);
    }

    #[test]
    fn columns_belong_to_their_privilege() {
        assert_eq!(
            privileges_of("select, update (a, b), delete"),
            [("select", None), ("update", Some("a, b")), ("delete", None)]
        );
    }
}
