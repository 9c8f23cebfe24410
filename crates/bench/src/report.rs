//! The report as a table, as Markdown, and as JSON.

use std::fmt::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::figure::{Goal, Row, Spread, Verdict};
use crate::machine::Machine;

/// What a run of the bench found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    /// Where it was measured.
    pub(crate) machine: Machine,
    /// How often each arm was measured.
    pub(crate) rounds: usize,
    /// Whether it was a smoke run, whose figures mean nothing.
    pub(crate) quick: bool,
    /// How long the whole run took.
    #[serde(serialize_with = "seconds")]
    pub(crate) took: Duration,
    /// One or more per figure, by the figure's number.
    pub(crate) rows: Vec<Row>,
}

fn seconds<S: serde::Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(duration.as_secs_f64())
}

impl Report {
    /// Whether no event went wrong in any run. Goals that are missed do not count.
    pub(crate) fn all_is_well(&self) -> bool {
        self.rows.iter().all(|row| row.counts.all_is_well())
    }

    /// The figures as a table in Markdown, with machine and versions above it.
    pub(crate) fn to_markdown(&self) -> String {
        let mut text = format!(
            "{}\n\n| # | figure | goal | result | verdict | measured |\n|---|---|---|---|---|---|\n",
            self.head()
        );
        for row in &self.rows {
            _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} |",
                row.figure,
                row.name,
                goal(row),
                result(row),
                verdict(row),
                details(row).join("; ")
            );
        }
        text
    }

    fn head(&self) -> String {
        let what = if self.quick { "a smoke run: its figures mean nothing" } else { "median (lowest to highest)" };
        format!("{}. {} rounds, {what}; {:.0} s in all.", self.machine, self.rounds, self.took.as_secs_f64())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.head())?;
        for row in &self.rows {
            writeln!(f, "{:>2}  {}", row.figure, row.name)?;
            writeln!(f, "    goal {}, result {}: {}", goal(row), result(row), verdict(row))?;
            for detail in details(row) {
                writeln!(f, "    {detail}")?;
            }
        }
        Ok(())
    }
}

fn goal(row: &Row) -> String {
    match row.goal {
        None => "none".into(),
        Some(Goal::AtLeast(least)) => with_unit(&format!("≥ {least}"), row.unit),
        Some(Goal::AtMost(most)) => with_unit(&format!("≤ {most}"), row.unit),
    }
}

fn result(row: &Row) -> String {
    row.result.map_or_else(|| "none".into(), |result| spread(result, row.unit))
}

fn verdict(row: &Row) -> String {
    match &row.verdict {
        None => "told beside".into(),
        Some(Verdict::Reached) => "reached".into(),
        Some(Verdict::Missed) => "missed".into(),
        Some(Verdict::Void) => "VOID".into(),
        Some(Verdict::NotMeasured(why)) => format!("not measured: {why}"),
    }
}

/// The arms, the counts and the note.
fn details(row: &Row) -> Vec<String> {
    let arms = row.arms.iter().filter_map(|arm| Some(format!("{} {}", arm.arm, spread(arm.spread()?, arm.unit))));
    let counts = row.counts;
    let counted = (counts.events > 0).then(|| {
        let unknown = if counts.unknown > 0 { format!(", unknown {}", counts.unknown) } else { String::new() };
        format!(
            "{} events: lost {}, doubled {}, out of order {}{unknown}",
            counts.events, counts.lost, counts.doubled, counts.out_of_order
        )
    });
    arms.chain(counted).chain(row.note.clone()).collect()
}

fn spread(spread: Spread, unit: &str) -> String {
    let Spread { median, low, high } = spread;
    with_unit(&format!("{} ({} to {})", number(median), number(low), number(high)), unit)
}

fn with_unit(text: &str, unit: &str) -> String {
    if unit.is_empty() { text.into() } else { format!("{text} {unit}") }
}

/// Three digits that count, and no fraction where there are more.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counts::Counts;
    use crate::figure::Series;

    fn report(counts: Counts) -> Report {
        let series = |arm: &str, value| Series::new(arm, "events/s", vec![value]);
        let (over, under) = (series("relay", 95_000.0), series("publish", 100_000.0));
        let row = Row::ratio(1, "drain", Some(Goal::AtLeast(0.95)), over, under);
        Report {
            machine: Machine::default(),
            rounds: 1,
            quick: false,
            took: Duration::from_secs(3),
            rows: vec![row.counted(counts), Row::not_measured(8, "sync", None, "no such server")],
        }
    }

    #[test]
    fn each_row_tells_goal_result_and_what_it_is_made_of() {
        let good = report(Counts { events: 5, ..Counts::default() });
        assert!(good.all_is_well());
        let markdown = good.to_markdown();
        let row = "| 1 | drain | ≥ 0.95 | 0.950 (0.950 to 0.950) | reached | relay 95000 (95000 to 95000) events/s; ";
        assert!(markdown.contains(row), "{markdown}");
        assert!(markdown.contains("not measured: no such server"), "{markdown}");
        assert!(good.to_string().contains("5 events: lost 0, doubled 0, out of order 0"), "{good}");
    }

    #[test]
    fn a_void_figure_shows_no_result() {
        let void = report(Counts { events: 5, lost: 1, ..Counts::default() });
        assert!(!void.all_is_well());
        assert!(void.to_string().contains("result none: VOID"), "{void}");
    }
}
