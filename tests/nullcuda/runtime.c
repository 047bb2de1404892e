// A CUDA runtime, driver and cuBLAS that compute nothing: on them PyTorch's CUDA build runs on a machine without a GPU.
//
// Preloaded, it stands in for libcudart, libcublas and libcublasLt. PyTorch sees a GPU. Memory, small copies, streams,
// events, pinned memory and the rules of a graph's capture are real; kernels do nothing, so results mean nothing. It
// counts what a program asks of the device, and calls a hook whenever the host would wait for it.
//
// NULLCUDA_CAPABILITY (80, an A100's) is the compute capability, NULLCUDA_MEMORY_GB (80) the size of the memory.

#define _GNU_SOURCE
#include <driver_types.h>  // not cuda_runtime_api.h: most functions here take no notice of their arguments
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// Counts. `nullcuda_names` lists them in the order in which `nullcuda_counts` writes them.

#define COUNTS                                                                                              \
  X(launches) X(graph_launches) X(products) X(copies_to_device) X(copies_to_host) X(copies_on_device) X(waits) \
  X(allocations) X(pinned_allocations)

#define X(name) static long name;
COUNTS
#undef X

#define COUNT(name) __atomic_fetch_add(&name, 1, __ATOMIC_RELAXED)

const char *nullcuda_names(void) {
#define X(name) #name " "
  return COUNTS;
#undef X
}

void nullcuda_counts(long *out) {
#define X(name) *out++ = name;
  COUNTS
#undef X
}

static void (*wait_hook)(const char *);

void nullcuda_set_wait_hook(void (*hook)(const char *)) { wait_hook = hook; }

static void host_waits(const char *function) {
  COUNT(waits);
  if (wait_hook) wait_hook(function);
}

static long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value ? atol(value) : otherwise;
}

static long capability(void) { return setting("NULLCUDA_CAPABILITY", 80); }

// Memory. Device and pinned memory are parts of two address ranges that are reserved once. A page before each allocation
// holds its size. Addresses are not used twice.

enum { PAGE = 4096, REALLY_COPIED = 1 << 20 };  // what is larger keeps its zeros, so that it costs no memory
static const size_t RANGE = 1ull << 44;
typedef struct { char *start, *next; size_t used; } Range;
static Range device_range, pinned_range;

static size_t total_memory(void) { return setting("NULLCUDA_MEMORY_GB", 80) * 1000000000ul; }

static int is_in(const Range *range, const void *pointer) {
  return range->start && (char *)pointer >= range->start && (char *)pointer < range->start + RANGE;
}

static int allocate(Range *range, void **pointer, size_t size, size_t limit) {
  static char lock;
  while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {}
  if (!range->start) {
    void *start = mmap(NULL, RANGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) perror("nullcuda: mmap"), abort();
    range->start = range->next = start;
  }
  int fits = range->used + size <= limit;
  if (fits) {
    size_t whole = PAGE + (size + PAGE - 1) / PAGE * PAGE;
    *(size_t *)range->next = size;
    *pointer = range->next + PAGE;
    range->next += whole;
    range->used += size;
  }
  __atomic_clear(&lock, __ATOMIC_RELEASE);
  return fits ? cudaSuccess : cudaErrorMemoryAllocation;
}

static int release(Range *range, void *pointer) {
  if (!pointer) return cudaSuccess;
  size_t size = *(size_t *)((char *)pointer - PAGE);
  __atomic_fetch_sub(&range->used, size, __ATOMIC_RELAXED);
  madvise((char *)pointer - PAGE, PAGE + size, MADV_DONTNEED);
  return cudaSuccess;
}

int cudaMalloc(void **pointer, size_t size) {
  COUNT(allocations);
  return allocate(&device_range, pointer, size, total_memory());
}

int cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  COUNT(pinned_allocations);
  return allocate(&pinned_range, pointer, size, SIZE_MAX);
}

int cudaFree(void *pointer) { return release(&device_range, pointer); }
int cudaFreeHost(void *pointer) { return release(&pinned_range, pointer); }

int cudaMemGetInfo(size_t *free_memory, size_t *total) {
  *total = total_memory();
  *free_memory = *total - device_range.used;
  return cudaSuccess;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  out->type = is_in(&device_range, pointer)   ? cudaMemoryTypeDevice
              : is_in(&pinned_range, pointer) ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  out->devicePointer = out->hostPointer = (void *)pointer;
  return cudaSuccess;
}

// Streams and graphs. A capture belongs to the thread that begins it.

static __thread void *captured_stream;  // NULL: no capture

static int refused(const char *what) {
  fprintf(stderr, "nullcuda: %s during a capture\n", what);
  return cudaErrorStreamCaptureUnsupported;
}

static int new_handle(void **handle) { return (*handle = malloc(8)) ? cudaSuccess : cudaErrorMemoryAllocation; }
static int free_handle(void *handle) { return free(handle), cudaSuccess; }

int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return new_handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return new_handle(stream); }
int cudaStreamDestroy(void *stream) { return free_handle(stream); }
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return new_handle(event); }
int cudaEventDestroy(void *event) { return free_handle(event); }

int cudaStreamBeginCapture(void *stream, int mode) { return captured_stream = stream, cudaSuccess; }

int cudaStreamEndCapture(void *stream, void **graph) {
  captured_stream = NULL;
  return new_handle(graph);
}

int cudaStreamIsCapturing(void *stream, int *status) {
  int captured = captured_stream && stream == captured_stream;
  *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, void **dependencies,
                             void **edges, size_t *count) {
  if (id) *id = 1;
  if (graph) *graph = NULL;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

int cudaGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  return new_handle(executable);
}

