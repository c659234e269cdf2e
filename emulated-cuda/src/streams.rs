//! Streams and events.

use std::time::Instant;

use crate::clock::Clock;
use crate::codes::{self, Code};
use crate::driver::Driver;
use crate::queue::{Kind, Queue, Work};
use crate::schedule::{NOT_READY_ANSWERS, New};

/// The handles of the default streams.
const LEGACY: [usize; 2] = [0, 1];
const PER_THREAD: usize = 2;

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) queue: usize,
    pub(crate) context: usize,
    pub(crate) flags: u32,
    pub(crate) priority: i32,
}

/// The flag of a stream that the legacy default stream does not order itself with.
pub(crate) const STREAM_NON_BLOCKING: u32 = 1;
/// The flag of an event without a time.
pub(crate) const EVENT_DISABLE_TIMING: u32 = 2;
/// All flags that events have.
const EVENT_FLAGS: u32 = 7;

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: usize,
    timing: bool,
    recorded: Option<Recorded>,
    not_ready: u32,
}

/// The last record of an event.
#[derive(Debug)]
struct Recorded {
    op: u64,
    clock: Clock,
    at: Option<Instant>,
}

impl Driver {
    /// The queue that a stream handle stands for on the calling thread.
    pub(crate) fn queue_of(&mut self, stream: usize) -> Result<usize, Code> {
        let context = self.context()?;
        if LEGACY.contains(&stream) {
            return self.contexts.get(&context).map(|context| context.legacy).ok_or(codes::INVALID_CONTEXT);
        }
        if stream == PER_THREAD {
            if let Some(&queue) = self.per_thread.get(&(self.thread, context)) {
                return Ok(queue);
            }
            let device = self.device_of(context)?;
            let name = format!("the default stream of thread {} of device {device}", self.thread);
            let queue = self.add_queue(Queue::new(name, context, Kind::Blocking));
            self.per_thread.insert((self.thread, context), queue);
            return Ok(queue);
        }
        match self.streams.get(&stream) {
            Some(stream) => Ok(stream.queue),
            None => Err(self.unknown_handle(stream, codes::INVALID_HANDLE)),
        }
    }

    pub(crate) fn create_stream(&mut self, flags: u32, priority: i32) -> Result<usize, Code> {
        let context = self.context()?;
        if flags & !STREAM_NON_BLOCKING != 0 {
            return Err(codes::INVALID_VALUE);
        }
        let kind = if flags & STREAM_NON_BLOCKING != 0 { Kind::Independent } else { Kind::Blocking };
        let handle = self.handle();
        let queue = self.add_queue(Queue::new(format!("stream {handle:#x}"), context, kind));
        self.streams.insert(handle, Stream { queue, context, flags, priority });
        self.counters.streams.rise(self.streams.len());
        Ok(handle)
    }

    /// Ends a stream. Its work still runs, as on the real one.
    pub(crate) fn destroy_stream(&mut self, stream: usize) -> Result<(), Code> {
        self.context()?;
        let Some(ended) = self.streams.remove(&stream) else {
            return Err(self.unknown_handle(stream, codes::INVALID_HANDLE));
        };
        self.gone.insert(stream, "a stream");
        if self.queues.get(ended.queue).is_some_and(|queue| !queue.pending.is_empty()) {
            self.counters.streams_destroyed_pending = self.counters.streams_destroyed_pending.saturating_add(1);
        }
        Ok(())
    }

    pub(crate) fn synchronize_stream(&mut self, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if !self.finish_queue(queue) {
            return Err(codes::BLOCKED);
        }
        self.settle();
        Ok(())
    }

    pub(crate) fn query_stream(&mut self, stream: usize) -> Result<(), Code> {
        let number = self.queue_of(stream)?;
        let queue = self.queues.get_mut(number).ok_or(codes::INVALID_HANDLE)?;
        if !queue.pending.is_empty() && queue.not_ready > 0 {
            queue.not_ready = queue.not_ready.saturating_sub(1);
            return Err(codes::NOT_READY);
        }
        if self.finish_queue(number) { Ok(()) } else { Err(codes::NOT_READY) }
    }

    /// Waits for everything in a context; false where something has to wait for another rank.
    pub(crate) fn synchronize_context(&mut self, context: usize) -> bool {
        let queues: Vec<usize> = self
            .queues
            .iter()
            .enumerate()
            .filter(|(_, queue)| queue.context == context)
            .map(|(number, _)| number)
            .collect();
        // The queue made last goes first: a program that relies on the order of creation is found out.
        let finished = queues.iter().rev().all(|&queue| self.finish_queue(queue));
        self.settle();
        finished
    }

    /// What the pools do when the host waits: they keep what they are asked to keep.
    fn settle(&mut self) {
        for (number, device) in self.devices.iter().enumerate() {
            let keep = usize::try_from(device.release_threshold).unwrap_or(usize::MAX);
            self.memory.trim(number, keep, false, |op| !self.ops.contains_key(&op));
        }
    }

