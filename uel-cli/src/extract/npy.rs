//! The header of NumPy's file format.
//!
//! Source: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use uel_core::{Dtype, Error, Kind, Result};

const MAGIC: &[u8] = b"\x93NUMPY";

/// The data begin at a multiple of this.
const ALIGNMENT: usize = 64;

/// What NumPy calls `dtype`, little-endian.
fn descr(dtype: Dtype) -> Option<&'static str> {
    Some(match dtype {
        Dtype::Bool => "|b1",
        Dtype::U8 => "|u1",
        Dtype::I8 => "|i1",
        Dtype::U16 => "<u2",
        Dtype::I16 => "<i2",
        Dtype::U32 => "<u4",
        Dtype::I32 => "<i4",
        Dtype::U64 => "<u8",
        Dtype::I64 => "<i8",
        Dtype::F16 => "<f2",
        Dtype::F32 => "<f4",
        Dtype::F64 => "<f8",
        Dtype::C64 => "<c8",
        _ => return None,
    })
}

/// The header of a file with one array in row-major order: version 1.0, or 2.0 where it is too long for that.
pub(super) fn header(dtype: Dtype, shape: &[usize]) -> Result<Vec<u8>> {
    let Some(descr) = descr(dtype) else {
        let way = match dtype {
            Dtype::Bf16 | Dtype::F8E4M3 => "--dtype f32 casts it",
            _ => "--raw writes its bytes",
        };
        return Err(Error::new(Kind::UnsupportedDtype, format!("NumPy has no such dtype; {way}")).with_got(dtype));
    };
    let mut dims = String::new();
    for dim in shape {
        dims.push_str(&format!("{dim}, "));
    }
    // A tuple of one keeps its comma.
    let dims = if shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    let padded = |prefix: usize| (prefix + text.len() + 1).next_multiple_of(ALIGNMENT) - prefix;
    let (short, long) = (MAGIC.len() + 4, MAGIC.len() + 6);
    let mut header = MAGIC.to_vec();
    let end = match u16::try_from(padded(short)) {
        Ok(len) => {
            header.extend([1, 0]);
            header.extend(len.to_le_bytes());
            short + usize::from(len)
        }
        Err(_) => {
            let len = padded(long);
            header.extend([2, 0]);
            // No shape in a header that was read has so many dimensions.
            header.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
            long + len
        }
    };
    header.extend(text.as_bytes());
    header.resize(end - 1, b' ');
    header.push(b'\n');
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_those_of_numpy() {
        // What numpy.save writes for numpy.zeros((2, 3), numpy.float32).
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
        let expected = [b"\x93NUMPY\x01\x00\x76\x00", format!("{text:117}\n").as_bytes()].concat();
        assert_eq!(header(Dtype::F32, &[2, 3]).unwrap(), expected);
        for (shape, shown) in [(&[][..], "()"), (&[7], "(7,)"), (&[0, 1], "(0, 1)")] {
            let header = header(Dtype::Bool, shape).unwrap();
            let text = format!("{{'descr': '|b1', 'fortran_order': False, 'shape': {shown}, }}");
            assert!(header[10..].starts_with(text.as_bytes()), "{}", String::from_utf8_lossy(&header));
            assert_eq!(header.len() % ALIGNMENT, 0);
        }
    }

    #[test]
    fn long_headers_are_of_version_two() {
        let header = header(Dtype::U8, &[1; 30_000]).unwrap();
        assert_eq!(header[6..8], [2, 0]);
        let len = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        assert_eq!((header.len(), header.len() % ALIGNMENT), (12 + len, 0));
    }

    #[test]
    fn what_numpy_lacks_is_refused() {
        let error = header(Dtype::Bf16, &[1]).unwrap_err();
        assert!(error.to_string().contains("--dtype f32"), "{error}");
        assert!(header(Dtype::F4, &[2]).unwrap_err().to_string().contains("--raw"));
    }
}
