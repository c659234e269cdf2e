//! Ranks that are threads of one process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use uel_core::source::ByteSource;
use uel_core::{Error, Kind, Result};

use super::{DEFAULT_TIMEOUT, Incoming, Outgoing, ProcessGroup, RankFault, check_exchange, ranks};

/// Messages from one rank to another that wait to be received; whoever sends more waits.
const MAX_WAITING_MESSAGES: usize = 4;

/// The most ranks of a group of threads: each pair of them has a queue.
const MAX_THREAD_RANKS: usize = 256;

/// A rank of a group whose ranks are threads of this process: for several devices in one process, and for tests.
///
/// A rank that is dropped, as by a panic of its thread, leaves the group; the others are told as soon as they wait for it.
#[derive(Debug)]
pub struct ThreadGroup {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    size: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
    lent: Mutex<Lent>,
}

/// What ranks lend each other, by number.
#[derive(Debug, Default)]
struct Lent {
    next: u64,
    sources: HashMap<u64, Weak<dyn ByteSource>>,
}

#[derive(Debug)]
struct State {
    /// Messages that wait, by sender and receiver.
    waiting: Vec<VecDeque<Vec<u8>>>,
    left: Vec<bool>,
    /// Who is in an exchange: one that is waited for, and itself waits, is not at fault.
    waits: Vec<bool>,
    fault: Option<RankFault>,
}

impl ThreadGroup {
    /// The ranks of a group of `size`, in their order.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] where `size` is 0 or more than 256.
    pub fn new(size: usize) -> Result<Vec<Self>> {
        Self::with_timeout(size, DEFAULT_TIMEOUT)
    }

