//! The classes and functions that `torch.load` allows, and those that do harm.

use super::machine::COMPUTED;

/// What `torch.load(weights_only=True)` of torch 2.15 allows.
pub(super) fn allowed(module: &str, name: &str) -> bool {
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

#[rustfmt::skip]
const DTYPES: &[&str] = &[
    "bcomplex32", "bfloat16", "bits16", "bits1x8", "bits2x4", "bits4x2", "bits8", "bool", "complex128", "complex32",
    "complex64", "float16", "float32", "float4_e2m1fn_x2", "float64", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int1", "int16", "int2", "int3", "int32", "int4", "int5",
    "int6", "int64", "int7", "int8", "qint32", "qint8", "quint2x4", "quint4x2", "quint8", "uint1", "uint16", "uint2",
    "uint3", "uint32", "uint4", "uint5", "uint6", "uint64", "uint7", "uint8",
];

/// Modules that execute code or reach files, programs or the network, with everything below them.
#[rustfmt::skip]
const MODULES: &[&str] = &[
    "_aix_support", "_osx_support", "_pickle", "_posixshmem", "_posixsubprocess", "_pyrepl", "_sitebuiltins",
    "_socket", "_winapi", "_xxsubinterpreters", "aiohttp", "asyncio", "bdb", "cProfile", "cloudpickle", "code",
    "codeop", "commands", "concurrent", "ctypes", "_ctypes", "cffi", "dill", "distutils", "doctest", "ensurepip",
    "fileinput", "ftplib", "gc", "glob", "http", "httplib", "httpx", "idlelib", "imaplib", "imp", "importlib",
    "inspect", "joblib", "lib2to3", "linecache", "logging.config", "marshal", "mmap", "multiprocessing", "nt",
    "ntpath", "os", "pdb", "pickle", "pip", "pkgutil", "platform", "popen2", "poplib", "posix", "posixpath", "profile",
    "pty", "py_compile", "pydoc", "requests", "runpy", "setuptools", "shelve", "shutil", "signal", "site", "smtplib",
    "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys", "telnetlib", "tempfile", "test", "threading",
    "timeit", "tkinter", "torch.distributed.rpc", "torch.hub", "torch.jit.frontend", "torch.package",
    "torch.utils.collect_env", "torch.utils.cpp_extension", "torch.utils._sympy", "trace", "turtledemo", "unittest",
    "urllib", "urllib2", "urllib3", "uvicorn", "venv", "webbrowser", "wsgiref", "xmlrpc", "zipimport", "zipapp",
    "_frozen_importlib", "_frozen_importlib_external", "numpy.f2py", "numpy.testing", "numpy.distutils",
    "torch._inductor", "torch._dynamo",
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

/// What executes code, or reaches files, programs or the network.
pub(super) fn dangerous(module: &str, name: &str) -> bool {
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