int cudaGraphGetNodes(void *graph, void *nodes, size_t *count) { return *count = 1, cudaSuccess; }
int cudaGraphLaunch(void *executable, void *stream) { return COUNT(graph_launches), cudaSuccess; }
int cudaGraphDestroy(void *graph) { return free_handle(graph); }
int cudaGraphExecDestroy(void *executable) { return free_handle(executable); }

int cudaStreamSynchronize(void *stream) {
  if (captured_stream && stream == captured_stream) return refused(__func__);
  return host_waits(__func__), cudaSuccess;
}

int cudaDeviceSynchronize(void) {
  if (captured_stream) return refused(__func__);
  return host_waits(__func__), cudaSuccess;
}

int cudaEventSynchronize(void *event) { return host_waits(__func__), cudaSuccess; }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) { return *milliseconds = 1, cudaSuccess; }

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) { return function(argument), cudaSuccess; }

// Copies. Those of pageable memory wait for the stream.

static int copy(void *to, const void *from, size_t size) {
  int to_device = is_in(&device_range, to), from_device = is_in(&device_range, from);
  if (to_device && from_device) COUNT(copies_on_device);
  else if (to_device) COUNT(copies_to_device);
  else if (from_device) COUNT(copies_to_host);
  if (size <= REALLY_COPIED || !(to_device || from_device)) memcpy(to, from, size);
  else if (!to_device) memset(to, 0, size);
  return cudaSuccess;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  if (captured_stream) return refused(__func__);
  host_waits(__func__);
  return copy(to, from, size);
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  int to_device = is_in(&device_range, to), from_device = is_in(&device_range, from);
  if (to_device != from_device && !is_in(&pinned_range, to_device ? from : to)) {
    if (captured_stream) return refused("a copy of pageable memory");
    host_waits("cudaMemcpyAsync of pageable memory");
  }
  return copy(to, from, size);
}

int cudaMemset(void *to, int value, size_t size) {
  if (size <= REALLY_COPIED) memset(to, value, size);
  return cudaSuccess;
}

int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { return cudaMemset(to, value, size); }

// The device.

int cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
int cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
int cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
int cudaDeviceGetPCIBusId(char *id, int size, int device) { return snprintf(id, size, "0000:00:00.0"), cudaSuccess; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }

int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "nullcuda");
  out->totalGlobalMem = total_memory();
  out->major = capability() / 10;
  out->minor = capability() % 10;
  out->multiProcessorCount = 132;
  out->warpSize = 32;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxGridSize[0] = INT32_MAX;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = 232448;
  out->sharedMemPerMultiprocessor = 233472;
  out->l2CacheSize = 50 << 20;
  out->memoryBusWidth = 5120;
  out->textureAlignment = 512;
  out->unifiedAddressing = out->concurrentKernels = out->canMapHostMemory = 1;
  return cudaSuccess;
}

// Attributes have the same numbers in the runtime and in the driver.
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

// Kernels.

int cudaLaunchKernel() { return COUNT(launches), cudaSuccess; }
int cudaLaunchKernelExC() { return COUNT(launches), cudaSuccess; }
int __cudaLaunchKernel() { return COUNT(launches), cudaSuccess; }
int cuLaunchKernel() { return COUNT(launches), cudaSuccess; }
int cuLaunchKernelEx() { return COUNT(launches), cudaSuccess; }
int cuLaunchCooperativeKernel() { return COUNT(launches), cudaSuccess; }

int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->binaryVersion = out->ptxVersion = capability();
  out->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count) { return *count = 2, cudaSuccess; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count) { return *count = 2, cudaSuccess; }
int cuOccupancyMaxActiveClusters(int *count) { return *count = 2, cudaSuccess; }

// The driver, as Triton's launcher and NVRTC's kernels use it.

int cuDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
int cuDeviceGetCount(int *count) { return *count = 1, cudaSuccess; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, cudaSuccess; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
int cuCtxGetDevice(int *device) { return *device = 0, cudaSuccess; }
int cuCtxGetCurrent(void **context) { return *context = (void *)1, cudaSuccess; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, cudaSuccess; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return cudaSuccess;
}
int cuModuleLoad(void **module) { return new_handle(module); }
int cuModuleLoadData(void **module) { return new_handle(module); }
int cuModuleLoadDataEx(void **module) { return new_handle(module); }
int cuModuleGetFunction(void **function) { return new_handle(function); }
int cuFuncGetAttribute(int *value, int attribute) {  // 0: threads per block, 4: registers
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, cudaSuccess;
}
int cuPointerGetAttribute(void **value, int attribute, void *pointer) { return *value = pointer, cudaSuccess; }
int cuStreamIsCapturing(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }
int cuGetErrorString(int error, const char **text) { return *text = "nullcuda", cudaSuccess; }

static int succeeds() { return cudaSuccess; }

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                     int *found) {
  *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)succeeds : (void *)cuDevicePrimaryCtxGetState;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

const char *cudaGetErrorName(int error) {
  static __thread char name[32];
  snprintf(name, sizeof name, "nullcuda error %d", error);
  return name;
}

const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }

// cuBLAS.

int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasLtCreate(void **handle) { return new_handle(handle); }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0, cudaSuccess; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0, cudaSuccess; }

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  enum { RESULT_SIZE = 96 };
  memset(results, 0, RESULT_SIZE);
  return *found = 1, cudaSuccess;
}

#define PRODUCT(name) int name() { return COUNT(products), COUNT(launches), cudaSuccess; }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasGemmBatchedEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasStrsm_v2)
PRODUCT(cublasStrsmBatched)
PRODUCT(cublasLtMatmul)

// What succeeds without doing anything.

#define SUCCEEDS(name) int name() { return cudaSuccess; }
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaStreamUpdateCaptureDependencies)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasLtDestroy)
SUCCEEDS(cublasLtMatmulDescCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
