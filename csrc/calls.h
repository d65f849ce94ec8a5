// What every device's ops do before and after their kernels: check, allocate, fill in the kernels' arguments. Memory
// safety is checked here. ldm_fused/functional.py checks what users may pass, and raises what they should see.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace ldm_fused {

// ---- Parameters -----------------------------------------------------------------------------------------------

// Makes Parameters of per-channel tensors, which must outlive it. Of one that is not contiguous it keeps a copy.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}

  Affine affine(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& pre_bias,
                const OptionalTensor& scale, const OptionalTensor& shift) {
    STD_TORCH_CHECK((!scale || scale->dim() == 2) && (!shift || shift->dim() == 2),
                    "scale and shift must be of shape (N, C)");
    return {parameter(weight, "weight", false), parameter(bias, "bias", false), parameter(pre_bias, "pre_bias", true),
            parameter(scale, "scale", true), parameter(shift, "shift", true)};
  }

  // (C,), or also (N, C).
  Parameter parameter(const OptionalTensor& t, const char* name, bool may_be_batched) {
    if (!t) return {};
    const int64_t batch = x_.size(0), channels = x_.size(1);
    const bool batched = may_be_batched && t->dim() == 2;
    STD_TORCH_CHECK(batched ? t->size(0) == batch && t->size(1) == channels : t->dim() == 1 && t->size(0) == channels,
                    name, " must have one element a channel (", channels, ")",
                    may_be_batched ? ", or be of shape (N, C)" : "");
    STD_TORCH_CHECK(same_device(*t, x_), name, " must be on x's device");
    const Dtype dtype = dtype_of(t->scalar_type(), name), x_dtype = dtype_of(x_.scalar_type(), "x");
    STD_TORCH_CHECK(dtype == x_dtype || (dtype == Dtype::float32 && size_of(x_dtype) == 2), name,
                    " must have x's dtype, or float32 beside an x of 16 bits");
    if (t->is_contiguous()) return {t->data_ptr(), dtype, batched ? channels : 0};
    copies_.push_back(torch::stable::contiguous(*t));
    return {copies_.back().data_ptr(), dtype, batched ? channels : 0};
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> copies_;
};

// What the kernels make of a seed, which must outlive it, and the probability of zeroing an element.
inline Dropout dropout_of(const OptionalTensor& seed, double p, const Tensor& x) {
  STD_TORCH_CHECK(seed.has_value() || p == 0, "dropout_p needs a dropout_seed, got ", p, " without one");
  if (!seed) return {};
  STD_TORCH_CHECK(p >= 0 && p < 1, "dropout_p must be at least 0 and below 1, got ", p);
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && same_device(*seed, x),
                  "dropout_seed must be one int64 on x's device");
  return dropout_of(static_cast<const int64_t*>(seed->data_ptr()), p);
}

// ---- Calls ----------------------------------------------------------------------------------------------------
// A call owns the tensors that its arguments point to. Its inputs are as the kernels walk them.

struct ForwardCall {
  Tensor x, y, mean, rstd;  // mean and rstd are undefined where nobody wants them
  Parameters parameters;
  ForwardArgs args{};

  ForwardCall(const Tensor& input, int64_t num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
              double eps, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
              const OptionalTensor& shift, std::optional<ScalarType> out_dtype, const OptionalTensor& dropout_seed,
              double dropout_p, bool keeps_statistics)
      : x(dense(input)), parameters(x) {
    const ScalarType type = x.scalar_type(), out_type = out_dtype.value_or(type);
    args.affine = parameters.affine(weight, bias, pre_bias, scale, shift);
    args.shape = shape_of(x, num_groups);
    args.x_dtype = dtype_of(type, "x");
    args.y_dtype = dtype_of(out_type, "out_dtype");
    check_pair(args.x_dtype, args.y_dtype, "out_dtype");
    args.eps = eps;
    args.dropout = dropout_of(dropout_seed, dropout_p, x);
    args.silu = silu;
    y = empty_like(x, out_type);
    args.x = x.data_ptr();
    args.y = y.data_ptr();
    if (!keeps_statistics) return;
    const int64_t per_group[] = {args.shape.batch, args.shape.groups};
    for (Tensor* statistic : {&mean, &rstd}) {
      *statistic = empty(per_group, accumulate_type(type), x);
      if (args.shape.is_empty()) torch::stable::zero_(*statistic);
    }
    args.mean = mean.data_ptr();
    args.rstd = rstd.data_ptr();
  }
};

