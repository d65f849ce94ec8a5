// What an op's kernels are given, and the arithmetic of one channel: the CPU and the CUDA kernels share both. No torch.
#pragma once

#include <initializer_list>

#include "dropout.h"

namespace ldm_fused {

LDM_FUSED_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LDM_FUSED_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Shape {
  int64_t batch, channels, spatial;  // x is (batch, channels, spatial), or channels_last (batch, spatial, channels)
  int64_t groups;
  bool channels_last;

  // Kernels divide once a channel. There are fewer than 2^31 channels, and a division of 32 bits is the cheaper one.
  LDM_FUSED_HD uint32_t channels_per_group() const { return uint32_t(channels) / uint32_t(groups); }
  LDM_FUSED_HD int64_t group(int64_t n, int64_t c) const { return n * groups + uint32_t(c) / channels_per_group(); }
  LDM_FUSED_HD int64_t rows() const { return batch * channels; }
  LDM_FUSED_HD int64_t elements() const { return rows() * spatial; }
  bool is_empty() const { return elements() == 0; }

  // Whether kernels walk columns, pixels of all channels one after the other, or else rows, runs of one channel.
  bool walks_columns() const { return channels_last || spatial == 1; }
};

// An optional per-channel parameter, (C,) or (N, C), in a dtype of its own.
struct Parameter {
  const void* data;  // null: absent
  Dtype dtype;
  int64_t batch_stride;  // 0 for (C,), C for (N, C)

  int bytes() const { return data ? size_of(dtype) : 0; }  // of one channel

  template <class A>
  LDM_FUSED_HD A load(int64_t n, int64_t c, A absent) const {
    if (data == nullptr) return absent;
    const int64_t i = n * batch_stride + c;
    switch (dtype) {
      case Dtype::float64: return A(static_cast<const double*>(data)[i]);
      case Dtype::float32: return A(static_cast<const float*>(data)[i]);
      case Dtype::float16: return A(widen(static_cast<const Half*>(data)[i]));
      default: return A(widen(static_cast<const BFloat16*>(data)[i]));
    }
  }
};

// Where the gradient of a Parameter goes.
struct Gradient {
  void* data;  // null: not wanted
  Dtype dtype;
  int64_t batch_stride;

  template <class A>
  LDM_FUSED_HD void store(int64_t n, int64_t c, A value) const {
    if (data == nullptr) return;
    const int64_t i = n * batch_stride + c;
    switch (dtype) {
      case Dtype::float64: static_cast<double*>(data)[i] = double(value); break;
      case Dtype::float32: static_cast<float*>(data)[i] = float(value); break;
      case Dtype::float16: static_cast<Half*>(data)[i] = narrow<Half>(float(value)); break;
      case Dtype::bfloat16: static_cast<BFloat16*>(data)[i] = narrow<BFloat16>(float(value)); break;
    }
  }
};

// u = ((x + pre_bias - mean) * rstd * weight + bias) * (1 + scale) + shift
struct Affine {
  Parameter weight, bias, pre_bias, scale, shift;

  int64_t bytes_per_channel() const {
    int64_t bytes = 0;
    for (const Parameter* p : {&weight, &bias, &pre_bias, &scale, &shift}) bytes += p->bytes();
    return bytes;
  }
};

struct Gradients {
  Gradient weight, bias, pre_bias, scale, shift;

  LDM_FUSED_HD bool any() const { return weight.data || bias.data || pre_bias.data || scale.data || shift.data; }
};

// The affine map of one channel of one sample: u = (x - center) * slope + offset. Subtracting first is what keeps
// |mean| >> std exact.
template <class A>
struct ChannelAffine {
  A center, slope, offset;

  LDM_FUSED_HD A operator()(A x) const { return (x - center) * slope + offset; }
};

template <class A>
LDM_FUSED_HD ChannelAffine<A> channel_affine(const Affine& affine, int64_t n, int64_t c, A mean, A rstd) {
  const A gain = A(1) + affine.scale.load<A>(n, c, 0);
  return {mean - affine.pre_bias.load<A>(n, c, 0), rstd * affine.weight.load<A>(n, c, 1) * gain,
          affine.bias.load<A>(n, c, 0) * gain + affine.shift.load<A>(n, c, 0)};
}

// Count, mean and sum of squared deviations, merged as Chan, Golub and LeVeque (1979) do: no E[x^2] - E[x]^2 that
// would cancel, and no sum of x that would overflow before x does.
template <class A>
struct Moments {
  A count, mean, m2;

