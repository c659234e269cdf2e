//! The pickle that describes the tensors of a file, in protocol 2 and in the words that torch uses.

use crate::{Dtype, Error, Kind, Result, limits};
use serde_json::{Map, Value};
use std::collections::HashMap;

/// Items that Python's pickler puts into a dict or list at a time.
const BATCH: usize = 1000;

const PROTO: u8 = 0x80;
const STOP: u8 = b'.';
const MARK: u8 = b'(';
const GLOBAL: u8 = b'c';
const REDUCE: u8 = b'R';
const PERSISTENT_ID: u8 = b'Q';
const TUPLE: u8 = b't';
const TUPLE1: u8 = 0x85;
const EMPTY_TUPLE: u8 = b')';
const EMPTY_LIST: u8 = b']';
const EMPTY_DICT: u8 = b'}';
const APPEND: u8 = b'a';
const APPENDS: u8 = b'e';
const SET_ITEM: u8 = b's';
const SET_ITEMS: u8 = b'u';
const NONE: u8 = b'N';
const TRUE: u8 = 0x88;
const FALSE: u8 = 0x89;
const UNICODE: u8 = b'X';
const INT: u8 = b'J';
const INT1: u8 = b'K';
const INT2: u8 = b'M';
const LONG1: u8 = 0x8a;
const FLOAT: u8 = b'G';
const PUT: u8 = b'q';
const LONG_PUT: u8 = b'r';
const GET: u8 = b'h';
const LONG_GET: u8 = b'j';

/// What torch calls the storage of a dtype, in its pickles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StorageClass {
    /// A class of its own, as all dtypes before torch 2.1 have.
    Typed(&'static str),
    /// One of bytes; the dtype stands beside it.
    Untyped(&'static str),
}

impl StorageClass {
    /// # Errors
    ///
    /// [`Kind::UnsupportedDtype`] where torch has no such dtype.
    pub(super) fn of(dtype: Dtype) -> Result<Self> {
        Ok(match dtype {
            Dtype::F64 => Self::Typed("torch\nDoubleStorage\n"),
            Dtype::F32 => Self::Typed("torch\nFloatStorage\n"),
            Dtype::F16 => Self::Typed("torch\nHalfStorage\n"),
            Dtype::Bf16 => Self::Typed("torch\nBFloat16Storage\n"),
            Dtype::I64 => Self::Typed("torch\nLongStorage\n"),
            Dtype::I32 => Self::Typed("torch\nIntStorage\n"),
            Dtype::I16 => Self::Typed("torch\nShortStorage\n"),
            Dtype::I8 => Self::Typed("torch\nCharStorage\n"),
            Dtype::U8 => Self::Typed("torch\nByteStorage\n"),
            Dtype::Bool => Self::Typed("torch\nBoolStorage\n"),
            Dtype::C64 => Self::Typed("torch\nComplexFloatStorage\n"),
            Dtype::U16 => Self::Untyped("torch\nuint16\n"),
            Dtype::U32 => Self::Untyped("torch\nuint32\n"),
            Dtype::U64 => Self::Untyped("torch\nuint64\n"),
            Dtype::F8E4M3 => Self::Untyped("torch\nfloat8_e4m3fn\n"),
            Dtype::F8E5M2 => Self::Untyped("torch\nfloat8_e5m2\n"),
            Dtype::F8E4M3Fnuz => Self::Untyped("torch\nfloat8_e4m3fnuz\n"),
            Dtype::F8E5M2Fnuz => Self::Untyped("torch\nfloat8_e5m2fnuz\n"),
            Dtype::F8E8M0 => Self::Untyped("torch\nfloat8_e8m0fnu\n"),
            Dtype::F4 => Self::Untyped("torch\nfloat4_e2m1fn_x2\n"),
            Dtype::F6E2M3 | Dtype::F6E3M2 => {
                return Err(Error::new(Kind::UnsupportedDtype, "torch has no 6-bit floats").with_got(dtype));
            }
            Dtype::Block(_) => {
                return Err(Error::new(Kind::UnsupportedDtype, "torch has no block dtypes").with_got(dtype));
            }
        })
    }
}

/// A tensor that fills its storage row by row.
#[derive(Clone, Debug)]
pub(super) struct Tensor<'a> {
    pub(super) name: &'a str,
    pub(super) class: StorageClass,
    /// The number of its storage, which others may have too.
    pub(super) storage: usize,
    pub(super) byte_len: u64,
    /// Its dimensions as torch has them.
    pub(super) shape: Vec<u64>,
}

