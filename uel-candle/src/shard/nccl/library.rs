//! The library NCCL: found when the program runs, and never linked.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use uel_core::{Error, Kind, Result};

/// The names under which the library is looked for.
const NAMES: [&CStr; 2] = [c"libnccl.so.2", c"libnccl.so"];

/// The oldest version that has communicators which do not block, as `ncclGetVersion` numbers it: 2.14.3.
const OLDEST: c_int = 21_403;

/// The bytes of an id that ranks find each other by.
pub(super) const ID_BYTES: usize = 128;

/// `ncclResult_t`: what is neither of these is an error.
pub(super) const SUCCESS: c_uint = 0;
pub(super) const IN_PROGRESS: c_uint = 7;

/// `ncclUint8`
pub(super) const UINT8: c_int = 1;

/// `NCCL_API_MAGIC`
const MAGIC: c_uint = 0xcafe_beef;
/// The version whose fields `Config` has: 2.17.0, as `NCCL_VERSION_CODE` numbers it.
const CONFIG_VERSION: c_uint = 21_700;
/// `NCCL_CONFIG_UNDEF_INT`
const UNDEFINED: c_int = c_int::MIN;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId {
    pub(super) bytes: [u8; ID_BYTES],
}

/// `ncclComm_t`
pub(super) type Comm = *mut c_void;

/// `cudaStream_t`
pub(super) type Stream = *mut c_void;

/// `ncclConfig_t`, as version 2.17 has it. Later versions take what they know of it, by its size and version.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Of a communicator whose calls return before they are done.
    pub(super) fn not_blocking() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_uint;
type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_uint;
type Init = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_uint;
type GetAsyncError = unsafe extern "C" fn(Comm, *mut c_uint) -> c_uint;
type End = unsafe extern "C" fn(Comm) -> c_uint;
type Group = unsafe extern "C" fn() -> c_uint;
type Send = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, Stream) -> c_uint;
type Receive = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, Stream) -> c_uint;
type Broadcast = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_uint;
type ErrorString = unsafe extern "C" fn(c_uint) -> *const c_char;
type LastError = unsafe extern "C" fn(Comm) -> *const c_char;

/// The functions of the library. It is never unloaded.
pub(super) struct Library {
    pub(super) version: c_int,
    pub(super) get_unique_id: GetUniqueId,
    pub(super) init: Init,
    pub(super) get_async_error: GetAsyncError,
    pub(super) finalize: End,
    pub(super) destroy: End,
    pub(super) abort: End,
    pub(super) group_start: Group,
    pub(super) group_end: Group,
    pub(super) send: Send,
    pub(super) receive: Receive,
    pub(super) broadcast: Broadcast,
    error_string: ErrorString,
    last_error: LastError,
}

/// What the loader of libraries says of its last failure.
fn loader_error() -> String {
    // SAFETY: the call needs nothing; what it returns is null, or a C string that stays until this thread's next such call.
    let text = unsafe { libc::dlerror() };
    match text.is_null() {
        true => "no reason was given".to_owned(),
        // SAFETY: as above.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    }
}

impl Library {
    /// The library, loaded once.
    ///
    /// # Errors
    ///
    /// [`Kind::Device`] where there is none, or it lacks a function.
    pub(super) fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Library::load).as_ref();
        library.map_err(|why| Error::new(Kind::Device, format!("NCCL cannot be used: {why}")))
    }

    fn load() -> Result<Library, String> {
        let mut tried = Vec::new();
        let mut library = std::ptr::null_mut();
        for name in NAMES {
            // SAFETY: the name is a C string; the library's initialisers are those of any program with it.
            library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            if !library.is_null() {
                break;
            }
            tried.push(loader_error());
        }
        if library.is_null() {
            let names: Vec<_> = NAMES.iter().map(|name| name.to_string_lossy()).collect();
            return Err(format!(
                "neither {} can be loaded; LD_LIBRARY_PATH says where else to look ({})",
                names.join(" nor "),
                tried.join("; ")
            ));
        }
        let symbol = |name: &CStr| {
            // SAFETY: the library was loaded; the name is a C string.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            match symbol.is_null() {
                true => Err(format!("the library lacks {}", name.to_string_lossy())),
                false => Ok(symbol),
            }
        };
        macro_rules! function {
            ($name:literal as $type:ty) => {
                // SAFETY: the function of this name has this type, by the library's header.
                symbol($name).map(|found| unsafe { std::mem::transmute::<*mut c_void, $type>(found) })
            };
        }
        let get_version = function!(c"ncclGetVersion" as GetVersion)?;
        let mut version = 0;
        // SAFETY: the function writes a number there.
        let code = unsafe { get_version(&raw mut version) };
        if code != SUCCESS || version < OLDEST {
            return Err(format!(
                "its version is {version} (result {code}), and 2.14.3 ({OLDEST}) is the oldest that will do"
            ));
        }
        Ok(Library {
            version,
            get_unique_id: function!(c"ncclGetUniqueId" as GetUniqueId)?,
            init: function!(c"ncclCommInitRankConfig" as Init)?,
            get_async_error: function!(c"ncclCommGetAsyncError" as GetAsyncError)?,
            finalize: function!(c"ncclCommFinalize" as End)?,
            destroy: function!(c"ncclCommDestroy" as End)?,
            abort: function!(c"ncclCommAbort" as End)?,
            group_start: function!(c"ncclGroupStart" as Group)?,
            group_end: function!(c"ncclGroupEnd" as Group)?,
            send: function!(c"ncclSend" as Send)?,
            receive: function!(c"ncclRecv" as Receive)?,
            broadcast: function!(c"ncclBroadcast" as Broadcast)?,
            error_string: function!(c"ncclGetErrorString" as ErrorString)?,
            last_error: function!(c"ncclGetLastError" as LastError)?,
        })
    }

    /// What a result means, in words, with what the library has to say of its last failure.
    pub(super) fn words(&self, code: c_uint) -> String {
        let text = |text: *const c_char| match text.is_null() {
            true => String::new(),
            // SAFETY: what these functions return is null, or a C string that nobody frees.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        // SAFETY: the functions take any number, and no communicator.
        let (meaning, last) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        match last.trim() {
            "" => format!("{meaning} (result {code})"),
            last => format!("{meaning} (result {code}; {last})"),
        }
    }
}
