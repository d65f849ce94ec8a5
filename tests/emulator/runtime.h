// The part of the CUDA runtime that launches need; cuda_runtime.h brings it in. What is refused here is what a device
// would refuse, and a kernel's attributes are one state for all host threads, as they are there.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorNotReady = 600,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,  // allows an overlap that is never made use of here
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};
using cudaStream_t = struct CUstream_st*;

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorInvalidClusterSize: return "Invalid cluster size was specified";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    default: break;
  }
  return "unrecognized error code";
}

namespace emulator {

inline thread_local cudaError_t last_error = cudaSuccess;
inline std::mutex runtime_mutex;  // of what follows: host threads call the runtime side by side

// What a kernel has asked for on a device beyond what every kernel may use.
struct Allowance {
  size_t dynamic_shared_bytes = 48 * 1024;
  unsigned cluster_size = 8;
};
inline std::map<std::pair<const void*, int>, Allowance> allowances;

inline std::map<std::string, int> runtime_calls;  // of each function, since the last look

inline void count_call(const char* function) {
  const std::lock_guard<std::mutex> lock(runtime_mutex);
  ++runtime_calls[function];
}

inline Allowance allowance_of(const void* kernel) {
  const std::lock_guard<std::mutex> lock(runtime_mutex);
  return allowances[{kernel, device.ordinal}];
}

inline cudaError_t noted(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

}  // namespace emulator

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  emulator::count_call("cudaDeviceGetAttribute");
  const emulator::Device& device = emulator::device;
  if (ordinal != device.ordinal) return emulator::noted(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = device.l2_bytes; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_per_multiprocessor; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_per_block; break;
    case cudaDevAttrClusterLaunch: *value = device.has_clusters(); break;
    default: return emulator::noted(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// There is one device at a time.
inline cudaError_t cudaGetDevice(int* ordinal) {
  emulator::count_call("cudaGetDevice");
  *ordinal = emulator::device.ordinal;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int ordinal) {
  emulator::count_call("cudaSetDevice");
  return ordinal == emulator::device.ordinal ? cudaSuccess : emulator::noted(cudaErrorInvalidDevice);
}

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};

// Loading compiles code for an older architecture for the device: hence the two versions.
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*kernel*/) {
  emulator::count_call("cudaFuncGetAttributes");
  const emulator::Device& device = emulator::device;
  if (device.code_version == 0) return emulator::noted(cudaErrorNoKernelImageForDevice);
  *attributes = {device.code_version, 10 * device.major + device.minor};
  return cudaSuccess;
}

namespace emulator {

// Fills in the launch's shape, or says why the runtime would refuse it. A query may not know of all reasons.
inline cudaError_t configure(const cudaLaunchConfig_t& config, const void* kernel, bool query, Launch& launch) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || block.x < 1 || block.y < 1 || block.z < 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads > 1024) return cudaErrorInvalidConfiguration;
  const Allowance allowance = allowance_of(kernel);
  const size_t most = std::max(device.shared_per_block, 48 * 1024);  // every device gives 48 KB without being asked
  if (config.dynamicSmemBytes > std::min(allowance.dynamic_shared_bytes, most)) {
    return cudaErrorInvalidValue;
  }
  launch.grid = grid;
  launch.block = block;
  launch.cluster = dim3(1, 1, 1);
  launch.cooperative = false;
  launch.dynamic_shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeCooperative: launch.cooperative = value.cooperative != 0; break;
      case cudaLaunchAttributeClusterDimension:
        if (!device.has_clusters()) return cudaErrorNotSupported;
        launch.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
        break;
      case cudaLaunchAttributeIgnore:
      case cudaLaunchAttributeProgrammaticStreamSerialization: break;
      default: return cudaErrorNotSupported;
    }
  }
  const dim3 cluster = launch.cluster;
  if (cluster.x < 1 || cluster.y < 1 || cluster.z < 1 || grid.x % cluster.x || grid.y % cluster.y ||
      grid.z % cluster.z || uint64_t(cluster.x) * cluster.y * cluster.z > allowance.cluster_size) {
    return cudaErrorInvalidConfiguration;
  }
  const unsigned cluster_size = cluster.x * cluster.y * cluster.z;
  if (cluster_size > unsigned(device.largest_cluster)) return cudaErrorInvalidClusterSize;
  if (!query && device.refused_cluster > 0 && cluster_size >= unsigned(device.refused_cluster)) {
    return cudaError_t(device.refusal);
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (launch.cooperative && device.refused_grid > 0 && blocks >= uint64_t(device.refused_grid)) {
    return cudaError_t(device.refusal);
  }
  const int resident = device.blocks_per_multiprocessor(unsigned(threads), config.dynamicSmemBytes);
  if (launch.cooperative && blocks > uint64_t(resident) * device.multiprocessors) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace emulator

inline cudaError_t cudaGetLastError() {
  emulator::count_call("cudaGetLastError");
  return std::exchange(emulator::last_error, cudaSuccess);
}
inline cudaError_t cudaPeekAtLastError() { return emulator::last_error; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  emulator::count_call("cudaFuncSetAttribute");
  const std::lock_guard<std::mutex> lock(emulator::runtime_mutex);
  auto& allowance = emulator::allowances[{reinterpret_cast<const void*>(kernel), emulator::device.ordinal}];
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > emulator::device.shared_per_block) break;
      allowance.dynamic_shared_bytes = size_t(std::max(value, 48 * 1024));
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (!emulator::device.has_clusters()) break;
      allowance.cluster_size = value ? 16 : 8;
      return cudaSuccess;
  }
  return emulator::noted(cudaErrorInvalidValue);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, size_t shared_bytes) {
  emulator::count_call("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  *blocks = emulator::device.blocks_per_multiprocessor(unsigned(threads), shared_bytes);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel, const cudaLaunchConfig_t* config) {
  emulator::count_call("cudaOccupancyMaxActiveClusters");
  emulator::Launch launch{};
  const auto error = emulator::configure(*config, reinterpret_cast<const void*>(kernel), /*query=*/true, launch);
  if (error != cudaSuccess) return emulator::noted(error);
  const dim3 block = launch.block, cluster = launch.cluster;
  const emulator::Device& device = emulator::device;
  const int resident = device.blocks_per_multiprocessor(block.x * block.y * block.z, config->dynamicSmemBytes);
  const int size = int(cluster.x * cluster.y * cluster.z), all = device.multiprocessors;
  const int group = device.multiprocessors_per_group > 0 ? device.multiprocessors_per_group : all;
  *clusters = all / group * (resident * group / size) + resident * (all % group) / size;
  return cudaSuccess;
}

namespace emulator {

// It is not watched: the parameters that it hands to a kernel do not count as memory.
template <class F>
__attribute__((noinline, no_sanitize("thread"))) void call(void* f) {
  (*static_cast<F*>(f))();
}

// For tests: what another host thread does before the next launch.
inline std::function<void()> before_launch;
// Whether kernels run. Else a launch is only checked.
inline bool runs_kernels = true;

// A launch as a graph keeps it. A replay looks at what the kernel may use by then.
struct CapturedLaunch {
  const void* kernel;
  cudaLaunchConfig_t config;
  std::vector<cudaLaunchAttribute> attributes;

  cudaError_t replay() {
    Launch launch{};
    config.attrs = attributes.data();
    return configure(config, kernel, /*query=*/false, launch);
  }
};
inline std::vector<CapturedLaunch>* capture = nullptr;  // of all launches, where there is one

}  // namespace emulator

// What is wrong inside the kernel is thrown, as std::runtime_error.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::count_call("cudaLaunchKernelEx");
  if (emulator::before_launch) std::exchange(emulator::before_launch, nullptr)();
  const void* const entry = reinterpret_cast<const void*>(kernel);
  emulator::Launch launch{};
  const cudaError_t error = emulator::configure(*config, entry, /*query=*/false, launch);
  if (error != cudaSuccess) return emulator::noted(error);
  if (emulator::capture) {
    emulator::capture->push_back({entry, *config, {config->attrs, config->attrs + config->numAttrs}});
  }
  if (!emulator::runs_kernels) return cudaSuccess;
  [&](Parameters... parameters) {
    auto thread = [&]() __attribute__((no_sanitize("thread"))) { kernel(parameters...); };
    launch.kernel = emulator::call<decltype(thread)>;
    launch.arguments = &thread;
    emulator::run(launch);
  }(std::forward<Arguments>(arguments)...);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) memset(to, value, bytes);
  return cudaSuccess;
}
