//! What the system says of this process's memory, and of its own.

/// The most memory this process had resident so far; `None` where the system does not say.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    kilobytes_of(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM")
}

/// The value, in bytes, of a line such as `VmHWM:    1234 kB`.
pub(crate) fn kilobytes_of(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let text = "Name:\tuel\nVmHWM2:\t1 kB\nVmHWM:\t    1234 kB\nThreads:\t1\n";
        assert_eq!(kilobytes_of(text, "VmHWM"), Some(1234 * 1024));
        assert_eq!(kilobytes_of(text, "Threads"), None);
        assert_eq!(kilobytes_of(text, "VmRSS"), None);
        assert_eq!(peak_rss_bytes().is_some(), cfg!(target_os = "linux"));
    }
}
