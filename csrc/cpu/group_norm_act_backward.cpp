// group_norm_act_backward on the CPU.
//
// Memory passes: x and dy are walked twice, as the forward pass walks x. The first walk keeps dz where a cache holds
// it, so that the second one has no exponential to compute. Of a tensor that is cut in parts, each half is one walk.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "cpu/isa.h"
#include "cpu/parameters.h"

namespace ldm_fused {
namespace cpu {
namespace {

template <class X, class Y>
struct Backward {
  using A = Accumulate<X>;

  const BackwardArgs& args;
  const Shape& shape = args.shape;
  const X* x = static_cast<const X*>(args.x);
  const Y* dy = static_cast<const Y*>(args.dy);
  X* dx = static_cast<X*>(args.dx);
  const A *mean = static_cast<const A*>(args.mean), *rstd = static_cast<const A*>(args.rstd);
  const Channels<A> channels{shape, args.affine};
  // The members of GradientSums, each an array over all channels of all samples.
  const Buffer<A> own_totals{args.totals ? 0 : args.sums * shape.rows()};
  A* dz = args.totals ? static_cast<A*>(args.totals) : own_totals.data();
  A *dz_x = dz + shape.rows(), *sum_x = args.sums == 3 ? dz_x + shape.rows() : nullptr;
  const Buffer<Projection<A>> own_projections{args.projections ? 0 : shape.batch * shape.groups};
  Projection<A>* projections =
      args.projections ? static_cast<Projection<A>*>(args.projections) : own_projections.data();
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  // Where dz of a part lies between the passes, if it stays in a cache: in dx where the types agree, else in scratch
  // memory. Computing it again costs the exponential and the division a second time.
  bool keeps_dz(int64_t part_elements) const { return dx && !args.has_sums && args.silu && part_elements <= kKept; }
  int64_t scratch(int64_t part_elements) const {
    return keeps_dz(part_elements) && !std::is_same_v<X, A> ? part_elements : 0;
  }
  A* kept(int64_t part, int64_t part_elements, A* scratch, int64_t at) const {
    if (!keeps_dz(part_elements)) return nullptr;
    if constexpr (std::is_same_v<X, A>) return dx + part * part_elements + at;
    return scratch + at;
  }

  // Calls f(kernel, dy) with dy of n consecutive elements from `at` on.
  template <class F>
  void read_dy(int64_t at, int64_t n, const F& f) const {
    if (!args.dropout.seed) return f(kernel, dy + at);
    A* const tile = tile_of_thread<A>(n);
    kernel.drop_gradient(dy + at, tile, n, at, args.dropout);
    f(kernels<X, A>(), static_cast<const A*>(tile));
  }

  const X* shortcut_at(int64_t at) const { return args.shortcut ? static_cast<const X*>(args.shortcut) + at : nullptr; }

  // Computes a group's projection from the totals of its channels.
  void project(int64_t n, int64_t g) {
    const int64_t in_group = shape.channels_per_group(), group = n * shape.groups + g;
    const int64_t row = n * shape.channels + g * in_group;
    const A* gain = channels.gain(n) + g * in_group;
    double sum = 0, sum_x = 0;
    for (int64_t i = 0; i < in_group; ++i) {
      sum += double(gain[i] * dz[row + i]);
      sum_x += double(gain[i] * dz_x[row + i]);
    }
    const A r = rstd[group];
    const double count = double(in_group) * double(shape.spatial);
    projections[group] = {r * A(sum / count), A(sum_x / count) * r * r * r};
  }

