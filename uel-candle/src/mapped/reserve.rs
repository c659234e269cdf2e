//! One range of address space for the life of the process, handed out in granules.

use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::region::Inner as Region;

/// The unit in which address space is handed out and memory is given back: one huge page.
pub(super) const GRANULE: usize = 1 << GRANULE_SHIFT;
const GRANULE_SHIFT: u32 = 21;

/// Sizes that are tried in turn: address space may be limited.
const RESERVE_SIZES: [usize; 5] = [1 << 45, 1 << 42, 1 << 39, 1 << 36, 1 << 33];

/// Freed stretches of address space that are remembered for reuse. Beyond that, addresses are forgotten: of 32 TiB
/// there are plenty.
const MAX_FREE_STRETCHES: usize = 1024;

/// Where the reserved range begins. Valid once [`LEN`] is not 0.
static BASE: AtomicUsize = AtomicUsize::new(0);
/// The length of the reserved range in bytes, 0 before it is reserved.
static LEN: AtomicUsize = AtomicUsize::new(0);
/// One entry a granule: the region that it belongs to.
static TABLE: AtomicPtr<AtomicPtr<Region>> = AtomicPtr::new(ptr::null_mut());

static SPACE: Mutex<Space> = Mutex::new(Space { refused: false, next: 0, free: Vec::new() });

struct Space {
    /// The system refused the reservation; it is not asked again.
    refused: bool,
    /// The first granule that was never handed out.
    next: usize,
    /// Stretches of granules that were given back, as (first, count), sorted.
    free: Vec<(usize, usize)>,
}

/// A stretch of reserved address space, owned by one region. It starts and ends on granule boundaries.
#[derive(Debug)]
pub(super) struct Stretch {
    first: usize,
    granules: usize,
    base: usize,
}

impl Stretch {
    pub(super) fn base(&self) -> usize {
        self.base
    }

    pub(super) fn byte_len(&self) -> usize {
        self.granules << GRANULE_SHIFT
    }

    /// Takes address space of at least `byte_len` bytes, or `None` where none is left or the system refuses.
    pub(super) fn take(byte_len: usize) -> Option<Stretch> {
        let granules = byte_len.max(1).checked_next_multiple_of(GRANULE)? >> GRANULE_SHIFT;
        let mut space = lock();
        if LEN.load(Ordering::Relaxed) == 0 && !reserve(&mut space) {
            return None;
        }
        let first = match space.free.iter().position(|&(_, count)| count >= granules) {
            Some(found) => {
                let (first, count) = space.free[found];
                if count == granules {
                    space.free.remove(found);
                } else {
                    space.free[found] = (first + granules, count - granules);
                }
                first
            }
            None => {
                let first = space.next;
                let next = first.checked_add(granules)?;
                if next > LEN.load(Ordering::Relaxed) >> GRANULE_SHIFT {
                    return None;
                }
                space.next = next;
                first
            }
        };
        Some(Stretch { first, granules, base: BASE.load(Ordering::Relaxed) + (first << GRANULE_SHIFT) })
    }

    /// Makes `region` the answer to [`region_at`] for every address of the stretch, or nothing when null.
    pub(super) fn publish(&self, region: *mut Region) {
        let table = TABLE.load(Ordering::Acquire);
        for granule in self.first..self.first + self.granules {
            // SAFETY: a stretch exists only once `reserve` succeeded, so the table has one entry for each granule of the
            // reserved range, zeroed (a null pointer), never unmapped; `granule` lies in that range, as `take` checked.
            let entry = unsafe { &*table.add(granule) };
            entry.store(region, Ordering::Release);
        }
    }

