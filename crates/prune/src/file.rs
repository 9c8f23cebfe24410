//! `prune.toml`: what is pruned, without Rust code.
//!
//! ```toml
//! interval = "1h"                    # between two sweeps
//! batch = 500                        # rows of the table in one transaction
//! budget = 1000000                   # rows that one sweep removes at most
//! rest = 4.0                         # so many times as long as a batch took it rests after it
//! audit = "400d"                     # how long the audit trail is kept, at least 30d; for ever when left out
//! search_path = "app"                # where conditions and triggers look names up; PostgreSQL's own only when left out
//!
//! [[category]]
//! name = "sessions"                  # in events, metrics and `aftercommit prune status`
//! table = "public.sessions"          # its primary key has one column
//! finished = "status = 'terminated'" # SQL: which rows may go
//! before = "terminated_at"           # the column that says when a row was finished
//! before_zone = "UTC"                # only for a column without a time zone: in which one it is written
//! period = "30d"                     # how long it is kept after that; without it all finished rows go
//! order = "terminated_at"            # the oldest first; `before` when left out, else the primary key
//! limit = 100000                     # rows in one transaction at most
//! enabled = true
//! event = true                       # tell it with `rows.pruned` events
//!
//! [[category.child]]                 # rows that refer to these, and go first
//! table = "public.kernels"
//! column = "session_id"
//! references = "id"                  # the parent's column; that of the foreign key when left out, else the primary key
//!
//! [[category.child.child]]
//! table = "public.kernel_logs"
//! column = "kernel_id"
//!
//! [[category.association]]           # rows that name an entity by type and id, as text
//! table = "public.associations"
//! type_column = "entity_type"
//! id_column = "entity_id"
//! entity_type = "session"
//! ```

use std::path::Path;
use std::time::Duration;

use aftercommit_core::error::{Error, ErrorKind};
use serde::{Deserialize, Deserializer};

use crate::policy::Policy;
use crate::pruner::PruneConfig;
use crate::spec::{Association, Child, MAX_LIMIT, Spec};
use crate::sweep::Pace;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    interval: Option<Span>,
    batch: Option<u32>,
    budget: Option<u64>,
    rest: Option<f64>,
    audit: Option<Span>,
    search_path: Option<String>,
    #[serde(default)]
    category: Vec<Category>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Category {
    name: String,
    table: String,
    finished: String,
    before: Option<String>,
    before_zone: Option<String>,
    period: Option<Span>,
    order: Option<String>,
    limit: Option<u32>,
    enabled: Option<bool>,
    event: Option<bool>,
    #[serde(default)]
    child: Vec<ChildTable>,
    #[serde(default)]
    association: Vec<AssociationTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChildTable {
    table: String,
    column: String,
    references: Option<String>,
    #[serde(default)]
    child: Vec<ChildTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AssociationTable {
    table: String,
    type_column: String,
    id_column: String,
    entity_type: String,
}

/// A duration such as `30d`.
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse =
            |error| serde::de::Error::custom(format!("{text:?} is no duration such as 30s, 1h or 30d: {error}"));
        humantime::parse_duration(&text).map(Self).map_err(refuse)
    }
}

impl From<ChildTable> for Child {
    fn from(table: ChildTable) -> Self {
        let mut child = Self::new(table.table, table.column);
        if let Some(column) = table.references {
            child = child.references(column);
        }
        table.child.into_iter().fold(child, |child, below| child.child(below.into()))
    }
}

impl From<Category> for Policy {
    fn from(category: Category) -> Self {
        let mut spec = Spec::new(category.table, category.finished)
            .name(category.name)
            .limit(category.limit.unwrap_or(MAX_LIMIT))
            .event(category.event.unwrap_or(true));
        if let Some(column) = category.before {
            spec = spec.before_column(column);
        }
        if let Some(zone) = category.before_zone {
            spec = spec.before_zone(zone);
        }
        if let Some(column) = category.order {
            spec = spec.order_column(column);
        }
        spec = category.child.into_iter().fold(spec, |spec, child| spec.child(child.into()));
        spec = category.association.into_iter().fold(spec, |spec, table| {
            spec.association(Association::new(table.table, table.type_column, table.id_column, table.entity_type))
        });
        Self { enabled: category.enabled.unwrap_or(true), ..Self::new(spec, category.period.map(|span| span.0)) }
    }
}

/// Reads a `prune.toml`.
///
/// # Errors
/// [`ErrorKind::Config`] when the file cannot be read, or says something that cannot be, with the place in it.
pub fn load(path: &Path) -> Result<PruneConfig, Error> {
    let refuse = |problem: String| Error::new(ErrorKind::Config, format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("it cannot be read: {error}")))?;
    parse(&text).map_err(refuse)
}

/// What the text of a `prune.toml` says.
pub(crate) fn parse(text: &str) -> Result<PruneConfig, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_string())?;
    let standard = PruneConfig::default();
    let config = PruneConfig {
        interval: file.interval.map_or(standard.interval, |span| span.0),
        pace: Pace {
            batch: file.batch.unwrap_or(standard.pace.batch),
            budget: file.budget.unwrap_or(standard.pace.budget),
            rest: file.rest.unwrap_or(standard.pace.rest),
        },
        policies: file.category.into_iter().map(Policy::from).collect(),
        audit: file.audit.map(|span| span.0),
        search_path: file.search_path,
    };
    config.check().map_err(|error| error.to_string())?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that the documentation of this module shows.
    fn shown() -> String {
        let source = include_str!("file.rs");
        let lines =
            source.lines().skip_while(|line| *line != "//! ```toml").skip(1).take_while(|line| *line != "//! ```");
        lines.map(|line| line.strip_prefix("//!").unwrap().trim_start().to_string() + "\n").collect()
    }

    #[test]
    fn the_file_of_the_documentation_says_what_it_shows() {
        let config = parse(&shown()).unwrap();
        assert_eq!((config.interval, config.pace), (Duration::from_secs(3600), Pace::default()));
        assert_eq!(config.audit, Some(Duration::from_secs(400 * 86_400)));
        let [policy] = config.policies.as_slice() else { panic!("{config:?}") };
        assert_eq!(policy.period, Some(Duration::from_secs(30 * 86_400)));
        let spec = &policy.spec;
        assert_eq!((spec.name.as_str(), spec.table.as_str(), spec.limit), ("sessions", "public.sessions", 100_000));
        assert_eq!(spec.children[0].children[0].table, "public.kernel_logs");
        assert_eq!(spec.associations[0].entity_type, "session");
        assert!(spec.event && policy.enabled);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let category = |more: &str| format!("[[category]]\nname = 'a'\ntable = 't'\nfinished = 'true'\n{more}");
        for (text, told) in [
            ("intervall = '1h'".to_string(), "intervall"),
            ("interval = '1x'".into(), "no duration"),
            (category("perod = '1d'"), "perod"),
            (category("period = '1d'"), "needs the column"),
            (category("limit = 100001"), "limit must be"),
            (category("limit = 0"), "limit must be"),
            (category("[[category.child]]\ntable = 'x'"), "column"),
            ("[[category]]\nname = 'a'\ntable = 't'\nfinished = 'a = $1'".into(), "placeholders"),
            ("[[category]]\nname = 'a'\ntable = 't'\nfinished = 'true; drop table t'".into(), "semicolon"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }
}