  // Parts are groups.
  void rows() {
    const int64_t in_group = shape.channels_per_group(), group_size = in_group * shape.spatial;
    const Tiles tiles(in_group, shape.spatial, sizeof(X) + sizeof(Y));
    const Buffer<GradientSums<double>> partials(shape.rows() * tiles.pieces.count);
    const auto maps = [&](int64_t group, const Tiles::Tile& tile) {
      const int64_t n = group / shape.groups, c = group % shape.groups * in_group + tile.channel;
      return channels.group(n, c, mean[group], rstd[group]);
    };
    two_passes<A>(
        {shape.batch * shape.groups, group_size, args.has_sums ? 0 : tiles.count, dx ? tiles.count : 0,
         scratch(group_size)},
        [&](int64_t group, int64_t unit, A* scratch) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t at = group * group_size + tile.at;
          GradientSums<double>* sums = partials.data() + tile.piece * shape.rows() + group * in_group + tile.channel;
          A* const kept_dz = kept(group, group_size, scratch, tile.at);
          read_dy(at, tile.rows.elements(), [&](const auto& kernel, const auto* dy) {
            kernel.rows_sums(x + at, dy, kept_dz, tile.rows, maps(group, tile), args.silu, sums);
          });
          if (args.sums == 3) kernel.rows_sum_x(x + at, tile.rows, maps(group, tile), sums);
        },
        [&](int64_t group) {
          if (args.has_sums) return;
          for (int64_t row = group * in_group; row < (group + 1) * in_group; ++row) {
            GradientSums<double> sum = partials[row];
            for (int64_t k = 1; k < tiles.pieces.count; ++k) sum.merge(partials[k * shape.rows() + row]);
            dz[row] = A(sum.dz);
            dz_x[row] = A(sum.dz_x);
            if (sum_x) sum_x[row] = A(sum.x);
          }
          project(group / shape.groups, group % shape.groups);
        },
        [&](int64_t group, int64_t unit, A* scratch) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t at = group * group_size + tile.at;
          const A* const kept_dz = kept(group, group_size, scratch, tile.at);
          const auto write = [&](const auto& kernel, const auto* dy) {
            kernel.rows_input_gradient(x + at, dy, kept_dz, shortcut_at(at), dx + at, tile.rows, maps(group, tile),
                                       projections[group], args.silu);
          };
          kept_dz ? write(kernel, dy + at) : read_dy(at, tile.rows.elements(), write);
        });
  }

