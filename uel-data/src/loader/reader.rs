//! Samples out of streams, in one order: shards by turns, and shuffled within windows.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::guard::guarded;
use crate::sampler::Order;
use crate::{Cursor, Error, IterableDataset, Kind, Result, Rng, SampleCx, SampleStream, Stage, Value};

/// How streams become one order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// How many shards are read by turns.
    pub(super) interleave: usize,
    /// How many samples are shuffled together; none below 2.
    pub(super) window: usize,
    pub(super) seed: u64,
    pub(super) epoch: u64,
    /// Which samples of those of all ranks these are: so that each draws random numbers of its own.
    pub(super) rank: u64,
    pub(super) world: u64,
}

/// Where streams stand: enough to read on from there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    /// The open shards by their place in the order of shards, in the order of turns.
    open: Vec<(u64, Cursor)>,
    turn: usize,
    /// The next shard to be opened.
    next: u64,
    /// How many samples came before.
    samples: u64,
    /// How many samples of the window that begins here were given.
    used: u64,
}

/// A sample of a stream, with its number in the epoch and where it comes from.
pub(super) struct Raw {
    pub(super) number: u64,
    /// What its random numbers depend on: no sample of another rank has the same.
    pub(super) key: u64,
    pub(super) shard: u64,
    pub(super) cursor: Cursor,
    pub(super) sample: Result<Value>,
}

/// The dataset's own words for a sample; none where it has none to say.
pub(super) fn described(dataset: &dyn IterableDataset, shard: u64, cursor: Cursor) -> String {
    guarded(&mut (), |_| Ok(dataset.describe(shard, cursor))).unwrap_or_default()
}

struct Open {
    place: u64,
    shard: u64,
    stream: Box<dyn SampleStream>,
}

pub(super) struct Reader {
    dataset: Arc<dyn IterableDataset>,
    /// The order of shards: of `shards` places, the shard at each.
    order: Arc<dyn Order>,
    shards: u64,
    plan: Plan,
    open: Vec<Open>,
    turn: usize,
    next: u64,
    samples: u64,
    /// The samples of the window that were not given, last one first, and where the window began.
    window: Vec<Raw>,
    began: Position,
    /// How many samples of the window an earlier run was given: they are read once more and left out.
    behind: u64,
    over: bool,
}

impl Reader {
    pub(super) fn new(dataset: Arc<dyn IterableDataset>, order: Arc<dyn Order>, shards: u64, plan: Plan) -> Self {
        let (open, window) = (Vec::new(), Vec::new());
        let began = Position::default();
        let (turn, next, samples, behind) = (0, 0, 0, 0);
        Self { dataset, order, shards, plan, open, turn, next, samples, window, began, behind, over: false }
    }

    /// Goes to where `position` says. A window that it stands in is read later, by whoever reads first.
    pub(super) fn seek(&mut self, position: &Position, cx: &mut SampleCx) -> Result<()> {
        let most = self.plan.window.saturating_sub(1) as u64;
        if position.used > most {
            return Err(Error::new(Kind::State, "the state stands behind the window that it stands in")
                .with_expected(format!("at most {most} samples"))
                .with_got(position.used));
        }
        if let Some((place, _)) = position.open.iter().find(|(place, _)| *place >= self.shards) {
            return Err(Error::new(Kind::State, "the state stands in a shard that there is not")
                .with_expected(format!("less than {}", self.shards))
                .with_got(place));
        }
        for &(place, cursor) in &position.open {
            let shard = self.shard(place);
            let stream = self.open_shard(shard, Some(cursor), cx)?;
            self.open.push(Open { place, shard, stream });
        }
        self.turn = position.turn;
        self.next = position.next;
        self.samples = position.samples;
        self.behind = position.used;
        Ok(())
    }

    pub(super) fn position(&self) -> Position {
        if self.window.is_empty() { self.place() } else { self.began.clone() }
    }

