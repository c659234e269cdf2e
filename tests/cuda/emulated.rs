//! The controls of the emulated driver, as far as the driver is that one.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::Device;
use serde_json::Value;

/// How many random schedules a test is run with.
const SCHEDULES: u64 = 16;

/// Devices of tests that need several.
const MOST_DEVICES: u32 = 4;

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub(crate) const OUT_OF_MEMORY: u32 = 2;

/// `CUDA_ERROR_LAUNCH_FAILED`, for want of a better one.
const FAILED: u32 = 719;

/// What a function of the driver says when it refuses.
pub(crate) fn refusal(function: &str) -> u32 {
    if function.contains("Alloc") { OUT_OF_MEMORY } else { FAILED }
}

/// The control functions of the emulated driver.
// Tests use them as they need.
#[allow(dead_code)]
pub(crate) struct Emulated {
    reset: extern "C" fn(),
    clear: extern "C" fn(),
    memory_limit: extern "C" fn(u64),
    memory_pools: extern "C" fn(c_int),
    seed: extern "C" fn(u64),
    cufile_mode: extern "C" fn(c_int),
    devices: extern "C" fn(c_uint),
    nccl_remote_errors: extern "C" fn(c_int),
    nccl_async_error: extern "C" fn(u64, c_uint),
    fail_nth: unsafe extern "C" fn(*const c_char, u64, c_uint),
    fail_none: extern "C" fn() -> u64,
    host_access: extern "C" fn(usize, usize, c_int) -> u64,
    violations: extern "C" fn() -> u64,
    report_json: unsafe extern "C" fn(*mut c_char, usize) -> usize,
}

/// A function of the driver that this program is linked with.
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name is a C string; the default handle is that of the program.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

#[allow(dead_code)]
impl Emulated {
    /// The controls, or `None` on a real driver.
    pub(crate) fn get() -> Option<&'static Emulated> {
        static FOUND: OnceLock<Option<Emulated>> = OnceLock::new();
        FOUND
            .get_or_init(|| {
                macro_rules! function {
                    ($name:literal as $type:ty) => {
                        // SAFETY: functions of these names are the emulated driver's and have the types of the fields.
                        unsafe { std::mem::transmute::<*mut c_void, $type>(symbol($name)?) }
                    };
                }
                Some(Emulated {
                    reset: function!(c"emulated_reset" as extern "C" fn()),
                    clear: function!(c"emulated_clear" as extern "C" fn()),
                    memory_limit: function!(c"emulated_memory_limit" as extern "C" fn(u64)),
                    memory_pools: function!(c"emulated_memory_pools" as extern "C" fn(c_int)),
                    cufile_mode: function!(c"emulated_cufile_mode" as extern "C" fn(c_int)),
                    devices: function!(c"emulated_devices" as extern "C" fn(c_uint)),
                    nccl_remote_errors: function!(c"emulated_nccl_remote_errors" as extern "C" fn(c_int)),
                    nccl_async_error: function!(c"emulated_nccl_async_error" as extern "C" fn(u64, c_uint)),
                    seed: function!(c"emulated_seed" as extern "C" fn(u64)),
                    fail_nth: function!(c"emulated_fail_nth" as unsafe extern "C" fn(*const c_char, u64, c_uint)),
                    fail_none: function!(c"emulated_fail_none" as extern "C" fn() -> u64),
                    host_access: function!(c"emulated_host_access" as extern "C" fn(usize, usize, c_int) -> u64),
                    violations: function!(c"emulated_violations" as extern "C" fn() -> u64),
                    report_json: function!(
                        c"emulated_report_json" as unsafe extern "C" fn(*mut c_char, usize) -> usize
                    ),
                })
            })
            .as_ref()
    }

    /// The memory that each device has.
    pub(crate) fn memory_limit(&self, bytes: u64) {
        (self.memory_limit)(bytes);
    }

    /// Whether the devices have stream-ordered allocations.
    pub(crate) fn memory_pools(&self, supported: bool) {
        (self.memory_pools)(supported.into());
    }

    /// Runs operations at random calls, or for 0 as late as possible.
    pub(crate) fn seed(&self, seed: u64) {
        (self.seed)(seed);
    }

    /// The same, as late as possible for every third of random numbers.
    pub(crate) fn any_seed(&self, seed: u64) {
        self.seed(if seed.is_multiple_of(3) { 0 } else { seed });
    }

    /// What there is of GPUDirect Storage: 0 all, 1 the compatibility mode, 2 nothing.
    pub(crate) fn cufile_mode(&self, mode: i32) {
        (self.cufile_mode)(mode);
    }

    /// Makes as many devices as a test needs. Those that there are stay.
    pub(crate) fn at_least_devices(&self, count: u32) {
        (self.devices)(count.max(MOST_DEVICES));
    }

    /// Whether ranks learn that another one has aborted its communicator.
    pub(crate) fn nccl_remote_errors(&self, told: bool) {
        (self.nccl_remote_errors)(told.into());
    }

    /// Makes the n-th query of a communicator from now on find an error.
    pub(crate) fn nccl_async_error(&self, n: u64, code: u32) {
        (self.nccl_async_error)(n, code);
    }

    /// Makes the n-th call from now of a function fail, or of any function.
    pub(crate) fn fail_nth(&self, function: Option<&str>, n: u64, code: u32) {
        let function = function.map(|name| CString::new(name).expect("a function's name"));
        // SAFETY: the name is a C string or null.
        unsafe { (self.fail_nth)(function.as_ref().map_or(std::ptr::null(), |name| name.as_ptr()), n, code) };
    }

    /// Makes the n-th call from now of a function be refused.
    pub(crate) fn refuse(&self, function: &str, n: u64) {
        self.fail_nth(Some(function), n, refusal(function));
    }

    /// Takes back what is still to fail; gives how many calls that were.
    pub(crate) fn fail_none(&self) -> u64 {
        (self.fail_none)()
    }

    /// As [`fail_none`](Self::fail_none); takes, too, what cudarc kept of the failure: where it befell a drop, the next call on the
    /// device would report it, and that would be one of the test.
    pub(crate) fn fail_none_on(&self, device: &Device) -> u64 {
        let left = self.fail_none();
        if let Device::Cuda(device) = device {
            let _ = device.cuda_stream().context().check_err();
        }
        left
    }

    /// Runs something with its first call failing, then its second, and so on, until it is over before that call comes:
    /// `test` is given what is to fail, and has to bear it. With a function, only its calls count.
    pub(crate) fn fail_each(&self, function: Option<&str>, code: u32, mut test: impl FnMut(u64)) -> u64 {
        for n in 1.. {
            self.fail_nth(function, n, code);
            test(n);
            if self.fail_none() > 0 {
                return n - 1;
            }
        }
        unreachable!("a program makes fewer calls than that")
    }

    /// Declares that the host touches memory now; gives the number of violations that this is.
    pub(crate) fn host_access(&self, bytes: &[u8], write: bool) -> u64 {
        (self.host_access)(bytes.as_ptr() as usize, bytes.len(), write.into())
    }

    /// How many violations there were.
    pub(crate) fn violations(&self) -> u64 {
        (self.violations)()
    }

    /// What the driver saw.
    pub(crate) fn report(&self) -> Value {
        // SAFETY: without room nothing is written.
        let len = unsafe { (self.report_json)(std::ptr::null_mut(), 0) };
        // Other threads may lengthen it meanwhile.
        let mut json = vec![0u8; len * 2 + 4096];
        // SAFETY: the room is the buffer's.
        unsafe { (self.report_json)(json.as_mut_ptr().cast(), json.len()) };
        let text = CStr::from_bytes_until_nul(&json).expect("the report ends").to_str().expect("the report is text");
        serde_json::from_str(text).expect("the report is JSON")
    }

    /// A number of the report, such as `/live/device_bytes`.
    pub(crate) fn number(&self, pointer: &str) -> u64 {
        self.report().pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no number {pointer}"))
    }

    /// How often a function was called.
    pub(crate) fn calls(&self, function: &str) -> u64 {
        self.report().pointer(&format!("/calls/{function}")).and_then(Value::as_u64).unwrap_or(0)
    }
}