  // Parts are bundles.
  void columns() {
    const Bundles bundles(shape, sizeof(X), sizeof(X) + sizeof(Y), args.silu && !args.dropout.seed);
    const int64_t sample_size = shape.channels * shape.spatial, chunks = bundles.pixels.count;
    const int64_t in_group = shape.channels_per_group();
    const Buffer<A> partials(3 * shape.batch * chunks * shape.channels), k1(shape.rows()), k2(shape.rows());
    AffineTable<A> table(shape);
    for (int64_t n = 0; n < shape.batch; ++n) table.fill(n, 0, shape.groups, channels, mean, rstd);
    // dz of a bundle lies in scratch memory as it would in the sample.
    const auto kept_at = [&](int64_t part, int64_t k, A* scratch) {
      const int64_t in_sample = bundles.at(part, k);
      return kept(bundles.sample(part), sample_size, scratch,
                  std::is_same_v<X, A> ? in_sample : in_sample - bundles.channel(part));
    };
    two_passes<A>(
        {shape.batch * bundles.count, bundles.elements(), args.has_sums ? 0 : chunks, dx ? chunks : 0,
         scratch(sample_size)},
        [&](int64_t part, int64_t k, A* scratch) {
          const int64_t n = bundles.sample(part), c0 = bundles.channel(part);
          const int64_t at = n * sample_size + bundles.at(part, k);
          const Columns columns = bundles.columns(part, k);
          const ColumnAffine<A> maps = table.from(n, c0);
          A* sums = partials.data() + 3 * (n * chunks + k) * shape.channels + c0;
          A* const kept_dz = kept_at(part, k, scratch);
          read_dy(at, columns.elements(), [&](const auto& kernel, const auto* dy) {
            kernel.columns_sums(x + at, dy, kept_dz, columns, maps, args.silu, sums, sums + shape.channels);
          });
          if (args.sums == 3) kernel.columns_sum_x(x + at, columns, maps.center, sums + 2 * shape.channels);
        },
        [&](int64_t part) {
          const int64_t n = bundles.sample(part), c0 = bundles.channel(part), all = bundles.channels(part);
          A* const totals_of[] = {dz, dz_x, sum_x};
          std::vector<double> sums(all);
          for (int64_t i = 0; i < args.sums && !args.has_sums; ++i) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t k = 0; k < chunks; ++k) {
              const A* partial = partials.data() + (3 * (n * chunks + k) + i) * shape.channels + c0;
              for (int64_t c = 0; c < all; ++c) sums[c] += double(partial[c]);
            }
            std::copy(sums.begin(), sums.end(), totals_of[i] + n * shape.channels + c0);
          }
          for (int64_t g = c0 / in_group; g < (c0 + all) / in_group; ++g) {
            if (!args.has_sums) project(n, g);
            const Projection<A>& projection = projections[n * shape.groups + g];
            std::fill_n(k1.data() + n * shape.channels + g * in_group, in_group, projection.k1);
            std::fill_n(k2.data() + n * shape.channels + g * in_group, in_group, projection.k2);
          }
        },
        [&](int64_t part, int64_t k, A* scratch) {
          const int64_t n = bundles.sample(part), row = n * shape.channels + bundles.channel(part);
          const int64_t at = n * sample_size + bundles.at(part, k);
          const Columns columns = bundles.columns(part, k);
          const A* const kept_dz = kept_at(part, k, scratch);
          const auto write = [&](const auto& kernel, const auto* dy) {
            kernel.columns_input_gradient(x + at, dy, kept_dz, shortcut_at(at), dx + at, columns,
                                          table.from(n, bundles.channel(part)), k1.data() + row, k2.data() + row,
                                          args.silu);
          };
          kept_dz ? write(kernel, dy + at) : read_dy(at, columns.elements(), write);
        });
  }

  void parameters() const {
    const Affine& affine = args.affine;
    const Gradients& gradients = args.gradients;
    if (!gradients.any()) return;
    constexpr int64_t kBlock = 64;  // channels that a thread sums side by side
    const int64_t in_group = shape.channels_per_group();
    const bool plain = !affine.scale.data && !gradients.shift.data && !gradients.pre_bias.data;
    parallel_over(ceil_div(shape.channels, kBlock), kBlock * shape.batch, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kBlock; first < std::min(end * kBlock, shape.channels); first += kBlock) {
        const int64_t last = std::min(first + kBlock, shape.channels);
        ParameterGradients<A> sums[kBlock]{};
        for (int64_t n = 0; n < shape.batch; ++n) {
          for (int64_t c = first; c < last;) {
            const int64_t group = shape.group(n, c), end = std::min(last, c - c % in_group + in_group);
            for (; c < end; ++c) {
              const int64_t row = n * shape.channels + c;
              if (plain) {  // what add() does, without looking at each parameter
                sums[c - first].weight += dz_x[row] * rstd[group];
                sums[c - first].bias += dz[row];
              } else {
                sums[c - first].add(affine, gradients, shape, n, c, rstd[group], projections[group],
                                    {dz[row], dz_x[row], sum_x ? sum_x[row] : A(0)});
              }
            }
          }
        }
        for (int64_t c = first; c < last; ++c) sums[c - first].store(gradients, c);
      }
    });
  }
};

void run(const BackwardArgs& args) {
  dispatch_pair(args.x_dtype, args.dy_dtype, [&](auto x_type, auto dy_type) {
    Backward<decltype(x_type), decltype(dy_type)> backward{args};
    args.shape.walks_columns() ? backward.columns() : backward.rows();
    backward.parameters();
  });
}

void run_backward(const BackwardCall& call) { run(call.args); }
void run_sums(const SumsCall& call) { run(call.args); }
void run_gradients(const GradientsCall& call) { run(call.args); }

constexpr auto backward_op = &group_norm_act_backward<NoGuard, run_backward>;
constexpr auto training_backward_op = &group_norm_act_training_backward<NoGuard, run_backward>;
constexpr auto sums_op = &group_norm_backward_sums<NoGuard, run_sums>;
constexpr auto gradients_op = &group_norm_backward_apply<NoGuard, run_gradients>;

}  // namespace
}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CPU, m) {
  m.impl("group_norm_act_backward", TORCH_BOX(ldm_fused::cpu::backward_op));
  m.impl("group_norm_act_training_backward", TORCH_BOX(ldm_fused::cpu::training_backward_op));
  m.impl("group_norm_backward_sums", TORCH_BOX(ldm_fused::cpu::sums_op));
  m.impl("group_norm_backward_apply", TORCH_BOX(ldm_fused::cpu::gradients_op));
}
