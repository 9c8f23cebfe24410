//! A figure: what its arms gave, the ratio of two of them, and whether the goal is reached.

use serde::Serialize;

use crate::counts::Counts;

/// What a figure must be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

/// What one arm gave, round by round.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Series {
    /// What was measured.
    pub(crate) arm: String,
    /// In what, such as `events/s`.
    pub(crate) unit: &'static str,
    /// One value per round.
    pub(crate) values: Vec<f64>,
}

impl Series {
    pub(crate) fn new(arm: impl Into<String>, unit: &'static str, values: Vec<f64>) -> Self {
        Self { arm: arm.into(), unit, values }
    }

    /// Its middle and its ends; none without values.
    pub(crate) fn spread(&self) -> Option<Spread> {
        Spread::of(&self.values)
    }
}

/// The middle of some values, and the ends between which they lie.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// As many are above as below.
    pub(crate) median: f64,
    /// The lowest.
    pub(crate) low: f64,
    /// The highest.
    pub(crate) high: f64,
}

impl Spread {
    /// None of no values.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        Some(Self { median, low, high })
    }
}

/// Whether a goal is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// It is.
    Reached,
    /// It is not.
    Missed,
    /// An event was lost, doubled or re-ordered, so there is no figure.
    Void,
    /// It could not be measured, and why.
    NotMeasured(String),
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// The figure's number; some have several rows.
    pub(crate) figure: u8,
    /// What it says.
    pub(crate) name: String,
    /// What it must be; none for a line that is only told beside.
    pub(crate) goal: Option<Goal>,
    /// The figure: the median of the ratios of each round, or of the values themselves.
    pub(crate) result: Option<Spread>,
    /// In what the figure is; empty for a ratio.
    pub(crate) unit: &'static str,
    /// The arms: what the figure is the ratio of, then controls.
    pub(crate) arms: Vec<Series>,
    /// What became of the events of all rounds.
    pub(crate) counts: Counts,
    /// Whether the goal is reached; none without a goal.
    pub(crate) verdict: Option<Verdict>,
    /// What else must be known to read it.
    pub(crate) note: Option<String>,
}

impl Row {
    /// `over` divided by `under`, round by round.
    pub(crate) fn ratio(figure: u8, name: &str, goal: Option<Goal>, over: Series, under: Series) -> Self {
        let ratios: Vec<f64> = over.values.iter().zip(&under.values).map(|(over, under)| over / under).collect();
        Self::of(figure, name, goal, "", Spread::of(&ratios), vec![over, under])
    }

    /// What an arm gave, as it is.
    pub(crate) fn absolute(figure: u8, name: &str, goal: Option<Goal>, arm: Series) -> Self {
        Self::of(figure, name, goal, arm.unit, arm.spread(), vec![arm])
    }

    /// A figure that cannot be measured with what there is.
    pub(crate) fn not_measured(figure: u8, name: &str, goal: Option<Goal>, why: impl Into<String>) -> Self {
        let row = Self::of(figure, name, goal, "", None, Vec::new());
        Self { verdict: Some(Verdict::NotMeasured(why.into())), ..row }
    }

    fn of(
        figure: u8,
        name: &str,
        goal: Option<Goal>,
        unit: &'static str,
        result: Option<Spread>,
        arms: Vec<Series>,
    ) -> Self {
        let verdict = match (goal, result) {
            (_, None) => Some(Verdict::NotMeasured("there are no values".into())),
            (None, _) => None,
            (Some(Goal::AtLeast(least)), Some(result)) if result.median >= least => Some(Verdict::Reached),
            (Some(Goal::AtMost(most)), Some(result)) if result.median <= most => Some(Verdict::Reached),
            _ => Some(Verdict::Missed),
        };
        Self { figure, name: name.into(), goal, result, unit, arms, counts: Counts::default(), verdict, note: None }
    }

    /// Tells a further arm, which the figure does not depend on.
    pub(crate) fn beside(mut self, arm: Series) -> Self {
        self.arms.push(arm);
        self
    }

    /// What became of the events. The figure is void when anything but all is well.
    pub(crate) fn counted(mut self, counts: Counts) -> Self {
        if !counts.all_is_well() {
            (self.result, self.verdict) = (None, Some(Verdict::Void));
        }
        self.counts = counts;
        self
    }

    /// What else must be known to read it.
    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series::new("arm", "events/s", values.to_vec())
    }

    #[test]
    fn the_ratio_is_that_of_each_round() {
        // The machine was twice as slow in the second round, and both arms with it.
        let row =
            Row::ratio(1, "a", Some(Goal::AtLeast(0.9)), series(&[90.0, 45.0, 99.0]), series(&[100.0, 50.0, 90.0]));
        assert_eq!(row.result, Some(Spread { median: 0.9, low: 0.9, high: 1.1 }));
        assert_eq!(row.verdict, Some(Verdict::Reached));
    }

    #[test]
    fn an_event_that_went_wrong_voids_the_figure() {
        let row = || Row::absolute(1, "a", Some(Goal::AtMost(5.0)), series(&[1.0, 2.0]));
        assert_eq!(row().result.map(|result| result.median), Some(1.5));
        for counts in [
            Counts { lost: 1, ..Counts::default() },
            Counts { doubled: 1, ..Counts::default() },
            Counts { out_of_order: 1, ..Counts::default() },
            Counts { unknown: 1, ..Counts::default() },
        ] {
            let row = row().counted(counts);
            assert_eq!((row.result, row.verdict), (None, Some(Verdict::Void)));
        }
        assert_eq!(row().counted(Counts { events: 7, ..Counts::default() }).verdict, Some(Verdict::Reached));
    }

    #[test]
    fn without_values_there_is_no_figure() {
        let row = Row::absolute(1, "a", Some(Goal::AtMost(5.0)), series(&[]));
        assert!(matches!(row.verdict, Some(Verdict::NotMeasured(_))));
    }
}
