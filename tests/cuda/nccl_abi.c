/* What uel-candle/src/shard/nccl/library.rs says of NCCL, held against NCCL's own header. It is only compiled. */
#include <stddef.h>
#include <limits.h>
#include <nccl.h>

#define IS(what) _Static_assert(what, #what)

IS(sizeof(ncclUniqueId) == 128 && _Alignof(ncclUniqueId) == 1);
IS(sizeof(ncclComm_t) == sizeof(void *) && sizeof(cudaStream_t) == sizeof(void *));
IS(sizeof(ncclResult_t) == 4 && sizeof(ncclDataType_t) == 4);
IS(ncclSuccess == 0 && ncclInProgress == 7 && ncclUint8 == 1);

/* The fields of version 2.17, which later versions have in the same places. */
IS(offsetof(ncclConfig_t, size) == 0);
IS(offsetof(ncclConfig_t, magic) == 8);
IS(offsetof(ncclConfig_t, version) == 12);
IS(offsetof(ncclConfig_t, blocking) == 16);
IS(offsetof(ncclConfig_t, cgaClusterSize) == 20);
IS(offsetof(ncclConfig_t, minCTAs) == 24);
IS(offsetof(ncclConfig_t, maxCTAs) == 28);
IS(offsetof(ncclConfig_t, netName) == 32);
IS(offsetof(ncclConfig_t, splitShare) == 40);
IS(sizeof(ncclConfig_t) >= 48);
IS(NCCL_CONFIG_UNDEF_INT == INT_MIN && NCCL_API_MAGIC == 0xcafebeef);
IS(NCCL_VERSION(2, 17, 0) == 21700 && NCCL_VERSION(2, 14, 3) == 21403);

ncclResult_t (*get_version)(int *) = ncclGetVersion;
ncclResult_t (*get_unique_id)(ncclUniqueId *) = ncclGetUniqueId;
ncclResult_t (*init)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *) = ncclCommInitRankConfig;
ncclResult_t (*get_async_error)(ncclComm_t, ncclResult_t *) = ncclCommGetAsyncError;
ncclResult_t (*finalize)(ncclComm_t) = ncclCommFinalize;
ncclResult_t (*destroy)(ncclComm_t) = ncclCommDestroy;
ncclResult_t (*abort_it)(ncclComm_t) = ncclCommAbort;
ncclResult_t (*group_start)(void) = ncclGroupStart;
ncclResult_t (*group_end)(void) = ncclGroupEnd;
ncclResult_t (*send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) = ncclSend;
ncclResult_t (*receive)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) = ncclRecv;
ncclResult_t (*broadcast)(const void *, void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) = ncclBroadcast;
const char *(*error_string)(ncclResult_t) = ncclGetErrorString;
const char *(*last_error)(ncclComm_t) = ncclGetLastError;
