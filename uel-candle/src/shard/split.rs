//! Which part of a dimension each rank gets.

use std::ops::Range;

use uel_core::slice::Bounds;
use uel_core::{Error, Kind, Result};

/// How a tensor is divided among ranks: along one dimension, in consecutive blocks.
///
/// A dimension of `n` elements gives each of `ranks` ranks `n / ranks` of them, rounded up, as torch's `chunk` does: the last
/// part may be smaller, and those behind it empty.
///
/// ```
/// use uel_candle::Split;
/// let parts = |split: &Split, size| (0..4).map(|rank| split.ranges(size, rank, 4).unwrap()).collect::<Vec<_>>();
/// assert_eq!(parts(&Split::new(0), 10), [vec![0..3], vec![3..6], vec![6..9], vec![9..10]]);
/// assert_eq!(parts(&Split::new(0), 5), [vec![0..2], vec![2..4], vec![4..5], vec![5..5]]);
/// // Heads of four elements are kept whole.
/// assert_eq!(parts(&Split::new(0).with_unit(4), 20), [vec![0..8], vec![8..16], vec![16..20], vec![20..20]]);
/// // Queries, keys and values that were fused into one tensor are divided each by itself.
/// assert_eq!(Split::new(1).with_sections(3).ranges(24, 1, 2)?, [4..8, 12..16, 20..24]);
/// # Ok::<(), uel_candle::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Split {
    dim: usize,
    sections: usize,
    unit: usize,
}

impl Split {
    /// A division of dimension `dim`, counted from 0.
    pub fn new(dim: usize) -> Self {
        Self { dim, sections: 1, unit: 1 }
    }

    /// The dimension consists of `sections` parts of one size, such as fused queries, keys and values. Each is divided by
    /// itself, and a rank's parts follow one another.
    #[must_use]
    pub fn with_sections(mut self, sections: usize) -> Self {
        self.sections = sections;
        self
    }

    /// Only whole groups of `unit` elements are given to a rank, such as the rows of an attention head.
    #[must_use]
    pub fn with_unit(mut self, unit: usize) -> Self {
        self.unit = unit;
        self
    }

    /// The dimension that is divided.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Of a dimension of `size` elements, those of rank `rank` among `ranks`: one range for each section.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where there is no such rank, or the sections or units do not divide the dimension.
    pub fn ranges(&self, size: usize, rank: usize, ranks: usize) -> Result<Vec<Range<usize>>> {
        super::group::check_rank(rank, ranks)?;
        let whole = |message: &str, number: usize, of: usize| match number {
            0 => Err(Error::new(Kind::Argument, format!("{message} cannot be 0"))),
            number if of.is_multiple_of(number) => Ok(of / number),
            number => Err(Error::new(Kind::Argument, format!("{message} do not divide the dimension"))
                .with_expected(format!("a multiple of {number} elements"))
                .with_got(of)),
        };
        // The number of sections comes from a program, but a size of 0 would let any number pass.
        if self.sections > MAX_SECTIONS {
            return Err(Error::new(Kind::Argument, "a split has too many sections")
                .with_expected(format!("at most {MAX_SECTIONS}"))
                .with_got(self.sections));
        }
        let section = whole("the sections of a split", self.sections, size)?;
        let units = whole("the units of a split", self.unit, section)?;
        let block = units.div_ceil(ranks);
        let at = |rank: usize| rank.saturating_mul(block).min(units) * self.unit;
        let (start, end) = (at(rank), at(rank.saturating_add(1)));
        Ok((0..self.sections).map(|n| n * section + start..n * section + end).collect())
    }

    /// The slices of a tensor of `shape` that rank `rank` gets, one for each section; joined along the dimension they are its
    /// part.
    pub(crate) fn slices(&self, name: &str, shape: &[usize], rank: usize, ranks: usize) -> Result<Vec<Vec<Bounds>>> {
        let named = |error: Error| error.with_tensor(name);
        let size = *shape.get(self.dim).ok_or_else(|| {
            named(Error::new(Kind::Argument, "the tensor does not have the dimension that is to be divided"))
                .with_expected(format!("a dimension below {}", shape.len()))
                .with_got(self.dim)
        })?;
        let bounds = |range: Range<usize>| {
            let mut bounds = vec![Bounds::from(..); self.dim];
            bounds.push(range.into());
            bounds
        };
        Ok(self.ranges(size, rank, ranks).map_err(named)?.into_iter().map(bounds).collect())
    }
}

impl From<usize> for Split {
    fn from(dim: usize) -> Self {
        Self::new(dim)
    }
}

/// The most sections of a split.
const MAX_SECTIONS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_divide_is_refused() {
        for split in [Split::new(0).with_sections(0), Split::new(0).with_unit(0), Split::new(0).with_unit(3)] {
            assert_eq!(split.ranges(8, 0, 2).unwrap_err().kind(), Kind::Argument);
        }
        assert_eq!(Split::new(0).with_sections(usize::MAX).ranges(0, 0, 2).unwrap_err().kind(), Kind::Argument);
        assert_eq!(Split::new(0).ranges(8, 2, 2).unwrap_err().kind(), Kind::Argument);
        assert_eq!(Split::new(0).ranges(8, 0, 0).unwrap_err().kind(), Kind::Argument);
        assert_eq!(Split::new(0).ranges(usize::MAX, 0, usize::MAX).unwrap().first(), Some(&(0..1)));
    }

    proptest! {
        #[test]
        fn parts_follow_one_another(units in 0..50usize, unit in 1..5usize, sections in 1..4usize, ranks in 1..9usize) {
            let split = Split::new(0).with_sections(sections).with_unit(unit);
            let section = units * unit;
            let parts: Vec<_> = (0..ranks).map(|rank| split.ranges(section * sections, rank, ranks).unwrap()).collect();
            for n in 0..sections {
                let mut reached = n * section;
                for part in &parts {
                    prop_assert_eq!(part[n].start, reached);
                    prop_assert!(part[n].len() <= units.div_ceil(ranks) * unit && part[n].len() % unit == 0);
                    reached = part[n].end;
                }
                prop_assert_eq!(reached, (n + 1) * section);
            }
        }
    }
}
