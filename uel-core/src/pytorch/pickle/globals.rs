//! The classes and functions that a pickle names, and what loading them in Python would do.

use super::machine::COMPUTED;

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

/// What `torch.load(weights_only=True)` of torch 2.15 allows.
fn allowed(module: &str, name: &str) -> bool {
    match module {
        "collections" => matches!(name, "OrderedDict" | "Counter"),
        "torch.nn.parameter" => name == "Parameter",
        "torch.serialization" => name == "_get_layout",
        "_codecs" => name == "encode",
        "builtins" => matches!(name, "bytearray" | "set" | "complex"),
        "torch._utils" => matches!(
            name,
            "_rebuild_parameter"
                | "_rebuild_parameter_with_state"
                | "_rebuild_qtensor"
                | "_rebuild_tensor"
                | "_rebuild_tensor_v2"
                | "_rebuild_tensor_v3"
                | "_rebuild_sparse_tensor"
                | "_rebuild_meta_tensor_no_storage"
                | "_rebuild_wrapper_subclass"
                | "_rebuild_device_tensor_from_numpy"
                | "_rebuild_device_tensor_from_cpu_tensor"
        ),
        "torch._tensor" => name == "_rebuild_from_type_v2",
        "torch.storage" => matches!(name, "TypedStorage" | "UntypedStorage"),
        "torch" => {
            matches!(name, "Size" | "Tensor" | "device") || DTYPES.contains(&name) || QSCHEMES.contains(&name) || {
                let tensor = name.strip_suffix("Tensor").is_some_and(|kind| TENSORS.contains(&kind));
                let storage = |kind| TENSORS.contains(&kind) || MORE_STORAGES.contains(&kind);
                tensor || name.strip_suffix("Storage").is_some_and(storage)
            }
        }
        "torch.cuda" => {
            let tensor = name.strip_suffix("Tensor").is_some_and(|kind| TENSORS.contains(&kind));
            let storage = |kind| TENSORS.contains(&kind) || matches!(kind, "ComplexDouble" | "ComplexFloat");
            tensor || name.strip_suffix("Storage").is_some_and(storage)
        }
        "torch.sparse" | "torch.cuda.sparse" => {
            name.strip_suffix("Tensor").is_some_and(|kind| kind != "Bool" && TENSORS.contains(&kind))
        }
        _ => false,
    }
}

const TENSORS: &[&str] = &["BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short"];

const MORE_STORAGES: &[&str] = &["ComplexDouble", "ComplexFloat", "QInt32", "QInt8", "QUInt2x4", "QUInt4x2", "QUInt8"];

const QSCHEMES: &[&str] = &[
    "per_channel_affine",
    "per_channel_affine_float_qparams",
    "per_channel_symmetric",
    "per_tensor_affine",
    "per_tensor_symmetric",
];

const DTYPES: &[&str] = &[
    "bcomplex32",
    "bfloat16",
    "bits16",
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bool",
    "complex128",
    "complex32",
    "complex64",
    "float16",
    "float32",
    "float4_e2m1fn_x2",
    "float64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "int1",
    "int16",
    "int2",
    "int3",
    "int32",
    "int4",
    "int5",
    "int6",
    "int64",
    "int7",
    "int8",
    "qint32",
    "qint8",
    "quint2x4",
    "quint4x2",
    "quint8",
    "uint1",
    "uint16",
    "uint2",
    "uint3",
    "uint32",
    "uint4",
    "uint5",
    "uint6",
    "uint64",
    "uint7",
    "uint8",
];

