//! Which version the schema has, and what the login may do in it.

use super::{Check, Role};
use aftercommit_core::config::Schema;
use aftercommit_core::postgres::doctor::Tables;
use aftercommit_core::postgres::migrate;
use aftercommit_core::postgres::quoted;
use aftercommit_core::postgres::rights::Difference;

pub(super) fn schema(tables: Tables, migrations: Option<&migrate::Difference>, role: &str, schema: &Schema) -> Check {
    const NAME: &str = "schema";
    const MIGRATE: &str = "run `aftercommit migrate`";
    match (tables, migrations) {
        (Tables { outbox: false, .. }, _) => Check::fail(NAME, format!("there is no table {schema}.outbox"), MIGRATE),
        (Tables { migrations: false, .. }, _) => Check::warn(
            NAME,
            format!("there is no record in {schema}.migrations of how the schema came, so its version is unknown"),
            "run the parts of `aftercommit migrate --print` that write the record",
        ),
        (_, None) => Check::unknown(
            NAME,
            format!("it is there, but the role {role} may not read {schema}.migrations, which has its version"),
            format!("grant select on {schema}.migrations to {}", quoted(role)),
        ),
        (_, Some(migrate::Difference { missing, unknown, changed })) => {
            if !changed.is_empty() {
                return Check::fail(
                    NAME,
                    format!("migrations {changed:?} were applied with another text than this version has"),
                    "find out who changed the schema; do not go on before that",
                );
            }
            if !missing.is_empty() {
                return Check::fail(NAME, format!("migrations are missing: {}", missing.join(", ")), MIGRATE);
            }
            if !unknown.is_empty() {
                return Check::warn(
                    NAME,
                    format!("it has migrations {unknown:?}, which only a newer version knows"),
                    "update the programs to the version of aftercommit that the schema was made for",
                );
            }
            Check::ok(NAME, "up to date")
        }
    }
}

pub(super) fn grants(rights: Option<&Difference>, login: &str, roles: &[Role]) -> Vec<Check> {
    const NAME: &str = "grants";
    let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
    let who = if names.is_empty() { "a relay".into() } else { names.join(" with ") };
    let Some(Difference { missing, superfluous }) = rights else {
        let finding = format!(
            "the role {login} owns the schema or is a superuser, and may do everything: so may whoever gets hold of its password"
        );
        return vec![Check::warn(NAME, finding, "use a login with a role of deploy/postgres/roles.sql")];
    };
    let lacks = format!("the role {login} lacks a right that {who} needs");
    let mut checks: Vec<Check> =
        missing.iter().map(|statement| Check::fail(NAME, lacks.clone(), format!("{statement};"))).collect();
    if checks.is_empty() {
        checks.push(Check::ok(NAME, format!("the role {login} has every right that {who} needs")));
    }
    // Who asks about nothing in particular may have several things to do.
    for right in superfluous.iter().filter(|_| !names.is_empty()) {
        checks.push(Check::warn(
            NAME,
            format!("the role {login} may do more than {who} needs: {right}"),
            "run deploy/postgres/roles.sql again, and take away what was granted to the login itself or by other roles",
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity::{Fail, Ok as Fine, Unknown, Warn};

    #[test]
    fn a_schema_of_another_version_fails() {
        let there = Tables { outbox: true, migrations: true, readable: true };
        let judge = |tables, difference: Option<migrate::Difference>| {
            schema(tables, difference.as_ref(), "relay", &Schema::default()).status
        };
        assert_eq!(judge(there, Some(migrate::Difference::default())), Fine);
        assert_eq!(
            judge(there, Some(migrate::Difference { missing: vec!["0003 inbox".into()], ..Default::default() })),
            Fail
        );
        assert_eq!(judge(there, Some(migrate::Difference { unknown: vec![9], ..Default::default() })), Warn);
        assert_eq!(judge(there, Some(migrate::Difference { changed: vec![1], ..Default::default() })), Fail);
        assert_eq!(judge(Tables { readable: false, ..there }, None), Unknown);
        assert_eq!(judge(Tables { migrations: false, readable: false, ..there }, None), Warn);
        assert_eq!(judge(Tables { outbox: false, migrations: false, readable: false }, None), Fail);
    }
}
