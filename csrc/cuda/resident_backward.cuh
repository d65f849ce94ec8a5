// GroupNorm and activation, backward, in one launch and a small one: a block copies its part of an item of x and dy to
// shared memory, sums up what the whole group's gradient needs, learns its team's sums, and writes dx.
//
// Memory passes: reads x and dy once, writes dx once (3 B, the limit); what does not fit the chip is read again, last
// read first. Parallel over items (bundles of whole groups) and over the blocks of a team that shares one. The totals
// of each channel, from which parameter_gradients() makes the parameters' gradients, come from the same sums.
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
__global__ void __launch_bounds__(kGrid ? kGridThreads : kMostThreads, 1) resident_backward(BackwardParams p) {
  constexpr int kChannels = kColumns ? V : 1;      // of a vector
  constexpr int kPairs = kBatchOf<Vec<X, V>> / 2;  // vectors of x and of dy that a thread works on side by side
  const Residence& r = p.residence;
  const X* const x = static_cast<const X*>(p.x);
  const Y* const dy = static_cast<const Y*>(p.dy);
  X* const dx = static_cast<X*>(p.dx);
  LDM_FUSED_DYNAMIC_SHARED(unsigned char, shared);
  const Tables tables(r, shared, p.sums, p.sums);
  const Slots<V> slots(r, shared);
  constexpr int kOfX = Slots<V>::template kPieces<X>, kPieces = kOfX + Slots<V>::template kPieces<Y>;
  const bool wants_totals = p.gradients.any();
  Team<kGrid> team(r, p.partials, tables, wants_totals ? p.sums : 0);
  const int group_channels = r.width / r.bundle;

  Item item = item_of(p.shape, r, team.index);
  Loader<kColumns, V> loader(p.shape, r, item.index, team.rank);
  const auto copy_to = [&](int end) {
    loader.copy_to(end, p.shape, r, [&](int slot, int64_t at) {
      slots.copy(slot * kPieces, x + at);
      slots.copy(slot * kPieces + kOfX, dy + at);
    });
  };
  copy_to(r.kept);
  team.start();

  for (int first_slot = 0; item.index < r.items;) {
    const int64_t first_group = p.shape.group(item.n, item.c);
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const int g = c / group_channels;
      const float mean = static_cast<const float*>(p.mean)[first_group + g];
      const float rstd = static_cast<const float*>(p.rstd)[first_group + g];
      const ChannelAffine<float> affine = channel_affine(p.affine, item.n, item.c + c, mean, rstd);
      tables.affine[c] = affine;
      if (c % group_channels == 0) tables.groups[g] = {mean, rstd};
    }
    __pipeline_wait_prior(0);
    __syncthreads();

    // The thread's vectors step, step + 1, ... of a unit, of which those between `from` and `to` are wanted, counted
    // from the item's first: calls f(i, x, dy) for each.
    const auto each = [&](const Span& span, int round, int step, int from, int to, auto&& f) {
      Vec<X, V> vx[kPairs];
      Vec<Y, V> vdy[kPairs];
      const auto is_wanted = [&](int i) {
        const int k = round * r.steps + step + i;
        return step + i < r.steps && step + i < span.count && k >= from && k < to;
      };
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!is_wanted(i)) continue;
        const int k = round * r.steps + step + i;
        if (!kGrid || k < r.kept) {
          const int slot = first_slot + k < r.slots ? first_slot + k : first_slot + k - r.slots;
          vx[i] = slots.template read<X>(slot * kPieces);
          vdy[i] = slots.template read<Y>(slot * kPieces + kOfX);
        } else {
          vx[i] = load<X, V>(x + span.at(step + i));
          vdy[i] = load<Y, V>(dy + span.at(step + i));
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (is_wanted(i)) f(step + i, vx[i], vdy[i]);
      }
    };

    // Sums of the units.
    for (int round = 0; round < r.rounds; ++round) {
      const Span span = span_of<kColumns, V>(p.shape, r, item, team.rank, round);
      ChannelAffine<float> affine[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) affine[c] = tables.affine[span.channel + c];
      ChannelSums<kChannels> sums{};
      for (int step = 0; step < r.steps; step += kPairs) {
        each(span, round, step, 0, r.total(), [&](int, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const int c = kColumns ? e : 0;
            accumulate<kFast<X>>(sums.of[c], affine[c], float(widen(vx.e[e])), float(widen(vdy.e[e])), p.silu);
          }
        });
      }
      if constexpr (kColumns) {
        merge_warp_rows(sums, r.lanes);
        if (lane_index() < r.lanes) {
#pragma unroll
          for (int e = 0; e < V; ++e) store_sums(tables.entries + span.entry + e, r.entries, p.sums, sums.of[e]);
        }
      } else {
        const GradientSums<float> unit = lanes_reduce(sums.of[0], r.lanes);
        if (threadIdx.x % r.lanes == 0 && span.entry < r.entries) {
          store_sums(tables.entries + span.entry, r.entries, p.sums, unit);
        }
      }
    }
    __syncthreads();

    // Sums of the channels, then of the groups; of what the block has, then of what the team has.
    const int parts = parts_of<kColumns>(r);
    float* const totals = tables.exchange + 2 * r.bundle;
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      GradientSums<float> channel{};
      for (int part = 0; part < parts; ++part) {
        channel.merge(load_sums(tables.entries + entry_of<kColumns>(r, c, part), r.entries, p.sums));
      }
      store_sums(totals + c, r.width, p.sums, channel);
    }
    __syncthreads();
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      Pair group{};
      for (int c = g * group_channels + lane_index(); c < (g + 1) * group_channels; c += 32) {
        group.a += tables.affine[c].slope * totals[c];
        group.b += tables.affine[c].slope * totals[r.width + c];
      }
      group = {warp_sum(group.a), warp_sum(group.b)};
      if (lane_index() == 0) reinterpret_cast<Pair*>(tables.exchange)[g] = group;
    }
    team.exchange([&] { copy_to(r.slots); });
    const float elements = float(group_channels) * p.shape.spatial;
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      Pair group{};
      for (int rank = lane_index(); rank < team.size; rank += 32) {
        const Pair part = team.group_of(rank, g);
        group.a += part.a;
        group.b += part.b;
      }
      group = {warp_sum(group.a), warp_sum(group.b)};
      if (lane_index() == 0) {
        const float rstd = tables.groups[g].b;
        const Projection<float> projection{group.a / elements, (group.b / elements) * rstd * rstd};
        tables.groups[g] = {projection.k1, projection.k2};
        if (team.rank == 0 && p.gradients.pre_bias.data) {
          static_cast<Projection<float>*>(p.projections)[first_group + g] = projection;
        }
      }
    }
    // The blocks of a team share the channels, in runs that fill a sector.
    constexpr int kRun = 8;
    for (int i = threadIdx.x; wants_totals && i / kRun * kRun * team.size < r.width; i += blockDim.x) {
      const int c = (i / kRun * team.size + team.rank) * kRun + i % kRun;
      if (c >= r.width) continue;
      GradientSums<float> channel{};
      for (int rank = 0; rank < team.size; ++rank) {
        channel.merge(load_sums(team.channels_of(rank) + c, r.width, p.sums));
      }
      store_sums(static_cast<float*>(p.totals) + item.n * p.shape.channels + item.c + c, p.shape.rows(), p.sums,
                 channel);
    }
    __syncthreads();

    // dx: first of what did not fit, last read first.
    const auto put = [&](int round, int first_step, int end_step, int by, int from, int to) {
      const Span span = span_of<kColumns, V>(p.shape, r, item, team.rank, round);
      ChannelGradient<float> channel[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const Pair* const projection = tables.groups + (span.channel + c) / group_channels;
        channel[c] = {tables.affine[span.channel + c], {projection->a, projection->b}};
      }
      for (int step = first_step; step != end_step; step += by) {
        each(span, round, step, from, to, [&](int i, const Vec<X, V>& vx, const Vec<Y, V>& vdy) {
          Vec<X, V> out;
#pragma unroll
          for (int e = 0; e < V; ++e) {
            out.e[e] =
                input_gradient<X>(channel[kColumns ? e : 0], float(widen(vx.e[e])), float(widen(vdy.e[e])), p.silu);
          }
          store(dx + span.at(i), out);
        });
        if constexpr (kGrid) {
          if (by > 0) copy_to(min(round * r.steps + min(step + kPairs, r.steps) + r.slots, 2 * r.kept));
        }
      }
    };
    const int steps = (r.steps + kPairs - 1) / kPairs * kPairs;
    if constexpr (kGrid) {
      for (int round = r.rounds - 1; dx != nullptr && r.kept < (round + 1) * r.steps; --round) {
        put(round, steps - kPairs, -kPairs, -kPairs, r.kept, r.total());
      }
    }
    for (int round = 0; dx != nullptr && round < r.rounds && round * r.steps < r.kept; ++round) {
      put(round, 0, steps, kPairs, 0, r.kept);
    }

    if constexpr (!kGrid) break;
    if (dx == nullptr) copy_to(2 * r.kept);
    loader.next_item(r);
    team.next_item();
    first_slot += r.kept;
    if (first_slot >= r.slots) first_slot -= r.slots;
    item = item_of(p.shape, r, item.index + r.teams);
    __syncthreads();  // before the tables are written anew
  }
  team.leave();
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
