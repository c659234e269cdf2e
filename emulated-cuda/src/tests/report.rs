//! Injected failures and the report.

use serde_json::Value;

use super::Program;
use crate::codes;
use crate::driver::Injection;

#[test]
fn the_nth_call_fails_and_does_nothing() {
    let mut program = Program::new();
    let inject = |function: Option<&str>, left| Injection {
        function: function.map(Into::into),
        left,
        code: codes::OUT_OF_MEMORY,
    };
    program.driver.injections.push(inject(Some("cuMemAlloc"), 2));
    program.device(8);
    program.event();
    assert_eq!(program.call("cuMemAlloc", |d| d.allocate(8)), Err(codes::OUT_OF_MEMORY));
    assert_eq!(program.driver.counters.device_bytes.now, 8);
    program.device(8);
    program.driver.injections.push(inject(None, 3));
    program.event();
    program.stream();
    assert_eq!(program.call("cuEventCreate", |d| d.create_event(0)), Err(codes::OUT_OF_MEMORY));
    program.event();
}

#[test]
fn the_report_is_json_with_what_happened() {
    let mut program = Program::new();
    let stream = program.stream();
    let device = program.device_on(16, stream);
    program.device(8);
    program.pinned(24);
    program.copy_in(&[0; 17], device, stream).unwrap_err();
    let report: Value = serde_json::from_str(&program.driver.report()).unwrap();
    assert_eq!(report["violation_count"], 1);
    assert_eq!(report["violations"][0]["kind"], "out of bounds");
    assert!(report["violations"][0]["message"].as_str().unwrap().contains("17 bytes"));
    assert_eq!(report["live"]["device_bytes"], 24);
    assert_eq!(report["live"]["pinned_bytes"], 24);
    assert_eq!(report["live"]["streams"], 1);
    assert_eq!(report["live_memory"].as_array().unwrap().len(), 3);
    assert_eq!(report["calls"]["cuMemAlloc"], 1);
    assert_eq!(report["pending_operations"], 1, "the allocation");
}
