//! Where tensors are loaded to.

use candle_core::Device;
use std::fmt;
use uel_core::{Error, Kind};

/// A device as the command line has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Cpu,
    Cuda(usize),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Cpu => f.write_str("cpu"),
            Target::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Target {
    /// The device itself, which is looked for only where it is used.
    pub(super) fn device(self) -> Result<Device, Error> {
        match self {
            Target::Cpu => Ok(Device::Cpu),
            Target::Cuda(ordinal) => Device::new_cuda(ordinal)
                .map_err(|error| Error::new(Kind::Device, format!("cannot use {self}: {error}")).with_source(error)),
        }
    }
}

/// `cpu`, `cuda` or `cuda:N`, as far as this build knows them.
pub(super) fn parse_target(text: &str) -> Result<Target, String> {
    let knows = if cfg!(feature = "cuda") { "`cpu` and `cuda:N`" } else { "`cpu`" };
    let unknown = || format!("no such device; this build loads to {knows}");
    let (kind, ordinal) = match text.split_once(':') {
        Some((kind, ordinal)) => (kind, Some(ordinal.parse::<usize>().map_err(|_| unknown())?)),
        None => (text, None),
    };
    match (kind, ordinal) {
        ("cpu", None) => Ok(Target::Cpu),
        ("cuda", ordinal) if cfg!(feature = "cuda") => Ok(Target::Cuda(ordinal.unwrap_or(0))),
        ("cuda", _) => {
            Err("this build has no CUDA; it loads to `cpu` (CUDA needs a build with --features cuda)".to_owned())
        }
        ("metal", _) => Err(format!("this build has no Metal; it loads to {knows}")),
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices() {
        assert_eq!(parse_target("cpu"), Ok(Target::Cpu));
        for text in ["cpu:0", "tpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(parse_target(text).is_err_and(|error| error.starts_with("no such device")), "{text}");
        }
        assert!(parse_target("metal").is_err_and(|error| error.contains("no Metal")));
        for (text, ordinal) in [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)] {
            match parse_target(text) {
                Ok(target) => assert_eq!((target, cfg!(feature = "cuda")), (Target::Cuda(ordinal), true)),
                Err(error) => assert!(!cfg!(feature = "cuda") && error.contains("no CUDA"), "{error}"),
            }
        }
        assert_eq!(Target::Cuda(2).to_string(), "cuda:2");
    }
}
