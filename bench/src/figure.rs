//! A measured figure beside its target, and the table of all. Pure.

use pollux::drill::env::Quantiles;
use serde::Serialize;
use std::fmt::Write as _;

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This or less.
    AtMost(f64),
    /// Less than this.
    Below(f64),
    /// This or more.
    AtLeast(f64),
    /// Shown, not judged.
    None,
}

impl Target {
    /// Whether `value` is as it should be; None where nothing is asked.
    #[must_use]
    pub fn met(self, value: f64) -> Option<bool> {
        match self {
            Self::AtMost(limit) => Some(value <= limit),
            Self::Below(limit) => Some(value < limit),
            Self::AtLeast(limit) => Some(value >= limit),
            Self::None => None,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("<= {limit}"),
            Self::Below(limit) => format!("< {limit}"),
            Self::AtLeast(limit) => format!(">= {limit}"),
            Self::None => String::new(),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What is measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// What it should be.
    pub target: Target,
    /// What it is; None if it could not be measured.
    pub measured: Option<f64>,
    /// What the throw-away prototype reached (one machine, no link between hosts).
    pub prototype: &'static str,
    /// `target` and `measured` compared.
    pub met: Option<bool>,
}

impl Figure {
    /// A figure that is judged.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        unit: &'static str,
        target: Target,
        measured: Option<f64>,
        prototype: &'static str,
    ) -> Self {
        let met = match measured {
            Some(value) => target.met(value),
            // What could not be measured is not met.
            None => (target != Target::None).then_some(false),
        };
        Self {
            name: name.into(),
            unit,
            target,
            measured,
            prototype,
            met,
        }
    }

    /// One that only explains another.
    #[must_use]
    pub fn part(name: impl Into<String>, unit: &'static str, measured: f64) -> Self {
        Self::new(name, unit, Target::None, Some(measured), "")
    }

    fn verdict(&self) -> &'static str {
        match (self.met, self.measured) {
            (Some(true), _) => "met",
            (_, None) => "NOT MEASURED",
            (Some(false), _) => "MISSED",
            (None, _) => "",
        }
    }
}

/// Milliseconds of a number of microseconds.
#[must_use]
pub fn ms(us: u64) -> f64 {
    // Exact below 2^53 µs, 285 years.
    us as f64 / 1000.0
}

/// `name, p50 | p90 | p99` in ms, with targets for the first and the last.
#[must_use]
pub fn spread(
    name: &str,
    values: &Quantiles,
    targets: (Target, Target),
    prototype: [&'static str; 3],
) -> Vec<Figure> {
    let line = |what: &str, us, target, prototype| {
        let measured = (values.count > 0).then(|| ms(us));
        Figure::new(format!("{name}, {what}"), "ms", target, measured, prototype)
    };
    vec![
        line("p50", values.p50_us, targets.0, prototype[0]),
        line("p90", values.p90_us, Target::None, prototype[1]),
        line("p99", values.p99_us, targets.1, prototype[2]),
    ]
}

/// All figures as text.
#[must_use]
pub fn table(figures: &[Figure]) -> String {
    let widest = figures
        .iter()
        .map(|f| f.name.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = format!(
        "{:widest$}  {:>12} {:>10} {:<5} {:>12}  verdict\n",
        "figure", "target", "measured", "", "prototype"
    );
    for f in figures {
        let measured = f.measured.map_or_else(|| "-".to_owned(), number);
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{:widest$}  {:>12} {measured:>10} {:<5} {:>12}  {}",
            f.name,
            f.target.text(),
            f.unit,
            f.prototype,
            f.verdict()
        );
    }
    out
}

/// Three digits that matter.
fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_follow_the_targets() {
        let verdict = |target, value| Figure::new("f", "ms", target, value, "").verdict();
        assert_eq!(verdict(Target::AtMost(2.0), Some(2.0)), "met");
        assert_eq!(verdict(Target::Below(2.0), Some(2.0)), "MISSED");
        assert_eq!(verdict(Target::AtLeast(70.0), Some(69.9)), "MISSED");
        assert_eq!(verdict(Target::None, Some(5.0)), "");
        assert_eq!(verdict(Target::AtMost(2.0), None), "NOT MEASURED");
        assert_eq!(
            Figure::new("f", "ms", Target::AtMost(2.0), None, "").met,
            Some(false)
        );
    }

    #[test]
    fn a_spread_without_values_is_not_measured() {
        let figures = spread(
            "x",
            &Quantiles::default(),
            (Target::Below(1.0), Target::None),
            [""; 3],
        );
        assert!(figures.iter().all(|f| f.measured.is_none()));
        let text = table(&figures);
        assert!(
            text.contains("x, p50") && text.contains("NOT MEASURED"),
            "{text}"
        );
    }
}
