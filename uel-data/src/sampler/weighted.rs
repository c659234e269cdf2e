//! Samples by weight.

use std::ops::Range;
use std::sync::Arc;

use uel_core::Kind;

use super::{Order, Sampler};
use crate::{Error, Fingerprint, Result, Rng};

/// Indices that are drawn by weight.
///
/// With replacement every position is a draw of its own, in constant time. Without replacement the order of an epoch is
/// made when it begins.
#[derive(Debug)]
pub struct WeightedSampler {
    weights: Arc<[f64]>,
    table: Arc<Alias>,
    len: u64,
    replacement: bool,
    seed: u64,
}

/// The alias method (Walker 1977, built as Vose 1991 does): a column for each index, of which a part belongs to another.
#[derive(Debug)]
struct Alias {
    columns: Vec<(f64, usize)>,
}

impl Alias {
    fn new(weights: &[f64], sum: f64) -> Self {
        let mean = sum / weights.len() as f64;
        let mut columns: Vec<(f64, usize)> =
            weights.iter().enumerate().map(|(index, weight)| (weight / mean, index)).collect();
        let is_small = |column: &&(f64, usize)| column.0 < 1.0;
        let (mut small, mut large): (Vec<_>, Vec<_>) = columns.iter().partition(is_small);
        while let (Some((share, index)), Some((lent, from))) = (small.pop(), large.pop()) {
            if let Some(column) = columns.get_mut(index) {
                *column = (share, from);
            }
            let rest = (lent + share) - 1.0;
            if rest < 1.0 { small.push((rest, from)) } else { large.push((rest, from)) }
        }
        // What is left over is 1 but for rounding.
        for (_, index) in small.into_iter().chain(large) {
            if let Some(column) = columns.get_mut(index) {
                *column = (1.0, index);
            }
        }
        Self { columns }
    }

    fn draw(&self, rng: &mut Rng) -> u64 {
        let index = rng.below(self.columns.len() as u64) as usize;
        let own = rng.uniform();
        self.columns.get(index).map_or(0, |&(share, other)| if own < share { index } else { other }) as u64
    }
}

impl WeightedSampler {
    /// `len` indices an epoch; an index comes as often as its weight says.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where a weight is negative or not finite, all are 0, or more indices are asked for without
    /// replacement than have a weight.
    pub fn new(weights: impl Into<Arc<[f64]>>, len: u64, replacement: bool, seed: u64) -> Result<Self> {
        let weights = weights.into();
        let wrong = weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0));
        if let Some(index) = wrong {
            return Err(Error::new(Kind::Argument, format!("the weight of index {index} is negative or not finite"))
                .with_got(weights.get(index).copied().unwrap_or(f64::NAN)));
        }
        let sum: f64 = weights.iter().sum();
        let drawable = weights.iter().filter(|weight| **weight > 0.0).count() as u64;
        if !(sum.is_finite() && sum > 0.0) && len > 0 {
            return Err(Error::new(Kind::Argument, "the weights have no positive and finite sum").with_got(sum));
        }
        if !replacement && len > drawable {
            return Err(Error::new(Kind::Argument, "more indices are drawn without replacement than have a weight")
                .with_expected(format!("at most {drawable}"))
                .with_got(len));
        }
        Ok(Self { table: Arc::new(Alias::new(&weights, sum)), weights, len, replacement, seed })
    }
}

struct Draws {
    table: Arc<Alias>,
    seed: u64,
    epoch: u64,
}

impl Order for Draws {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        out.extend(positions.map(|position| self.table.draw(&mut Rng::new(&[self.seed, self.epoch, position]))));
    }
}

struct Table(Vec<u64>);

impl Order for Table {
    fn append(&self, positions: Range<u64>, out: &mut Vec<u64>) {
        let at = |position: u64| usize::try_from(position).unwrap_or(usize::MAX);
        out.extend_from_slice(self.0.get(at(positions.start)..at(positions.end)).unwrap_or_default());
    }
}

impl Sampler for WeightedSampler {
    fn len(&self) -> u64 {
        self.len
    }

    fn index_bound(&self) -> Option<u64> {
        Some(self.weights.len() as u64)
    }

    fn order(&self, epoch: u64) -> Result<Arc<dyn Order>> {
        if self.replacement {
            return Ok(Arc::new(Draws { table: Arc::clone(&self.table), seed: self.seed, epoch }));
        }
        // Exponential clocks of these rates ring in the order of draws without replacement (Efraimidis and Spirakis).
        let mut rings: Vec<(f64, u64)> = Vec::new();
        for (index, &weight) in self.weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            let mut rng = Rng::new(&[self.seed, epoch, index as u64]);
            rings.push((-(1.0 - rng.uniform()).ln() / weight, index as u64));
        }
        rings.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        Ok(Arc::new(Table(rings.into_iter().take(len).map(|(_, index)| index).collect())))
    }

    fn fingerprint(&self) -> u64 {
        let start = Fingerprint::new("weighted").with(self.len).with(u64::from(self.replacement)).with(self.seed);
        self.weights.iter().fold(start, |print, weight| print.with(weight.to_bits())).finish()
    }
}
