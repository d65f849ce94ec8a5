// The inner loops. Included by kernels_*.cpp, each inside a namespace and a compiler target of its own.

#include "cpu/vectors.inl"

#include "cpu/runs.inl"

#include "cpu/columns.inl"
#include "cpu/dropout.inl"
#include "cpu/rows.inl"

template <class X, class Y>
Kernels<X, Y> kernels() {
  using A = Accumulate<X>;
  return {row_moments<X>,    rows_apply<X, Y>,    rows_sums<X, Y>,    rows_sum_x<X>,      rows_input_gradient<X, Y>,
          column_moments<X>, columns_apply<X, Y>, columns_sums<X, Y>, columns_sum_x<X>,   columns_input_gradient<X, Y>,
          drop<A, Y, A>,     drop<Y, A, A>,       rows_residual<X>,   columns_residual<X>};
}

#ifndef LDM_FUSED_AVX512_BF16
template Kernels<double, double> kernels();
template Kernels<float, float> kernels();
template Kernels<float, Half> kernels();
template Kernels<Half, Half> kernels();
template Kernels<Half, float> kernels();
#endif
template Kernels<float, BFloat16> kernels();
template Kernels<BFloat16, BFloat16> kernels();
template Kernels<BFloat16, float> kernels();

#undef LDM_FUSED_INLINE
