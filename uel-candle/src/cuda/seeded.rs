//! Faults that tests put into the order of device work, to see that they are found. Without the feature `seeded-faults` there
//! are none.

pub(crate) const NO_HAND_OVER: &str = "no-hand-over";
pub(crate) const HAND_OVER_BY_READER: &str = "hand-over-by-reader";
pub(crate) const EARLY_RETURN: &str = "early-return";
pub(crate) const ALLOCATED_ON_COPY_STREAM: &str = "allocated-on-copy-stream";
pub(crate) const COPY_STREAM_DROPPED: &str = "copy-stream-dropped";
pub(crate) const NO_ALLOCATION_WAIT: &str = "no-allocation-wait";
pub(crate) const DROPPED_BEFORE_COPIES: &str = "dropped-before-copies";
pub(crate) const DIRECT_BEFORE_ALLOCATION: &str = "direct-before-allocation";
pub(crate) const PEER_FREED_EARLY: &str = "peer-freed-early";
#[cfg(feature = "nccl")]
pub(crate) const PEER_NOT_READY: &str = "peer-not-ready";

/// Pools that outlive their copy stream, by the fault that drops it.
pub(crate) static POOLS: std::sync::Mutex<Vec<crate::host::pool::HostPool>> = std::sync::Mutex::new(Vec::new());

/// Whether the fault called `name` was asked for, by the variable `UEL_SEEDED_FAULT`.
#[cfg(feature = "seeded-faults")]
pub(crate) fn is(name: &str) -> bool {
    static FAULT: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    FAULT.get_or_init(|| std::env::var("UEL_SEEDED_FAULT").ok()).as_deref() == Some(name)
}

#[cfg(not(feature = "seeded-faults"))]
pub(crate) const fn is(_: &str) -> bool {
    false
}
