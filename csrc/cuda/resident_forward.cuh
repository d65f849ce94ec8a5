// GroupNorm and activation, forward, in one launch: a block copies its part of an item to shared memory, reduces it
// there, learns the whole item's statistics from its team, and applies them.
//
// Memory passes: reads x once, writes y once (2 B, the limit); what does not fit the chip is read again, last read
// first. Parallel over items (bundles of whole groups) and over the blocks of a team that shares one.
#pragma once

#include "cuda/moments.cuh"
#include "cuda/resident.cuh"

namespace ldm_fused {

// Merges the moments of neighbouring lanes, a power of two of them, without a division a lane: first the mean of all,
// then what deviates from it. All lanes of the warp must call it; all have the result.
__device__ __forceinline__ Moments<float> lanes_merge(const Moments<float>& own, int lanes) {
  const auto sum = [&](float value) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
  };
  const float count = sum(own.count);
  const float part = count > 0 ? own.count / count : 0.0f;
  const float mean = sum(part * own.mean), delta = own.mean - mean;
  return {count, mean, sum(own.m2 + own.count * delta * delta)};
}

// Merges `number` moments, of which f(i) gives one, by all lanes of a warp. The result is lane 0's.
template <class F>
__device__ __forceinline__ Moments<float> merge_in_warp(int number, F&& f) {
  Moments<float> part{}, sum{};
  if (lane_index() < number) part = f(lane_index());
  if (number == 1) return part;
  const float reference = __shfl_sync(kAllLanes, part.mean, 0);
  for (int i = lane_index(); i < number;) {
    part.mean -= reference;
    sum.merge(part);
    if ((i += 32) < number) part = f(i);
  }
  sum = lanes_reduce(sum, 32);
  sum.mean += reference;
  return sum;
}

