// group_norm_act and its backward on the CPU: check, allocate, cut into units of work, run, register.
//
// Memory passes: each op walks the tensor twice, group by group (channels_last: sample by sample), so that a group
// that fits the cache is read from memory once. Work is cut into chunks of fixed size and partial results are merged
// in their order, whichever threads computed them: the bits do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "tensors.h"

namespace ldm_fused {
namespace cpu {
namespace {

constexpr int64_t kChunk = 16384;  // elements that both steps of the statistics find in the second-level cache
constexpr int64_t kGrain = 16384;  // elements worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// LDM_FUSED_CPU_ISA=baseline keeps to what any processor runs.
bool use_avx2() {
#if defined(__x86_64__)
  static const bool use = [] {
    const char* isa = std::getenv("LDM_FUSED_CPU_ISA");
    return !(isa && std::strcmp(isa, "baseline") == 0) && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return use;
#else
  return false;
#endif
}

template <class X, class Y>
const Kernels<X, Y>& kernels() {
#if defined(__x86_64__)
  static const Kernels<X, Y> chosen = use_avx2() ? avx2::kernels<X, Y>() : baseline::kernels<X, Y>();
#else
  static const Kernels<X, Y> chosen = baseline::kernels<X, Y>();
#endif
  return chosen;
}

template <class F>
void dispatch_pair(Dtype x, Dtype y, F&& f) {
  if (x == Dtype::float64) return f(double{}, double{});
  if (x == Dtype::float32 && y == Dtype::float32) return f(float{}, float{});
  if (x == Dtype::float32 && y == Dtype::float16) return f(float{}, Half{});
  if (x == Dtype::float32 && y == Dtype::bfloat16) return f(float{}, BFloat16{});
  if (x == Dtype::float16 && y == Dtype::float16) return f(Half{}, Half{});
  if (x == Dtype::float16 && y == Dtype::float32) return f(Half{}, float{});
  if (x == Dtype::bfloat16 && y == Dtype::bfloat16) return f(BFloat16{}, BFloat16{});
  if (x == Dtype::bfloat16 && y == Dtype::float32) return f(BFloat16{}, float{});
}

// f(i) for every i below count, each of about `elements` elements of work.
template <class F>
void parallel_over(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// For every part: first(part, unit) over its units, then merge(part), then second(part, unit) over its units. Where
// there are parts enough, a thread takes a whole part, while it is in its cache; else all threads share each step.
template <class First, class Merge, class Second>
void two_passes(int64_t parts, int64_t part_elements, int64_t first_units, int64_t second_units, const First& first,
                const Merge& merge, const Second& second) {
  if (parts >= int64_t(torch::stable::get_num_threads())) {
    parallel_over(parts, part_elements, [&](int64_t part) {
      for (int64_t unit = 0; unit < first_units; ++unit) first(part, unit);
      merge(part);
      for (int64_t unit = 0; unit < second_units; ++unit) second(part, unit);
    });
  } else {
    parallel_over(parts * first_units, part_elements / first_units,
                  [&](int64_t i) { first(i / first_units, i % first_units); });
    parallel_over(parts, part_elements / kChunk, merge);
    parallel_over(parts * second_units, part_elements / std::max<int64_t>(1, second_units),
                  [&](int64_t i) { second(i / second_units, i % second_units); });
  }
}

// A run of `length` elements cut into chunks. Units of work are the chunks of one run after the other.
struct Chunks {
  struct Place {
    int64_t run, chunk;
  };

  int64_t length, size, count;

  explicit Chunks(int64_t length, int64_t size = kChunk) : length(length), size(size), count(ceil_div(length, size)) {}
  int64_t begin(int64_t k) const { return k * size; }
  int64_t extent(int64_t k) const { return std::min(size, length - k * size); }
  Place place(int64_t unit) const { return count == 1 ? Place{unit, 0} : Place{unit / count, unit % count}; }
};

// A float sum that goes on for longer than this loses digits: chunks of sums are this long, and added up in double.
constexpr int64_t kLongestSum = 128;

Chunks pixel_chunks(const Shape& shape) {
  return Chunks(shape.spatial, std::clamp<int64_t>(kChunk / shape.channels, 16, kLongestSum));
}

bool walks_columns(const Shape& shape) { return shape.channels_last || shape.spatial == 1; }

// The affine maps of all channels of all samples, one array a member.
template <class A>
class AffineTable {
 public:
  explicit AffineTable(const Shape& shape) : channels_(shape.channels), values_(3 * shape.rows()) {}

  void set(int64_t n, int64_t c, const ChannelAffine<A>& affine) {
    A* at = values_.data() + 3 * n * channels_ + c;
    at[0] = affine.center;
    at[channels_] = affine.slope;
    at[2 * channels_] = affine.offset;
  }

  ColumnAffine<A> sample(int64_t n) const {
    const A* at = values_.data() + 3 * n * channels_;
    return {at, at + channels_, at + 2 * channels_};
  }

 private:
  int64_t channels_;
  std::vector<A> values_;
};

// ---- Forward --------------------------------------------------------------------------------------------------

template <class X, class Y>
struct Forward {
  using A = Accumulate<X>;

  const Shape& shape;
  const Affine& affine;
  const X* x;
  Y* y;
  A *mean, *rstd;
  double eps;
  bool silu;
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  void store_statistics(int64_t group, const Moments& moments) const {
    mean[group] = A(moments.mean);
    rstd[group] = A(1) / std::sqrt(A(moments.m2 / moments.count) + A(eps));
  }

  ChannelAffine<A> channel(int64_t n, int64_t c) const {
    const int64_t group = shape.group(n, c);
    return channel_affine<A>(affine, n, c, mean[group], rstd[group]);
  }

  // Parts are groups. Without pre_bias the statistics take a group as one run, else channel by channel.
  void rows() const {
    const int64_t channels = shape.channels_per_group(), group_size = channels * shape.spatial;
    const int64_t runs = affine.pre_bias.data ? channels : 1;
    const Chunks statistics(group_size / runs), apply(shape.spatial);
    const int64_t units = runs * statistics.count;
    std::vector<Moments> partials(shape.batch * shape.groups * units);
    std::vector<ChannelAffine<A>> affines(shape.rows());
    two_passes(
        shape.batch * shape.groups, group_size, units, channels * apply.count,
        [&](int64_t group, int64_t unit) {
          const auto [run, k] = statistics.place(unit);
          partials[group * units + unit] = kernel.row_moments(
              x + group * group_size + run * statistics.length + statistics.begin(k), statistics.extent(k));
        },
        [&](int64_t group) {
          const int64_t n = group / shape.groups, c0 = group % shape.groups * channels;
          Moments sum{};
          for (int64_t unit = 0; unit < units; ++unit) {
            Moments moments = partials[group * units + unit];
            moments.mean += affine.pre_bias.load<A>(n, c0 + statistics.place(unit).run, 0);
            sum.merge(moments);
          }
          store_statistics(group, sum);
          for (int64_t c = 0; c < channels; ++c) affines[group * channels + c] = channel(n, c0 + c);
        },
        [&](int64_t group, int64_t unit) {
          const auto [channel, k] = apply.place(unit);
          const int64_t row = group * channels + channel, at = row * shape.spatial + apply.begin(k);
          kernel.row_apply(x + at, y + at, apply.extent(k), affines[row], silu);
        });
  }

  // Parts are samples.
  void columns() const {
    const int64_t channels = shape.channels, sample_size = channels * shape.spatial;
    const Chunks pixels = pixel_chunks(shape);
    std::vector<A> means(shape.batch * pixels.count * channels), m2s(means.size());
    AffineTable<A> table(shape);
    two_passes(
        shape.batch, sample_size, pixels.count, pixels.count,
        [&](int64_t n, int64_t k) {
          const int64_t partial = (n * pixels.count + k) * channels;
          kernel.column_moments(x + n * sample_size + pixels.begin(k) * channels, pixels.extent(k), channels,
                                means.data() + partial, m2s.data() + partial);
        },
        [&](int64_t n) {
          for (int64_t g = 0; g < shape.groups; ++g) {
            const int64_t first = g * shape.channels_per_group(), last = first + shape.channels_per_group();
            Moments moments{};
            for (int64_t k = 0; k < pixels.count; ++k) {
              const int64_t partial = (n * pixels.count + k) * channels;
              for (int64_t c = first; c < last; ++c) {
                moments.merge({double(pixels.extent(k)),
                               double(means[partial + c]) + double(affine.pre_bias.load<A>(n, c, 0)),
                               double(m2s[partial + c])});
              }
            }
            store_statistics(n * shape.groups + g, moments);
            for (int64_t c = first; c < last; ++c) table.set(n, c, channel(n, c));
          }
        },
        [&](int64_t n, int64_t k) {
          const int64_t at = n * sample_size + pixels.begin(k) * channels;
          kernel.column_apply(x + at, y + at, pixels.extent(k), channels, table.sample(n), silu);
        });
  }
};

// ---- Backward -------------------------------------------------------------------------------------------------

template <class X, class Y>
struct Backward {
  using A = Accumulate<X>;

  const Shape& shape;
  const Affine& affine;
  const Gradients& gradients;
  const X* x;
  const Y* dy;
  X* dx;  // null: not wanted
  const A *mean, *rstd;
  bool silu;
  std::vector<GradientSums<A>> totals{size_t(shape.rows())};  // of each channel of each sample
  std::vector<Projection<A>> projections{size_t(shape.batch * shape.groups)};
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  ChannelAffine<A> channel(int64_t n, int64_t c) const {
    const int64_t group = shape.group(n, c);
    return channel_affine<A>(affine, n, c, mean[group], rstd[group]);
  }

  // From the totals of the group's channels.
  void project(int64_t n, int64_t g) {
    const int64_t channels = shape.channels_per_group(), group = n * shape.groups + g;
    double dz = 0, dz_x = 0;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const GradientSums<A>& total = totals[n * shape.channels + c];
      const A gain = affine.weight.load<A>(n, c, 1) * (A(1) + affine.scale.load<A>(n, c, 0));
      dz += double(gain * total.dz);
      dz_x += double(gain * total.dz_x);
    }
    const A r = rstd[group];
    const double count = double(channels) * double(shape.spatial);
    projections[group] = {r * A(dz / count), A(dz_x / count) * r * r * r};
  }

  // Parts are groups.
  void rows() {
    const int64_t channels = shape.channels_per_group();
    const Chunks chunks(shape.spatial, 8 * kLongestSum);  // 8 lanes
    const int64_t units = channels * chunks.count;
    std::vector<GradientSums<double>> partials(shape.rows() * chunks.count);
    std::vector<ChannelAffine<A>> affines(shape.rows());
    parallel_over(shape.batch * shape.groups, channels, [&](int64_t group) {
      const int64_t n = group / shape.groups, c0 = group % shape.groups * channels;
      for (int64_t c = 0; c < channels; ++c) affines[group * channels + c] = channel(n, c0 + c);
    });
    two_passes(
        shape.batch * shape.groups, channels * shape.spatial, units, dx ? units : 0,
        [&](int64_t group, int64_t unit) {
          const auto [channel, k] = chunks.place(unit);
          const int64_t row = group * channels + channel, at = row * shape.spatial + chunks.begin(k);
          partials[group * units + unit] = kernel.row_sums(x + at, dy + at, chunks.extent(k), affines[row], silu);
        },
        [&](int64_t group) {
          for (int64_t row = group * channels; row < (group + 1) * channels; ++row) {
            GradientSums<double> sum{};
            for (int64_t k = 0; k < chunks.count; ++k) sum.merge(partials[row * chunks.count + k]);
            totals[row] = {A(sum.dz), A(sum.dz_x), A(sum.x)};
          }
          project(group / shape.groups, group % shape.groups);
        },
        [&](int64_t group, int64_t unit) {
          const auto [channel, k] = chunks.place(unit);
          const int64_t row = group * channels + channel, at = row * shape.spatial + chunks.begin(k);
          kernel.row_input_gradient(x + at, dy + at, dx + at, chunks.extent(k), affines[row], projections[group], silu);
        });
  }

  // Parts are samples.
  void columns() {
    const int64_t channels = shape.channels, sample_size = channels * shape.spatial;
    const Chunks pixels = pixel_chunks(shape);
    std::vector<A> partials(3 * shape.batch * pixels.count * channels), k1(shape.rows()), k2(shape.rows());
    AffineTable<A> table(shape);
    parallel_over(shape.batch, channels, [&](int64_t n) {
      for (int64_t c = 0; c < channels; ++c) table.set(n, c, channel(n, c));
    });
    two_passes(
        shape.batch, sample_size, pixels.count, dx ? pixels.count : 0,
        [&](int64_t n, int64_t k) {
          const int64_t at = n * sample_size + pixels.begin(k) * channels;
          A* sums = partials.data() + 3 * (n * pixels.count + k) * channels;
          kernel.column_sums(x + at, dy + at, pixels.extent(k), channels, table.sample(n), silu, sums, sums + channels,
                             sums + 2 * channels);
        },
        [&](int64_t n) {
          for (int64_t c = 0; c < channels; ++c) {
            GradientSums<double> sum{};
            for (int64_t k = 0; k < pixels.count; ++k) {
              const A* sums = partials.data() + 3 * (n * pixels.count + k) * channels + c;
              sum.merge({double(sums[0]), double(sums[channels]), double(sums[2 * channels])});
            }
            totals[n * channels + c] = {A(sum.dz), A(sum.dz_x), A(sum.x)};
          }
          for (int64_t g = 0; g < shape.groups; ++g) project(n, g);
          for (int64_t c = 0; c < channels; ++c) {
            const Projection<A>& projection = projections[shape.group(n, c)];
            k1[n * channels + c] = projection.k1;
            k2[n * channels + c] = projection.k2;
          }
        },
        [&](int64_t n, int64_t k) {
          const int64_t at = n * sample_size + pixels.begin(k) * channels;
          kernel.column_input_gradient(x + at, dy + at, dx + at, pixels.extent(k), channels, table.sample(n),
                                       k1.data() + n * channels, k2.data() + n * channels, silu);
        });
  }

  void parameters() const {
    if (!gradients.any()) return;
    constexpr int64_t kBlock = 64;  // channels that a thread sums side by side
    parallel_over(ceil_div(shape.channels, kBlock), kBlock * shape.batch, [&](int64_t block) {
      const int64_t first = block * kBlock, last = std::min(first + kBlock, shape.channels);
      ParameterGradients<A> sums[kBlock]{};
      for (int64_t n = 0; n < shape.batch; ++n) {
        for (int64_t c = first; c < last; ++c) {
          const int64_t group = shape.group(n, c);
          sums[c - first].add(affine, gradients, shape, n, c, rstd[group], projections[group],
                              totals[n * shape.channels + c]);
        }
      }
      for (int64_t c = first; c < last; ++c) sums[c - first].store(gradients, c);
    });
  }
};

// ---- Ops ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype) {
  ForwardCall call(x, num_groups, weight, bias, pre_bias, scale, shift, out_dtype);
  if (!call.is_empty()) {
    dispatch_pair(call.x_dtype, call.y_dtype, [&](auto x_type, auto y_type) {
      using X = decltype(x_type);
      using Y = decltype(y_type);
      using A = Accumulate<X>;
      const Forward<X, Y> forward{call.shape,
                                  call.parameters.affine,
                                  static_cast<const X*>(call.x.data_ptr()),
                                  static_cast<Y*>(call.y.data_ptr()),
                                  static_cast<A*>(call.mean.data_ptr()),
                                  static_cast<A*>(call.rstd.data_ptr()),
                                  eps,
                                  silu};
      walks_columns(call.shape) ? forward.columns() : forward.rows();
    });
  }
  return {call.y, call.mean, call.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const OptionalTensor& weight,
    const OptionalTensor& bias, bool silu, const OptionalTensor& pre_bias, const OptionalTensor& scale,
    const OptionalTensor& shift, std::vector<bool> output_mask) {
  BackwardCall call(dy, x, mean, rstd, weight, bias, pre_bias, scale, shift, output_mask);
  if (!call.is_empty()) {
    dispatch_pair(call.x_dtype, call.dy_dtype, [&](auto x_type, auto dy_type) {
      using X = decltype(x_type);
      using Y = decltype(dy_type);
      using A = Accumulate<X>;
      Backward<X, Y> backward{call.shape,
                              call.parameters.affine,
                              call.gradients,
                              static_cast<const X*>(call.x.data_ptr()),
                              static_cast<const Y*>(call.dy.data_ptr()),
                              call.wants_dx ? static_cast<X*>(call.dx.data_ptr()) : nullptr,
                              static_cast<const A*>(call.mean.data_ptr()),
                              static_cast<const A*>(call.rstd.data_ptr()),
                              silu};
      walks_columns(call.shape) ? backward.columns() : backward.rows();
      backward.parameters();
    });
  }
  return call.outputs();
}

}  // namespace

const char* isa() { return use_avx2() ? "avx2" : "baseline"; }

}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&ldm_fused::cpu::group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&ldm_fused::cpu::group_norm_act_backward));
}
