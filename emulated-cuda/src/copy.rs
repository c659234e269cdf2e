//! Copies and fills.

use crate::bytes;
use crate::clock::Clock;
use crate::codes::{self, Code};
use crate::driver::Driver;
use crate::history::{Access, Space};
use crate::pinned::Pinning;
use crate::queue::{Place, Rows, Work};
use crate::schedule::New;

/// What a call needs of an end of a copy.
pub(crate) struct End {
    pub(crate) place: Place,
    pub(crate) access: Option<Access>,
}

impl Driver {
    /// Device memory of a call.
    pub(crate) fn device_end(&mut self, address: usize, len: usize, write: bool) -> Result<End, Code> {
        let end = address.checked_add(len).ok_or(codes::INVALID_VALUE)?;
        let message = match self.memory.live_at(address) {
            Some((id, block)) if end <= block.address.saturating_add(block.len) => {
                let access = Access { space: Space::Block(id), start: address, end, write };
                return Ok(End { place: Place::Device { block: id, address }, access: Some(access) });
            }
            Some((_, block)) => (
                "out of bounds",
                format!(
                    "{len} bytes at {address:#x} leave the {} bytes at {:#x} of {}",
                    block.len, block.address, block.label
                ),
            ),
            None => match self.memory.freed_at(address) {
                Some((_, block)) => {
                    let freed = block.freed.as_deref().unwrap_or("");
                    ("use after free", format!("{len} bytes at {address:#x} were freed by {freed}"))
                }
                None => ("unknown memory", format!("{len} bytes at {address:#x} are no device memory")),
            },
        };
        let what = self.label("");
        self.violation(message.0, format!("{what}: {}", message.1));
        Err(codes::INVALID_VALUE)
    }

    /// The range of pinned memory that holds memory of the host's, if it is pinned.
    fn pinned_range(&mut self, address: usize, len: usize) -> Result<Option<u64>, Code> {
        address.checked_add(len).ok_or(codes::INVALID_VALUE)?;
        if address == 0 {
            return Err(codes::INVALID_VALUE);
        }
        if self.memory.live_at(address).is_some() {
            let message = format!("{}: the host memory at {address:#x} is device memory", self.label(""));
            self.violation("unknown memory", message);
            return Err(codes::INVALID_VALUE);
        }
        match self.pinned.find(address, len) {
            Pinning::Inside(id) => Ok(Some(id)),
            Pinning::None => Ok(None),
            Pinning::Partly(id) => {
                let range = self.pinned.get(id).map_or_else(|| "".into(), |range| range.label.clone());
                let message = format!("{}: {len} bytes at {address:#x} are pinned in part, by {range}", self.label(""));
                self.violation("partly pinned", message);
                Err(codes::INVALID_VALUE)
            }
        }
    }

    fn pinned_end(id: u64, address: usize, len: usize, write: bool) -> End {
        let access = Access { space: Space::Pinned(id), start: address, end: address.saturating_add(len), write };
        End { place: Place::Pinned { range: id, address }, access: Some(access) }
    }

    fn submit_copy(&mut self, queue: usize, from: End, to: End, len: usize, digest: Option<u64>, about: String) -> u64 {
        let accesses = [from.access, to.access].into_iter().flatten().collect();
        let work = Work::Copy { from: from.place, to: to.place, len, digest };
        self.submit(New { queue, accesses, work, waits: None, about })
    }

    /// Runs an operation, and the host knows it.
    fn finish(&mut self, op: u64) {
        let clock = self.ops.get(&op).map(|op| op.clock.clone()).unwrap_or_default();
        if !self.run_until(op) {
            let message = format!("{} returns only when done, and waits for a rank that has not come", self.label(""));
            self.violation("hang", message);
            // Memory that the caller lent is the caller's again.
            self.withdraw(op);
        }
        self.host.join(&clock);
    }

    /// Copies to the device. Pinned memory is read when the copy runs; other memory is taken now. A call without a
    /// stream waits for what came before, and for pinned memory for the copy itself.
    ///
    /// # Safety
    ///
    /// `len` bytes can be read at `from` until the copy ran, or until this returns where they are not pinned.
    pub(crate) unsafe fn copy_in(
        &mut self,
        from: usize,
        to: usize,
        len: usize,
        stream: Option<usize>,
    ) -> Result<(), Code> {
        let queue = self.queue_of(stream.unwrap_or(0))?;
        if len == 0 {
            return Ok(());
        }
        let to_end = self.device_end(to, len, true)?;
        let about = format!(" of {len} bytes from {from:#x} to {to:#x}");
        match self.pinned_range(from, len)? {
            Some(id) => {
                let source = Self::pinned_end(id, from, len, false);
                let device_writes_it = source.access.as_ref().is_some_and(|access| self.written(access));
                // SAFETY: the caller's promise, and the range is pinned.
                let digest = (!device_writes_it).then(|| unsafe { bytes::digest(from, len) });
                let op = self.submit_copy(queue, source, to_end, len, digest, about);
                if stream.is_none() {
                    self.finish(op);
                }
            }
            None => {
                if stream.is_none() {
                    self.finish_queue(queue);
                }
                // SAFETY: the caller's promise.
                let bytes = unsafe { bytes::snapshot(from, len) };
                let source = End { place: Place::Snapshot(bytes), access: None };
                self.submit_copy(queue, source, to_end, len, None, about);
            }
        }
        Ok(())
    }

