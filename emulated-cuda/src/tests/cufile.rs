//! Reads of files.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use super::Program;
use crate::cufile::{
    ALREADY_REGISTERED, Arguments, DRIVER_NOT_INITIALIZED, HANDLE_NOT_REGISTERED, Mode, NOT_REGISTERED, POINTER_RANGE,
};

/// A file with the bytes 0 to 99, removed when dropped.
struct Source {
    path: PathBuf,
    file: File,
}

impl Source {
    fn new(name: &str) -> Source {
        let path = std::env::temp_dir().join(format!("emulated-cuda-{}-{name}", std::process::id()));
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        let file = File::open(&path).unwrap();
        Source { path, file }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn opened(name: &str) -> (Program, Source, usize) {
    let (mut program, source) = (Program::new(), Source::new(name));
    program.call("cuFileDriverOpen", |d| d.open_files()).unwrap();
    let descriptor = source.file.as_raw_fd();
    let handle = program.call("cuFileHandleRegister", |d| d.register_file(descriptor)).unwrap();
    (program, source, handle)
}

impl Program {
    fn read_file(&mut self, handle: usize, to: usize, len: usize, from: u64) -> Result<usize, u32> {
        // SAFETY: the tests read into device memory.
        self.call("cuFileRead", |d| unsafe { d.read_file(handle, to, len, from, 0) })
    }
}

#[test]
fn a_read_fills_device_memory_up_to_the_end_of_the_file() {
    let (mut program, _source, handle) = opened("fills");
    let (stream, device) = (program.stream(), program.device(50));
    assert_eq!(program.read_file(handle, device, 20, 30), Ok(20));
    assert_eq!(program.read(device, 20, stream), (30..50).collect::<Vec<u8>>());
    assert_eq!(program.read_file(handle, device, 50, 90), Ok(10));
    assert_eq!(program.read_file(handle, device, 50, 100), Ok(0));
    program.assert_clean();
    assert_eq!(program.read_file(handle, device, 51, 0), Err(POINTER_RANGE));
    assert_eq!(program.kinds(), ["out of bounds"]);
}

#[test]
fn a_read_comes_after_what_the_host_knows_only() {
    let (mut program, _source, handle) = opened("order");
    let stream = program.stream();
    let device = program.device_on(50, stream);
    program.read_file(handle, device, 50, 0).unwrap();
    assert_eq!(program.kinds(), ["unordered"], "the allocation");
    program.synchronize(stream);
    program.read_file(handle, device, 50, 0).unwrap();
    assert_eq!(program.kinds().len(), 1);
    program.copy_in(&[1; 50], device, stream).unwrap();
    program.read_file(handle, device, 50, 0).unwrap();
    assert_eq!(program.kinds(), ["unordered"; 2]);
}

#[test]
fn a_read_of_a_stream_runs_late_with_its_order_checked() {
    let (mut program, _source, handle) = opened("async");
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(50);
    let (len, file_offset, offset, read) = (Box::new(10usize), Box::new(5i64), Box::new(2i64), Box::new(-7isize));
    let arguments = Arguments {
        len: &raw const *len as usize,
        file_offset: &raw const *file_offset as usize,
        buffer_offset: &raw const *offset as usize,
        bytes_read: &raw const *read as usize,
    };
    let submit = |program: &mut Program, stream| {
        // SAFETY: the arguments live to the end of the test.
        program.call("cuFileReadAsync", |d| unsafe { d.read_file_async(handle, device, arguments, stream) }).unwrap();
    };
    // SAFETY: the place is this test's.
    let result = || unsafe { (arguments.bytes_read as *const isize).read_volatile() };
    submit(&mut program, one);
    assert_eq!(result(), -7);
    program.synchronize(one);
    assert_eq!(result(), 10);
    assert_eq!(program.read(device + 2, 10, one), (5..15).collect::<Vec<u8>>());
    program.assert_clean();
    submit(&mut program, one);
    program.copy_in(&[0; 5], device, other).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
    program.call("cuFileHandleDeregister", |d| d.deregister_file(handle)).unwrap();
    program.synchronize(one);
    assert_eq!(program.kinds(), ["unordered", "destroyed handle"]);
    assert_eq!(result(), -5027);
}

#[test]
fn handles_and_buffers_are_registered_once_and_before_use() {
    let (mut program, _source, handle) = opened("handles");
    let device = program.device(50);
    program.call("cuFileBufRegister", |d| d.register_buffer(device, 50)).unwrap();
    assert_eq!(program.call("cuFileBufRegister", |d| d.register_buffer(device + 10, 5)), Err(ALREADY_REGISTERED));
    assert_eq!(program.call("cuFileBufDeregister", |d| d.deregister_buffer(device + 10)), Err(NOT_REGISTERED));
    assert_eq!(program.read_file(handle + 1, device, 1, 0), Err(HANDLE_NOT_REGISTERED));
    program.assert_clean();
    program.call("cuMemFree", |d| d.free(device)).unwrap();
    assert_eq!(program.kinds(), ["invalid free"]);
    program.call("cuFileDriverClose", |d| d.close_files()).unwrap();
    assert_eq!(program.kinds(), ["invalid free", "leak"]);
}

#[test]
fn without_the_kernel_module_nothing_opens() {
    let mut program = Program::new();
    program.driver.files.mode = Mode::Absent;
    assert_eq!(program.call("cuFileDriverOpen", |d| d.open_files()), Err(DRIVER_NOT_INITIALIZED));
    assert_eq!(program.call("cuFileHandleRegister", |d| d.register_file(0)), Err(DRIVER_NOT_INITIALIZED));
    program.driver.files.mode = Mode::Compatible;
    program.call("cuFileDriverOpen", |d| d.open_files()).unwrap();
}
