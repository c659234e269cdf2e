//! x
pub use uel_candle as candle;
