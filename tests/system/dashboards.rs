//! Grafana dashboards and alerts are about metrics that exist, with labels that they have; what is not known is not shown as 0.

use std::collections::BTreeSet;
use std::fs;

use crate::docs::root;
use aftercommit_core::telemetry::{Kind, METRICS, Metric};
use serde_json::Value;

/// Labels that Prometheus adds, or that its alerts have.
const ADDED: &[&str] = &["namespace", "job", "instance", "le", "alertname", "alertstate"];
/// Series that are not ours.
const OTHERS: &[&str] = &["up", "ALERTS"];

fn dashboards() -> Vec<(String, Value)> {
    let files = fs::read_dir(root().join("deploy/grafana/dashboards")).unwrap();
    let mut all: Vec<(String, Value)> = files
        .map(|file| {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            (name, serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap())
        })
        .collect();
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
}

fn queries(panel: &Value) -> impl Iterator<Item = (&str, &str)> {
    let targets = panel["targets"].as_array().unwrap();
    targets.iter().map(|target| (target["expr"].as_str().unwrap(), target["legendFormat"].as_str().unwrap()))
}

/// The expressions of alerts, each in one line.
fn alerts() -> Vec<String> {
    let rules = fs::read_to_string(root().join("deploy/prometheus/alerts.yml")).unwrap();
    let mut all = Vec::new();
    for rule in rules.split("- alert: ").skip(1) {
        let expression = rule.split("expr:").nth(1).unwrap();
        let lines =
            expression.lines().take_while(|line| !["for:", "labels:"].iter().any(|key| line.trim().starts_with(key)));
        all.push(lines.collect::<Vec<_>>().join(" ").replace(">-", ""));
    }
    all
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// The metric of a series' name: a histogram has several.
fn metric(series: &str) -> Option<&'static Metric> {
    let exact = METRICS.iter().find(|metric| metric.name == series && metric.kind != Kind::Histogram);
    exact.or_else(|| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| series.strip_suffix(suffix))?;
        METRICS.iter().find(|metric| metric.name == base && metric.kind == Kind::Histogram)
    })
}

/// The metrics that a query names.
fn metrics(query: &str) -> Vec<&'static Metric> {
    let series = words(query).filter(|word| word.starts_with("aftercommit_"));
    series.map(|series| metric(series).unwrap_or_else(|| panic!("there is no {series}: {query}"))).collect()
}

/// The labels that a query selects and groups by, and those that a legend shows.
fn labels<'a>(query: &'a str, legend: &'a str) -> BTreeSet<&'a str> {
    let mut found = BTreeSet::new();
    for selector in query.split('{').skip(1).map(|rest| rest.split('}').next().unwrap()) {
        // A comma within quotes is a value's.
        let outside = selector.split('"').step_by(2);
        found.extend(
            outside.flat_map(|part| part.split(',')).filter_map(|part| part.split(['=', '!']).next()).map(str::trim),
        );
    }
    for word in ["by", "on", "without", "ignoring"] {
        for (at, _) in query.match_indices(&format!("{word} (")) {
            if query[..at].ends_with(' ') {
                found.extend(words(query[at + word.len() + 2..].split(')').next().unwrap()));
            }
        }
    }
    found.extend(legend.split("{{").skip(1).map(|rest| rest.split("}}").next().unwrap()));
    found.into_iter().filter(|label| !label.is_empty() && *label != "__name__").collect()
}

/// That each label is one of the metrics that the query is about.
fn check(place: &str, query: &str, legend: &str) {
    let metrics = metrics(query);
    let known: BTreeSet<&str> = metrics.iter().flat_map(|metric| metric.labels).chain(ADDED).copied().collect();
    for label in labels(query, legend) {
        assert!(known.contains(label), "{place}: no metric has the label {label}: {query}");
    }
    let others = words(query).any(|word| OTHERS.contains(&word));
    assert!(!metrics.is_empty() || others, "{place}: it is about nothing of ours: {query}");
    // What is not there would be a healthy number.
    assert!(!query.contains("vector("), "{place}: {query}");
}

#[test]
fn dashboards_and_alerts_name_metrics_and_labels_that_exist() {
    for expression in alerts() {
        check("alerts.yml", &expression, "");
    }
    assert!(alerts().len() > 20);
    for (name, dashboard) in dashboards() {
        for panel in panels(&dashboard) {
            for (query, legend) in queries(panel) {
                check(&format!("{name}: {}", panel["title"]), query, legend);
            }
        }
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            let query = variable["query"]["query"].as_str().unwrap_or_default();
            let named = words(query).filter(|word| word.starts_with("aftercommit_"));
            assert!(named.into_iter().all(|series| metric(series).is_some()), "{name}: {query}");
        }
    }
}

#[test]
fn every_metric_is_in_a_dashboard() {
    let shown: BTreeSet<&str> = dashboards()
        .iter()
        .flat_map(|(_, dashboard)| {
            panels(dashboard).flat_map(queries).flat_map(|(query, _)| metrics(query)).collect::<Vec<_>>()
        })
        .map(|metric| metric.name)
        .collect();
    let missing: Vec<&str> = METRICS.iter().map(|metric| metric.name).filter(|name| !shown.contains(name)).collect();
    assert_eq!(missing, Vec::<&str>::new());
}

#[test]
fn every_panel_says_what_it_shows_and_tells_nothing_from_0() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in dashboards() {
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_string()), "{name}");
        let all = dashboard["panels"].as_array().unwrap();
        let ids: BTreeSet<i64> = all.iter().map(|panel| panel["id"].as_i64().unwrap()).collect();
        assert_eq!(ids.len(), all.len(), "{name}: two panels have one id");
        let mut titles = BTreeSet::new();
        for panel in panels(&dashboard) {
            let text = |key: &str| panel[key].as_str().unwrap_or_default().to_string();
            let defaults = &panel["fieldConfig"]["defaults"];
            let title = text("title");
            assert!(!title.is_empty() && text("description").len() > 10, "{name}: {title}");
            assert!(titles.insert(title.clone()), "{name}: two panels are called {title}");
            assert!(defaults["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "{name}: {title} has no unit");
            assert!(["?", "none"].contains(&defaults["noValue"].as_str().unwrap()), "{name}: {title}");
            let special = |mapping: &Value| mapping["type"] == "special" && mapping["options"]["result"]["text"] == "?";
            assert_eq!(
                defaults["mappings"].as_array().unwrap().iter().filter(|one| special(one)).count(),
                2,
                "{name}: {title}"
            );
            assert!(panel["datasource"]["uid"] == "${datasource}", "{name}: {title}");
        }
    }
    assert_eq!(uids.len(), 4);
}

/// Panels stand beside each other, none over another, within the width.
#[test]
fn no_panel_hides_another() {
    for (name, dashboard) in dashboards() {
        let mut taken = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(at("x") + at("w") <= 24, "{name}: {}", panel["title"]);
            let cells = (at("y")..at("y") + at("h")).flat_map(|y| (at("x")..at("x") + at("w")).map(move |x| (x, y)));
            for cell in cells {
                assert!(taken.insert(cell), "{name}: {} is over another one", panel["title"]);
            }
        }
    }
}

/// What Grafana is started with names what is there.
#[test]
fn provisioning_names_the_data_source_and_the_folder() {
    let text = |path: &str| fs::read_to_string(root().join("deploy/grafana/provisioning").join(path)).unwrap();
    assert!(text("datasources/prometheus.yaml").contains("type: prometheus"));
    assert!(text("dashboards/aftercommit.yaml").contains("path: /var/lib/grafana/dashboards"));
}
