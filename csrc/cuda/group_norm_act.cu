// group_norm_act and its backward on CUDA: check, allocate, plan, launch, register.
#include "cuda/call.h"
#include "cuda/resident_backward.cuh"
#include "cuda/resident_forward.cuh"
#include "cuda/two_pass_backward.cuh"
#include "cuda/two_pass_forward.cuh"

namespace ldm_fused {
namespace cuda {
namespace {

// Calls attempt(device), which plans and launches, until its plan fits: a device may have room for fewer blocks side by
// side than its properties say.
template <class F>
void launch_what_fits(Device device, const char* what, F&& attempt) {
  for (;;) {
    const auto [plan, error] = attempt(device);
    if (error != cudaErrorCooperativeLaunchTooLarge || !plan.resident) return check(error, what);
    cudaGetLastError();  // forgets it
    const bool cluster = plan.residence.exchange == Exchange::cluster;
    (cluster ? device.max_cluster : device.shared_per_block) = cluster ? plan.residence.team / 2 : 0;
  }
}

// Elements of the workspace for partial results: two passes keep `partial` of each channel's chunk; what the teams of a
// grid exchange is `exchanged` floats a block, in two places by turns, behind the teams' counters.
int64_t workspace_of(const Plan& plan, const Shape& shape, int partial, int exchanged) {
  const Residence& r = plan.residence;
  if (!plan.resident) return partial * partials_of(shape, plan.reduce);
  if (r.exchange != Exchange::grid) return 0;
  return r.teams * int64_t(sizeof(TeamCounter) / sizeof(float)) + 2 * r.blocks() * exchanged;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype,
                                                  const OptionalTensor& dropout_seed, double dropout_p) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  ForwardCall call(x, num_groups, weight, bias, pre_bias, scale, shift, out_dtype);
  const Dropout dropout = dropout_of(dropout_seed, dropout_p, call.x);
  if (call.is_empty()) return {call.y, call.mean, call.rstd};
  ForwardParams params{};
  params.x = call.x.data_ptr();
  params.y = call.y.data_ptr();
  params.mean = call.mean.data_ptr();
  params.rstd = call.rstd.data_ptr();
  params.affine = call.parameters.affine;
  params.shape = call.shape;
  params.eps = eps;
  params.dropout = dropout;
  params.silu = silu;
  launch_what_fits(device_of(x), "group_norm_act", [&](const Device& device) {
    const Plan plan = plan_forward(call.shape, call.x_dtype, call.y_dtype, is_aligned(call.x),
                                   params.affine.bytes_per_channel(), device);
    const Tensor partials = workspace(workspace_of(plan, call.shape, 2, 2 * plan.residence.bundle), call.x);
    params.partials = partials.data_ptr();
    params.reduce = plan.reduce;
    params.apply = plan.apply;
    params.residence = plan.residence;
    const auto launch = plan.resident ? launch_resident_forward : launch_two_pass_forward;
    return std::pair(plan, launch(params, call.x_dtype, call.y_dtype, current_stream(x)));
  });
  return {call.y, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
    const OptionalTensor& shift, std::vector<bool> output_mask, const OptionalTensor& dx_shortcut,
    const OptionalTensor& dropout_seed, double dropout_p) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BackwardCall call(dy, x, mean, rstd, weight, bias, pre_bias, scale, shift, output_mask, dx_shortcut);
  const Dropout dropout = dropout_of(dropout_seed, dropout_p, call.x);
  if (call.is_empty()) return call.outputs();
  const int sums = call.gradients.pre_bias.data ? 3 : 2;
  const Tensor totals = workspace(sums * call.shape.rows(), call.x);
  const Tensor projections = workspace(2 * call.shape.batch * call.shape.groups, call.x);
  BackwardParams params{};
  params.dy = call.dy.data_ptr();
  params.x = call.x.data_ptr();
  params.mean = call.mean.data_ptr();
  params.rstd = call.rstd.data_ptr();
  params.shortcut = call.shortcut_data();
  params.dx = call.wants_dx ? call.dx.data_ptr() : nullptr;
  params.totals = totals.data_ptr();
  params.projections = projections.data_ptr();
  params.affine = call.parameters.affine;
  params.gradients = call.gradients;
  params.shape = call.shape;
  params.dropout = dropout;
  params.sums = sums;
  params.silu = silu;
  launch_what_fits(device_of(x), "group_norm_act_backward", [&](const Device& device) {
    const bool aligned = is_aligned(call.x) && is_aligned(call.dy) && (!call.shortcut || is_aligned(*call.shortcut));
    const Plan plan = plan_backward(call.shape, call.x_dtype, call.dy_dtype, aligned, params.affine.bytes_per_channel(),
                                    sums, call.shortcut.has_value(), device);
    const Residence& r = plan.residence;
    const Tensor partials =
        workspace(workspace_of(plan, call.shape, sums, 2 * r.bundle + int(round_up(sums * r.width, 2))), call.x);
    params.partials = partials.data_ptr();
    params.reduce = plan.reduce;
    params.apply = plan.apply;
    params.residence = r;
    const auto launch = plan.resident ? launch_resident_backward : launch_two_pass_backward;
    return std::pair(plan, launch(params, call.x_dtype, call.dy_dtype, current_stream(x)));
  });
  return call.outputs();
}

}  // namespace
}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CUDA, m) {
  m.impl("group_norm_act", TORCH_BOX(&ldm_fused::cuda::group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&ldm_fused::cuda::group_norm_act_backward));
}
