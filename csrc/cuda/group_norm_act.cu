// group_norm_act, its backward, and the halves of both on CUDA: plan, launch, register.
#include <cstdlib>
#include <cstring>

#include "cuda/host.h"
#include "cuda/plan_memory.h"
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
    case Exchange::cluster: device.max_cluster = error == kNoClusters ? kPortableCluster : r.team / 2; break;
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
    if (!plan.resident || !(error == kNoClusters || is_refusal(error))) return check(error, what);
    const Residence& r = plan.residence;
    STD_TORCH_CHECK(error == kNoClusters || !is_strict(), what, ": LDM_FUSED_STRICT_PLAN is 1, and device ", ordinal,
                    " refused the plan '", plan.tier(), "' of ", r.teams, " teams of ", r.team, " blocks of ",
                    r.threads, " threads with ", r.shared_bytes,
                    " bytes of shared memory: ", cudaGetErrorString(error));
    narrow(device, plan, error, ordinal);
  }
}

// Elements of the workspace for partial results: two passes keep `partial` of each channel's chunk, and the teams of a
// grid exchange `totals` of each channel.
int64_t partials_of(const Plan& plan, const Shape& shape, int partial, int totals) {
  if (!plan.resident) return partial * partials_of(shape, plan.reduce);
  return plan.residence.exchange == Exchange::grid ? grid_floats(plan.residence, totals) : 0;
}

// The same for the statistics: two passes need them, though nobody else may.
int64_t statistics_of(const Plan& plan, const ForwardArgs& args) {
  return plan.resident || args.mean ? 0 : args.shape.batch * args.shape.groups;
}

// The same for each channel's totals: one read leaves them for the parameters' gradients alone.
int64_t totals_of(const Plan& plan, const BackwardArgs& args) {
  return plan.resident && !args.gradients.any() ? 0 : args.sums * args.shape.rows();
}

// The same for each group's projections: one read leaves them for the gradient of pre_bias alone.
int64_t projections_of(const Plan& plan, const BackwardArgs& args) {
  return plan.resident && !args.gradients.pre_bias.data ? 0 : 2 * args.shape.batch * args.shape.groups;
}

void run_forward(const ForwardCall& call) {
  const ForwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  launch_what_fits(ordinal, "group_norm_act", [&](const Device& device) {
    const int64_t bytes = args.affine.bytes_per_channel();
    const bool aligned = is_aligned(args.x);
    const Plan plan = plan_memory().find(
        plan_key(0, args.shape, args.x_dtype, args.y_dtype, aligned, bytes, 0, device),
        [&] { return plan_forward(args.shape, args.x_dtype, args.y_dtype, aligned, bytes, device); });
    const Workspace partials(partials_of(plan, args.shape, 2, 0), call.x);
    const Workspace mean(statistics_of(plan, args), call.x), rstd(statistics_of(plan, args), call.x);
    ForwardParams params{args, partials.data(), plan.reduce, plan.apply, plan.residence, ordinal};
    if (!args.mean) {
      params.mean = mean.data();
      params.rstd = rstd.data();
    }
    const auto launch = plan.resident ? launch_resident_forward : launch_two_pass_forward;
    return std::pair(plan, launch(params, current_stream(call.x)));
  });
}

bool are_aligned(const BackwardArgs& args) {
  return is_aligned(args.x) && is_aligned(args.dy) && is_aligned(args.shortcut);
}

void run_backward(const BackwardCall& call) {
  const BackwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  launch_what_fits(ordinal, "group_norm_act_backward", [&](const Device& device) {
    const int64_t bytes = args.affine.bytes_per_channel();
    const bool aligned = are_aligned(args), shortcut = args.shortcut != nullptr;
    const Plan plan = plan_memory().find(
        plan_key(1, args.shape, args.x_dtype, args.dy_dtype, aligned, bytes, 2 * args.sums + shortcut, device), [&] {
          return plan_backward(args.shape, args.x_dtype, args.dy_dtype, aligned, bytes, args.sums, shortcut, device);
        });
    const Workspace partials(partials_of(plan, args.shape, args.sums, args.sums), call.x);
    const Workspace totals(totals_of(plan, args), call.x), projections(projections_of(plan, args), call.x);
    BackwardParams params{args, partials.data(), plan.reduce, plan.apply, plan.residence, ordinal};
    params.totals = totals.data();
    params.projections = projections.data();
    const auto launch = plan.resident ? launch_resident_backward : launch_two_pass_backward;
    return std::pair(plan, launch(params, current_stream(call.x)));
  });
}

