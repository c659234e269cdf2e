//! Saves that are killed, meet full disks, or find something else than a file where they are to write.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use uel_core::disk::LocalDisk;
use uel_core::safetensors::write::{
    IncrementalOptions, IncrementalWriter, SaveOptions, SaveReport, ShardedWriter, StreamingWriter, TensorMeta,
    plan_shards,
};
use uel_core::safetensors::{Rules, SafetensorsFiles, recover_set};
use uel_core::source::ByteSourceExt;
use uel_core::{Direct, Dtype, Durability, Error, Kind, Symlinks};

/// The child's orders: what to save, where, and the number of its first save.
const CHILD: &str = "UEL_TEST_SAVE";

const SIZES: [usize; 3] = [100_000, 300, 400_000];

fn metas() -> Vec<TensorMeta> {
    SIZES.iter().enumerate().map(|(n, size)| TensorMeta::new(format!("t{n}"), Dtype::U8, [*size])).collect()
}

/// Save number `number`: every byte says which it is.
fn options(number: u64) -> SaveOptions {
    // Some past the page cache.
    let direct = if number.is_multiple_of(3) { Direct::Always } else { Direct::Never };
    SaveOptions::new().with_metadata_entry("number", number.to_string()).with_direct(direct)
}

fn stream(path: &Path, number: u64, options: SaveOptions) -> Result<SaveReport, Error> {
    let writer = StreamingWriter::create(path, metas(), &options)?;
    for meta in metas() {
        writer.write(&meta.name, meta.dtype, &meta.shape, &vec![number as u8; meta.shape[0]])?;
    }
    writer.finish()
}

fn incremental(path: &Path, number: u64, options: SaveOptions) -> Result<SaveReport, Error> {
    let writer =
        IncrementalWriter::create(path, &IncrementalOptions::new().with_save(options).with_max_header_bytes(10))?;
    for meta in metas() {
        writer.write_owned(&meta.name, meta.dtype, &meta.shape, vec![number as u8; meta.shape[0]])?;
    }
    writer.finish()
}

fn shards(folder: &Path, number: u64) -> Result<SaveReport, Error> {
    let options = options(number).with_durability(Durability::Fast);
    let writer = ShardedWriter::create(folder, &plan_shards(metas(), 200_000, "model")?, &options)?;
    for meta in metas() {
        writer.write(&meta.name, meta.dtype, &meta.shape, &vec![number as u8; meta.shape[0]])?;
    }
    writer.finish()
}

