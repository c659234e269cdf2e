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

/// The most entries of a zip archive: a checkpoint has one for each storage, and a few besides.
pub const MAX_ARCHIVE_ENTRIES: usize = 4_000_000;

/// The longest pickle of a PyTorch file in bytes. A state_dict takes some 200 bytes a tensor.
pub const MAX_PICKLE_BYTES: u64 = 1 << 30;

/// The longest pickle in bytes that another tool compressed: a file of 64 KiB could hold one of 64 MiB.
pub const MAX_INFLATED_PICKLE_BYTES: u64 = 64 << 20;

/// The most bytes of one tensor that was expanded, unless it is less than [`MAX_EXPANSION`] times what it was expanded from.
pub const MAX_EXPANDED_BYTES: u64 = 64 << 30;

/// How many times a tensor of more than [`MAX_EXPANDED_BYTES`] may be as large as the bytes that it is made of.
pub const MAX_EXPANSION: u64 = 1024;

/// The most bytes of one compressed entry once it is inflated, which is held in memory as a whole.
pub const MAX_INFLATED_BYTES: u64 = 4 << 30;
/// The most values of one pickle, and the most that stand on its stack at once. A tensor takes about 15 of them, so
/// these are over four million tensors; each value costs up to 100 bytes of memory.
pub const MAX_PICKLE_VALUES: usize = 1 << 26;

/// The most classes and functions that one pickle names. A whole saved model names some hundred.
pub const MAX_PICKLE_GLOBALS: usize = 1 << 16;

/// The most bytes in the module and name of one of them, and in the key or device of a storage.
pub const MAX_PICKLE_NAME_BYTES: usize = 1000;

/// How deeply dicts, lists and objects of a checkpoint may nest, and wrappers around one tensor. What is nested more
/// deeply is left out, and its tensors are listed as unreadable.
pub const MAX_PICKLE_DEPTH: usize = 200;

/// The most values that are no tensors of one checkpoint: a training history of some million numbers has room.
pub const MAX_CHECKPOINT_VALUES: usize = 1 << 23;

/// The most bytes in all of the names of one checkpoint's tensors and of the texts among its values.
pub const MAX_CHECKPOINT_TEXT_BYTES: usize = 1 << 28;

/// How often the values of a pickle may be visited for each of its bytes, [`MIN_PICKLE_VISITS`] aside. A value that is
/// shared is visited under each of its names; without sharing there is less than one visit for a byte.
pub const MAX_PICKLE_VISITS_PER_BYTE: u64 = 4;

/// How often the values of any pickle may be visited, however short it is.
pub const MIN_PICKLE_VISITS: u64 = 1 << 16;
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

/// The longest header of an .npy file in bytes. numpy itself refuses more than 10,000 unless told to trust the file.
pub const MAX_NPY_HEADER_BYTES: u64 = 1 << 20;

/// The most bytes that one compressed data file may have once it is inflated where it is held in memory as a whole.
pub const MAX_INFLATED_FILE_BYTES: u64 = 16 << 30;

/// The most data files of one dataset.
pub const MAX_DATA_FILES: usize = 16_000_000;

/// The most fields of one sample, and columns of one text or parquet file.
pub const MAX_FIELDS: usize = 1 << 16;

/// The longest line of a text file, or record of a csv file, in bytes.
pub const MAX_LINE_BYTES: u64 = 256 << 20;

/// The most places that the index of a text file keeps: 8 bytes each. Of a longer file it keeps every second, fourth, ..
/// line, and a read passes over the lines between.
pub const MAX_LINE_INDEX_ENTRIES: usize = 1 << 24;

/// The most entries of one tar archive. Each takes at least 512 bytes of the file.
pub const MAX_TAR_ENTRIES: usize = 1 << 28;

/// The longest record of names and attributes that a tar archive may put before an entry, in bytes.
pub const MAX_TAR_ATTRIBUTES_BYTES: u64 = 1 << 20;

/// The most members of one sample of a tar archive.
pub const MAX_TAR_MEMBERS: usize = 1 << 16;