/// A test's turn on the driver, of which there is one in a process. When it ends, whatever was used has to be in order:
/// on the emulated driver there are no violations, and no more live memory than at the beginning.
pub(crate) struct Turn {
    expected_violations: &'static [&'static str],
    device_bytes: u64,
    pinned_bytes: Option<u64>,
    // Dropped last, after what `drop` looks at.
    _lock: MutexGuard<'static, ()>,
}

#[allow(dead_code)]
impl Turn {
    /// Waits for the turn and has the emulated driver forget what was.
    pub(crate) fn begin() -> Turn {
        static LOCK: Mutex<()> = Mutex::new(());
        let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let mut turn = Turn { expected_violations: &[], device_bytes: 0, pinned_bytes: Some(0), _lock: lock };
        match Emulated::get() {
            // What a library keeps for the life of the process stays valid.
            Some(emulated) if emulated.number("/live/contexts") > 0 => {
                (emulated.clear)();
                turn.device_bytes = emulated.number("/live/device_bytes");
                turn.pinned_bytes = Some(emulated.number("/live/pinned_bytes"));
            }
            Some(emulated) => (emulated.reset)(),
            None => println!("not the emulated driver: what it would check is not checked"),
        }
        turn
    }

    /// Says that the test is one of the driver itself and ends with violations, all of these kinds.
    pub(crate) fn expect_violations(&mut self, kinds: &'static [&'static str]) {
        self.expected_violations = kinds;
    }

    /// Says that pinned memory may be kept for later.
    pub(crate) fn keep_pinned(&mut self) {
        self.pinned_bytes = None;
    }

    /// Runs a test as late as possible and with random schedules; on a real driver once.
    pub(crate) fn each_schedule(mut test: impl FnMut()) {
        let seeds = if Emulated::get().is_some() { SCHEDULES } else { 0 };
        for seed in 0..=seeds {
            let _turn = Turn::begin();
            if let Some(emulated) = Emulated::get() {
                emulated.seed(seed);
                println!("schedule {seed}");
            }
            test();
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(emulated) = Emulated::get().filter(|_| !std::thread::panicking()) else { return };
        let report = emulated.report();
        let found = report["violations"].as_array().into_iter().flatten();
        let kinds: Vec<&str> = found.flat_map(|violation| violation["kind"].as_str()).collect();
        let expected = self.expected_violations;
        assert_eq!(kinds.is_empty(), expected.is_empty(), "violations: {:#}", report["violations"]);
        assert!(kinds.iter().all(|kind| expected.contains(kind)), "violations: {:#}", report["violations"]);
        let (live, memory) = (&report["live"], &report["live_memory"]);
        assert_eq!(live["device_bytes"], self.device_bytes, "device memory lives: {memory:#}");
        assert_eq!(live["communicators"], 0, "communicators live");
        if let Some(pinned_bytes) = self.pinned_bytes {
            assert_eq!(live["pinned_bytes"], pinned_bytes, "pinned memory lives: {memory:#}");
        }
    }
}
