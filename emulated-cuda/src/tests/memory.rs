//! Device memory and pinned memory.

use super::Program;
use crate::codes;
use crate::memory::{POISON_ALLOCATED, POISON_FREED};
use crate::pinned::POISON_PINNED;

#[test]
fn a_late_copy_sees_what_pinned_memory_holds_when_it_runs() {
    let mut program = Program::new();
    let (stream, device, source) = (program.stream(), program.device(16), program.pinned(16));
    source.bytes().fill(1);
    program.copy_in(source.bytes(), device, stream).unwrap();
    source.bytes().fill(2);
    assert_eq!(program.read(device, 16, stream), [2; 16]);
    assert_eq!(program.kinds(), ["changed source"]);
}

#[test]
fn a_pageable_source_is_taken_at_the_call() {
    let mut program = Program::new();
    let (stream, device) = (program.stream(), program.device(16));
    let mut source = vec![1; 16];
    program.copy_in(&source, device, stream).unwrap();
    source.fill(2);
    assert_eq!(program.read(device, 16, stream), [1; 16]);
    program.assert_clean();
}

#[test]
fn a_pinned_target_is_filled_late_and_a_pageable_one_at_once() {
    let mut program = Program::new();
    let (stream, device, target) = (program.stream(), program.device(16), program.pinned(16));
    program.copy_in(&[5; 16], device, stream).unwrap();
    target.bytes().fill(0);
    program.copy_out(device, target.bytes(), stream).unwrap();
    assert_eq!(target.bytes(), [0; 16]);
    assert_eq!(program.call("access", |d| Ok(d.host_access(target.address, 16, false))), Ok(1));
    assert_eq!(program.read(device, 16, stream), [5; 16]);
    assert_eq!(target.bytes(), [5; 16], "what was submitted before ran before");
    assert_eq!(program.call("access", |d| Ok(d.host_access(target.address, 16, false))), Ok(0));
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn the_host_may_read_what_a_copy_reads_and_not_write_it() {
    let mut program = Program::new();
    let (stream, device, source) = (program.stream(), program.device(16), program.pinned(16));
    program.copy_in(source.bytes(), device, stream).unwrap();
    assert_eq!(program.call("access", |d| Ok(d.host_access(source.address, 16, false))), Ok(0));
    assert_eq!(program.call("access", |d| Ok(d.host_access(source.address, 1, true))), Ok(1));
    program.synchronize(stream);
    assert_eq!(program.call("access", |d| Ok(d.host_access(source.address, 16, true))), Ok(0));
}

#[test]
fn registered_memory_is_pinned_until_it_is_not() {
    let mut program = Program::new();
    let (stream, device) = (program.stream(), program.device(64));
    let memory = vec![3u8; 64];
    let address = memory.as_ptr() as usize;
    program.call("cuMemHostRegister", |d| d.register(address, 32, 0)).unwrap();
    assert_eq!(
        program.call("cuMemHostRegister", |d| d.register(address + 31, 8, 0)),
        Err(codes::HOST_MEMORY_ALREADY_REGISTERED)
    );
    assert_eq!(program.copy_in(&memory, device, stream), Err(codes::INVALID_VALUE));
    assert_eq!(program.kinds(), ["partly pinned"]);
    program.copy_in(&memory[..32], device, stream).unwrap();
    program.call("cuMemHostUnregister", |d| d.unregister(address)).unwrap();
    assert_eq!(program.kinds(), ["partly pinned", "unordered"]);
    program.synchronize(stream);
    assert_eq!(program.kinds(), ["partly pinned", "unordered", "use after free"]);
    assert_eq!(program.call("cuMemHostUnregister", |d| d.unregister(address)), Err(codes::HOST_MEMORY_NOT_REGISTERED));
}

#[test]
fn pinned_memory_freed_under_a_copy_is_reported_and_poisoned() {
    let mut program = Program::new();
    let (stream, device, source) = (program.stream(), program.device(16), program.pinned(16));
    source.bytes().fill(1);
    program.copy_in(source.bytes(), device, stream).unwrap();
    program.free_pinned(source).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
    assert_eq!(source.bytes(), [POISON_PINNED; 16]);
    assert_eq!(program.read(device, 16, stream), [POISON_ALLOCATED; 16]);
    assert_eq!(program.kinds(), ["unordered", "use after free"]);
    assert_eq!(program.free_pinned(source), Err(codes::INVALID_VALUE));
}

#[test]
fn a_freed_block_serves_its_stream_at_once_and_others_when_ordered() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let first = program.device_on(100, one);
    program.copy_in(&[1; 100], first, one).unwrap();
    program.free_on(first, one);
    let elsewhere = program.device_on(100, other);
    assert_ne!(elsewhere, first, "nothing orders the other stream after the free");
    let second = program.device_on(100, one);
    assert_eq!(second, first);
    program.free_on(second, one);
    program.order(one, other);
    assert_eq!(program.device_on(100, other), first);
    program.assert_clean();
}

