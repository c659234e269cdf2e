//! The state of the driver: devices, contexts, threads, and what every call goes through.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crate::clock::Clock;
use crate::codes::{self, Code};
use crate::cufile::{Files, Mode};
use crate::memory::Memory;
use crate::nccl::Nccl;
use crate::pinned::Pinned;
use crate::queue::{Kind, Op, Queue};
use crate::random::Random;
use crate::report::{Counters, Violation};
use crate::streams::{Event, Stream};

/// The devices that there are unless `emulated_devices` says otherwise.
const DEVICES: usize = 2;
/// The memory of each, unless `emulated_memory_limit` says otherwise.
const DEVICE_MEMORY: usize = 16 << 30;
/// The first handle; what is handed out are numbers, never addresses, and none is used twice.
const FIRST_HANDLE: usize = 0x5_0000;

#[derive(Debug, Default)]
pub(crate) struct Device {
    pub(crate) memory: usize,
    pub(crate) live: usize,
    pub(crate) high_water: usize,
    /// The primary context and how often it is retained.
    pub(crate) primary: Option<(usize, usize)>,
    /// What the default pool may keep when the host synchronises.
    pub(crate) release_threshold: u64,
    pub(crate) pool_high_water: usize,
    /// Devices that the default pool's memory was opened to.
    pub(crate) pool_open_to: HashSet<usize>,
}

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) device: usize,
    pub(crate) legacy: usize,
    pub(crate) peers: HashSet<usize>,
}

/// A call that is to fail: the one after which `left` is zero.
#[derive(Debug)]
pub(crate) struct Injection {
    pub(crate) function: Option<String>,
    pub(crate) left: u64,
    pub(crate) code: Code,
}

#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) initialised: bool,
    pub(crate) pools: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) contexts: HashMap<usize, Context>,
    pub(crate) threads: HashMap<u64, Vec<usize>>,
    pub(crate) per_thread: HashMap<(u64, usize), usize>,
    pub(crate) streams: HashMap<usize, Stream>,
    pub(crate) events: HashMap<usize, Event>,
    /// What a handle was that is no more.
    pub(crate) gone: HashMap<usize, &'static str>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) ops: HashMap<u64, Op>,
    pub(crate) submitted: u64,
    /// What the host knows to be done.
    pub(crate) host: Clock,
    pub(crate) memory: Memory,
    pub(crate) pinned: Pinned,
    pub(crate) pinned_live: usize,
    pub(crate) files: Files,
    pub(crate) nccl: Nccl,
    pub(crate) random: Option<Random>,
    pub(crate) injections: Vec<Injection>,
    pub(crate) counters: Counters,
    pub(crate) violations: Vec<Violation>,
    pub(crate) violation_count: u64,
    pub(crate) calls: BTreeMap<&'static str, u64>,
    /// The call under way, and the thread that makes it.
    pub(crate) function: &'static str,
    pub(crate) thread: u64,
    next_handle: usize,
}

impl Default for Driver {
    fn default() -> Driver {
        let mut driver = Driver {
            initialised: false,
            pools: true,
            devices: Vec::new(),
            contexts: HashMap::new(),
            threads: HashMap::new(),
            per_thread: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            gone: HashMap::new(),
            queues: Vec::new(),
            ops: HashMap::new(),
            submitted: 0,
            host: Clock::default(),
            memory: Memory::default(),
            pinned: Pinned::default(),
            pinned_live: 0,
            files: Files::default(),
            nccl: Nccl::default(),
            random: None,
            injections: Vec::new(),
            counters: Counters::default(),
            violations: Vec::new(),
            violation_count: 0,
            calls: BTreeMap::new(),
            function: "",
            thread: 0,
            next_handle: FIRST_HANDLE,
        };
        driver.set_devices(DEVICES);
        driver
    }
}

