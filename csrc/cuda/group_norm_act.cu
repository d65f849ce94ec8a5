// group_norm_act and its backward on CUDA: check, allocate, plan, launch, register.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/group_norm_act_backward.cuh"
#include "cuda/group_norm_act_forward.cuh"
#include "tensors.h"

// Only a CUDA torch has it: weak, so that this binary loads under a CPU-only torch too, where nothing here is called.
#pragma weak aoti_torch_get_current_cuda_stream

namespace ldm_fused {
namespace cuda {
namespace {

cudaStream_t current_stream(const Tensor& on) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

Device device_of(const Tensor& t) {
  Device device{};
  check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, t.get_device_index()),
        "cudaDeviceGetAttribute");
  return device;
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

// Allocated on the current stream and freed in its order: safe under graph capture and on concurrent streams.
Tensor workspace(int64_t elements, const Tensor& like) {
  return empty({elements}, accumulate_type(like.scalar_type()), like);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  ForwardCall call(x, num_groups, weight, bias, pre_bias, scale, shift, out_dtype);
  if (call.is_empty()) return {call.y, call.mean, call.rstd};
  const Plan plan = plan_forward(call.shape, call.x_dtype, call.y_dtype, is_aligned(call.x),
                                 call.parameters.affine.bytes_per_channel(), device_of(x));
  const Tensor partials = workspace(2 * partials_of(call.shape, plan.reduce), call.x);
  ForwardParams params{};
  params.x = call.x.data_ptr();
  params.y = call.y.data_ptr();
  params.mean = call.mean.data_ptr();
  params.rstd = call.rstd.data_ptr();
  params.partials = partials.data_ptr();
  params.affine = call.parameters.affine;
  params.shape = call.shape;
  params.reduce = plan.reduce;
  params.apply = plan.apply;
  params.eps = eps;
  params.silu = silu;
  check(group_norm_act_forward(params, call.x_dtype, call.y_dtype, current_stream(x)), "group_norm_act");
  return {call.y, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
    const OptionalTensor& shift, std::vector<bool> output_mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  BackwardCall call(dy, x, mean, rstd, weight, bias, pre_bias, scale, shift, output_mask);
  if (call.is_empty()) return call.outputs();
  const int sums = call.gradients.pre_bias.data ? 3 : 2;
  const Plan plan = plan_backward(call.shape, call.x_dtype, call.dy_dtype, is_aligned(call.x) && is_aligned(call.dy),
                                  call.parameters.affine.bytes_per_channel(), sums, device_of(x));
  const Tensor partials = workspace(sums * partials_of(call.shape, plan.reduce), call.x);
  const Tensor totals = workspace(sums * call.shape.rows(), call.x);
  const Tensor projections = workspace(2 * call.shape.batch * call.shape.groups, call.x);
  BackwardParams params{};
  params.dy = call.dy.data_ptr();
  params.x = call.x.data_ptr();
  params.mean = call.mean.data_ptr();
  params.rstd = call.rstd.data_ptr();
  params.dx = call.wants_dx ? call.dx.data_ptr() : nullptr;
  params.partials = partials.data_ptr();
  params.totals = totals.data_ptr();
  params.projections = projections.data_ptr();
  params.affine = call.parameters.affine;
  params.gradients = call.gradients;
  params.shape = call.shape;
  params.reduce = plan.reduce;
  params.apply = plan.apply;
  params.sums = sums;
  params.silu = silu;
  check(group_norm_act_backward(params, call.x_dtype, call.dy_dtype, current_stream(x)), "group_norm_act_backward");
  return call.outputs();
}

}  // namespace
}  // namespace cuda
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CUDA, m) {
  m.impl("group_norm_act", TORCH_BOX(&ldm_fused::cuda::group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&ldm_fused::cuda::group_norm_act_backward));
}