struct BackwardCall {
  Tensor x, dy, mean, rstd;
  OptionalTensor shortcut;                               // only where dx is wanted
  Tensor dx, dweight, dbias, dpre_bias, dscale, dshift;  // one that is not wanted is undefined
  Parameters parameters;
  BackwardArgs args{};

  BackwardCall(const Tensor& dy_, const Tensor& input, const Tensor& mean_, const Tensor& rstd_,
               const OptionalTensor& weight, const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias,
               const OptionalTensor& scale, const OptionalTensor& shift, const std::vector<bool>& output_mask,
               const OptionalTensor& dx_shortcut, const OptionalTensor& dropout_seed, double dropout_p)
      : x(dense(input)),
        dy(laid_out_like(dy_, x)),
        mean(torch::stable::contiguous(mean_)),
        rstd(torch::stable::contiguous(rstd_)),
        parameters(x) {
    const ScalarType type = x.scalar_type();
    args.affine = parameters.affine(weight, bias, pre_bias, scale, shift);
    args.shape = shape_of(x, mean.dim() == 2 ? mean.size(1) : 0);
    args.x_dtype = dtype_of(type, "x");
    args.dy_dtype = dtype_of(dy.scalar_type(), "dy");
    check_pair(args.x_dtype, args.dy_dtype, "dy");
    STD_TORCH_CHECK(same_device(dy, x) && same_device(mean, x) && same_device(rstd, x),
                    "dy, mean and rstd must be on x's device");
    STD_TORCH_CHECK(has_shape_of(dy, x), "dy must have x's shape");
    for (const Tensor& t : {mean, rstd}) {
      STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == args.shape.batch && t.size(1) == args.shape.groups &&
                          t.scalar_type() == accumulate_type(type),
                      "mean and rstd must be what the forward op returned for x");
    }
    STD_TORCH_CHECK(output_mask.size() == 6, "output_mask must have 6 elements, got ", output_mask.size());
    const bool wants_dx = output_mask[0];
    if (wants_dx && dx_shortcut) {
      STD_TORCH_CHECK(
          dx_shortcut->scalar_type() == type && has_shape_of(*dx_shortcut, x) && same_device(*dx_shortcut, x),
          "dx_shortcut must have x's shape and dtype, and be on its device");
      shortcut = laid_out_like(*dx_shortcut, x);
      args.shortcut = shortcut->data_ptr();
    }
    args.dropout = dropout_of(dropout_seed, dropout_p, x);
    args.silu = silu;
    args.dy = dy.data_ptr();
    args.x = x.data_ptr();
    args.mean = mean.data_ptr();
    args.rstd = rstd.data_ptr();
    if (wants_dx) {
      dx = empty_like(x, type);
      args.dx = dx.data_ptr();
    }
    args.gradients = {gradient(weight, output_mask[1], dweight), gradient(bias, output_mask[2], dbias),
                      gradient(pre_bias, output_mask[3], dpre_bias), gradient(scale, output_mask[4], dscale),
                      gradient(shift, output_mask[5], dshift)};
    args.sums = args.gradients.pre_bias.data ? 3 : 2;
  }

  // A gradient as the ops return it: one that is not wanted has no elements.
  Tensor returned(const Tensor& gradient) const {
    constexpr int64_t kNone[] = {0};
    return gradient.defined() ? gradient : empty(kNone, x.scalar_type(), x);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> all_returned() const {
    return {returned(dx), returned(dweight), returned(dbias), returned(dpre_bias), returned(dscale), returned(dshift)};
  }

 private:
  Gradient gradient(const OptionalTensor& parameter, bool wanted, Tensor& out) {
    if (!parameter || !wanted) return {};
    const auto sizes = parameter->sizes();
    out = empty(sizes, parameter->scalar_type(), x);
    if (args.shape.is_empty()) torch::stable::zero_(out);
    return {out.data_ptr(), dtype_of(parameter->scalar_type(), "parameter"),
            sizes.size() == 2 ? args.shape.channels : 0};
  }
};

