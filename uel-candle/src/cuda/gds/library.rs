//! The library cuFile: found when the program runs, and opened for as long as streams use it.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::super::descriptor::keeping_descriptor_0;
use crate::stream::road::Gds;

/// The names under which the library is looked for.
const NAMES: [&CStr; 2] = [c"libcufile.so.0", c"libcufile.so"];

/// What the kernel module gives to the library.
const KERNEL_MODULE: &str = "/dev/nvidia-fs0";

/// Success, in every number that the library gives.
const SUCCESS: c_uint = 0;

/// `CUfileError_t`: an error of the library, and one of the driver.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct FileError {
    file: c_uint,
    driver: c_uint,
}

impl FileError {
    /// What failed, in words.
    pub(super) fn check(self, what: &str) -> Result<(), String> {
        match (self.file, self.driver) {
            (SUCCESS, _) => Ok(()),
            (file, SUCCESS) => Err(format!("{what} failed with error {file} of cuFile")),
            (file, driver) => Err(format!("{what} failed with error {file} of cuFile, {driver} of the driver")),
        }
    }
}

/// `CUfileDescr_t`.
#[repr(C)]
pub(super) struct Descriptor {
    pub(super) kind: c_int,
    pub(super) file: Handle,
    pub(super) operations: *const c_void,
}

#[repr(C)]
pub(super) union Handle {
    pub(super) descriptor: c_int,
    /// What makes the union as large, and as aligned, as it is.
    _pointer: *const c_void,
}

/// The beginning of `CUfileDrvProps_t`, and room for more than any version has behind it.
#[repr(C)]
struct Properties {
    major_version: c_uint,
    minor_version: c_uint,
    poll_threshold: usize,
    max_direct_read: usize,
    /// A bit for each kind of file system and disk that can be read directly.
    status: c_uint,
    control: c_uint,
    rest: [u64; 32],
}

type Open = unsafe extern "C" fn() -> FileError;
type GetProperties = unsafe extern "C" fn(*mut Properties) -> FileError;
type Register = unsafe extern "C" fn(*mut *mut c_void, *mut Descriptor) -> FileError;
type Deregister = unsafe extern "C" fn(*mut c_void);
type Read = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, libc::off_t, libc::off_t) -> isize;

/// The functions of the library. It is never unloaded.
pub(super) struct Library {
    open: Open,
    /// The one that counts who uses the library. The older one closes it for everybody, and is left alone.
    close: Option<Open>,
    properties: GetProperties,
    pub(super) register: Register,
    pub(super) deregister: Deregister,
    pub(super) read: Read,
}

impl Library {
    fn load() -> Result<Library, String> {
        let load = |name: &CStr| {
            // SAFETY: the name is a C string; the library's initialisers are those of any program with it.
            let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            (!library.is_null()).then_some(library)
        };
        let library = NAMES.iter().find_map(|name| load(name)).ok_or("there is no library libcufile.so.0")?;
        let symbol = |name: &CStr| {
            // SAFETY: the library was loaded; the name is a C string.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!symbol.is_null()).then_some(symbol)
        };
        let lacks = |name: &CStr| format!("the library cuFile lacks {}", name.to_string_lossy());
        macro_rules! function {
            ($name:literal as $type:ty) => {
                // SAFETY: the function of this name has this type, by the library's header.
                symbol($name).map(|found| unsafe { std::mem::transmute::<*mut c_void, $type>(found) })
            };
        }
        Ok(Library {
            open: function!(c"cuFileDriverOpen" as Open).ok_or_else(|| lacks(c"cuFileDriverOpen"))?,
            close: function!(c"cuFileDriverClose_v2" as Open),
            properties: function!(c"cuFileDriverGetProperties" as GetProperties)
                .ok_or_else(|| lacks(c"cuFileDriverGetProperties"))?,
            register: function!(c"cuFileHandleRegister" as Register).ok_or_else(|| lacks(c"cuFileHandleRegister"))?,
            deregister: function!(c"cuFileHandleDeregister" as Deregister)
                .ok_or_else(|| lacks(c"cuFileHandleDeregister"))?,
            read: function!(c"cuFileRead" as Read).ok_or_else(|| lacks(c"cuFileRead"))?,
        })
    }
}

/// The library while it is open.
pub(super) struct Opened {
    pub(super) library: &'static Library,
    /// Whether it has GPUDirect Storage for any kind of file system, and not the compatibility mode alone.
    pub(super) is_direct: bool,
}

impl Opened {
    fn new() -> Result<Opened, String> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Library::load).as_ref().map_err(String::clone)?;
        // Without its kernel module, cuFile has been seen to close descriptor 0, which is not its own.
        // SAFETY: the functions are called as the library's header says.
        keeping_descriptor_0(|| unsafe { (library.open)() }).check("cuFileDriverOpen")?;
        // From here on it is closed again, whatever happens.
        let mut opened = Opened { library, is_direct: false };
        let mut properties = Properties {
            major_version: 0,
            minor_version: 0,
            poll_threshold: 0,
            max_direct_read: 0,
            status: 0,
            control: 0,
            rest: [0; 32],
        };
        // SAFETY: there is room for the properties of any version.
        unsafe { (library.properties)(&raw mut properties) }.check("cuFileDriverGetProperties")?;
        opened.is_direct = properties.status != 0;
        Ok(opened)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let Some(close) = self.library.close else { return };
        // SAFETY: it was opened once for this value; every file was deregistered before, as each holds the value.
        if let Err(why) = unsafe { close() }.check("cuFileDriverClose") {
            tracing::warn!(why, "cannot close cuFile");
        }
    }
}

/// The library stays open between streams, because to open it may take seconds.
static OPEN: Mutex<Option<Arc<Opened>>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Arc<Opened>>> {
    crate::sync::lock(&OPEN)
}

/// The library, opened, or why it is not used.
pub(super) fn open(gds: Gds) -> Result<Arc<Opened>, String> {
    // To open it would take seconds, for nothing.
    if gds == Gds::Auto && !Path::new(KERNEL_MODULE).exists() {
        return Err("the kernel module nvidia-fs is not loaded".to_owned());
    }
    let mut open = lock();
    let opened = match &*open {
        Some(opened) => Arc::clone(opened),
        None => Arc::clone(open.insert(Arc::new(Opened::new()?))),
    };
    match gds == Gds::Auto && !opened.is_direct {
        true => Err("cuFile has its compatibility mode only".to_owned()),
        false => Ok(opened),
    }
}

/// Closes the library where nobody uses it.
pub(in crate::cuda) fn trim() {
    let mut open = lock();
    if open.as_ref().is_some_and(|opened| Arc::strong_count(opened) == 1) {
        *open = None;
    }
}
