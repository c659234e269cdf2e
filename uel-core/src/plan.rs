//! Which positioned reads bring the wanted bytes: sorted, coalesced over small gaps, cut into chunks.

use crate::ByteRange;
use crate::source::Hints;

/// Where chunks are cut, as far as the chunk is longer: a multiple of the page size and of the blocks of direct I/O.
const CUT_ALIGNMENT: u64 = 4096;

/// How a [`ReadPlan`] shapes its reads.
///
/// ```
/// use uel_core::PlanOptions;
/// use uel_core::source::Hints;
/// assert_eq!(PlanOptions::default(), PlanOptions::from(Hints::default()));
/// assert_eq!(PlanOptions::default().with_gap(0).gap, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Up to this many unwanted bytes between two wanted ones are read along.
    pub gap: u64,
    /// No read is longer; 0 counts as 1.
    pub chunk: u64,
}

impl PlanOptions {
    /// Reads up to `gap` unwanted bytes along rather than make a second request.
    pub fn with_gap(mut self, gap: u64) -> Self {
        self.gap = gap;
        self
    }

    /// Makes no read longer than `chunk` bytes.
    pub fn with_chunk(mut self, chunk: u64) -> Self {
        self.chunk = chunk;
        self
    }
}

impl Default for PlanOptions {
    fn default() -> Self {
        Hints::default().into()
    }
}

impl From<Hints> for PlanOptions {
    fn from(hints: Hints) -> Self {
        Self { gap: hints.gap, chunk: hints.chunk }
    }
}

/// Bytes that a caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request {
    /// Which file, counted from 0.
    pub file: usize,
    /// Which bytes of it.
    pub range: ByteRange,
}

/// The share of one request in one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The position of the request in the slice that was planned.
    pub request: usize,
    /// The bytes in the file. They lie within the read and within the request.
    pub range: ByteRange,
}

/// One positioned read, borrowed from its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlannedRead<'p> {
    /// Which file.
    pub file: usize,
    /// Which bytes of it: at most a chunk, and some of them wanted at either end.
    pub range: ByteRange,
    /// Which requests these bytes serve, by the start of their parts.
    pub parts: &'p [Part],
}

/// A stretch of one file whose requests lie no further than the gap apart, before it is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'p> {
    /// Which file.
    pub file: usize,
    /// Which bytes of it, gaps included.
    pub range: ByteRange,
    /// The positions of its requests in the slice that was planned, by their start.
    pub requests: &'p [usize],
}

/// The reads that serve a list of requests.
///
/// Requests may come in any order, overlap, stand twice or be empty, and lie in several files. Every wanted byte is
/// read exactly once, whoever wants it; reads are disjoint and stand in the order of the files. Planning costs one
/// sort (none where the requests are sorted) and one pass.
///
/// ```
/// use uel_core::plan::Request;
/// use uel_core::{ByteRange, PlanOptions, ReadPlan};
/// let request = |start, end| Request { file: 0, range: ByteRange::new(start, end).unwrap() };
/// let requests = [request(100, 200), request(0, 90), request(5000, 5010)];
/// let plan = ReadPlan::new(&requests, PlanOptions::default().with_gap(16));
/// let ranges: Vec<_> = plan.reads().map(|read| read.range.to_string()).collect();
/// assert_eq!(ranges, ["0..200", "5000..5010"]);
/// assert_eq!((plan.wanted_bytes(), plan.gap_bytes()), (200, 10));
/// ```
#[derive(Clone, Debug, Default)]
pub struct ReadPlan {
    /// Positions of the requests that want bytes, by file and start.
    order: Vec<usize>,
    runs: Vec<Stretch>,
    reads: Vec<Stretch>,
    parts: Vec<Part>,
    wanted_bytes: u64,
    planned_bytes: u64,
}

/// A run or read. Its share of the flat array ends at `items_end`, where that of the next one begins.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    file: usize,
    range: ByteRange,
    items_end: usize,
}

impl ReadPlan {
    /// Plans the reads for `requests`. Their ranges are taken as they are, so they should be checked against the
    /// lengths of the files before: a plan has at least one entry per chunk.
    pub fn new(requests: &[Request], options: PlanOptions) -> Self {
        let mut wanted: Vec<(Request, usize)> = Vec::with_capacity(requests.len());
        wanted.extend(requests.iter().copied().zip(0..).filter(|(request, _)| !request.range.is_empty()));
        // The position counts as the last key, so that equal requests come in a definite order.
        if !wanted.is_sorted() {
            wanted.sort_unstable();
        }

        let mut plan = Self { parts: Vec::with_capacity(wanted.len()), ..Self::default() };
        let (mut segments, mut active) = (Vec::new(), Vec::new());
        let mut rest = wanted.as_slice();
        while !rest.is_empty() {
            let count = first_run(rest, options.gap, &mut segments);
            let (members, later) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            plan.push_run(members, &segments, options.chunk.max(1), &mut active);
            rest = later;
        }
        plan.order = wanted.into_iter().map(|(_, position)| position).collect();
        plan
    }

