//! Pickles that call things, lie about tensors, or grow without bounds.

use super::Corpus;
use super::Expect::{self, Cheap, Refused, Sound, Unreadable};
use super::archives::with;
use super::pickle::{Pickle, dict, sound as w};
use super::zip::archive;

const PICKLE: &[&str] = &["pickle", "limit", "truncated", "unexpected-eof"];
/// What an error about a tensor's place may be.
const PLACE: &[&str] = &["pickle", "truncated", "size-mismatch", "overflow", "limit"];

impl Corpus {
    fn pickle(&mut self, name: &'static str, expect: Expect, pickle: Vec<u8>) {
        self.file(name, expect, archive(&with(pickle)));
    }

    /// A tensor `t` beside the sound one.
    fn tensor(&mut self, name: &'static str, expect: Expect, t: impl Fn(Pickle) -> Pickle) {
        self.pickle(name, expect, dict(&[("w", &w), ("t", &t)]));
    }
}

pub(super) fn add(corpus: &mut Corpus) {
    tensors(corpus);
    storages(corpus);
    machine(corpus);
    calls(corpus);
}

fn tensors(corpus: &mut Corpus) {
    let outside = || Unreadable(PLACE, &["storage", "outside", "beyond", "behind", "reach"]);
    corpus.tensor("offset behind the storage", outside(), |p| p.tensor(6, 7, &[1], &[1]));
    corpus.tensor("tensor longer than its storage", outside(), |p| p.tensor(6, 0, &[7], &[1]));
    corpus.tensor("strides behind the storage", outside(), |p| p.tensor(6, 0, &[2, 3], &[4, 1]));
    let overflow = || Unreadable(PLACE, &["overflow", "large", "storage", "outside", "beyond", "reach", "64 bits"]);
    corpus.tensor("strides that overflow", overflow(), |p| p.tensor(6, 0, &[3, 3], &[i64::MAX, i64::MAX]));
    corpus.tensor("sizes that overflow", overflow(), |p| p.tensor(6, 0, &[i64::MAX, i64::MAX], &[0, 0]));
    corpus.tensor("offset that overflows", overflow(), |p| p.tensor(6, i64::MAX, &[1], &[1]));
    corpus.tensor("storage of too many bytes", overflow(), |p| p.tensor(i64::MAX, 0, &[2], &[1]));
    let negative = || Unreadable(&["pickle", "overflow"], &["negative", "-1", "-2", "-5", "persistent id"]);
    corpus.tensor("negative size", negative(), |p| p.tensor(6, 0, &[-1], &[1]));
    corpus.tensor("negative stride", negative(), |p| p.tensor(6, 5, &[6], &[-1]));
    corpus.tensor("negative offset", negative(), |p| p.tensor(6, -2, &[1], &[1]));
    corpus.tensor("storage of a negative length", negative(), |p| p.tensor(-5, 0, &[0], &[1]));
    // 4.4e12 floats over one: the view itself is legal, its bytes are not to be had.
    let huge = Unreadable(&["limit", "out-of-memory", "pickle", "overflow", "memory"], &["bytes", "memory", "large"]);
    corpus.tensor("view of 17.6 TB", huge, |p| p.tensor(6, 0, &[1 << 21, 1 << 21], &[0, 0]));
    let rank = Unreadable(&["limit", "pickle"], &["dimension", "rank"]);
    corpus.tensor("65 dimensions", rank, |p| p.tensor(6, 0, &[1; 65], &[1; 65]));
    let unequal = || Unreadable(&["pickle", "shape-mismatch"], &["stride", "dimension"]);
    corpus.tensor("fewer strides than sizes", unequal(), |p| p.tensor(6, 0, &[2, 3], &[1]));
    corpus.tensor("more strides than sizes", unequal(), |p| p.tensor(6, 0, &[6], &[1, 1]));
    corpus.tensor(
        "sizes are text",
        Unreadable(&["pickle"], &["size", "shape", "integer", "tuple", "dimension"]),
        |p| {
            let begun = p.global("torch._utils", "_rebuild_tensor_v2").raw(b"(").storage("FloatStorage", "0", 6);
            begun.int(0).text("six").ints(&[1]).raw([0x89]).raw(b"}tR")
        },
    );
    corpus.tensor("too few arguments", Unreadable(&["pickle"], &["argument", "_rebuild_tensor_v2"]), |p| {
        p.global("torch._utils", "_rebuild_tensor_v2").raw(b")R")
    });
    corpus.tensor("empty tensor behind its storage", Cheap, |p| p.tensor(6, 1 << 40, &[0], &[1]));
}

