//! UEL's errors as candle's, so that `?` works in functions that return `candle_core::Result`.
//!
//! It stands here and not in uel-candle because only the crate that has the error may write the conversion.

use candle_core::Error as CandleError;

use super::Error;

/// The error becomes a `WrappedContext`, the one variant of candle's that keeps an error as an error. candle does not
/// offer it as its `source`: [`Error::within`] finds it again.
///
/// ```
/// use uel_core::{Error, Kind};
/// fn weights() -> candle_core::Result<()> {
///     Err(Error::new(Kind::UnknownTensor, "there is no such tensor").with_tensor("wte"))?
/// }
/// let error = weights().unwrap_err();
/// assert_eq!(Error::within(&error).unwrap().kind(), Kind::UnknownTensor);
/// ```
impl From<Error> for CandleError {
    #[cold]
    fn from(error: Error) -> Self {
        // candle prints the context as a line of its own behind the error.
        CandleError::WrappedContext { wrapped: Box::new(error), context: "while loading with UEL".to_owned() }.bt()
    }
}

impl Error {
    /// UEL's error within candle's, below whatever context, path or backtrace candle put around it.
    pub fn within(error: &CandleError) -> Option<&Error> {
        let mut error = error;
        loop {
            error = match error {
                CandleError::WrappedContext { wrapped, .. } => match wrapped.downcast_ref::<CandleError>() {
                    // candle's `Context` trait wraps its own errors in this way too.
                    Some(inner) => inner,
                    None => return wrapped.downcast_ref(),
                },
                CandleError::Context { inner, .. }
                | CandleError::WithPath { inner, .. }
                | CandleError::WithBacktrace { inner, .. } => inner,
                _ => return None,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Context as _;

    use super::*;
    use crate::Kind;

    fn fails() -> crate::Result<()> {
        let cause = std::io::Error::other("disk on fire");
        Err(Error::io("read", "model.safetensors", cause).with_tensor("wte"))
    }

    #[test]
    fn the_cause_is_kept_through_the_question_mark_and_candles_context() {
        fn asked() -> candle_core::Result<()> {
            Ok(fails()?)
        }
        let error = asked().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("model.safetensors: tensor \"wte\": cannot read: disk on fire"), "{text}");
        let around = [
            error,
            asked().unwrap_err().context("layer 3").with_path("x").bt(),
            asked().context("layer 3").unwrap_err(),
            fails().context("layer 3").unwrap_err(),
        ];
        for error in around {
            let ours = Error::within(&error).unwrap();
            assert_eq!((ours.kind(), ours.tensor()), (Kind::Io, Some("wte")));
            let cause = std::error::Error::source(ours).unwrap();
            assert_eq!(cause.downcast_ref::<std::io::Error>().unwrap().to_string(), "disk on fire");
        }
        assert!(Error::within(&CandleError::UnwrapNone.context("none of ours")).is_none());
        assert!(Error::within(&CandleError::wrap("a text")).is_none());
    }
}
