//! What a load tells a `tracing` subscriber, and that it tells nobody else.

use std::fmt::Debug;
use std::process::Command;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Tensor};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use uel::{Checkpoint, LoadOptions, Mode};

use crate::checkpoint::{CPU, MODES, mapping, save};

/// A span or an event, within spans.
#[derive(Clone, Debug)]
struct Noted {
    /// The names of the spans around it, outermost first, and its own, or its message.
    path: Vec<String>,
    target: String,
    /// ` name=value` for each field.
    fields: String,
}

impl Noted {
    fn name(&self) -> &str {
        self.path.last().unwrap()
    }
}

#[derive(Default)]
struct State {
    noted: Vec<Noted>,
    /// The path of each span, by its id less one.
    spans: Vec<Vec<String>>,
    entered: Vec<u64>,
}

/// Notes what one thread does.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<State>>);

impl Notes {
    fn of(work: impl FnOnce()) -> Vec<Noted> {
        let notes = Notes::default();
        tracing::subscriber::with_default(notes.clone(), work);
        let state = std::mem::take(&mut *notes.0.lock().unwrap());
        assert!(state.entered.is_empty(), "every span that was entered is left");
        state.noted.into_iter().filter(|noted| noted.target.starts_with("uel_candle")).collect()
    }

    fn note(&self, metadata: &Metadata<'_>, parent: Option<&Id>, fields: Fields) -> Vec<String> {
        let mut state = self.0.lock().unwrap();
        let parent = parent.map(Id::into_u64).or_else(|| state.entered.last().copied());
        let mut path = parent.map_or_else(Vec::new, |id| state.spans[id as usize - 1].clone());
        path.push(fields.message.unwrap_or_else(|| metadata.name().to_owned()));
        let noted = Noted { path: path.clone(), target: metadata.target().to_owned(), fields: fields.text };
        state.noted.push(noted);
        path
    }
}

#[derive(Default)]
struct Fields {
    message: Option<String>,
    text: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = Some(format!("{value:?}")),
            name => self.text.push_str(&format!(" {name}={value:?}")),
        }
    }
}

impl Subscriber for Notes {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields::default();
        span.record(&mut fields);
        let path = self.note(span.metadata(), span.parent(), fields);
        let mut state = self.0.lock().unwrap();
        state.spans.push(path);
        Id::from_u64(state.spans.len() as u64)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.note(event.metadata(), event.parent(), fields);
    }

    fn enter(&self, span: &Id) {
        self.0.lock().unwrap().entered.push(span.into_u64());
    }

    fn exit(&self, span: &Id) {
        let mut state = self.0.lock().unwrap();
        let at = state.entered.iter().rposition(|&entered| entered == span.into_u64()).unwrap();
        state.entered.remove(at);
    }
}

/// 2 MB in two tensors.
fn file() -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensor = Tensor::zeros((512, 512), DType::F32, &CPU).unwrap();
    save(&path, &[("a", tensor.clone()), ("b", tensor)]);
    (folder, path)
}

/// Whether a span called `name` was opened within the spans `around`.
fn has(noted: &[Noted], around: &[&str], name: &str) -> bool {
    noted.iter().any(|noted| {
        let (own, outer) = noted.path.split_last().unwrap();
        own == name && outer.iter().map(String::as_str).eq(around.iter().copied())
    })
}

#[test]
fn opening_and_loading_are_spans_with_their_events() {
    let (_folder, path) = file();
    for mode in MODES {
        let noted = Notes::of(|| {
            let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
            checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
        });
        assert!(has(&noted, &[], "open") && has(&noted, &[], "load"), "{mode}: {noted:#?}");
        let open = noted.iter().find(|noted| noted.name() == "open").unwrap();
        assert!(open.fields.contains(path.to_str().unwrap()), "{open:?}");
        let opened = noted.iter().find(|noted| noted.path == ["open", "opened"]).unwrap();
        assert!(opened.fields.contains("tensors=2") && opened.fields.contains("bytes=2097152"), "{opened:?}");
        let loaded = noted.iter().find(|noted| noted.path == ["load", "loaded"]).unwrap();
        assert!(loaded.fields.contains("tensors=2") && loaded.fields.contains("reason="), "{loaded:?}");
        if mode != Mode::Auto {
            assert!(loaded.fields.contains(&format!("mode={mode}")), "{loaded:?}");
        }
    }
}

#[test]
fn a_load_that_reads_shows_its_stages() {
    let (_folder, path) = file();
    let noted = Notes::of(|| {
        let checkpoint = Checkpoint::options().with_mode(Mode::Preload).open(&path).unwrap();
        checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
    });
    for stage in ["plan", "read", "place"] {
        assert!(has(&noted, &["load"], stage), "{stage}: {noted:#?}");
    }
}

#[test]
fn a_refused_load_leaves_its_spans() {
    let (_folder, path) = file();
    let noted = Notes::of(|| {
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.load(&LoadOptions::new(&CPU).with_names(["absent"])).unwrap_err();
        Checkpoint::open(path.with_extension("absent")).unwrap_err();
    });
    assert!(has(&noted, &[], "load"));
    assert!(!noted.iter().any(|noted| noted.name() == "loaded"), "{noted:#?}");
}

/// Set for a process of this binary whose output is looked at.
const WATCHED: &str = "UEL_TEST_WATCHED";

#[test]
fn without_a_subscriber_nothing_is_printed() {
    if std::env::var_os(WATCHED).is_some() {
        let (_folder, path) = file();
        for mode in MODES {
            let checkpoint = mapping().with_mode(mode).open(&path).unwrap();
            checkpoint.load(&LoadOptions::new(&CPU)).unwrap();
            checkpoint.tensor("a", &CPU).unwrap();
            checkpoint.load(&LoadOptions::new(&CPU).with_names(["absent"])).unwrap_err();
            Checkpoint::open(path.with_extension("absent")).unwrap_err();
        }
        return;
    }
    let name = concat!(module_path!(), "::without_a_subscriber_nothing_is_printed").split_once("::").unwrap().1;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(WATCHED, "1").env("RUST_LOG", "trace");
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    // Between the harness's own lines there is nothing.
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[1], format!("test {name} ... ok"));
}