fn storages(corpus: &mut Corpus) {
    let over = |p: Pickle, storage: &dyn Fn(Pickle) -> Pickle| p.tensor_over(storage, 0, &[6], &[1]);
    let malformed = || Unreadable(&["pickle"], &["persistent id", "storage"]);
    corpus.tensor("persistent id is a number", malformed(), move |p| over(p, &|p| p.int(5).raw(b"Q")));
    corpus.tensor("persistent id is too short", malformed(), move |p| {
        over(p, &|p| p.raw(b"(").text("storage").raw(b"tQ"))
    });
    corpus.tensor("persistent id of a module", malformed(), move |p| {
        over(p, &|p| p.raw(b"(").text("module").text("a").text("b").text("c").int(6).raw(b"tQ"))
    });
    corpus.tensor("storage class is text", malformed(), move |p| {
        over(p, &|p| p.raw(b"(").text("storage").text("FloatStorage").text("0").text("cpu").int(6).raw(b"tQ"))
    });
    let dtype = Unreadable(&["pickle", "unsupported-dtype", "unknown-dtype"], &["weirdstorage"]);
    corpus.tensor("unknown storage class", dtype, move |p| over(p, &|p| p.storage("WeirdStorage", "0", 6)));
    let missing = || Unreadable(&["archive", "pickle", "missing-field"], &["storage", "entry"]);
    corpus.tensor("storage key leads upwards", missing(), move |p| {
        over(p, &|p| p.storage("FloatStorage", "../../../etc/passwd", 6))
    });
    corpus.tensor("storage key is absolute", missing(), move |p| {
        over(p, &|p| p.storage("FloatStorage", "/etc/passwd", 6))
    });
    corpus.tensor("storage key of a megabyte", missing(), move |p| {
        over(p, &|p| p.storage("FloatStorage", &"k".repeat(1 << 20), 6))
    });
    let longer = Unreadable(&["truncated", "pickle", "archive"], &["storage", "data/0", "bytes"]);
    corpus.tensor("storage of more elements than its entry", longer, |p| p.tensor(1000, 0, &[1000], &[1]));
    corpus.tensor("storage of two dtypes", Cheap, move |p| over(p, &|p| p.storage("ByteStorage", "0", 24)));
    corpus.pickle(
        "tensor without a storage",
        Unreadable(&["pickle"], &["storage"]),
        dict(&[("t", &|p| p.tensor_over(|p| p.raw(b"N"), 0, &[1], &[1]))]),
    );
}

