// bias_add_residual and channel_sums on CUDA: check, allocate, plan, launch, register.
#include "cuda/bias_add_residual.cuh"
#include "cuda/call.h"

namespace ldm_fused {
namespace cuda {
namespace {

Tensor bias_add_residual(const Tensor& x, const Tensor& residual, const OptionalTensor& bias,
                         const OptionalTensor& residual_bias, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ResidualCall call(x, residual, bias, residual_bias);
  if (call.is_empty()) return call.y;
  const auto bytes = [](const Parameter& p) { return p.data ? size_of(p.dtype) : 0; };
  const Streaming plan = plan_residual(call.shape, call.dtype, is_aligned(call.x) && is_aligned(call.residual),
                                       bytes(call.bias) + bytes(call.residual_bias), device_of(x.get_device_index()));
  const ResidualParams params{call.x.data_ptr(),  call.residual.data_ptr(),
                              call.y.data_ptr(),  call.bias,
                              call.residual_bias, call.shape,
                              plan.tiling,        scale};
  check(launch_residual(params, call.dtype, current_stream(x)), "bias_add_residual");
  return call.y;
}

Tensor channel_sums(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ChannelSumsCall call(x);
  if (call.is_empty()) return call.sums;
  const Streaming plan = plan_channel_sums(call.shape, call.dtype, is_aligned(call.x), device_of(x.get_device_index()));
  const Workspace partials(partials_of(call.shape, plan.tiling), call.x);
  const ChannelSumsParams params{call.x.data_ptr(), partials.data(), call.sums.data_ptr(), call.shape, plan.tiling};
  check(launch_channel_sums(params, call.dtype, current_stream(x)), "channel_sums");
  return call.sums;
}

}  // namespace
}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CUDA, m) {
  m.impl("bias_add_residual", TORCH_BOX(&ldm_fused::cuda::bias_add_residual));
  m.impl("channel_sums", TORCH_BOX(&ldm_fused::cuda::channel_sums));
}
