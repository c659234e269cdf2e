//! The processors on a device's NUMA node: threads that read for it run there, so that what they read crosses no link
//! between sockets on its way.

use std::fs;
use std::path::Path;

/// Where the system says how it is built.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) const SYSTEM: &str = "/sys";

/// Processors by their numbers, each once, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processors(Vec<usize>);

impl Processors {
    /// Those on the node of the PCI device `bus_id`, such as `0000:3b:00.0`; `system` is where the system says it. `None`
    /// where it does not, or the device belongs to no node.
    pub(crate) fn near(system: &Path, bus_id: &str) -> Option<Self> {
        // It becomes a file's name; the driver writes it in either case, and the system in lower case.
        let bus_id = bus_id.to_ascii_lowercase();
        if bus_id.is_empty() || !bus_id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':' || byte == b'.') {
            return None;
        }
        let node = fs::read_to_string(system.join("bus/pci/devices").join(bus_id).join("numa_node")).ok()?;
        // -1 is no node, and no u32.
        let node: u32 = node.trim().parse().ok()?;
        let list = fs::read_to_string(system.join(format!("devices/system/node/node{node}/cpulist"))).ok()?;
        Self::parse(&list)
    }

    /// A list such as `0-3,8,10-11`; `None` where it is none, or an empty one.
    fn parse(list: &str) -> Option<Self> {
        let mut processors = Vec::new();
        for part in list.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            if first > last || last >= MAX_PROCESSORS {
                return None;
            }
            processors.extend(first..=last);
        }
        Some(Self(processors).sorted())
    }

    /// Those of both.
    pub(crate) fn with(mut self, other: &Self) -> Self {
        self.0.extend_from_slice(&other.0);
        self.sorted()
    }

    fn sorted(mut self) -> Self {
        self.0.sort_unstable();
        self.0.dedup();
        self
    }

    /// Has the calling thread run on these alone, as far as it may; leaves it where it is if it may run on none of them.
    #[cfg(any(target_os = "linux", feature = "cuda"))]
    pub(crate) fn bind_this_thread(&self) {
        let Some(mut allowed) = affinity::get() else { return };
        let before = allowed.0.len();
        allowed.0.retain(|processor| self.0.binary_search(processor).is_ok());
        if !allowed.0.is_empty() && allowed.0.len() < before {
            affinity::set(&allowed);
        }
    }
}

#[cfg(target_os = "linux")]
const MAX_PROCESSORS: usize = libc::CPU_SETSIZE as usize;
#[cfg(not(target_os = "linux"))]
const MAX_PROCESSORS: usize = 1024;

/// Where the calling thread may run.
#[cfg(target_os = "linux")]
mod affinity {
    use std::mem::{MaybeUninit, size_of};

    use super::{MAX_PROCESSORS, Processors};

    /// `None` where the system has more processors than a set holds.
    pub(super) fn get() -> Option<Processors> {
        let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
        // SAFETY: the kernel writes at most so many bytes to the set; 0 is the calling thread.
        let rc = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) };
        // SAFETY: it was zeroed, which is a set.
        let set = unsafe { set.assume_init() };
        // SAFETY: the number lies in the set.
        let is_set = |&processor: &usize| unsafe { libc::CPU_ISSET(processor, &set) };
        (rc == 0).then(|| Processors((0..MAX_PROCESSORS).filter(is_set).collect()))
    }

    pub(super) fn set(processors: &Processors) {
        let set = MaybeUninit::<libc::cpu_set_t>::zeroed();
        // SAFETY: zeros are a set.
        let mut set = unsafe { set.assume_init() };
        for &processor in processors.0.iter().filter(|&&processor| processor < MAX_PROCESSORS) {
            // SAFETY: the number lies in the set.
            unsafe { libc::CPU_SET(processor, &mut set) };
        }
        // SAFETY: the kernel reads so many bytes; 0 is the calling thread. Where it refuses, the thread stays where it is.
        let _ = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    }
}

/// Elsewhere threads run where the system puts them.
#[cfg(all(not(target_os = "linux"), feature = "cuda"))]
mod affinity {
    use super::Processors;

    pub(super) fn get() -> Option<Processors> {
        None
    }

    pub(super) fn set(_: &Processors) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system with one device on `node`, and nodes with these processors.
    fn system(node: &str, nodes: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("bus/pci/devices/0000:3b:00.0");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("numa_node"), format!("{node}\n")).unwrap();
        for (number, list) in nodes.iter().enumerate() {
            let node = folder.path().join(format!("devices/system/node/node{number}"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("cpulist"), format!("{list}\n")).unwrap();
        }
        folder
    }

    #[test]
    fn a_device_is_near_the_processors_of_its_node() {
        let system = system("1", &["0-3,8-11", "4-7,12"]);
        let near = Processors::near(system.path(), "0000:3B:00.0").unwrap();
        assert_eq!(near.0, [4, 5, 6, 7, 12]);
        assert_eq!(Processors::near(system.path(), "0000:3c:00.0"), None);
        assert_eq!(Processors::near(system.path(), "../devices/0000:3b:00.0"), None);
        assert_eq!(Processors::near(system.path(), ""), None);
        let other = Processors::parse("1,5").unwrap();
        assert_eq!(near.with(&other).0, [1, 4, 5, 6, 7, 12]);
    }

    #[test]
    fn a_device_without_a_node_is_near_none() {
        for node in ["-1", "2", "x", ""] {
            let system = system(node, &["0-3", "4-7"]);
            assert_eq!(Processors::near(system.path(), "0000:3b:00.0"), None, "{node}");
        }
    }

    #[test]
    fn lists_that_are_none_are_refused() {
        for list in ["", "3-1", "a", "1-", "-1", "0-99999999999", "0,,1", "4096"] {
            assert_eq!(Processors::parse(list), None, "{list}");
        }
        assert_eq!(Processors::parse("5,1-2,2\n").unwrap().0, [1, 2, 5]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_is_bound_to_what_it_may_use_and_no_other() {
        let outside = Processors(vec![MAX_PROCESSORS - 1]);
        std::thread::spawn(move || {
            let before = affinity::get().unwrap();
            // None of them: the thread stays where it is.
            outside.bind_this_thread();
            Processors::default().bind_this_thread();
            assert_eq!(affinity::get().unwrap(), before);
            let last = *before.0.last().unwrap();
            let system = system("0", &[&format!("{last},{}", MAX_PROCESSORS - 1)]);
            Processors::near(system.path(), "0000:3b:00.0").unwrap().bind_this_thread();
            assert_eq!(affinity::get().unwrap().0, [last]);
            // Others are out of its reach now.
            before.bind_this_thread();
            assert_eq!(affinity::get().unwrap().0, [last]);
        })
        .join()
        .unwrap();
    }
}
