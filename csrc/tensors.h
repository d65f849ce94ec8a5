// Torch's tensors: their dtypes, layouts and shapes as the kernels know them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "library.h"
#include "problem.h"

namespace ldm_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, name, " must be float32, float16, bfloat16 or float64");
  }
}

inline ScalarType accumulate_type(ScalarType x) {
  return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_pair(Dtype x, Dtype y, const char* name) {
  STD_TORCH_CHECK(is_pair(x, y), name,
                  " must be x's dtype, or one of the two float32 and the other float16 or bfloat16");
}

// ---- Layout ---------------------------------------------------------------------------------------------------

// Whether channels are innermost and the rest is dense, whatever the number of axes: attention flattens pixels into
// one. Axes of size 1 may have any stride.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = t.dim();
  if (dim < 3) return false;
  int64_t expected = 1;
  const auto fits = [&](int64_t axis) {
    const bool ok = sizes[axis] == 1 || strides[axis] == expected;
    expected *= sizes[axis];
    return ok;
  };
  if (!fits(1)) return false;
  for (int64_t axis = dim - 1; axis > 1; --axis) {
    if (!fits(axis)) return false;
  }
  return fits(0);
}

inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType type, const Tensor& like) {
  int32_t device_type, dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A tensor of x's shape and strides.
inline Tensor empty_like(const Tensor& x, ScalarType type) { return empty_strided(x.sizes(), x.strides(), type, x); }

// A contiguous tensor of one to three dimensions.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type, const Tensor& like) {
  int64_t strides[3], stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= sizes[axis];
  }
  return empty_strided(sizes, {strides, sizes.size()}, type, like);
}

// x itself where the kernels can walk it, else a contiguous copy.
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// t in the order that x has in memory.
inline Tensor laid_out_like(const Tensor& t, const Tensor& x) {
  if (is_channels_last(x) ? is_channels_last(t) : t.is_contiguous()) return t;
  Tensor copy = empty_like(x, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool has_shape_of(const Tensor& t, const Tensor& x) {
  if (t.dim() != x.dim()) return false;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (t.size(axis) != x.size(axis)) return false;
  }
  return true;
}

inline Shape shape_of(const Tensor& x, int64_t num_groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have at least 2 dimensions (N, C, *), got ", x.dim());
  Shape shape{x.size(0), x.size(1), 1, num_groups, !x.is_contiguous()};
  for (int64_t axis = 2; axis < x.dim(); ++axis) shape.spatial *= x.size(axis);
  STD_TORCH_CHECK(num_groups > 0 && shape.channels % num_groups == 0, "num_groups (", num_groups,
                  ") must be positive and divide the number of channels (", shape.channels, ")");
  STD_TORCH_CHECK(shape.channels < int64_t(1) << 31, "x must have fewer than 2^31 channels, got ", shape.channels);
  return shape;
}

}  // namespace ldm_fused