/// The number of the save that all files at `path` are of, whole.
fn number(path: &Path) -> u64 {
    let files = SafetensorsFiles::open(path, Rules::Strict).unwrap();
    assert_eq!(files.index().len(), SIZES.len());
    let found: BTreeSet<u64> =
        (0..files.sources().len()).map(|file| files.file_metadata(file).unwrap()["number"].parse().unwrap()).collect();
    assert_eq!(found.len(), 1, "a mixture: {found:?}");
    let number = *found.first().unwrap();
    for info in files.index().iter() {
        let bytes = files.sources()[info.file()].read_range(info.range()).unwrap();
        assert!(bytes.iter().all(|byte| *byte == number as u8), "{} of save {number}", info.name());
    }
    number
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Not a test of its own: where the tests below start this program again, it saves until it is killed.
#[test]
fn child() {
    let Ok(orders) = std::env::var(CHILD) else { return };
    let mut orders = orders.splitn(3, ' ');
    let (what, first) = (orders.next().unwrap(), orders.next().unwrap().parse::<u64>().unwrap());
    let path = Path::new(orders.next().unwrap());
    for number in first.. {
        let durability = if number % 8 == 0 { Durability::Atomic } else { Durability::Fast };
        let options = options(number).with_durability(durability);
        match (what, number % 2) {
            ("shards", _) => shards(path, number),
            (_, 0) => stream(path, number, options),
            _ => incremental(path, number, options),
        }
        .unwrap();
    }
}

/// Starts a child and kills it after about `micros` microseconds of saving.
fn kill_a_child(what: &str, path: &Path, first: u64, micros: u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(CHILD, format!("{what} {first} {}", path.display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // Its start takes some milliseconds, more under load.
    let folder = if path.is_dir() { path } else { path.parent().unwrap() };
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) && !names(folder).iter().any(|name| name.starts_with('.')) {
        std::thread::sleep(Duration::from_micros(300));
    }
    std::thread::sleep(Duration::from_micros(micros));
    assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Numbers that look random.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

#[test]
fn a_killed_save_leaves_the_old_file_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    stream(&path, 1, options(1)).unwrap();
    let (mut saves, mut kills, mut leftovers, mut seed) = (1, 0, 0, 7);
    let begun = Instant::now();
    while saves < 400 || kills < 80 {
        kill_a_child("file", &path, saves + 1, random(&mut seed) % 30_000);
        let found = number(&path);
        assert!(found >= saves, "{found} is older than {saves}");
        saves = found;
        kills += 1;
        let left = names(folder.path()).len() - 1;
        leftovers += left;
        // A kill leaves one file at most, since each save removes what the one before it left.
        assert!(left <= 1);
        if kills % 4 == 0 {
            saves += 1;
            stream(&path, saves, options(saves)).unwrap();
            assert_eq!(names(folder.path()), ["m.safetensors"]);
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{saves} saves, {kills} kills");
    }
    assert!(leftovers > 0, "no kill met a save");
}

#[test]
fn a_killed_save_of_a_set_leaves_the_old_set_or_the_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    shards(path, 1).unwrap();
    let files = names(path);
    let (mut saves, mut kills, mut interrupted, mut seed) = (1, 0, 0, 3);
    let begun = Instant::now();
    while saves < 200 || kills < 60 {
        kill_a_child("shards", path, saves + 1, random(&mut seed) % 15_000);
        kills += 1;
        let refused = match SafetensorsFiles::open(path, Rules::Strict) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.kind(), Kind::Interrupted, "{error}");
                true
            }
        };
        interrupted += usize::from(refused);
        // Half of the interrupted sets are completed by the next save.
        if refused && kills % 2 == 0 {
            saves += 1000;
            shards(path, saves).unwrap();
            assert_eq!(names(path), files);
            continue;
        }
        assert_eq!(recover_set(&LocalDisk, path).unwrap(), refused);
        let found = number(path);
        assert!(found >= saves, "{found} is older than {saves}");
        saves = found;
        if kills % 3 == 0 {
            saves += 1;
            shards(path, saves).unwrap();
            assert_eq!(names(path), files);
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "{saves} saves, {kills} kills");
    }
    println!("{interrupted} of {kills} kills interrupted the renames of a set");
}

#[test]
fn saves_to_one_destination_at_once_do_not_disturb_one_another() {
    let folder = tempfile::tempdir().unwrap();
    let (path, set) = (folder.path().join("m.safetensors"), folder.path().join("set"));
    fs::create_dir(&set).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (path, set) = (&path, &set);
            scope.spawn(move || {
                for n in 0..25 {
                    stream(path, thread * 25 + n, options(thread * 25 + n).with_durability(Durability::Fast)).unwrap();
                    match shards(set, thread * 25 + n) {
                        Ok(_) => {}
                        Err(error) => assert_eq!(error.kind(), Kind::Interrupted, "{error}"),
                    }
                }
            });
        }
    });
    assert!(number(&path) < 100 && number(&set) < 100);
    assert_eq!(names(folder.path()), ["m.safetensors", "set"]);
    assert!(names(&set).iter().all(|name| name.starts_with("model")), "{:?}", names(&set));
}