/// Modules that execute code or reach files, programs or the network, with everything below them.
const MODULES: &[&str] = &[
    "_aix_support",
    "_osx_support",
    "_pickle",
    "_posixshmem",
    "_posixsubprocess",
    "_pyrepl",
    "_sitebuiltins",
    "_socket",
    "_winapi",
    "_xxsubinterpreters",
    "aiohttp",
    "asyncio",
    "bdb",
    "cProfile",
    "cloudpickle",
    "code",
    "codeop",
    "commands",
    "concurrent",
    "ctypes",
    "_ctypes",
    "cffi",
    "dill",
    "distutils",
    "doctest",
    "ensurepip",
    "fileinput",
    "ftplib",
    "gc",
    "glob",
    "http",
    "httplib",
    "httpx",
    "idlelib",
    "imaplib",
    "imp",
    "importlib",
    "inspect",
    "joblib",
    "lib2to3",
    "linecache",
    "logging.config",
    "marshal",
    "mmap",
    "multiprocessing",
    "nt",
    "ntpath",
    "os",
    "pdb",
    "pickle",
    "pip",
    "pkgutil",
    "platform",
    "popen2",
    "poplib",
    "posix",
    "posixpath",
    "profile",
    "pty",
    "py_compile",
    "pydoc",
    "requests",
    "runpy",
    "setuptools",
    "shelve",
    "shutil",
    "signal",
    "site",
    "smtplib",
    "socket",
    "socketserver",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
    "telnetlib",
    "tempfile",
    "test",
    "threading",
    "timeit",
    "tkinter",
    "torch.distributed.rpc",
    "torch.hub",
    "torch.jit.frontend",
    "torch.package",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils._sympy",
    "trace",
    "turtledemo",
    "unittest",
    "urllib",
    "urllib2",
    "urllib3",
    "uvicorn",
    "venv",
    "webbrowser",
    "wsgiref",
    "xmlrpc",
    "zipimport",
    "zipapp",
    "_frozen_importlib",
    "_frozen_importlib_external",
    "numpy.f2py",
    "numpy.testing",
    "numpy.distutils",
    "torch._inductor",
    "torch._dynamo",
];

/// Functions of other modules that do so.
const FUNCTIONS: &[(&str, &[&str])] = &[
    (
        "builtins",
        &[
            "__import__",
            "apply",
            "breakpoint",
            "compile",
            "delattr",
            "eval",
            "exec",
            "execfile",
            "file",
            "getattr",
            "globals",
            "help",
            "input",
            "locals",
            "open",
            "raw_input",
            "setattr",
            "vars",
        ],
    ),
    ("operator", &["attrgetter", "methodcaller", "itemgetter"]),
    ("_operator", &["attrgetter", "methodcaller", "itemgetter"]),
    ("types", &["CodeType", "FunctionType", "LambdaType", "MethodType", "ModuleType", "new_class"]),
    ("io", &["FileIO", "open", "open_code"]),
    ("_io", &["FileIO", "open", "open_code"]),
    ("codecs", &["open"]),
    ("copyreg", &["add_extension"]),
    ("torch", &["load", "compile"]),
    ("torch.serialization", &["load", "add_safe_globals"]),
    ("torch.jit", &["load", "script"]),
    ("torch.fx.graph_module", &["_exec_with_source", "_forward_from_src", "reduce_graph_module"]),
    ("torch._C", &["_jit_compile"]),
    ("numpy", &["load", "fromfile", "memmap"]),
    ("pandas", &["eval", "read_pickle"]),
    ("functools", &["reduce"]),
];

fn dangerous(module: &str, name: &str) -> bool {
    if module == COMPUTED || name.is_empty() {
        return true;
    }
    let listed = |path: &str| MODULES.contains(&path);
    // `os` and everything below it.
    let below = module.match_indices('.').any(|(dot, _)| listed(module.get(..dot).unwrap_or_default()));
    if below || listed(module) || listed(&format!("{module}.{name}")) {
        return true;
    }
    if FUNCTIONS.iter().any(|(of, names)| *of == module && names.contains(&name)) {
        return true;
    }
    // A dotted name goes through attributes, such as a module that another module has imported.
    name.contains('.')
        && name.split('.').any(|part| {
            listed(part) || part.starts_with("__") || FUNCTIONS.iter().any(|(_, names)| names.contains(&part))
        })
        // So does a module that is imported under the name of another one.
        || module.split('.').skip(1).any(|part| matches!(part, "os" | "sys" | "subprocess" | "builtins" | "importlib"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
