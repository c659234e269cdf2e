//! What a benchmark claims of its times.

use std::process::ExitCode;
use std::sync::Mutex;

use crate::measure::Times;

/// What was claimed, and whether it holds.
static CLAIMS: Mutex<Vec<(String, bool)>> = Mutex::new(Vec::new());

pub(crate) fn rounds(usual: usize) -> usize {
    std::env::var("UEL_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(usual)
}

/// The cases that the program is asked for, in the order of `all`; where it is asked for none, the `usual` ones.
pub(crate) fn asked<'a>(all: &[&'a str], usual: &[&'a str]) -> Vec<&'a str> {
    // `cargo bench` adds its own flag.
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    if let Some(unknown) = asked.iter().find(|arg| !all.contains(&arg.as_str())) {
        panic!("there is no case {unknown:?}; there are {all:?}");
    }
    if asked.is_empty() {
        return usual.to_vec();
    }
    all.iter().copied().filter(|case| asked.iter().any(|arg| arg == case)).collect()
}

pub(crate) fn of<'a>(times: &'a [Times], name: &str) -> &'a Times {
    times.iter().find(|times| times.name == name).expect(name)
}

pub(crate) fn claim(text: &str, got: f64, wanted: f64, at_most: bool) {
    let holds = if at_most { got <= wanted } else { got >= wanted };
    let (relation, verdict) = (if at_most { "at most" } else { "at least" }, if holds { "holds" } else { "MISSED" });
    let line = format!("{text}: {got:.2} ({relation} {wanted:.2}: {verdict})");
    println!("- {line}");
    CLAIMS.lock().unwrap().push((line, holds));
}

/// Ends a benchmark: with a failure where a claim does not hold.
pub(crate) fn end() -> ExitCode {
    let claims = CLAIMS.lock().unwrap();
    let missed: Vec<_> = claims.iter().filter(|(_, holds)| !holds).collect();
    if !claims.is_empty() {
        println!("\n{} of {} claims hold", claims.len() - missed.len(), claims.len());
    }
    missed.iter().for_each(|(line, _)| println!("- {line}"));
    ExitCode::from(u8::from(!missed.is_empty()))
}
