//! Requests that several services answer.

use chrono::{DateTime, Utc};
use maud::{Markup, html};
use serde::{Deserialize, Serialize};

use aftercommit_lifecycle::fanout::{Job, JobId, JobStatus, WantedJobs, operate};

use super::ROWS;
use crate::html::{Tone, command, facts, number, or_none, state, table, time};
use crate::page::{At, Page};
use crate::problem::Problem;

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Query {
    kind: Option<String>,
    status: Option<String>,
    #[serde(default)]
    overdue: bool,
}

#[derive(Serialize)]
pub(crate) struct Jobs {
    jobs: Vec<Job>,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for Jobs {
    type Query = Query;

    async fn load(at: &At<'_>, query: &Query) -> Result<Self, Problem> {
        let wanted =
            WantedJobs { kind: query.kind.as_deref(), status: query.status.as_deref(), overdue: query.overdue };
        let mut jobs = operate::list(&at.console.config().publisher(), wanted, ROWS).await?;
        // What a request holds is as good as a payload.
        if !at.shows_payloads() {
            jobs.iter_mut().for_each(|job| job.request = serde_json::Value::Null);
        }
        Ok(Self { jobs, now: Utc::now() })
    }

    fn title(&self, _: &Query) -> String {
        "Jobs".into()
    }

    fn content(&self, at: &At<'_>, query: &Query) -> Markup {
        let heads = [
            ("Asked", "t"),
            ("Status", "t"),
            ("Kind", "t"),
            ("Request", "key"),
            ("By", "t"),
            ("Due", "t"),
            ("Job", "id"),
        ];
        let rows: Vec<Vec<Markup>> = self
            .jobs
            .iter()
            .map(|job| {
                vec![
                    time(job.requested_at, self.now),
                    status(job, self.now),
                    html! { (job.kind) },
                    html! { (job.request_key) },
                    html! { (job.requested_by) },
                    html! { @match job.due_at { Some(due) => (time(due, self.now)), None => span.none { "–" } } },
                    html! { a href=(at.link(&format!("/jobs/{}", job.id))) { (job.id) } },
                ]
            })
            .collect();
        html! {
            p { a href=(at.link("/jobs?overdue=true")) aria-current=[query.overdue.then_some("true")] { "overdue" } " · "
                @for name in ["running", "partial", "failed", "completed", "cancelled"] { a href=(at.link(&format!("/jobs?status={name}"))) { (name) } " · " }
                a href=(at.link("/jobs")) { "all" } }
            (table("Jobs", &heads, &rows, "There is no such job. A request that several services answer, such as the erasure of a tenant, would be here with what each has answered."))
            (command("aftercommit job list --overdue"))
        }
    }
}

fn status(job: &Job, now: DateTime<Utc>) -> Markup {
    let overdue = job.status == "running" && job.due_at.is_some_and(|due| due < now);
    match job.status.as_str() {
        _ if overdue => state(Tone::Stuck, "overdue"),
        "completed" => state(Tone::Well, "completed"),
        "partial" | "failed" => state(Tone::Stuck, &job.status),
        other => state(Tone::Rests, other),
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OneQuery {
    id: String,
}

#[derive(Serialize)]
pub(crate) struct One {
    #[serde(flatten)]
    job: JobStatus,
    #[serde(skip)]
    now: DateTime<Utc>,
}

impl Page for One {
    type Query = OneQuery;

    async fn load(at: &At<'_>, query: &OneQuery) -> Result<Self, Problem> {
        let id: JobId = query.id.parse().map_err(|_| Problem::not_found("This is no job's id."))?;
        let mut job = operate::show(&at.console.config().publisher(), id).await?;
        if !at.shows_payloads() {
            job.job.request = serde_json::Value::Null;
        }
        Ok(Self { job, now: Utc::now() })
    }

    fn title(&self, _: &OneQuery) -> String {
        format!("{} {}", self.job.job.kind, self.job.job.request_key)
    }

    fn content(&self, at: &At<'_>, query: &OneQuery) -> Markup {
        let JobStatus { job, completed, failed, total, participants, children } = &self.job;
        let heads = [
            ("Participant", "t"),
            ("Status", "t"),
            ("Round", "n"),
            ("Asked", "t"),
            ("Ended", "t"),
            ("Attempts", "n"),
            ("Did", "key"),
            ("Says", "reason"),
        ];
        let rows: Vec<Vec<Markup>> = participants
            .iter()
            .map(|one| {
                let did: Vec<String> = one.counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
                vec![
                    html! { (one.participant) },
                    match one.status.as_str() {
                        "done" => state(Tone::Well, "done"),
                        "failed" => state(Tone::Stuck, "failed"),
                        other => state(Tone::Rests, other),
                    },
                    number(Some(one.round.into())),
                    time(one.asked_at, self.now),
                    html! { @match one.ended_at { Some(ended) => (time(ended, self.now)), None => span.none { "–" } } },
                    number(one.attempts.map(i128::from)),
                    html! { (did.join(", ")) },
                    html! { (one.error.as_deref().unwrap_or_default()) " " (one.notes.join("; ")) },
                ]
            })
            .collect();
        html! {
            (facts(&[
                ("Status", status(job, self.now)),
                ("Answered", html! { (completed) @if *failed > 0 { ", " (failed) " failed" } }),
                ("Did together", number(Some((*total).into()))),
                ("Asked", html! { (time(job.requested_at, self.now)) " by " (job.requested_by) }),
                ("Due", html! { @match job.due_at { Some(due) => (time(due, self.now)), None => span.none { "–" } } }),
                ("Belongs to", html! { @match job.parent { Some(parent) => a.id href=(at.link(&format!("/jobs/{parent}"))) { (parent) }, None => (or_none(None)) } }),
            ]))
            h2 { "Participants" }
            (table("Participants", &heads, &rows, "Nobody has been asked."))
            @if !children.is_empty() {
                h2 { "Jobs that belong to it" }
                @for child in children { p { a.id href=(at.link(&format!("/jobs/{}", child.id))) { (child.id) } } }
            }
            (command(&format!("aftercommit job show {0}; job retry {0}", query.id)))
        }
    }
}
