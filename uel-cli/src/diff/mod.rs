//! `uel diff`: how two checkpoints differ.

mod compare;
mod values;

use crate::args::Opening;
use crate::table::{Align, Table, count, escape, size};
use crate::{Stop, to_stdout, write_json};
use compare::{Difference, Pair, Reason, Tolerance, compare};
use serde::Serialize;
use std::io::{self, Write};
use std::path::PathBuf;
use uel_candle::Checkpoint;
use uel_core::{Result, TensorInfo};

/// Compare two checkpoints tensor by tensor; exit 1 where they differ
///
/// Tensors are equal when their dtypes, shapes and bytes are. With a tolerance, values are compared instead: two numbers
/// are equal when they differ by no more than either tolerance allows. Tied tensors are compared under each of their names
/// that is a tensor of its own on the other side. Metadata and the distribution over files are not compared.
///
///   shape    The shapes differ; the values are not compared.
///   dtype    The dtypes differ. Of two floats the values are compared all the same.
///   nan      NaN stands against a number, or against NaN of other bits, which no tolerance allows.
///            The differences are those of the other values.
///   values   The values differ, or their bits alone, as 0 and -0 do.
///
/// The largest absolute difference is |a - b|, the largest relative one |a - b| / max(|a|, |b|). Complex numbers are
/// compared by their parts, packed dtypes (F4, F6) by their bytes. In JSON, a difference that is infinite or was not
/// computed is null.
#[derive(clap::Args, Debug)]
#[command(
    verbatim_doc_comment,
    after_help = "Example:\n  uel diff a.safetensors b.safetensors\n  \
                  uel diff sharded/ model.safetensors --tolerance-rel 1e-3 --tolerance-abs 1e-6 --json"
)]
pub(crate) struct Args {
    /// A .safetensors, PyTorch or GGUF file, a folder of shards, or the index.json of a sharded checkpoint
    a: PathBuf,
    /// Another one
    b: PathBuf,
    #[command(flatten)]
    opening: Opening,
    /// Allow absolute differences up to X
    #[arg(long, value_name = "X", value_parser = parse_tolerance)]
    tolerance_abs: Option<f64>,
    /// Allow relative differences up to X
    #[arg(long, value_name = "X", value_parser = parse_tolerance)]
    tolerance_rel: Option<f64>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn parse_tolerance(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| *number >= 0.0).ok_or_else(|| "expected a number from 0 up".to_owned())
}

#[derive(Serialize)]
struct Report<'a> {
    equal: bool,
    only_left: Vec<&'a str>,
    only_right: Vec<&'a str>,
    different: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    name: &'a str,
    reason: Reason,
    max_abs: Option<f64>,
    max_rel: Option<f64>,
}

impl<'a> Entry<'a> {
    fn new(name: &'a str, found: &Difference) -> Self {
        // JSON has no infinity.
        let finite = |number: Option<f64>| number.filter(|number| number.is_finite());
        Self { name, reason: found.reason, max_abs: finite(found.max_abs), max_rel: finite(found.max_rel) }
    }
}

pub(crate) fn run(args: &Args) -> Result<(), Stop> {
    let (left, right) = (args.opening.checkpoint(&args.a)?, args.opening.checkpoint(&args.b)?);
    let lacks = |checkpoint: &Checkpoint, name: &str| !checkpoint.contains(name);
    let (tied_left, tied_right) = (tied(&left), tied(&right));
    let only_left: Vec<&str> = names(&left, &tied_left).filter(|name| lacks(&right, name)).collect();
    let only_right: Vec<&str> = names(&right, &tied_right).filter(|name| lacks(&left, name)).collect();
    let pairs = pairs(&left, &right, &tied_left);
    let tolerance = Tolerance::new(args.tolerance_abs, args.tolerance_rel);
    let different = compare((&left, &right), &pairs, tolerance)?;

    let equal = only_left.is_empty() && only_right.is_empty() && different.is_empty();
    to_stdout(|out| match args.json {
        true => {
            let different = different.iter().map(|(pair, found)| Entry::new(pair.name, found)).collect();
            write_json(out, &Report { equal, only_left: only_left.clone(), only_right: only_right.clone(), different })
        }
        false => write_text(out, &only_left, &only_right, &different, &pairs),
    })?;
    if equal {
        return Ok(());
    }
    let missing = only_left.len() + only_right.len();
    Err(Stop::Verdict(format!(
        "{} and {} differ: {} in one alone, {} different",
        args.a.display(),
        args.b.display(),
        count(missing, "tensor"),
        different.len()
    )))
}

/// The names that are tied to a tensor of another name.
fn tied(checkpoint: &Checkpoint) -> Vec<String> {
    let is_tied = |name: &String| checkpoint.index().get(name).is_none() && checkpoint.contains(name);
    checkpoint.metadata().into_keys().filter(is_tied).collect()
}

fn names<'a>(checkpoint: &'a Checkpoint, tied: &'a [String]) -> impl Iterator<Item = &'a str> {
    checkpoint.infos().map(|info| info.name()).chain(tied.iter().map(String::as_str))
}

/// The tensors that both have. A name that is a tensor's on one side may be one of a tied tensor's on the other.
fn pairs<'a>(left: &'a Checkpoint, right: &'a Checkpoint, tied_left: &'a [String]) -> Vec<Pair<'a>> {
    // Asked first, since who asks for what is not there is told what comes close, which takes long.
    let find = |checkpoint: &'a Checkpoint, name: &str| match checkpoint.contains(name) {
        true => checkpoint.info(name).ok(),
        false => None,
    };
    let of_left = left.infos().filter_map(|info| {
        let name = info.name();
        Some(Pair { name, left: info, right: find(right, name)? })
    });
    let tied_in_left = right.infos().filter(|info| left.index().get(info.name()).is_none()).filter_map(|info| {
        let name = info.name();
        Some(Pair { name, left: find(left, name)?, right: info })
    });
    let tied_in_both = tied_left.iter().filter(|name| right.index().get(name).is_none()).filter_map(|name| {
        let (left, right) = (find(left, name)?, find(right, name)?);
        // Tied to the same name, they are compared under that.
        (left.name() != right.name()).then_some(Pair { name, left, right })
    });
    of_left.chain(tied_in_left).chain(tied_in_both).collect()
}

fn write_text(
    out: &mut dyn Write,
    only_left: &[&str],
    only_right: &[&str],
    different: &[(&Pair<'_>, Difference)],
    pairs: &[Pair<'_>],
) -> io::Result<()> {
    for (side, names) in [("first", only_left), ("second", only_right)] {
        for name in names {
            writeln!(out, "only in the {side}: {}", escape(name))?;
        }
    }
    if !different.is_empty() {
        let mut table = Table::new([
            ("tensor", Align::Left),
            ("differs in", Align::Left),
            ("first", Align::Left),
            ("second", Align::Left),
            ("max abs", Align::Right),
            ("max rel", Align::Right),
        ]);
        let kind = |info: &TensorInfo<'_>| format!("{} {:?}", info.dtype(), info.shape());
        let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.3e}"));
        for (pair, found) in different {
            table.row([
                pair.name.to_owned(),
                found.reason.as_str().to_owned(),
                kind(&pair.left),
                kind(&pair.right),
                number(found.max_abs),
                number(found.max_rel),
            ]);
        }
        table.write(out)?;
    }
    let bytes = pairs.iter().map(|pair| pair.left.byte_len()).fold(0, u64::saturating_add);
    let equal = count(pairs.len() - different.len(), "tensor");
    writeln!(out, "{equal} equal, of {} compared ({})", pairs.len(), size(bytes))
}
