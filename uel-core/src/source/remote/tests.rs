//! What can be told without a server.

use super::{Remote, RemoteOptions, object_store};
use crate::source::ByteSourceExt;
use crate::{ByteRange, Kind};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

#[test]
fn options_stay_within_their_limits() {
    let options = RemoteOptions::new()
        .with_concurrency(0)
        .with_budget(0)
        .with_request_bytes(0)
        .with_head_bytes(0)
        .with_timeout(Duration::ZERO)
        .with_deadline(Duration::MAX)
        .with_backoff(Duration::ZERO);
    assert_eq!((options.concurrency(), options.head_bytes()), (1, 1));
    assert!(options.request_bytes() > 0 && options.budget() >= options.request_bytes());
    assert!(options.timeout() > Duration::ZERO && options.backoff() > Duration::ZERO);
    assert!(options.deadline() < Duration::from_secs(1 << 20));
    let most = RemoteOptions::new().with_concurrency(usize::MAX).with_budget(u64::MAX).with_request_bytes(u64::MAX);
    assert_eq!(Remote::new(most).options().concurrency(), crate::limits::MAX_REMOTE_REQUESTS);
}

type Lie = fn(GetResult) -> GetResult;

/// A store in memory that answers as it is told, whatever it was asked.
#[derive(Debug)]
struct Liar {
    inner: InMemory,
    lie: Lie,
}

impl std::fmt::Display for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Liar")
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = object_store::Result<T>> + Send + 'a>>;

impl ObjectStore for Liar {
    fn put_opts<'a: 'f, 'b: 'f, 'f>(
        &'a self,
        location: &'b Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Answer<'f, PutResult>
    where
        Self: 'f,
    {
        self.inner.put_opts(location, payload, options)
    }

    fn put_multipart_opts<'a: 'f, 'b: 'f, 'f>(
        &'a self,
        location: &'b Path,
        options: PutMultipartOptions,
    ) -> Answer<'f, Box<dyn MultipartUpload>>
    where
        Self: 'f,
    {
        self.inner.put_multipart_opts(location, options)
    }

    fn get_opts<'a: 'f, 'b: 'f, 'f>(&'a self, location: &'b Path, options: GetOptions) -> Answer<'f, GetResult>
    where
        Self: 'f,
    {
        let first = options.range == Some(GetRange::Bounded(0..100));
        let got = self.inner.get_opts(location, options);
        Box::pin(async move { Ok(if first { got.await? } else { (self.lie)(got.await?) }) })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_delimiter<'a: 'f, 'b: 'f, 'f>(&'a self, prefix: Option<&'b Path>) -> Answer<'f, ListResult>
    where
        Self: 'f,
    {
        self.inner.list_with_delimiter(prefix)
    }

    fn copy_opts<'a: 'f, 'b: 'f, 'c: 'f, 'f>(
        &'a self,
        from: &'b Path,
        to: &'c Path,
        options: CopyOptions,
    ) -> Answer<'f, ()>
    where
        Self: 'f,
    {
        self.inner.copy_opts(from, to, options)
    }
}

fn body(pieces: &'static [&'static [u8]]) -> GetResultPayload {
    GetResultPayload::Stream(futures_util::stream::iter(pieces.iter().map(|piece| Ok((*piece).into()))).boxed())
}

/// What a read of 100,000 bytes gives of a store that lies so.
fn read_through(lie: Lie) -> crate::Result<Vec<u8>> {
    let inner = InMemory::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(inner.put(&"object".into(), vec![7u8; 300_000].into())).unwrap();
    let remote = Remote::new(RemoteOptions::new().with_head_bytes(100));
    let source = remote.open_object(Arc::new(Liar { inner, lie }), "object", "memory:///object").unwrap();
    source.read_range(ByteRange::new(1000, 101_000).unwrap())
}

#[test]
fn no_store_is_believed() {
    assert_eq!(read_through(|got| got).unwrap(), vec![7; 100_000]);
    let lies: [(Lie, Kind); 8] = [
        (|got| GetResult { payload: body(&[]), ..got }, Kind::Remote),
        (|got| GetResult { payload: body(&[b"short"]), ..got }, Kind::Remote),
        (|got| GetResult { payload: body(&[&[7; 60_000], &[7; 60_000]]), ..got }, Kind::Remote),
        (|got| GetResult { payload: body(&[&[7; 50_000], &[7; 50_000], &[], &[7]]), ..got }, Kind::Remote),
        (|got| GetResult { range: 1001..101_001, ..got }, Kind::Remote),
        (|got| GetResult { meta: ObjectMeta { size: 300_001, ..got.meta.clone() }, ..got }, Kind::Changed),
        (|got| GetResult { meta: ObjectMeta { e_tag: Some("9".into()), ..got.meta.clone() }, ..got }, Kind::Changed),
        (|got| GetResult { meta: ObjectMeta { e_tag: None, ..got.meta.clone() }, ..got }, Kind::Changed),
    ];
    for (number, (lie, kind)) in lies.into_iter().enumerate() {
        let error = read_through(lie).expect_err(&format!("lie {number}"));
        assert_eq!(error.kind(), kind, "lie {number}: {error}");
    }
    // Pieces of any size are put together.
    assert_eq!(
        read_through(|got| GetResult { payload: body(&[&[7; 60_000], &[], &[7; 40_000]]), ..got }).unwrap().len(),
        100_000
    );
}

#[test]
fn a_store_that_panics_is_an_error() {
    let error = read_through(|_| panic!("on purpose")).unwrap_err();
    assert_eq!(error.kind(), Kind::WorkerPanic);
}