template <class X, class Y, int V, bool kColumns, bool kGrid>
struct ResidentForward : ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X)) / 16> {
  using Block = ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X)) / 16>;
  using Vector = Vec<X, V>;
  using Affines = ChannelAffine<float>[Block::kChannels];
  using Block::item, Block::r, Block::shape, Block::slots, Block::tables, Block::team;
  static constexpr int kBatch = kBatchOf<Vector>;
  static constexpr int kOfStatistics = kColumns && kGrid ? kBatch : 2 * kBatch;  // averaged together: registers

  const ForwardParams& p;
  const X* const x;
  Y* const y;
  const Mask<float> mask;

  __device__ __forceinline__ ResidentForward(const ForwardParams& p, void* shared)
      : Block(p, shared, 2, 0), p(p), x(static_cast<const X*>(p.x)), y(static_cast<Y*>(p.y)), mask(p.dropout) {}

  __device__ __forceinline__ void copy_to(int end) {
    this->loader.copy_to(end, shape, r, [&](int slot, int64_t at) { slots.copy(slots[slot], x + at); });
  }

  // Fills the tables with what is known of the item's channels before its statistics are.
  __device__ __forceinline__ void load_parameters() const {
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      tables.set(c, channel_affine(p.affine, item.n, item.c + c, 0.0f, 1.0f));
    }
  }

  template <int N>
  __device__ __forceinline__ void read(Vector (&v)[N], int slot) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = slots.template read<X>(slots[slot + i]);
  }

  template <int N>
  __device__ __forceinline__ void load_again(Vector (&v)[N], const Span& span, int64_t at) const {
    const X* const from = x + at;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = load<X, V>(from + i * span.stride);
  }

  // Computes mean and m2 of each unit, in the order of the vectors in memory.
  __device__ __forceinline__ void reduce_units() const {
    Pair* const entries = reinterpret_cast<Pair*>(tables.entries);
    for (int round = 0, segment = 0; round < r.rounds; ++round) {
      const Span span = this->span(round);
      const int kept = min(r.kept - round * r.steps, r.steps);  // steps of the unit that are in slots; grid: or fewer
      ChannelMoments<float, Block::kChannels> moments{};
      float shift[Block::kChannels];
      for (int step = 0; step < kept; step += r.segment) {
        this->wait_for_segment(segment++);
        if (step == 0) {
          set_shift(shift, span.count > 0 ? slots.template read<X>(slots[this->slot_of(round * r.steps)]) : Vector{});
        }
        this->template each_kept<kOfStatistics>(
            span, round, step, min(step + r.segment, min(kept, span.count)),
            [&](auto n, int slot, int64_t) {
              Vector v[n.value];
              read(v, slot);
              moments.add(v, shift);
            },
            [](int) {});
      }
      if constexpr (kGrid) {
        if (kept <= 0) {
          Vector first[1]{};
          if (span.count > 0) load_again(first, span, span.first);
          set_shift(shift, first[0]);
          if (span.count > 0) moments.add(first, shift);
        }
        this->template each_of<kOfStatistics>(span, max(kept, 1), span.count, [&](auto n, int64_t at) {
          Vector v[n.value];
          load_again(v, span, at);
          moments.add(v, shift);
        });
      }
      if constexpr (kColumns) {
        merge_warp_rows(moments, r);
        if (lane_index() < r.lanes) {
#pragma unroll
          for (int e = 0; e < V; ++e) entries[span.entry + e] = {moments.mean[e] + shift[e], moments.m2[e]};
        }
      } else {
        const Moments<float> unit = lanes_merge({moments.count, moments.mean[0], moments.m2[0]}, r.lanes);
        if (lane_of_unit(r) == 0 && span.entry < r.entries) entries[span.entry] = {unit.mean + shift[0], unit.m2};
      }
    }
    __syncthreads();
  }

  // Elements of the unit's first vector: its lanes, or the lanes of its column, have them in common.
  __device__ __forceinline__ void set_shift(float (&shift)[Block::kChannels], const Vector& first) const {
    float values[V];
    widen(first, values);
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) {
      shift[c] =
          __shfl_sync(kAllLanes, values[c], kColumns ? r.by_lanes.remainder(lane_index()) : 0, kColumns ? 32 : r.lanes);
    }
  }

  // Computes mean and rstd of each group: a warp merges what its block has of one, then what the team has.
  __device__ __forceinline__ void reduce_groups() {
    const int channels = this->group_channels(), parts = parts_of<kColumns>(r);
    const int chunk = chunk_of(r, team.rank);
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      const Moments<float> own = merge_in_warp(chunk > 0 ? channels * parts : 0, [&](int i) {
        const int major = (kColumns ? r.by_group_channels : r.by_parts).quotient(i);
        const int minor = i - major * (kColumns ? channels : parts);
        const int part = kColumns ? major : minor, c = g * channels + (kColumns ? minor : major);
        const Pair entry = reinterpret_cast<const Pair*>(tables.entries)[entry_of<kColumns>(r, c, part)];
        return Moments<float>{float(vectors_of<kColumns>(r, chunk, part) * Block::kElements),
                              entry.a - tables.channel(Tables::kCenter, c), entry.b};
      });
      if (lane_index() == 0) reinterpret_cast<Pair*>(tables.exchange)[g] = {own.mean, own.m2};
    }
    team.exchange([&] { copy_to(r.slots); });
    for (int g = warp_index(); g < r.bundle; g += blockDim.x / 32) {
      const Moments<float> all = merge_in_warp(team.size, [&](int rank) {
        const float count = float(channels * Block::kElements) * chunk_of(r, rank);
        if (count == 0) return Moments<float>{};
        const Pair part = team.group_of(rank, g);
        return Moments<float>{count, part.a, part.b};
      });
      if (lane_index() > 0) continue;
      const float rstd = 1.0f / sqrtf(all.m2 / all.count + float(p.eps));
      tables.groups[g] = {all.mean, rstd};
      if (team.rank > 0 || p.mean == nullptr) continue;
      static_cast<float*>(p.mean)[this->first_group() + g] = all.mean;
      static_cast<float*>(p.rstd)[this->first_group() + g] = rstd;
    }
    __syncthreads();
  }

  // Completes the affine map of each channel, now that its group's statistics are known.
  __device__ __forceinline__ void complete_channels() const {
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const Pair group = tables.groups[r.by_group_channels.quotient(c)];
      tables.channel(Tables::kCenter, c) += group.a;
      tables.channel(Tables::kSlope, c) *= group.b;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void load_affine(const Span& span, Affines& affine) const {
    const auto center = tables.template read<Block::kChannels>(Tables::kCenter, span.channel);
    const auto slope = tables.template read<Block::kChannels>(Tables::kSlope, span.channel);
    const auto offset = tables.template read<Block::kChannels>(Tables::kOffset, span.channel);
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) affine[c] = {center.e[c], slope.e[c], offset.e[c]};
  }

  template <int N>
  __device__ __forceinline__ void write(const Vector (&v)[N], const Span& span, const Affines& affine,
                                        int64_t at) const {
    Y* const to = y + at;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float u[V];
      widen(v[i], u);
#pragma unroll
      for (int e = 0; e < V; ++e) u[e] = affine[kColumns ? e : 0](u[e]);
      store(to + i * span.stride, activated<Y>(mask, at + i * span.stride, p.silu, u));
    }
  }

  // Writes y of what did not fit, the last read first.
  __device__ __forceinline__ void write_what_is_not_kept() const {
    for (int round = r.rounds - 1; (round + 1) * r.steps > r.kept; --round) {
      const Span span = this->span(round);
      Affines affine;
      load_affine(span, affine);
      this->template each_back<kColumns ? kBatch : kOfStatistics>(
          span, max(r.kept - round * r.steps, 0), span.count, [&](auto n, int64_t at) {
            Vector v[n.value];
            load_again(v, span, at);
            write(v, span, affine, at);
          });
    }
  }

  // Writes y of what is in the slots, which the next item's vectors take.
  __device__ __forceinline__ void write_what_is_kept() {
    for (int round = 0; round < r.rounds && round * r.steps < r.kept; ++round) {
      const Span span = this->span(round);
      Affines affine;
      load_affine(span, affine);
      this->template each_kept<kBatch>(
          span, round, 0, min(r.kept - round * r.steps, span.count),
          [&](auto n, int slot, int64_t at) {
            Vector v[n.value];
            read(v, slot);
            write(v, span, affine, at);
          },
          [&](int step) {
            if constexpr (kGrid) copy_to(this->room_behind(round * r.steps + step));
          });
    }
    if constexpr (kGrid) copy_to(2 * r.kept);
  }
};

