// The CPU's inner loops, compiled once an instruction set and chosen at run time.
//
// Rows are runs of one channel (contiguous memory), columns are pixels of all channels (channels_last). The
// instruction sets differ in the width of a vector and in a few conversions: kernels_*.cpp set the compiler's target
// and include kernels.inl, so that one binary, built anywhere, uses what the processor at hand has.
#pragma once

#include "problem.h"

namespace ldm_fused {
namespace cpu {

// A sum of more floats than this loses digits: longer sums are added up in double.
constexpr int64_t kLongestSum = 128;

// `count` runs of `length` elements, one a channel, whose first elements are `stride` apart. The second pass prefetches
// what lies `ahead` elements further on.
struct Rows {
  int64_t count, length, stride, ahead;

  int64_t elements() const { return count * length; }
};

// `pixels` runs of `channels` elements, whose first elements are `stride` apart, of channels_last memory. `ahead` is as
// in Rows.
struct Columns {
  int64_t pixels, channels, stride, ahead;

  int64_t elements() const { return pixels * channels; }
};

// The affine maps of a group's channels, from its statistics and from arrays over its channels.
template <class A>
struct GroupAffine {
  A mean, rstd;
  const A *gain, *offset;
  const A* pre_bias;  // null: none

  ChannelAffine<A> channel(int64_t i) const {
    return {pre_bias ? mean - pre_bias[i] : mean, rstd * gain[i], offset[i]};
  }
};

// The affine maps of some channels of a sample, each member an array over them.
template <class A>
struct ColumnAffine {
  const A *center, *slope, *offset;
};

// All tensors begin at the first element of the first row or pixel. `kept`, or null, is dz: the sums write it, and the
// input gradient reads it in place of dy. It may be dx itself. `shortcut`, or null, is added to dx. The sum of x, which
// pre_bias alone wants, has a kernel of its own: x is in the cache then.
template <class X, class Y>
struct Kernels {
  using A = Accumulate<X>;

  Moments<double> (*row_moments)(const X* x, int64_t n);  // in double, since the merging that follows costs nothing
  void (*rows_apply)(const X* x, Y* y, const Rows&, const GroupAffine<A>&, bool silu);
  void (*rows_sums)(const X* x, const Y* dy, A* kept, const Rows&, const GroupAffine<A>&, bool silu,
                    GradientSums<double>* sums);
  void (*rows_sum_x)(const X* x, const Rows&, const GroupAffine<A>&, GradientSums<double>* sums);
  void (*rows_input_gradient)(const X* x, const Y* dy, const A* kept, const X* shortcut, X* dx, const Rows&,
                              const GroupAffine<A>&, const Projection<A>&, bool silu);

  // `mean` and `m2`, and dz, dz_x and sum_x, are arrays over channels, written here.
  void (*column_moments)(const X* x, const Columns&, A* mean, A* m2);
  void (*columns_apply)(const X* x, Y* y, const Columns&, const ColumnAffine<A>&, bool silu);
  void (*columns_sums)(const X* x, const Y* dy, A* kept, const Columns&, const ColumnAffine<A>&, bool silu, A* dz,
                       A* dz_x);
  void (*columns_sum_x)(const X* x, const Columns&, const A* center, A* sum_x);
  void (*columns_input_gradient)(const X* x, const Y* dy, const A* kept, const X* shortcut, X* dx, const Columns&,
                                 const ColumnAffine<A>&, const A* k1, const A* k2, bool silu);

  // Dropout of n consecutive elements, the tensor's from `first` on, before y is rounded and after dy is read.
  void (*drop)(const A* activated, Y* y, int64_t n, int64_t first, const Dropout&);
  void (*drop_gradient)(const Y* dy, A* dropped, int64_t n, int64_t first, const Dropout&);

  // y = (x + residual + bias) * scale; `bias` is an array over rows, or over channels.
  void (*rows_residual)(const X* x, const X* residual, X* y, const Rows&, const A* bias, A scale);
  void (*columns_residual)(const X* x, const X* residual, X* y, const Columns&, const A* bias, A scale);
};

// Each instruction set's kernels. baseline is what the compiler targets by default. avx512_bf16 has only the kernels
// with a bfloat16 in them; avx512 serves for the rest.
namespace baseline {
template <class X, class Y>
Kernels<X, Y> kernels();
}
namespace avx2 {
template <class X, class Y>
Kernels<X, Y> kernels();
}
namespace avx512 {
template <class X, class Y>
Kernels<X, Y> kernels();
}
namespace avx512_bf16 {
template <class X, class Y>
Kernels<X, Y> kernels();
}

}  // namespace cpu
}  // namespace ldm_fused
