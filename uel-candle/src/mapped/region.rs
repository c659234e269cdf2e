//! Regions: memory in the reserved range, divided into blocks that become vectors.

use std::alloc::Layout;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicUsize, Ordering};

use uel_core::ByteRange;

use crate::element::Element;

use super::allocator::{self, NotPlaced};
use super::recycle::{self, Reuse};
use super::reserve::{self, GRANULE, Stretch};

/// A partial huge page at the end is taken where it costs at most this part of the memory more.
const PARTIAL_HUGE: usize = 8;

/// Where a block stands: not handed out yet.
const WAITING: u8 = 0;
/// A vector owns the block.
const OUT: u8 = 1;
/// Nobody owns the block, and nobody ever will again.
const FREED: u8 = 2;

static REGIONS: AtomicUsize = AtomicUsize::new(0);
static MAPPED_BYTES: AtomicUsize = AtomicUsize::new(0);
static ANONYMOUS_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Live regions, bytes over files, bytes over anonymous memory.
pub(super) fn totals() -> (usize, usize, usize) {
    (REGIONS.load(Ordering::Relaxed), MAPPED_BYTES.load(Ordering::Relaxed), ANONYMOUS_BYTES.load(Ordering::Relaxed))
}

/// One tensor's bytes in a region.
#[derive(Debug)]
struct Block {
    /// Counted from the region's base.
    start: usize,
    byte_len: usize,
    state: AtomicU8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// A private mapping of a file.
    File,
    /// Anonymous memory.
    Anonymous,
    /// Anonymous memory that goes to the recycled buffers as a whole, when its last block is freed.
    Recyclable {
        /// The bytes of memory behind it at most.
        touched: usize,
    },
}

/// What the granule table points at.
#[derive(Debug)]
pub(super) struct Inner {
    stretch: Option<Stretch>,
    memory: Memory,
    /// Sorted by start, disjoint.
    blocks: Box<[Block]>,
    /// For each granule, how many blocks that are not freed touch it.
    granule_blocks: Box<[AtomicU32]>,
    /// Blocks that are not freed, and one for the [`Region`] that hands them out.
    live: AtomicUsize,
}

/// A region whose blocks can be handed out. Dropping it gives up the blocks that were not.
#[derive(Debug)]
pub(crate) struct Region {
    inner: NonNull<Inner>,
    base: NonNull<u8>,
    /// What `find` counts from: this offset of the file, or of the buffer, lies at `origin_start` from the base.
    origin: u64,
    origin_start: usize,
}

// SAFETY: a region's memory is shared between threads through atomics only: a block's bytes are reached by the one
// vector that a compare-and-swap handed it to.
unsafe impl Send for Region {}
// SAFETY: as for `Send`.
unsafe impl Sync for Region {}

/// Anonymous memory that is being filled. It becomes a [`Region`] by [`Buffer::divide`].
#[derive(Debug)]
pub(crate) struct Buffer {
    /// Taken by `divide`, so that `drop` gives back what was not divided.
    stretch: Option<Stretch>,
    base: NonNull<u8>,
    /// How far the buffer's first byte lies from the base.
    lead: usize,
    byte_len: usize,
    /// For a buffer that is to be recycled, the bytes of memory behind it at most.
    touched: Option<usize>,
}