template <class X, class Y, int V, bool kColumns, bool kGrid>
__global__ void __launch_bounds__(kGrid ? kGridThreads : kMostThreads, 1) resident_forward(ForwardParams p) {
  LDM_FUSED_DYNAMIC_SHARED(unsigned char, shared);
  ResidentForward<X, Y, V, kColumns, kGrid> block(p, shared);
  block.copy_to(p.residence.kept);
  block.team.start();
  do {
    block.load_parameters();
    block.reduce_units();
    block.reduce_groups();
    block.team.has_read();
    block.complete_channels();
    if constexpr (kGrid) block.write_what_is_not_kept();
    block.write_what_is_kept();
  } while (block.next_item());
  block.team.leave();
}

inline cudaError_t launch_resident_forward(const ForwardParams& p, cudaStream_t stream) {
  return dispatch_resident(p.x_dtype, p.y_dtype, [&](auto x_type, auto y_type) {
    using X = decltype(x_type);
    using Y = decltype(y_type);
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    return launch_resident(
        choose(p.residence.columns, p.residence.exchange == Exchange::grid, resident_forward<X, Y, V, false, false>,
               resident_forward<X, Y, V, false, true>, resident_forward<X, Y, V, true, false>,
               resident_forward<X, Y, V, true, true>),
        p, stream);
  });
}

}  // namespace ldm_fused
