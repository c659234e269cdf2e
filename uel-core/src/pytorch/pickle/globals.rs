//! The classes and functions that a pickle names, and what loading them in Python would do.

use super::verdicts::{allowed, dangerous};

/// What loading a class or function that a pickle names would mean for a Python program. UEL itself imports and calls
/// none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// `torch.load(weights_only=True)` allows it: it makes tensors, their parts, or plain data.
    Allowed,
    /// `torch.load(weights_only=True)` refuses it unless the program allows it by name; `weights_only=False` imports its
    /// module.
    Unknown,
    /// As [`Unknown`](Self::Unknown), and known as a way to execute code, or to reach files, programs or the network.
    Dangerous,
}

/// A class or function that a pickle names: what a scanner for malicious checkpoints looks at.
///
/// ```
/// fn report(global: &uel_core::pytorch::Global) -> String {
///     let used = if global.is_called() { "calls" } else { "names" };
///     format!("byte {}: {used} {}.{}: {:?}", global.offset(), global.module(), global.name(), global.verdict())
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Global {
    module: Box<str>,
    name: Box<str>,
    offset: u64,
    verdict: Verdict,
    called: bool,
}

impl Global {
    pub(super) fn new(module: &str, name: &str, offset: u64) -> Self {
        let verdict = verdict(module, name);
        Self { module: module.into(), name: name.into(), offset, verdict, called: false }
    }

    pub(super) fn called(&mut self) {
        self.called = true;
    }

    /// Its module, as the pickle has it: `torch._utils`. What is computed while the file is loaded is `<computed>`,
    /// as is its name.
    pub fn module(&self) -> &str {
        &self.module
    }

    /// Its name in that module: `_rebuild_tensor_v2`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The byte of the pickle at which it is named first.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What loading it in Python would mean.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Whether `torch.load(weights_only=False)` would call it, or make an object of it.
    pub fn is_called(&self) -> bool {
        self.called
    }

    /// Module and name as Python 3 has them, whatever version wrote the file.
    pub(crate) fn path(&self) -> (&str, &str) {
        python3(&self.module, &self.name)
    }
}

/// Names of Python 2 as those of Python 3, as `torch.load` translates them.
fn python3<'a>(module: &'a str, name: &'a str) -> (&'a str, &'a str) {
    match (module, name) {
        ("__builtin__", "xrange") => ("builtins", "range"),
        ("__builtin__", "reduce") => ("functools", "reduce"),
        ("__builtin__", "intern") => ("sys", "intern"),
        ("__builtin__", "unichr") => ("builtins", "chr"),
        ("__builtin__", "unicode" | "basestring") => ("builtins", "str"),
        ("__builtin__", "long") => ("builtins", "int"),
        ("__builtin__", _) => ("builtins", name),
        ("copy_reg", _) => ("copyreg", name),
        ("Queue", _) => ("queue", name),
        ("repr", _) => ("reprlib", name),
        ("UserDict" | "UserList" | "UserString", _) => ("collections", name),
        ("StringIO" | "cStringIO", _) => ("io", name),
        ("commands", _) => ("subprocess", name),
        ("cPickle", _) => ("pickle", name),
        _ => (module, name),
    }
}

fn verdict(module: &str, name: &str) -> Verdict {
    let (module, name) = python3(module, name);
    if allowed(module, name) {
        Verdict::Allowed
    } else if dangerous(module, name) {
        Verdict::Dangerous
    } else {
        Verdict::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pytorch::pickle::machine::COMPUTED;

    #[test]
    fn what_torch_allows_and_what_is_dangerous() {
        let allowed = [
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch", "FloatStorage"),
            ("torch.cuda", "HalfStorage"),
            ("torch", "bfloat16"),
            ("__builtin__", "set"),
            ("builtins", "bytearray"),
            ("torch.sparse", "FloatTensor"),
            ("torch", "QUInt4x2Storage"),
            ("torch", "per_tensor_affine"),
        ];
        for (module, name) in allowed {
            assert_eq!(verdict(module, name), Verdict::Allowed, "{module}.{name}");
        }
        let dangerous = [
            ("os", "system"),
            ("posix", "system"),
            ("nt", "system"),
            ("os.path", "join"),
            ("builtins", "eval"),
            ("__builtin__", "eval"),
            ("__builtin__", "apply"),
            ("builtins", "getattr"),
            ("subprocess", "Popen"),
            ("commands", "getoutput"),
            ("importlib", "import_module"),
            ("runpy", "run_path"),
            ("operator", "attrgetter"),
            ("torch.serialization", "os.system"),
            ("torch", "hub.load"),
            ("numpy.testing._private.utils", "runstring"),
            ("torch.utils._config_module", "sys.modules"),
            ("collections", "OrderedDict.__init__"),
            (COMPUTED, COMPUTED),
            ("torch.hub", "load"),
            ("torch", "hub"),
        ];
        for (module, name) in dangerous {
            assert_eq!(verdict(module, name), Verdict::Dangerous, "{module}.{name}");
        }
        let unknown = [
            ("my.models", "Net"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("collections", "defaultdict"),
            ("argparse", "Namespace"),
            ("torch.storage", "_load_from_bytes"),
            ("torch.sparse", "BoolTensor"),
            ("torch", "SystemTensor"),
            ("pathlib", "PosixPath"),
            ("torch.nn.modules.container", "Sequential"),
            ("functools", "partial"),
            ("outer", "Outer.Inner"),
        ];
        for (module, name) in unknown {
            assert_eq!(verdict(module, name), Verdict::Unknown, "{module}.{name}");
        }
    }
}
