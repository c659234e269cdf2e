//! A server of one file on this machine: HTTP with ranges, as far as an example needs it.

use std::io::{BufRead, BufReader, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

/// Serves `bytes` as `name` as long as the program runs, and returns the URL.
pub(crate) fn file(name: &str, bytes: Vec<u8>) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/{name}", listener.local_addr()?);
    let bytes: Arc<[u8]> = bytes.into();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let bytes = Arc::clone(&bytes);
            std::thread::spawn(move || answer(stream, &bytes));
        }
    });
    Ok(url)
}

/// Answers the requests of one connection until it ends.
fn answer(mut stream: TcpStream, bytes: &[u8]) -> Result<()> {
    let mut requests = BufReader::new(stream.try_clone()?);
    loop {
        let mut range = None;
        loop {
            let mut line = String::new();
            if requests.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim().to_ascii_lowercase();
            if let Some(asked) = line.strip_prefix("range: bytes=").and_then(|asked| asked.split_once('-')) {
                range = Some((asked.0.parse().unwrap_or(0), asked.1.parse().unwrap_or(usize::MAX)));
            }
            if line.is_empty() {
                break;
            }
        }
        let (start, last) = range.unwrap_or((0, usize::MAX));
        let last = last.min(bytes.len().saturating_sub(1));
        let part = bytes.get(start..=last).unwrap_or_default();
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nETag: \"1\"\r\nContent-Range: bytes {start}-{last}/{}\r\n\
             Content-Length: {}\r\n\r\n",
            bytes.len(),
            part.len()
        )?;
        stream.write_all(part)?;
    }
}
