//! Datasets made of several.

use uel_core::Kind;

use crate::dataset::{Dataset, SampleCx};
use crate::{Error, Fingerprint, Layout, Result, Rows, Value};

/// The samples of two datasets as pairs: [`DatasetExt::zip`](super::DatasetExt::zip).
#[derive(Debug)]
pub struct Zip<A, B> {
    first: A,
    second: B,
}

impl<A, B> Zip<A, B> {
    pub(super) fn new(first: A, second: B) -> Self {
        Self { first, second }
    }
}

impl<A: Dataset, B: Dataset> Dataset for Zip<A, B> {
    fn len(&self) -> u64 {
        self.first.len().min(self.second.len())
    }
    fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
        let first = cx.in_scope(0, |cx| self.first.get(index, cx))?;
        let second = cx.in_scope(1, |cx| self.second.get(index, cx))?;
        Ok(Value::tuple([first, second]))
    }
    fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        cx.in_scope(0, |cx| self.first.get_many(indices, cx, &mut first))?;
        cx.in_scope(1, |cx| self.second.get_many(indices, cx, &mut second))?;
        out.extend(first.into_iter().zip(second).map(|(first, second)| Value::tuple([first, second])));
        Ok(())
    }
    fn describe(&self, index: u64) -> String {
        let words = [self.first.describe(index), self.second.describe(index)];
        words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" with ")
    }
    fn fingerprint(&self) -> u64 {
        Fingerprint::new("zip").with(self.first.fingerprint()).with(self.second.fingerprint()).finish()
    }
}

/// Parts that are read by part and index within it.
trait Parts: Send + Sync {
    fn parts(&self) -> &[Box<dyn Dataset>];

    /// The part of an index, and the index within it.
    fn locate(&self, index: u64) -> Option<(usize, u64)>;
}

fn part(parts: &impl Parts, index: u64) -> Result<(&dyn Dataset, u64)> {
    let located = parts.locate(index).and_then(|(part, inner)| Some((&**parts.parts().get(part)?, inner)));
    located.ok_or_else(|| Error::new(Kind::Argument, "there is no such sample").with_index(index))
}

/// Calls `read` for each run of indices in one part, with the indices within it.
fn by_runs(
    parts: &impl Parts,
    indices: &[u64],
    cx: &mut SampleCx,
    mut read: impl FnMut(&dyn Dataset, &[u64], &mut SampleCx) -> Result<()>,
) -> Result<()> {
    let mut run = Vec::new();
    let mut rest = indices.iter().enumerate().peekable();
    while let Some((first, &index)) = rest.next() {
        cx.check_cancelled()?;
        let (dataset, inner) = part(parts, index)?;
        run.clear();
        run.push(inner);
        let here = parts.locate(index).map(|(part, _)| part);
        while let Some(&(_, &next)) = rest.peek()
            && let Some((part, inner)) = parts.locate(next)
            && Some(part) == here
        {
            run.push(inner);
            rest.next();
        }
        cx.from_row(first, |cx| read(dataset, &run, cx))?;
    }
    Ok(())
}

/// The layout that all parts have, if they have one.
fn common_layout(parts: &[Box<dyn Dataset>]) -> Option<Layout> {
    let first = parts.first()?.layout()?;
    parts.iter().all(|part| part.layout() == Some(first)).then(|| first.clone())
}

macro_rules! of_parts {
    ($type:ident) => {
        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type)).field("len", &self.len()).finish_non_exhaustive()
            }
        }

        impl Dataset for $type {
            fn len(&self) -> u64 {
                self.len
            }
            fn get(&self, index: u64, cx: &mut SampleCx) -> Result<Value> {
                let (dataset, inner) = part(self, index)?;
                dataset.get(inner, cx)
            }
            fn get_many(&self, indices: &[u64], cx: &mut SampleCx, out: &mut Vec<Value>) -> Result<()> {
                by_runs(self, indices, cx, |dataset, run, cx| dataset.get_many(run, cx, out))
            }
            fn layout(&self) -> Option<&Layout> {
                self.layout.as_ref()
            }
            fn write_rows(&self, indices: &[u64], rows: &mut Rows, cx: &mut SampleCx) -> Result<()> {
                by_runs(self, indices, cx, |dataset, run, cx| dataset.write_rows(run, rows, cx))
            }
            fn describe(&self, index: u64) -> String {
                part(self, index).map_or_else(|_| String::new(), |(dataset, inner)| dataset.describe(inner))
            }
            fn fingerprint(&self) -> u64 {
                let print = self.own_fingerprint();
                self.parts.iter().fold(print, |print, part| print.with(part.fingerprint())).finish()
            }
        }
    };
}

