//! What the driver has to say: violations, counters, and both as JSON.

use std::fmt::Write;

use crate::driver::Driver;

/// So many violations are kept with their words; the others are counted.
const KEPT: usize = 256;

/// A misuse that a real device may or may not show.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    pub(crate) kind: &'static str,
    pub(crate) message: String,
}

/// A number and the highest that it was.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Level {
    pub(crate) now: usize,
    pub(crate) high_water: usize,
}

impl Level {
    pub(crate) fn rise(&mut self, to: usize) {
        self.now = to;
        self.high_water = self.high_water.max(to);
    }

    pub(crate) fn set(&mut self, to: usize) {
        self.now = to;
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) device_bytes: Level,
    pub(crate) pinned_bytes: Level,
    pub(crate) streams: Level,
    pub(crate) events: Level,
    pub(crate) streams_destroyed_pending: u64,
}

impl Driver {
    pub(crate) fn violation(&mut self, kind: &'static str, message: String) {
        self.violation_count = self.violation_count.saturating_add(1);
        if self.violations.len() < KEPT {
            self.violations.push(Violation { kind, message });
        }
    }

    /// All that is known, as one JSON object.
    pub(crate) fn report(&self) -> String {
        let c = &self.counters;
        let mut json = format!("{{\"violation_count\":{},\"violations\":[", self.violation_count);
        for (at, violation) in self.violations.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let (kind, message) = (quoted(violation.kind), quoted(&violation.message));
            // Writing to a string cannot fail.
            let _ = write!(json, "{comma}{{\"kind\":{kind},\"message\":{message}}}");
        }
        let blocks = self.memory.live_blocks().count();
        let (files, buffers) = self.has_registrations();
        let _ = write!(
            json,
            "],\"live\":{{\"device_bytes\":{},\"device_blocks\":{blocks},\"pinned_bytes\":{},\"pinned_ranges\":{},\
             \"streams\":{},\"events\":{},\"contexts\":{},\"communicators\":{},\"files\":{files},\"file_buffers\":{buffers}}}",
            c.device_bytes.now,
            c.pinned_bytes.now,
            self.pinned.ranges().count(),
            self.streams.len(),
            self.events.len(),
            self.contexts.len(),
            self.nccl.live(),
        );
        let _ = write!(
            json,
            ",\"high_water\":{{\"device_bytes\":{},\"pinned_bytes\":{},\"streams\":{},\"events\":{}}}",
            c.device_bytes.high_water, c.pinned_bytes.high_water, c.streams.high_water, c.events.high_water,
        );
        json.push_str(",\"live_memory\":[");
        let live = self.memory.live_blocks().map(|(_, block)| &block.label);
        for (at, label) in live.chain(self.pinned.ranges().map(|range| &range.label)).take(KEPT).enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let _ = write!(json, "{comma}{}", quoted(label));
        }
        let _ = write!(
            json,
            "],\"pending_operations\":{},\"submitted_operations\":{},\"streams_destroyed_pending\":{},\"calls\":{{",
            self.ops.len(),
            self.submitted,
            c.streams_destroyed_pending,
        );
        for (at, (function, count)) in self.calls.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            let _ = write!(json, "{comma}{}:{count}", quoted(function));
        }
        json.push_str("}}");
        json
    }
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut json = String::with_capacity(text.len().saturating_add(2));
    json.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => json.extend(['\\', character]),
            control if control < ' ' => {
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
    json
}
