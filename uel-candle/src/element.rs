//! The element types of candle's CPU storages, plain and quantized, as types that any bytes make valid.

use candle_core::quantized::k_quants;

/// Element types that any bytes make valid, so that a vector of them may be made over a file's bytes.
///
/// # Safety
///
/// Every bit pattern is a valid value, and the type has neither padding nor a destructor.
pub unsafe trait Element: Clone + Send + Sync + 'static {}

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

/// Blocks of candle's: structs of `repr(C)`, all of whose fields are integers, `f16`, `f32` and arrays of these, so that
/// every bit pattern is valid and nothing is dropped. The sum of the fields is the size that is compared here, so that there
/// is no padding.
macro_rules! blocks {
    ($($block:ident = $($field:literal)+;)+) => {$(
        const _: () = assert!(size_of::<k_quants::$block>() == 0 $(+ $field)+);
        const _: () = assert!(!std::mem::needs_drop::<k_quants::$block>());
        // SAFETY: as said above, and compared just now.
        unsafe impl Element for k_quants::$block {}
    )+};
}

blocks! {
    BlockQ4_0 = 2 16;
    BlockQ4_1 = 2 2 16;
    BlockQ5_0 = 2 4 16;
    BlockQ5_1 = 2 2 4 16;
    BlockQ8_0 = 2 32;
    BlockQ8_1 = 2 2 32;
    BlockQ2K = 16 64 2 2;
    BlockQ3K = 32 64 12 2;
    BlockQ4K = 2 2 12 128;
    BlockQ5K = 2 2 12 32 128;
    BlockQ6K = 128 64 16 2;
    BlockQ8K = 4 256 32;
}