/// Datasets one behind the other.
pub struct Concat {
    parts: Vec<Box<dyn Dataset>>,
    /// Where each part ends.
    ends: Vec<u64>,
    len: u64,
    layout: Option<Layout>,
}

impl Concat {
    /// Puts `parts` one behind the other.
    ///
    /// # Errors
    ///
    /// [`Kind::Overflow`] where they have more samples than can be counted.
    pub fn new(parts: impl IntoIterator<Item = Box<dyn Dataset>>) -> Result<Self> {
        let parts: Vec<_> = parts.into_iter().collect();
        let mut len = 0u64;
        let mut ends = Vec::with_capacity(parts.len());
        for part in &parts {
            len = len
                .checked_add(part.len())
                .ok_or_else(|| Error::new(Kind::Overflow, "the samples of the datasets cannot be counted"))?;
            ends.push(len);
        }
        let layout = common_layout(&parts);
        Ok(Self { parts, ends, len, layout })
    }

    fn own_fingerprint(&self) -> Fingerprint {
        Fingerprint::new("concat")
    }
}

impl Parts for Concat {
    fn parts(&self) -> &[Box<dyn Dataset>] {
        &self.parts
    }
    fn locate(&self, index: u64) -> Option<(usize, u64)> {
        let part = self.ends.partition_point(|&end| end <= index);
        let begin = part.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        Some((part, index.checked_sub(begin)?))
    }
}

of_parts!(Concat);

/// Datasets by turns, in proportion to whole weights, until the first of them would have no more.
///
/// With weights 2 and 1 every three samples are two of the first and one of the second, spread evenly.
pub struct Interleave {
    parts: Vec<Box<dyn Dataset>>,
    weights: Vec<u32>,
    /// The part at each place of a turn, and how many of that part come before it in the turn.
    turn: Vec<(usize, u64)>,
    len: u64,
    layout: Option<Layout>,
}

/// The most places of a turn.
const MAX_TURN: u64 = 1 << 16;

impl Interleave {
    /// Takes the parts by turns, each as often as its weight says.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there are no parts, a weight is 0, or the weights' sum is over 65,536.
    pub fn new(parts: impl IntoIterator<Item = (Box<dyn Dataset>, u32)>) -> Result<Self> {
        let (parts, weights): (Vec<_>, Vec<u32>) = parts.into_iter().unzip();
        let sum: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
        if weights.contains(&0) || sum == 0 || sum > MAX_TURN {
            return Err(Error::new(Kind::Argument, "datasets cannot be interleaved by these weights")
                .with_expected(format!("at least 1 each, and together at most {MAX_TURN}"))
                .with_got(format!("{weights:?}")));
        }
        // Each place goes to the part that is furthest behind its share.
        let mut turn = Vec::new();
        let mut given = vec![0u64; parts.len()];
        for place in 1..=sum {
            let behind = |(part, given): (usize, &u64)| {
                let share = i128::from(weights.get(part).copied().unwrap_or(0)) * i128::from(place);
                (share - i128::from(*given) * i128::from(sum), part)
            };
            let furthest = given.iter().enumerate().map(behind).max_by_key(|&(by, part)| (by, std::cmp::Reverse(part)));
            let Some((_, part)) = furthest else { break };
            if let Some(given) = given.get_mut(part) {
                turn.push((part, *given));
                *given += 1;
            }
        }
        let mut whole = Self { layout: common_layout(&parts), parts, weights, turn, len: 0 };
        whole.len = whole.count();
        Ok(whole)
    }

    /// How many samples come before a part has none.
    fn count(&self) -> u64 {
        let first_missing = |(place, &(part, before)): (usize, &(usize, u64))| {
            let len = self.parts.get(part)?.len();
            let weight = u64::from(*self.weights.get(part)?);
            // The first turn in which this place asks for a sample that is not there.
            let turn = len.saturating_sub(before).div_ceil(weight);
            Some(turn.saturating_mul(self.turn.len() as u64).saturating_add(place as u64))
        };
        self.turn.iter().enumerate().filter_map(first_missing).min().unwrap_or(0)
    }

    fn own_fingerprint(&self) -> Fingerprint {
        let print = Fingerprint::new("interleave");
        self.weights.iter().fold(print, |print, &weight| print.with(weight.into()))
    }
}

impl Parts for Interleave {
    fn parts(&self) -> &[Box<dyn Dataset>] {
        &self.parts
    }
    fn locate(&self, index: u64) -> Option<(usize, u64)> {
        let places = self.turn.len() as u64;
        let turn = index.checked_div(places)?;
        let &(part, before) = self.turn.get(usize::try_from(index.checked_rem(places)?).ok()?)?;
        let weight = u64::from(*self.weights.get(part)?);
        Some((part, turn.checked_mul(weight)?.checked_add(before)?))
    }
}

of_parts!(Interleave);