    /// The ranks of a group of `size`, with another [`timeout`](ProcessGroup::timeout) than five minutes.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_timeout(size: usize, timeout: Duration) -> Result<Vec<Self>> {
        if size == 0 || size > MAX_THREAD_RANKS {
            return Err(Error::new(Kind::Argument, "a group cannot have so many ranks")
                .with_expected(format!("1 to {MAX_THREAD_RANKS}"))
                .with_got(size));
        }
        let waiting = vec![VecDeque::new(); size * size];
        let state = State { waiting, left: vec![false; size], waits: vec![false; size], fault: None };
        let shared = Arc::new(Shared {
            size,
            timeout,
            state: Mutex::new(state),
            changed: Condvar::new(),
            lent: Mutex::default(),
        });
        Ok((0..size).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect())
    }

    /// Runs `work` on a thread for each of `size` ranks, and returns what each of them returned, in their order.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use uel_candle::{ProcessGroup, ThreadGroup};
    /// let sums = ThreadGroup::run(3, Duration::from_secs(60), |group| {
    ///     let mut all = [0; 3];
    ///     group.all_gather(&[group.rank() as u8], &mut all)?;
    ///     Ok(all.iter().sum::<u8>())
    /// })?;
    /// for sum in sums {
    ///     assert_eq!(sum?, 3);
    /// }
    /// # Ok::<(), uel_candle::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new). Of a rank: what `work` returned, or [`Kind::WorkerPanic`] where it panicked or there was no
    /// thread for it.
    pub fn run<T: Send>(
        size: usize,
        timeout: Duration,
        work: impl Fn(ThreadGroup) -> Result<T> + Sync,
    ) -> Result<Vec<Result<T>>> {
        let work = &work;
        let ranks = Self::with_timeout(size, timeout)?;
        Ok(std::thread::scope(|scope| {
            let spawn = |group| std::thread::Builder::new().spawn_scoped(scope, move || work(group));
            let threads: Vec<_> = ranks.into_iter().map(spawn).collect();
            let outcome = |thread: std::io::Result<std::thread::ScopedJoinHandle<'_, Result<T>>>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|panic| {
                    let text = crate::engine::panic_text(&*panic);
                    Err(Error::new(Kind::WorkerPanic, format!("the thread of a rank panicked: {text}")))
                }),
                Err(error) => {
                    Err(Error::new(Kind::WorkerPanic, "no thread can be started for a rank").with_source(error))
                }
            };
            threads.into_iter().map(outcome).collect()
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done under this lock.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, from: usize, to: usize) -> usize {
        from * self.shared.size + to
    }

    fn set_waits(&self, state: &mut State, waits: bool) {
        if let Some(own) = state.waits.get_mut(self.rank) {
            *own = waits;
        }
    }

    /// Moves messages as they come and as there is room for them, until all are done.
    fn wait<'g>(
        &'g self,
        mut state: MutexGuard<'g, State>,
        mut to_send: Vec<(usize, Vec<u8>)>,
        mut to_receive: Vec<&mut Incoming<'_>>,
        patience: Duration,
    ) -> (MutexGuard<'g, State>, Result<()>) {
        let began = Instant::now();
        loop {
            if let Some(fault) = &state.fault {
                let error = fault.to_error();
                return (state, Err(error));
            }
            let mut moved = false;
            to_send.retain_mut(|(to, bytes)| {
                let Some(waiting) = state.waiting.get_mut(self.slot(self.rank, *to)) else { return true };
                let room = waiting.len() < MAX_WAITING_MESSAGES;
                if room {
                    waiting.push_back(std::mem::take(bytes));
                    moved = true;
                }
                !room
            });
            let mut wrong = None;
            to_receive.retain_mut(|message| {
                let Some(waiting) = state.waiting.get_mut(self.slot(message.from, self.rank)) else { return true };
                let Some(bytes) = waiting.pop_front() else { return true };
                moved = true;
                match bytes.len() == message.into.len() {
                    true => message.into.copy_from_slice(&bytes),
                    false => wrong = Some((message.from, bytes.len(), message.into.len())),
                }
                false
            });
            if moved {
                self.shared.changed.notify_all();
            }
            if let Some((from, got, expected)) = wrong {
                let message = format!("it sent {got} bytes to rank {}, which waited for {expected}", self.rank);
                let error = self.poison(&mut state, RankFault::new(from, Kind::Group, message));
                return (state, Err(error));
            }
            if to_send.is_empty() && to_receive.is_empty() {
                return (state, Ok(()));
            }
            let mut missed: Vec<usize> = to_receive.iter().map(|message| message.from).collect();
            missed.extend(to_send.iter().map(|(to, _)| *to));
            missed.sort_unstable();
            missed.dedup();
            if let Some(&rank) = missed.iter().find(|&&rank| state.left.get(rank) == Some(&true)) {
                let fault = RankFault::new(rank, Kind::Group, "it left the group");
                let error = self.poison(&mut state, fault);
                return (state, Err(error));
            }
            let Some(rest) = patience.checked_sub(began.elapsed()) else {
                let waits = |rank: &&usize| state.waits.get(**rank) == Some(&true);
                let culprit = missed.iter().find(|rank| !waits(rank)).or(missed.first()).copied().unwrap_or_default();
                let named = ranks(&missed);
                let message = format!("it did not come: rank {} waited {patience:?} for {named}", self.rank);
                let error = self.poison(&mut state, RankFault::new(culprit, Kind::Timeout, message));
                return (state, Err(error));
            };
            state = self.shared.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Poisons the group, and returns the error of it.
    fn poison(&self, state: &mut State, fault: RankFault) -> Error {
        let error = state.fault.get_or_insert(fault).to_error();
        self.shared.changed.notify_all();
        error
    }
}

impl ProcessGroup for ThreadGroup {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn timeout(&self) -> Duration {
        self.shared.timeout
    }

    fn exchange(&self, outgoing: &[Outgoing<'_>], incoming: &mut [Incoming<'_>], patience: Duration) -> Result<()> {
        check_exchange(self.rank, self.shared.size, outgoing, incoming)?;
        let to_send = outgoing.iter().map(|message| (message.to, message.bytes.to_vec())).collect();
        let mut state = self.lock();
        self.set_waits(&mut state, true);
        let (mut state, outcome) = self.wait(state, to_send, incoming.iter_mut().collect(), patience);
        self.set_waits(&mut state, false);
        outcome
    }

    fn lend(&self, source: &Arc<dyn ByteSource>, _: &[u8]) -> Option<Vec<u8>> {
        let mut lent = self.shared.lent.lock().unwrap_or_else(PoisonError::into_inner);
        lent.sources.retain(|_, source| source.strong_count() > 0);
        let number = lent.next;
        lent.next = number.checked_add(1)?;
        lent.sources.insert(number, Arc::downgrade(source));
        Some(number.to_le_bytes().to_vec())
    }

    fn borrow(&self, _: usize, ticket: &[u8]) -> Option<Arc<dyn ByteSource>> {
        let number = u64::from_le_bytes(ticket.try_into().ok()?);
        self.shared.lent.lock().unwrap_or_else(PoisonError::into_inner).sources.get(&number)?.upgrade()
    }

    fn abort(&self, cause: &Error) {
        let fault = RankFault::of(self.rank, cause);
        self.poison(&mut self.lock(), fault);
    }

    fn fault(&self) -> Option<RankFault> {
        self.lock().fault.clone()
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        if let Some(left) = self.lock().left.get_mut(self.rank) {
            *left = true;
        }
        self.shared.changed.notify_all();
    }
}
