//! What is measured, and against what.

use std::hint::black_box;
use std::path::Path;

use uel::candle::LoadOptions;
use uel::{Checkpoint, Mode};

use crate::claims::{asked, claim, of, rounds};
use crate::files::{self, BYTES, InMemory, warm_bf16_file};
use crate::loaders;
use crate::measure::{
    Candidate, WARM_UPS, dd_direct, in_turns, in_turns_after, memcpy_gb_per_s, timed, while_memory_is_held,
};

/// A model in large tensors, and the same bytes in as many as a large mixture-of-experts model has.
const FEW: u64 = 200;
const MANY: u64 = 117_410;

pub(crate) fn run(all: &[&str]) {
    let asked = asked(all, all);
    let memcpy = memcpy_gb_per_s();
    for case in asked {
        match case {
            "warm" => warm(memcpy),
            "many" => many(),
            "low-memory" => low_memory(memcpy),
            "cold" => cold(),
            "auto-warm" => auto_in("warm, disk", &warm_bf16_file(FEW), false),
            "auto-tmpfs" => auto_in("tmpfs", &InMemory::copy_of(&warm_bf16_file(FEW)).0, false),
            "auto-cold" => auto_in("cold, disk", &warm_bf16_file(FEW), true),
            "auto-many" => auto_in("warm, disk, 117,410 tensors", &warm_bf16_file(MANY), false),
            "cast" => cast(),
            "verified" => verified(),
            "small" => small(),
            other => panic!("no case {other}"),
        }
    }
}

fn candidate<'a, T>(name: impl Into<String>, work: impl Fn() -> T + 'a) -> Candidate<'a> {
    (name.into(), Box::new(move || timed(&work).1))
}