/// A small file system of its own, where mounting is allowed.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at).stderr(Stdio::null());
        match command.status() {
            Ok(status) if status.success() => Some(Self(at.to_path_buf())),
            status => {
                println!("skipped: cannot mount a tmpfs ({status:?})");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_read_only_file_system_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_mounted) = Tmpfs::mount(folder.path(), "8m") else { return };
    let (path, set) = (folder.path().join("m.safetensors"), folder.path().join("set"));
    fs::create_dir(&set).unwrap();
    stream(&path, 1, options(1)).unwrap();
    shards(&set, 1).unwrap();
    let there = (names(folder.path()), names(&set));
    // Permissions would not stop root.
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(folder.path()).status().unwrap();
    assert!(remount.success(), "{remount}");
    let saves = [stream(&path, 2, options(2)), incremental(&path, 2, options(2)), shards(&set, 2)];
    for error in saves.map(Result::unwrap_err) {
        assert_eq!(error.kind(), Kind::Io, "{error}");
        let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
        assert_eq!(cause.unwrap().kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{error}");
        assert!(error.path().unwrap().starts_with(folder.path()), "{error}");
    }
    assert_eq!((names(folder.path()), names(&set)), there);
    assert_eq!((number(&path), number(&set)), (1, 1));
}

#[test]
fn a_full_file_system_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let Some(_mounted) = Tmpfs::mount(folder.path(), "700k") else { return };
    let path = folder.path().join("m.safetensors");
    stream(&path, 1, options(1)).unwrap();
    for save in [stream, incremental] {
        let error = save(&path, 2, options(2)).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*path)), "{error}");
        let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
        assert_eq!(cause.map(std::io::Error::kind), Some(std::io::ErrorKind::StorageFull), "{error}");
        assert_eq!(names(folder.path()), ["m.safetensors"]);
        assert_eq!(number(&path), 1);
    }
}

#[test]
fn other_things_than_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |path: &Path, kind, words: &str| {
        for save in [stream, incremental] {
            let error = save(path, 1, options(1)).unwrap_err();
            assert_eq!((error.kind(), error.path()), (kind, Some(path)), "{error}");
            assert!(error.to_string().contains(words), "{error}");
        }
    };
    let sub = folder.path().join("sub");
    fs::create_dir(&sub).unwrap();
    refused(&sub, Kind::Io, "the destination is a folder");
    refused(&folder.path().join("none/m.safetensors"), Kind::Io, "No such file or directory");
    refused(&folder.path().join("sub/.."), Kind::Io, "the destination is a folder");
    refused(Path::new("/dev/full"), Kind::Io, "no regular file");
    refused(Path::new("/dev/null"), Kind::Io, "no regular file");
    refused(Path::new(""), Kind::Argument, "no file name");
    fs::write(folder.path().join("file"), "x").unwrap();
    refused(&folder.path().join("file/m"), Kind::Io, "Not a directory");
    refused(&folder.path().join("n".repeat(256)), Kind::Io, "File name too long");
    assert_eq!(names(folder.path()), ["file", "sub"]);
    // As long a name as there can be, and one that is no text.
    let long = folder.path().join("é".repeat(127));
    stream(&long, 1, options(1)).unwrap();
    assert_eq!(number(&long), 1);
    let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&[b'a', 0xFF, b'\n']);
    stream(&sub.join(bytes), 1, options(1)).unwrap();
    assert_eq!(fs::read_dir(&sub).unwrap().count(), 1);
}

