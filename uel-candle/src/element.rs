//! The element types of candle's CPU storage, as types that any bytes make valid.

/// Element types that any bytes make valid, so that a vector of them may be made over a file's bytes.
///
/// # Safety
///
/// Every bit pattern is a valid value, and the type has neither padding nor a destructor.
pub(crate) unsafe trait Element: Copy + Send + Sync + 'static {}

// SAFETY: integers are valid for every bit pattern and have no padding.
unsafe impl Element for u8 {}
// SAFETY: as for `u8`.
unsafe impl Element for u32 {}
// SAFETY: as for `u8`.
unsafe impl Element for i16 {}
// SAFETY: as for `u8`.
unsafe impl Element for i32 {}
// SAFETY: as for `u8`.
unsafe impl Element for i64 {}
// SAFETY: IEEE floats are valid for every bit pattern and have no padding.
unsafe impl Element for f32 {}
// SAFETY: as for `f32`.
unsafe impl Element for f64 {}
// SAFETY: `f16` is `repr(transparent)` over `u16`.
unsafe impl Element for half::f16 {}
// SAFETY: `bf16` is `repr(transparent)` over `u16`.
unsafe impl Element for half::bf16 {}
// SAFETY: `F8E4M3` is `repr(transparent)` over `u8`.
unsafe impl Element for float8::F8E4M3 {}