fn machine(corpus: &mut Corpus) {
    let ends = || Refused(PICKLE, &["end", "pickle"]);
    corpus.pickle("empty pickle", ends(), Vec::new());
    corpus.pickle("no STOP", ends(), Pickle::new().raw(b"}").unfinished());
    corpus.pickle("text of 4 GB", ends(), Pickle::new().raw(b"X\xFF\xFF\xFF\xFFabc").unfinished());
    corpus.pickle("text of 8 EiB", ends(), Pickle::new().raw(b"\x8D").raw((1u64 << 63).to_le_bytes()).unfinished());
    corpus.pickle("bytes of 8 EiB", ends(), Pickle::new().raw(b"\x8E").raw((1u64 << 63).to_le_bytes()).unfinished());
    corpus.pickle(
        "number of 2 GB",
        ends(),
        Pickle::new().raw(b"\x8B").raw(i32::MAX.to_le_bytes()).raw(b"12").unfinished(),
    );
    corpus.pickle("number of negative length", Refused(PICKLE, &["negative", "length", "end", "pickle"]), {
        Pickle::new().raw(b"\x8B").raw((-1i32).to_le_bytes()).unfinished()
    });
    corpus.pickle("frame of 16 EiB", Cheap, Pickle::new().raw(b"\x95").raw(u64::MAX.to_le_bytes()).raw(b"}").stop());
    corpus.pickle("memo at 4 billion", Cheap, Pickle::new().raw(b"}r\xFF\xFF\xFF\xFF").stop());
    let memo = Refused(&["pickle"], &["memo"]);
    corpus.pickle("memo that was never put", memo, Pickle::new().raw(b"h\x07").stop());
    let stack = || Refused(&["pickle"], &["stack", "mark"]);
    for (name, opcode) in [
        ("stack underflow at REDUCE", &b"R"[..]),
        ("stack underflow at BUILD", b"b"),
        ("stack underflow at SETITEM", b"s"),
        ("stack underflow at TUPLE3", b"\x87"),
        ("stack underflow at BINPERSID", b"Q"),
        ("stack underflow at DUP", b"2"),
        ("stack underflow at STOP", b""),
        ("no MARK for TUPLE", b"t"),
        ("no MARK for SETITEMS", b"}u"),
        ("no MARK for POP_MARK", b"1"),
    ] {
        corpus.pickle(name, stack(), Pickle::new().raw(opcode).stop());
    }
    corpus.pickle("unknown opcode", Refused(&["pickle"], &["opcode"]), Pickle::new().raw(b"\xFE").stop());
    corpus.pickle("unknown protocol", Refused(&["pickle"], &["protocol"]), b"\x80\x63}.".to_vec());
    corpus.pickle(
        "out-of-band buffer",
        Refused(&["pickle"], &["buffer", "parts that are not in this file"]),
        b"\x80\x05\x97.".to_vec(),
    );
    let deep = |open: &[u8], close: &[u8]| Pickle::new().raw(open.repeat(100_000)).raw(close.repeat(99_999)).stop();
    corpus.pickle("100,000 nested lists", Cheap, deep(b"]", b"a"));
    corpus.pickle("100,000 nested tuples", Cheap, deep(b"(", b"t"));
    corpus.pickle("100,000 marks", Cheap, Pickle::new().raw(b"(".repeat(100_000)).raw(b"}").stop());
    // Each level holds the one below twice: 2^40 paths, 40 objects.
    let doubled =
        |p: Pickle| (0..40u8).fold(p.raw(b"]"), |p, n| p.raw([b'q', n]).raw([b'0', b'(', b'h', n, b'h', n]).raw(b"l"));
    corpus.pickle("2^40 paths to nothing", Cheap, doubled(Pickle::new()).stop());
    let paths = |p: Pickle| (0..40u8).fold(w(p), |p, n| p.raw([b'q', n]).raw([b'0', b'(', b'h', n, b'h', n]).raw(b"l"));
    corpus.pickle(
        "2^40 paths to a tensor",
        Refused(&["limit"], &["tensor", "name", "refers"]),
        paths(Pickle::new()).stop(),
    );
    corpus.pickle("a dictionary in itself", Sound, {
        let begun = w(Pickle::new().raw(b"}q\x00(").text("w"));
        begun.text("again").raw(b"h\x00u").stop()
    });
    corpus.pickle("a list in itself", Cheap, Pickle::new().raw(b"]q\x00h\x00a").stop());
    corpus.pickle(
        "bytes behind STOP",
        Refused(&["pickle"], &["behind the end"]),
        [dict(&[("w", &w)]), vec![0xFF; 1000]].concat(),
    );
    corpus.pickle("one name twice", Cheap, dict(&[("w", &w), ("w", &w)]));
    corpus.pickle("a name of a megabyte", Cheap, dict(&[(&"n".repeat(1 << 20), &w)]));
    corpus.pickle("a name of two megabytes", Cheap, dict(&[(&"n".repeat(2 << 20), &w)]));
    corpus.pickle("root is a number", Cheap, Pickle::new().int(7).stop());
    corpus.pickle("text that is not UTF-8", Cheap, Pickle::new().raw(b"}X\x02\x00\x00\x00\xFF\xFENs").stop());
}

fn calls(corpus: &mut Corpus) {
    let command =
        |p: Pickle, module: &str, name: &str| p.global(module, name).raw(b"(").text("touch hostile-was-run").raw(b"tR");
    for (name, module, function) in [
        ("os.system beside a tensor", "os", "system"),
        ("posix.system beside a tensor", "posix", "system"),
        ("builtins.eval beside a tensor", "builtins", "eval"),
        ("subprocess.Popen beside a tensor", "subprocess", "Popen"),
        ("an unknown class beside a tensor", "some.package", "Thing"),
        ("torch.load beside a tensor", "torch.serialization", "load"),
    ] {
        corpus.pickle(name, Sound, dict(&[("bad", &|p| command(p, module, function)), ("w", &w)]));
    }
    corpus.pickle(
        "os.system by STACK_GLOBAL",
        Sound,
        dict(&[
            ("w", &w),
            ("bad", &|p| p.text("os").text("system").raw(b"\x93(").text("touch hostile-was-run").raw(b"tR")),
        ]),
    );
    corpus.pickle(
        "os.system by INST",
        Sound,
        dict(&[("w", &w), ("bad", &|p| p.raw(b"(").text("touch hostile-was-run").raw(b"ios\nsystem\n"))]),
    );
    corpus.pickle("a tensor made by a call", Unreadable(&["pickle", "unknown-tensor"], &["t"]), {
        dict(&[("w", &w), ("t", &|p| command(p, "os", "system"))])
    });
    corpus.pickle("the whole is a call", Cheap, command(Pickle::new(), "os", "system").stop());
}
