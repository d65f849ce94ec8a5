// group_norm_act and its backward on the CPU: check, allocate, cut into units of work, run, register.
//
// Memory passes: each op walks the tensor twice, group by group (channels_last: bundle of groups by bundle), so that
// one that fits the cache is read from memory once, and what is wanted next is prefetched while this group is computed.
// The second walk goes backward, and begins with what the cache still has of a larger one. Backward keeps dz between
// its passes, where it fits a cache, so that the second has no exponential to compute. Dropout is a step of its own
// between a tile in a cache and the tensor.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parameters.h"
#include "cpu/work.h"
#include "tensors.h"

namespace ldm_fused {
namespace cpu {
namespace {

// ---- Parameters -----------------------------------------------------------------------------------------------

// Each channel's parameters in the arithmetic's type, put together once a call and not once a group:
// u = (x - (mean - pre_bias)) * (rstd * gain) + offset.
template <class A>
class Channels {
 public:
  Channels(const Shape& shape, const Affine& affine)
      : shape_(shape),
        stride_(affine.pre_bias.batch_stride || affine.scale.data || affine.shift.data ? shape.channels : 0),
        samples_(stride_ ? shape.batch : 1),
        values_(samples_ * shape.channels * (affine.pre_bias.data ? 3 : 2)),
        gain_(values_.data()),
        offset_(gain_ + samples_ * shape.channels),
        pre_bias_(affine.pre_bias.data ? offset_ + samples_ * shape.channels : nullptr) {
    for (int64_t n = 0; n < samples_; ++n) {
      A *gain = gain_ + n * stride_, *offset = offset_ + n * stride_;
      fill(affine.weight, n, 1, gain);
      fill(affine.bias, n, 0, offset);
      if (pre_bias_) fill(affine.pre_bias, n, 0, pre_bias_ + n * stride_);
      for (int64_t c = 0; affine.scale.data && c < shape.channels; ++c) {
        const A factor = A(1) + affine.scale.load<A>(n, c, 0);
        gain[c] *= factor;
        offset[c] *= factor;
      }
      for (int64_t c = 0; affine.shift.data && c < shape.channels; ++c) offset[c] += affine.shift.load<A>(n, c, 0);
    }
  }

  const A* gain(int64_t n) const { return gain_ + n * stride_; }
  const A* offset(int64_t n) const { return offset_ + n * stride_; }
  const A* pre_bias(int64_t n) const { return pre_bias_ ? pre_bias_ + n * stride_ : nullptr; }  // null: none

  // From channel c on, all of one group.
  GroupAffine<A> group(int64_t n, int64_t c, A mean, A rstd) const {
    const int64_t at = n * stride_ + c;
    return {mean, rstd, gain_ + at, offset_ + at, pre_bias_ ? pre_bias_ + at : nullptr};
  }

 private:
  void fill(const Parameter& parameter, int64_t n, A absent, A* to) const {
    widen_parameter(parameter, n, shape_.channels, absent, to);
  }

  const Shape& shape_;
  int64_t stride_, samples_;
  Buffer<A> values_;
  A *gain_, *offset_, *pre_bias_;
};

// The affine maps of all channels of all samples, one array a member.
template <class A>
class AffineTable {
 public:
  explicit AffineTable(const Shape& shape)
      : channels_(shape.channels),
        groups_(shape.groups),
        in_group_(shape.channels_per_group()),
        values_(3 * shape.rows()) {}

  // Of sample n's groups from `first` on, from their statistics.
  void fill(int64_t n, int64_t first, int64_t last, const Channels<A>& channels, const A* mean, const A* rstd) {
    A *center = values_.data() + 3 * n * channels_, *slope = center + channels_, *offset = slope + channels_;
    const A *gain = channels.gain(n), *pre_bias = channels.pre_bias(n);
    std::copy(channels.offset(n) + first * in_group_, channels.offset(n) + last * in_group_,
              offset + first * in_group_);
    for (int64_t g = first; g < last; ++g) {
      const A m = mean[n * groups_ + g], r = rstd[n * groups_ + g];
      for (int64_t c = g * in_group_; c < (g + 1) * in_group_; ++c) {
        center[c] = pre_bias ? m - pre_bias[c] : m;
        slope[c] = r * gain[c];
      }
    }
  }

  // Sample n's, from channel c on.
  ColumnAffine<A> from(int64_t n, int64_t c) const {
    const A* at = values_.data() + 3 * n * channels_ + c;
    return {at, at + channels_, at + 2 * channels_};
  }