#[test]
fn a_block_freed_and_done_serves_anyone() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let first = program.device_on(100, one);
    program.free_on(first, one);
    program.synchronize(one);
    assert_eq!(program.device_on(100, other), first);
    program.assert_clean();
}

#[test]
fn fresh_and_freed_memory_is_poisoned() {
    let mut program = Program::new();
    let stream = program.stream();
    let device = program.device_on(512, stream);
    assert_eq!(program.read(device, 512, stream), [POISON_ALLOCATED; 512]);
    program.copy_in(&[1; 512], device, stream).unwrap();
    program.free_on(device, stream);
    program.synchronize(stream);
    // SAFETY: a freed slab stays in the driver's cache, of which so little is far from full.
    let freed = unsafe { std::slice::from_raw_parts(device as *const u8, 512) };
    assert_eq!(freed, [POISON_FREED; 512]);
    let again = program.device_on(512, stream);
    assert_eq!(again, device);
    assert_eq!(program.read(again, 512, stream), [POISON_ALLOCATED; 512]);
    program.assert_clean();
}

#[test]
fn an_allocation_is_its_streams_until_another_waits() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device_on(16, one);
    program.copy_in(&[1; 16], device, other).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
    let device = program.device_on(16, one);
    program.order(one, other);
    program.copy_in(&[1; 16], device, other).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn a_free_that_other_work_is_not_ordered_before_is_reported() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(16);
    program.copy_in(&[1; 16], device, other).unwrap();
    program.free_on(device, one);
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn a_use_after_the_free_is_reported() {
    let mut program = Program::new();
    let stream = program.stream();
    let device = program.device_on(16, stream);
    program.free_on(device, stream);
    assert_eq!(program.copy_in(&[1; 16], device, stream), Err(codes::INVALID_VALUE));
    assert_eq!(program.kinds(), ["use after free"]);
    assert_eq!(program.call("cuMemFreeAsync", |d| d.free_async(device, stream)), Err(codes::INVALID_VALUE));
    assert_eq!(program.kinds(), ["use after free", "invalid free"]);
}

#[test]
fn a_synchronous_free_waits_for_what_it_owns_and_not_for_pool_memory() {
    let mut program = Program::new();
    let stream = program.stream();
    let plain = program.device(16);
    program.copy_in(&[1; 16], plain, stream).unwrap();
    program.call("cuMemFree", |d| d.free(plain)).unwrap();
    program.assert_clean();
    let pooled = program.device_on(16, stream);
    program.copy_in(&[1; 16], pooled, stream).unwrap();
    program.call("cuMemFree", |d| d.free(pooled)).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
    let done = program.device_on(16, stream);
    program.synchronize(stream);
    program.call("cuMemFree", |d| d.free(done)).unwrap();
    // The copy above finds its block gone.
    assert_eq!(program.kinds(), ["unordered", "use after free"]);
}

#[test]
fn copies_out_of_bounds_and_of_foreign_memory_are_reported() {
    let mut program = Program::new();
    let (stream, device) = (program.stream(), program.device(100));
    let host = [0u8; 200];
    assert_eq!(program.copy_in(&host[..101], device, stream), Err(codes::INVALID_VALUE));
    assert_eq!(program.copy_in(&host[..1], device + 100, stream), Err(codes::INVALID_VALUE));
    assert_eq!(program.copy_in(&host[..1], host.as_ptr() as usize, stream), Err(codes::INVALID_VALUE));
    assert_eq!(program.kinds(), ["out of bounds", "out of bounds", "unknown memory"]);
    program.copy_in(&host[..100], device, stream).unwrap();
    assert_eq!(program.kinds().len(), 3);
}

