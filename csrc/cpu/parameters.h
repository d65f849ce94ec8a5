// Per-channel parameters of any dtype as arrays of the arithmetic's type A.
#pragma once

#include <algorithm>

#include "cpu/work.h"

namespace ldm_fused {
namespace cpu {

template <class T, class A>
void widen_into(const void* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = A(widen(static_cast<const T*>(from)[i]));
}

// Writes sample n's values of a parameter, or `absent`, for all channels.
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

// Each channel's parameters in the arithmetic's type, put together once a call and not once a group:
// u = (x - (mean - pre_bias)) * (rstd * gain) + offset.
template <class A>
class Channels {
 public:
  Channels(const Shape& shape, const Affine& affine)
      : shape_(shape),
        stride_(affine.pre_bias.batch_stride || affine.scale.data || affine.shift.data ? shape.channels : 0),
        samples_(stride_ ? shape.batch : 1),
        values_(samples_ * shape.channels * (affine.pre_bias.data ? 3 : 2)),
        gain_(values_.data()),
        offset_(gain_ + samples_ * shape.channels),
        pre_bias_(affine.pre_bias.data ? offset_ + samples_ * shape.channels : nullptr) {
    for (int64_t n = 0; n < samples_; ++n) {
      A *gain = gain_ + n * stride_, *offset = offset_ + n * stride_;
      fill(affine.weight, n, 1, gain);
      fill(affine.bias, n, 0, offset);
      if (pre_bias_) fill(affine.pre_bias, n, 0, pre_bias_ + n * stride_);
      for (int64_t c = 0; affine.scale.data && c < shape.channels; ++c) {
        const A factor = A(1) + affine.scale.load<A>(n, c, 0);
        gain[c] *= factor;
        offset[c] *= factor;
      }
      for (int64_t c = 0; affine.shift.data && c < shape.channels; ++c) offset[c] += affine.shift.load<A>(n, c, 0);
    }
  }

  const A* gain(int64_t n) const { return gain_ + n * stride_; }
  const A* offset(int64_t n) const { return offset_ + n * stride_; }
  const A* pre_bias(int64_t n) const { return pre_bias_ ? pre_bias_ + n * stride_ : nullptr; }  // null: none

  // The maps of a group's channels, from channel c on.
  GroupAffine<A> group(int64_t n, int64_t c, A mean, A rstd) const {
    const int64_t at = n * stride_ + c;
    return {mean, rstd, gain_ + at, offset_ + at, pre_bias_ ? pre_bias_ + at : nullptr};
  }

 private:
  void fill(const Parameter& parameter, int64_t n, A absent, A* to) const {
    widen_parameter(parameter, n, shape_.channels, absent, to);
  }

  const Shape& shape_;
  int64_t stride_, samples_;
  Buffer<A> values_;
  A *gain_, *offset_, *pre_bias_;
};

// The affine maps of all channels of all samples, one array a member.
template <class A>
class AffineTable {
 public:
  explicit AffineTable(const Shape& shape)
      : channels_(shape.channels),
        groups_(shape.groups),
        in_group_(shape.channels_per_group()),
        values_(3 * shape.rows()) {}

  // Fills in sample n's groups from `first` to `last`, from their statistics.
  void fill(int64_t n, int64_t first, int64_t last, const Channels<A>& channels, const A* mean, const A* rstd) {
    A *center = values_.data() + 3 * n * channels_, *slope = center + channels_, *offset = slope + channels_;
    const A *gain = channels.gain(n), *pre_bias = channels.pre_bias(n);
    std::copy(channels.offset(n) + first * in_group_, channels.offset(n) + last * in_group_,
              offset + first * in_group_);
    for (int64_t g = first; g < last; ++g) {
      const A m = mean[n * groups_ + g], r = rstd[n * groups_ + g];
      for (int64_t c = g * in_group_; c < (g + 1) * in_group_; ++c) {
        center[c] = pre_bias ? m - pre_bias[c] : m;
        slope[c] = r * gain[c];
      }
    }
  }

  // The maps of sample n, from channel c on.
  ColumnAffine<A> from(int64_t n, int64_t c) const {
    const A* at = values_.data() + 3 * n * channels_ + c;
    return {at, at + channels_, at + 2 * channels_};
  }

 private:
  int64_t channels_, groups_, in_group_;
  Buffer<A> values_;
};

}  // namespace cpu
}  // namespace ldm_fused
