//! `erase.toml`: who takes part in erasures, and what is looked at before anybody is asked.
//!
//! ```toml
//! [[subject]]
//! kind = "tenant"
//! participants = ["orders", "bills"]   # those that are registered in aftercommit.participant when left out
//! name = "select name from public.tenants where id = $1::bigint"   # whose answer --name must be; $1 is the id as text
//! due_after = "30d"                    # then it is overdue; never when left out
//! begin_after = "1h"                   # until then it can be cancelled; at once when left out
//!
//! [[subject.guard]]                    # refuses while it counts something, unless --force
//! what = "other admins"
//! count = "select count(*) from public.admins where tenant_id = $1::bigint and leaves is not true"
//! ```

use std::path::Path;
use std::time::Duration;

use aftercommit_core::error::{Error, ErrorKind};
use serde::{Deserialize, Deserializer};

use super::{Request, Subject};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    subject: Vec<Kind>,
}

/// What a file says of the subjects of a kind.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kind {
    kind: String,
    participants: Option<Vec<String>>,
    name: Option<String>,
    due_after: Option<Span>,
    begin_after: Option<Span>,
    #[serde(default)]
    guard: Vec<Guard>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Guard {
    what: String,
    count: String,
}

/// A duration such as `30d`.
#[derive(Debug)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let refuse =
            |error| serde::de::Error::custom(format!("{text:?} is no duration such as 30s, 1h or 30d: {error}"));
        humantime::parse_duration(&text).map(Self).map_err(refuse)
    }
}

/// What an `erase.toml` says.
#[derive(Debug, Default)]
pub struct EraseConfig(Vec<Kind>);

/// Reads an `erase.toml`.
///
/// # Errors
/// [`ErrorKind::Config`] when the file cannot be read, or says something that cannot be, with the place in it.
pub fn load(path: &Path) -> Result<EraseConfig, Error> {
    let refuse = |problem: String| Error::new(ErrorKind::Config, format!("{}: {problem}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(format!("it cannot be read: {error}")))?;
    parse(&text).map_err(refuse)
}

fn parse(text: &str) -> Result<EraseConfig, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_string())?;
    for (n, kind) in file.subject.iter().enumerate() {
        if file.subject[..n].iter().any(|other| other.kind == kind.kind) {
            return Err(format!("the kind {:?} of subject is given twice", kind.kind));
        }
    }
    Ok(EraseConfig(file.subject))
}

impl EraseConfig {
    /// A request for a subject as the file says. `name` is the name that somebody gave.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the file says nothing of subjects of this kind, or wants a name and there is none.
    pub fn request(&self, subject: Subject, who: &str, name: Option<&str>) -> Result<Request, Error> {
        let refuse = |problem: String| Error::new(ErrorKind::Config, problem);
        let found = self.0.iter().find(|kind| kind.kind == subject.kind);
        let found = found.ok_or_else(|| refuse(format!("the file has no subject of the kind {:?}", subject.kind)))?;
        let mut request = self.preview(subject, who)?;
        request = match (&found.name, name) {
            (Some(sql), Some(name)) => request.named(name, sql),
            (None, None) => request,
            (Some(_), None) => {
                return Err(refuse(format!("give the name of the {} with --name: it is compared", found.kind)));
            }
            (None, Some(_)) => {
                return Err(refuse(format!(
                    "--name cannot be compared: the file has no query for the name of a {}",
                    found.kind
                )));
            }
        };
        for guard in &found.guard {
            request = request.none_left(&guard.what, &guard.count);
        }
        if let Some(Span(due)) = found.due_after {
            request = request.due_after(due);
        }
        if let Some(Span(wait)) = found.begin_after {
            request = request.begin_after(wait);
        }
        Ok(request)
    }

    /// The same for a preview, which needs no name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the file says nothing of subjects of this kind.
    pub fn preview(&self, subject: Subject, who: &str) -> Result<Request, Error> {
        let found = self.0.iter().find(|kind| kind.kind == subject.kind).ok_or_else(|| {
            Error::new(ErrorKind::Config, format!("the file has no subject of the kind {:?}", subject.kind))
        })?;
        let request = Request::new(subject, who);
        Ok(match &found.participants {
            Some(names) => request.participants(names.clone()),
            None => request,
        })
    }
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
        let [kind] = config.0.as_slice() else { panic!("{config:?}") };
        assert_eq!((kind.kind.as_str(), kind.guard.len(), kind.guard[0].what.as_str()), ("tenant", 1, "other admins"));
        assert_eq!(kind.due_after.as_ref().unwrap().0, Duration::from_secs(30 * 86_400));
        let subject = || Subject::new("tenant", 1);
        assert!(config.request(subject(), "ann", None).unwrap_err().to_string().contains("--name"));
        assert!(config.request(subject(), "ann", Some("Acme")).is_ok());
        let other = config.request(Subject::new("person", 1), "ann", None).unwrap_err().to_string();
        assert!(other.contains("person"), "{other}");
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, told) in [
            ("[[subject]]\nkind = 'a'\nnmae = 'x'", "nmae"),
            ("[[subjekt]]\nkind = 'a'", "subjekt"),
            ("[[subject]]\nkind = 'a'\ndue_after = '1x'", "no duration"),
            ("[[subject]]\nkind = 'a'\n[[subject]]\nkind = 'a'", "given twice"),
            ("[[subject]]\nkind = 'a'\n[[subject.guard]]\nwhat = 'x'", "count"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }
}