#[test]
fn memory_is_limited_and_counted() {
    let mut program = Program::new();
    for device in &mut program.driver.devices {
        device.memory = 1000;
    }
    let stream = program.stream();
    let first = program.device_on(600, stream);
    assert_eq!(program.call("cuMemAllocAsync", |d| d.allocate_async(600, stream)), Err(codes::OUT_OF_MEMORY));
    assert_eq!(program.call("cuMemAlloc", |d| d.allocate(usize::MAX)), Err(codes::OUT_OF_MEMORY));
    program.free_on(first, stream);
    let second = program.device_on(1000, stream);
    assert_eq!(program.driver.counters.device_bytes.now, 1000);
    program.free_on(second, stream);
    assert_eq!(program.driver.counters.device_bytes.now, 0);
    assert_eq!(program.driver.counters.device_bytes.high_water, 1000);
    program.assert_clean();
}

#[test]
fn a_copy_from_a_device_to_another_is_ordered_as_any() {
    let mut program = Program::new();
    let first = program.use_device(0);
    let one = program.stream();
    let here = program.device_on(16, one);
    program.copy_in(&[4; 16], here, one).unwrap();
    let second = program.use_device(1);
    let other = program.stream();
    let there = program.device_on(16, other);
    let peer = |d: &mut crate::driver::Driver| d.copy_peer((first, here), (second, there), 16, other);
    program.call("cuMemcpyPeerAsync", peer).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
    // An event is recorded where its stream is, and waited for anywhere.
    program.call("cuCtxSetCurrent", |d| d.set_current(first)).unwrap();
    let event = program.event();
    program.record(event, one);
    program.call("cuCtxSetCurrent", |d| d.set_current(second)).unwrap();
    program.wait(other, event);
    program.call("cuMemcpyPeerAsync", peer).unwrap();
    assert_eq!(program.kinds().len(), 1);
    assert_eq!(program.read(there, 16, other), [4; 16]);
    let swapped = |d: &mut crate::driver::Driver| d.copy_peer((second, here), (first, there), 16, other);
    assert_eq!(program.call("cuMemcpyPeerAsync", swapped), Err(codes::INVALID_VALUE));
}

#[test]
fn fills_repeat_their_pattern() {
    let mut program = Program::new();
    let (stream, device) = (program.stream(), program.device(12));
    program.call("cuMemsetD32Async", |d| d.set(device, &[1, 2, 3, 4], 3, stream)).unwrap();
    assert_eq!(program.read(device, 12, stream), [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]);
    program.call("cuMemsetD8Async", |d| d.set(device + 2, &[9], 4, stream)).unwrap();
    assert_eq!(program.read(device, 12, stream), [1, 2, 9, 9, 9, 9, 3, 4, 1, 2, 3, 4]);
    let misaligned = program.call("cuMemsetD32Async", |d| d.set(device + 2, &[1, 2, 3, 4], 1, stream));
    assert_eq!(misaligned, Err(codes::INVALID_VALUE));
    program.assert_clean();
}

#[test]
fn histories_stay_short() {
    let mut program = Program::new();
    let (stream, device, pinned) = (program.stream(), program.device(1024), program.pinned(1024));
    for _ in 0..100 {
        for chunk in 0..4 {
            program.copy_in(&pinned.bytes()[chunk * 256..][..256], device + chunk * 256, stream).unwrap();
        }
        program.synchronize(stream);
    }
    let (_, block) = program.driver.memory.live_at(device).unwrap();
    assert!(block.history.len() <= 8, "{}", block.history.len());
    program.assert_clean();
}

#[test]
fn trimmed_memory_is_the_hosts_again() {
    let mut program = Program::new();
    let stream = program.stream();
    let device = program.device_on(100, stream);
    program.free_on(device, stream);
    let trim = |d: &mut crate::driver::Driver| {
        let ops = &d.ops;
        d.memory.trim(0, 0, true, |op| !ops.contains_key(&op));
        Ok(())
    };
    program.call("cuMemPoolTrimTo", trim).unwrap();
    assert_eq!(program.driver.memory.cached(0), 512, "the free has not run");
    program.synchronize(stream);
    program.call("cuMemPoolTrimTo", trim).unwrap();
    assert_eq!(program.driver.memory.cached(0), 0);
    assert!(program.driver.memory.freed_at(device).is_none());
    program.assert_clean();
}
