// group_norm_act on the CPU.
//
// Memory passes: x is walked twice, group by group (channels_last: bundle of groups by bundle). A group that fits the
// cache is thus read from memory once, and the next one is prefetched while it is computed. The second walk goes
// backward: it begins with what the cache still has of a larger group. Dropout is a step of its own, from a tile in a
// cache to y. Of a tensor that is cut in parts, each half walks x once.

#include <algorithm>
#include <cmath>
#include <vector>

#include "calls.h"
#include "cpu/isa.h"
#include "cpu/parameters.h"

namespace ldm_fused {
namespace cpu {
namespace {

template <class X, class Y>
struct Forward {
  using A = Accumulate<X>;

  const ForwardArgs& args;
  const Shape& shape = args.shape;
  const X* x = static_cast<const X*>(args.x);
  Y* y = static_cast<Y*>(args.y);
  const Buffer<A> own{args.mean ? 0 : 2 * shape.batch * shape.groups};  // statistics that nobody else wants
  A* mean = args.mean ? static_cast<A*>(args.mean) : own.data();
  A* rstd = args.mean ? static_cast<A*>(args.rstd) : own.data() + shape.batch * shape.groups;
  const Channels<A> channels{shape, args.affine};
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  // y of n consecutive elements from `at` on, which apply(kernel, y) computes.
  template <class F>
  void write(int64_t at, int64_t n, const F& apply) const {
    if (!args.dropout.seed) return apply(kernel, y + at);
    A* const tile = tile_of_thread<A>(n);
    apply(kernels<X, A>(), tile);
    kernel.drop(tile, y + at, n, at, args.dropout);
  }

  bool has_statistics() const { return args.parts; }

  // Keeps what is known of a group.
  void keep(int64_t group, const Moments<double>& found) const {
    if (args.moments) {
      const int64_t groups = shape.batch * shape.groups;
      A* const moments = static_cast<A*>(args.moments) + group;
      moments[0] = A(found.count);
      moments[groups] = A(found.mean);
      moments[2 * groups] = A(found.m2);
    } else {
      mean[group] = A(found.mean);
      rstd[group] = A(1) / std::sqrt(A(found.m2 / found.count) + A(args.eps));
    }
  }

  // Merges the moments of a group's parts in their order.
  void merge_parts() const {
    const int64_t groups = shape.batch * shape.groups;
    for (int64_t group = 0; group < groups; ++group) {
      Moments<double> sum{};
      for (int64_t k = 0; k < args.part_count; ++k) {
        const A* const part = static_cast<const A*>(args.parts) + 3 * k * groups + group;
        sum.merge({double(part[0]), double(part[groups]), double(part[2 * groups])});
      }
      keep(group, sum);
    }
  }

  // Parts are groups. Without pre_bias the statistics take a group as one run, else channel by channel.
  void rows() const {
    const int64_t in_group = shape.channels_per_group(), group_size = in_group * shape.spatial;
    const int64_t runs = args.affine.pre_bias.data ? in_group : 1;
    const Chunks chunks(group_size / runs, kChunk);
    const Tiles tiles(in_group, shape.spatial, sizeof(X));
    const int64_t units = has_statistics() ? 0 : runs * chunks.count;
    const Buffer<Moments<double>> partials(shape.batch * shape.groups * units);
    two_passes<A>(
        {shape.batch * shape.groups, group_size, units, y ? tiles.count : 0, 0},
        [&](int64_t group, int64_t unit, A*) {
          const int64_t run = unit / chunks.count, k = unit % chunks.count;
          partials[group * units + unit] =
              kernel.row_moments(x + group * group_size + run * chunks.length + chunks.begin(k), chunks.extent(k));
        },
        [&](int64_t group) {
          if (has_statistics()) return;
          const int64_t n = group / shape.groups, c0 = group % shape.groups * in_group;
          Moments<double> sum{};
          for (int64_t unit = 0; unit < units; ++unit) {
            Moments<double> moments = partials[group * units + unit];
            if (channels.pre_bias(n)) moments.mean += channels.pre_bias(n)[c0 + unit / chunks.count];
            sum.merge(moments);
          }
          keep(group, sum);
        },
        [&](int64_t group, int64_t unit, A*) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t n = group / shape.groups, c = group % shape.groups * in_group + tile.channel;
          const int64_t at = group * group_size + tile.at;
          const GroupAffine<A> affine = channels.group(n, c, mean[group], rstd[group]);
          write(at, tile.rows.elements(),
                [&](const auto& kernel, auto* y) { kernel.rows_apply(x + at, y, tile.rows, affine, args.silu); });
        });
  }