    fn place(&self) -> Position {
        Position {
            open: self.open.iter().map(|open| (open.place, open.stream.cursor())).collect(),
            turn: self.turn,
            next: self.next,
            samples: self.samples,
            used: 0,
        }
    }

    /// The number of the sample that is read next.
    pub(super) fn samples(&self) -> u64 {
        self.samples
    }

    /// The shard at a place of the order.
    fn shard(&self, place: u64) -> u64 {
        let mut shard = Vec::with_capacity(1);
        self.order.append(place..place.saturating_add(1), &mut shard);
        shard.first().copied().unwrap_or(place)
    }

    fn open_shard(&self, shard: u64, cursor: Option<Cursor>, cx: &mut SampleCx) -> Result<Box<dyn SampleStream>> {
        guarded(cx, |_| self.dataset.open(shard, cursor))
    }

    /// The next sample in the order; `None` behind the last one, or where nobody waits for it.
    pub(super) fn read(&mut self, cx: &mut SampleCx) -> Option<Raw> {
        while self.behind > 0 {
            self.behind -= 1;
            self.read_shuffled(cx)?;
        }
        self.read_shuffled(cx)
    }

    fn read_shuffled(&mut self, cx: &mut SampleCx) -> Option<Raw> {
        if self.plan.window < 2 {
            return self.read_stream(cx);
        }
        if self.window.is_empty() {
            self.began = self.place();
            while self.window.len() < self.plan.window
                && !cx.is_cancelled()
                && let Some(raw) = self.read_stream(cx)
            {
                self.window.push(raw);
            }
            let Plan { seed, epoch, .. } = self.plan;
            Rng::new(&[seed, epoch, self.began.samples]).shuffle(&mut self.window);
        }
        let raw = self.window.pop()?;
        self.began.used = self.began.used.saturating_add(1);
        Some(raw)
    }

    /// The next sample of the shards, by turns.
    fn read_stream(&mut self, cx: &mut SampleCx) -> Option<Raw> {
        cx.begin(&[]);
        while !self.over && !cx.is_cancelled() {
            while self.open.len() < self.plan.interleave.max(1) && self.next < self.shards {
                let place = self.next;
                self.next += 1;
                let shard = self.shard(place);
                match self.open_shard(shard, None, cx) {
                    Ok(stream) => self.open.push(Open { place, shard, stream }),
                    // The shard is lost, and said to be; the next call goes on with others.
                    Err(error) => return Some(self.raw(shard, Cursor::default(), Err(error))),
                }
            }
            if self.turn >= self.open.len() {
                self.turn = 0;
            }
            let Some(Open { shard, stream, .. }) = self.open.get_mut(self.turn) else {
                self.over = true;
                break;
            };
            let (shard, mut cursor, mut returned) = (*shard, Cursor::default(), false);
            let read = guarded(cx, |cx| {
                cursor = stream.cursor();
                let read = stream.next(cx);
                returned = true;
                read
            });
            match read {
                Ok(Some(sample)) => {
                    self.turn += 1;
                    return Some(self.raw(shard, cursor, Ok(sample)));
                }
                Ok(None) => drop(self.open.remove(self.turn)),
                Err(error) => {
                    // What panicked is in no state to go on.
                    if returned {
                        self.turn += 1
                    } else {
                        drop(self.open.remove(self.turn))
                    }
                    return Some(self.raw(shard, cursor, Err(error)));
                }
            }
        }
        None
    }

    fn raw(&mut self, shard: u64, cursor: Cursor, sample: Result<Value>) -> Raw {
        let number = self.samples;
        self.samples = self.samples.saturating_add(1);
        let key = number.wrapping_mul(self.plan.world).wrapping_add(self.plan.rank);
        let sample = sample.map_err(|error: Error| {
            error.with_index(number).with_description(described(&*self.dataset, shard, cursor)).with_stage(Stage::Read)
        });
        Raw { number, key, shard, cursor, sample }
    }
}