fn warm(memcpy: f64) {
    let path = warm_bf16_file(FEW);
    let candidates = vec![
        candidate("uel mmap", || loaders::uel(&path, Mode::Mmap)),
        candidate("uel preload", || loaders::uel(&path, Mode::Preload)),
        candidate("candle load", || loaders::candle(&path)),
        candidate("candle mmap", || loaders::candle_mmap(&path)),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, page cache warm", BYTES, rounds(9), candidates);
    let preload = of(&times, "uel preload");
    claim("mapped load_all in milliseconds", of(&times, "uel mmap").median() * 1e3, 2.0, true);
    claim("preload as a multiple of candle's load", of(&times, "candle load").median() / preload.median(), 5.0, false);
    claim("preload as a multiple of candle's mmap", of(&times, "candle mmap").median() / preload.median(), 1.7, false);
    claim("preload as a share of memcpy", preload.gb_per_s() / memcpy, 0.45, false);
}

fn many() {
    let (few, many) = (warm_bf16_file(FEW), warm_bf16_file(MANY));
    let header = std::fs::read(&many).map(|bytes| bytes[..16 << 20].to_vec()).unwrap();
    let candidates = vec![
        candidate("200 tensors, preload", || loaders::uel(&few, Mode::Preload)),
        candidate("117,410 tensors, preload", || loaders::uel(&many, Mode::Preload)),
        candidate("117,410 tensors, mmap", || loaders::uel(&many, Mode::Mmap)),
        candidate("117,410 tensors, open", || Checkpoint::open(&many).unwrap()),
        candidate("117,410 tensors, header, safetensors", || reference_header(&header)),
        candidate("117,410 tensors, candle mmap", || loaders::candle_mmap(&many)),
    ];
    let times = in_turns("2 GB of bf16 in 117,410 tensors, page cache warm", BYTES, rounds(9), candidates);
    let ratio = of(&times, "117,410 tensors, preload").multiple_of(of(&times, "200 tensors, preload"));
    let allowed = if uel::MappedAllocator::is_installed() { 1.5 } else { 3.0 };
    claim("117,410 tensors as a multiple of 200", ratio, allowed, true);
    let reference = of(&times, "117,410 tensors, header, safetensors").median();
    claim(
        "safetensors' header as a multiple of open",
        reference / of(&times, "117,410 tensors, open").median(),
        4.0,
        false,
    );
}

/// What `SafeTensors::deserialize` does but for the bytes behind the header, which it wants in memory too.
fn reference_header(file: &[u8]) -> safetensors::tensor::Metadata {
    let byte_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(black_box(&file[8..8 + byte_len])).unwrap();
    serde_json::from_str(text).unwrap()
}

fn low_memory(memcpy: f64) {
    let path = warm_bf16_file(FEW);
    let touch = |tensor: &_| {
        black_box(loaders::touch(tensor));
    };
    let read = |tensor: &_| {
        black_box(loaders::read(tensor));
    };
    let candidates = vec![
        candidate("low-memory, tensors touched", || loaders::loop_one_by_one(&path, Mode::LowMemory, touch)),
        candidate("low-memory, every byte read", || loaders::loop_one_by_one(&path, Mode::LowMemory, read)),
        candidate("mmap, every byte read", || loaders::loop_one_by_one(&path, Mode::Mmap, read)),
    ];
    let times = in_turns("2 GB, load, use, drop one by one, page cache warm", BYTES, rounds(9), candidates);
    for use_of_it in ["tensors touched", "every byte read"] {
        let rate = of(&times, &format!("low-memory, {use_of_it}")).gb_per_s();
        claim(&format!("low-memory loop as a share of memcpy, {use_of_it}"), rate / memcpy, 0.6, false);
    }
}

fn cold() {
    let path = files::bf16_file(&files::folder(), FEW);
    let cooled = |name: &str, work: Box<dyn Fn()>| -> Candidate<'_> {
        let path = &path;
        (
            name.to_owned(),
            Box::new(move || {
                while_memory_is_held(|| files::cool(path));
                timed(&work).1
            }),
        )
    };
    let load = |mode: Mode| -> Box<dyn Fn()> {
        let path = path.clone();
        Box::new(move || drop(black_box(loaders::uel(&path, mode))))
    };
    let path_of = path.clone();
    let dd = path.clone();
    let candidates = vec![
        cooled(
            "dd iflag=direct bs=8M",
            Box::new(move || {
                dd_direct(&dd);
            }),
        ),
        cooled("uel preload", load(Mode::Preload)),
        cooled("uel auto", load(Mode::Auto)),
        cooled("candle load", Box::new(move || drop(black_box(loaders::candle(&path_of))))),
    ];
    let times = in_turns("2 GB of bf16 in 200 tensors, page cache cold", BYTES, rounds(9), candidates);
    let dd = of(&times, "dd iflag=direct bs=8M").median();
    claim("preload as a share of dd's rate", dd / of(&times, "uel preload").median(), 0.85, false);
    claim("auto as a share of dd's rate", dd / of(&times, "uel auto").median(), 0.85, false);
}

/// Load and one full read of every tensor, in every mode, mapping allowed and not.
fn auto_in(place: &str, path: &Path, cold: bool) {
    // What a program may choose by hand, and whether it has to be allowed to map for that.
    const FIXED: [(Mode, bool); 3] = [(Mode::Preload, false), (Mode::LowMemory, false), (Mode::Mmap, true)];
    const AUTO: [(Mode, bool); 2] = [(Mode::Auto, true), (Mode::Auto, false)];
    type Load = fn(&Path, Mode, bool) -> loaders::Tensors;
    let all_at_once: Load = |path, mode, may_map| {
        let tensors = loaders::uel_with(path, mode, may_map);
        black_box(loaders::read_all(&tensors));
        // What it costs to free them is another matter.
        tensors
    };
    let one_by_one: Load = |path, mode, may_map| {
        loaders::loop_with(path, mode, may_map, |tensor| {
            black_box(loaders::read(tensor));
        });
        Vec::new()
    };
    let roads = [("all at once", all_at_once), ("one by one", one_by_one)];
    let named = |mode: Mode, may_map: bool, road: &str| match (mode, may_map) {
        (Mode::Auto, false) => format!("auto that may not map, {road}"),
        _ => format!("{mode}, {road}"),
    };
    let candidates = roads.iter().flat_map(|&(road, load)| {
        AUTO.into_iter().chain(FIXED).map(move |(mode, may_map)| -> Candidate<'_> {
            let work = move || {
                if cold {
                    while_memory_is_held(|| files::cool(path));
                }
                timed(|| load(path, mode, may_map)).1
            };
            (named(mode, may_map, road), Box::new(work))
        })
    });
    let title = format!("2 GB, load and one full read, {place}");
    // Cold, the memory that is held before each run makes up for runs that do not count, and many rounds are needed: the
    // disk's rate changes from one to the next.
    let warm_ups = if cold { 0 } else { WARM_UPS };
    let times = in_turns_after(warm_ups, &title, BYTES, rounds(if cold { 31 } else { 15 }), candidates.collect());
    for ((road, _), (mode, allowed)) in roads.iter().flat_map(|road| AUTO.map(|auto| (road, auto))) {
        let auto = named(mode, allowed, road);
        let fixed = FIXED.iter().filter(|(_, has_to_map)| allowed || !has_to_map);
        let fixed = fixed.map(|&(mode, may_map)| of(&times, &named(mode, may_map, road)));
        let best = fixed.min_by(|left, right| left.median().total_cmp(&right.median())).expect("a fixed mode");
        let text = format!("{auto}, as a multiple of {}, the best fixed mode, {place}", best.name);
        claim(&text, of(&times, &auto).multiple_of(best), 1.05, true);
    }
    println!(
        "- {}",
        loaders::open(path, Mode::Auto).load(&LoadOptions::new(&candle_core::Device::Cpu)).unwrap().report
    );
}