  // Parts are bundles.
  void columns() const {
    const Bundles bundles(shape, sizeof(X), sizeof(X), args.silu && !args.dropout.seed && !has_statistics());
    const int64_t sample_size = shape.channels * shape.spatial, chunks = bundles.pixels.count;
    const int64_t first_chunks = has_statistics() ? 0 : chunks, partials = shape.batch * first_chunks * shape.channels;
    const Buffer<A> means(partials), m2s(partials);
    AffineTable<A> table(shape);
    two_passes<A>(
        {shape.batch * bundles.count, bundles.elements(), first_chunks, y ? chunks : 0, 0},
        [&](int64_t part, int64_t k, A*) {
          const int64_t n = bundles.sample(part), partial = (n * chunks + k) * shape.channels + bundles.channel(part);
          kernel.column_moments(x + n * sample_size + bundles.at(part, k), bundles.columns(part, k),
                                means.data() + partial, m2s.data() + partial);
        },
        [&](int64_t part) {
          if (!has_statistics()) merge_columns(bundles, part, means, m2s);
          const int64_t in_group = shape.channels_per_group(), g0 = bundles.channel(part) / in_group;
          if (y) table.fill(bundles.sample(part), g0, g0 + bundles.channels(part) / in_group, channels, mean, rstd);
        },
        [&](int64_t part, int64_t k, A*) {
          const int64_t n = bundles.sample(part), at = n * sample_size + bundles.at(part, k);
          const Columns columns = bundles.columns(part, k);
          const ColumnAffine<A> affine = table.from(n, bundles.channel(part));
          write(at, columns.elements(),
                [&](const auto& kernel, auto* y) { kernel.columns_apply(x + at, y, columns, affine, args.silu); });
        });
  }

  // From the moments of each channel in each chunk to the statistics, in two steps: first the mean of all means, then
  // how far each is from it.
  void merge_columns(const Bundles& bundles, int64_t part, const Buffer<A>& means, const Buffer<A>& m2s) const {
    const Chunks& pixels = bundles.pixels;
    const int64_t n = bundles.sample(part), c0 = bundles.channel(part), all = bundles.channels(part);
    const int64_t in_group = shape.channels_per_group(), g0 = c0 / in_group, groups = all / in_group;
    const A* pre_bias = channels.pre_bias(n) ? channels.pre_bias(n) + c0 : nullptr;
    std::vector<double> sums(all), centers(all), m2(all), group_means(groups);
    for (int64_t k = 0; k < pixels.count; ++k) {
      const A* mean_k = means.data() + (n * pixels.count + k) * shape.channels + c0;
      const double share = double(pixels.extent(k)) / double(shape.spatial);
      for (int64_t c = 0; c < all; ++c) sums[c] += double(mean_k[c]) * share;
    }
    for (int64_t c = 0; pre_bias && c < all; ++c) sums[c] += double(pre_bias[c]);
    for (int64_t g = 0; g < groups; ++g) {
      group_means[g] = std::accumulate(&sums[g * in_group], &sums[g * in_group] + in_group, 0.0) / in_group;
      std::fill_n(&centers[g * in_group], in_group, group_means[g]);
    }
    for (int64_t c = 0; pre_bias && c < all; ++c) centers[c] -= double(pre_bias[c]);
    for (int64_t k = 0; k < pixels.count; ++k) {
      const int64_t at = (n * pixels.count + k) * shape.channels + c0;
      const A *mean_k = means.data() + at, *m2_k = m2s.data() + at;
      const double extent = double(pixels.extent(k));
      for (int64_t c = 0; c < all; ++c) {
        const double off = double(mean_k[c]) - centers[c];
        m2[c] += double(m2_k[c]) + off * off * extent;
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const double sum = std::accumulate(&m2[g * in_group], &m2[g * in_group] + in_group, 0.0);
      keep(n * shape.groups + g0 + g, {double(in_group) * double(shape.spatial), group_means[g], sum});
    }
  }
};

void run(const ForwardArgs& args) {
  dispatch_pair(args.x_dtype, args.y_dtype, [&](auto x_type, auto y_type) {
    const Forward<decltype(x_type), decltype(y_type)> forward{args};
    if (args.parts) forward.merge_parts();
    args.shape.walks_columns() ? forward.columns() : forward.rows();
  });
}

void run_forward(const ForwardCall& call) { run(call.args); }
void run_statistics(const StatisticsCall& call) { run(call.args); }
void run_apply(const ApplyCall& call) { run(call.args); }

constexpr auto forward_op = &group_norm_act<NoGuard, run_forward>;
constexpr auto training_op = &group_norm_act_training<NoGuard, run_forward>;
constexpr auto inference_op = &group_norm_act_inference<NoGuard, run_forward>;
constexpr auto statistics_op = &group_norm_statistics<NoGuard, run_statistics>;
constexpr auto apply_op = &group_norm_apply<NoGuard, run_apply>;

}  // namespace
}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(ldm_fused::cpu::forward_op));
  m.impl("group_norm_act_training", TORCH_BOX(ldm_fused::cpu::training_op));
  m.impl("group_norm_act_inference", TORCH_BOX(ldm_fused::cpu::inference_op));
  m.impl("group_norm_statistics", TORCH_BOX(ldm_fused::cpu::statistics_op));
  m.impl("group_norm_apply", TORCH_BOX(ldm_fused::cpu::apply_op));
}