 private:
  int64_t channels_, groups_, in_group_;
  Buffer<A> values_;
};

// Memory for a tile before or after dropout, which the calling thread keeps.
template <class A>
A* tile_of_thread(int64_t elements) {
  thread_local std::vector<A> tile;
  if (int64_t(tile.size()) < elements) tile.resize(elements);
  return tile.data();
}

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
  Dropout dropout;
  const Channels<A> channels{shape, affine};
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  // y of n consecutive elements from `at` on, which apply(kernel, y) computes.
  template <class F>
  void write(int64_t at, int64_t n, const F& apply) const {
    if (!dropout.seed) return apply(kernel, y + at);
    A* const tile = tile_of_thread<A>(n);
    apply(kernels<X, A>(), tile);
    kernel.drop(tile, y + at, n, at, dropout);
  }

  A rstd_of(double variance) const { return A(1) / std::sqrt(A(variance) + A(eps)); }

  // Parts are groups. Without pre_bias the statistics take a group as one run, else channel by channel.
  void rows() const {
    const int64_t in_group = shape.channels_per_group(), group_size = in_group * shape.spatial;
    const int64_t runs = affine.pre_bias.data ? in_group : 1;
    const Chunks chunks(group_size / runs, kChunk);
    const Tiles tiles(in_group, shape.spatial, sizeof(X));
    const int64_t units = runs * chunks.count;
    const Buffer<Moments> partials(shape.batch * shape.groups * units);
    two_passes<A>(
        {shape.batch * shape.groups, group_size, units, tiles.count, 0},
        [&](int64_t group, int64_t unit, A*) {
          const int64_t run = unit / chunks.count, k = unit % chunks.count;
          partials[group * units + unit] =
              kernel.row_moments(x + group * group_size + run * chunks.length + chunks.begin(k), chunks.extent(k));
        },
        [&](int64_t group) {
          const int64_t n = group / shape.groups, c0 = group % shape.groups * in_group;
          Moments sum{};
          for (int64_t unit = 0; unit < units; ++unit) {
            Moments moments = partials[group * units + unit];
            if (channels.pre_bias(n)) moments.mean += channels.pre_bias(n)[c0 + unit / chunks.count];
            sum.merge(moments);
          }
          mean[group] = A(sum.mean);
          rstd[group] = rstd_of(sum.m2 / sum.count);
        },
        [&](int64_t group, int64_t unit, A*) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t n = group / shape.groups, c = group % shape.groups * in_group + tile.channel;
          const int64_t at = group * group_size + tile.at;
          const GroupAffine<A> affine = channels.group(n, c, mean[group], rstd[group]);
          write(at, tile.rows.elements(),
                [&](const auto& kernel, auto* y) { kernel.rows_apply(x + at, y, tile.rows, affine, silu); });
        });
  }

  // Parts are bundles.
  void columns() const {
    const Bundles bundles(shape, sizeof(X), sizeof(X), silu && !dropout.seed);
    const int64_t sample_size = shape.channels * shape.spatial, chunks = bundles.pixels.count;
    const Buffer<A> means(shape.batch * chunks * shape.channels), m2s(shape.batch * chunks * shape.channels);
    AffineTable<A> table(shape);
    two_passes<A>(
        {shape.batch * bundles.count, bundles.elements(), chunks, chunks, 0},
        [&](int64_t part, int64_t k, A*) {
          const int64_t n = bundles.sample(part), partial = (n * chunks + k) * shape.channels + bundles.channel(part);
          kernel.column_moments(x + n * sample_size + bundles.at(part, k), bundles.columns(part, k),
                                means.data() + partial, m2s.data() + partial);
        },
        [&](int64_t part) { merge_columns(bundles, part, means, m2s, table); },
        [&](int64_t part, int64_t k, A*) {
          const int64_t n = bundles.sample(part), at = n * sample_size + bundles.at(part, k);
          const Columns columns = bundles.columns(part, k);
          const ColumnAffine<A> affine = table.from(n, bundles.channel(part));
          write(at, columns.elements(),
                [&](const auto& kernel, auto* y) { kernel.columns_apply(x + at, y, columns, affine, silu); });
        });
  }