    pub(crate) fn create_event(&mut self, flags: u32) -> Result<usize, Code> {
        let context = self.context()?;
        if flags & !EVENT_FLAGS != 0 {
            return Err(codes::INVALID_VALUE);
        }
        let handle = self.handle();
        let timing = flags & EVENT_DISABLE_TIMING == 0;
        self.events.insert(handle, Event { context, timing, recorded: None, not_ready: 0 });
        self.counters.events.rise(self.events.len());
        Ok(handle)
    }

    pub(crate) fn destroy_event(&mut self, event: usize) -> Result<(), Code> {
        self.context()?;
        if self.events.remove(&event).is_none() {
            return Err(self.unknown_handle(event, codes::INVALID_HANDLE));
        }
        self.gone.insert(event, "an event");
        Ok(())
    }

    fn event(&mut self, event: usize) -> Result<&mut Event, Code> {
        if !self.events.contains_key(&event) {
            return Err(self.unknown_handle(event, codes::INVALID_HANDLE));
        }
        self.events.get_mut(&event).ok_or(codes::INVALID_HANDLE)
    }

    pub(crate) fn record_event(&mut self, event: usize, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        let context = self.event(event)?.context;
        if self.queues.get(queue).is_none_or(|queue| queue.context != context) {
            return Err(codes::INVALID_HANDLE);
        }
        let op = self.submit(New {
            queue,
            accesses: Vec::new(),
            work: Work::Record { event },
            waits: None,
            about: format!(" of event {event:#x}"),
        });
        let clock = self.ops.get(&op).map(|op| op.clock.clone()).unwrap_or_default();
        let event = self.event(event)?;
        event.recorded = Some(Recorded { op, clock, at: None });
        event.not_ready = NOT_READY_ANSWERS;
        Ok(())
    }

    /// Takes up that a record has run.
    pub(crate) fn recorded(&mut self, event: usize, op: u64) {
        let recorded = self.events.get_mut(&event).and_then(|event| event.recorded.as_mut());
        if let Some(recorded) = recorded.filter(|recorded| recorded.op == op) {
            recorded.at = Some(Instant::now());
        }
    }

    pub(crate) fn wait_event(&mut self, stream: usize, event: usize, flags: u32) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if flags != 0 {
            return Err(codes::INVALID_VALUE);
        }
        let Some((op, clock)) = self.event(event)?.recorded.as_ref().map(|last| (last.op, last.clock.clone())) else {
            return Ok(());
        };
        self.submit(New {
            queue,
            accesses: Vec::new(),
            work: Work::Wait,
            waits: Some((&clock, op)),
            about: format!(" for event {event:#x}"),
        });
        Ok(())
    }

    /// Runs what the event's last record depends on, and the host knows it.
    pub(crate) fn synchronize_event(&mut self, event: usize) -> Result<(), Code> {
        self.context()?;
        if let Some((op, clock)) = self.event(event)?.recorded.as_ref().map(|last| (last.op, last.clock.clone())) {
            if !self.run_until(op) {
                return Err(codes::BLOCKED);
            }
            self.host.join(&clock);
            self.settle();
        }
        Ok(())
    }

    pub(crate) fn query_event(&mut self, event: usize) -> Result<(), Code> {
        self.context()?;
        let Some(op) = self.event(event)?.recorded.as_ref().map(|last| last.op) else { return Ok(()) };
        let pending = self.ops.contains_key(&op);
        let known = self.event(event)?;
        if pending && known.not_ready > 0 {
            known.not_ready = known.not_ready.saturating_sub(1);
            return Err(codes::NOT_READY);
        }
        self.synchronize_event(event).map_err(|code| if code == codes::BLOCKED { codes::NOT_READY } else { code })
    }

    /// Milliseconds between two records.
    pub(crate) fn elapsed(&mut self, start: usize, end: usize) -> Result<f32, Code> {
        self.context()?;
        let mut times = [None; 2];
        let mut contexts = [0; 2];
        for ((event, time), context) in [start, end].into_iter().zip(&mut times).zip(&mut contexts) {
            let event = self.event(event)?;
            if !event.timing {
                return Err(codes::INVALID_HANDLE);
            }
            *context = event.context;
            *time = Some(event.recorded.as_ref().ok_or(codes::INVALID_HANDLE)?.at.ok_or(codes::NOT_READY)?);
        }
        let [Some(start), Some(end)] = times else { return Err(codes::NOT_READY) };
        if contexts[0] != contexts[1] {
            return Err(codes::INVALID_HANDLE);
        }
        let seconds = match end.checked_duration_since(start) {
            Some(time) => time.as_secs_f32(),
            None => -start.duration_since(end).as_secs_f32(),
        };
        Ok(seconds * 1000.0)
    }
}