    /// Cuts one run into reads and gives each request its parts.
    fn push_run(
        &mut self,
        members: &[(Request, usize)],
        segments: &[ByteRange],
        chunk: u64,
        active: &mut Vec<(ByteRange, usize)>,
    ) {
        let (Some(first), Some(last), Some((Request { file, .. }, _))) =
            (segments.first(), segments.last(), members.first())
        else {
            return;
        };
        let (file, run_end) = (*file, last.end());
        let items_before = self.runs.last().map_or(0, |run| run.items_end);
        let items_end = items_before + members.len();
        self.runs.push(Stretch { file, range: span(first.start(), run_end), items_end });
        self.wanted_bytes =
            segments.iter().fold(self.wanted_bytes, |sum, segment| sum.saturating_add(segment.byte_len()));

        active.clear();
        let mut members = members.iter().peekable();
        let mut segments = segments.iter().peekable();
        let mut end = 0;
        while let Some(segment) = segments.peek() {
            let start = segment.start().max(end);
            let limit = start.saturating_add(chunk);
            let aligned = limit - limit % CUT_ALIGNMENT;
            let cut = match limit {
                _ if run_end <= limit => run_end,
                _ if aligned > start => aligned,
                _ => limit,
            };
            // A cut inside a gap ends the read before the gap, and the next one starts behind it.
            while let Some(segment) = segments.next_if(|segment| segment.end() <= cut) {
                end = segment.end();
            }
            if segments.peek().is_some_and(|segment| segment.start() < cut) {
                end = cut;
            }

            let parts = &mut self.parts;
            active.retain(|&(range, request)| {
                parts.push(Part { request, range: span(start, range.end().min(end)) });
                range.end() > end
            });
            while let Some(&(Request { range, .. }, request)) = members.next_if(|(r, _)| r.range.start() < end) {
                parts.push(Part { request, range: span(range.start(), range.end().min(end)) });
                if range.end() > end {
                    active.push((range, request));
                }
            }
            self.planned_bytes = self.planned_bytes.saturating_add(end - start);
            self.reads.push(Stretch { file, range: span(start, end), items_end: self.parts.len() });
        }
    }

    /// The runs, by file and offset.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = Run<'_>> + Clone {
        (0..self.runs.len()).map(|at| {
            let (run, requests) = share(&self.runs, &self.order, at).unwrap_or_default();
            Run { file: run.file, range: run.range, requests }
        })
    }

    /// The reads, by file and offset. They are disjoint.
    pub fn reads(&self) -> impl ExactSizeIterator<Item = PlannedRead<'_>> + DoubleEndedIterator + Clone {
        (0..self.reads.len()).map(|at| self.read(at).unwrap_or_default())
    }

    /// The read at `position` in the order of [`reads`](Self::reads).
    pub fn read(&self, position: usize) -> Option<PlannedRead<'_>> {
        let (read, parts) = share(&self.reads, &self.parts, position)?;
        Some(PlannedRead { file: read.file, range: read.range, parts })
    }

    /// How many reads there are.
    pub fn read_count(&self) -> usize {
        self.reads.len()
    }

    /// The bytes that were asked for. What several requests share counts once.
    pub fn wanted_bytes(&self) -> u64 {
        self.wanted_bytes
    }

    /// The bytes of all reads.
    pub fn planned_bytes(&self) -> u64 {
        self.planned_bytes
    }

    /// The bytes that are read along though nobody asked for them.
    pub fn gap_bytes(&self) -> u64 {
        self.planned_bytes - self.wanted_bytes
    }
}

/// Counts the requests that begin `sorted` and lie in one run, and leaves the stretches without gap that they cover in
/// `segments`.
fn first_run(sorted: &[(Request, usize)], gap: u64, segments: &mut Vec<ByteRange>) -> usize {
    segments.clear();
    let Some((first, _)) = sorted.first() else { return 0 };
    let (mut start, mut end) = (first.range.start(), first.range.end());
    let mut count = 0;
    for (request, _) in sorted {
        let range = request.range;
        if request.file != first.file || range.start().saturating_sub(end) > gap {
            break;
        }
        if range.start() > end {
            segments.push(span(start, end));
            start = range.start();
        }
        end = end.max(range.end());
        count += 1;
    }
    segments.push(span(start, end));
    count
}

