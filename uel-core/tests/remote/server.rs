//! An HTTP/1.1 server for tests that serves ranges, and breaks its promises as told.
#![allow(dead_code, reason = "the programs that share this file use different parts of it")]

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What one request is answered with, instead of what it should be.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Fault {
    /// As it should be.
    None,
    /// A status, with a body that holds what must not be passed on.
    Status(u16),
    /// The same with a `Retry-After` of no seconds.
    Throttled(u16),
    /// The connection ends after so many bytes of the body, properly.
    Short(usize),
    /// The connection is reset after so many bytes of the body.
    Reset(usize),
    /// The body has so many bytes and no length was named, so that nobody can see that it is short.
    Unmarked(usize),
    /// More bytes than were asked for, without a length.
    Long(usize),
    /// The whole object, with status 200.
    IgnoresRange,
    /// Bytes from elsewhere, and says so.
    Shifted(i64),
    /// The bytes that were asked for, called others.
    Mislabelled,
    /// Another ETag.
    Etag(&'static str),
    /// The answer comes late.
    Slow(Duration),
    /// No HTTP at all.
    Garbage,
    /// Nothing, while the server lives.
    Silence,
}

/// One object.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    /// Its first bytes; zeros follow.
    pub(crate) bytes: Arc<[u8]>,
    /// Where its bytes stand instead, if they do.
    pub(crate) file: Option<Arc<File>>,
    pub(crate) byte_len: u64,
    pub(crate) etag: Option<String>,
    pub(crate) modified: Option<String>,
    /// Where it is instead.
    pub(crate) redirect: Option<String>,
}

/// A request, and what was sent.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) range: Option<String>,
    pub(crate) if_match: Option<String>,
    pub(crate) body_bytes: u64,
}

#[derive(Debug, Default)]
struct State {
    objects: Mutex<HashMap<String, Object>>,
    faults: Mutex<VecDeque<Fault>>,
    seen: Mutex<Vec<Seen>>,
    ignores_if_match: AtomicBool,
    stopped: AtomicBool,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

/// A server on loopback. Dropping it ends its threads.
#[derive(Debug)]
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<State>,
    accepting: Option<JoinHandle<()>>,
}

/// What is in the bodies of refusals.
pub(crate) const SECRET: &str = "s3cr3t";

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let accepting = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let state = Arc::clone(&shared);
                if let Ok(stream) = stream {
                    std::thread::spawn(move || serve(stream, &state));
                }
            }
        });
        Self { address, state, accepting: Some(accepting) }
    }

    pub(crate) fn url(&self, target: &str) -> String {
        format!("http://{}{target}", self.address)
    }

    /// Puts an object at `path`, with an ETag made of its bytes.
    pub(crate) fn put(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let bytes: Arc<[u8]> = bytes.into().into();
        let hash = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        let byte_len = bytes.len() as u64;
        let etag = Some(format!("\"{hash:016x}-{byte_len}\""));
        self.put_object(path, Object { bytes, byte_len, etag, modified: None, redirect: None, file: None });
    }

    /// Puts an object of `byte_len` bytes, all zero behind the first ones.
    pub(crate) fn put_sparse(&self, path: &str, first: impl Into<Vec<u8>>, byte_len: u64) {
        let etag = Some("\"sparse\"".to_owned());
        let bytes = first.into().into();
        self.put_object(path, Object { bytes, byte_len, etag, modified: None, redirect: None, file: None });
    }

    /// Puts what stands in a file.
    pub(crate) fn put_file(&self, path: &str, file: File) {
        let byte_len = file.metadata().unwrap().len();
        let (etag, file) = (Some("\"file\"".to_owned()), Some(Arc::new(file)));
        self.put_object(path, Object { bytes: Arc::from([]), byte_len, etag, modified: None, redirect: None, file });
    }

    pub(crate) fn put_object(&self, path: &str, object: Object) {
        self.state.objects.lock().unwrap().insert(path.to_owned(), object);
    }

    pub(crate) fn remove(&self, path: &str) {
        self.state.objects.lock().unwrap().remove(path);
    }

    /// Sends whoever asks for `path` to `to`.
    pub(crate) fn redirect(&self, path: &str, to: impl Into<String>) {
        let object = Object {
            bytes: Arc::from([]),
            byte_len: 0,
            etag: None,
            modified: None,
            redirect: Some(to.into()),
            file: None,
        };
        self.put_object(path, object);
    }

    /// What the next requests meet, one each.
    pub(crate) fn fail(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.faults.lock().unwrap().extend(faults);
    }

    pub(crate) fn forget_faults(&self) {
        self.state.faults.lock().unwrap().clear();
    }

    pub(crate) fn ignore_if_match(&self) {
        self.state.ignores_if_match.store(true, Ordering::SeqCst);
    }

    /// The requests so far, which are forgotten.
    pub(crate) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.seen.lock().unwrap())
    }

    /// The most requests that were under way at once.
    pub(crate) fn most_running(&self) -> usize {
        self.state.most_running.load(Ordering::SeqCst)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        let _ = self.accepting.take().unwrap().join();
    }
}