/// The most bytes of one member, or of one sample, that is read into memory from a stream.
pub const MAX_STREAMED_SAMPLE_BYTES: u64 = 4 << 30;

/// The most pixels of one image.
pub const MAX_IMAGE_PIXELS: u64 = 1 << 28;

/// The longest file of one image in bytes.
pub const MAX_IMAGE_FILE_BYTES: u64 = 1 << 30;

/// The most bytes of one row group of a parquet file once it is decoded.
pub const MAX_ROW_GROUP_BYTES: u64 = 16 << 30;

/// The longest header of a GGUF file in bytes: metadata, tokenizer included, and tensor infos. Half a million tokens and
/// merges take some 20 MB, 100,000 tensors 10 MB.
pub const MAX_GGUF_HEADER_BYTES: u64 = 1 << 30;

/// The most metadata entries of a GGUF file. Real ones have some fifty.
pub const MAX_GGUF_METADATA_ENTRIES: u64 = 1 << 16;

/// The longest metadata key of a GGUF file in bytes, as its description has it.
pub const MAX_GGUF_KEY_BYTES: u64 = (1 << 16) - 1;

/// The longest string in a GGUF file's metadata in bytes. A whole `tokenizer.json` of 20 MB has room.
pub const MAX_GGUF_STRING_BYTES: u64 = 1 << 28;

/// The most elements of one metadata array of a GGUF file. Tokenizers have up to a million.
pub const MAX_GGUF_ARRAY_LEN: u64 = 1 << 26;

/// How deeply metadata arrays of a GGUF file may nest. No known model nests any.
pub const MAX_GGUF_ARRAY_DEPTH: usize = 16;

/// The most dimensions of a tensor in a GGUF file, as in ggml.
pub const MAX_GGUF_RANK: usize = 4;

/// The first bytes of a GGUF file that are read, before anything is known of its header's length.
pub const GGUF_FIRST_READ_BYTES: u64 = 64 << 10;

/// The most bytes of a GGUF file that are read at once behind its header's known part, so that opening reads at most so
/// many bytes of tensors.
pub const GGUF_READ_STEP_BYTES: u64 = 4 << 20;

/// The first bytes of an object that are read unless the caller says otherwise. Most headers are shorter.
pub const REMOTE_HEAD_BYTES: u64 = 512 << 10;

/// A read of an object of at most this many bytes brings its neighbourhood along, for the small reads that follow.
pub const REMOTE_SMALL_READ_BYTES: u64 = 32 << 10;

/// How much a small read brings.
pub const REMOTE_WINDOW_BYTES: u64 = 128 << 10;

/// How much a small read near the end of an object brings: the directories of archives stand there.
pub const REMOTE_TAIL_BYTES: u64 = 256 << 10;

/// How many neighbourhoods of small reads are kept of one object.
pub const REMOTE_WINDOWS: usize = 16;

/// The most requests that may be allowed to run at once.
pub const MAX_REMOTE_REQUESTS: usize = 1024;

/// The least that a request may be limited to.
pub const MIN_REMOTE_REQUEST_BYTES: u64 = 4 << 10;

/// The most that one request may be allowed to ask for.
pub const MAX_REMOTE_REQUEST_BYTES: u64 = 256 << 20;

/// The most bytes of an object that one call reads; they are put together before they are handed over.
pub const MAX_REMOTE_READ_BYTES: u64 = 256 << 20;

/// The longest that any wait for a server may be told to last.
pub const MAX_REMOTE_DEADLINE: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

/// Bytes of an object in one file of the disk cache.
pub const REMOTE_CACHE_BLOCK_BYTES: u64 = 512 << 10;

/// The most bytes of URL, version and offset that a file of the disk cache names.
pub const MAX_REMOTE_CACHE_KEY_BYTES: u64 = 64 << 10;

/// The longest name of a commit or revision in the cache of the Hugging Face hub, in bytes.
pub const MAX_HF_REVISION_BYTES: u64 = 1000;
