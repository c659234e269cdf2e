//! A communicator that does not block: what it is asked for is in progress until it says otherwise.

use std::ffi::{c_int, c_void};

use super::library::{Comm, Config, IN_PROGRESS, Library, SUCCESS, Stream, UINT8, UniqueId};

/// One transfer of a group, from or to device memory at an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) peer: usize,
    pub(super) address: u64,
    pub(super) byte_len: usize,
    pub(super) sends: bool,
}

/// A rank's communicator. Dropped, it is aborted.
pub(super) struct Communicator {
    library: &'static Library,
    comm: Comm,
}

// SAFETY: the library takes a communicator on any thread, on one at a time, and the value is no one's but its owner's.
unsafe impl Send for Communicator {}

/// An id that no other has.
pub(super) fn unique_id(library: &Library) -> Result<UniqueId, String> {
    let mut id = UniqueId { bytes: [0; 128] };
    // SAFETY: the function writes an id there.
    let code = unsafe { (library.get_unique_id)(&raw mut id) };
    check(library, code, "ncclGetUniqueId").map(|()| id)
}

/// What failed, in words. What is in progress has not.
fn check(library: &Library, code: u32, what: &str) -> Result<(), String> {
    match code {
        SUCCESS | IN_PROGRESS => Ok(()),
        code => Err(format!("{what} failed: {}", library.words(code))),
    }
}

fn number(number: usize) -> Result<c_int, String> {
    c_int::try_from(number).map_err(|_| format!("NCCL cannot count to {number}"))
}

fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

impl Communicator {
    /// Begins to join the ranks with `id`, on the device whose context is current.
    pub(super) fn join(library: &'static Library, id: UniqueId, rank: usize, size: usize) -> Result<Self, String> {
        let (rank, size) = (number(rank)?, number(size)?);
        let (mut comm, mut config) = (std::ptr::null_mut(), Config::not_blocking());
        // SAFETY: the handle and the configuration live until the call returns; the latter says how large it is. The id is one
        // of `ncclGetUniqueId`, or is refused.
        let code = unsafe { (library.init)(&raw mut comm, size, id, rank, &raw mut config) };
        check(library, code, "ncclCommInitRankConfig")?;
        if comm.is_null() {
            return Err("ncclCommInitRankConfig gave no communicator".to_owned());
        }
        Ok(Self { library, comm })
    }

    /// Whether what was asked for last has been done; an error where it failed, or another rank did.
    pub(super) fn is_settled(&self) -> Result<bool, String> {
        let mut state = SUCCESS;
        // SAFETY: the communicator was not ended, as it is by dropping the value alone; the result is written to `state`.
        let code = unsafe { (self.library.get_async_error)(self.comm, &raw mut state) };
        check(self.library, code, "ncclCommGetAsyncError")?;
        check(self.library, state, "what was asked of NCCL").map(|()| state == SUCCESS)
    }

    /// Begins transfers, all at once, on a stream.
    ///
    /// # Safety
    ///
    /// At each address there is so much memory of the communicator's device, which nobody frees, and nobody but the stream uses
    /// otherwise, until the stream is done with them, or the communicator was aborted and the stream is idle.
    pub(super) unsafe fn transfer(&self, transfers: &[Transfer], stream: Stream) -> Result<(), String> {
        // SAFETY: a group is ended below, whatever happens in between.
        check(self.library, unsafe { (self.library.group_start)() }, "ncclGroupStart")?;
        let begun = transfers.iter().try_for_each(|&Transfer { peer, address, byte_len, sends }| {
            let (peer, at) = (number(peer)?, pointer(address));
            // SAFETY: the communicator was not ended; the memory and the stream are the caller's promise.
            let code = unsafe {
                match sends {
                    true => (self.library.send)(at, byte_len, UINT8, peer, self.comm, stream),
                    false => (self.library.receive)(at, byte_len, UINT8, peer, self.comm, stream),
                }
            };
            check(self.library, code, if sends { "ncclSend" } else { "ncclRecv" })
        });
        // SAFETY: a group was begun on this thread.
        let ended = check(self.library, unsafe { (self.library.group_end)() }, "ncclGroupEnd");
        begun.and(ended)
    }

    /// Begins to give the bytes of `root` to all ranks.
    ///
    /// # Safety
    ///
    /// As [`transfer`](Self::transfer).
    pub(super) unsafe fn broadcast(
        &self,
        root: usize,
        address: u64,
        byte_len: usize,
        stream: Stream,
    ) -> Result<(), String> {
        let (root, at) = (number(root)?, pointer(address));
        // SAFETY: the communicator was not ended; the memory and the stream are the caller's promise. The root's may be read
        // from and written to at one place.
        let code = unsafe { (self.library.broadcast)(at, at, byte_len, UINT8, root, self.comm, stream) };
        check(self.library, code, "ncclBroadcast")
    }

    /// Begins the end of the communicator, which all ranks come to.
    pub(super) fn finalize(&self) -> Result<(), String> {
        // SAFETY: the communicator was not ended.
        check(self.library, unsafe { (self.library.finalize)(self.comm) }, "ncclCommFinalize")
    }

    /// Gives back what a communicator has that is at its end.
    pub(super) fn destroy(self) -> Result<(), String> {
        let ended = std::mem::ManuallyDrop::new(self);
        // SAFETY: the communicator was not ended, and is not used again: the value is not dropped.
        check(ended.library, unsafe { (ended.library.destroy)(ended.comm) }, "ncclCommDestroy")
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // SAFETY: the communicator was not ended, and is not used again.
        let code = unsafe { (self.library.abort)(self.comm) };
        if let Err(why) = check(self.library, code, "ncclCommAbort") {
            tracing::warn!(why, "cannot end a communicator");
        }
    }
}
