//! The error of this crate: what went wrong, and at which place of the training stream.

use std::fmt;

use uel_core::Kind;

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the loader was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Choosing the indices of a batch.
    Sample,
    /// The dataset gives samples.
    Read,
    /// A closure of the user's changes samples.
    Decode,
    /// Samples become a batch.
    Collate,
    /// A batch is brought to its device.
    Transfer,
    /// The consumer waits for a batch.
    Wait,
}

impl Stage {
    /// A stable lower-case name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Stage::Sample => "sample",
            Stage::Read => "read",
            Stage::Decode => "decode",
            Stage::Collate => "collate",
            Stage::Transfer => "transfer",
            Stage::Wait => "wait",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What went wrong, and where in the stream of batches: epoch, batch, worker, stage, sample, field.
///
/// It is a type of its own around [`uel_core::Error`], and not that error with a longer message, because programs act on
/// the index: they list, skip and repeat samples. The cause keeps what only it knows (path, offset, expected, got) and
/// `?` turns it into this error. A dataset gives the cause; the loader adds the place.
///
/// ```
/// use uel_data::{Error, Kind, Stage};
/// let error = Error::new(Kind::Dataset, "the image is empty").with_field("image").with_index(17).with_stage(Stage::Read);
/// assert_eq!(error.to_string(), "read, sample 17, field image: the image is empty");
/// ```
pub struct Error {
    inner: Box<Inner>,
}

struct Inner {
    cause: uel_core::Error,
    epoch: Option<u64>,
    batch: Option<u64>,
    worker: Option<usize>,
    stage: Option<Stage>,
    index: Option<u64>,
    description: Option<String>,
    field: Option<String>,
}

macro_rules! place {
    ($($(#[doc = $get:literal])+ $name:ident, $(#[doc = $set:literal])+ $with:ident: $type:ty;)+) => {
        $(
            $(#[doc = $get])+
            pub fn $name(&self) -> Option<$type> {
                self.inner.$name
            }

            $(#[doc = $set])+
            #[cold]
            pub fn $with(mut self, $name: $type) -> Self {
                self.inner.$name.get_or_insert($name);
                self
            }
        )+
    };
}

impl Error {
    /// An error of `kind`, with a message that starts in lower case and has no full stop.
    #[cold]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        uel_core::Error::new(kind, message).into()
    }

    /// The error of another library, from a dataset's own code: [`Kind::Dataset`], with `error` as its source.
    ///
    /// ```
    /// let error = "no number".parse::<u32>().map_err(uel_data::Error::other).unwrap_err();
    /// assert_eq!(error.to_string(), "invalid digit found in string");
    /// ```
    #[cold]
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let error = error.into();
        uel_core::Error::new(Kind::Dataset, error.to_string()).with_source(error).into()
    }

    place! {
        /// The epoch.
        epoch,
        /// Names the epoch, unless one is named already: the innermost place knows best.
        with_epoch: u64;
        /// The number of the batch in its epoch.
        batch,
        /// Names the batch, unless one is named already.
        with_batch: u64;
        /// The worker that made the batch; none where the consumer made it itself.
        worker,
        /// Names the worker, unless one is named already.
        with_worker: usize;
        /// What was being done.
        stage,
        /// Says what was being done, unless that is said already.
        with_stage: Stage;
        /// The index of the sample in the dataset.
        index,
        /// Names the sample, unless one is named already.
        with_index: u64;
    }

    /// The dataset's own words for the sample: [`Dataset::describe`](crate::Dataset::describe).
    pub fn description(&self) -> Option<&str> {
        self.inner.description.as_deref()
    }

    /// Describes the sample, unless it is described already.
    #[cold]
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.inner.description.get_or_insert_with(|| description.into());
        self
    }

    /// The path of the field in its sample: keys and positions, joined by dots.
    pub fn field(&self) -> Option<&str> {
        self.inner.field.as_deref()
    }

    /// Names the field, unless one is named already.
    #[cold]
    pub fn with_field(mut self, field: impl Into<String>) -> Self {
        self.inner.field.get_or_insert_with(|| field.into());
        self
    }

    /// Says in which part of a sample the field is that is named already, or that it is this part itself.
    #[cold]
    pub(crate) fn within_field(mut self, part: &str) -> Self {
        self.inner.field = Some(match self.inner.field.take() {
            Some(field) => format!("{part}.{field}"),
            None => part.to_owned(),
        });
        self
    }

    /// Gives it the place of `other`, as far as it has none of its own.
    #[cold]
    pub(crate) fn at_place_of(mut self, other: &Self) -> Self {
        let (to, from) = (&mut *self.inner, &*other.inner);
        to.epoch = to.epoch.or(from.epoch);
        to.batch = to.batch.or(from.batch);
        to.worker = to.worker.or(from.worker);
        to.stage = to.stage.or(from.stage);
        to.index = to.index.or(from.index);
        to.description = to.description.take().or_else(|| from.description.clone());
        to.field = to.field.take().or_else(|| from.field.clone());
        self
    }

    /// Says what would have been right.
    #[cold]
    pub fn with_expected(mut self, expected: impl fmt::Display) -> Self {
        self.inner.cause = self.inner.cause.with_expected(expected);
        self
    }

    /// Says what was found instead.
    #[cold]
    pub fn with_got(mut self, got: impl fmt::Display) -> Self {
        self.inner.cause = self.inner.cause.with_got(got);
        self
    }

    /// What kind of fault it is.
    pub fn kind(&self) -> Kind {
        self.inner.cause.kind()
    }

    /// The fault itself, without its place in the stream.
    pub fn cause(&self) -> &uel_core::Error {
        &self.inner.cause
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { cause, epoch, batch, worker, stage, index, description, field } = &*self.inner;
        let mut between = "";
        let mut part = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            let written = write!(f, "{between}{name}{value}");
            between = ", ";
            written
        };
        if let Some(epoch) = epoch {
            part(f, "epoch ", epoch)?;
        }
        if let Some(batch) = batch {
            part(f, "batch ", batch)?;
        }
        if let Some(worker) = worker {
            part(f, "worker ", worker)?;
        }
        if let Some(stage) = stage {
            part(f, "", stage)?;
        }
        if let Some(index) = index {
            part(f, "sample ", index)?;
            if let Some(description) = description {
                write!(f, " ({description})")?;
            }
        }
        if let Some(field) = field {
            part(f, "field ", field)?;
        }
        if between.is_empty() { write!(f, "{cause}") } else { write!(f, ": {cause}") }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({}: {self})", self.kind())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.inner.cause.source()
    }
}

impl From<uel_core::Error> for Error {
    #[cold]
    fn from(cause: uel_core::Error) -> Self {
        Self {
            inner: Box::new(Inner {
                cause,
                epoch: None,
                batch: None,
                worker: None,
                stage: None,
                index: None,
                description: None,
                field: None,
            }),
        }
    }
}

impl From<std::io::Error> for Error {
    #[cold]
    fn from(error: std::io::Error) -> Self {
        uel_core::Error::new(Kind::Io, error.to_string()).with_source(error).into()
    }
}

impl From<candle_core::Error> for Error {
    #[cold]
    fn from(error: candle_core::Error) -> Self {
        uel_core::Error::new(Kind::Candle, error.to_string()).with_source(error).into()
    }
}

/// As for [`uel_core::Error`], so that `?` works in a training loop that returns candle's `Result`.
impl From<Error> for candle_core::Error {
    #[cold]
    fn from(error: Error) -> Self {
        candle_core::Error::wrap(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_named_once_and_the_innermost_wins() {
        let error = Error::new(Kind::Io, "cannot read")
            .with_epoch(1)
            .with_batch(2)
            .with_worker(3)
            .with_stage(Stage::Decode)
            .with_index(4)
            .with_description("digits.idx row 4")
            .with_field("image.0")
            .with_batch(9)
            .with_index(9)
            .with_field("other")
            .with_expected("a")
            .with_got("b");
        assert_eq!(
            error.to_string(),
            "epoch 1, batch 2, worker 3, decode, sample 4 (digits.idx row 4), field image.0: cannot read (expected a, got b)"
        );
        assert_eq!((error.epoch(), error.batch(), error.worker()), (Some(1), Some(2), Some(3)));
        assert_eq!((error.stage(), error.index(), error.field()), (Some(Stage::Decode), Some(4), Some("image.0")));
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }

    #[test]
    fn causes_are_kept_on_the_way_in_and_out() {
        use std::error::Error as _;
        let error = Error::from(std::io::Error::other("disk on fire"));
        assert_eq!(error.kind(), Kind::Io);
        assert_eq!(error.source().unwrap().to_string(), "disk on fire");
        let candle = candle_core::Error::from(Error::new(Kind::Dataset, "torn image").with_index(7));
        assert!(candle.to_string().contains("sample 7: torn image"), "{candle}");
        let inside = Error::from(uel_core::Error::new(Kind::Truncated, "too short").with_offset(5).with_path("a.bin"));
        assert_eq!(inside.cause().offset(), Some(5));
    }
}
