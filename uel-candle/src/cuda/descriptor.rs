//! Descriptors of files that somebody else closes.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Runs something that may close descriptor 0, and opens it again for what it was, if that is so.
///
/// Another thread may open a file in between and get the number; that file is left alone, and descriptor 0 is its own.
pub(super) fn keeping_descriptor_0<T>(body: impl FnOnce() -> T) -> T {
    // SAFETY: this asks for the flags of a descriptor, or for another one for the same file.
    let (flags, kept) = unsafe { (libc::fcntl(0, libc::F_GETFD), libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3)) };
    // SAFETY: the descriptor is new, and nobody else's.
    let kept = (kept >= 0).then(|| unsafe { OwnedFd::from_raw_fd(kept) });
    let result = body();
    // SAFETY: this asks for the flags of a descriptor.
    let is_closed = unsafe { libc::fcntl(0, libc::F_GETFD) } < 0;
    if let Some(kept) = kept.as_ref().filter(|_| is_closed) {
        // The least number that is free: 0, unless another thread has it by now.
        // SAFETY: this asks for another descriptor for the same file; nobody's is replaced.
        let again = unsafe { libc::fcntl(kept.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        match again {
            // SAFETY: the descriptor was made above.
            0 => drop(unsafe { libc::fcntl(0, libc::F_SETFD, flags) }),
            // SAFETY: the descriptor was made above, and is nobody else's.
            1.. => drop(unsafe { OwnedFd::from_raw_fd(again) }),
            _ => {}
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The device and inode of descriptor 0, and its flags.
    fn descriptor_0() -> Option<(libc::dev_t, libc::ino_t, libc::c_int)> {
        let mut status = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: the kernel writes the status to its place.
        let rc = unsafe { libc::fstat(0, status.as_mut_ptr()) };
        // SAFETY: it was zeroed, which is a status.
        let status = unsafe { status.assume_init() };
        // SAFETY: this asks for the flags.
        (rc == 0).then(|| (status.st_dev, status.st_ino, unsafe { libc::fcntl(0, libc::F_GETFD) }))
    }

    #[test]
    fn what_closes_descriptor_0_does_not_cost_the_program_its_input() {
        let before = descriptor_0();
        let answer = keeping_descriptor_0(|| {
            // SAFETY: nobody reads from it in this test.
            unsafe { libc::close(0) };
            7
        });
        assert_eq!((answer, descriptor_0()), (7, before));
    }
}
