//! A Python process that reads and writes files, and says how long it took.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// A Python process that does what it is told and says how long it took.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts the interpreter that `UEL_TORCH` names; `None` where it names none.
    pub(crate) fn start() -> Option<Self> {
        let python = std::env::var_os("UEL_TORCH")?;
        // In the program itself, which may have been carried to another machine.
        let script = include_str!("worker.py");
        let mut child = Command::new(python)
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python");
        let (to, from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut worker = Self { child, to, from };
        println!("torch {}", worker.answer());
        Some(worker)
    }

    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            self.from.read_line(&mut line).unwrap();
            assert!(!line.is_empty(), "the Python process ended");
            let answer = ["ready ", "seconds ", "has "].iter().find_map(|prefix| line.strip_prefix(prefix));
            if let Some(answer) = answer {
                return answer.trim().to_owned();
            }
        }
    }

    /// Whether a module can be imported.
    pub(crate) fn has(&mut self, module: &str) -> bool {
        writeln!(self.to, "has {module}").unwrap();
        self.to.flush().unwrap();
        self.answer() == "True"
    }

    /// What measures how long it takes to do `what` with a file.
    pub(crate) fn timed<'a>(
        worker: &'a RefCell<Self>,
        what: &'a str,
        path: &'a Path,
    ) -> Box<dyn FnMut() -> Duration + 'a> {
        Box::new(move || worker.borrow_mut().run(what, path, ""))
    }

    /// How long it took, by its own clock.
    pub(crate) fn run(&mut self, what: &str, path: &Path, rest: &str) -> Duration {
        writeln!(self.to, "{what} {} {rest}", path.display()).unwrap();
        self.to.flush().unwrap();
        Duration::from_secs_f64(self.answer().parse().unwrap())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
