//! A Python process that measures torch's loader.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

#[derive(Debug)]
pub(crate) struct Torch {
    child: RefCell<Child>,
    pipes: RefCell<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Torch {
    /// Starts the interpreter that `UEL_TORCH` names; `None` where it names none.
    pub(crate) fn start() -> Option<Self> {
        let python = std::env::var_os("UEL_TORCH")?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/loaders.py");
        let mut child =
            Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python");
        let pipes = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let torch = Self { child: child.into(), pipes: pipes.into() };
        println!("torch {}", torch.answer().strip_prefix("ready ").expect("ready"));
        Some(torch)
    }

    fn answer(&self) -> String {
        let mut line = String::new();
        self.pipes.borrow_mut().1.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the Python process ended");
        line.trim().to_owned()
    }

    /// Samples and seconds, by its own clock; `None` where it lacks a package.
    pub(crate) fn measure(&self, loader: &str, workload: &str, folder: &Path) -> Option<(f64, f64)> {
        writeln!(self.pipes.borrow_mut().0, "{loader} {workload} {}", folder.display()).unwrap();
        let answer = self.answer();
        let Some(numbers) = answer.strip_prefix("samples ") else {
            println!("{loader}: {answer}");
            return None;
        };
        let (samples, seconds) = numbers.split_once(' ').unwrap();
        Some((samples.parse().unwrap(), seconds.parse().unwrap()))
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        let _ = self.child.borrow_mut().kill();
        let _ = self.child.borrow_mut().wait();
    }
}
