// GroupNorm and activation, backward, in one launch and a small one: a block copies its part of an item of x and dy to
// shared memory, sums up what the whole group's gradient needs, learns its team's sums, and writes dx.
//
// Memory passes: reads x and dy once, writes dx once (3 B, the limit), and reads the shortcut's gradient, if there is
// one, once, when dx is written; what does not fit the chip is read again, last read first. Parallel over items
// (bundles of whole groups) and over the blocks of a team that shares one. The totals of each channel, from which
// parameter_gradients() makes the parameters' gradients, come from the same sums.
#pragma once

#include "cuda/gradients.cuh"
#include "cuda/resident.cuh"

namespace ldm_fused {

// Sums of kChannels channels.
template <int kChannels>
struct ChannelSums {
  GradientSums<float> of[kChannels];

  __device__ __forceinline__ void merge(const ChannelSums& other) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) of[c].merge(other.of[c]);
  }
};

template <class X, class Y, int V, bool kColumns, bool kGrid>
struct ResidentBackward : ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X) + sizeof(Y)) / 16> {
  using Block = ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X) + sizeof(Y)) / 16>;
  using Block::item, Block::r, Block::shape, Block::slots, Block::tables, Block::team;
  static constexpr int kOfX = V * int(sizeof(X)) / 16;    // pieces of a slot; dy's are behind them
  static constexpr int kBatch = kBatchOf<Vec<X, V>> / 2;  // vectors of x, and as many of dy

  const BackwardParams& p;
  const X* const x;
  const Y* const dy;
  const X* const shortcut;
  X* const dx;
  const Mask<float> mask;

  __device__ __forceinline__ ResidentBackward(const BackwardParams& p, void* shared)
      : Block(p, shared, p.sums, p.sums),
        p(p),
        x(static_cast<const X*>(p.x)),
        dy(static_cast<const Y*>(p.dy)),
        shortcut(static_cast<const X*>(p.shortcut)),
        dx(static_cast<X*>(p.dx)),
        mask(p.dropout) {}

  __device__ __forceinline__ void copy_to(int end) {
    this->loader.copy_to(end, shape, r, [&](int slot, int64_t at) {
      slots.copy(slot * (kOfX + slots.template kPieces<Y>), x + at);
      slots.copy(slot * (kOfX + slots.template kPieces<Y>)+kOfX, dy + at);
    });
  }

  // The affine map of the item's channels; mean and rstd of its groups.
  __device__ __forceinline__ void load_parameters() const {
    const int64_t first_group = shape.group(item.n, item.c);
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const int g = c / this->group_channels();
      const float mean = static_cast<const float*>(p.mean)[first_group + g];
      const float rstd = static_cast<const float*>(p.rstd)[first_group + g];
      const ChannelAffine<float> affine = channel_affine(p.affine, item.n, item.c + c, mean, rstd);
      tables.affine[c] = affine;
      if (c % this->group_channels() == 0) tables.groups[g] = {mean, rstd};
    }
  }

  // Whether vector `step` + i of a round is there, and among the item's k-th from `from` to `to`.
  __device__ __forceinline__ bool is_wanted(const Span& span, int round, int step, int i, int from, int to) const {
    const int k = round * r.steps + step + i;
    return step + i < min(r.steps, span.count) && k >= from && k < to;
  }

  // Calls f(i, x, dy) for the vectors `step` + i of a batch that are wanted.
  template <class F>
  __device__ __forceinline__ void each_of_batch(const Span& span, int round, int step, int from, int to, F&& f) const {
    Vec<X, V> vx[kBatch];
    Vec<Y, V> vdy[kBatch];
    const int first = round * r.steps + step;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!is_wanted(span, round, step, i, from, to)) continue;
      if (!kGrid || first + i < r.kept) {
        const int piece = this->piece_of(first + i);
        vx[i] = slots.template read<X>(piece);
        vdy[i] = slots.template read<Y>(piece + kOfX);
      } else {
        vx[i] = load<X, V>(x + span.at(step + i));
        vdy[i] = load<Y, V>(dy + span.at(step + i));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_wanted(span, round, step, i, from, to)) f(i, vx[i], vdy[i]);
    }
  }

  // The sums of each unit, in the order of the vectors in memory.
  __device__ __forceinline__ void reduce_units() const {
    for (int round = 0; round < r.rounds; ++round) {
      const Span span = this->span(round);
      ChannelAffine<float> affine[Block::kChannels];
#pragma unroll
      for (int c = 0; c < Block::kChannels; ++c) affine[c] = tables.affine[span.channel + c];
      ChannelSums<Block::kChannels> sums{};
      for (int step = 0; step < r.steps; step += kBatch) {
        each_of_batch(span, round, step, 0, r.total(), [&](int i, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
          const OutputGradient<float, V> gradient(mask, span.at(step + i), vdy);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const int c = kColumns ? e : 0;
            accumulate<kFast<X>>(sums.of[c], affine[c], float(widen(vx.e[e])), gradient.e[e], p.silu);
          }
        });
      }
      float* const entry = tables.entries + span.entry;
      if constexpr (kColumns) {
        merge_warp_rows(sums, r.lanes);
        if (lane_index() < r.lanes) {
#pragma unroll
          for (int e = 0; e < V; ++e) store_sums(entry + e, r.entries, p.sums, sums.of[e]);
        }
      } else {
        const GradientSums<float> unit = lanes_reduce(sums.of[0], r.lanes);
        if (threadIdx.x % r.lanes == 0 && span.entry < r.entries) store_sums(entry, r.entries, p.sums, unit);
      }
    }
    __syncthreads();
  }

  // The sums of each channel that the block has, then of each group.
  __device__ __forceinline__ void reduce_channels() const {
    float* const totals = tables.exchange + 2 * r.bundle;
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      GradientSums<float> channel{};
      for (int part = 0; part < parts_of<kColumns>(r); ++part) {
        channel.merge(load_sums(tables.entries + entry_of<kColumns>(r, c, part), r.entries, p.sums));
      }
      store_sums(totals + c, r.width, p.sums, channel);
    }
    __syncthreads();
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      Pair group{};
      const int end = (g + 1) * this->group_channels();
      for (int c = g * this->group_channels() + lane_index(); c < end; c += 32) {
        group.a += tables.affine[c].slope * totals[c];
        group.b += tables.affine[c].slope * totals[r.width + c];
      }
      group = {warp_sum(group.a), warp_sum(group.b)};
      if (lane_index() == 0) reinterpret_cast<Pair*>(tables.exchange)[g] = group;
    }
  }

  // k1 and k2 of each group, from the sums that the team has.
  __device__ __forceinline__ void project_groups() const {
    const float elements = float(this->group_channels()) * shape.spatial;
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      Pair group{};
      for (int rank = lane_index(); rank < team.size; rank += 32) {
        const Pair part = team.group_of(rank, g);
        group.a += part.a;
        group.b += part.b;
      }
      group = {warp_sum(group.a), warp_sum(group.b)};
      if (lane_index() > 0) continue;
      const float rstd = tables.groups[g].b;
      const Projection<float> projection{group.a / elements, (group.b / elements) * rstd * rstd};
      tables.groups[g] = {projection.k1, projection.k2};
      if (team.rank == 0 && p.gradients.pre_bias.data) {
        static_cast<Projection<float>*>(p.projections)[shape.group(item.n, item.c) + g] = projection;
      }
    }
  }

  // The totals of each channel. The blocks of a team share the channels, in runs that fill a sector.
  __device__ __forceinline__ void write_totals() const {
    constexpr int kRun = 8;
    float* const totals = static_cast<float*>(p.totals) + item.n * shape.channels + item.c;
    for (int i = threadIdx.x; i / kRun * kRun * team.size < r.width; i += blockDim.x) {
      const int c = (i / kRun * team.size + team.rank) * kRun + i % kRun;
      if (c >= r.width) continue;
      GradientSums<float> channel{};
      for (int rank = 0; rank < team.size; ++rank) {
        channel.merge(load_sums(team.channels_of(rank) + c, r.width, p.sums));
      }
      store_sums(totals + c, shape.rows(), p.sums, channel);
    }
  }

  // dx of a round's vectors from the item's k-th `from` to `to`, in steps by `by` vectors.
  template <class F>
  __device__ __forceinline__ void write(int round, int step, int end, int by, int from, int to, F&& after_batch) const {
    const Span span = this->span(round);
    ChannelGradient<float> channel[Block::kChannels];
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) {
      const Pair* const projection = tables.groups + (span.channel + c) / this->group_channels();
      channel[c] = {tables.affine[span.channel + c], {projection->a, projection->b}};
    }
    for (; step != end; step += by) {
      Vec<X, V> add[kBatch]{};
      if (shortcut != nullptr) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (is_wanted(span, round, step, k, from, to)) add[k] = load<X, V>(shortcut + span.at(step + k));
        }
      }
      each_of_batch(span, round, step, from, to, [&](int i, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
        const OutputGradient<float, V> gradient(mask, span.at(step + i), vdy);
        Vec<X, V> out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          out.e[e] = input_gradient<X>(channel[kColumns ? e : 0], float(widen(vx.e[e])), gradient.e[e],
                                       float(widen(add[i].e[e])), p.silu);
        }
        store(dx + span.at(step + i), out);
      });
      after_batch(step);
    }
  }

  // dx: first of what did not fit, the last read first; then of what is in the slots, which the next item's vectors
  // take.
  __device__ __forceinline__ void write_dx() {
    const int steps = int(round_up(r.steps, kBatch));
    if constexpr (kGrid) {
      for (int round = r.rounds - 1; (round + 1) * r.steps > r.kept; --round) {
        write(round, steps - kBatch, -kBatch, -kBatch, r.kept, r.total(), [](int) {});
      }
    }
    for (int round = 0; round < r.rounds && round * r.steps < r.kept; ++round) {
      write(round, 0, steps, kBatch, 0, r.kept, [&](int step) {
        if constexpr (kGrid) copy_to(this->room_behind(round * r.steps + min(step + kBatch, r.steps)));
      });
    }
  }
};

