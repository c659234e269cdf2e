//! What is reported, against the definition: of two conflicting operations, the earlier has to reach the later over the
//! order of streams, records and waits of events, and waits of the host.

use proptest::prelude::*;

use super::{PER_THREAD, Program};

const BUFFERS: usize = 2;
const EVENTS: usize = 3;
const LEN: usize = 32;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write { stream: usize, buffer: usize },
    Read { stream: usize, buffer: usize },
    Record { stream: usize, event: usize },
    Wait { stream: usize, event: usize },
    Synchronize { stream: usize },
    SynchronizeEvent { event: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let (stream, buffer, event) = (0..4usize, 0..BUFFERS, 0..EVENTS);
    prop_oneof![
        3 => (stream.clone(), buffer.clone()).prop_map(|(stream, buffer)| Step::Write { stream, buffer }),
        3 => (stream.clone(), buffer).prop_map(|(stream, buffer)| Step::Read { stream, buffer }),
        3 => (stream.clone(), event.clone()).prop_map(|(stream, event)| Step::Record { stream, event }),
        3 => (stream.clone(), event.clone()).prop_map(|(stream, event)| Step::Wait { stream, event }),
        1 => stream.prop_map(|stream| Step::Synchronize { stream }),
        1 => event.prop_map(|event| Step::SynchronizeEvent { event }),
    ]
}

/// Every operation with the set of those before it, by the definition.
#[derive(Default)]
struct Definition {
    before: Vec<Vec<bool>>,
    last: [Option<usize>; 4],
    records: [Option<usize>; EVENTS],
    /// What the host waited for, with all before it.
    host: Vec<bool>,
    accesses: Vec<(usize, usize, bool)>,
}

impl Definition {
    fn add(&mut self, stream: usize, waits: Option<usize>) -> usize {
        let op = self.before.len();
        let mut before = self.host.clone();
        before.resize(op, false);
        for &from in self.last[stream].iter().chain(&waits) {
            before[from] = true;
            for (at, &earlier) in self.before[from].iter().enumerate() {
                before[at] |= earlier;
            }
        }
        self.before.push(before);
        self.last[stream] = Some(op);
        op
    }

    /// Adds an access; says whether an earlier one conflicts that does not come before.
    fn access(&mut self, stream: usize, buffer: usize, write: bool) -> bool {
        let op = self.add(stream, None);
        let unordered =
            self.accesses.iter().any(|&(other, of, wrote)| of == buffer && (wrote || write) && !self.before[op][other]);
        self.accesses.push((op, buffer, write));
        unordered
    }

    fn know(&mut self, op: Option<usize>) {
        let Some(op) = op else { return };
        self.host.resize(self.before.len(), false);
        self.host[op] = true;
        for (at, &earlier) in self.before[op].iter().enumerate() {
            self.host[at] |= earlier;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn an_operation_is_reported_if_and_only_if_the_definition_says_so(
        steps in prop::collection::vec(step(), 1..40),
        seed in 0..4u64,
    ) {
        let mut program = if seed == 0 { Program::new() } else { Program::seeded(seed) };
        let mut streams: Vec<usize> = (0..3).map(|_| program.stream()).collect();
        streams.push(PER_THREAD);
        let buffers: Vec<usize> = (0..BUFFERS).map(|_| program.device(LEN)).collect();
        let events: Vec<usize> = (0..EVENTS).map(|_| program.event()).collect();
        let mut definition = Definition::default();
        for (at, step) in steps.into_iter().enumerate() {
            let before = program.driver.violation_count;
            let expected = match step {
                Step::Write { stream, buffer } => {
                    let to = buffers[buffer];
                    program.call("cuMemsetD8Async", |d| d.set(to, &[1], LEN, streams[stream])).unwrap();
                    definition.access(stream, buffer, true)
                }
                Step::Read { stream, buffer } => {
                    // Into memory of its own: the reads have nothing else in common.
                    let to = program.pinned(LEN);
                    program.copy_out(buffers[buffer], to.bytes(), streams[stream]).unwrap();
                    definition.access(stream, buffer, false)
                }
                Step::Record { stream, event } => {
                    program.record(events[event], streams[stream]);
                    definition.records[event] = Some(definition.add(stream, None));
                    false
                }
                Step::Wait { stream, event } => {
                    program.wait(streams[stream], events[event]);
                    let record = definition.records[event];
                    definition.add(stream, record);
                    false
                }
                Step::Synchronize { stream } => {
                    program.synchronize(streams[stream]);
                    definition.know(definition.last[stream]);
                    false
                }
                Step::SynchronizeEvent { event } => {
                    program.call("cuEventSynchronize", |d| d.synchronize_event(events[event])).unwrap();
                    definition.know(definition.records[event]);
                    false
                }
            };
            prop_assert_eq!(program.driver.violation_count > before, expected, "step {} {:?}", at, step);
        }
    }
}