    /// Gives the address space back. The caller has put `PROT_NONE` over it and unpublished it.
    pub(super) fn give_back(self) {
        let mut space = lock();
        let at = space.free.partition_point(|&(first, _)| first < self.first);
        let joins_next = space.free.get(at).is_some_and(|&(first, _)| first == self.first + self.granules);
        let joins_last = at > 0 && space.free.get(at - 1).is_some_and(|&(f, n)| f + n == self.first);
        match (joins_last, joins_next) {
            (true, true) => {
                space.free[at - 1].1 += self.granules + space.free[at].1;
                space.free.remove(at);
            }
            (true, false) => space.free[at - 1].1 += self.granules,
            (false, true) => {
                space.free[at].0 = self.first;
                space.free[at].1 += self.granules;
            }
            // The vector never grows here: its room was made when the range was reserved, because this runs inside
            // `dealloc`, where nothing may be allocated.
            (false, false) if space.free.len() < space.free.capacity() => {
                space.free.insert(at, (self.first, self.granules));
            }
            (false, false) => {}
        }
    }
}

fn lock() -> MutexGuard<'static, Space> {
    crate::sync::lock(&SPACE)
}

/// Reserves the range and its table. Address space alone costs no memory; the table's pages come as they are used.
fn reserve(space: &mut Space) -> bool {
    if space.refused {
        return false;
    }
    // What is reserved counts against the limit of the process (`RLIMIT_AS`), and it is not all UEL's.
    let most = address_space_limit().map_or(usize::MAX, |limit| limit / 4);
    let reserved = RESERVE_SIZES.iter().filter(|&&byte_len| byte_len <= most).find_map(|&byte_len| {
        // One granule more, so that the base can be moved up to a granule boundary.
        let start = map(byte_len + GRANULE, libc::PROT_NONE)?;
        let Some(table) =
            map((byte_len >> GRANULE_SHIFT) * size_of::<AtomicPtr<Region>>(), libc::PROT_READ | libc::PROT_WRITE)
        else {
            // SAFETY: the range was mapped above and nothing refers to it yet.
            unsafe { libc::munmap(start.as_ptr().cast(), byte_len + GRANULE) };
            return None;
        };
        Some((start.as_ptr().expose_provenance().next_multiple_of(GRANULE), table, byte_len))
    });
    let Some((base, table, byte_len)) = reserved else {
        space.refused = true;
        return false;
    };
    space.free.reserve_exact(MAX_FREE_STRETCHES);
    TABLE.store(table.as_ptr().cast(), Ordering::Release);
    BASE.store(base, Ordering::Release);
    // Published last: who sees a length sees the base and the table that belong to it.
    LEN.store(byte_len, Ordering::Release);
    true
}

/// How much address space the process may have, where that is limited.
fn address_space_limit() -> Option<usize> {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the kernel writes the limit to its place.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) };
    if rc != 0 || limit.rlim_cur == libc::RLIM_INFINITY { None } else { usize::try_from(limit.rlim_cur).ok() }
}

fn map(byte_len: usize, protection: libc::c_int) -> Option<NonNull<u8>> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the system's choice touches no memory that is in use.
    let start = unsafe { libc::mmap(ptr::null_mut(), byte_len, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
}

/// Whether `address` lies in the reserved range: the one question that every `dealloc` asks.
#[inline(always)]
pub(super) fn contains(address: usize) -> bool {
    let len = LEN.load(Ordering::Acquire);
    address.wrapping_sub(BASE.load(Ordering::Relaxed)) < len
}

/// The region that `address` of the reserved range belongs to, or null.
pub(super) fn region_at(address: usize) -> *mut Region {
    let granule = address.wrapping_sub(BASE.load(Ordering::Relaxed)) >> GRANULE_SHIFT;
    if granule >= LEN.load(Ordering::Acquire) >> GRANULE_SHIFT {
        return ptr::null_mut();
    }
    let table = TABLE.load(Ordering::Acquire);
    // SAFETY: the length is not 0, so the table is mapped with one zero-initialised entry for each granule, and
    // `granule` was just compared with their number.
    let entry = unsafe { &*table.add(granule) };
    entry.load(Ordering::Acquire)
}