// SAFETY: a buffer owns its memory exclusively.
unsafe impl Send for Buffer {}
// SAFETY: shared access to a buffer reaches no memory behind it.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Anonymous memory of `byte_len` bytes whose address is `congruent` modulo a granule: bytes that lie so in a file
    /// can then be read by direct I/O, and keep their alignment. `None` where the system refuses.
    pub(crate) fn new(byte_len: usize, congruent: u64) -> Option<Buffer> {
        let lead = (congruent % GRANULE as u64) as usize;
        let stretch = Stretch::take(byte_len.checked_add(lead)?)?;
        Buffer::over(stretch, lead, byte_len, None)
    }

    /// Anonymous memory, recycled from a freed buffer where there is one. `capacity` is the address space to
    /// take for a new one, so that later, larger blocks fit it too: at least `byte_len`.
    pub(crate) fn recycled(byte_len: usize, capacity: usize, reuse: Reuse) -> Option<Buffer> {
        if let Some((stretch, touched)) = recycle::take(byte_len, reuse) {
            let base = NonNull::new(ptr::with_exposed_provenance_mut::<u8>(stretch.base()))?;
            let touched = Some(touched.max(byte_len));
            let buffer = Buffer { stretch: Some(stretch), base, lead: 0, byte_len, touched };
            buffer.advise_huge();
            return Some(buffer);
        }
        let stretch = Stretch::take(byte_len.max(capacity))?;
        Buffer::over(stretch, 0, byte_len, Some(byte_len))
    }

    fn over(stretch: Stretch, lead: usize, byte_len: usize, touched: Option<usize>) -> Option<Buffer> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let address = ptr::with_exposed_provenance_mut::<libc::c_void>(stretch.base());
        // What lies there is anonymous memory that nobody may touch. It is opened up rather than mapped anew: an `mmap`
        // that fails may have removed what was there before.
        // SAFETY: the stretch was taken from the reserved range and belongs to nobody else, so that no memory in use is
        // affected.
        if unsafe { libc::mprotect(address, stretch.byte_len(), protection) } != 0 {
            // Part of it may be open now.
            release(stretch);
            return None;
        }
        let base = NonNull::new(address.cast::<u8>())?;
        let buffer = Buffer { stretch: Some(stretch), base, lead, byte_len, touched };
        buffer.advise_huge();
        Some(buffer)
    }

    /// Asks for huge pages: faulting in small ones costs more than the read. The last, partial huge page is asked for
    /// only where it weighs little against the buffer.
    fn advise_huge(&self) {
        let end = self.lead + self.byte_len;
        let whole = end.next_multiple_of(GRANULE);
        let huge = if (whole - end).saturating_mul(PARTIAL_HUGE) <= end { whole } else { end / GRANULE * GRANULE };
        let Some(stretch) = self.stretch.as_ref().filter(|_| huge > 0) else { return };
        let huge = huge.min(stretch.byte_len());
        // SAFETY: the range lies in the stretch, which `self` owns. The advice changes how pages are backed, never what
        // is in them; where part of it is not mapped, or huge pages are refused, small ones are used.
        unsafe { libc::madvise(self.base.as_ptr().cast(), huge, libc::MADV_HUGEPAGE) };
    }

    /// The buffer's bytes, to be filled.
    pub(crate) fn as_uninit_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: `lead + byte_len` bytes from the base are mapped readable and writable for as long as `self` holds
        // the stretch, which the borrow ensures; the mapping is exclusively `self`'s until `divide` consumes it.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(self.lead).cast(), self.byte_len) }
    }

    /// Divides the buffer into blocks, given as (offset in the buffer, bytes): sorted, disjoint, none empty.
    /// `None` where they are not.
    ///
    /// The bytes need no proof of being filled: anonymous memory is zeroed by the system, and recycled memory holds
    /// what was there before.
    pub(crate) fn divide(mut self, blocks: impl ExactSizeIterator<Item = (usize, usize)>) -> Option<Region> {
        let (lead, byte_len) = (self.lead, self.byte_len);
        let blocks = collect_blocks(blocks, byte_len, lead)?;
        let memory = match self.touched {
            Some(touched) => Memory::Recyclable { touched },
            None => Memory::Anonymous,
        };
        let stretch = self.stretch.take()?;
        Some(Region::new(stretch, self.base, memory, blocks, (0, lead)))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(stretch) = self.stretch.take() {
            release(stretch);
        }
    }
}

/// Maps and unmaps a file where the system likes. A mapping at a fixed address that fails may leave a hole there: Linux
/// removes what was mapped before it asks the file system, and older versions before they count the memory too. Memory
/// of others could land in such a hole of the reserved range, so what will be refused must not be tried there.
fn try_mapping(file: &File, map_len: usize, offset: libc::off_t) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the system's choice touches no memory that is in use.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), map_len, protection, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping was made just now, and nothing refers to it.
    unsafe { libc::munmap(mapped, map_len) };
    Ok(())
}

