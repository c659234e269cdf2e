//! What a benchmark claims of its times.

use crate::measure::Times;

pub(crate) fn rounds(usual: usize) -> usize {
    std::env::var("UEL_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

pub(crate) fn of<'a>(times: &'a [Times], name: &str) -> &'a Times {
    times.iter().find(|times| times.name == name).expect(name)
}

pub(crate) fn claim(text: &str, got: f64, wanted: f64, at_most: bool) {
    let holds = if at_most { got <= wanted } else { got >= wanted };
    let (relation, verdict) = (if at_most { "at most" } else { "at least" }, if holds { "holds" } else { "MISSED" });
    println!("- {text}: {got:.2} ({relation} {wanted:.2}: {verdict})");
}
