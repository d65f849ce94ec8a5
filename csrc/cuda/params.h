// What the launchers hand to the kernels: an op's arguments, a workspace and the plan. Plain C++, no CUDA, no torch.
#pragma once

#include "cuda/plan.h"
#include "problem.h"

namespace ldm_fused {

struct ForwardParams : ForwardArgs {
  void* partials;        // workspace: mean and m2 of a channel's chunk (two passes), or what blocks exchange (grid)
  Tiling reduce, apply;  // two passes, which need mean and rstd whether they are wanted or not
  Residence residence;   // one read
  int device;            // for the launch
};

struct BackwardParams : BackwardArgs {  // where totals or projections are null, nobody needs them
  void* partials;        // workspace: GradientSums of a channel's chunk (two passes), or what blocks exchange (grid)
  Tiling reduce, apply;  // two passes
  Residence residence;   // one read
  int device;            // for the launch
};

struct ResidualParams : ResidualArgs {
  Tiling tiling;
};

struct ChannelSumsParams : ChannelSumsArgs {
  void* partials;  // workspace: the sum of a channel's chunk, of A
  Tiling tiling;
};

}  // namespace ldm_fused
