//! Storages that are filled from front to back.

use candle_core::{CpuStorage, DType};
use uel_core::{Error, Kind, Result};

use super::Unfilled;
use crate::cast::Cast;

/// A storage and how far it is filled.
#[derive(Debug)]
pub(crate) struct Filling {
    unfilled: Unfilled,
    filled: usize,
}

impl Filling {
    /// Memory for `byte_len` bytes of `dtype`, nothing of it filled.
    ///
    /// # Errors
    ///
    /// [`Kind::OutOfMemory`] where the allocator refuses.
    pub(crate) fn new(dtype: DType, byte_len: usize) -> Result<Self> {
        Ok(Self { unfilled: Unfilled::new(dtype, byte_len)?, filled: 0 })
    }

    /// Takes the next bytes, or what `cast` makes of them.
    ///
    /// # Errors
    ///
    /// [`Kind::Internal`] where they are more than are left, or no whole number of elements of a cast.
    pub(crate) fn push(&mut self, cast: Option<Cast>, bytes: &[u8]) -> Result<()> {
        let wrong = || Error::new(Kind::Internal, "more bytes arrived than a tensor has");
        let byte_len = cast.map_or(Some(bytes.len()), |cast| cast.destination_len(bytes.len())).ok_or_else(wrong)?;
        let end = self.filled.checked_add(byte_len).ok_or_else(wrong)?;
        let into = self.unfilled.as_uninit_mut().get_mut(self.filled..end).ok_or_else(wrong)?;
        match cast {
            Some(cast) if !cast.run(bytes, into) => return Err(wrong()),
            Some(_) => {}
            None => {
                into.write_copy_of_slice(bytes);
            }
        }
        self.filled = end;
        Ok(())
    }

    /// The storage, when all of it is filled.
    ///
    /// # Errors
    ///
    /// [`Kind::Internal`] where it is not.
    pub(crate) fn finish(mut self) -> Result<CpuStorage> {
        if self.filled != self.unfilled.as_uninit_mut().len() {
            return Err(Error::new(Kind::Internal, "a tensor's bytes did not all arrive"));
        }
        // SAFETY: `filled` grows only in `push`, by the length of the part behind it, after every byte of that part was
        // written: by the copy, or by the cast, which says so. It is the whole length now.
        Ok(unsafe { self.unfilled.assume_filled() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::as_bytes;
    use super::*;

    #[test]
    fn is_finished_when_it_is_full() {
        let mut filling = Filling::new(DType::F32, 8).unwrap();
        filling.push(None, &[1, 2, 3]).unwrap();
        assert_eq!(filling.push(None, &[0; 6]).unwrap_err().kind(), Kind::Internal);
        filling.push(None, &[4, 5, 6, 7, 8]).unwrap();
        assert_eq!(as_bytes(&filling.finish().unwrap()), [1, 2, 3, 4, 5, 6, 7, 8]);
        let mut short = Filling::new(DType::U8, 2).unwrap();
        short.push(None, &[1]).unwrap();
        assert_eq!(short.finish().unwrap_err().kind(), Kind::Internal);
        assert!(Filling::new(DType::U8, 0).unwrap().finish().is_ok());
    }

    #[test]
    fn casts_as_it_fills() {
        let cast = Cast::new(DType::BF16, DType::F32).unwrap();
        let mut filling = Filling::new(DType::F32, 8).unwrap();
        filling.push(Some(cast), &[0x80, 0x3f]).unwrap();
        assert_eq!(filling.push(Some(cast), &[1]).unwrap_err().kind(), Kind::Internal);
        filling.push(Some(cast), &[0x00, 0x40]).unwrap();
        let CpuStorage::F32(values) = filling.finish().unwrap() else { panic!() };
        assert_eq!(values, [1., 2.]);
    }
}
