//! Charts, drawn on the server.

use std::collections::VecDeque;
use std::fmt::Write;

use maud::{Markup, html};

const WIDTH: f64 = 180.0;
const HEIGHT: f64 = 28.0;

/// A line of the last hour; where nothing was known it is broken. `what` says what it shows.
pub(crate) fn chart(what: &str, points: &VecDeque<Option<f64>>) -> Markup {
    let known = || points.iter().flatten().copied();
    let (Some(least), Some(most)) = (known().reduce(f64::min), known().reduce(f64::max)) else {
        return html! { span.none { "–" } };
    };
    let label = format!("{what} in the last hour: from {least:.0} to {most:.0}");
    html! {
        svg.chart viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(label) preserveAspectRatio="none" {
            title { (label) }
            path.area d=(area(points, most)) {}
            path.line d=(line(points, most)) {}
        }
    }
}

/// Where a point is: the newest at the right end, 180 of them from end to end.
fn place(index: usize, count: usize, value: f64, most: f64) -> (f64, f64) {
    let x = WIDTH - (count - 1 - index) as f64;
    let y = HEIGHT - 2.0 - (HEIGHT - 4.0) * if most > 0.0 { value / most } else { 0.0 };
    (x, y)
}

fn line(points: &VecDeque<Option<f64>>, most: f64) -> String {
    let (mut path, mut drawing) = (String::new(), false);
    for (index, value) in points.iter().enumerate() {
        let Some(value) = value else {
            drawing = false;
            continue;
        };
        let (x, y) = place(index, points.len(), *value, most);
        _ = write!(path, "{}{x:.0} {y:.1}", if drawing { "L" } else { "M" });
        drawing = true;
    }
    path
}

fn area(points: &VecDeque<Option<f64>>, most: f64) -> String {
    let mut path = String::new();
    let mut begun: Option<f64> = None;
    let mut last = 0.0;
    for (index, value) in points.iter().enumerate() {
        match (value, begun) {
            (Some(value), _) => {
                let (x, y) = place(index, points.len(), *value, most);
                if begun.is_none() {
                    _ = write!(path, "M{x:.0} {HEIGHT}");
                    begun = Some(x);
                }
                _ = write!(path, "L{x:.0} {y:.1}");
                last = x;
            }
            (None, Some(_)) => {
                _ = write!(path, "L{last:.0} {HEIGHT}Z");
                begun = None;
            }
            (None, None) => {}
        }
    }
    if begun.is_some() {
        _ = write!(path, "L{last:.0} {HEIGHT}Z");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_broken_where_nothing_was_known() {
        let points: VecDeque<_> = [Some(0.0), Some(10.0), None, Some(5.0)].into();
        assert_eq!(line(&points, 10.0), "M177 26.0L178 2.0M180 14.0");
        assert_eq!(area(&points, 10.0), "M177 28L177 26.0L178 2.0L178 28ZM180 28L180 14.0L180 28Z");
        assert!(chart("x", &VecDeque::from([None])).into_string().contains('–'));
    }
}