// The two halves of ForwardCall: the statistics of one part of a tensor, then what the moments of all parts make of it.

struct StatisticsCall {
  Tensor x, statistics;
  Parameters parameters;
  ForwardArgs args{};

  StatisticsCall(const Tensor& input, int64_t num_groups, const OptionalTensor& pre_bias)
      : x(dense(input)), parameters(x) {
    args.affine.pre_bias = parameters.parameter(pre_bias, "pre_bias", true);
    args.shape = shape_of(x, num_groups);
    args.x_dtype = args.y_dtype = dtype_of(x.scalar_type(), "x");
    const int64_t sizes[] = {3, args.shape.batch, args.shape.groups};
    statistics = empty(sizes, accumulate_type(x.scalar_type()), x);
    if (args.shape.is_empty()) torch::stable::zero_(statistics);
    args.x = x.data_ptr();
    args.moments = statistics.data_ptr();
  }
};

struct ApplyCall : ForwardCall {
  Tensor parts;

  ApplyCall(const Tensor& input, const Tensor& statistics, const OptionalTensor& weight, const OptionalTensor& bias,
            double eps, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
            const OptionalTensor& shift, std::optional<ScalarType> out_dtype, const OptionalTensor& dropout_seed,
            double dropout_p)
      : ForwardCall(input, statistics.dim() == 4 ? statistics.size(3) : 1, weight, bias, eps, silu, pre_bias, scale,
                    shift, out_dtype, dropout_seed, dropout_p, true),
        parts(torch::stable::contiguous(statistics)) {
    STD_TORCH_CHECK(parts.dim() == 4 && parts.size(0) > 0 && parts.size(1) == 3 && parts.size(2) == args.shape.batch &&
                        parts.scalar_type() == accumulate_type(x.scalar_type()) && same_device(parts, x),
                    "statistics must be of shape (parts, 3, N, groups), on x's device, in the dtype of its arithmetic");
    args.parts = parts.data_ptr();
    args.part_count = parts.size(0);
  }
};

// The two halves of BackwardCall: the sums over one part of a tensor, then the gradients, from sums over all parts.

struct SumsCall : BackwardCall {
  Tensor totals, projections;

  SumsCall(const Tensor& dy_, const Tensor& input, const Tensor& mean_, const Tensor& rstd_,
           const OptionalTensor& weight, const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias,
           const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& dropout_seed,
           double dropout_p)
      : BackwardCall(dy_, input, mean_, rstd_, weight, bias, silu, pre_bias, scale, shift, std::vector<bool>(6), {},
                     dropout_seed, dropout_p) {
    const Shape& shape = args.shape;
    args.sums = pre_bias ? 3 : 2;
    const int64_t of_channels[] = {args.sums, shape.batch, shape.channels};
    const int64_t of_groups[] = {shape.batch, shape.groups, 2};
    totals = empty(of_channels, mean.scalar_type(), x);
    projections = empty(of_groups, mean.scalar_type(), x);
    if (shape.is_empty()) {
      torch::stable::zero_(totals);
      torch::stable::zero_(projections);
    }
    args.totals = totals.data_ptr();
    args.projections = projections.data_ptr();
  }
};

struct GradientsCall : BackwardCall {
  Tensor totals, projections;