impl Driver {
    /// Makes a call of a thread: counts it, fails it where a test asked for that, and lets time pass.
    pub(crate) fn call<T>(
        &mut self,
        thread: u64,
        function: &'static str,
        body: impl FnOnce(&mut Driver) -> Result<T, Code>,
    ) -> Result<T, Code> {
        self.thread = thread;
        self.function = function;
        let count = self.calls.entry(function).or_default();
        *count = count.saturating_add(1);
        self.injected()?;
        self.drift();
        body(self)
    }

    /// Forgets what was seen and asked for, and keeps what lives.
    pub(crate) fn clear(&mut self) {
        self.violations.clear();
        self.violation_count = 0;
        self.calls.clear();
        self.injections.clear();
        self.random = None;
        self.pools = true;
        self.files.mode = Mode::Direct;
        self.nccl.clear();
        let (device, pinned) = (self.counters.device_bytes.now, self.counters.pinned_bytes.now);
        self.counters = Counters::default();
        self.counters.device_bytes.rise(device);
        self.counters.pinned_bytes.rise(pinned);
        self.counters.streams.rise(self.streams.len());
        self.counters.events.rise(self.events.len());
        for device in &mut self.devices {
            device.memory = DEVICE_MEMORY;
            device.high_water = device.live;
        }
    }

    fn injected(&mut self) -> Result<(), Code> {
        let mut failed = None;
        for injection in &mut self.injections {
            if injection.function.as_deref().is_none_or(|name| name == self.function) {
                injection.left = injection.left.saturating_sub(1);
                if injection.left == 0 {
                    failed = Some(injection.code);
                }
            }
        }
        self.injections.retain(|injection| injection.left > 0);
        failed.map_or(Ok(()), Err)
    }

    /// Makes so many devices of those that there are: more of them, or fewer.
    pub(crate) fn set_devices(&mut self, count: usize) {
        self.devices.resize_with(count, || Device { memory: DEVICE_MEMORY, ..Device::default() });
    }

    /// A number that no handle had before.
    pub(crate) fn handle(&mut self) -> usize {
        self.next_handle = self.next_handle.saturating_add(0x10);
        self.next_handle
    }

    pub(crate) fn initialise(&mut self) -> Result<(), Code> {
        self.initialised = true;
        if self.devices.is_empty() { Err(codes::NO_DEVICE) } else { Ok(()) }
    }

    pub(crate) fn device(&self, ordinal: i32) -> Result<usize, Code> {
        if !self.initialised {
            return Err(codes::NOT_INITIALIZED);
        }
        usize::try_from(ordinal).ok().filter(|&device| device < self.devices.len()).ok_or(codes::INVALID_DEVICE)
    }

    pub(crate) fn device_mut(&mut self, device: usize) -> Result<&mut Device, Code> {
        self.devices.get_mut(device).ok_or(codes::INVALID_DEVICE)
    }

    /// The context that is current on the calling thread, as it is set, alive or not.
    pub(crate) fn current(&self) -> Option<usize> {
        self.threads.get(&self.thread).and_then(|stack| stack.last().copied())
    }

    /// The context that is current on the calling thread, for a call that needs one.
    pub(crate) fn context(&self) -> Result<usize, Code> {
        if !self.initialised {
            return Err(codes::NOT_INITIALIZED);
        }
        let current = self.current().ok_or(codes::INVALID_CONTEXT)?;
        if self.contexts.contains_key(&current) { Ok(current) } else { Err(codes::CONTEXT_IS_DESTROYED) }
    }

    pub(crate) fn device_of(&self, context: usize) -> Result<usize, Code> {
        self.contexts.get(&context).map(|context| context.device).ok_or(codes::INVALID_CONTEXT)
    }

    pub(crate) fn retain(&mut self, ordinal: i32) -> Result<usize, Code> {
        let device = self.device(ordinal)?;
        if let Some((context, count)) = self.device_mut(device)?.primary.as_mut() {
            *count = count.saturating_add(1);
            return Ok(*context);
        }
        let context = self.create_context(device);
        self.device_mut(device)?.primary = Some((context, 1));
        Ok(context)
    }

