// From shape, layout, dtypes and device to launches and predicted bytes: plain C++, no CUDA, no torch.
//
// What fits the chip is read once (residence.h); what does not, or is not aligned, in two passes (tiling.h).
#pragma once

#include "cuda/residence.h"
#include "cuda/tiling.h"

namespace ldm_fused {

// A kernel that streams over tensors once.
struct Streaming {
  Tiling tiling;
  int64_t bytes_read, bytes_written;  // predicted: what all launches' warps ask of global memory
};

struct Plan {
  bool resident;  // else two passes
  Residence residence;
  Tiling reduce, apply;
  int64_t bytes_read, bytes_written;  // predicted

  // Makes it two passes.
  void take(const Streaming& first, const Streaming& second) {
    reduce = first.tiling;
    apply = second.tiling;
    bytes_read = first.bytes_read + second.bytes_read;
    bytes_written = first.bytes_written + second.bytes_written;
  }

  const char* tier() const {
    if (!resident) return "two passes";
    switch (residence.exchange) {
      case Exchange::block: return "block";
      case Exchange::cluster: return "cluster";
      default: return residence.kept < residence.total() ? "grid, in part" : "grid";
    }
  }
};

// Counts a resident kernel's parameters, and what its teams exchange: `partial` bytes a group, `totals` a channel.
inline void count_exchange(Plan& plan, int64_t parameter_bytes, int64_t partial, int64_t totals) {
  const Residence& r = plan.residence;
  const int64_t blocks = r.items * r.team;
  plan.bytes_read += blocks * r.width * parameter_bytes;
  if (r.exchange == Exchange::grid) {
    plan.bytes_written += blocks * (r.bundle * partial + r.width * totals);
    plan.bytes_read += blocks * (r.team * r.bundle * partial + r.width * totals);
  }
}

// Two passes, forward: the first reads x and leaves statistics, the second reads x and writes y.
inline Streaming plan_statistics(const Shape& shape, Dtype x, bool aligned, const Device& device) {
  Streaming plan{tile(shape, vector_of(size_of(x)), aligned, device)};
  const int64_t sa = x == Dtype::float64 ? 8 : 4, groups = shape.batch * shape.groups;
  const int64_t partials = 2 * sa * partials_of(shape, plan.tiling);
  const int64_t shifts = channel_reads(shape, plan.tiling, size_of(x), 0) + kThreads / 32 * sa * groups;
  plan.bytes_read = size_of(x) * shape.elements() + shifts + partials;
  plan.bytes_written = partials + 2 * sa * groups;
  return plan;
}
inline Streaming plan_apply(const Shape& shape, Dtype x, Dtype y, bool aligned, int64_t parameter_bytes,
                            const Device& device) {
  Streaming plan{tile(shape, vector_of(std::min(size_of(x), size_of(y))), aligned, device)};
  const int64_t sa = x == Dtype::float64 ? 8 : 4;
  plan.bytes_read = size_of(x) * shape.elements() + channel_reads(shape, plan.tiling, parameter_bytes, 2 * sa);
  plan.bytes_written = size_of(y) * shape.elements();
  return plan;
}

// Of each sample, parameter_gradients() reads the totals, and rstd, of `sa` bytes, once for all channels of a warp.
inline int64_t rstds_of(const Shape& shape, int sa) {
  return shape.batch * ceil_div(shape.channels, 32) * (1 + 31 / shape.channels_per_group()) * sa;
}

// Two passes, backward: both read x and dy. The first leaves sums, the second writes all gradients.
inline Streaming plan_sums(const Shape& shape, Dtype x, Dtype dy, bool aligned, int64_t parameter_bytes, int sums,
                           const Device& device) {
  const int sx = size_of(x), sy = size_of(dy), sa = x == Dtype::float64 ? 8 : 4;
  Streaming plan{tile(shape, vector_of(std::min(sx, sy)), aligned, device)};
  const int64_t partials = sums * sa * partials_of(shape, plan.tiling);
  plan.bytes_read = (sx + sy) * shape.elements() + channel_reads(shape, plan.tiling, parameter_bytes, 2 * sa) +
                    partials + parameter_bytes * shape.rows();  // merge_sums() reads a weight
  plan.bytes_written = partials + sums * sa * shape.rows() + 2 * sa * shape.batch * shape.groups;
  return plan;
}
inline Streaming plan_gradients(const Shape& shape, Dtype x, Dtype dy, bool aligned, int64_t parameter_bytes, int sums,
                                bool shortcut, const Device& device) {
  const int sx = size_of(x), sy = size_of(dy), sa = x == Dtype::float64 ? 8 : 4;
  Streaming plan{tile(shape, vector_of(std::min(sx, sy)), aligned, device)};
  plan.bytes_read = (sx + sy + (shortcut ? sx : 0)) * shape.elements() + sums * sa * shape.rows() +
                    rstds_of(shape, sa) + 2 * sa * shape.batch * shape.groups +
                    channel_reads(shape, plan.tiling, parameter_bytes, 4 * sa);
  plan.bytes_written = sx * shape.elements() + parameter_bytes * shape.channels;
  return plan;
}

// Forward: reads x, writes y. `parameter_bytes`: of all parameters of one channel.
inline Plan plan_forward(const Shape& shape, Dtype x, Dtype y, bool aligned, int64_t parameter_bytes,
                         const Device& device) {
  const int sx = size_of(x), sy = size_of(y), sa = x == Dtype::float64 ? 8 : 4;
  const int64_t statistics = 2 * sa * shape.batch * shape.groups;
  Plan plan{};
  plan.bytes_read = sx * shape.elements();
  plan.bytes_written = sy * shape.elements() + statistics;
  const Demand demand{vector_of(std::min(sx, sy)), sx, std::min(sx, sy), sx + sy, 2, 0, 3, 8, kForwardRates};
  if (aligned && sa == 4 && reside(shape, demand, device, plan.residence)) {
    plan.resident = true;
    plan.bytes_read += plan.residence.items * read_again(plan.residence, demand);
    count_exchange(plan, parameter_bytes, 2 * sa, 0);
    return plan;
  }
  plan.take(plan_statistics(shape, x, aligned, device), plan_apply(shape, x, y, aligned, parameter_bytes, device));
  return plan;
}

// Backward: reads x and dy, and what is added to dx from a shortcut; writes dx and the gradients of the parameters.
// `sums` per channel: 2, and a third where pre_bias wants its gradient.
inline Plan plan_backward(const Shape& shape, Dtype x, Dtype dy, bool aligned, int64_t parameter_bytes, int sums,
                          bool shortcut, const Device& device) {
  const int sx = size_of(x), sy = size_of(dy), sa = x == Dtype::float64 ? 8 : 4;
  const int64_t totals = sums * sa * shape.rows();
  Plan plan{};
  plan.bytes_read = (sx + sy + (shortcut ? sx : 0)) * shape.elements() + totals + rstds_of(shape, sa);
  plan.bytes_written = sx * shape.elements() + totals + parameter_bytes * shape.channels;
  const Demand demand{vector_of(std::min(sx, sy)), sx + sy, std::min(sx, sy), 2 * sx + sy, sums, sums, 5, 4, kBackwardRates};
  if (aligned && sa == 4 && reside(shape, demand, device, plan.residence)) {
    plan.resident = true;
    const Residence& r = plan.residence;
    plan.bytes_read += r.items * read_again(r, demand) + r.items * r.team * r.bundle * 2 * sa;
    count_exchange(plan, parameter_bytes, 2 * sa, sums * sa);
    return plan;
  }
  plan.take(plan_sums(shape, x, dy, aligned, parameter_bytes, sums, device),
            plan_gradients(shape, x, dy, aligned, parameter_bytes, sums, shortcut, device));
  return plan;
}

// bias_add_residual: reads x and the residual, writes y. `bias_bytes`: of both biases of one channel.
inline Streaming plan_residual(const Shape& shape, Dtype x, bool aligned, int64_t bias_bytes, const Device& device) {
  Streaming plan{tile(shape, vector_of(size_of(x)), aligned, device)};
  plan.bytes_read = 2 * size_of(x) * shape.elements() + channel_reads(shape, plan.tiling, bias_bytes, 0);
  plan.bytes_written = size_of(x) * shape.elements();
  return plan;
}

// channel_sums: reads x, writes a sum a channel.
inline Streaming plan_channel_sums(const Shape& shape, Dtype x, bool aligned, const Device& device) {
  Streaming plan{tile(shape, vector_of(size_of(x)), aligned, device)};
  const int64_t sa = x == Dtype::float64 ? 8 : 4, partials = sa * partials_of(shape, plan.tiling);
  plan.bytes_read = size_of(x) * shape.elements() + partials;
  plan.bytes_written = partials + sa * shape.channels;
  return plan;
}

}  // namespace ldm_fused
