// Between torch's tensors and the kernels' raw pointers: what memory safety needs is checked here, for every device.
// ldm_fused/functional.py checks what users may pass, with the exceptions and messages that they should see.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "dropout.h"
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

// The pairs (x, y) that kernels exist for: the same type twice, or float32 with a 16-bit type.
inline void check_pair(ScalarType x, ScalarType y, const char* name) {
  const auto is_small = [](ScalarType t) { return t == ScalarType::Half || t == ScalarType::BFloat16; };
  STD_TORCH_CHECK(x == y || (x == ScalarType::Float && is_small(y)) || (is_small(x) && y == ScalarType::Float), name,
                  " must be x's dtype, or one of the two float32 and the other float16 or bfloat16");
}

// ---- Layout ---------------------------------------------------------------------------------------------------

// Whether channels are innermost and the rest of a 4-D or 5-D tensor is dense; axes of size 1 may have any stride.
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t dim = t.dim();
  if (dim != 4 && dim != 5) return false;
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

// A contiguous tensor of one or two dimensions.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type, const Tensor& like) {
  const int64_t strides[] = {sizes.size() == 2 ? sizes[1] : 1, 1};
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

// ---- Parameters -----------------------------------------------------------------------------------------------

// Per-channel parameters on their way to the kernels. The tensors must outlive it; copies that the kernels need of
// those that are not contiguous it keeps itself.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}
  Parameters(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& pre_bias,
             const OptionalTensor& scale, const OptionalTensor& shift)
      : x_(x) {
    STD_TORCH_CHECK((!scale || scale->dim() == 2) && (!shift || shift->dim() == 2),
                    "scale and shift must be of shape (N, C)");
    affine = {parameter(weight, "weight", false), parameter(bias, "bias", false), parameter(pre_bias, "pre_bias", true),
              parameter(scale, "scale", true), parameter(shift, "shift", true)};
  }

  Affine affine{};

  // (C,), or also (N, C).
  Parameter parameter(const OptionalTensor& t, const char* name, bool may_be_batched) {
    if (!t) return {};
    const int64_t batch = x_.size(0), channels = x_.size(1);
    const bool batched = may_be_batched && t->dim() == 2;
    STD_TORCH_CHECK(batched ? t->size(0) == batch && t->size(1) == channels : t->dim() == 1 && t->size(0) == channels,
                    name, " must have one element a channel (", channels, ")",
                    may_be_batched ? ", or be of shape (N, C)" : "");
    STD_TORCH_CHECK(same_device(*t, x_), name, " must be on x's device");
    const Dtype dtype = dtype_of(t->scalar_type(), name), x_dtype = dtype_of(x_.scalar_type(), "x");
    STD_TORCH_CHECK(dtype == x_dtype || (dtype == Dtype::float32 && size_of(x_dtype) == 2), name,
                    " must have x's dtype, or float32 beside an x of 16 bits");
    if (t->is_contiguous()) return {t->data_ptr(), dtype, batched ? channels : 0};
    copies_.push_back(torch::stable::contiguous(*t));
    return {copies_.back().data_ptr(), dtype, batched ? channels : 0};
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> copies_;
};

// What a seed and the probability of zeroing an element are to the kernels. The tensor must outlive it.
inline Dropout dropout_of(const OptionalTensor& seed, double p, const Tensor& x) {
  STD_TORCH_CHECK(seed.has_value() || p == 0, "dropout_p needs a dropout_seed, got ", p, " without one");
  if (!seed) return {};
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must be at least 0 and below 1, got ", p);
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && same_device(*seed, x),
                  "dropout_seed must be one int64 on x's device");
  return dropout_of(static_cast<const int64_t*>(seed->data_ptr()), p);
}

// ---- Calls ----------------------------------------------------------------------------------------------------
// What both devices' ops do before and after their kernels: check, allocate.

struct ForwardCall {
  Tensor x;  // as the kernels walk it
  Parameters parameters;
  Shape shape;
  Dtype x_dtype, y_dtype;
  Tensor y, mean, rstd;  // mean and rstd are (N, G), or undefined where nobody wants them

  ForwardCall(const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
              const OptionalTensor& pre_bias, const OptionalTensor& scale, const OptionalTensor& shift,
              std::optional<ScalarType> out_dtype, bool keeps_statistics = true)
      : x(dense(input)), parameters(x, weight, bias, pre_bias, scale, shift), shape(shape_of(x, num_groups)) {
    const ScalarType type = x.scalar_type(), out_type = out_dtype.value_or(type);
    x_dtype = dtype_of(type, "x");
    y_dtype = dtype_of(out_type, "out_dtype");
    check_pair(type, out_type, "out_dtype");
    y = empty_like(x, out_type);
    if (!keeps_statistics) return;
    const int64_t per_group[] = {shape.batch, shape.groups};
    mean = empty(per_group, accumulate_type(type), x);
    rstd = empty(per_group, accumulate_type(type), x);
    if (is_empty()) {
      torch::stable::zero_(mean);
      torch::stable::zero_(rstd);
    }
  }

  bool is_empty() const { return shape.elements() == 0; }

  // Refuses what functional.checked() in Python does beyond the above, and empty tensors, which it asks PyTorch about.
  void check_as_python_does(const OptionalTensor& weight, const OptionalTensor& bias) const {
    STD_TORCH_CHECK(shape.elements() > shape.batch * shape.groups, "x must have more than 1 value per group");
    STD_TORCH_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), "bias must have weight's dtype");
  }
};