template <class X, class Y, int V, bool kColumns, bool kGrid>
__global__ void __launch_bounds__(kGrid ? kGridThreads : kMostThreads, 1) resident_backward(BackwardParams p) {
  LDM_FUSED_DYNAMIC_SHARED(unsigned char, shared);
  ResidentBackward<X, Y, V, kColumns, kGrid> block(p, shared);
  block.copy_to(p.residence.kept);
  block.team.start();
  do {
    block.load_parameters();
    __pipeline_wait_prior(0);
    __syncthreads();
    block.reduce_units();
    block.reduce_channels();
    block.team.exchange([&] { block.copy_to(p.residence.slots); });
    block.project_groups();
    if (p.gradients.any()) block.write_totals();
    __syncthreads();
    if (p.dx != nullptr) {
      block.write_dx();
    } else if constexpr (kGrid) {
      block.copy_to(2 * p.residence.kept);
    }
  } while (block.next_item());
  block.team.leave();
}

inline cudaError_t launch_resident_backward(const BackwardParams& p, Dtype x, Dtype dy, cudaStream_t stream) {
  return dispatch_resident(x, dy, [&](auto x_type, auto dy_type) {
    using X = decltype(x_type);
    using Y = decltype(dy_type);
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    const bool grid = p.residence.exchange == Exchange::grid;
    const auto kernel =
        p.residence.columns
            ? (grid ? resident_backward<X, Y, V, true, true> : resident_backward<X, Y, V, true, false>)
            : (grid ? resident_backward<X, Y, V, false, true> : resident_backward<X, Y, V, false, false>);
    if (const cudaError_t error = launch_resident(kernel, p, stream)) return error;
    return launch_parameter_gradients<float>(p, stream);
  });
}

}  // namespace ldm_fused