/// Checks and keeps blocks that lie in `byte_len` bytes, moved by `lead`.
fn collect_blocks(
    blocks: impl ExactSizeIterator<Item = (usize, usize)>,
    byte_len: usize,
    lead: usize,
) -> Option<Box<[Block]>> {
    let mut last = 0;
    let mut kept = Vec::with_capacity(blocks.len());
    for (start, len) in blocks {
        let end = start.checked_add(len)?;
        if start < last || len == 0 || end > byte_len {
            return None;
        }
        last = end;
        kept.push(Block { start: start + lead, byte_len: len, state: AtomicU8::new(WAITING) });
    }
    Some(kept.into_boxed_slice())
}

impl Region {
    /// Maps `range` of `file` privately and writably. Its blocks are given as offsets in the file: sorted, disjoint,
    /// none empty, inside `range`.
    ///
    /// # Errors
    ///
    /// The system's, where it does not map the file; `InvalidInput` where blocks are not as described.
    ///
    /// # Safety
    ///
    /// As long as a block lives, nobody truncates the file (reading beyond its end raises SIGBUS) or writes to the
    /// mapped range (the bytes would change under a reader that may assume that they do not).
    pub(crate) unsafe fn map_file(
        file: &File,
        range: ByteRange,
        blocks: impl ExactSizeIterator<Item = ByteRange>,
    ) -> io::Result<Region> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let page_start = range.start() / PAGE as u64 * PAGE as u64;
        // The address is congruent to the offset modulo a huge page, so that the system can map the page cache's huge
        // pages as such.
        let lead = (page_start % GRANULE as u64) as usize;
        let map_len = usize::try_from(range.end() - page_start).map_err(|_| invalid())?;
        let total = lead.checked_add(map_len).ok_or_else(invalid)?;
        let mut inside = true;
        let blocks = blocks.map(|block| {
            inside &= range.contains(block);
            // Offsets in a range of `map_len`, which fits `usize`, fit too; those outside are refused below.
            ((block.start().wrapping_sub(page_start)) as usize, block.byte_len() as usize)
        });
        let blocks = collect_blocks(blocks, map_len, lead).ok_or_else(invalid)?;
        if !inside || map_len == 0 {
            return Err(invalid());
        }
        let offset = libc::off_t::try_from(page_start).map_err(|_| invalid())?;
        try_mapping(file, map_len, offset)?;
        let stretch = Stretch::take(total).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let address = ptr::with_exposed_provenance_mut::<libc::c_void>(stretch.base() + lead);
        // SAFETY: the stretch belongs to nobody else and `lead + map_len` bytes fit it, so that no memory in use is
        // replaced; the caller answers for the file.
        let mapped = unsafe { libc::mmap(address, map_len, protection, flags, file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            // There may be a hole now, and other memory in it: these addresses are never used again.
            return Err(io::Error::last_os_error());
        }
        let base = ptr::with_exposed_provenance_mut::<u8>(stretch.base());
        let base = NonNull::new(base).ok_or_else(invalid)?;
        Ok(Region::new(stretch, base, Memory::File, blocks, (page_start, lead)))
    }

    fn new(
        stretch: Stretch,
        base: NonNull<u8>,
        memory: Memory,
        blocks: Box<[Block]>,
        (origin, origin_start): (u64, usize),
    ) -> Region {
        let granule_blocks: Box<[AtomicU32]> = (0..stretch.byte_len() / GRANULE).map(|_| AtomicU32::new(0)).collect();
        for block in &blocks {
            for granule in granules(block) {
                granule_blocks[granule].fetch_add(1, Ordering::Relaxed);
            }
        }
        REGIONS.fetch_add(1, Ordering::Relaxed);
        counter(memory).fetch_add(stretch.byte_len(), Ordering::Relaxed);
        let live = AtomicUsize::new(blocks.len() + 1);
        let inner = Box::new(Inner { stretch: Some(stretch), memory, blocks, granule_blocks, live });
        let inner = NonNull::from(Box::leak(inner));
        // SAFETY: the box was leaked just now, and only `destroy` frees it, when the last count is gone.
        let published = unsafe { inner.as_ref() };
        if let Some(stretch) = &published.stretch {
            stretch.publish(inner.as_ptr());
        }
        Region { inner, base, origin, origin_start }
    }

