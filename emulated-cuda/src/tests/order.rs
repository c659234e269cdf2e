//! What is ordered and what is not, and when it runs.

use super::{PER_THREAD, Program};

/// Writes on one stream, reads on another.
fn write_and_read(ordered: impl FnOnce(&mut Program, usize, usize)) -> (Program, Vec<u8>) {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(16);
    let source = program.pinned(16);
    source.bytes().fill(7);
    program.copy_in(source.bytes(), device, one).unwrap();
    ordered(&mut program, one, other);
    let read = program.read(device, 16, other);
    (program, read)
}

#[test]
fn an_unordered_copy_is_reported_and_comes_too_late() {
    let (program, read) = write_and_read(|_, _, _| {});
    assert_eq!(program.kinds(), ["unordered"]);
    assert_eq!(read, [crate::memory::POISON_ALLOCATED; 16]);
    let message = &program.driver.violations[0].message;
    assert!(message.contains("cuMemcpyHtoDAsync") && message.contains("cuMemcpyDtoHAsync"), "{message}");
}

#[test]
fn the_same_copy_after_an_event_is_not() {
    let (program, read) = write_and_read(|program, one, other| program.order(one, other));
    program.assert_clean();
    assert_eq!(read, [7; 16]);
}

#[test]
fn a_wait_of_the_host_orders_too() {
    let (program, read) = write_and_read(|program, one, _| program.synchronize(one));
    program.assert_clean();
    assert_eq!(read, [7; 16]);
}

#[test]
fn a_wait_for_the_wrong_stream_does_not() {
    let (program, _) = write_and_read(|program, _, other| program.synchronize(other));
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn an_event_recorded_before_the_copy_does_not() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let (device, event) = (program.device(16), program.event());
    program.record(event, one);
    program.copy_in(&[1; 16], device, one).unwrap();
    program.wait(other, event);
    program.read(device, 16, other);
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn an_event_that_was_never_recorded_orders_nothing() {
    let (program, _) = write_and_read(|program, _, other| {
        let event = program.event();
        program.wait(other, event);
    });
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn order_goes_over_a_third_stream() {
    let (program, read) = write_and_read(|program, one, other| {
        let third = program.stream();
        program.order(one, third);
        program.order(third, other);
    });
    program.assert_clean();
    assert_eq!(read, [7; 16]);
}

#[test]
fn reads_need_no_order_among_them() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(16);
    program.copy_in(&[1; 16], device, one).unwrap();
    program.synchronize(one);
    let (a, b) = (program.pinned(16), program.pinned(16));
    program.copy_out(device, a.bytes(), one).unwrap();
    program.copy_out(device, b.bytes(), other).unwrap();
    program.assert_clean();
    // A write after both has to come after both.
    program.copy_in(&[2; 16], device, one).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn parts_that_do_not_overlap_need_no_order() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(32);
    program.copy_in(&[1; 16], device, one).unwrap();
    program.copy_in(&[2; 16], device + 16, other).unwrap();
    program.assert_clean();
    program.copy_in(&[2; 16], device + 15, other).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn the_per_thread_stream_is_another_queue_on_another_thread() {
    let mut program = Program::new();
    let device = program.device(16);
    program.copy_in(&[1; 16], device, PER_THREAD).unwrap();
    program.on_thread(2);
    program.copy_in(&[2; 16], device, PER_THREAD).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn a_wait_issued_by_a_worker_orders_the_workers_queue_and_not_the_consumers() {
    let mut program = Program::new();
    let (copies, device, event) = (program.stream(), program.device(16), program.event());
    program.copy_in(&[1; 16], device, copies).unwrap();
    program.record(event, copies);
    program.on_thread(2);
    program.wait(PER_THREAD, event);
    program.on_thread(1);
    program.read(device, 16, PER_THREAD);
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn the_per_thread_stream_of_one_thread_is_one_queue() {
    let mut program = Program::new();
    let device = program.device(16);
    for value in 1..4 {
        program.copy_in(&[value; 16], device, PER_THREAD).unwrap();
    }
    assert_eq!(program.read(device, 16, PER_THREAD), [3; 16]);
    program.assert_clean();
}

#[test]
fn the_legacy_stream_orders_itself_with_blocking_streams_only() {
    let mut program = Program::new();
    let blocking = program.call("cuStreamCreate", |d| d.create_stream(0, 0)).unwrap();
    let independent = program.stream();
    let device = program.device(16);
    program.copy_in(&[1; 16], device, blocking).unwrap();
    program.copy_in(&[2; 16], device, 0).unwrap();
    program.copy_in(&[3; 16], device, 1).unwrap();
    program.copy_in(&[4; 16], device, PER_THREAD).unwrap();
    program.copy_in(&[5; 16], device, 0).unwrap();
    assert_eq!(program.read(device, 16, blocking), [5; 16]);
    program.assert_clean();
    program.copy_in(&[6; 16], device, 0).unwrap();
    program.copy_in(&[7; 16], device, independent).unwrap();
    assert_eq!(program.kinds(), ["unordered"]);
}

#[test]
fn only_what_is_waited_for_runs() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let (a, b) = (program.device(16), program.device(16));
    program.copy_in(&[1; 16], a, one).unwrap();
    program.copy_in(&[2; 16], b, other).unwrap();
    assert_eq!(program.driver.ops.len(), 2);
    program.synchronize(one);
    assert_eq!(program.driver.ops.len(), 1);
    let context = program.driver.current().unwrap();
    program
        .call("cuCtxSynchronize", |d| {
            d.synchronize_context(context);
            Ok(())
        })
        .unwrap();
    assert!(program.driver.ops.is_empty());
    program.assert_clean();
}

#[test]
fn a_seed_varies_what_runs_when() {
    let run = |seed| {
        let mut program = Program::seeded(seed);
        let (one, other) = (program.stream(), program.stream());
        let (a, b) = (program.device(16), program.device(16));
        (0..20u8)
            .map(|round| {
                program.copy_in(&[round; 16], a, one).unwrap();
                program.copy_in(&[round; 16], b, other).unwrap();
                program.driver.ops.len()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1), "a seed fixes the schedule");
    assert_ne!(run(1), run(2));
    assert!(run(1).last().is_some_and(|&left| left < 40));
}

#[test]
fn work_of_a_destroyed_stream_and_after_destroyed_events_still_runs() {
    let mut program = Program::new();
    let (one, other) = (program.stream(), program.stream());
    let device = program.device(16);
    program.copy_in(&[9; 16], device, one).unwrap();
    program.order(one, other);
    program.call("cuStreamDestroy", |d| d.destroy_stream(one)).unwrap();
    assert_eq!(program.read(device, 16, other), [9; 16]);
    program.assert_clean();
    assert_eq!(program.driver.counters.streams_destroyed_pending, 1);
}
