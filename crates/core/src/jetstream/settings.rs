//! Every setting of a stream and of a consumer that nats-server knows, and what it means for the events of an outbox:
//! harmless, refused, or wrong and to be corrected. It is read from what the server sends, not from what this program's
//! client knows of it, so that a setting of a newer server is named and not overlooked.

use serde_json::{Map, Value};

/// A configuration as the server sends it.
pub type Fields = Map<String, Value>;

/// What a setting means; `C` is what it is judged by besides its value.
pub(super) enum Rule<C: 'static> {
    /// Whatever it says, no event is lost, changed, doubled or re-ordered by it, for this reason.
    Harmless(#[allow(dead_code, reason = "a reason is written for the reader")] &'static str),
    /// Why this value is wrong, if it is. It cannot be corrected in place, or not by us; the rest is the way out.
    Refused(Judge<C>, &'static str),
    /// Why this value is wrong, if it is, and what it shall be; null takes the setting away.
    Corrected(Judge<C>, fn(&C, &Fields) -> Value),
}

/// Why a value is wrong; none when it is fine.
pub(super) type Judge<C> = fn(&Value, &C, &Fields) -> Option<String>;

/// The table of a kind of object: each field with its rule.
pub(super) type Table<C> = [(&'static str, Rule<C>)];

/// A setting that would lose, change, double or re-order events, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Name of the setting, as nats-server has it, such as `max_age`.
    pub setting: &'static str,
    /// Why its value is wrong.
    pub why: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}; {}", self.setting, self.why, self.remedy)
    }
}

/// What a configuration comes to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Settings whose values are wrong.
    pub problems: Vec<Problem>,
    /// Settings that are set and that this version does not know: what they do to events cannot be told.
    pub unknown: Vec<String>,
}

/// Judges a configuration; `provision` is the way out of what can be corrected.
pub(super) fn judge<C>(table: &'static Table<C>, fields: &Fields, by: &C, provision: &'static str) -> Findings {
    let mut findings = Findings::default();
    for (name, rule) in table {
        let (judge, remedy) = match rule {
            Rule::Harmless(_) => continue,
            Rule::Refused(judge, remedy) => (judge, *remedy),
            Rule::Corrected(judge, _) => (judge, provision),
        };
        if let Some(why) = judge(fields.get(*name).unwrap_or(&Value::Null), by, fields) {
            findings.problems.push(Problem { setting: name, why, remedy });
        }
    }
    let unknown = fields.iter().filter(|(name, value)| {
        // A newer server sends what is not set, too.
        is_set(value) && table.iter().all(|(known, _)| known != name)
    });
    findings.unknown = unknown.map(|(name, _)| name.clone()).collect();
    findings
}

/// What can be put right, as `setting: is -> shall be`, unless the rule says it in other words.
pub(super) fn differences<C>(table: &'static Table<C>, fields: &Fields, by: &C) -> Vec<String> {
    let corrected = table.iter().filter_map(|(name, rule)| match rule {
        Rule::Corrected(judge, shall_be) => Some((*name, judge, shall_be)),
        _ => None,
    });
    corrected
        .filter_map(|(name, judge, shall_be)| {
            let is = fields.get(name).unwrap_or(&Value::Null);
            let why = judge(is, by, fields)?;
            let change = || format!("{name}: {} -> {}", shown(name, is), shown(name, &shall_be(by, fields)));
            Some(if why.is_empty() { change() } else { why })
        })
        .collect()
}

/// Puts right what can be, and says what was changed, as `setting is -> shall be`.
pub(super) fn correct<C>(table: &'static Table<C>, fields: &mut Fields, by: &C) -> Vec<String> {
    let mut changes = Vec::new();
    for (name, rule) in table {
        let Rule::Corrected(judge, shall_be) = rule else { continue };
        if judge(fields.get(*name).unwrap_or(&Value::Null), by, fields).is_some() {
            let shall_be = shall_be(by, fields);
            changes.extend(set(fields, name, shall_be));
        }
    }
    changes
}

/// Sets one field, and says so when that changes it.
pub(super) fn set(fields: &mut Fields, name: &str, shall_be: Value) -> Option<String> {
    let is = fields.get(name).cloned().unwrap_or(Value::Null);
    if is == shall_be {
        return None;
    }
    let change = format!("{name} {} -> {}", shown(name, &is), shown(name, &shall_be));
    match shall_be {
        Value::Null => _ = fields.remove(name),
        shall_be => _ = fields.insert(name.into(), shall_be),
    }
    Some(change)
}

/// A value as people read it.
fn shown(name: &str, value: &Value) -> String {
    const TIMES: [&str; 6] =
        ["max_age", "duplicate_window", "subject_delete_marker_ttl", "ack_wait", "inactive_threshold", "max_expires"];
    match value {
        Value::Null => "not set".into(),
        Value::String(text) => text.clone(),
        Value::Number(nanos) if TIMES.contains(&name) => {
            nanos.as_u64().map_or(nanos.to_string(), |nanos| format!("{:?}", std::time::Duration::from_nanos(nanos)))
        }
        value => value.to_string(),
    }
}

/// Whether a value is another one than what stands for nothing.
pub(super) fn is_set(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(set) => *set,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(fields) => fields.values().any(is_set),
    }
}

/// The number under a name; 0 when it is not there.
pub(super) fn number(fields: &Fields, name: &str) -> i64 {
    fields.get(name).and_then(Value::as_i64).unwrap_or(0)
}

/// The text under a name; empty when it is not there.
pub(super) fn text<'a>(fields: &'a Fields, name: &str) -> &'a str {
    fields.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The texts in a list.
pub(super) fn texts(value: &Value) -> Vec<&str> {
    value.as_array().map(|list| list.iter().filter_map(Value::as_str).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TABLE: &Table<()> = &[
        ("name", Rule::Harmless("a name")),
        ("bad", Rule::Refused(|value, (), _| is_set(value).then(|| "it is bad".into()), "make it anew")),
        ("low", Rule::Corrected(|value, (), _| is_set(value).then(|| "it is low".into()), |(), _| Value::Null)),
    ];

    fn fields(value: Value) -> Fields {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_field_that_the_table_does_not_know_is_named_when_it_is_set() {
        let config = json!({ "name": "a", "future": 1, "evict_when_bored": true, "off": false, "none": {}, "zero": 0 });
        let findings = judge(TABLE, &fields(config), &(), "provision");
        assert_eq!(findings.unknown, ["evict_when_bored", "future"]);
        assert_eq!(findings.problems, []);
    }

    #[test]
    fn what_is_wrong_is_named_and_what_can_be_corrected_is() {
        let mut config = fields(json!({ "name": "a", "bad": "yes", "low": 7 }));
        let findings = judge(TABLE, &config, &(), "provision");
        let found: Vec<_> = findings.problems.iter().map(|problem| (problem.setting, problem.remedy)).collect();
        assert_eq!(found, [("bad", "make it anew"), ("low", "provision")]);
        assert_eq!(correct(TABLE, &mut config, &()), ["low 7 -> not set"]);
        assert_eq!(Value::from(config), json!({ "name": "a", "bad": "yes" }));
    }

    #[test]
    fn times_are_shown_as_times() {
        let mut config = fields(json!({ "max_age": 1_000_000_000, "max_msgs": 5 }));
        assert_eq!(set(&mut config, "max_age", 2_000_000_000_u64.into()).unwrap(), "max_age 1s -> 2s");
        assert_eq!(set(&mut config, "max_msgs", (-1).into()).unwrap(), "max_msgs 5 -> -1");
        assert_eq!(set(&mut config, "max_msgs", (-1).into()), None);
    }
}