    /// Whether an operation that has not run yet writes to pinned bytes.
    fn written(&self, access: &Access) -> bool {
        self.ops.values().flat_map(|op| &op.accesses).any(|other| {
            other.write && other.space == access.space && other.start < access.end && access.start < other.end
        })
    }

    /// Copies from the device. Only a copy into pinned memory with a stream may be under way afterwards.
    ///
    /// # Safety
    ///
    /// `len` bytes can be written at `to` until the copy ran, or until this returns where they are not pinned.
    pub(crate) unsafe fn copy_out(
        &mut self,
        from: usize,
        to: usize,
        len: usize,
        stream: Option<usize>,
    ) -> Result<(), Code> {
        let queue = self.queue_of(stream.unwrap_or(0))?;
        if len == 0 {
            return Ok(());
        }
        let source = self.device_end(from, len, false)?;
        let pinned = self.pinned_range(to, len)?;
        let target = match pinned {
            Some(id) => Self::pinned_end(id, to, len, true),
            None => End { place: Place::Pageable { address: to }, access: None },
        };
        let about = format!(" of {len} bytes from {from:#x} to {to:#x}");
        let op = self.submit_copy(queue, source, target, len, None, about);
        if pinned.is_none() || stream.is_none() {
            self.finish(op);
        }
        Ok(())
    }

    /// Copies between device memory, also of two devices. The host waits for nothing.
    pub(crate) fn copy_across(&mut self, from: usize, to: usize, len: usize, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if len == 0 {
            return Ok(());
        }
        let source = self.device_end(from, len, false)?;
        let target = self.device_end(to, len, true)?;
        let about = format!(" of {len} bytes from {from:#x} to {to:#x}");
        self.submit_copy(queue, source, target, len, None, about);
        Ok(())
    }

    /// Copies rows between device memory. For the order of operations, what lies between the rows counts too.
    pub(crate) fn copy_rows(&mut self, from: usize, to: usize, rows: Rows, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        if rows.width > rows.from_pitch.min(rows.to_pitch) {
            return Err(codes::INVALID_VALUE);
        }
        let Some(last) = rows.count.checked_sub(1).filter(|_| rows.width > 0) else { return Ok(()) };
        let span = |pitch: usize| last.checked_mul(pitch)?.checked_add(rows.width);
        let (from_span, to_span) = (span(rows.from_pitch), span(rows.to_pitch));
        let (Some(from_span), Some(to_span)) = (from_span, to_span) else { return Err(codes::INVALID_VALUE) };
        let source = self.device_end(from, from_span, false)?;
        let target = self.device_end(to, to_span, true)?;
        let about = format!(" of {} rows of {} bytes from {from:#x} to {to:#x}", rows.count, rows.width);
        let accesses = [source.access, target.access].into_iter().flatten().collect();
        let work = Work::CopyRows { from: source.place, to: target.place, rows };
        self.submit(New { queue, accesses, work, waits: None, about });
        Ok(())
    }

    /// Copies between the memory of two contexts, which have to be those that the addresses belong to.
    pub(crate) fn copy_peer(
        &mut self,
        from: (usize, usize),
        to: (usize, usize),
        len: usize,
        stream: usize,
    ) -> Result<(), Code> {
        for (context, address) in [from, to] {
            if !self.contexts.contains_key(&context) {
                return Err(self.unknown_handle(context, codes::INVALID_CONTEXT));
            }
            let device = self.device_of(context)?;
            if self.memory.live_at(address).is_some_and(|(_, block)| block.device != device) {
                return Err(codes::INVALID_VALUE);
            }
        }
        self.copy_across(from.1, to.1, len, stream)
    }

    /// Fills with a pattern `count` times.
    pub(crate) fn set(&mut self, to: usize, pattern: &[u8], count: usize, stream: usize) -> Result<(), Code> {
        let queue = self.queue_of(stream)?;
        let len = count.checked_mul(pattern.len()).ok_or(codes::INVALID_VALUE)?;
        if !to.is_multiple_of(pattern.len()) {
            return Err(codes::INVALID_VALUE);
        }
        if len == 0 {
            return Ok(());
        }
        let End { place, access } = self.device_end(to, len, true)?;
        self.submit(New {
            queue,
            accesses: access.into_iter().collect(),
            work: Work::Fill { to: place, len, pattern: pattern.to_vec() },
            waits: None,
            about: format!(" of {len} bytes at {to:#x}"),
        });
        Ok(())
    }

    /// Declares that the host reads or writes memory now; for pinned memory, operations that it does not know to be
    /// done must not conflict with that. Gives the number of violations found.
    pub(crate) fn host_access(&mut self, address: usize, len: usize, write: bool) -> u64 {
        let before = self.violation_count;
        if let Ok(Some(id)) = self.pinned_range(address, len) {
            let host: Clock = self.host.clone();
            let label = format!("the host (thread {})", self.thread);
            let end = address.saturating_add(len);
            self.check(&Access { space: Space::Pinned(id), start: address, end, write }, &host, &label);
        }
        self.violation_count.saturating_sub(before)
    }
}
