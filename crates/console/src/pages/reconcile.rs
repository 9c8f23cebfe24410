//! What reconcilers did and found.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::Serialize;

use aftercommit_operator::reconciler::{self, Finding, FindingFilter, ReconcileRun};

use super::{of_all, unknown};
use crate::html::{Tone, command, number, or_none, state, table, time};
use crate::page::{At, Nothing, Page};
use crate::problem::Problem;

/// Runs that are shown of each database.
const RUNS: i64 = 30;

#[derive(Serialize)]
pub(crate) struct Reconcile {
    findings: Vec<Finding>,
    runs: Vec<ReconcileRun>,
    unknown: Vec<String>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Reconcile {
    type Query = Nothing;

    async fn load(at: &At<'_>, _: &Nothing) -> Result<Self, Problem> {
        let open = FindingFilter::default();
        let (findings, unknown) =
            of_all(at, async |database| reconciler::findings(&database, &open, super::ROWS).await).await?;
        let (runs, _) = of_all(at, async |database| reconciler::runs(&database, None, RUNS).await).await?;
        let mut runs: Vec<ReconcileRun> = runs.into_iter().map(|(_, run)| run).collect();
        runs.sort_by_key(|run| std::cmp::Reverse(run.started_at));
        Ok(Self {
            findings: findings.into_iter().map(|(_, finding)| finding).collect(),
            runs,
            unknown,
            now: Utc::now(),
        })
    }

    fn title(&self, _: &Nothing) -> String {
        "Reconcile".into()
    }

    fn content(&self, at: &At<'_>, _: &Nothing) -> Markup {
        let heads =
            [("Found", "t"), ("Reconciler", "t"), ("Kind", "t"), ("About", "key"), ("State", "t"), ("More", "reason")];
        let findings: Vec<Vec<Markup>> = self
            .findings
            .iter()
            .map(|finding| {
                vec![
                    time(finding.found_at, self.now),
                    html! { (finding.reconciler) },
                    html! { (finding.kind) },
                    match &finding.event_id {
                        Some(id) => html! { a.id href=(at.link(&format!("/events/{id}"))) { (id.to_string()) } },
                        None => html! { (finding.item) },
                    },
                    state(if finding.state == "open" { Tone::Look } else { Tone::Rests }, &finding.state),
                    html! { (finding.detail) },
                ]
            })
            .collect();
        let heads_of_runs = [
            ("Began", "t"),
            ("Reconciler", "t"),
            ("Result", "t"),
            ("What", "t"),
            ("Looked at", "n"),
            ("Found", "n"),
            ("Repaired", "n"),
            ("Failed", "n"),
            ("Error", "reason"),
        ];
        let runs: Vec<Vec<Markup>> = self
            .runs
            .iter()
            .map(|run| {
                vec![
                    time(run.started_at, self.now),
                    html! { (run.reconciler) },
                    match run.result.as_deref() {
                        Some("ok") => state(Tone::Well, "ok"),
                        Some("failed") => state(Tone::Stuck, "failed"),
                        Some(other) => state(Tone::Rests, other),
                        None => state(Tone::Rests, "runs"),
                    },
                    html! { (run.scope) ", " (run.mode) ", " (run.cause) },
                    number(Some(run.scanned.into())),
                    number(Some(run.found.into())),
                    number(Some(run.repaired.into())),
                    number(Some(run.failed.into())),
                    or_none(run.error.as_deref()),
                ]
            })
            .collect();
        html! {
            (unknown(&self.unknown))
            h2 { "What is open" }
            (table("Open findings", &heads, &findings, "Nothing is open: what was compared is the same everywhere."))
            h2 { "Last runs" }
            (table("Last runs", &heads_of_runs, &runs, "No reconciler has run yet. With AFTERCOMMIT_RECONCILE_EVERY=5m relay and worker compare every five minutes."))
            (command("aftercommit findings; aftercommit runs; aftercommit reconcile --full"))
        }
    }
}
