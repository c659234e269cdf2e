//! Random programs with the right waits against a model that runs everything at once, in the order of submission.

use std::collections::HashMap;

use proptest::prelude::*;

use super::{PER_THREAD, Pinned, Program};

const LEN: usize = 64;
const BUFFERS: usize = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Copies from a pinned buffer to a device buffer.
    In {
        pinned: usize,
        device: usize,
    },
    Out {
        device: usize,
        pinned: usize,
    },
    Across {
        from: usize,
        to: usize,
    },
    Fill {
        device: usize,
        value: u8,
    },
    /// A fresh block takes the buffer's place.
    Renew {
        device: usize,
    },
    /// The host writes a pinned buffer, as it may when all that uses it is done.
    Write {
        pinned: usize,
        value: u8,
    },
}

fn step() -> impl Strategy<Value = (usize, u64, Step)> {
    let buffer = 0..BUFFERS;
    let step = prop_oneof![
        (buffer.clone(), buffer.clone()).prop_map(|(pinned, device)| Step::In { pinned, device }),
        (buffer.clone(), buffer.clone()).prop_map(|(device, pinned)| Step::Out { device, pinned }),
        (buffer.clone(), buffer.clone()).prop_map(|(from, to)| Step::Across { from, to }),
        (buffer.clone(), any::<u8>()).prop_map(|(device, value)| Step::Fill { device, value }),
        buffer.clone().prop_map(|device| Step::Renew { device }),
        (buffer, any::<u8>()).prop_map(|(pinned, value)| Step::Write { pinned, value }),
    ];
    (0..4usize, 1..3u64, step)
}

/// A program that orders what conflicts: each buffer has an event of its last use, and every use waits for the last
/// one of each of its buffers.
struct Ordered {
    program: Program,
    streams: Vec<usize>,
    device: Vec<usize>,
    pinned: Vec<Pinned>,
    events: HashMap<(bool, usize), usize>,
    /// The wait that is left out, counted from the first; a later one would be another program.
    omitted: Option<usize>,
    waits: usize,
    model_device: Vec<Vec<u8>>,
    model_pinned: Vec<Vec<u8>>,
}

impl Ordered {
    fn new(seed: u64, omitted: Option<usize>) -> Ordered {
        let mut program = if seed == 0 { Program::new() } else { Program::seeded(seed) };
        let mut streams: Vec<usize> = (0..3).map(|_| program.stream()).collect();
        streams.push(PER_THREAD);
        let device = (0..BUFFERS).map(|_| program.device(LEN)).collect();
        let pinned: Vec<Pinned> = (0..BUFFERS).map(|_| program.pinned(LEN)).collect();
        pinned.iter().for_each(|pinned| pinned.bytes().fill(0));
        Ordered {
            program,
            streams,
            device,
            pinned,
            events: HashMap::new(),
            omitted,
            waits: 0,
            model_device: vec![vec![crate::memory::POISON_ALLOCATED; LEN]; BUFFERS],
            model_pinned: vec![vec![0; LEN]; BUFFERS],
        }
    }

    /// Runs `body` on a stream, after the last uses of the given buffers.
    fn after(&mut self, stream: usize, buffers: &[(bool, usize)], body: impl FnOnce(&mut Program, usize)) {
        let stream = self.streams[stream];
        for buffer in buffers {
            if let Some(&event) = self.events.get(buffer) {
                self.waits += 1;
                if self.omitted != Some(self.waits) {
                    self.program.wait(stream, event);
                }
            }
        }
        body(&mut self.program, stream);
        for &buffer in buffers {
            let event = *self.events.entry(buffer).or_insert_with(|| self.program.event());
            self.program.record(event, stream);
        }
    }

    fn run(&mut self, steps: &[(usize, u64, Step)]) {
        for &(stream, thread, step) in steps {
            self.program.on_thread(thread);
            match step {
                Step::In { pinned, device } => {
                    let (from, to) = (self.pinned[pinned], self.device[device]);
                    self.after(stream, &[(false, pinned), (true, device)], |p, s| {
                        p.copy_in(from.bytes(), to, s).unwrap()
                    });
                    self.model_device[device] = self.model_pinned[pinned].clone();
                }
                Step::Out { device, pinned } => {
                    let (from, to) = (self.device[device], self.pinned[pinned]);
                    self.after(stream, &[(true, device), (false, pinned)], |p, s| {
                        p.copy_out(from, to.bytes(), s).unwrap()
                    });
                    self.model_pinned[pinned] = self.model_device[device].clone();
                }
                Step::Across { from, to } if from != to => {
                    let (source, target) = (self.device[from], self.device[to]);
                    self.after(stream, &[(true, from), (true, to)], |p, s| {
                        p.copy_across(source, target, LEN, s).unwrap()
                    });
                    self.model_device[to] = self.model_device[from].clone();
                }
                Step::Across { .. } => {}
                Step::Fill { device, value } => {
                    let target = self.device[device];
                    self.after(stream, &[(true, device)], |p, s| {
                        p.call("cuMemsetD8Async", |d| d.set(target, &[value], LEN, s)).unwrap();
                    });
                    self.model_device[device] = vec![value; LEN];
                }
                Step::Renew { device } => {
                    let old = self.device[device];
                    let mut new = 0;
                    self.after(stream, &[(true, device)], |p, s| {
                        p.free_on(old, s);
                        new = p.device_on(LEN, s);
                    });
                    self.device[device] = new;
                    self.model_device[device] = vec![crate::memory::POISON_ALLOCATED; LEN];
                }
                Step::Write { pinned, value } => {
                    if let Some(&event) = self.events.get(&(false, pinned)) {
                        self.program.call("cuEventSynchronize", |d| d.synchronize_event(event)).unwrap();
                    }
                    let range = self.pinned[pinned];
                    self.program.call("access", |d| Ok(d.host_access(range.address, LEN, true))).unwrap();
                    range.bytes().fill(value);
                    self.model_pinned[pinned] = vec![value; LEN];
                }
            }
        }
        let context = self.program.driver.current().unwrap();
        self.program
            .call("cuCtxSynchronize", |d| {
                d.synchronize_context(context);
                Ok(())
            })
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn ordered_programs_are_never_reported_and_do_what_they_say(
        steps in prop::collection::vec(step(), 1..40),
        seed in 0..8u64,
    ) {
        let mut ordered = Ordered::new(seed, None);
        ordered.run(&steps);
        ordered.program.assert_clean();
        for (pinned, model) in ordered.pinned.iter().zip(&ordered.model_pinned) {
            prop_assert_eq!(&*pinned.bytes(), &**model);
        }
        for at in 0..BUFFERS {
            let (address, model) = (ordered.device[at], ordered.model_device[at].clone());
            prop_assert_eq!(ordered.program.read(address, LEN, PER_THREAD), model);
        }
    }

    /// Whether a fault is found does not hang on the schedule.
    #[test]
    fn what_is_unordered_is_reported_for_every_schedule(
        mut steps in prop::collection::vec(step(), 1..40),
        omitted in 1..20usize,
    ) {
        // Where a freed block may serve again hangs on what is done, and a stale block may then be another's.
        steps.retain(|(_, _, step)| !matches!(step, Step::Renew { .. }));
        let unordered = |seed| {
            let mut ordered = Ordered::new(seed, Some(omitted));
            ordered.run(&steps);
            ordered.program.kinds().contains(&"unordered")
        };
        prop_assert_eq!(unordered(0), unordered(5));
    }
}
