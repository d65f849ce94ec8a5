// The end of a ResNet block: y = (x + residual + bias + residual_bias) * scale.
//
// Memory passes: x and the residual are read once, y is written once (3 B, the limit).
#pragma once

#include "cuda/two_pass.cuh"

namespace ldm_fused {

template <class A>
__device__ __forceinline__ A bias_of(const ResidualParams& p, int64_t c) {
  return p.bias.load<A>(0, c, 0) + p.residual_bias.load<A>(0, c, 0);
}

// Reads x and the residual once, writes y once.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) residual_rows(ResidualParams p) {
  using A = Accumulate<X>;
  const Unit unit = row_unit(p.shape, p.tiling);
  if (!unit.exists) return;
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const X* residual = static_cast<const X*>(p.residual) + unit.first;
  X* y = static_cast<X*>(p.y) + unit.first;
  const A bias = bias_of<A>(p, unit.c), scale = A(p.scale);
  stream<V>(unit, 1, x, residual, [&](int64_t at, const Vec<X, V>& vx, const Vec<X, V>& other) {
    Vec<X, V> out;
#pragma unroll
    for (int e = 0; e < V; ++e) out.e[e] = narrow<X>((A(widen(vx.e[e])) + A(widen(other.e[e])) + bias) * scale);
    store(y + at, out);
  });
}

// Reads x and the residual once, writes y once.
template <class X, int V>
__global__ void __launch_bounds__(kThreads) residual_columns(ResidualParams p) {
  using A = Accumulate<X>;
  const Unit unit = column_unit(p.shape, p.tiling);
  const X* x = static_cast<const X*>(p.x) + unit.first;
  const X* residual = static_cast<const X*>(p.residual) + unit.first;
  X* y = static_cast<X*>(p.y) + unit.first;
  A bias[V];
  const A scale = A(p.scale);
  share_columns(p.shape, bias, [&](int64_t c) { return bias_of<A>(p, c); });
  stream<V>(unit, p.shape.channels, x, residual, [&](int64_t at, const Vec<X, V>& vx, const Vec<X, V>& other) {
    Vec<X, V> out;
#pragma unroll
    for (int e = 0; e < V; ++e) out.e[e] = narrow<X>((A(widen(vx.e[e])) + A(widen(other.e[e])) + bias[e]) * scale);
    store(y + at, out);
  });
}

// For a tensor that is not empty, asynchronously on `stream`.
inline cudaError_t launch_residual(const ResidualParams& p, cudaStream_t stream) {
  return dispatch_pair(p.dtype, p.dtype, [&](auto type, auto) {
    using X = decltype(type);
    constexpr int V = vector_of(sizeof(X));
    return launch_tiled(p.tiling, sizeof(Accumulate<X>), p, stream, residual_rows<X, V>, residual_rows<X, 1>,
                        residual_columns<X, V>, residual_columns<X, 1>);
  });
}

}  // namespace ldm_fused
