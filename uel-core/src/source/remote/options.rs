//! How objects are read.

use super::cache::CacheOptions;
use crate::limits;
use std::time::Duration;

/// How objects on servers are read. Which server, which region and as whom stands in the URL and the environment.
///
/// ```
/// use uel_core::source::remote::{CacheOptions, RemoteOptions};
/// let options = RemoteOptions::new()
///     .with_concurrency(32)
///     .with_cache(CacheOptions::new("/var/cache/uel").with_max_bytes(100 << 30));
/// assert_eq!(options.concurrency(), 32);
/// ```
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    concurrency: usize,
    budget: u64,
    request_bytes: u64,
    head_bytes: u64,
    timeout: Duration,
    deadline: Duration,
    retries: usize,
    backoff: Duration,
    cache: Option<CacheOptions>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            concurrency: 16,
            budget: 128 << 20,
            request_bytes: 4 << 20,
            head_bytes: limits::REMOTE_HEAD_BYTES,
            timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(180),
            retries: 8,
            backoff: Duration::from_millis(100),
            cache: None,
        }
    }
}

impl RemoteOptions {
    /// 16 requests at once of up to 4 MiB each, 128 MiB in flight, 30 seconds a request and three minutes with its
    /// retries, no cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// At most `requests` requests run at once; 0 counts as 1. All sources of one checkpoint share them.
    #[must_use]
    pub fn with_concurrency(mut self, requests: usize) -> Self {
        self.concurrency = requests.clamp(1, limits::MAX_REMOTE_REQUESTS);
        self
    }

    /// At most `bytes` bytes were asked for and are not yet with who asked; at least one request's.
    #[must_use]
    pub fn with_budget(mut self, bytes: u64) -> Self {
        self.budget = bytes;
        self
    }

    /// No request asks for more than `bytes` bytes: longer reads become several requests at once.
    #[must_use]
    pub fn with_request_bytes(mut self, bytes: u64) -> Self {
        self.request_bytes = bytes.clamp(limits::MIN_REMOTE_REQUEST_BYTES, limits::MAX_REMOTE_REQUEST_BYTES);
        self
    }

    /// The request that opens an object asks for its first `bytes` bytes, 512 KiB where nothing else is said: enough for most
    /// headers. The answer also tells its length and version.
    #[must_use]
    pub fn with_head_bytes(mut self, bytes: u64) -> Self {
        self.head_bytes = bytes.clamp(1, limits::MAX_REMOTE_REQUEST_BYTES);
        self
    }

    /// One attempt at a request, its body included, takes at most `timeout`.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout.clamp(Duration::from_millis(1), limits::MAX_REMOTE_DEADLINE);
        self
    }

    /// A request with all its retries takes at most `deadline`.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.clamp(Duration::from_millis(1), limits::MAX_REMOTE_DEADLINE);
        self
    }

    /// A request that failed for a reason that may pass (5xx, 429, a connection lost) is made again up to `retries` times.
    #[must_use]
    pub fn with_retries(mut self, retries: usize) -> Self {
        self.retries = retries;
        self
    }

    /// The wait before the first retry. Each is longer than the one before, by a random factor, up to 15 seconds.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Duration) -> Self {
        self.backoff = backoff.clamp(Duration::from_millis(1), limits::MAX_REMOTE_DEADLINE);
        self
    }

    /// Keeps what was read on a local disk, for later runs and other processes.
    #[must_use]
    pub fn with_cache(mut self, cache: CacheOptions) -> Self {
        self.cache = Some(cache);
        self
    }

    /// How many requests run at once.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// How many bytes are in flight at most.
    pub fn budget(&self) -> u64 {
        self.budget.max(self.request_bytes)
    }

    /// The longest request in bytes.
    pub fn request_bytes(&self) -> u64 {
        self.request_bytes
    }

    /// How many bytes the request that opens an object asks for.
    pub fn head_bytes(&self) -> u64 {
        self.head_bytes
    }

    /// How long one attempt may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// How long a request may take with its retries.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// How often a request is made again.
    pub fn retries(&self) -> usize {
        self.retries
    }

    /// The wait before the first retry.
    pub fn backoff(&self) -> Duration {
        self.backoff
    }

    /// Where what was read is kept, if anywhere.
    pub fn cache(&self) -> Option<&CacheOptions> {
        self.cache.as_ref()
    }
}
