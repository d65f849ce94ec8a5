// The CPU's inner loops, compiled once an instruction set and chosen at run time.
//
// Rows are runs of one channel (contiguous memory), columns are pixels of all channels (channels_last). The
// instruction sets differ in the width of a vector only: kernels_*.cpp set the compiler's target and include
// kernels.inl, so that one binary, built anywhere, uses what the processor at hand has.
#pragma once

#include "problem.h"

namespace ldm_fused {
namespace cpu {

// Of a channel's chunk. In double, since the merging that follows costs nothing.
struct Moments {
  double count, mean, m2;

  // Chan, Golub and LeVeque (1979): nothing cancels, and nothing overflows before x does.
  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    mean += delta * (other.count / total);
    m2 += other.m2 + delta * (other.count / total) * delta * count;
    count = total;
  }
};

// The affine maps of all channels of a sample, each member an array over channels.
template <class A>
struct ColumnAffine {
  const A *center, *slope, *offset;
};

template <class X, class Y>
struct Kernels {
  using A = Accumulate<X>;

  Moments (*row_moments)(const X* x, int64_t n);
  void (*row_apply)(const X* x, Y* y, int64_t n, const ChannelAffine<A>&, bool silu);
  GradientSums<double> (*row_sums)(const X* x, const Y* dy, int64_t n, const ChannelAffine<A>&, bool silu);
  void (*row_input_gradient)(const X* x, const Y* dy, X* dx, int64_t n, const ChannelAffine<A>&, const Projection<A>&,
                             bool silu);

  // `mean` and `m2`, and the members of `sums`, are arrays over channels, written here.
  void (*column_moments)(const X* x, int64_t pixels, int64_t channels, A* mean, A* m2);
  void (*column_apply)(const X* x, Y* y, int64_t pixels, int64_t channels, const ColumnAffine<A>&, bool silu);
  void (*column_sums)(const X* x, const Y* dy, int64_t pixels, int64_t channels, const ColumnAffine<A>&, bool silu,
                      A* dz, A* dz_x, A* sum_x);
  void (*column_input_gradient)(const X* x, const Y* dy, X* dx, int64_t pixels, int64_t channels,
                                const ColumnAffine<A>&, const A* k1, const A* k2, bool silu);
};

// Each instruction set's kernels; baseline is what the compiler targets without being told.
namespace baseline {
template <class X, class Y>
Kernels<X, Y> kernels();
}
namespace avx2 {
template <class X, class Y>
Kernels<X, Y> kernels();
}

const char* isa();  // the instruction set in use: "baseline" or "avx2"

}  // namespace cpu
}  // namespace ldm_fused