fn serve(mut stream: TcpStream, state: &State) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
    let _ = stream.set_write_timeout(Some(Duration::from_secs(20)));
    let _ = stream.set_nodelay(true);
    while !state.stopped.load(Ordering::SeqCst) {
        let Some(head) = read_head(&mut stream) else { return };
        let running = state.running.fetch_add(1, Ordering::SeqCst) + 1;
        state.most_running.fetch_max(running, Ordering::SeqCst);
        let goes_on = answer(&mut stream, &head, state);
        state.running.fetch_sub(1, Ordering::SeqCst);
        if !goes_on {
            return;
        }
    }
}

/// A request's head but for its last byte: a socket that is closed with a byte unread is reset.
fn read_head(stream: &mut TcpStream) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r") {
        match stream.read(&mut byte) {
            Ok(1) if head.len() < 64 << 10 => head.push(byte[0]),
            _ => return None,
        }
    }
    // That of the request before may still be there.
    String::from_utf8(head).ok().map(|head| head.trim_start_matches('\n').to_owned())
}

/// Answers one request, and says whether the connection goes on.
fn answer(stream: &mut TcpStream, head: &str, state: &State) -> bool {
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let header = |name: &str| {
        let mut headers = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        headers.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim().to_owned())
    };
    let (range, if_match) = (header("range"), header("if-match"));
    let fault = state.faults.lock().unwrap().pop_front().unwrap_or(Fault::None);
    let mut seen = Seen {
        method: method.to_owned(),
        target: target.to_owned(),
        range: range.clone(),
        if_match: if_match.clone(),
        body_bytes: 0,
    };
    let path = target.split('?').next().unwrap_or_default();
    let object = state.objects.lock().unwrap().get(path).cloned();
    let note = |seen: Seen| state.seen.lock().unwrap().push(seen);

    if let Fault::Reset(0) = fault {
        note(seen);
        return false;
    }
    let whole_head = |stream: &mut TcpStream| stream.read(&mut [0]).is_ok_and(|read| read == 1);
    match &fault {
        Fault::Reset(_) => {}
        _ if !whole_head(stream) => return false,
        Fault::Slow(time) => std::thread::sleep(*time),
        Fault::Garbage => {
            note(seen);
            let _ = stream.write_all(b"no such thing as HTTP\r\n\r\n");
            return false;
        }
        Fault::Silence => {
            note(seen);
            for _ in 0..200 {
                if state.stopped.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            return false;
        }
        _ => {}
    }
    let refuse = |stream: &mut TcpStream, status: u16, more: &str| {
        let body = if method == "HEAD" || status == 304 {
            String::new()
        } else {
            format!("<Error><Code>Code{status}</Code><StringToSign>{SECRET}</StringToSign></Error>")
        };
        let text = format!("HTTP/1.1 {status} No\r\nContent-Length: {}\r\n{more}\r\n{body}", body.len());
        stream.write_all(text.as_bytes()).is_ok()
    };
    match fault {
        Fault::Status(status) => {
            note(seen);
            return refuse(stream, status, "");
        }
        Fault::Throttled(status) => {
            note(seen);
            return refuse(stream, status, "Retry-After: 0\r\n");
        }
        _ => {}
    }
    let Some(object) = object else {
        note(seen);
        return refuse(stream, 404, "");
    };
    if let Some(to) = &object.redirect {
        note(seen);
        return refuse(stream, 302, &format!("Location: {to}\r\n"));
    }
    let etag = match &fault {
        Fault::Etag(etag) => Some((*etag).to_owned()),
        _ => object.etag.clone(),
    };
    let differs = if_match.as_ref().is_some_and(|wanted| Some(wanted) != etag.as_ref());
    if differs && !state.ignores_if_match.load(Ordering::SeqCst) {
        note(seen);
        return refuse(stream, 412, "");
    }
    let asked = range.as_deref().and_then(|range| asked_for(range, object.byte_len));
    let (status, start, end) = match asked {
        _ if fault == Fault::IgnoresRange => (200, 0, object.byte_len),
        None if range.is_some() => {
            note(seen);
            return refuse(stream, 416, &format!("Content-Range: bytes */{}\r\n", object.byte_len));
        }
        None => (200, 0, object.byte_len),
        Some((start, end)) => (206, start, end),
    };
    let (mut labels, mut from) = ((start, end), start);
    match fault {
        Fault::Shifted(by) => {
            from = start.saturating_add_signed(by).min(object.byte_len.saturating_sub(end - start));
            labels = (from, from + (end - start));
        }
        Fault::Mislabelled => labels = (start + 1, end + 1),
        _ => {}
    }
    let length = end - start;
    let (sent, marked, more) = match fault {
        Fault::Short(sent) | Fault::Reset(sent) => ((sent as u64).min(length), true, 0),
        Fault::Unmarked(sent) => ((sent as u64).min(length), false, 0),
        Fault::Long(more) => (length, false, more),
        _ => (length, true, 0),
    };
    let mut text = format!("HTTP/1.1 {status} Fine\r\nAccept-Ranges: bytes\r\n");
    if status == 206 {
        text += &format!("Content-Range: bytes {}-{}/{}\r\n", labels.0, labels.1 - 1, object.byte_len);
    }
    let closes = sent < length || !marked;
    text += &if marked { format!("Content-Length: {length}\r\n") } else { "Connection: close\r\n".to_owned() };
    for (name, value) in [("ETag", &etag), ("Last-Modified", &object.modified)] {
        text += &value.as_ref().map_or(String::new(), |value| format!("{name}: {value}\r\n"));
    }
    text += "\r\n";
    seen.body_bytes = if method == "HEAD" { 0 } else { sent + more as u64 };
    note(seen);
    if stream.write_all(text.as_bytes()).is_err() {
        return false;
    }
    if method == "HEAD" {
        return true;
    }
    let (mut at, to) = (from, from + sent);
    while at < to {
        let piece = content(&object, at, (to - at).min(64 << 10) as usize);
        if stream.write_all(&piece).is_err() {
            return false;
        }
        at += piece.len() as u64;
    }
    let _ = stream.write_all(&vec![0xEE; more]);
    let _ = stream.flush();
    !closes && !matches!(fault, Fault::Reset(_))
}

fn content(object: &Object, at: u64, len: usize) -> Vec<u8> {
    if let Some(file) = &object.file {
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&**file, &mut bytes, at).unwrap();
        return bytes;
    }
    (at..at + len as u64).map(|at| object.bytes.get(at as usize).copied().unwrap_or(0)).collect()
}

/// The bytes that `bytes=A-B` asks for.
fn asked_for(range: &str, byte_len: u64) -> Option<(u64, u64)> {
    let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
    let start: u64 = start.parse().ok()?;
    let end = end.parse::<u64>().map_or(byte_len, |end| end.saturating_add(1)).min(byte_len);
    (start < end).then_some((start, end))
}
