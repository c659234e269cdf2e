//! A CUDA driver without a GPU: a test double that is as hard on a program as the interface allows.
//!
//! The shared library has the name of the real one, `libcuda.so.1`, and defines the functions that programs with
//! candle and cudarc link against, those that UEL uses, and no kernels: launches and modules are "not supported".
//! `scripts/cuda-emulated-driver` builds it together with the two libraries that candle needs beside it. It says
//! nothing about speed, and nothing about real hardware.
//!
//! # What it is strict about
//!
//! - **Late.** A submitted operation runs when the host waits for it, by synchronising a stream, an event or a context,
//!   by a copy that returns only when done, or by the third query or so; then it runs with what it depends on and
//!   nothing else. With a seed, calls run random operations among those that may run.
//! - **Streams are separate queues.** The handle 2 is one queue for each thread and context, 0 and 1 are the legacy
//!   default stream, which waits for the blocking streams of its context and they for it.
//! - **Memory is what the interface says.** Copies from and to pinned memory touch it when they run; a pageable source
//!   is taken at the call, a pageable target is filled before the call returns. Fresh and freed memory is filled with
//!   poison. A freed block serves the next allocation of its stream at once, and another's as soon as that comes after.
//! - **What conflicts has to be ordered.** Every operation has a vector clock. Two that touch the same device or pinned
//!   bytes, one of them writing, are a violation unless streams, events or a wait of the host order them; so is a use of
//!   freed or foreign memory, one out of bounds, a free with work under way, a destroyed handle, a source that the host
//!   changed under a copy, and memory left in a context that ends. The threads of the host count as one: what one of
//!   them waited for comes before all that any of them submits later. That misses some faults and invents none.
//! - **Contexts belong to threads.** A call without a current context fails, also where a stream would tell which one is
//!   meant. Handles are never used twice.
//!
//! Beside it is `libcufile.so.0`: `cuFileRead` reads at once, and whatever uses the memory has to be known to be done,
//! its allocation in a stream included; `cuFileReadAsync` looks at its arguments when it runs.
//!
//! And `libnccl.so.2`, for threads as ranks, each on a device of its own, with communicators that do not block: calls are in
//! progress for a while, and nothing may be given to a stream meanwhile. What a group of calls does is one operation of the
//! stream. It runs when those that it exchanges bytes with are at the front of their streams, a broadcast when all are; a rank
//! that does not come holds up the others for ever. An abort ends a rank's operations, of which others learn only when a test
//! says so. A call that waits for work gives the driver to other threads while a rank is missing.
//!
//! Destroying a stream or an event with work under way is allowed, as on the real driver: the work still runs.
//!
//! # Controls
//!
//! A test finds these with `dlsym`; a real driver has none of them. All are C functions.
//!
//! | function | what it does |
//! | --- | --- |
//! | `void emulated_reset(void)` | forgets everything, memory included; for when no context lives |
//! | `void emulated_clear(void)` | forgets violations, counts, failures, seed and limits, and keeps what lives |
//! | `void emulated_devices(unsigned count)` | the number of devices, 2 at first; those in use have to stay |
//! | `void emulated_memory_limit(uint64_t bytes)` | the memory of each device, 16 GiB at first |
//! | `void emulated_memory_pools(int supported)` | whether there are stream-ordered allocations, at first there are |
//! | `void emulated_seed(uint64_t seed)` | runs random operations at random calls; 0 is as late as possible again |
//! | `void emulated_fail_nth(const char *function, uint64_t n, unsigned code)` | the n-th call from now of a function, or of any where it is null, does nothing and returns `code` |
//! | `uint64_t emulated_fail_none(void)` | takes back what is still to fail; gives how many calls that were |
//! | `void emulated_cufile_mode(int mode)` | GPUDirect Storage: 0 is there, 1 in compatibility mode, 2 not there |
//! | `void emulated_nccl_remote_errors(int told)` | whether ranks learn that another one has aborted; at first they do not |
//! | `void emulated_nccl_async_error(uint64_t n, unsigned result)` | the n-th query of a communicator from now on finds this error, which stays |
//! | `uint64_t emulated_host_access(const void *p, size_t len, int write)` | declares that the host touches memory now; gives the number of violations that this is |
//! | `uint64_t emulated_violations(void)` | how many violations there were |
//! | `size_t emulated_report_json(char *to, size_t room)` | writes the report, cut to the room; gives its length |
//!
//! A process whose program cannot ask has them in its environment: `EMULATED_CUDA_SEED`, and `EMULATED_CUDA_REPORT`, the
//! file that the report is written to when the process ends.
//!
//! The report is one JSON object: `violation_count` and `violations` (with `kind` and `message`); `live` and
//! `high_water` (`device_bytes`, `pinned_bytes`, `streams`, `events`, and what else lives); `live_memory`, what allocated what still lives;
//! `pending_operations`; and `calls`, how often each function was called.
//!
//! | kind of violation | what was seen |
//! | --- | --- |
//! | `unordered` | two operations, or one and the host, touch the same bytes, one writes, and nothing orders them |
//! | `use after free` | memory is used that was freed, at the call or when the operation runs |
//! | `out of bounds`, `unknown memory` | a range leaves its block, or is none |
//! | `invalid free` | what is freed is no block, not its beginning, or was freed before |
//! | `partly pinned` | a range of host memory is pinned in part |
//! | `changed source` | the host wrote a pinned source between the call and the copy |
//! | `early use` | a communicator, or its stream, is used while a call of NCCL is in progress |
//! | `no access` | a rank's memory comes from a pool that is not open to the device of the rank that it goes to |
//! | `mismatch` | the sides of a message or a broadcast differ in bytes, dtype or root |
//! | `hang` | a call waits for a rank that does not come |
//! | `destroyed handle` | a stream, event, communicator or context that was destroyed is used |
//! | `leak` | a context ends while memory or communicators live in it |

// Elsewhere there is nothing to stand in for.
#![cfg(target_os = "linux")]

mod allocate;
mod bytes;
mod clock;
mod codes;
mod copy;
mod cufile;
mod driver;
mod exports;
mod history;
mod memory;
mod nccl;
mod pinned;
mod queue;
mod random;
mod report;
mod schedule;
mod streams;
#[cfg(test)]
mod tests;
