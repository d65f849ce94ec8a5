// What the launchers hand to the kernels: one struct an op. Plain C++, no CUDA, no torch.
#pragma once

#include "cuda/plan.h"
#include "dropout.h"
#include "problem.h"

namespace ldm_fused {

struct ForwardParams {
  const void* x;   // in, dtype X
  void* y;         // out, dtype Y, same layout
  void* mean;      // out, (N, G) of Accumulate<X>: mean of x + pre_bias; null: not wanted, by one read alone
  void* rstd;      // out, (N, G) of Accumulate<X>: 1 / sqrt(var + eps); null with mean
  void* partials;  // workspace: mean and m2 of a channel's chunk (two passes), or what blocks exchange (grid)
  Affine affine;   // in
  Shape shape;
  Tiling reduce, apply;  // two passes
  Residence residence;   // one read
  double eps;
  Dropout dropout;
  bool silu;
  int device;  // for the launch
};

struct BackwardParams {
  const void* dy;        // in, dtype Y
  const void* x;         // in, dtype X, same layout
  const void* mean;      // in, (N, G) of Accumulate<X>
  const void* rstd;      // in, (N, G) of Accumulate<X>
  const void* shortcut;  // in, dtype X, same layout: added to dx; null: nothing
  void* dx;              // out, dtype X, same layout; null: not wanted
  void* partials;        // workspace: GradientSums of a channel's chunk (two passes), or what blocks exchange (grid)
  void* totals;          // workspace, (sums, N, C) of Accumulate<X>: GradientSums of a channel. Null: not needed
  void* projections;     // workspace, (N, G) of Projection<Accumulate<X>>. Null: not needed
  Affine affine;         // in
  Gradients gradients;   // out
  Shape shape;
  Tiling reduce, apply;  // two passes
  Residence residence;   // one read
  Dropout dropout;
  int sums;  // 2, or 3 where dpre_bias is wanted
  bool silu;
  int device;  // for the launch
};

struct ResidualParams {
  const void* x;                  // in, dtype X
  const void* residual;           // in, dtype X, same layout
  void* y;                        // out, dtype X, same layout
  Parameter bias, residual_bias;  // in, (C,)
  Shape shape;
  Tiling tiling;
  double scale;
};

struct ChannelSumsParams {
  const void* x;   // in, dtype X
  void* partials;  // workspace: the sum of a channel's chunk, of Accumulate<X>
  void* sums;      // out, (C,) of Accumulate<X>
  Shape shape;
  Tiling tiling;
};

}  // namespace ldm_fused
