//! Where in the training stream the consumer stands.

use serde::{Deserialize, Serialize};
use uel_core::Kind;

use super::reader::Position;
use crate::{Error, Result};

/// The version of the states that this loader writes.
pub(super) const VERSION: u32 = 1;

/// Where the consumer stands: what it took, not what was prefetched. As JSON it has some hundred bytes.
///
/// ```
/// # use uel_data::{DataLoader, Dataset, Fingerprint, LoaderState, Result, SampleCx, Value};
/// # struct Numbers;
/// # impl Dataset for Numbers {
/// #     fn len(&self) -> u64 { 10 }
/// #     fn get(&self, index: u64, _: &mut SampleCx) -> Result<Value> { Ok(Value::Int(index as i64)) }
/// #     fn fingerprint(&self) -> u64 { Fingerprint::new("numbers").finish() }
/// # }
/// let loader = DataLoader::builder(Numbers).batch_size(2).shuffle(7).num_workers(2).build()?;
/// let mut epoch = loader.epoch(0)?;
/// epoch.next();
/// let json = epoch.state().to_json();
/// let rest: Vec<_> = epoch.map(|batch| Ok(batch?.indices)).collect::<Result<_>>()?;
/// // In another process, with another number of workers:
/// let loader = DataLoader::builder(Numbers).batch_size(2).shuffle(7).build()?;
/// let epoch = loader.resume(&LoaderState::from_json(&json)?)?;
/// assert_eq!(epoch.map(|batch| Ok(batch?.indices)).collect::<Result<Vec<_>>>()?, rest);
/// # Ok::<(), uel_data::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LoaderState {
    /// The version of the state.
    pub version: u32,
    /// The fingerprint of the dataset.
    pub dataset: u64,
    /// The fingerprint of all else that determines batches: sampler, batch sampler, collation, seed.
    pub batches: u64,
    /// The epoch.
    pub epoch: u64,
    /// All batches below were taken. In streams, the place behind them is known too.
    pub next: u64,
    /// The other batches that were taken: in completion order, and where the place behind a batch of a stream is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ahead: Vec<u64>,
    /// How many samples were taken.
    pub samples: u64,
    /// How many samples were skipped.
    pub skipped: u64,
    /// Where streams stand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stream: Option<Position>,
}

impl LoaderState {
    /// The state as one line of JSON.
    pub fn to_json(&self) -> String {
        // Numbers and lists of them can always be written.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The state that [`to_json`](Self::to_json) wrote.
    ///
    /// # Errors
    ///
    /// [`Kind::State`] where it is none, or one of another version.
    pub fn from_json(json: &str) -> Result<Self> {
        let state: Self = serde_json::from_str(json).map_err(|error| {
            Error::from(uel_core::Error::new(Kind::State, format!("no state of a loader: {error}")).with_source(error))
        })?;
        state.check_version()?;
        Ok(state)
    }

    fn check_version(&self) -> Result<()> {
        if self.version == VERSION {
            return Ok(());
        }
        let error = Error::new(Kind::State, "the state was saved by another version");
        Err(error.with_expected(VERSION).with_got(self.version))
    }

    /// Whether the state is one of a loader with these fingerprints.
    pub(super) fn check(&self, dataset: u64, batches: u64) -> Result<()> {
        // It may come out of a struct of the program's, which nobody checked.
        self.check_version()?;
        let differs = |what: &str, expected: u64, got: u64| {
            Err(Error::new(Kind::State, format!("the state was saved with {what}"))
                .with_expected(format!("fingerprint {expected:016x}"))
                .with_got(format!("{got:016x}")))
        };
        if self.dataset != dataset {
            return differs("another dataset", dataset, self.dataset);
        }
        if self.batches != batches {
            return differs("other samplers, batches, collation or seed", batches, self.batches);
        }
        Ok(())
    }
}