/// Builds a pickle.
#[derive(Debug, Default)]
pub(super) struct Pickler {
    out: Vec<u8>,
    memoized: u32,
    /// Where the classes, functions and words that torch's pickles repeat are found again.
    words: HashMap<&'static str, u32>,
    /// The same for the storages' keys.
    keys: Vec<Option<u32>>,
}

impl Pickler {
    pub(super) fn new() -> Self {
        Self { out: vec![PROTO, 2], ..Self::default() }
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.out.push(STOP);
        self.out
    }

    /// A dict of `len` items, each of which `item` writes: its key, then its value.
    pub(super) fn dict(&mut self, len: usize, mut item: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<()> {
        self.out.push(EMPTY_DICT);
        self.put();
        self.batches(len, SET_ITEM, SET_ITEMS, &mut item)
    }

    /// Writes items as CPython's pickler does: a dict whose last batch is full ends with an empty one.
    fn batches(
        &mut self,
        len: usize,
        one: u8,
        many: u8,
        item: &mut dyn FnMut(&mut Self, usize) -> Result<()>,
    ) -> Result<()> {
        if len == 1 {
            item(self, 0)?;
            self.out.push(one);
        }
        let ends_full = many == SET_ITEMS && len > 0 && len.is_multiple_of(BATCH);
        let behind = if ends_full { len + 1 } else { len };
        for start in (0..behind).step_by(BATCH).filter(|_| len != 1) {
            self.out.push(MARK);
            (start..len.min(start + BATCH)).try_for_each(|at| item(self, at))?;
            self.out.push(many);
        }
        Ok(())
    }

    /// Text that is not looked up again.
    pub(super) fn text(&mut self, text: &str) -> Result<u32> {
        let byte_len = u32::try_from(text.len()).map_err(|_| {
            Error::new(Kind::Limit, "the text is too long")
                .with_expected(format!("at most {} bytes", u32::MAX))
                .with_got(format!("{} bytes", text.len()))
        })?;
        self.out.push(UNICODE);
        self.out.extend_from_slice(&byte_len.to_le_bytes());
        self.out.extend_from_slice(text.as_bytes());
        Ok(self.put())
    }

    /// The name and the tensor.
    pub(super) fn tensor(&mut self, tensor: &Tensor<'_>) -> Result<()> {
        self.text(tensor.name)?;
        self.global(match tensor.class {
            StorageClass::Typed(_) => "torch._utils\n_rebuild_tensor_v2\n",
            StorageClass::Untyped(_) => "torch._utils\n_rebuild_tensor_v3\n",
        });
        self.out.push(MARK);
        self.storage(tensor)?;
        self.unsigned(0);
        self.dims(&tensor.shape);
        self.dims(&contiguous_strides(&tensor.shape));
        // No gradient is asked for, and there are no hooks.
        self.out.push(FALSE);
        self.global("collections\nOrderedDict\n");
        self.out.extend_from_slice(&[EMPTY_TUPLE, REDUCE]);
        self.put();
        if let StorageClass::Untyped(dtype) = tensor.class {
            self.global(dtype);
        }
        self.out.push(TUPLE);
        self.put();
        self.out.push(REDUCE);
        self.put();
        Ok(())
    }

    /// The persistent id of a storage: its class, key, place and length.
    fn storage(&mut self, tensor: &Tensor<'_>) -> Result<()> {
        self.out.push(MARK);
        self.word("storage")?;
        self.global(match tensor.class {
            StorageClass::Typed(class) => class,
            StorageClass::Untyped(_) => "torch.storage\nUntypedStorage\n",
        });
        match self.keys.get(tensor.storage).copied().flatten() {
            Some(at) => self.get(at),
            None => {
                let at = self.text(&tensor.storage.to_string())?;
                if self.keys.len() <= tensor.storage {
                    self.keys.resize(tensor.storage + 1, None);
                }
                if let Some(key) = self.keys.get_mut(tensor.storage) {
                    *key = Some(at);
                }
            }
        }
        self.word("cpu")?;
        self.unsigned(match tensor.class {
            StorageClass::Typed(_) => tensor.shape.iter().product(),
            StorageClass::Untyped(_) => tensor.byte_len,
        });
        self.out.push(TUPLE);
        self.put();
        self.out.push(PERSISTENT_ID);
        Ok(())
    }

    /// A value of JSON under its key. Numbers without a fraction are ints.
    pub(super) fn item(&mut self, key: &str, value: &Value) -> Result<()> {
        self.text(key)?;
        self.value(value, limits::MAX_JSON_DEPTH)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        let Some(below) = depth.checked_sub(1) else {
            return Err(Error::new(Kind::JsonDepth, "the values are nested too deeply")
                .with_expected(format!("at most {} levels", limits::MAX_JSON_DEPTH)));
        };
        match value {
            Value::Null => self.out.push(NONE),
            Value::Bool(true) => self.out.push(TRUE),
            Value::Bool(false) => self.out.push(FALSE),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), ..) => self.unsigned(number),
                (None, Some(number), _) => self.int(i128::from(number)),
                (None, None, number) => {
                    self.out.push(FLOAT);
                    self.out.extend_from_slice(&number.unwrap_or(f64::NAN).to_be_bytes());
                }
            },
            Value::String(text) => {
                self.text(text)?;
            }
            Value::Array(values) => {
                self.out.push(EMPTY_LIST);
                self.put();
                self.batches(values.len(), APPEND, APPENDS, &mut |pickler, at| {
                    values.get(at).map_or(Ok(()), |value| pickler.value(value, below))
                })?;
            }
            Value::Object(values) => self.values(values, below)?,
        }
        Ok(())
    }

    fn values(&mut self, values: &Map<String, Value>, depth: usize) -> Result<()> {
        let mut items = values.iter();
        self.dict(values.len(), |pickler, _| match items.next() {
            Some((key, value)) => {
                pickler.text(key)?;
                pickler.value(value, depth)
            }
            None => Ok(()),
        })
    }

    /// A class or function, by its module and name, a line each.
    fn global(&mut self, lines: &'static str) {
        if let Some(&at) = self.words.get(lines) {
            return self.get(at);
        }
        self.out.push(GLOBAL);
        self.out.extend_from_slice(lines.as_bytes());
        let at = self.put();
        self.words.insert(lines, at);
    }

    fn word(&mut self, word: &'static str) -> Result<()> {
        match self.words.get(word) {
            Some(&at) => self.get(at),
            None => {
                let at = self.text(word)?;
                self.words.insert(word, at);
            }
        }
        Ok(())
    }

    fn dims(&mut self, dims: &[u64]) {
        if dims.is_empty() {
            return self.out.push(EMPTY_TUPLE);
        }
        let short = dims.len() <= 3;
        self.out.extend((!short).then_some(MARK));
        for &dim in dims {
            self.unsigned(dim);
        }
        self.out.push(if short { TUPLE1 + (dims.len() - 1) as u8 } else { TUPLE });
        self.put();
    }

    fn unsigned(&mut self, value: u64) {
        self.int(i128::from(value));
    }

    /// The shortest opcode that holds the number.
    fn int(&mut self, value: i128) {
        if let Ok(byte) = u8::try_from(value) {
            self.out.extend_from_slice(&[INT1, byte]);
        } else if let Ok(value) = u16::try_from(value) {
            self.out.push(INT2);
            self.out.extend_from_slice(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value) {
            self.out.push(INT);
            self.out.extend_from_slice(&value.to_le_bytes());
        } else {
            let bytes = value.to_le_bytes();
            // The least number of bytes whose sign is that of the whole.
            let holds = |len: &usize| {
                let unused = 128 - 8 * *len as u32;
                (value << unused) >> unused == value
            };
            let len = (5..bytes.len()).find(holds).unwrap_or(bytes.len());
            self.out.extend_from_slice(&[LONG1, len as u8]);
            self.out.extend_from_slice(bytes.get(..len).unwrap_or_default());
        }
    }

    /// Remembers what was written last, as Python's pickler does with everything that could be met again.
    fn put(&mut self) -> u32 {
        let at = self.memoized;
        self.memoized += 1;
        self.numbered(PUT, LONG_PUT, at);
        at
    }

    fn get(&mut self, at: u32) {
        self.numbered(GET, LONG_GET, at);
    }

    fn numbered(&mut self, short: u8, long: u8, at: u32) {
        match u8::try_from(at) {
            Ok(at) => self.out.extend_from_slice(&[short, at]),
            Err(_) => {
                self.out.push(long);
                self.out.extend_from_slice(&at.to_le_bytes());
            }
        }
    }
}

/// torch's strides of a tensor that lies row by row: dimensions without elements count as one.
fn contiguous_strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1; shape.len()];
    let mut stride = 1u64;
    for (to, &dim) in strides.iter_mut().zip(shape).rev() {
        *to = stride;
        stride = stride.saturating_mul(dim.max(1));
    }
    strides
}
