//! Everything that is logged, printed. Nothing of it may be a secret.

use std::fmt::{Debug, Write};
use std::process::Command;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use uel::Checkpoint;

use super::moto::said;
use super::server::{Fault, Server};
use super::{CPU, options, put, written};

/// What is before each line that was logged.
const TOLD: &str = "told: ";

struct Loud;

/// From now on this process prints all that it logs, at every level.
pub(super) fn listen() {
    tracing::subscriber::set_global_default(Loud).unwrap();
    log::set_logger(&Loud).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
}

#[derive(Default)]
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        write!(self.0, " {field}={value:?}").unwrap();
    }
}

fn tell(metadata: &Metadata<'_>, fields: Fields) {
    eprintln!("{TOLD}{} {}{}", metadata.target(), metadata.name(), fields.0);
}

impl Subscriber for Loud {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::default();
        span.record(&mut fields);
        tell(span.metadata(), fields);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        eprintln!("{TOLD}{}", fields.0);
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        tell(event.metadata(), fields);
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl log::Log for Loud {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{TOLD}{} {}", record.target(), record.args());
    }

    fn flush(&self) {}
}

/// The lines that a program with [`listen`] printed.
pub(super) fn told(text: &str) -> usize {
    text.matches(TOLD).count()
}

#[test]
fn nothing_that_is_logged_tells_a_query() {
    const INNER: &str = "UEL_TEST_LOUD";
    if std::env::var_os(INNER).is_some() {
        listen();
        return load_with_faults();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "remote::loud::nothing_that_is_logged_tells_a_query", "--nocapture"])
        .env(INNER, "1")
        .output()
        .unwrap();
    let text = said(&output);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert!(told(&text) >= 10 && text.contains("uel_candle"), "{text}");
}

/// All goes well, then nothing does.
fn load_with_faults() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let path = folder.path().join("model.safetensors");
    written(&path);
    let url = format!("{}?X-Amz-Signature=s3cr3t", put(&server, &path));
    let checkpoint = options().open(&url).unwrap();
    let faults = [Fault::Status(503), Fault::Status(403), Fault::Reset(10), Fault::IgnoresRange, Fault::Garbage];
    for fault in faults {
        server.fail([fault.clone()]);
        let _ = checkpoint.load_all(&CPU);
        server.fail(vec![fault; 30]);
        let _ = checkpoint.load_all(&CPU).map_err(|error| tracing::error!("{error} {error:?}"));
        let _ = Checkpoint::open(&url).map_err(|error| log::error!("{error} {error:?}"));
        server.forget_faults();
    }
    checkpoint.load_all(&CPU).unwrap();
}
