// Per-channel parameters of any dtype as arrays of the arithmetic's.
#pragma once

#include <algorithm>

#include "problem.h"

namespace ldm_fused {
namespace cpu {

template <class T, class A>
void widen_into(const void* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = A(widen(static_cast<const T*>(from)[i]));
}

// Sample n's values of a parameter, or `absent`, for all channels.
template <class A>
void widen_parameter(const Parameter& parameter, int64_t n, int64_t channels, A absent, A* to) {
  const char* from = static_cast<const char*>(parameter.data);
  if (!from) {
    std::fill_n(to, channels, absent);
    return;
  }
  from += n * parameter.batch_stride * size_of(parameter.dtype);
  switch (parameter.dtype) {
    case Dtype::float64: widen_into<double>(from, channels, to); break;
    case Dtype::float32: widen_into<float>(from, channels, to); break;
    case Dtype::float16: widen_into<Half>(from, channels, to); break;
    case Dtype::bfloat16: widen_into<BFloat16>(from, channels, to); break;
  }
}

}  // namespace cpu
}  // namespace ldm_fused