/// The stretch at `position`, with its share of the flat array.
fn share<'p, T>(stretches: &[Stretch], items: &'p [T], position: usize) -> Option<(Stretch, &'p [T])> {
    let stretch = *stretches.get(position)?;
    let before = position.checked_sub(1).and_then(|before| stretches.get(before));
    let items_start = before.map_or(0, |before| before.items_end);
    Some((stretch, items.get(items_start..stretch.items_end)?))
}

/// For ends that are in order by construction.
fn span(start: u64, end: u64) -> ByteRange {
    debug_assert!(start <= end, "{start}..{end}");
    ByteRange::new(start, end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(file: usize, start: u64, end: u64) -> Request {
        Request { file, range: ByteRange::new(start, end).unwrap() }
    }

    fn ranges(plan: &ReadPlan) -> Vec<(u64, u64)> {
        plan.reads().map(|read| (read.range.start(), read.range.end())).collect()
    }

    #[test]
    fn nothing_wanted_nothing_read() {
        for requests in [&[][..], &[request(0, 5, 5), request(3, 0, 0)]] {
            let plan = ReadPlan::new(requests, PlanOptions::default());
            assert_eq!((plan.read_count(), plan.runs().len(), plan.planned_bytes()), (0, 0, 0));
            assert_eq!(plan.read(0), None);
        }
    }

    #[test]
    fn cuts_lie_on_pages() {
        let options = PlanOptions { gap: 0, chunk: 8192 };
        let plan = ReadPlan::new(&[request(0, 100, 30_000)], options);
        assert_eq!(ranges(&plan), [(100, 8192), (8192, 16384), (16384, 24576), (24576, 30_000)]);
        let whole = ReadPlan::new(&[request(0, 100, 8292)], options);
        assert_eq!(ranges(&whole), [(100, 8292)]);
    }

    #[test]
    fn a_cut_in_a_gap_drops_the_gap() {
        let plan =
            ReadPlan::new(&[request(0, 0, 4000), request(0, 5000, 9000)], PlanOptions { gap: 1000, chunk: 4500 });
        assert_eq!(ranges(&plan), [(0, 4000), (5000, 9000)]);
        assert_eq!((plan.runs().len(), plan.gap_bytes()), (1, 0));
    }

    #[test]
    fn one_read_serves_all_who_want_it() {
        let requests = [request(0, 10, 20), request(0, 0, 100), request(0, 10, 20), request(1, 0, 1)];
        let plan = ReadPlan::new(&requests, PlanOptions { gap: 0, chunk: 50 });
        assert_eq!(ranges(&plan), [(0, 50), (50, 100), (0, 1)]);
        let served: Vec<_> =
            plan.reads().map(|read| read.parts.iter().map(|p| p.request).collect::<Vec<_>>()).collect();
        assert_eq!(served, [vec![1, 0, 2], vec![1], vec![3]]);
        assert_eq!(plan.runs().map(|run| run.requests).collect::<Vec<_>>(), [&[1, 0, 2][..], &[3]]);
        assert_eq!((plan.wanted_bytes(), plan.planned_bytes()), (101, 101));
    }

    #[test]
    fn the_end_of_the_offsets_is_no_trap() {
        let top = u64::MAX;
        let requests = [request(0, top - 10_000, top), request(0, 0, 1), request(1, 0, top)];
        let plan = ReadPlan::new(&requests, PlanOptions { gap: top, chunk: top });
        assert_eq!(ranges(&plan), [(0, top), (0, top)]);
        let plan = ReadPlan::new(&requests[..1], PlanOptions { gap: 0, chunk: 4096 });
        assert_eq!(plan.planned_bytes(), 10_000);
    }

    #[test]
    fn measured_a_hundred_thousand_tensors_plan_at_once() {
        let mut at = 14_500_000;
        let mut requests: Vec<_> = (0..117_410u64)
            .map(|i| {
                let start = at;
                at += 2 + i % 7 * 40_000;
                request(0, start, at)
            })
            .collect();
        for _ in 0..2 {
            let before = std::time::Instant::now();
            let plan = ReadPlan::new(&requests, PlanOptions::default());
            let took = before.elapsed();
            println!("{} requests, {} reads, {took:?}", requests.len(), plan.read_count());
            assert_eq!(plan.planned_bytes(), at - 14_500_000);
            // Generous: the tests are not optimised and share the machine.
            assert!(took.as_millis() < 1000, "{took:?}");
            requests.reverse();
        }
    }

    fn requests() -> impl Strategy<Value = Vec<Request>> {
        let small = (0..3usize, 0..20_000u64, 0..300u64);
        let large = (0..3usize, 0..20_000u64, 0..30_000u64);
        let one = prop_oneof![4 => small, 1 => large].prop_map(|(file, at, len)| request(file, at, at + len));
        proptest::collection::vec(one, 0..40)
    }

    fn disjoint() -> impl Strategy<Value = Vec<Request>> {
        proptest::collection::vec((0..500u64, 0..3000u64), 0..40)
            .prop_map(|steps| {
                let mut at = 0;
                let place = |(skip, len): (u64, u64)| {
                    at += skip + len;
                    request(0, at - len, at)
                };
                steps.into_iter().map(place).collect::<Vec<_>>()
            })
            .prop_shuffle()
    }

    fn options() -> impl Strategy<Value = PlanOptions> {
        let chunk = prop_oneof![0..50u64, 50..10_000u64, Just(4096), Just(8192), Just(u64::MAX)];
        (prop_oneof![Just(0), 0..2000u64, Just(u64::MAX)], chunk).prop_map(|(gap, chunk)| PlanOptions { gap, chunk })
    }

    /// Which bytes of a file `requests` want, byte by byte.
    fn wanted(requests: &[Request], file: usize) -> std::collections::BTreeSet<u64> {
        let of_file = requests.iter().filter(|request| request.file == file);
        of_file.flat_map(|request| request.range.start()..request.range.end()).collect()
    }

    fn holds(requests: &[Request], options: PlanOptions) -> Result<(), TestCaseError> {
        let plan = ReadPlan::new(requests, options);
        let chunk = options.chunk.max(1);
        let mut covered: Vec<u64> = requests.iter().map(|request| request.range.start()).collect();
        let mut before: Option<PlannedRead<'_>> = None;
        for read in plan.reads() {
            prop_assert!(!read.range.is_empty() && read.range.byte_len() <= chunk);
            if let Some(before) = before {
                let follows = before.file < read.file || before.range.end() <= read.range.start();
                prop_assert!(follows, "{before:?} then {read:?}");
                let cut = read.range.start();
                let touches = before.file == read.file && before.range.end() == cut;
                prop_assert!(!touches || chunk < 2 * CUT_ALIGNMENT || cut.is_multiple_of(CUT_ALIGNMENT));
            }
            before = Some(read);
            prop_assert_eq!(read.parts.iter().map(|part| part.range.start()).min(), Some(read.range.start()));
            prop_assert_eq!(read.parts.iter().map(|part| part.range.end()).max(), Some(read.range.end()));
            prop_assert!(read.parts.is_sorted_by_key(|part| part.range.start()));
            for part in read.parts {
                let request = requests[part.request];
                prop_assert_eq!(request.file, read.file);
                prop_assert!(read.range.contains(part.range) && request.range.contains(part.range));
                // Parts of one request follow each other without gap or overlap.
                prop_assert_eq!(covered[part.request], part.range.start());
                prop_assert!(!part.range.is_empty());
                covered[part.request] = part.range.end();
            }
        }
        for (covered, request) in covered.iter().zip(requests) {
            prop_assert_eq!(*covered, request.range.end());
        }

        let mut members = 0;
        let mut gaps = 0;
        let mut previous: Option<Run<'_>> = None;
        for run in plan.runs() {
            members += run.requests.len();
            let mut end = run.range.start();
            for &at in run.requests {
                let range = requests[at].range;
                prop_assert!(run.range.contains(range) && requests[at].file == run.file);
                prop_assert!(range.start().saturating_sub(end) <= options.gap);
                gaps += range.start().saturating_sub(end);
                end = end.max(range.end());
            }
            prop_assert_eq!(end, run.range.end());
            if let Some(previous) = previous {
                let apart = previous.file < run.file || run.range.start() - previous.range.end() > options.gap;
                prop_assert!(apart);
            }
            previous = Some(run);
        }
        prop_assert_eq!(members, requests.iter().filter(|request| !request.range.is_empty()).count());
        prop_assert!(plan.gap_bytes() <= gaps);
        let distinct: usize = (0..3).map(|file| wanted(requests, file).len()).sum();
        prop_assert_eq!(plan.wanted_bytes(), distinct as u64);
        prop_assert_eq!(plan.planned_bytes(), plan.reads().map(|read| read.range.byte_len()).sum::<u64>());
        Ok(())
    }

    proptest! {
        #[test]
        fn any_requests_are_served_exactly(requests in requests(), options in options()) {
            holds(&requests, options)?;
        }

        #[test]
        fn disjoint_requests_in_any_order_give_one_plan(requests in disjoint(), options in options()) {
            holds(&requests, options)?;
            let mut sorted = requests.clone();
            sorted.sort();
            let (plan, of_sorted) = (ReadPlan::new(&requests, options), ReadPlan::new(&sorted, options));
            prop_assert_eq!(ranges(&plan), ranges(&of_sorted));
            let again = ReadPlan::new(&requests, options);
            prop_assert!(plan.reads().eq(again.reads()));
        }
    }
}