struct BackwardCall {
  Tensor x, dy, mean, rstd;
  OptionalTensor shortcut;  // as x lies in memory; only where dx is wanted
  Parameters parameters;
  Shape shape;
  Dtype x_dtype, dy_dtype;
  // Outputs; one that is not wanted has no elements.
  Tensor dx, dweight, dbias, dpre_bias, dscale, dshift;
  Gradients gradients;
  bool wants_dx;

  BackwardCall(const Tensor& dy_, const Tensor& input, const Tensor& mean_, const Tensor& rstd_,
               const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& pre_bias,
               const OptionalTensor& scale, const OptionalTensor& shift, const std::vector<bool>& output_mask,
               const OptionalTensor& dx_shortcut)
      : x(dense(input)),
        dy(laid_out_like(dy_, x)),
        mean(torch::stable::contiguous(mean_)),
        rstd(torch::stable::contiguous(rstd_)),
        parameters(x, weight, bias, pre_bias, scale, shift),
        shape(shape_of(x, mean.dim() == 2 ? mean.size(1) : 0)) {
    const ScalarType type = x.scalar_type();
    x_dtype = dtype_of(type, "x");
    dy_dtype = dtype_of(dy.scalar_type(), "dy");
    check_pair(type, dy.scalar_type(), "dy");
    STD_TORCH_CHECK(same_device(dy, x) && same_device(mean, x) && same_device(rstd, x),
                    "dy, mean and rstd must be on x's device");
    STD_TORCH_CHECK(has_shape_of(dy, x), "dy must have x's shape");
    for (const Tensor& t : {mean, rstd}) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == shape.batch && t.size(1) == shape.groups &&
                          t.scalar_type() == accumulate_type(type),
                      "mean and rstd must be what the forward op returned for x");
    }
    STD_TORCH_CHECK(output_mask.size() == 6, "output_mask must have 6 elements, got ", output_mask.size());
    wants_dx = output_mask[0];
    if (wants_dx && dx_shortcut) {
      STD_TORCH_CHECK(
          dx_shortcut->scalar_type() == type && has_shape_of(*dx_shortcut, x) && same_device(*dx_shortcut, x),
          "dx_shortcut must have x's shape and dtype, and be on its device");
      shortcut = laid_out_like(*dx_shortcut, x);
    }
    dx = wants_dx ? empty_like(x, type) : empty(kNone, type, x);
    gradients.weight = gradient(weight, output_mask[1], dweight);
    gradients.bias = gradient(bias, output_mask[2], dbias);
    gradients.pre_bias = gradient(pre_bias, output_mask[3], dpre_bias);
    gradients.scale = gradient(scale, output_mask[4], dscale);
    gradients.shift = gradient(shift, output_mask[5], dshift);
  }

  bool is_empty() const { return shape.elements() == 0; }
  const void* shortcut_data() const { return shortcut ? shortcut->data_ptr() : nullptr; }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {dx, dweight, dbias, dpre_bias, dscale, dshift};
  }

 private:
  static constexpr int64_t kNone[] = {0};  // the size of an output that is not wanted

  Gradient gradient(const OptionalTensor& parameter, bool wanted, Tensor& out) {
    if (!parameter || !wanted) {
      out = empty(kNone, x.scalar_type(), x);
      return {};
    }
    const auto sizes = parameter->sizes();
    out = empty(sizes, parameter->scalar_type(), x);
    if (is_empty()) torch::stable::zero_(out);
    return {out.data_ptr(), dtype_of(parameter->scalar_type(), "parameter"), sizes.size() == 2 ? shape.channels : 0};
  }
};

// Groups mean nothing here: a tensor is cut as if it had one.
struct ResidualCall {
  Tensor x, residual;  // as the kernels walk them, both alike
  Parameters parameters;
  Parameter bias, residual_bias;
  Shape shape;
  Dtype dtype;
  Tensor y;

  ResidualCall(const Tensor& x_, const Tensor& residual_, const OptionalTensor& bias_,
               const OptionalTensor& residual_bias_)
      : x(dense(x_)),
        residual(laid_out_like(residual_, x)),
        parameters(x),
        bias(parameters.parameter(bias_, "bias", false)),
        residual_bias(parameters.parameter(residual_bias_, "residual_bias", false)),
        shape(shape_of(x, 1)),
        dtype(dtype_of(x.scalar_type(), "x")) {
    STD_TORCH_CHECK(has_shape_of(residual, x), "residual must have x's shape");
    STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type(), "residual must have x's dtype");
    STD_TORCH_CHECK(same_device(residual, x), "residual must be on x's device");
    y = empty_like(x, x.scalar_type());
  }

  bool is_empty() const { return shape.elements() == 0; }
};

struct ChannelSumsCall {
  Tensor x;  // as the kernels walk it
  Shape shape;
  Dtype dtype;
  Tensor sums;

  explicit ChannelSumsCall(const Tensor& input)
      : x(dense(input)), shape(shape_of(x, 1)), dtype(dtype_of(x.scalar_type(), "x")) {
    const int64_t sizes[] = {shape.channels};
    sums = empty(sizes, accumulate_type(x.scalar_type()), x);
    if (is_empty()) torch::stable::zero_(sums);
  }

  bool is_empty() const { return shape.elements() == 0; }
};

}  // namespace ldm_fused
