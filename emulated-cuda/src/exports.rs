//! The functions of the shared library: those of the driver under their own names, and the controls.

mod context;
mod control;
mod copy;
mod cufile;
mod device;
mod memory;
mod nccl;
mod stream;
mod unsupported;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::codes::{self, Code};
use crate::driver::Driver;

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(|| Mutex::new(control::from_environment()));

fn driver() -> MutexGuard<'static, Driver> {
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of the calling thread, which no other thread has or had.
fn thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // Without a destructor, so that a thread that ends may still call.
    thread_local!(static NUMBER: Cell<u64> = const { Cell::new(0) });
    NUMBER.with(|number| {
        if number.get() == 0 {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        number.get()
    })
}

/// Makes a call of the driver.
fn call(function: &'static str, body: impl FnOnce(&mut Driver) -> Result<(), Code>) -> Code {
    driver().call(thread(), function, body).err().unwrap_or(codes::SUCCESS)
}

/// How long a call waits for another rank. A real one would wait for ever.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
/// How long such a call leaves the driver to others.
const PAUSE: Duration = Duration::from_micros(200);

/// Makes a call that returns when work is done, which another rank may first have to come for.
fn waiting_call(function: &'static str, body: impl Fn(&mut Driver) -> Result<(), Code>) -> Code {
    let began = Instant::now();
    let mut code = call(function, &body);
    while code == codes::BLOCKED {
        std::thread::sleep(PAUSE);
        let mut driver = driver();
        (driver.thread, driver.function) = (thread(), function);
        if began.elapsed() > LONGEST_WAIT {
            let message = format!("{} waits for a rank that does not come", driver.label(""));
            driver.violation("hang", message);
            return codes::LAUNCH_TIMEOUT;
        }
        code = body(&mut driver).err().unwrap_or(codes::SUCCESS);
    }
    code
}

/// Where a call writes its result.
///
/// # Safety
///
/// The pointer is null, or a `T` can be written there, and nobody else uses it before the call returns.
unsafe fn out<'a, T>(pointer: *mut T) -> Result<&'a mut MaybeUninit<T>, Code> {
    // SAFETY: the caller's promise; what is not null can be written, and nothing is read.
    unsafe { pointer.cast::<MaybeUninit<T>>().as_mut() }.ok_or(codes::INVALID_VALUE)
}

/// Defines functions of the driver. A body has the locked driver under the name before it.
macro_rules! exports {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$driver:ident| $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(non_snake_case)]
            unsafe extern "C" fn $name($($argument: $type),*) -> $crate::codes::Code {
                $crate::exports::call(stringify!($name), |$driver: &mut $crate::driver::Driver| $body)
            }
        )*
    };
}
use exports;

/// Defines functions of the driver that return when work is done. What is asked may be asked several times.
macro_rules! waiting_exports {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$driver:ident| $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(non_snake_case)]
            extern "C" fn $name($($argument: $type),*) -> $crate::codes::Code {
                $crate::exports::waiting_call(stringify!($name), |$driver: &mut $crate::driver::Driver| $body)
            }
        )*
    };
}
use waiting_exports;
