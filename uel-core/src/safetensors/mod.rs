//! The safetensors format: header decoding without I/O, single files and sharded checkpoints.
