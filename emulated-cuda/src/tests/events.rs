//! Events, queries, contexts and handles.

use super::{PER_THREAD, Program};
use crate::codes;

#[test]
fn queries_say_not_ready_a_few_times_and_then_it_is() {
    let mut program = Program::new();
    let (stream, device, event) = (program.stream(), program.device(16), program.event());
    program.copy_in(&[1; 16], device, stream).unwrap();
    program.record(event, stream);
    let mut answers = 0;
    while program.call("cuEventQuery", |d| d.query_event(event)) == Err(codes::NOT_READY) {
        answers += 1;
    }
    assert_eq!(answers, crate::schedule::NOT_READY_ANSWERS);
    assert!(program.driver.ops.is_empty());
    program.copy_in(&[1; 16], device, stream).unwrap();
    assert_eq!(program.call("cuStreamQuery", |d| d.query_stream(stream)), Err(codes::NOT_READY));
    for _ in 0..crate::schedule::NOT_READY_ANSWERS {
        let _ = program.call("cuStreamQuery", |d| d.query_stream(stream));
    }
    assert!(program.driver.ops.is_empty());
}

#[test]
fn a_query_that_is_ready_orders_what_comes_after() {
    let mut program = Program::new();
    let (one, other, event) = (program.stream(), program.stream(), program.event());
    let device = program.device(16);
    program.copy_in(&[1; 16], device, one).unwrap();
    program.record(event, one);
    while program.call("cuEventQuery", |d| d.query_event(event)).is_err() {}
    assert_eq!(program.read(device, 16, other), [1; 16]);
    program.assert_clean();
}

#[test]
fn an_event_waits_for_its_last_record_before_the_wait_and_none_after() {
    let mut program = Program::new();
    let (one, other, event) = (program.stream(), program.stream(), program.event());
    let device = program.device(16);
    program.copy_in(&[1; 16], device, one).unwrap();
    program.record(event, one);
    program.wait(other, event);
    let more = program.device(16);
    program.copy_in(&[2; 16], more, one).unwrap();
    program.record(event, one);
    program.read(device, 16, other);
    program.assert_clean();
    program.read(more, 16, other);
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn an_event_records_on_streams_of_its_context_only_and_is_waited_for_everywhere() {
    let mut program = Program::new();
    let (event, first) = (program.event(), program.stream());
    program.use_device(1);
    let second = program.stream();
    assert_eq!(program.call("cuEventRecord", |d| d.record_event(event, second)), Err(codes::INVALID_HANDLE));
    assert_eq!(program.call("cuEventRecord", |d| d.record_event(event, PER_THREAD)), Err(codes::INVALID_HANDLE));
    program.record(event, first);
    program.wait(second, event);
    program.assert_clean();
}

#[test]
fn a_call_without_a_context_fails() {
    let mut program = Program::new();
    let stream = program.stream();
    let device = program.device(16);
    program.driver.thread = 2;
    program.thread = 2;
    assert_eq!(program.copy_in(&[1; 16], device, stream), Err(codes::INVALID_CONTEXT));
    assert_eq!(program.call("cuMemFreeAsync", |d| d.free_async(device, PER_THREAD)), Err(codes::INVALID_CONTEXT));
    assert_eq!(program.call("cuEventCreate", |d| d.create_event(0)), Err(codes::INVALID_CONTEXT));
    program.assert_clean();
}

#[test]
fn a_call_before_the_first_fails() {
    let mut driver = crate::driver::Driver::default();
    assert_eq!(driver.call(1, "cuDeviceGet", |d| d.device(0)), Err(codes::NOT_INITIALIZED));
    assert_eq!(driver.call(1, "cuMemAlloc", |d| d.allocate(1)), Err(codes::NOT_INITIALIZED));
}

#[test]
fn destroyed_handles_are_reported() {
    let mut program = Program::new();
    let (stream, event) = (program.stream(), program.event());
    program.call("cuStreamDestroy", |d| d.destroy_stream(stream)).unwrap();
    program.call("cuEventDestroy", |d| d.destroy_event(event)).unwrap();
    assert_eq!(program.call("cuStreamSynchronize", |d| d.synchronize_stream(stream)), Err(codes::INVALID_HANDLE));
    assert_eq!(program.call("cuEventSynchronize", |d| d.synchronize_event(event)), Err(codes::INVALID_HANDLE));
    assert_eq!(program.kinds(), ["destroyed handle"; 2]);
    assert_eq!(program.call("cuEventSynchronize", |d| d.synchronize_event(0x77)), Err(codes::INVALID_HANDLE));
    assert_eq!(program.kinds().len(), 2, "a handle that never was is only an error");
}

#[test]
fn times_need_events_that_have_them_and_are_done() {
    let mut program = Program::new();
    let (stream, start, end) = (program.stream(), program.event(), program.event());
    program.record(start, stream);
    program.record(end, stream);
    assert_eq!(program.call("cuEventElapsedTime", |d| d.elapsed(start, end)), Err(codes::NOT_READY));
    program.synchronize(stream);
    assert!(program.call("cuEventElapsedTime", |d| d.elapsed(start, end)).unwrap() >= 0.0);
    let untimed = program.call("cuEventCreate", |d| d.create_event(2)).unwrap();
    program.record(untimed, stream);
    program.synchronize(stream);
    assert_eq!(program.call("cuEventElapsedTime", |d| d.elapsed(start, untimed)), Err(codes::INVALID_HANDLE));
}

#[test]
fn a_context_lives_as_long_as_it_is_retained_and_leaks_are_reported() {
    let mut program = Program::new();
    let context = program.use_device(0);
    let (stream, _device) = (program.stream(), program.device(16));
    program.call("cuDevicePrimaryCtxRelease", |d| d.release(0)).unwrap();
    program.synchronize(stream);
    program.call("cuDevicePrimaryCtxRelease", |d| d.release(0)).unwrap();
    assert_eq!(program.kinds(), ["leak"]);
    assert_eq!(program.call("cuMemAlloc", |d| d.allocate(1)), Err(codes::CONTEXT_IS_DESTROYED));
    assert_eq!(program.call("cuDevicePrimaryCtxRelease", |d| d.release(0)), Err(codes::INVALID_CONTEXT));
    assert_ne!(program.use_device(0), context);
    assert_eq!(program.call("cuStreamSynchronize", |d| d.synchronize_stream(stream)), Err(codes::INVALID_HANDLE));
}
