//! From a URL to an object: which service, which client, and the limits that all requests share.

use super::cache::DiskCache;
use super::failure::scrubbed;
use super::object::Object;
use super::options::RemoteOptions;
use super::source::RemoteSource;
use crate::source::location::shown;
use crate::{Error, Kind, Result};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{HttpClient, HttpConnector, ReqwestConnector};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::path::Path as ObjectPath;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, RetryConfig};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use twox_hash::XxHash3_64;
use url::Url;

/// The longest wait between two attempts at a request.
const MAX_BACKOFF: Duration = Duration::from_secs(15);

/// The longest wait for a connection.
const MAX_CONNECT: Duration = Duration::from_secs(10);

/// Opens objects on servers. Clones share connections, limits and cache.
///
/// ```no_run
/// use uel_core::source::ByteSource;
/// use uel_core::source::remote::{Remote, RemoteOptions};
/// let remote = Remote::new(RemoteOptions::new());
/// let source = remote.open("s3://models/tiny/model.safetensors")?;
/// println!("{} bytes", source.byte_len());
/// # Ok::<(), uel_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Remote {
    shared: Arc<Shared>,
}

/// What all sources of one [`Remote`] have in common.
pub(super) struct Shared {
    pub(super) options: RemoteOptions,
    /// A permit for each request that may run.
    pub(super) requests: Semaphore,
    /// A permit for each byte that may be in flight.
    pub(super) bytes: Arc<Semaphore>,
    pub(super) cache: Option<DiskCache>,
    stores: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    http: Connector,
    https: Connector,
}

/// Clients hold credentials, and show them.
impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Remote {
    /// Objects that are read as `options` say.
    pub fn new(options: RemoteOptions) -> Self {
        let budget = usize::try_from(options.budget()).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self {
            shared: Arc::new(Shared {
                requests: Semaphore::new(options.concurrency()),
                bytes: Arc::new(Semaphore::new(budget)),
                cache: options.cache().cloned().map(DiskCache::new),
                stores: Mutex::default(),
                http: Connector::default(),
                https: Connector::default(),
                options,
            }),
        }
    }

    /// How objects are read.
    pub fn options(&self) -> &RemoteOptions {
        &self.shared.options
    }

    /// Opens the object at `url`, by one request for its first bytes.
    ///
    /// # Errors
    ///
    /// [`Kind::Argument`] for a URL that names no object, or one with a password in it; [`Kind::Io`] where there is no such
    /// object or access is denied; [`Kind::Remote`] where the server cannot be reached, does not serve ranges or names no
    /// version; [`Kind::Timeout`].
    pub fn open(&self, url: &str) -> Result<RemoteSource> {
        RemoteSource::open(Arc::clone(&self.shared), self.shared.object(url)?)
    }

    /// Opens the object at `location` of any store, such as one in memory, one behind a client of your own, or one with other
    /// credentials. Messages call it `name`. It is not kept in the disk cache.
    ///
    /// ```
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    /// use std::sync::Arc;
    /// use uel_core::source::remote::{Remote, RemoteOptions, object_store};
    /// use uel_core::source::ByteSourceExt;
    /// use object_store::{ObjectStoreExt, memory::InMemory};
    /// let store = InMemory::new();
    /// # runtime.block_on(async {
    /// store.put(&"numbers".into(), vec![1u8, 2, 3, 4].into()).await.unwrap();
    /// # });
    /// let source = Remote::new(RemoteOptions::new()).open_object(Arc::new(store), "numbers", "memory:///numbers")?;
    /// assert_eq!(source.read_array(1)?, [2, 3]);
    /// # Ok::<(), uel_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_object(
        &self,
        store: Arc<dyn ObjectStore>,
        location: &str,
        name: impl Into<PathBuf>,
    ) -> Result<RemoteSource> {
        let name: PathBuf = name.into();
        let shown = shown(&name).into_owned();
        let location = ObjectPath::parse(location).map_err(|_| argument(&shown, "no store has such a path"))?;
        RemoteSource::open(Arc::clone(&self.shared), Object { store, location, shown, key: None })
    }
}

impl Shared {
    /// The object at `text`. No request is made.
    fn object(&self, text: &str) -> Result<Object> {
        let shown = shown(Path::new(text)).into_owned();
        let url = Url::parse(text).map_err(|_| argument(&shown, "the URL is not well-formed"))?;
        if !url.username().is_empty() || url.password().is_some() {
            let error = argument(&shown, "a URL must not hold a user or password");
            return Err(error.with_expected("credentials in the environment"));
        }
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.ok_or_else(|| argument(&shown, "the URL names no server or bucket"))?;
        let key = Some(self.key(&url));
        if matches!(url.scheme(), "http" | "https") {
            let store = self.http(url).map_err(|error| unusable(&shown, &error))?;
            // The store is the object: nothing is appended to its URL, so that its query and its escapes stay as they are.
            return Ok(Object { store, location: ObjectPath::ROOT, shown, key });
        }
        if !matches!(url.scheme(), "s3" | "gs" | "az") {
            let error = argument(&shown, "the URL has a scheme that is not known");
            return Err(error.with_expected("s3, gs, az, http, https, file or hf").with_got(url.scheme()));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(argument(&shown, "the URL of an object in a bucket has no query")
                .with_expected("%3F for ? and %23 for # in the name of an object"));
        }
        let location = ObjectPath::from_url_path(url.path());
        let location = location.map_err(|_| argument(&shown, "the URL names no object that can be asked for"))?;
        if location.as_ref().is_empty() || url.path().ends_with('/') {
            let error = argument(&shown, "the URL names a bucket or folder");
            return Err(error.with_expected("the URL of one file, or of an index file"));
        }
        let store = self.bucket(url.scheme(), host).map_err(|error| unusable(&shown, &error))?;
        Ok(Object { store, location, shown, key })
    }

