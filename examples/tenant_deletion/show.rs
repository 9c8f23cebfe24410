//! What is seen while it runs.

use std::collections::BTreeMap;
use std::time::Instant;

use aftercommit::erase::Erasure;
use aftercommit::fanout::{Counts, JobId, JobStatus, Jobs};
use sqlx::PgPool;

use super::Error;
use super::proof::counts;

/// Prints what changes.
pub struct Show {
    began: Instant,
    quiet: bool,
    seen: BTreeMap<String, String>,
}

impl Show {
    /// From now on. A test wants to see nothing.
    pub fn new(quiet: bool) -> Self {
        Self { began: Instant::now(), quiet, seen: BTreeMap::new() }
    }

    /// A line with the time.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            println!("{:5.1} s  {text}", self.began.elapsed().as_secs_f64());
        }
    }

    /// What has changed about the services.
    pub fn status(&mut self, status: &JobStatus) -> Result<(), Error> {
        for one in &status.participants {
            let counts = counts(&serde_json::to_value(&one.counts)?)?;
            let mut text = format!("{:<16} {:<8}", one.participant, one.status);
            if one.status != "asked" {
                let attempts = one.attempts.unwrap_or_default();
                text += &format!(" {:>6} rows", total(&counts));
                text += &if attempts > 1 { format!(", with attempt {attempts}") } else { String::new() };
                text += &one.notes.iter().map(|note| format!("; {note}")).collect::<String>();
            }
            text += &one.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            if one.status != "asked" && self.seen.get(&one.participant) != Some(&text) {
                self.say(&text);
                self.seen.insert(one.participant.clone(), text);
            }
        }
        Ok(())
    }
}

/// All counts together.
pub fn total(counts: &Counts) -> u64 {
    counts.values().sum()
}

/// How a job stands.
pub async fn status(pool: &PgPool, job: JobId) -> Result<JobStatus, Error> {
    let mut tx = pool.begin().await?;
    Ok(Jobs::<Erasure>::status(&mut tx, job).await?)
}

/// How many rows a service has deleted by now, and whether it has done all; none when it has not begun.
pub async fn progress(pool: &PgPool, job: JobId) -> Result<Option<(u64, bool)>, Error> {
    let sql = "select counts, ended_at is not null from aftercommit.job_work where job = $1";
    let found: Option<(serde_json::Value, bool)> = sqlx::query_as(sql).bind(job.0).fetch_optional(pool).await?;
    Ok(match found {
        Some((done, ended)) => Some((total(&counts(&done)?), ended)),
        None => None,
    })
}
