//! The memory of other processes on this host, read by one call of the system: no byte goes through MPI.

use std::path::{Path, PathBuf};

use uel_core::source::ByteSource;

/// The bytes of a ticket: the host, the process, where its bytes begin, and how many there are.
const TICKET_BYTES: usize = 8 + 8 + 8 + 8;

/// What other processes of this host need to read `bytes`. `None` where the system cannot do that.
pub(super) fn ticket(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut ticket = Vec::with_capacity(TICKET_BYTES);
    for number in [host()?, u64::from(std::process::id()), bytes.as_ptr().addr() as u64, bytes.len() as u64] {
        ticket.extend(number.to_le_bytes());
    }
    Some(ticket)
}

/// What a ticket of rank `rank` stands for, where this process may read it.
pub(super) fn borrow(rank: usize, ticket: &[u8]) -> Option<impl ByteSource + use<>> {
    let ticket: &[u8; TICKET_BYTES] = ticket.try_into().ok()?;
    let mut numbers = ticket.as_chunks().0.iter().copied().map(u64::from_le_bytes);
    let (of_host, process, address, byte_len) = (numbers.next()?, numbers.next()?, numbers.next()?, numbers.next()?);
    if of_host != host()? {
        return None;
    }
    let process = i32::try_from(process).ok()?;
    let address = usize::try_from(address).ok()?;
    address.checked_add(usize::try_from(byte_len).ok()?)?;
    let path = PathBuf::from(format!("memory of rank {rank} at {address:#x}"));
    let borrowed = Borrowed { path, process, address, byte_len };
    // The system may forbid it to processes that are not each other's parents, or in a container.
    borrowed.can_be_read().then_some(borrowed)
}

/// Which host this is, and which processes have the numbers that they have here. The same on all ranks that may read each other's
/// memory.
#[cfg(target_os = "linux")]
fn host() -> Option<u64> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let processes = std::fs::read_link("/proc/self/ns/pid").ok()?;
    // Without keys, and so the same in every process of one program.
    let mut hasher = DefaultHasher::new();
    (boot, processes).hash(&mut hasher);
    Some(hasher.finish())
}

#[cfg(not(target_os = "linux"))]
fn host() -> Option<u64> {
    None
}

/// Bytes in another process.
#[derive(Debug)]
struct Borrowed {
    path: PathBuf,
    process: i32,
    address: usize,
    byte_len: u64,
}

impl Borrowed {
    fn can_be_read(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        let ends = [Some(0), self.byte_len.checked_sub(1)];
        self.byte_len == 0 || ends.into_iter().flatten().all(|at| self.read_at(at, &mut byte).is_ok())
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io;
    use std::mem::MaybeUninit;

    use uel_core::source::ByteSourceExt;
    use uel_core::{Error, Kind, Result};

    use super::{Borrowed, ByteSource, Path};

    impl ByteSource for Borrowed {
        fn path(&self) -> &Path {
            &self.path
        }

        fn byte_len(&self) -> u64 {
            self.byte_len
        }

        fn read_at<'b>(&self, offset: u64, buffer: &'b mut [MaybeUninit<u8>]) -> Result<&'b mut [u8]> {
            self.check_range(offset, buffer.len())?;
            let here = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
            // In the range that was checked for its end when it was borrowed.
            let address = std::ptr::without_provenance_mut(self.address + offset as usize);
            let there = libc::iovec { iov_base: address, iov_len: buffer.len() };
            // SAFETY: the kernel writes at most `iov_len` bytes to `buffer`, which is borrowed mutably and has as many. The
            // address is one of another process, whose memory is only read, and the kernel checks it: nothing is dereferenced
            // here.
            let read = unsafe { libc::process_vm_readv(self.process, &raw const here, 1, &raw const there, 1, 0) };
            match usize::try_from(read) {
                Ok(read) if (1..=buffer.len()).contains(&read) || buffer.is_empty() => {
                    let (part, _) = buffer.split_at_mut(read.min(buffer.len()));
                    // SAFETY: the kernel says that it wrote this many bytes from the buffer's start on.
                    Ok(unsafe { part.assume_init_mut() })
                }
                Ok(_) => Err(Error::new(Kind::Group, "the memory of a rank came to an end").with_path(&self.path)),
                Err(_) => Err(Error::io("read", &self.path, io::Error::last_os_error()).with_offset(offset)),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use uel_core::source::{ByteSourceExt, conformance};

        use super::super::{borrow, ticket};

        /// A process may always read its own memory in this way.
        #[test]
        fn memory_is_read_where_it_lies() {
            let read = |bytes: &[u8]| {
                // Kept for good: the source does not keep it.
                let bytes: &'static [u8] = bytes.to_vec().leak();
                let source = borrow(3, &ticket(bytes).unwrap()).unwrap();
                Box::new(source) as Box<dyn uel_core::source::ByteSource>
            };
            conformance::check(read).unwrap();
            let large: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
            let source = borrow(0, &ticket(&large).unwrap()).unwrap();
            let range = uel_core::ByteRange::new(17, 2_999_999).unwrap();
            assert_eq!(source.read_range(range).unwrap(), large[17..2_999_999]);
        }

        #[test]
        fn what_cannot_be_read_is_not_borrowed() {
            let mut ticket = ticket(&[1, 2, 3]).unwrap();
            assert!(borrow(0, &ticket[1..]).is_none());
            // Nothing is there.
            ticket[16..24].copy_from_slice(&8u64.to_le_bytes());
            assert!(borrow(0, &ticket).is_none());
            ticket[..8].fill(0);
            assert!(borrow(0, &ticket).is_none(), "another host");
        }
    }
}

/// Elsewhere there are no tickets.
#[cfg(not(target_os = "linux"))]
impl ByteSource for Borrowed {
    fn path(&self) -> &Path {
        &self.path
    }

    fn byte_len(&self) -> u64 {
        0
    }

    fn read_at<'b>(&self, _: u64, _: &'b mut [std::mem::MaybeUninit<u8>]) -> uel_core::Result<&'b mut [u8]> {
        Err(uel_core::Error::new(uel_core::Kind::Group, "the memory of other processes cannot be read here"))
    }
}
