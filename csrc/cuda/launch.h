// Launching the resident kernels. What a kernel may use is set once a device, to the most that it will ever need: a
// launch that set its own needs would change them for other host threads, and for graphs that are replayed later. What
// a device refuses is remembered.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "cuda/common.cuh"

namespace ldm_fused {

// No cluster of that size, above what every device has, fits this one. No launch of CUDA returns this value.
constexpr cudaError_t kNoClusters = cudaErrorNotReady;

// Whether the device works, but lacks the room or the means for the launch: another plan may do.
inline bool is_refusal(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidClusterSize:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorCooperativeLaunchTooLarge:
    case cudaErrorNotSupported: return true;
    default: return false;
  }
}

// Remembers all launches, for all host threads.
class LaunchMemories {
 public:
  // What is known of launches that differ in nothing but their arguments, and in the number of their teams: cudaSuccess
  // or a refusal. learn() says it the first time. Before its first launch on a device the kernel is allowed what it may
  // need.
  template <class Params, class F>
  cudaError_t find(void (*kernel)(Params), int device, const Residence& r, F&& learn) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kernel& known = kernels_[{reinterpret_cast<const void*>(kernel), device}];
    if (!known.is_allowed) {
      const cudaError_t error = allow(kernel, device);
      if (error != cudaSuccess) return error;
      known.is_allowed = true;
    }
    const auto found = known.launches.find(key_of(r));
    if (found != known.launches.end()) return found->second;
    const cudaError_t learned = learn();
    if (learned == cudaSuccess || learned == kNoClusters || is_refusal(learned)) known.launches[key_of(r)] = learned;
    return learned;
  }

  template <class Params>
  void refuse(void (*kernel)(Params), int device, const Residence& r, cudaError_t error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernels_[{reinterpret_cast<const void*>(kernel), device}].launches[key_of(r)] = error;
  }

 private:
  using Key = std::tuple<Exchange, int, int, int>;
  struct Kernel {
    bool is_allowed = false;
    std::map<Key, cudaError_t> launches;
  };

  // Of a grid all that counts is how many blocks it has.
  static Key key_of(const Residence& r) {
    return {r.exchange, r.exchange == Exchange::grid ? int(r.blocks()) : r.team, r.threads, r.shared_bytes};
  }

  template <class Params>
  static cudaError_t allow(void (*kernel)(Params), int device) {
    if (cuda::device_of(device).max_cluster > kPortableCluster &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
      cudaGetLastError();  // clears the error: a cluster that needs this will be refused
    }
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cuda::most_shared_bytes(device));
  }

  std::mutex mutex_;
  std::map<std::pair<const void*, int>, Kernel> kernels_;
};

inline LaunchMemories& launch_memories() {
  static auto& memories = *new LaunchMemories;  // for threads that outlive static objects
  return memories;
}

// Launches the kernel. After a refusal, which the runtime has then forgotten, or kNoClusters another plan may do. Any
// other error is an error.
template <class Params>
cudaError_t launch_resident(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  const Residence& r = params.residence;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(r.blocks()));
  config.blockDim = dim3(unsigned(r.threads));
  config.dynamicSmemBytes = size_t(r.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = r.exchange != Exchange::block;
  if (r.exchange == Exchange::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(r.team), 1, 1};
  }
  const cudaError_t known = launch_memories().find(kernel, params.device, r, [&] {
    if (r.exchange != Exchange::cluster) return cudaSuccess;
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (is_refusal(error)) cudaGetLastError();
    if (error != cudaSuccess || clusters > 0) return error;
    return r.team > kPortableCluster ? kNoClusters : cudaErrorLaunchOutOfResources;
  });
  if (known != cudaSuccess) return known;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (is_refusal(error)) {
    cudaGetLastError();
    launch_memories().refuse(kernel, params.device, r, error);
  }
  return error;
}

// Calls f with a value of the storage type of each dtype that the resident kernels are compiled for.
template <class F>
cudaError_t dispatch_resident(Dtype x, Dtype y, F&& f) {
  return dispatch_pair(x, y, [&](auto x_type, auto y_type) {
    if constexpr (sizeof(x_type) == 8)
      return cudaErrorInvalidValue;
    else
      return f(x_type, y_type);
  });
}

}  // namespace ldm_fused
