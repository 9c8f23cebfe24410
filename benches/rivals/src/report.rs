//! All values of all rounds, as a table of medians with their spread, or as JSON.

use std::collections::BTreeMap;

use crate::arms::Kind;

#[derive(Default)]
pub struct Report {
    values: BTreeMap<(&'static str, Kind), Vec<f64>>,
    figures: Vec<&'static str>,
}

impl Report {
    pub fn add(&mut self, kind: Kind, figure: &'static str, value: f64) {
        if !self.figures.contains(&figure) {
            self.figures.push(figure);
        }
        self.values.entry((figure, kind)).or_default().push(value);
    }

    /// One line of Markdown per figure and arm: median, smallest, largest.
    pub fn table(&self) -> String {
        let mut lines = vec!["| | | median | smallest | largest | rounds |".to_owned(), "|---|---|--:|--:|--:|--:|".into()];
        for (figure, kind, values) in self.sorted() {
            let (median, least, most) = (values[values.len() / 2], values[0], values[values.len() - 1]);
            let digits = if most >= 1000.0 || most.fract() == 0.0 { 0 } else { 1 };
            lines.push(format!(
                "| {figure} | {} | {median:.digits$} | {least:.digits$} | {most:.digits$} | {} |",
                kind.name(),
                values.len()
            ));
        }
        lines.join("\n")
    }

    pub fn json(&self) -> anyhow::Result<String> {
        let rows: Vec<_> = self
            .sorted()
            .map(|(figure, kind, values)| {
                serde_json::json!({ "figure": figure, "arm": kind.name(), "median": values[values.len() / 2], "values": values })
            })
            .collect();
        Ok(serde_json::to_string_pretty(&rows)?)
    }

    fn sorted(&self) -> impl Iterator<Item = (&'static str, Kind, Vec<f64>)> {
        self.figures.iter().flat_map(|figure| {
            self.values.iter().filter(move |((name, _), _)| name == figure).map(|((figure, kind), values)| {
                let mut values = values.clone();
                values.sort_by(f64::total_cmp);
                (*figure, *kind, values)
            })
        })
    }
}
