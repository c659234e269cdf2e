//! The functions as a program finds them: by name, from threads of its own.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

// What the program's side of the interface says these are.
unsafe extern "C" {
    safe fn cuInit(flags: c_uint) -> c_uint;
    fn cuDeviceGetCount(count: *mut c_int) -> c_uint;
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> c_uint;
    safe fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_uint;
    safe fn cuCtxSetCurrent(context: usize) -> c_uint;
    safe fn cuCtxSynchronize() -> c_uint;
    fn cuMemAlloc_v2(address: *mut u64, len: usize) -> c_uint;
    safe fn cuMemFree_v2(address: u64) -> c_uint;
    fn cuMemHostAlloc(address: *mut usize, len: usize, flags: c_uint) -> c_uint;
    safe fn cuMemFreeHost(address: usize) -> c_uint;
    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, len: usize, stream: usize) -> c_uint;
    fn cuPointerGetAttribute(to: *mut c_void, attribute: c_uint, address: u64) -> c_uint;
    fn cuPointerGetAttributes(n: c_uint, which: *mut c_uint, to: *mut *mut c_void, address: u64) -> c_uint;
    fn cuGetErrorName(code: c_uint, name: *mut *const c_char) -> c_uint;
    safe fn cuLaunchKernel() -> c_uint;
    safe fn emulated_violations() -> u64;
    fn emulated_fail_nth(function: *const c_char, n: u64, code: c_uint);
    safe fn emulated_fail_none() -> u64;
    fn emulated_report_json(to: *mut c_char, room: usize) -> usize;
}

/// The one test of the process's driver: others have drivers of their own.
#[test]
fn a_program_finds_the_driver_and_each_of_its_threads_has_a_default_stream() {
    assert_eq!(cuInit(1), 1);
    assert_eq!(cuInit(0), 0);
    let (mut count, mut context, mut device, mut pinned) = (0, 0, 0, 0);
    // SAFETY: every place lives until the end of the test.
    unsafe {
        assert_eq!(cuDeviceGetCount(&raw mut count), 0);
        assert_eq!(cuDeviceGetCount(std::ptr::null_mut()), 1);
        assert_eq!(cuMemAlloc_v2(&raw mut device, 64), 201, "there is no context yet");
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut context, 0), 0);
        assert_eq!(cuCtxSetCurrent(context), 0);
        assert_eq!(cuMemAlloc_v2(&raw mut device, 64), 0);
        assert_eq!(cuMemHostAlloc(&raw mut pinned, 64, 0), 0);
    }
    assert_eq!(count, 2);

    let (mut kind, mut ordinal) = (0 as c_uint, 0 as c_int);
    let mut which = [2, 9];
    let mut places: [*mut c_void; 2] = [(&raw mut kind).cast(), (&raw mut ordinal).cast()];
    // SAFETY: the places are of the attributes' types.
    unsafe {
        assert_eq!(cuPointerGetAttributes(2, which.as_mut_ptr(), places.as_mut_ptr(), device + 63), 0);
        assert_eq!((kind, ordinal), (2, 0));
        assert_eq!(cuPointerGetAttributes(2, which.as_mut_ptr(), places.as_mut_ptr(), 16), 0);
        assert_eq!((kind, ordinal), (0, -2));
        assert_eq!(cuPointerGetAttribute(places[0], 2, pinned as u64), 0);
        assert_eq!(kind, 1);
        assert_eq!(cuPointerGetAttribute(places[0], 2, 16), 1);
    }

    let mut name = std::ptr::null();
    // SAFETY: what is written is a C string that lives as long as the program.
    let name = unsafe {
        assert_eq!(cuGetErrorName(12345, &raw mut name), 1);
        assert!(name.is_null());
        assert_eq!(cuGetErrorName(700, &raw mut name), 0);
        CStr::from_ptr(name)
    };
    assert_eq!(name, c"CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(cuLaunchKernel(), 801);

    let copy = move || {
        assert_eq!(cuCtxSetCurrent(context), 0);
        // SAFETY: the pinned memory lives until it is freed below, after all copies.
        assert_eq!(unsafe { cuMemcpyHtoDAsync_v2(device, pinned, 64, 2) }, 0);
    };
    copy();
    copy();
    assert_eq!(emulated_violations(), 0);
    std::thread::spawn(copy).join().unwrap();
    assert_eq!(emulated_violations(), 1, "two threads have two queues");

    // SAFETY: the name is a C string.
    unsafe { emulated_fail_nth(c"cuMemAlloc_v2".as_ptr(), 1, 2) };
    let mut none = 0;
    // SAFETY: the place lives.
    assert_eq!((unsafe { cuMemAlloc_v2(&raw mut none, 64) }, none), (2, 0));
    assert_eq!(emulated_fail_none(), 0);

    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!((cuMemFree_v2(device), cuMemFreeHost(pinned)), (0, 0));
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_eq!(emulated_violations(), 1);
    let mut report = [1u8; 40];
    // SAFETY: the room is the buffer's.
    let len = unsafe { emulated_report_json(report.as_mut_ptr().cast(), report.len()) };
    assert!(len > report.len());
    assert_eq!(report.last(), Some(&0), "what is cut ends too");
    assert!(report.starts_with(b"{\"violation_count\":1,"));
}
