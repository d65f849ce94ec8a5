// A kernel that converts with the toolkit's own half and bfloat16, beside the conversions of csrc/dtypes.h.
#include <cuda_runtime.h>  // the emulator's, before the toolkit's headers, in place of what they would include
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "dtypes.h"

namespace py = pybind11;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

struct Params {
  int64_t count;
  const float* values;
  uint16_t* narrowed[4];  // half, bfloat16: the toolkit's, ours
  float* widened[4];      // of the low 16 bits of a thread's index
};

__global__ void convert(Params p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  const float value = p.values[i];
  p.narrowed[0][i] = __half_as_ushort(__float2half_rn(value));
  p.narrowed[1][i] = ldm_fused::narrow<ldm_fused::Half>(value).bits;
  p.narrowed[2][i] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  p.narrowed[3][i] = ldm_fused::narrow<ldm_fused::BFloat16>(value).bits;
  const uint16_t bits = uint16_t(i);
  p.widened[0][i] = __half2float(__ushort_as_half(bits));
  p.widened[1][i] = ldm_fused::widen(ldm_fused::Half{bits});
  p.widened[2][i] = __bfloat162float(__ushort_as_bfloat16(bits));
  p.widened[3][i] = ldm_fused::widen(ldm_fused::BFloat16{bits});
}

template <class T>
static T* give(Array<T>& array) {
  T* const memory = array.mutable_data();
  emulator::allow(memory, size_t(array.nbytes()), false);
  return memory;
}

PYBIND11_MODULE(toolkit_halves, m) {
  m.def("convert", [](Array<float> values) {
    const py::ssize_t count = values.size();
    Array<uint16_t> narrowed[4];
    Array<float> widened[4];
    for (int k = 0; k < 4; ++k) narrowed[k] = Array<uint16_t>(count), widened[k] = Array<float>(count);
    Params params{count, give(values)};
    for (int k = 0; k < 4; ++k) params.narrowed[k] = give(narrowed[k]), params.widened[k] = give(widened[k]);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned((count + 255) / 256));
    config.blockDim = dim3(256);
    cudaLaunchKernelEx(&config, convert, params);
    emulator::forget_allowed();
    return py::make_tuple(narrowed[0], narrowed[1], narrowed[2], narrowed[3], widened[0], widened[1], widened[2],
                          widened[3]);
  });
}
