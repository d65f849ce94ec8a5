// bias_add_residual and channel_sums on CUDA: plan, launch, register.
#include "cuda/bias_add_residual.cuh"
#include "cuda/host.h"
#include "cuda/channel_sums.cuh"

namespace ldm_fused {
namespace cuda {
namespace {

void run_residual(const ResidualCall& call) {
  const ResidualArgs& args = call.args;
  const Streaming plan = plan_residual(args.shape, args.dtype, is_aligned(args.x) && is_aligned(args.residual),
                                       args.bias.bytes() + args.residual_bias.bytes(),
                                       device_of(call.x.get_device_index()));
  check(launch_residual({args, plan.tiling}, current_stream(call.x)), "bias_add_residual");
}

void run_channel_sums(const ChannelSumsCall& call) {
  const ChannelSumsArgs& args = call.args;
  const Streaming plan =
      plan_channel_sums(args.shape, args.dtype, is_aligned(args.x), device_of(call.x.get_device_index()));
  const Workspace partials(partials_of(args.shape, plan.tiling), call.x);
  check(launch_channel_sums({args, partials.data(), plan.tiling}, current_stream(call.x)), "channel_sums");
}

constexpr auto residual_op = &bias_add_residual<Guard, run_residual>;
constexpr auto channel_sums_op = &channel_sums<Guard, run_channel_sums>;

}  // namespace
}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CUDA, m) {
  m.impl("bias_add_residual", TORCH_BOX(ldm_fused::cuda::residual_op));
  m.impl("channel_sums", TORCH_BOX(ldm_fused::cuda::channel_sums_op));
}