  GradientsCall(const Tensor& dy_, const Tensor& input, const Tensor& mean_, const Tensor& rstd_, const Tensor& totals_,
                const Tensor& projections_, const OptionalTensor& weight, const OptionalTensor& bias, bool silu,
                const OptionalTensor& pre_bias, const OptionalTensor& scale, const OptionalTensor& shift,
                const std::vector<bool>& output_mask, const OptionalTensor& dropout_seed, double dropout_p)
      : BackwardCall(dy_, input, mean_, rstd_, weight, bias, silu, pre_bias, scale, shift, output_mask, {},
                     dropout_seed, dropout_p),
        totals(torch::stable::contiguous(totals_)),
        projections(torch::stable::contiguous(projections_)) {
    const Shape& shape = args.shape;
    args.sums = pre_bias ? 3 : 2;
    STD_TORCH_CHECK(totals.dim() == 3 && totals.size(0) == args.sums && totals.size(1) == shape.batch &&
                        totals.size(2) == shape.channels && projections.dim() == 3 &&
                        projections.size(0) == shape.batch && projections.size(1) == shape.groups &&
                        projections.size(2) == 2 && totals.scalar_type() == mean.scalar_type() &&
                        projections.scalar_type() == mean.scalar_type() && same_device(totals, x) &&
                        same_device(projections, x),
                    "totals and projections must be what group_norm_backward_sums returns for x");
    args.totals = totals.data_ptr();
    args.projections = projections.data_ptr();
    args.has_sums = true;
  }
};

// Groups mean nothing here: a tensor is cut as if it had one.
struct ResidualCall {
  Tensor x, residual, y;
  Parameters parameters;
  ResidualArgs args{};

  ResidualCall(const Tensor& x_, const Tensor& residual_, const OptionalTensor& bias,
               const OptionalTensor& residual_bias, double scale)
      : x(dense(x_)), residual(laid_out_like(residual_, x)), parameters(x) {
    args.bias = parameters.parameter(bias, "bias", false);
    args.residual_bias = parameters.parameter(residual_bias, "residual_bias", false);
    args.shape = shape_of(x, 1);
    args.dtype = dtype_of(x.scalar_type(), "x");
    args.scale = scale;
    STD_TORCH_CHECK(has_shape_of(residual, x), "residual must have x's shape");
    STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type(), "residual must have x's dtype");
    STD_TORCH_CHECK(same_device(residual, x), "residual must be on x's device");
    y = empty_like(x, x.scalar_type());
    args.x = x.data_ptr();
    args.residual = residual.data_ptr();
    args.y = y.data_ptr();
  }
};

struct ChannelSumsCall {
  Tensor x, sums;
  ChannelSumsArgs args{};

  explicit ChannelSumsCall(const Tensor& input) : x(dense(input)) {
    args.shape = shape_of(x, 1);
    args.dtype = dtype_of(x.scalar_type(), "x");
    const int64_t sizes[] = {args.shape.channels};
    sums = empty(sizes, accumulate_type(x.scalar_type()), x);
    if (args.shape.is_empty()) torch::stable::zero_(sums);
    args.x = x.data_ptr();
    args.sums = sums.data_ptr();
  }
};

// ---- Ops ------------------------------------------------------------------------------------------------------
// What a device registers. run(call) calls its kernels, for a tensor that is not empty. Guard makes the device that a
// tensor is on the current one.

struct NoGuard {  // the CPU is current at any time
  explicit NoGuard(const Tensor&) {}
};

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype,
                                                  const OptionalTensor& dropout_seed, double dropout_p) {
  const Guard guard(x);
  const ForwardCall call(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, dropout_seed,
                         dropout_p, true);
  if (!call.args.shape.is_empty()) run(call);
  return {call.y, call.mean, call.rstd};
}