  LDM_FUSED_HD void merge(const Moments& other) {
    if (other.count == A(0)) return;
    const A total = count + other.count;
    const A part = other.count / total;
    const A delta = other.mean - mean;
    mean += delta * part;
    m2 += other.m2 + (delta * part) * (delta * count);  // not delta^2: infinity times an empty count would be NaN
    count = total;
  }
};

// Sums of the backward pass over one channel of one sample, or a chunk of it. With dz = dy * activation'(u), they give
// the gradients of the input and of all parameters.
template <class A>
struct GradientSums {
  A dz;    // sum of dz
  A dz_x;  // sum of dz * (x - center)
  A x;     // sum of (x - center): wanted by pre_bias alone

  LDM_FUSED_HD void merge(const GradientSums& other) {
    dz += other.dz;
    dz_x += other.dz_x;
    x += other.x;
  }
};

// What the input gradient takes from the whole group: dx = slope * dz - k1 - k2 * (x - center), with
//   k1 = rstd   / M * sum over the group of gain * dz
//   k2 = rstd^3 / M * sum over the group of gain * dz * (x - center),   gain = weight * (1 + scale), M elements
// rstd^3 alone leaves the range of float for std beyond 1e13: it is multiplied in one factor at a time.
template <class A>
struct Projection {
  A k1, k2;
};

// Adds sample n's part to the gradients of channel c that are summed over the batch (dweight, dbias, and a dpre_bias
// of shape (C,)); stores those that are not.
template <class A>
struct ParameterGradients {
  A weight, bias, pre_bias;

  LDM_FUSED_HD void add(const Affine& affine, const Gradients& gradients, const Shape& shape, int64_t n, int64_t c,
                        A rstd, const Projection<A>& projection, const GradientSums<A>& total) {
    const A gain = A(1) + affine.scale.load<A>(n, c, 0);
    const A dz_normalized = total.dz_x * rstd;
    weight += gain * dz_normalized;
    bias += gain * total.dz;
    gradients.shift.store(n, c, total.dz);
    if (!gradients.scale.data && !gradients.pre_bias.data) return;
    const A w = affine.weight.load<A>(n, c, 1);
    gradients.scale.store(n, c, w * dz_normalized + affine.bias.load<A>(n, c, 0) * total.dz);
    const A dx = rstd * w * gain * total.dz - A(shape.spatial) * projection.k1 - projection.k2 * total.x;
    pre_bias += dx;
    if (gradients.pre_bias.batch_stride) gradients.pre_bias.store(n, c, dx);
  }

  LDM_FUSED_HD void merge(const ParameterGradients& other) {
    weight += other.weight;
    bias += other.bias;
    pre_bias += other.pre_bias;
  }

  LDM_FUSED_HD void store(const Gradients& gradients, int64_t c) const {
    gradients.weight.store(0, c, weight);
    gradients.bias.store(0, c, bias);
    if (!gradients.pre_bias.batch_stride) gradients.pre_bias.store(0, c, pre_bias);
  }
};

// ---- Ops ------------------------------------------------------------------------------------------------------
// What the kernels of each op are given, on every device. All tensors of x's size have x's layout. A is the type of the
// arithmetic, Accumulate<X>.

struct ForwardArgs {
  const void* x;      // in, of x_dtype
  void* y;            // out, of y_dtype
  void* mean;         // out, (N, G) of A: mean of x + pre_bias; null: not wanted
  void* rstd;         // out, (N, G) of A: 1 / sqrt(var + eps); null with mean
  void* moments;      // out, (3, N, G) of A: count, mean and m2, in place of the above; null: not wanted
  const void* parts;  // in, (part_count, 3, N, G) of A: such moments, to be merged; null: x is the whole tensor
  int64_t part_count;
  Affine affine;  // in
  Shape shape;
  Dtype x_dtype, y_dtype;
  double eps;
  Dropout dropout;
  bool silu;
};

struct BackwardArgs {
  const void* dy;        // in, of dy_dtype
  const void* x;         // in, of x_dtype
  const void* mean;      // in, (N, G) of A
  const void* rstd;      // in, (N, G) of A
  const void* shortcut;  // in, of x_dtype: added to dx; null: nothing
  void* dx;              // out, of x_dtype; null: not wanted
  void* totals;          // (sums, N, C) of A: GradientSums of a channel; null: the kernels' own
  void* projections;     // (N, G) of Projection<A>; null: the kernels' own
  bool has_sums;         // totals and projections are in, else out
  Affine affine;         // in
  Gradients gradients;   // out
  Shape shape;
  Dtype x_dtype, dy_dtype;
  Dropout dropout;
  int sums;  // GradientSums that are wanted: 2, or 3 with the gradient of pre_bias
  bool silu;
};

struct ResidualArgs {
  const void* x;                  // in
  const void* residual;           // in
  void* y;                        // out
  Parameter bias, residual_bias;  // in, (C,)
  Shape shape;
  Dtype dtype;  // of x, residual and y
  double scale;
};

struct ChannelSumsArgs {
  const void* x;  // in, of dtype
  void* sums;     // out, (C,) of A
  Shape shape;
  Dtype dtype;
};

}  // namespace ldm_fused