    fn create_context(&mut self, device: usize) -> usize {
        let context = self.handle();
        let name = format!("the legacy default stream of device {device}");
        let legacy = self.add_queue(Queue::new(name, context, Kind::Legacy));
        self.contexts.insert(context, Context { device, legacy, peers: HashSet::new() });
        context
    }

    pub(crate) fn release(&mut self, ordinal: i32) -> Result<(), Code> {
        let device = self.device(ordinal)?;
        let Some((context, count)) = self.device_mut(device)?.primary.as_mut() else {
            return Err(codes::INVALID_CONTEXT);
        };
        *count = count.saturating_sub(1);
        if *count == 0 {
            let context = *context;
            self.device_mut(device)?.primary = None;
            self.destroy_context(context);
        }
        Ok(())
    }

    /// Ends the primary context of a device whatever still holds it.
    pub(crate) fn reset_primary(&mut self, ordinal: i32) -> Result<(), Code> {
        let device = self.device(ordinal)?;
        if let Some((context, _)) = self.device_mut(device)?.primary.take() {
            self.destroy_context(context);
        }
        Ok(())
    }

    /// Runs what is left in the context and ends all that it holds. What still lives there is a leak.
    fn destroy_context(&mut self, context: usize) {
        self.synchronize_context(context);
        self.end_communicators(context);
        let blocks: Vec<(u64, Arc<str>)> = self
            .memory
            .live_blocks()
            .filter(|(_, block)| block.context == context)
            .map(|(id, block)| (id, block.label.clone()))
            .collect();
        let label: Arc<str> = self.label("").into();
        for (id, what) in blocks {
            self.violation("leak", format!("the context is destroyed while memory lives: {what}"));
            self.end_block(id, label.clone());
        }
        let streams = self.streams.extract_if(|_, stream| stream.context == context).map(|(handle, _)| handle);
        self.gone.extend(streams.map(|handle| (handle, "a stream")));
        let events = self.events.extract_if(|_, event| event.context == context).map(|(handle, _)| handle);
        self.gone.extend(events.map(|handle| (handle, "an event")));
        self.contexts.remove(&context);
        self.gone.insert(context, "a context");
    }

    pub(crate) fn set_current(&mut self, context: usize) -> Result<(), Code> {
        if context != 0 && !self.contexts.contains_key(&context) {
            return Err(self.unknown_handle(context, codes::INVALID_CONTEXT));
        }
        let stack = self.threads.entry(self.thread).or_default();
        stack.pop();
        if context != 0 {
            stack.push(context);
        }
        Ok(())
    }

    pub(crate) fn push_current(&mut self, context: usize) -> Result<(), Code> {
        if !self.contexts.contains_key(&context) {
            return Err(self.unknown_handle(context, codes::INVALID_CONTEXT));
        }
        self.threads.entry(self.thread).or_default().push(context);
        Ok(())
    }

    pub(crate) fn pop_current(&mut self) -> Result<usize, Code> {
        self.threads.entry(self.thread).or_default().pop().ok_or(codes::INVALID_CONTEXT)
    }

    pub(crate) fn add_queue(&mut self, queue: Queue) -> usize {
        self.queues.push(queue);
        self.queues.len().saturating_sub(1)
    }

    /// The call under way in words, with what it is about.
    pub(crate) fn label(&self, about: &str) -> String {
        format!("{}{about} on thread {}", self.function, self.thread)
    }

    /// What to answer to a handle that names nothing; one that once did is a violation too.
    pub(crate) fn unknown_handle(&mut self, handle: usize, code: Code) -> Code {
        if let Some(what) = self.gone.get(&handle) {
            let message = format!("{} uses {what} that was destroyed, {handle:#x}", self.label(""));
            self.violation("destroyed handle", message);
        }
        code
    }
}
