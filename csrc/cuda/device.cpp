// What this process knows of each device: asked once, and kept.
#include "cuda/device.h"

#include <algorithm>
#include <climits>
#include <map>
#include <mutex>

#include "cuda/host.h"

namespace ldm_fused {
namespace cuda {
namespace {

struct Known {
  std::once_flag once;
  Device device{};
  bool has_code = false;
  std::atomic<int> refused_grid{INT_MAX};  // blocks of the smallest that was
};

// Whether a kernel cannot be had because this binary has nothing that the device runs.
bool is_without_code(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled: return true;
    default: return false;
  }
}

void ask(int ordinal, Known& known) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  check(cudaSetDevice(ordinal), "cudaSetDevice");
  cudaFuncAttributes code{};
  const cudaError_t error = cudaFuncGetAttributes(&code, any_kernel());
  if (error != cudaSuccess) cudaGetLastError();  // clears the error
  check(cudaSetDevice(current), "cudaSetDevice");
  known.has_code = error == cudaSuccess;
  if (is_without_code(error)) return;
  check(error, "cudaFuncGetAttributes");
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, ordinal), "cudaDeviceGetAttribute");
    return value;
  };
  // Code for an older architecture that is compiled for this one when it is loaded still lacks the newer one's
  // features: the architecture that it was written for counts.
  const bool clusters = std::min(code.binaryVersion, code.ptxVersion) >= 90 && attribute(cudaDevAttrClusterLaunch);
  known.device = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  clusters ? kLargestCluster : 1, attribute(cudaDevAttrCooperativeLaunch) != 0,
                  code.ptxVersion == 90 ? kMostThreads : kFewerThreads};  // as resident.cuh compiles them
}

Known& known(int ordinal) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, Known>;  // for threads that outlive static objects
  std::unique_lock<std::mutex> lock(mutex);
  Known& known = all[ordinal];
  lock.unlock();
  std::call_once(known.once, [&] { ask(ordinal, known); });
  return known;
}

}  // namespace

Device device_of(int ordinal) {
  const Known& found = known(ordinal);
  STD_TORCH_CHECK(found.has_code, "this build of ldm_fused has no code that CUDA device ", ordinal, " runs");
  const int limit = multiprocessor_limit;
  Device device = found.device;
  device.wanted = wanted;
  if (limit > 0) device.multiprocessors = std::min(device.multiprocessors, limit);
  device.grids = device.grids && limit != 0 && device.multiprocessors < found.refused_grid;
  return device;
}

bool has_code(int ordinal) { return known(ordinal).has_code; }

int most_shared_bytes(int ordinal) { return known(ordinal).device.shared_per_block; }

void forbid_grids(int ordinal, int blocks) {
  std::atomic<int>& least = known(ordinal).refused_grid;
  for (int found = least; blocks < found && !least.compare_exchange_weak(found, blocks);) {
  }
}

}  // namespace cuda
}  // namespace ldm_fused
