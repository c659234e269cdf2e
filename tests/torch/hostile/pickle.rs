//! Pickles written by hand, opcode by opcode.

/// A pickle of protocol 2 being written.
#[derive(Clone)]
pub(super) struct Pickle(Vec<u8>);

impl Pickle {
    pub(super) fn new() -> Self {
        Self(vec![0x80, 2])
    }

    pub(super) fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self
    }

    pub(super) fn global(self, module: &str, name: &str) -> Self {
        self.raw(format!("c{module}\n{name}\n"))
    }

    pub(super) fn text(self, text: &str) -> Self {
        self.raw(b"X").raw((text.len() as u32).to_le_bytes()).raw(text)
    }

    pub(super) fn int(self, number: i64) -> Self {
        match i32::try_from(number) {
            Ok(small) => self.raw(b"J").raw(small.to_le_bytes()),
            Err(_) => self.raw([0x8a, 8]).raw(number.to_le_bytes()),
        }
    }

    pub(super) fn ints(self, numbers: &[i64]) -> Self {
        numbers.iter().fold(self.raw(b"("), |pickle, &number| pickle.int(number)).raw(b"t")
    }

    /// A storage of torch, by its persistent id.
    pub(super) fn storage(self, class: &str, key: &str, elements: i64) -> Self {
        let id = self.raw(b"(").text("storage").global("torch", class).text(key).text("cpu");
        id.int(elements).raw(b"tQ")
    }

    /// A tensor over the storage that `storage` puts in.
    pub(super) fn tensor_over(
        self,
        storage: impl Fn(Self) -> Self,
        offset: i64,
        sizes: &[i64],
        strides: &[i64],
    ) -> Self {
        let begun = storage(self.global("torch._utils", "_rebuild_tensor_v2").raw(b"("));
        let rest = begun.int(offset).ints(sizes).ints(strides).raw([0x89]);
        rest.global("collections", "OrderedDict").raw(b")RtR")
    }

    /// A tensor of floats over storage `0`.
    pub(super) fn tensor(self, elements: i64, offset: i64, sizes: &[i64], strides: &[i64]) -> Self {
        self.tensor_over(|pickle| pickle.storage("FloatStorage", "0", elements), offset, sizes, strides)
    }

    pub(super) fn stop(self) -> Vec<u8> {
        self.raw(b".").0
    }

    /// As it is, without an end.
    pub(super) fn unfinished(self) -> Vec<u8> {
        self.0
    }
}

/// The values of a dictionary, each put in by a function.
pub(super) fn dict(items: &[(&str, &dyn Fn(Pickle) -> Pickle)]) -> Vec<u8> {
    let begun = Pickle::new().raw(b"}(");
    items.iter().fold(begun, |pickle, (key, value)| value(pickle.text(key))).raw(b"u").stop()
}

/// The tensor `w` that every sound file has: six floats, over the whole of storage `0`.
pub(super) fn sound(pickle: Pickle) -> Pickle {
    pickle.tensor(6, 0, &[2, 3], &[3, 1])
}
