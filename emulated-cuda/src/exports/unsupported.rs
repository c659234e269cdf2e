//! What a program may be linked against and the emulated driver cannot do: kernels, modules, graphs, managed and
//! external memory. Every one of these says that it is not supported, whatever it is given.

use super::exports;
use crate::codes;

/// Arguments are left out: the caller of a C function removes them, and none is looked at.
macro_rules! unsupported {
    ($($name:ident)*) => {
        exports! {
            $(fn $name() |_driver| { Err(codes::NOT_SUPPORTED) })*
        }
    };
}

unsupported! {
    cuCtxCreate_v3 cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCacheConfig cuCtxGetLimit cuCtxSetCacheConfig cuCtxSetLimit
    cuDestroyExternalMemory cuDeviceSetMemPool cuExternalMemoryGetMappedBuffer
    cuFuncGetAttribute cuFuncSetAttribute cuFuncSetCacheConfig cuFuncGetModule
    cuGetProcAddress cuGetProcAddress_v2
    cuGraphDestroy cuGraphExecDestroy cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload
    cuImportExternalMemory cuLaunchCooperativeKernel cuLaunchHostFunc cuLaunchKernel cuLaunchKernelEx
    cuMemAdvise_v2 cuMemAllocManaged cuMemPoolCreate cuMemPoolDestroy cuMemPrefetchAsync_v2
    cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleLoadFatBinary
    cuModuleUnload cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyMaxPotentialClusterSize
    cuProfilerStart cuProfilerStop cuStreamAddCallback cuStreamAttachMemAsync cuStreamBeginCapture_v2
    cuStreamEndCapture
}