  // From the moments of each channel in each chunk to the statistics and the affine maps, in two steps: first the mean
  // of all means, then how far each is from it.
  void merge_columns(const Bundles& bundles, int64_t part, const Buffer<A>& means, const Buffer<A>& m2s,
                     AffineTable<A>& table) const {
    const Chunks& pixels = bundles.pixels;
    const int64_t n = bundles.sample(part), c0 = bundles.channel(part), all = bundles.channels(part);
    const int64_t in_group = shape.channels_per_group(), g0 = c0 / in_group, groups = all / in_group;
    const A* pre_bias = channels.pre_bias(n) ? channels.pre_bias(n) + c0 : nullptr;
    std::vector<double> sums(all), centers(all), m2(all);
    for (int64_t k = 0; k < pixels.count; ++k) {
      const A* mean_k = means.data() + (n * pixels.count + k) * shape.channels + c0;
      const double share = double(pixels.extent(k)) / double(shape.spatial);
      for (int64_t c = 0; c < all; ++c) sums[c] += double(mean_k[c]) * share;
    }
    for (int64_t c = 0; pre_bias && c < all; ++c) sums[c] += double(pre_bias[c]);
    for (int64_t g = 0; g < groups; ++g) {
      const double group_mean = std::accumulate(&sums[g * in_group], &sums[g * in_group] + in_group, 0.0) / in_group;
      std::fill_n(&centers[g * in_group], in_group, group_mean);
      mean[n * shape.groups + g0 + g] = A(group_mean);
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
      rstd[n * shape.groups + g0 + g] = rstd_of(sum / (double(in_group) * double(shape.spatial)));
    }
    table.fill(n, g0, g0 + groups, channels, mean, rstd);
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
  const X* shortcut;  // added to dx; null: nothing
  X* dx;              // null: not wanted
  const A *mean, *rstd;
  bool silu;
  Dropout dropout;
  const Channels<A> channels{shape, affine};
  Buffer<A> totals{3 * shape.rows()};  // the members of GradientSums, each an array over all channels of all samples
  A *dz = totals.data(), *dz_x = dz + shape.rows(), *sum_x = dz_x + shape.rows();
  Buffer<Projection<A>> projections{shape.batch * shape.groups};
  const Kernels<X, Y>& kernel = kernels<X, Y>();

  // Where dz of a part lies between the passes, if it stays in a cache: in dx where the types agree, else in scratch
  // memory. Computing it again costs the exponential and the division a second time.
  bool keeps_dz(int64_t part_elements) const { return dx && silu && part_elements <= kKept; }
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
    if (!dropout.seed) return f(kernel, dy + at);
    A* const tile = tile_of_thread<A>(n);
    kernel.drop_gradient(dy + at, tile, n, at, dropout);
    f(kernels<X, A>(), static_cast<const A*>(tile));
  }

  const X* shortcut_at(int64_t at) const { return shortcut ? shortcut + at : nullptr; }

  // From the totals of the group's channels.
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
        {shape.batch * shape.groups, group_size, tiles.count, dx ? tiles.count : 0, scratch(group_size)},
        [&](int64_t group, int64_t unit, A* scratch) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t at = group * group_size + tile.at;
          GradientSums<double>* sums = partials.data() + tile.piece * shape.rows() + group * in_group + tile.channel;
          A* const kept_dz = kept(group, group_size, scratch, tile.at);
          read_dy(at, tile.rows.elements(), [&](const auto& kernel, const auto* dy) {
            kernel.rows_sums(x + at, dy, kept_dz, tile.rows, maps(group, tile), silu, sums);
          });
          if (gradients.pre_bias.data) kernel.rows_sum_x(x + at, tile.rows, maps(group, tile), sums);
        },
        [&](int64_t group) {
          for (int64_t row = group * in_group; row < (group + 1) * in_group; ++row) {
            GradientSums<double> sum = partials[row];
            for (int64_t k = 1; k < tiles.pieces.count; ++k) sum.merge(partials[k * shape.rows() + row]);
            dz[row] = A(sum.dz);
            dz_x[row] = A(sum.dz_x);
            sum_x[row] = A(sum.x);
          }
          project(group / shape.groups, group % shape.groups);
        },
        [&](int64_t group, int64_t unit, A* scratch) {
          const Tiles::Tile tile = tiles[unit];
          const int64_t at = group * group_size + tile.at;
          const A* const kept_dz = kept(group, group_size, scratch, tile.at);
          const auto write = [&](const auto& kernel, const auto* dy) {
            kernel.rows_input_gradient(x + at, dy, kept_dz, shortcut_at(at), dx + at, tile.rows, maps(group, tile),
                                       projections[group], silu);
          };
          kept_dz ? write(kernel, dy + at) : read_dy(at, tile.rows.elements(), write);
        });
  }

  // Parts are bundles.
  void columns() {
    const Bundles bundles(shape, sizeof(X), sizeof(X) + sizeof(Y), silu && !dropout.seed);
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
        {shape.batch * bundles.count, bundles.elements(), chunks, dx ? chunks : 0, scratch(sample_size)},
        [&](int64_t part, int64_t k, A* scratch) {
          const int64_t n = bundles.sample(part), c0 = bundles.channel(part);
          const int64_t at = n * sample_size + bundles.at(part, k);
          const Columns columns = bundles.columns(part, k);
          const ColumnAffine<A> maps = table.from(n, c0);
          A* sums = partials.data() + 3 * (n * chunks + k) * shape.channels + c0;
          A* const kept_dz = kept_at(part, k, scratch);
          read_dy(at, columns.elements(), [&](const auto& kernel, const auto* dy) {
            kernel.columns_sums(x + at, dy, kept_dz, columns, maps, silu, sums, sums + shape.channels);
          });
          if (gradients.pre_bias.data) kernel.columns_sum_x(x + at, columns, maps.center, sums + 2 * shape.channels);
        },
        [&](int64_t part) {
          const int64_t n = bundles.sample(part), c0 = bundles.channel(part), all = bundles.channels(part);
          A* const totals_of[] = {dz, dz_x, sum_x};
          std::vector<double> sums(all);
          for (int64_t i = 0; i < (gradients.pre_bias.data ? 3 : 2); ++i) {
            std::fill(sums.begin(), sums.end(), 0);
            for (int64_t k = 0; k < chunks; ++k) {
              const A* partial = partials.data() + (3 * (n * chunks + k) + i) * shape.channels + c0;
              for (int64_t c = 0; c < all; ++c) sums[c] += double(partial[c]);
            }
            std::copy(sums.begin(), sums.end(), totals_of[i] + n * shape.channels + c0);
          }
          for (int64_t g = c0 / in_group; g < (c0 + all) / in_group; ++g) {
            project(n, g);
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
                                          table.from(n, bundles.channel(part)), k1.data() + row, k2.data() + row, silu);
          };
          kept_dz ? write(kernel, dy + at) : read_dy(at, columns.elements(), write);
        });
  }

  void parameters() const {
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
                                    {dz[row], dz_x[row], sum_x[row]});
              }
            }
          }
        }
        for (int64_t c = first; c < last; ++c) sums[c - first].store(gradients, c);
      }
    });
  }
};