#[test]
fn links_are_refused_followed_or_replaced_as_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let save = |name: &str, number, links| stream(&at(name), number, options(number).with_symlinks(links));
    fs::create_dir(at("there")).unwrap();
    save("there/target", 1, Symlinks::Refuse).unwrap();
    symlink("there/target", at("link")).unwrap();
    let error = save("link", 2, Symlinks::Refuse).unwrap_err();
    assert_eq!(
        (error.kind(), error.path(), error.got()),
        (Kind::Io, Some(&*at("link")), Some("a link to there/target"))
    );
    assert_eq!(number(&at("there/target")), 1);

    symlink("link", at("second")).unwrap();
    let report = save("second", 3, Symlinks::Follow).unwrap();
    assert_eq!(report.files[0].path, at("there/target"));
    assert!(at("link").is_symlink() && at("second").is_symlink());
    assert_eq!(number(&at("there/target")), 3);

    save("link", 4, Symlinks::Replace).unwrap();
    assert!(!at("link").is_symlink() && at("second").is_symlink());
    assert_eq!((number(&at("link")), number(&at("there/target")), number(&at("second"))), (4, 3, 4));

    symlink("there/new", at("dangling")).unwrap();
    save("dangling", 5, Symlinks::Follow).unwrap();
    assert!(at("dangling").is_symlink());
    assert_eq!(number(&at("there/new")), 5);

    symlink("loop2", at("loop1")).unwrap();
    symlink("loop1", at("loop2")).unwrap();
    symlink("there", at("folder")).unwrap();
    symlink("nowhere/x", at("astray")).unwrap();
    for (name, words) in [("loop1", "leads nowhere"), ("folder", "is a folder"), ("astray", "No such file")] {
        let error = save(name, 6, Symlinks::Follow).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Io, Some(&*at(name))), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    save("loop1", 7, Symlinks::Replace).unwrap();
    assert_eq!(number(&at("loop1")), 7);
    assert_eq!(names(&at("there")), ["new", "target"]);
    assert!(names(folder.path()).iter().all(|name| !name.starts_with('.')));

    // The files of a set are put in place together, which is not possible in several folders.
    let set = at("set");
    fs::create_dir(&set).unwrap();
    symlink("../there/target", set.join("model-00001-of-00002.safetensors")).unwrap();
    let plan = plan_shards(metas(), 400_000, "model").unwrap();
    let follow = SaveOptions::new().with_symlinks(Symlinks::Follow);
    assert_eq!(ShardedWriter::create(&set, &plan, &follow).unwrap_err().kind(), Kind::Argument);
    assert_eq!(ShardedWriter::create(&set, &plan, &SaveOptions::new()).unwrap_err().kind(), Kind::Io);
    assert_eq!((names(&set).len(), number(&at("there/target"))), (1, 3));
}

#[test]
fn permissions_of_a_replaced_file_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    for mode in [0o600, 0o644, 0o444, 0o660] {
        let _ = fs::remove_file(&path);
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        stream(&path, 1, options(1)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
        assert_eq!(number(&path), 1);
    }
}

#[test]
fn a_file_that_is_not_to_be_renamed_is_kept_beside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    stream(&path, 1, options(1)).unwrap();
    let keep = |number| stream(&path, number, options(number).with_rename(false)).unwrap().files[0].path.clone();
    let (first, second) = (keep(2), keep(3));
    assert_eq!((number(&path), number(&first), number(&second)), (1, 2, 3));
    // No later save takes them for what a killed one left.
    stream(&path, 4, options(4)).unwrap();
    assert_eq!((number(&path), number(&first), number(&second)), (4, 2, 3));
    fs::rename(&first, &path).unwrap();
    fs::remove_file(&second).unwrap();
    assert_eq!(names(folder.path()), ["m.safetensors"]);
}

#[test]
fn only_what_nobody_writes_any_more_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let live = StreamingWriter::create(&path, metas(), &options(1)).unwrap();
    let temporary = names(folder.path()).remove(0);
    // As a killed process leaves it, once for this destination and once for another one.
    let (start, _) = temporary.rsplit_once('.').and_then(|(name, _)| name.rsplit_once('.')).unwrap();
    fs::write(folder.path().join(format!("{start}.1-1.uel-tmp")), "left").unwrap();
    fs::write(folder.path().join(".other.0123456789abcdef.1-1.uel-tmp"), "left").unwrap();
    stream(&path, 2, options(2)).unwrap();
    assert_eq!(names(folder.path()).len(), 3, "{:?}", names(folder.path()));
    for meta in metas() {
        live.write(&meta.name, meta.dtype, &meta.shape, &vec![1; meta.shape[0]]).unwrap();
    }
    live.finish().unwrap();
    assert_eq!(number(&path), 1);
    assert_eq!(names(folder.path()), [".other.0123456789abcdef.1-1.uel-tmp", "m.safetensors"]);
}
