//! Every limit on what a file may ask for, in one place. All stand well above real models.

/// The longest safetensors header in bytes, as in the reference implementation. The header of the largest known
/// checkpoint file (GLM-5.2, 117,410 tensors) has 14.5 MB.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The most dimensions of one tensor. torch itself allows 64.
pub const MAX_RANK: usize = 64;

/// How deeply JSON values may nest where their content is only passed over. serde_json's own limit is 128.
pub const MAX_JSON_DEPTH: usize = 127;

/// The longest `model.safetensors.index.json` in bytes. A million entries of 100 bytes are 100 MB.
pub const MAX_INDEX_FILE_BYTES: u64 = 256 << 20;

/// The most shards of one checkpoint.
pub const MAX_SHARDS: usize = 100_000;

/// The most tensors of one checkpoint over all its files.
pub const MAX_TENSORS: usize = 16_000_000;

/// The longest tensor name, or other key of a header, in bytes.
pub const MAX_NAME_BYTES: usize = 1 << 20;

/// The most entries of one `__metadata__`: each costs two allocations, many times what it takes in the header.
pub const MAX_METADATA_ENTRIES: usize = 50_000;

/// The most faults that are listed of one file, so that the list of a hostile file stays small.
pub const MAX_FAULTS: usize = 1000;

/// The longest file that says what an interrupted save or patch was doing, besides the bytes it keeps.
pub const MAX_JOURNAL_BYTES: u64 = 64 << 20;

/// The most files that are opened at once.
pub const MAX_OPEN_THREADS: usize = 16;

/// From this size on, saves that are synced go past the page cache unless told otherwise.
pub const DIRECT_SAVE_BYTES: u64 = 16 << 20;

/// Bytes of one direct write.
pub const DIRECT_CHUNK_BYTES: usize = 4 << 20;

/// Buffers of [`DIRECT_CHUNK_BYTES`] that all direct saves of a process hold together, and one more for each thread that
/// writes where that is not enough.
pub const DIRECT_BUFFERS: usize = 8;

/// Bytes of partly covered blocks that a file in direct mode keeps in memory.
pub const DIRECT_KEPT_BYTES: usize = 4 << 20;

/// The most separate runs of bytes that a buffer for a direct write gathers.
pub const DIRECT_RUNS: usize = 64;