// The halves: each is one of the two passes, whatever fits.

void run_statistics(const StatisticsCall& call) {
  const ForwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  const Streaming plan = plan_statistics(args.shape, args.x_dtype, is_aligned(args.x), device_of(ordinal));
  const Workspace partials(2 * partials_of(args.shape, plan.tiling), call.x);
  check(launch_statistics({args, partials.data(), plan.tiling, {}, {}, ordinal}, current_stream(call.x)),
        "group_norm_statistics");
}

void run_apply(const ApplyCall& call) {
  const ForwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  const Streaming plan = plan_apply(args.shape, args.x_dtype, args.y_dtype, is_aligned(args.x),
                                    args.affine.bytes_per_channel(), device_of(ordinal));
  check(launch_apply({args, nullptr, {}, plan.tiling, {}, ordinal}, current_stream(call.x)), "group_norm_apply");
}

void run_sums(const SumsCall& call) {
  const BackwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  const Streaming plan = plan_sums(args.shape, args.x_dtype, args.dy_dtype, are_aligned(args),
                                   args.affine.bytes_per_channel(), args.sums, device_of(ordinal));
  const Workspace partials(args.sums * partials_of(args.shape, plan.tiling), call.x);
  check(launch_sums({args, partials.data(), plan.tiling, {}, {}, ordinal}, current_stream(call.x)),
        "group_norm_backward_sums");
}

void run_gradients(const GradientsCall& call) {
  const BackwardArgs& args = call.args;
  const int ordinal = call.x.get_device_index();
  const Streaming plan = plan_gradients(args.shape, args.x_dtype, args.dy_dtype, are_aligned(args),
                                        args.affine.bytes_per_channel(), args.sums, false, device_of(ordinal));
  check(launch_gradients({args, nullptr, {}, plan.tiling, {}, ordinal}, current_stream(call.x)),
        "group_norm_backward_apply");
}

constexpr auto forward_op = &group_norm_act<Guard, run_forward>;
constexpr auto training_op = &group_norm_act_training<Guard, run_forward>;
constexpr auto inference_op = &group_norm_act_inference<Guard, run_forward>;
constexpr auto backward_op = &group_norm_act_backward<Guard, run_backward>;
constexpr auto training_backward_op = &group_norm_act_training_backward<Guard, run_backward>;
constexpr auto statistics_op = &group_norm_statistics<Guard, run_statistics>;
constexpr auto apply_op = &group_norm_apply<Guard, run_apply>;
constexpr auto sums_op = &group_norm_backward_sums<Guard, run_sums>;
constexpr auto gradients_op = &group_norm_backward_apply<Guard, run_gradients>;

}  // namespace

const void* any_kernel() { return reinterpret_cast<const void*>(parameter_gradients<float>); }

}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CUDA, m) {
  m.impl("group_norm_act", TORCH_BOX(ldm_fused::cuda::forward_op));
  m.impl("group_norm_act_training", TORCH_BOX(ldm_fused::cuda::training_op));
  m.impl("group_norm_act_inference", TORCH_BOX(ldm_fused::cuda::inference_op));
  m.impl("group_norm_act_backward", TORCH_BOX(ldm_fused::cuda::backward_op));
  m.impl("group_norm_act_training_backward", TORCH_BOX(ldm_fused::cuda::training_backward_op));
  m.impl("group_norm_statistics", TORCH_BOX(ldm_fused::cuda::statistics_op));
  m.impl("group_norm_apply", TORCH_BOX(ldm_fused::cuda::apply_op));
  m.impl("group_norm_backward_sums", TORCH_BOX(ldm_fused::cuda::sums_op));
  m.impl("group_norm_backward_apply", TORCH_BOX(ldm_fused::cuda::gradients_op));
}
