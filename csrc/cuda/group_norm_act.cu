// group_norm_act and its backward on CUDA: check, allocate, plan, launch, register.
#include <cstdlib>
#include <cstring>

#include "cuda/call.h"
#include "cuda/resident_backward.cuh"
#include "cuda/resident_forward.cuh"
#include "cuda/two_pass_backward.cuh"
#include "cuda/two_pass_forward.cuh"

namespace ldm_fused {
namespace cuda {
namespace {

// LDM_FUSED_STRICT_PLAN=1: a plan that a device refuses is an error.
bool is_strict() {
  const char* value = std::getenv("LDM_FUSED_STRICT_PLAN");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// Takes from the device what the plan asked too much of.
void narrow(Device& device, const Plan& plan, cudaError_t error, int ordinal) {
  const Residence& r = plan.residence;
  switch (r.exchange) {
    case Exchange::block: device.shared_per_block = 0; break;
    case Exchange::cluster: device.max_cluster = error == kFewClusters ? kPortableCluster : r.team / 2; break;
    case Exchange::grid:
      device.grids = false;
      forbid_grids(ordinal, int(r.blocks()));
      break;
  }
}

// Calls attempt(device), which plans and launches, until its plan fits: a device may have room for fewer blocks side by
// side than its properties say, or refuse what they promise.
template <class F>
void launch_what_fits(int ordinal, const char* what, F&& attempt) {
  for (Device device = device_of(ordinal);;) {
    const auto [plan, error] = attempt(device);
    if (!plan.resident || !(error == kFewClusters || is_refusal(error))) return check(error, what);
    const Residence& r = plan.residence;
    STD_TORCH_CHECK(error == kFewClusters || !is_strict(), what, ": LDM_FUSED_STRICT_PLAN is 1, and device ", ordinal,
                    " refused the plan '", plan.tier(), "' of ", r.teams, " teams of ", r.team, " blocks of ",
                    r.threads, " threads with ", r.shared_bytes,
                    " bytes of shared memory: ", cudaGetErrorString(error));
    narrow(device, plan, error, ordinal);
  }
}

// Elements of the workspace for partial results: two passes keep `partial` of each channel's chunk; what the teams of a
// grid exchange is `exchanged` floats a block, in two places by turns, behind the teams' counters.
int64_t partials_of(const Plan& plan, const Shape& shape, int partial, int exchanged) {
  const Residence& r = plan.residence;
  if (!plan.resident) return partial * partials_of(shape, plan.reduce);
  if (r.exchange != Exchange::grid) return 0;
  return r.teams * int64_t(sizeof(TeamCounter) / sizeof(float)) + 2 * r.blocks() * exchanged;
}

// The same for the statistics: two passes need them, though nobody else may.
int64_t statistics_of(const Plan& plan, const ForwardCall& call) {
  return plan.resident || call.mean.defined() ? 0 : call.shape.batch * call.shape.groups;
}

// The same for each channel's totals: one read leaves them for the parameters' gradients alone.
int64_t totals_of(const Plan& plan, const BackwardParams& p) {
  return plan.resident && !p.gradients.any() ? 0 : p.sums * p.shape.rows();
}

// The same for each group's projections: one read leaves them for the gradient of pre_bias alone.
int64_t projections_of(const Plan& plan, const BackwardParams& p) {
  return plan.resident && !p.gradients.pre_bias.data ? 0 : 2 * p.shape.batch * p.shape.groups;
}

void run(const ForwardCall& call, double eps, bool silu, const Dropout& dropout) {
  if (call.is_empty()) return;
  ForwardParams params{};
  params.x = call.x.data_ptr();
  params.y = call.y.data_ptr();
  params.affine = call.parameters.affine;
  params.shape = call.shape;
  params.eps = eps;
  params.dropout = dropout;
  params.silu = silu;
  params.device = call.x.get_device_index();
  launch_what_fits(params.device, "group_norm_act", [&](const Device& device) {
    const Plan plan = plan_forward(call.shape, call.x_dtype, call.y_dtype, is_aligned(call.x),
                                   params.affine.bytes_per_channel(), device);
    const Workspace partials(partials_of(plan, call.shape, 2, 2 * plan.residence.bundle), call.x);
    const Workspace mean(statistics_of(plan, call), call.x), rstd(statistics_of(plan, call), call.x);
    params.mean = call.mean.defined() ? call.mean.data_ptr() : mean.data();
    params.rstd = call.rstd.defined() ? call.rstd.data_ptr() : rstd.data();
    params.partials = partials.data();
    params.reduce = plan.reduce;
    params.apply = plan.apply;
    params.residence = plan.residence;
    const auto launch = plan.resident ? launch_resident_forward : launch_two_pass_forward;
    return std::pair(plan, launch(params, call.x_dtype, call.y_dtype, current_stream(call.x)));
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype,
                                                  const OptionalTensor& dropout_seed, double dropout_p) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ForwardCall call(x, num_groups, weight, bias, pre_bias, scale, shift, out_dtype);
  run(call, eps, silu, dropout_of(dropout_seed, dropout_p, call.x));
  return {call.y, call.mean, call.rstd};
}

Tensor group_norm_act_inference(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ForwardCall call(x, num_groups, weight, bias, {}, {}, {}, {}, false);
  call.check_as_python_does(weight, bias);
  run(call, eps, silu, {});
  return call.y;
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
  BackwardParams params{};
  params.dy = call.dy.data_ptr();
  params.x = call.x.data_ptr();
  params.mean = call.mean.data_ptr();
  params.rstd = call.rstd.data_ptr();
  params.shortcut = call.shortcut_data();
  params.dx = call.wants_dx ? call.dx.data_ptr() : nullptr;
  params.affine = call.parameters.affine;
  params.gradients = call.gradients;
  params.shape = call.shape;
  params.dropout = dropout;
  params.sums = call.gradients.pre_bias.data ? 3 : 2;
  params.silu = silu;
  params.device = call.x.get_device_index();
  const bool aligned = is_aligned(call.x) && is_aligned(call.dy) && (!call.shortcut || is_aligned(*call.shortcut));
  launch_what_fits(params.device, "group_norm_act_backward", [&](const Device& device) {
    const Plan plan = plan_backward(call.shape, call.x_dtype, call.dy_dtype, aligned, params.affine.bytes_per_channel(),
                                    params.sums, call.shortcut.has_value(), device);
    const Residence& r = plan.residence;
    const int exchanged = 2 * r.bundle + int(round_up(params.sums * r.width, 2));
    const Workspace partials(partials_of(plan, call.shape, params.sums, exchanged), call.x);
    const Workspace totals(totals_of(plan, params), call.x), projections(projections_of(plan, params), call.x);
    params.partials = partials.data();
    params.totals = totals.data();
    params.projections = projections.data();
    params.reduce = plan.reduce;
    params.apply = plan.apply;
    params.residence = r;
    const auto launch = plan.resident ? launch_resident_backward : launch_two_pass_backward;
    return std::pair(plan, launch(params, call.x_dtype, call.dy_dtype, current_stream(call.x)));
  });
  return call.outputs();
}

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(parameter_gradients<float>); }

}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CUDA, m) {
  m.impl("group_norm_act", TORCH_BOX(&ldm_fused::cuda::group_norm_act));
  m.impl("group_norm_act_inference", TORCH_BOX(&ldm_fused::cuda::group_norm_act_inference));
  m.impl("group_norm_act_backward", TORCH_BOX(&ldm_fused::cuda::group_norm_act_backward));
}