// The ops of the common arguments refuse what functional.checked() in Python does beyond the other op, and empty
// tensors, which it asks PyTorch about.
inline void check_as_in_python(const Shape& shape, const OptionalTensor& weight, const OptionalTensor& bias) {
  STD_TORCH_CHECK(shape.elements() > shape.batch * shape.groups, "x must have more than 1 value per group");
  STD_TORCH_CHECK(!weight || !bias || weight->scalar_type() == bias->scalar_type(), "bias must have weight's dtype");
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor> group_norm_act_training(const Tensor& x, int64_t num_groups,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps, bool silu) {
  const Guard guard(x);
  const ForwardCall call(x, num_groups, weight, bias, eps, silu, {}, {}, {}, {}, {}, 0, true);
  check_as_in_python(call.args.shape, weight, bias);
  run(call);
  return {call.y, call.mean, call.rstd};
}

template <class Guard, auto run>
Tensor group_norm_act_inference(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, bool silu) {
  const Guard guard(x);
  const ForwardCall call(x, num_groups, weight, bias, eps, silu, {}, {}, {}, {}, {}, 0, false);
  check_as_in_python(call.args.shape, weight, bias);
  run(call);
  return call.y;
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
    const OptionalTensor& shift, std::vector<bool> output_mask, const OptionalTensor& dx_shortcut,
    const OptionalTensor& dropout_seed, double dropout_p) {
  const Guard guard(x);
  const BackwardCall call(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, output_mask, dx_shortcut,
                          dropout_seed, dropout_p);
  if (!call.args.shape.is_empty()) run(call);
  return call.all_returned();
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor> group_norm_act_training_backward(const Tensor& dy, const Tensor& x,
                                                                    const Tensor& mean, const Tensor& rstd,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& bias, bool silu, bool needs_x,
                                                                    bool needs_weight, bool needs_bias) {
  const Guard guard(x);
  const BackwardCall call(dy, x, mean, rstd, weight, bias, silu, {}, {}, {},
                          {needs_x, needs_weight, needs_bias, false, false, false}, {}, {}, 0);
  if (!call.args.shape.is_empty()) run(call);
  return {call.returned(call.dx), call.returned(call.dweight), call.returned(call.dbias)};
}

template <class Guard, auto run>
Tensor group_norm_statistics(const Tensor& x, int64_t num_groups, const OptionalTensor& pre_bias) {
  const Guard guard(x);
  const StatisticsCall call(x, num_groups, pre_bias);
  if (!call.args.shape.is_empty()) run(call);
  return call.statistics;
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor> group_norm_apply(const Tensor& x, const Tensor& statistics,
                                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                                    double eps, bool silu, const OptionalTensor& pre_bias,
                                                    const OptionalTensor& scale, const OptionalTensor& shift,
                                                    std::optional<ScalarType> out_dtype,
                                                    const OptionalTensor& dropout_seed, double dropout_p) {
  const Guard guard(x);
  const ApplyCall call(x, statistics, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, dropout_seed,
                       dropout_p);
  if (!call.args.shape.is_empty()) run(call);
  return {call.y, call.mean, call.rstd};
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor> group_norm_backward_sums(const Tensor& dy, const Tensor& x, const Tensor& mean,
                                                    const Tensor& rstd, const OptionalTensor& weight,
                                                    const OptionalTensor& bias, bool silu,
                                                    const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                    const OptionalTensor& shift, const OptionalTensor& dropout_seed,
                                                    double dropout_p) {
  const Guard guard(x);
  const SumsCall call(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, dropout_seed, dropout_p);
  if (!call.args.shape.is_empty()) run(call);
  return {call.totals, call.projections};
}

template <class Guard, auto run>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_backward_apply(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& totals,
    const Tensor& projections, const OptionalTensor& weight, const OptionalTensor& bias, bool silu,
    const OptionalTensor& pre_bias, const OptionalTensor& scale, const OptionalTensor& shift,
    std::vector<bool> output_mask, const OptionalTensor& dropout_seed, double dropout_p) {
  const Guard guard(x);
  const GradientsCall call(dy, x, mean, rstd, totals, projections, weight, bias, silu, pre_bias, scale, shift,
                           output_mask, dropout_seed, dropout_p);
  if (!call.args.shape.is_empty()) run(call);
  return call.all_returned();
}

template <class Guard, auto run>
Tensor bias_add_residual(const Tensor& x, const Tensor& residual, const OptionalTensor& bias,
                         const OptionalTensor& residual_bias, double scale) {
  const Guard guard(x);
  const ResidualCall call(x, residual, bias, residual_bias, scale);
  if (!call.args.shape.is_empty()) run(call);
  return call.y;
}

template <class Guard, auto run>
Tensor channel_sums(const Tensor& x) {
  const Guard guard(x);
  const ChannelSumsCall call(x);
  if (!call.args.shape.is_empty()) run(call);
  return call.sums;
}

}  // namespace ldm_fused