/// From which size on mapping pays: load and one full read of files that are cached.
fn small() {
    const REPEATS: u32 = 200;
    for kib in [64, 512, 2048, 4096, 8192, 16384, 65536] {
        let path = files::bf16_file_of(&files::folder(), kib << 10, 8);
        files::warm(&path);
        let mode = |name: &str, mode: Mode| -> Candidate<'_> {
            let path = &path;
            let work = move || {
                let all = || {
                    (0..REPEATS).for_each(|_| {
                        black_box(loaders::sum_all(&loaders::uel(path, mode)));
                    })
                };
                timed(all).1 / REPEATS
            };
            (name.to_owned(), Box::new(work))
        };
        let candidates = vec![mode("auto", Mode::Auto), mode("preload", Mode::Preload), mode("mmap", Mode::Mmap)];
        in_turns(&format!("{kib} KiB in 8 tensors, load and one full read"), kib << 10, rounds(5), candidates);
    }
}

fn cast() {
    let path = warm_bf16_file(FEW);
    let to_f32 = || {
        let options = LoadOptions::new(&candle_core::Device::Cpu).with_dtype(candle_core::DType::F32);
        loaders::open(&path, Mode::Preload).load(&options).unwrap().tensors
    };
    let candle = || {
        let tensors = loaders::candle_mmap(&path);
        tensors.iter().map(|tensor| tensor.to_dtype(candle_core::DType::F32).unwrap()).collect::<Vec<_>>()
    };
    let candidates = vec![candidate("uel load as f32", to_f32), candidate("candle mmap, then to_dtype", candle)];
    in_turns("2 GB of bf16 loaded as f32, page cache warm", BYTES, rounds(5), candidates);
}

/// What checking hashes costs: the same file, loaded with and without. Of many tensors the names and hashes have to be
/// parsed too.
fn verified() {
    for tensors in [FEW, MANY] {
        let path = files::hashed_file(&files::folder(), tensors);
        files::warm(&path);
        let load = |mode: Mode, verified: bool| {
            let path = &path;
            move || {
                let options = LoadOptions::new(&candle_core::Device::Cpu).with_verified(verified);
                loaders::open(path, mode).load(&options).unwrap()
            }
        };
        let candidates = vec![
            candidate("preload", load(Mode::Preload, false)),
            candidate("preload, verified", load(Mode::Preload, true)),
            candidate("mmap, verified", load(Mode::Mmap, true)),
        ];
        let title = format!("2 GB of bf16 in {tensors} tensors with hashes, page cache warm");
        let times = in_turns(&title, BYTES, rounds(15), candidates);
        let cost = of(&times, "preload, verified").multiple_of(of(&times, "preload"));
        claim(&format!("verified preload of {tensors} tensors as a multiple of preload"), cost, 1.03, true);
    }
}
