//! What is wrong, or will be.

use maud::{Markup, html};
use serde::Serialize;

use aftercommit_operator::doctor::{self, DoctorConfig, Report, Role, Severity};

use super::overview::in_code;
use crate::html::{Tone, command, state, table};
use crate::page::{At, Nothing, Page};
use crate::problem::Problem;

#[derive(Serialize)]
#[serde(transparent)]
pub(crate) struct Doctor(Report);

impl Page for Doctor {
    type Query = Nothing;

    async fn load(at: &At<'_>, _: &Nothing) -> Result<Self, Problem> {
        let config = at.console.config();
        let asked = DoctorConfig {
            nats_monitor: config.nats_monitor.clone(),
            // The console's own login is looked at, not the relay's.
            roles: vec![Role::Reader],
            ..DoctorConfig::new(config.publisher(), config.nats.clone(), config.naming.clone())
        };
        Ok(Self(Box::pin(doctor::doctor(&asked)).await?))
    }

    fn title(&self, _: &Nothing) -> String {
        "Doctor".into()
    }

    fn content(&self, _: &At<'_>, _: &Nothing) -> Markup {
        let rows: Vec<Vec<Markup>> = self.0.checks.iter().map(|check| vec![
            match check.status {
                Severity::Ok => state(Tone::Well, "OK"),
                Severity::Unknown => state(Tone::Unknown, "not checked"),
                Severity::Warn => state(Tone::Look, "WARN"),
                Severity::Fail => state(Tone::Stuck, "FAIL"),
            },
            html! { (check.name) },
            html! { (check.finding) @if let Some(remedy) = &check.remedy { p.remedy { "→ " (in_code(remedy)) } } },
        ]).collect();
        html! {
            p { "The login that is looked at is the console's own, with the role reader. For that of a relay: " code { "aftercommit doctor" } " with its settings." }
            (table("Checks", &[("", "t"), ("What", "t"), ("Found", "reason")], &rows, "Nothing was looked at."))
            (command("aftercommit doctor"))
        }
    }
}
