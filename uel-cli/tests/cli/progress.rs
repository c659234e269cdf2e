//! What a person sees who watches the terminal.

use super::write;
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use safetensors::tensor::Dtype;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// What the program draws on a terminal that stderr is, and what it prints on stdout, which is none.
/// `None` where there are no pseudo-terminals, as in some containers.
fn on_a_terminal(args: &[&OsStr]) -> Option<(String, String)> {
    let screen = match openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC) {
        Err(Errno::NOENT | Errno::ACCESS | Errno::NXIO) => return None,
        opened => opened.unwrap(),
    };
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let name = ptsname(&screen, Vec::new()).unwrap();
    let noctty = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
    let terminal = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(noctty)
        .open(OsStr::from_bytes(name.to_bytes()))
        .unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_uel"))
        .args(args)
        .env("TERM", "xterm")
        .stdout(Stdio::piped())
        .stderr(terminal)
        .spawn()
        .unwrap();
    let reader = std::thread::spawn(move || {
        let (mut screen, mut drawn) = (File::from(screen), Vec::new());
        // Ends with an error once nobody holds the terminal any more.
        let _ = screen.read_to_end(&mut drawn);
        String::from_utf8(drawn).unwrap()
    });
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    Some((reader.join().unwrap(), String::from_utf8(output.stdout).unwrap()))
}

#[test]
fn long_work_has_a_bar_that_is_gone_at_the_end() {
    let dir = TempDir::new().unwrap();
    let (path, to) = (dir.path().join("model.safetensors"), dir.path().join("half.safetensors"));
    let tensors: Vec<String> = (0..8).map(|n| format!("w{n}")).collect();
    let tensors: Vec<_> =
        tensors.iter().map(|name| (name.as_str(), Dtype::F32, &[1 << 20][..], vec![0; 4 << 20])).collect();
    write(&path, &tensors);
    let (path, to) = (path.as_os_str(), to.as_os_str());
    let bench = ["bench", "load", "--runs", "1", "--memcpy-bytes", "100000"].map(OsStr::new);
    for (args, total) in [
        (vec![OsStr::new("convert"), path, to, OsStr::new("--dtype"), OsStr::new("bf16")], "MB, "),
        (vec![OsStr::new("verify"), path, OsStr::new("--deep")], "of 33.55 MB, "),
        ([&bench[..], &[path]].concat(), " of "),
    ] {
        let Some((drawn, printed)) = on_a_terminal(&args) else {
            println!("not run: the system has no pseudo-terminals");
            return;
        };
        assert!(drawn.contains('░') || drawn.contains('█'), "{args:?}: no bar in {drawn:?}");
        assert!(drawn.contains(total), "{args:?}: {drawn:?}");
        // The last thing is that the line is cleared.
        assert!(drawn.trim_end_matches('\r').ends_with("\u{1b}[2K"), "{args:?}: {drawn:?}");
        assert!(!printed.contains('\u{1b}'), "{args:?}: {printed:?}");
    }
}