    /// The client of one object by HTTP. All of a scheme share connections.
    fn http(&self, mut url: Url) -> object_store::Result<Arc<dyn ObjectStore>> {
        url.set_fragment(None);
        let plain = url.scheme() == "http";
        let connector = if plain { &self.http } else { &self.https };
        let options = ClientOptions::new()
            .with_timeout(self.options.timeout())
            .with_connect_timeout(self.options.timeout().min(MAX_CONNECT))
            .with_allow_http(plain);
        let builder = HttpBuilder::new()
            .with_url(String::from(url))
            .with_retry(self.retry())
            .with_client_options(options)
            .with_http_connector(connector.clone());
        Ok(Arc::new(builder.build()?))
    }

    /// The client of one bucket, which is kept for its other objects.
    fn bucket(&self, scheme: &str, name: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        let key = format!("{scheme}://{name}");
        if let Some(store) = stores.get(&key) {
            return Ok(Arc::clone(store));
        }
        let (connect, all) = (self.options.timeout().min(MAX_CONNECT), self.options.timeout());
        let client = [(ClientConfigKey::Timeout, all), (ClientConfigKey::ConnectTimeout, connect)];
        let client = client.map(|(key, time)| (key, format!("{} ms", time.as_millis())));
        let store: Arc<dyn ObjectStore> = match scheme {
            "s3" => {
                let builder = AmazonS3Builder::from_env().with_bucket_name(name).with_retry(self.retry());
                let with =
                    |builder: AmazonS3Builder, (key, value)| builder.with_config(AmazonS3ConfigKey::Client(key), value);
                Arc::new(client.into_iter().fold(builder, with).build()?)
            }
            "gs" => {
                let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(name).with_retry(self.retry());
                let with = |builder: GoogleCloudStorageBuilder, (key, value)| {
                    builder.with_config(GoogleConfigKey::Client(key), value)
                };
                Arc::new(client.into_iter().fold(builder, with).build()?)
            }
            _ => {
                let builder = MicrosoftAzureBuilder::from_env().with_container_name(name).with_retry(self.retry());
                let with = |builder: MicrosoftAzureBuilder, (key, value)| {
                    builder.with_config(AzureConfigKey::Client(key), value)
                };
                Arc::new(client.into_iter().fold(builder, with).build()?)
            }
        };
        stores.insert(key, Arc::clone(&store));
        Ok(store)
    }

    fn retry(&self) -> RetryConfig {
        let init_backoff = self.options.backoff();
        RetryConfig {
            backoff: BackoffConfig { init_backoff, max_backoff: MAX_BACKOFF.max(init_backoff), base: 2.0 },
            max_retries: self.options.retries(),
            retry_timeout: self.options.deadline(),
        }
    }

    /// What the disk cache calls an object: its URL, less what signs a request, with hashes in the place of what might be a
    /// secret.
    fn key(&self, url: &Url) -> String {
        let mut query = String::new();
        for (name, value) in url.query_pairs().filter(|(name, _)| !signs(name)) {
            query.push_str(&format!("{}={name}{}={value}", name.len(), value.len()));
        }
        // One bucket may be many, on as many servers.
        const ENDPOINTS: [&str; 5] = [
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT",
            "AWS_ENDPOINT_URL_S3",
            "AZURE_STORAGE_ACCOUNT_NAME",
            "AZURE_STORAGE_ENDPOINT",
        ];
        if !matches!(url.scheme(), "http" | "https") {
            for name in ENDPOINTS {
                query.push_str(&format!("{name}={:?}", std::env::var_os(name)));
            }
        }
        let hashes = [1, 2].map(|seed| XxHash3_64::oneshot_with_seed(seed, query.as_bytes()));
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        let [first, second] = hashes;
        format!(
            "{}://{}{port}{} {first:016x}{second:016x}",
            url.scheme(),
            url.host_str().unwrap_or_default(),
            url.path()
        )
    }
}

/// Whether a parameter of a query signs the request and says nothing of the object: those of S3, of Google's and Azure's
/// stores, and of CloudFront.
fn signs(name: &str) -> bool {
    const SIGNED: [&str; 17] = [
        "AWSAccessKeyId",
        "Expires",
        "GoogleAccessId",
        "Key-Pair-Id",
        "Policy",
        "Signature",
        "se",
        "sig",
        "sip",
        "ske",
        "skoid",
        "sks",
        "skt",
        "sktid",
        "sp",
        "spr",
        "st",
    ];
    let lower = name.to_ascii_lowercase();
    lower.starts_with("x-amz-") || lower.starts_with("x-goog-") || SIGNED.contains(&name)
}

/// One client for all URLs of a scheme.
#[derive(Clone, Debug, Default)]
struct Connector(Arc<Mutex<Option<HttpClient>>>);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        Ok(client.insert(ReqwestConnector::default().connect(options)?).clone())
    }
}

#[cold]
fn argument(shown: &Path, message: &str) -> Error {
    Error::new(Kind::Argument, message).with_path(shown)
}

/// The environment does not give what a client needs.
#[cold]
fn unusable(shown: &Path, error: &object_store::Error) -> Error {
    Error::new(Kind::Argument, format!("no client can be made for the URL: {}", scrubbed(&error.to_string())))
        .with_path(shown)
}
