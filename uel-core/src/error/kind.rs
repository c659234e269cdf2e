//! The kinds of fault, each with a stable name for programs.

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// What kind of fault an [`Error`](super::Error) is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Kind {
            /// Every kind, in the order of declaration.
            pub const ALL: &'static [Kind] = &[$(Kind::$variant,)+];

            /// A stable lower-case name for programs to match on, such as `duplicate-name`.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Kind::$variant => $name,)+
                }
            }
        }
    };
}

kinds! {
    /// The operating system refused an operation; the cause is kept as the source.
    Io = "io",
    /// The file ended before the bytes that were asked for.
    UnexpectedEof = "unexpected-eof",
    /// A server refused a request, or its answer cannot be relied on.
    Remote = "remote",
    /// The file changed while it was in use.
    Changed = "changed",
    /// A named limit of [`limits`](crate::limits) was exceeded.
    Limit = "limit",
    /// The file is too short to hold a header length.
    HeaderTooSmall = "header-too-small",
    /// The header length is over the format's limit.
    HeaderTooLarge = "header-too-large",
    /// The header length reaches behind the end of the file.
    HeaderTruncated = "header-truncated",
    /// The header does not begin with `{`.
    HeaderStart = "header-start",
    /// The header is padded with something else than spaces.
    HeaderPadding = "header-padding",
    /// The header is not UTF-8.
    NotUtf8 = "not-utf8",
    /// The header, or an index file, is not well-formed JSON.
    Json = "json",
    /// A JSON value has another type than the format asks for.
    JsonType = "json-type",
    /// JSON nested too deeply.
    JsonDepth = "json-depth",
    /// A tensor name stands twice.
    DuplicateName = "duplicate-name",
    /// A key of an object other than the tensor names stands twice.
    DuplicateKey = "duplicate-key",
    /// A tensor has a field that the format does not define.
    UnknownField = "unknown-field",
    /// A tensor lacks a field that the format asks for.
    MissingField = "missing-field",
    /// A dtype that the format does not define.
    UnknownDtype = "unknown-dtype",
    /// A number is too large for what it counts, or arithmetic on sizes overflows.
    Overflow = "overflow",
    /// The data_offsets of a tensor end before they begin.
    OffsetsReversed = "offsets-reversed",
    /// Shape and dtype do not give the number of bytes that the data_offsets span.
    SizeMismatch = "size-mismatch",
    /// A tensor of a sub-byte dtype does not end on a byte boundary.
    PartialByte = "partial-byte",
    /// The rows of a tensor of a block dtype do not consist of whole blocks.
    PartialBlock = "partial-block",
    /// Two tensors share bytes.
    Overlap = "overlap",
    /// Bytes between tensors belong to none.
    Hole = "hole",
    /// The data section is shorter than the tensors need.
    Truncated = "truncated",
    /// Bytes behind the last tensor belong to none.
    TrailingBytes = "trailing-bytes",
    /// An index file lacks what it must have, or has it wrong.
    IndexFile = "index-file",
    /// A shard that the index names is not there.
    MissingShard = "missing-shard",
    /// The weight_map and a shard's header disagree.
    WeightMap = "weight-map",
    /// A version of the format that UEL does not know.
    Version = "version",
    /// A value of the metadata has another type than asked for, or one that the format does not define.
    ValueType = "value-type",
    /// The metadata lacks a key.
    MissingKey = "missing-key",
    /// Arrays of the metadata nest too deeply.
    ArrayDepth = "array-depth",
    /// An alignment that is no power of two, or an offset that is no multiple of it.
    Alignment = "alignment",
    /// The parts of a split file contradict one another.
    Split = "split",
    /// A pickle is malformed, or not one that PyTorch writes.
    Pickle = "pickle",
    /// A zip archive contradicts itself, or uses what no checkpoint does.
    Archive = "archive",
    /// A pickle names what can run code when Python loads it.
    DangerousGlobal = "dangerous-global",
    /// A data file breaks the rules of its format.
    Malformed = "malformed",
    /// No supported format is recognised.
    UnknownFormat = "unknown-format",
    /// A tensor was asked for that the checkpoint does not have.
    UnknownTensor = "unknown-tensor",
    /// Expected tensors are absent from the checkpoint.
    MissingTensors = "missing-tensors",
    /// The checkpoint has tensors that were not expected.
    UnexpectedTensors = "unexpected-tensors",
    /// Two tensors would get the same name.
    NameCollision = "name-collision",
    /// A tensor has another shape than asked for.
    ShapeMismatch = "shape-mismatch",
    /// A dtype that the requested operation cannot represent.
    UnsupportedDtype = "unsupported-dtype",
    /// A value does not fit the dtype it is converted to.
    ValueRange = "value-range",
    /// A slice reaches outside the tensor, or does not end on byte boundaries.
    Slice = "slice",
    /// The caller's arguments contradict each other or this build.
    Argument = "argument",
    /// candle refused an operation; the cause is kept as the source.
    Candle = "candle",
    /// A device or its driver refused an operation.
    Device = "device",
    /// Memory could not be reserved.
    OutOfMemory = "out-of-memory",
    /// Bytes are not those that were written: their hash is another one.
    HashMismatch = "hash-mismatch",
    /// A save or patch was interrupted, and has to be completed or undone first.
    Interrupted = "interrupted",
    /// The code of a dataset, or of another part that a loader calls, failed; its error is kept as the source.
    Dataset = "dataset",
    /// The samples of a batch do not fit together.
    Collate = "collate",
    /// A state was saved by a loader of other data or another configuration.
    State = "state",
    /// What was waited for, such as a batch or a buffer, did not come in time.
    Timeout = "timeout",
    /// The ranks of a process group ask for different things, or one of them left or sent what was not to come.
    Group = "group",
    /// A worker thread panicked.
    WorkerPanic = "worker-panic",
    /// A bug in UEL: an invariant did not hold. Please report it.
    Internal = "internal",
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