// ---- Ops ------------------------------------------------------------------------------------------------------

void run(const ForwardCall& call, double eps, bool silu, const Dropout& dropout) {
  if (call.is_empty()) return;
  dispatch_pair(call.x_dtype, call.y_dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    using A = Accumulate<X>;
    const int64_t groups = call.shape.batch * call.shape.groups;
    const bool kept = call.mean.defined();
    const Buffer<A> own(kept ? 0 : 2 * groups);
    const Forward<X, Y> forward{call.shape,
                                call.parameters.affine,
                                static_cast<const X*>(call.x.data_ptr()),
                                static_cast<Y*>(call.y.data_ptr()),
                                kept ? static_cast<A*>(call.mean.data_ptr()) : own.data(),
                                kept ? static_cast<A*>(call.rstd.data_ptr()) : own.data() + groups,
                                eps,
                                silu,
                                dropout};
    walks_columns(call.shape) ? forward.columns() : forward.rows();
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps, bool silu,
                                                  const OptionalTensor& pre_bias, const OptionalTensor& scale,
                                                  const OptionalTensor& shift, std::optional<ScalarType> out_dtype,
                                                  const OptionalTensor& dropout_seed, double dropout_p) {
  const ForwardCall call(x, num_groups, weight, bias, pre_bias, scale, shift, out_dtype);
  run(call, eps, silu, dropout_of(dropout_seed, dropout_p, call.x));
  return {call.y, call.mean, call.rstd};
}

Tensor group_norm_act_inference(const Tensor& x, int64_t num_groups, const OptionalTensor& weight,
                                const OptionalTensor& bias, double eps, bool silu) {
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
  BackwardCall call(dy, x, mean, rstd, weight, bias, pre_bias, scale, shift, output_mask, dx_shortcut);
  const Dropout dropout = dropout_of(dropout_seed, dropout_p, call.x);
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
                              static_cast<const X*>(call.shortcut_data()),
                              call.wants_dx ? static_cast<X*>(call.dx.data_ptr()) : nullptr,
                              static_cast<const A*>(call.mean.data_ptr()),
                              static_cast<const A*>(call.rstd.data_ptr()),
                              silu,
                              dropout};
      walks_columns(call.shape) ? backward.columns() : backward.rows();
      backward.parameters();
    });
  }
  return call.outputs();
}

}  // namespace

}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CPU, m) {
  m.impl("group_norm_act", TORCH_BOX(&ldm_fused::cpu::group_norm_act));
  m.impl("group_norm_act_inference", TORCH_BOX(&ldm_fused::cpu::group_norm_act_inference));
  m.impl("group_norm_act_backward", TORCH_BOX(&ldm_fused::cpu::group_norm_act_backward));
}
