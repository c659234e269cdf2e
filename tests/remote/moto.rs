//! Moto, a server that speaks S3, for tests that `scripts/test remote` runs.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use tempfile::TempDir;

/// The server's process, which ends with this.
pub(crate) struct Moto {
    process: Child,
    pub(crate) stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    pub(crate) url: String,
    /// The same server, over TLS.
    pub(crate) secure_url: String,
    /// The file of the authority that signed its certificate.
    pub(crate) authority: PathBuf,
    _folder: TempDir,
}

impl Moto {
    pub(crate) fn start() -> Self {
        let python = std::env::var_os("UEL_MOTO").expect("scripts/test remote sets UEL_MOTO");
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(python)
            .args(["-c", include_str!("s3_server.py")])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = process.stdout.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let stdin = process.stdin.take();
        let authority = folder.path().join("authority.pem");
        let (url, secure_url) = Default::default();
        let mut moto = Self { process, stdin, lines, url, secure_url, authority, _folder: folder };
        let line = moto.line();
        let (url, secure_url) = line.split_once(' ').unwrap();
        (moto.url, moto.secure_url) = (url.to_owned(), secure_url.to_owned());
        moto
    }

    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(60)).expect("moto answers")
    }

    pub(crate) fn tell(&mut self, line: &str) -> String {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.line()
    }

    pub(crate) fn put(&mut self, key: &str, path: &Path) {
        assert_eq!(self.tell(&format!("put {key} {}", path.display())), "done");
    }

    /// Requests for objects since the last call, and the bytes that they brought.
    pub(crate) fn seen(&mut self) -> (usize, u64) {
        let line = self.tell("seen");
        let (requests, bytes) = line.split_once(' ').unwrap();
        (requests.parse().unwrap(), bytes.parse().unwrap())
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a user has in the environment, for the server at `url`.
pub(crate) fn environment(url: &str) -> [(&'static str, &str); 5] {
    [
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ALLOW_HTTP", "true"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "AKIATEST"),
        ("AWS_SECRET_ACCESS_KEY", "s3cr3t"),
    ]
}

/// All that a program said; none of the environment's secrets is in it.
pub(crate) fn said(output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!text.contains("s3cr3t") && !text.contains("AKIATEST"), "{text}");
    text
}