    fn inner(&self) -> &Inner {
        // SAFETY: `self` holds one count of `live`, so the region is not destroyed while `self` exists.
        unsafe { self.inner.as_ref() }
    }

    /// Where block `position` begins in memory, whether or not it was handed out.
    #[cfg(test)]
    pub(crate) fn block_address(&self, position: usize) -> usize {
        self.base.as_ptr().addr() + self.inner().blocks[position].start
    }

    /// Hands block `position` out as a vector, once. `None` where it was handed out before, where it is not a whole
    /// number of aligned `T`s, or where no [`MappedAllocator`](super::MappedAllocator) is installed.
    pub(crate) fn take<T: Element>(&self, position: usize) -> Option<Vec<T>> {
        let block = self.inner().blocks.get(position)?;
        let elements = block.byte_len / size_of::<T>();
        // SAFETY: blocks lie inside the region's stretch, which starts at the base and is one allocation of the system.
        let address = unsafe { self.base.add(block.start) };
        if elements * size_of::<T>() != block.byte_len || !address.cast::<T>().is_aligned() {
            return None;
        }
        let layout = Layout::array::<T>(elements).ok()?;
        block.state.compare_exchange(WAITING, OUT, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        // SAFETY: the block's bytes are mapped, so initialised, and aligned for `T`, as checked; the layout has their
        // number, which is not 0. The swap above makes this call the only one that hands the block out, and the region
        // keeps it until `free`.
        let placed = match unsafe { allocator::place(address, layout) } {
            Ok(placed) => placed,
            Err(NotPlaced::Unseen) => {
                block.state.store(WAITING, Ordering::Release);
                return None;
            }
            // Whoever has the block may still use it, so it stays out.
            Err(NotPlaced::Lost) => return None,
        };
        // SAFETY: the global allocator returned `placed` for the layout of `elements` values of `T`; all of them are
        // initialised, for every bit pattern is a valid `T`; the total size is at most that of a mapping, so below
        // `isize::MAX`; nothing else owns the block.
        Some(unsafe { Vec::from_raw_parts(placed.as_ptr().cast(), elements, elements) })
    }

    /// The block that begins at `offset` of the file, or of the buffer that was divided.
    pub(crate) fn find(&self, offset: u64) -> Option<usize> {
        let start = usize::try_from(offset.checked_sub(self.origin)?).ok()?.checked_add(self.origin_start)?;
        self.inner().blocks.binary_search_by_key(&start, |block| block.start).ok()
    }

    /// The bytes of block `position`.
    pub(crate) fn byte_len_of(&self, position: usize) -> Option<usize> {
        self.inner().blocks.get(position).map(|block| block.byte_len)
    }

    /// Hands block `position` out as a vector that is never freed: for programs without a
    /// [`MappedAllocator`](super::MappedAllocator).
    ///
    /// # Safety
    ///
    /// The vector is never dropped, grown or shrunk, and the region is leaked.
    pub(crate) unsafe fn take_forever<T: Element>(&self, position: usize) -> Option<Vec<T>> {
        let block = self.inner().blocks.get(position)?;
        let elements = block.byte_len / size_of::<T>();
        // SAFETY: as in `take`.
        let address = unsafe { self.base.add(block.start) };
        if elements * size_of::<T>() != block.byte_len || !address.cast::<T>().is_aligned() {
            return None;
        }
        block.state.compare_exchange(WAITING, OUT, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        // SAFETY: the elements are initialised, aligned and owned by nobody else. The memory is not the global
        // allocator's, as `from_raw_parts` asks; it asks for that because a vector passes its memory to the allocator
        // when it is dropped or resized, which the caller rules out.
        Some(unsafe { Vec::from_raw_parts(address.as_ptr().cast(), elements, elements) })
    }

    /// Asks for what will be read from the file to come in huge pages, which is read and mapped with least work. Whoever
    /// touches a page that is not cached then has some MiB around it read.
    pub(crate) fn advise_huge(&self) {
        // Where pages are larger, huge ones are so large that some kernels cannot handle them in files.
        // SAFETY: the call only asks for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let Some(stretch) = self.inner().stretch.as_ref().filter(|_| page == PAGE as libc::c_long) else { return };
        // SAFETY: the stretch is the region's. The advice changes how much is read at a time and how it is mapped, never
        // what is in it; where it is refused, small pages are used.
        unsafe { libc::madvise(self.base.as_ptr().cast(), stretch.byte_len(), libc::MADV_HUGEPAGE) };
    }

    /// Reads `range` of the file that is mapped and fills its page tables, so that nobody waits for page faults there. No byte
    /// changes, and after a failure part may be filled.
    ///
    /// # Errors
    ///
    /// The system's, where it cannot read the file or has no such call (Linux does from 5.14 on); `InvalidInput` where the
    /// range is not mapped here, or no block in it is waiting or out: the page tables would be filled for nobody.
    pub(crate) fn populate(&self, range: ByteRange) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let inner = self.inner();
        let Some(stretch) = inner.stretch.as_ref().filter(|_| inner.memory == Memory::File) else {
            return Err(invalid());
        };
        let from_origin = |offset: u64| usize::try_from(offset.checked_sub(self.origin)?).ok();
        let start = from_origin(range.start()).ok_or_else(invalid)?;
        let end = from_origin(range.end()).and_then(|end| end.checked_add(self.origin_start)).ok_or_else(invalid)?;
        if end > stretch.byte_len() {
            return Err(invalid());
        }
        // The origin is the start of a page.
        let start = self.origin_start + start / PAGE * PAGE;
        let is_settled = |count: &AtomicU32| count.load(Ordering::Relaxed) == 0;
        let granules = inner.granule_blocks.get(start / GRANULE..end.div_ceil(GRANULE)).ok_or_else(invalid)?;
        if start >= end || granules.iter().any(is_settled) {
            return Err(invalid());
        }
        let address = ptr::with_exposed_provenance_mut(stretch.base() + start);
        // SAFETY: the addresses lie in the stretch, which stays the region's while `self` exists. The call reads pages as a
        // page fault would and never changes their bytes; what cannot be read is an error and no signal.
        if unsafe { libc::madvise(address, end - start, libc::MADV_POPULATE_READ) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Gives block `position` up, unless it was handed out.
    pub(crate) fn discard(&self, position: usize) {
        let inner = self.inner();
        let Some(block) = inner.blocks.get(position) else { return };
        if block.state.compare_exchange(WAITING, FREED, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            inner.settle(block);
            // The region's own count is still held, so this is never the last one.
            inner.live.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        (0..self.inner().blocks.len()).for_each(|position| self.discard(position));
        // SAFETY: this gives up the count that `self` held, and `self` is not used again.
        unsafe { give_up(self.inner) };
    }
}

/// Frees the block at `address`. An address at which no block is out is left alone: leaking beats corrupting.
///
/// # Safety
///
/// The caller owns the block at `address`, if there is one, and gives it up.
pub(super) unsafe fn free(address: usize) {
    let Some(region) = NonNull::new(reserve::region_at(address)) else { return };
    // SAFETY: a block that is out holds a count of its region, so the region exists at least until `give_up` below.
    let inner = unsafe { region.as_ref() };
    let Some(stretch) = &inner.stretch else { return };
    let start = address - stretch.base();
    let Ok(found) = inner.blocks.binary_search_by_key(&start, |block| block.start) else { return };
    let block = &inner.blocks[found];
    if block.state.compare_exchange(OUT, FREED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return;
    }
    inner.settle(block);
    // SAFETY: the block was out, so its count was not given up before; it is given up once, thanks to the swap.
    unsafe { give_up(region) };
}

impl Inner {
    /// Gives the memory of granules back in which `block` was the last.
    fn settle(&self, block: &Block) {
        if matches!(self.memory, Memory::Recyclable { .. }) {
            return;
        }
        let Some(stretch) = &self.stretch else { return };
        let mut empty: Option<(usize, usize)> = None;
        let discard = |(first, end): (usize, usize)| {
            let address = ptr::with_exposed_provenance_mut(stretch.base() + first * GRANULE);
            // SAFETY: no block that is waiting or out touches these granules, and blocks never come back from
            // `FREED`, so nobody reads or writes there any more.
            unsafe { libc::madvise(address, (end - first) * GRANULE, libc::MADV_DONTNEED) };
        };
        for granule in granules(block) {
            if self.granule_blocks[granule].fetch_sub(1, Ordering::AcqRel) != 1 {
                continue;
            }
            match &mut empty {
                Some((_, end)) if *end == granule => *end = granule + 1,
                _ => {
                    if let Some(stretch) = empty.replace((granule, granule + 1)) {
                        discard(stretch);
                    }
                }
            }
        }
        if let Some(last) = empty {
            discard(last);
        }
    }
}

/// Gives up one count, and the region with the last one.
///
/// # Safety
///
/// The caller owns one count of the region's `live` and gives it up.
unsafe fn give_up(region: NonNull<Inner>) {
    // SAFETY: the caller's count keeps the region alive up to here.
    let inner = unsafe { region.as_ref() };
    if inner.live.fetch_sub(1, Ordering::AcqRel) != 1 {
        return;
    }
    if let Some(stretch) = &inner.stretch {
        stretch.publish(ptr::null_mut());
    }
    // SAFETY: `region` came from a leaked box; the last count is gone and the table no longer leads here, so nobody
    // else refers to it.
    let mut inner = unsafe { Box::from_raw(region.as_ptr()) };
    let Some(stretch) = inner.stretch.take() else { return };
    REGIONS.fetch_sub(1, Ordering::Relaxed);
    counter(inner.memory).fetch_sub(stretch.byte_len(), Ordering::Relaxed);
    match inner.memory {
        Memory::Recyclable { touched } => recycle::offer(stretch, touched),
        Memory::File | Memory::Anonymous => release(stretch),
    }
}

/// Puts `PROT_NONE` over a stretch, which frees its memory, and returns its address space.
pub(super) fn release(stretch: Stretch) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let address = ptr::with_exposed_provenance_mut::<libc::c_void>(stretch.base());
    // The pages are freed first: where the mapping is refused, nothing may be said of these addresses any more.
    // SAFETY: the stretch's owner gives it up, so nobody uses its memory.
    unsafe { libc::madvise(address, stretch.byte_len(), libc::MADV_DONTNEED) };
    // SAFETY: as above; the mapping stays inside the reserved range.
    let mapped = unsafe { libc::mmap(address, stretch.byte_len(), libc::PROT_NONE, flags, -1, 0) };
    // Where it is refused the addresses may still lead to the old memory, and are not handed out again.
    if mapped != libc::MAP_FAILED {
        stretch.give_back();
    }
}

/// Gives the memory behind `used` bytes of a stretch back, rounded up to whole pages.
pub(super) fn trim(stretch: &Stretch, used: usize) {
    let used = page_up(used);
    if used < stretch.byte_len() {
        let address = ptr::with_exposed_provenance_mut(stretch.base() + used);
        // SAFETY: the recycled buffers own the stretch, and no block lies in it.
        unsafe { libc::madvise(address, stretch.byte_len() - used, libc::MADV_DONTNEED) };
    }
}

/// Whether placed blocks come from the global allocator: tried with one.
pub(super) fn probe() -> bool {
    let Some(buffer) = Buffer::new(GRANULE, 0) else { return false };
    let Some(region) = buffer.divide([(0, 64)].into_iter()) else { return false };
    region.take::<u8>(0).is_some()
}

fn counter(memory: Memory) -> &'static AtomicUsize {
    match memory {
        Memory::File => &MAPPED_BYTES,
        Memory::Anonymous | Memory::Recyclable { .. } => &ANONYMOUS_BYTES,
    }
}

/// The granules that a block touches.
fn granules(block: &Block) -> std::ops::Range<usize> {
    block.start / GRANULE..(block.start + block.byte_len).div_ceil(GRANULE)
}

/// The smallest page size of the supported systems is enough for alignment of offsets where it is the real one; on
/// systems with larger pages `mmap` refuses a misaligned offset, and the tensor is copied.
const PAGE: usize = 4096;

fn page_up(byte_len: usize) -> usize {
    byte_len.next_multiple_of(PAGE)
}
