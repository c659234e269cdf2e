//! Requests made from threads that wait for them.

use super::failure::Failure;
use super::object::{Answer, Object, Pin};
use super::runtime;
use super::store::Shared;
use crate::{ByteRange, Error, Kind, Result};
use std::future::Future;
use std::sync::{Arc, mpsc};
use tokio::task::AbortHandle;

/// Ends the requests that nobody waits for any more.
#[derive(Default)]
struct Running(Vec<AbortHandle>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// The answers to requests for `ranges`, in their order. All are made at once, as far as the limits go.
///
/// A request waits for its turn among those of all callers, then has its deadline. Bytes count against the budget until
/// they are handed to the caller here, whose own read bounds what it holds; so none who holds some waits for more.
pub(super) fn bring(
    shared: &Arc<Shared>,
    object: &Arc<Object>,
    pin: Option<&Arc<Pin>>,
    ranges: &[ByteRange],
) -> Result<Vec<Answer>, Failure> {
    let handle = runtime::handle()?;
    let (sender, receiver) = mpsc::channel();
    let mut running = Running::default();
    for (position, &range) in ranges.iter().enumerate() {
        let (shared, object, pin, sender) = (Arc::clone(shared), Arc::clone(object), pin.cloned(), sender.clone());
        let request = async move {
            let answer = one(&shared, &object, pin.as_deref(), range).await;
            // Nobody listens where another request failed.
            let _ = sender.send((position, answer));
        };
        running.0.push(handle.spawn(request).abort_handle());
    }
    drop(sender);
    let mut answers: Vec<Option<Answer>> = Vec::new();
    answers.resize_with(ranges.len(), || None);
    for _ in ranges {
        let (position, answer) = receiver.recv().map_err(|_| lost(object))?;
        let (answer, held) = answer?;
        drop(held);
        if let Some(slot) = answers.get_mut(position) {
            *slot = Some(answer);
        }
    }
    answers.into_iter().map(|answer| answer.ok_or_else(|| lost(object).into())).collect()
}

async fn one(
    shared: &Shared,
    object: &Object,
    pin: Option<&Pin>,
    range: ByteRange,
) -> Result<(Answer, tokio::sync::OwnedSemaphorePermit), Failure> {
    let closed = || Failure::from(Error::new(Kind::Internal, "the limits of requests were closed"));
    let weight = u32::try_from(range.byte_len().min(shared.options.budget())).unwrap_or(u32::MAX);
    let held = Arc::clone(&shared.bytes).acquire_many_owned(weight).await.map_err(|_| closed())?;
    let _turn = shared.requests.acquire().await.map_err(|_| closed())?;
    let answer = within(shared, object, range.start(), object.get(range, pin)).await?;
    Ok((answer, held))
}

/// `request`, or the error that it did not end by its deadline.
pub(super) async fn within<T>(
    shared: &Shared,
    object: &Object,
    offset: u64,
    request: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let deadline = shared.options.deadline();
    let late = || {
        Error::new(Kind::Timeout, "the server did not answer in time, with all retries")
            .with_path(&object.shown)
            .with_offset(offset)
            .with_expected(format!("an answer within {} s", deadline.as_secs_f64()))
    };
    match tokio::time::timeout(deadline, request).await {
        Ok(answer) => answer,
        Err(_) => Err(late().into()),
    }
}

/// Waits for one piece of work on the thread for requests.
pub(super) fn wait<T: Send + 'static>(
    object: &Object,
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    let (sender, receiver) = mpsc::channel();
    let work = async move {
        let _ = sender.send(work.await);
    };
    let running = Running(vec![runtime::handle()?.spawn(work).abort_handle()]);
    let answer = receiver.recv().map_err(|_| lost(object))?;
    drop(running);
    answer
}

/// A request panicked, or its thread did.
#[cold]
fn lost(object: &Object) -> Error {
    Error::new(Kind::WorkerPanic, "a request ended without an answer").with_path(&object.shown)
}
