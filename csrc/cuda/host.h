// What every launcher of an op needs from torch and from the device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "calls.h"
#include "cuda/plan.h"

// Only a CUDA torch has it. It is weak so that this binary also loads under a CPU-only torch, which never calls it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace ldm_fused {
namespace cuda {

inline cudaStream_t current_stream(const Tensor& on) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: the next caller must not see it again
  STD_TORCH_CHECK(false, what, " failed: ", cudaGetErrorString(error));
}

struct Guard : torch::stable::accelerator::DeviceGuard {
  explicit Guard(const Tensor& on) : DeviceGuard(on.get_device_index()) {}
};

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Allocated on the current stream and freed in its order: safe under graph capture and on concurrent streams. Nothing
// is allocated for no elements.
class Workspace {
 public:
  Workspace(int64_t elements, const Tensor& like) {
    if (elements > 0) memory_ = empty({elements}, accumulate_type(like.scalar_type()), like);
  }

  void* data() const { return memory_ ? memory_->data_ptr() : nullptr; }

 private:
  OptionalTensor memory_;
};

}  // namespace cuda
}  // namespace ldm_fused
