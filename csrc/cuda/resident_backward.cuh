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

// Gradient sums of kChannels channels.
template <int kChannels>
struct VectorSums {
  GradientSums<float> of[kChannels];

  __device__ __forceinline__ void merge(const VectorSums& other) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) of[c].merge(other.of[c]);
  }
};

template <class X, class Y, int V, bool kColumns, bool kGrid>
struct ResidentBackward : ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X) + sizeof(Y)) / 16> {
  using Block = ResidentBlock<V, kColumns, kGrid, V* int(sizeof(X) + sizeof(Y)) / 16>;
  using Block::item, Block::r, Block::shape, Block::slots, Block::tables, Block::team;
  using VectorX = Vec<X, V>;
  using VectorY = Vec<Y, V>;
  using Channels = ChannelGradient<float>[Block::kChannels];
  // dz, once computed, takes dy's place in the slot: no second exponential. In 16 bits that rounds it as PyTorch's own
  // backward does between its two kernels (NOTES.md has the errors); it must not be coarser than dx.
  static constexpr bool kKeepsGradient = sizeof(Y) >= sizeof(X);
  static constexpr int kOfX = V * int(sizeof(X)) / 16;  // pieces of a slot; dy's are behind them
  static constexpr bool kFewRegisters = kColumns && kGrid;
  static constexpr int kBatch = kBatchOf<VectorX> / (kFewRegisters && sizeof(Y) > sizeof(X) ? 4 : 2);  // of x and of dy
  static constexpr int kOfDx = kKeepsGradient && !kFewRegisters ? kBatchOf<VectorX> : kBatch;
  static constexpr int kSums = kColumns ? V : 2;  // side by side, where one would be a long chain

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
      slots.copy(slots[slot], x + at);
      slots.copy(dy_of(slot), dy + at);
    });
  }

  __device__ __forceinline__ uint4* dy_of(int slot) const { return slots[slot] + kOfX * int(blockDim.x); }

  // The affine map of the item's channels; mean and rstd of its groups.
  __device__ __forceinline__ void load_parameters() const {
    const int64_t first_group = this->first_group();
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const int g = r.by_group_channels.quotient(c);
      const float mean = static_cast<const float*>(p.mean)[first_group + g];
      const float rstd = static_cast<const float*>(p.rstd)[first_group + g];
      tables.set(c, channel_affine(p.affine, item.n, item.c + c, mean, rstd));
      if (c == g * this->group_channels()) tables.groups[g] = {mean, rstd};
    }
  }

  // What vectors of the unit are computed with; k1 and k2 once the team knows them.
  __device__ __forceinline__ void load_channels(const Span& span, Channels& channel, bool projects) const {
    const auto read = [&](Tables::Value value) { return tables.template read<Block::kChannels>(value, span.channel); };
    const auto center = read(Tables::kCenter), slope = read(Tables::kSlope), offset = read(Tables::kOffset);
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) channel[c] = {{center.e[c], slope.e[c], offset.e[c]}, {}};
    if (!projects) return;
    const auto k1 = read(Tables::kK1), k2 = read(Tables::kK2);
#pragma unroll
    for (int c = 0; c < Block::kChannels; ++c) channel[c].projection = {k1.e[c], k2.e[c]};
  }

  // Reads N vectors of x and dy from the slots; load_again() loads those that did not fit.
  template <int N>
  __device__ __forceinline__ void read(VectorX (&vx)[N], VectorY (&vdy)[N], int slot) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      vx[i] = slots.template read<X>(slots[slot + i]);
      vdy[i] = slots.template read<Y>(dy_of(slot + i));
    }
  }

  template <int N>
  __device__ __forceinline__ void load_again(VectorX (&vx)[N], VectorY (&vdy)[N], const Span& span, int64_t at) const {
    const X* const from_x = x + at;
    const Y* const from_dy = dy + at;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      vx[i] = load<X, V>(from_x + i * span.stride);
      vdy[i] = load<Y, V>(from_dy + i * span.stride);
    }
  }

  // The sums of each unit, in the order of the vectors in memory.
  __device__ __forceinline__ void reduce_units() const {
    for (int round = 0, segment = 0; round < r.rounds; ++round) {
      const Span span = this->span(round);
      const int kept = min(r.kept - round * r.steps, r.steps);  // steps of the unit that are in slots; grid: or fewer
      Channels channel;
      load_channels(span, channel, false);
      GradientSums<float> sums[kSums]{};
      for (int step = 0; step < kept; step += r.segment) {
        this->wait_for_segment(segment++);
        this->template each_kept<kBatch>(
            span, round, step, min(step + r.segment, min(kept, span.count)),
            [&](auto n, int slot, int64_t at) {
              VectorX vx[n.value];
              VectorY vdy[n.value];
              read(vx, vdy, slot);
#pragma unroll
              for (int i = 0; i < n.value; ++i) {
                float dz[V];
                add_vector<kFast<X>>(sums, mask, at + i * span.stride, p.silu, p.sums == 3, channel, vx[i], vdy[i], dz);
                if constexpr (kKeepsGradient) slots.write(dy_of(slot + i), narrow<Y, V>(dz));
              }
            },
            [](int) {});
      }
      if constexpr (kGrid) {
        this->template each_of<kOfDx>(span, max(kept, 0), span.count, [&](auto n, int64_t at) {
          VectorX vx[n.value];
          VectorY vdy[n.value];
          load_again(vx, vdy, span, at);
#pragma unroll
          for (int i = 0; i < n.value; ++i) {
            float dz[V];
            add_vector<kFast<X>>(sums, mask, at + i * span.stride, p.silu, p.sums == 3, channel, vx[i], vdy[i], dz);
          }
        });
      }
      float* const entry = tables.entries + span.entry;
      if constexpr (kColumns) {
        VectorSums<Block::kChannels> columns;
#pragma unroll
        for (int e = 0; e < V; ++e) columns.of[e] = sums[e];
        merge_warp_rows(columns, r);
        if (lane_index() < r.lanes) {
#pragma unroll
          for (int e = 0; e < V; ++e) store_sums(entry + e, r.entries, p.sums, columns.of[e]);
        }
      } else {
        sums[0].merge(sums[1]);
        const GradientSums<float> unit = lanes_reduce(sums[0], r.lanes);
        if (lane_of_unit(r) == 0 && span.entry < r.entries) store_sums(entry, r.entries, p.sums, unit);
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
        group.a += tables.channel(Tables::kSlope, c) * totals[c];
        group.b += tables.channel(Tables::kSlope, c) * totals[r.width + c];
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
        static_cast<Projection<float>*>(p.projections)[this->first_group() + g] = projection;
      }
    }
  }

  // Gives each channel the k1 and k2 of its group.
  __device__ __forceinline__ void complete_channels() const {
    for (int c = threadIdx.x; c < r.width; c += blockDim.x) {
      const Pair group = tables.groups[r.by_group_channels.quotient(c)];
      tables.channel(Tables::kK1, c) = group.a;
      tables.channel(Tables::kK2, c) = group.b;
    }
    __syncthreads();
  }

  // Writes the totals of each channel. The blocks of a team share the channels, in runs that fill a sector. A warp adds
  // up a run: each eight lanes take a quarter of the team's blocks.
  __device__ __forceinline__ void write_totals() const {
    constexpr int kRun = 8, kAbreast = 32 / kRun;
    float* const totals = static_cast<float*>(p.totals) + item.n * shape.channels + item.c;
    for (int first = (warp_index() * team.size + team.rank) * kRun; first < r.width;
         first += blockDim.x / 32 * team.size * kRun) {
      const int c = first + lane_index() % kRun;
      GradientSums<float> sum{};
#pragma unroll 8
      for (int rank = lane_index() / kRun; rank < team.size && c < r.width; rank += kAbreast) {
        sum.merge(load_sums(team.channels_of(rank) + c, r.width, p.sums));
      }
#pragma unroll
      for (int lanes = kRun; lanes < 32; lanes *= 2) {
        sum.dz += __shfl_xor_sync(kAllLanes, sum.dz, lanes);
        sum.dz_x += __shfl_xor_sync(kAllLanes, sum.dz_x, lanes);
        sum.x += __shfl_xor_sync(kAllLanes, sum.x, lanes);
      }
      if (lane_index() < kRun && c < r.width) store_sums(totals + c, shape.rows(), p.sums, sum);
    }
  }

  // Writes dx of N vectors. vdy is dz already, or still dy.
  template <bool kIsGradient, int N>
  __device__ __forceinline__ void write(const VectorX (&vx)[N], const VectorY (&vdy)[N], const Span& span,
                                        const Channels& channel, int64_t at) const {
    X* const to = dx + at;
    VectorX other[N]{};
    if (shortcut != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) other[i] = load<X, V>(shortcut + at + i * span.stride);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float centered[V], dz[V];
      center(vx[i], channel, centered);
      if constexpr (kIsGradient) {
        widen(vdy[i], dz);
      } else {
        activation_gradient<kFast<X>>(mask, at + i * span.stride, p.silu, vdy[i], channel, centered, dz);
      }
      store(to + i * span.stride, input_gradient(channel, centered, dz, other[i], shortcut != nullptr));
    }
  }

  // Writes dx: first of what did not fit, the last read first, then of what is in the slots, which the next item's
  // vectors take.
  __device__ __forceinline__ void write_dx() {
    if constexpr (kGrid) {
      for (int round = r.rounds - 1; (round + 1) * r.steps > r.kept; --round) {
        const Span span = this->span(round);
        Channels channel;
        load_channels(span, channel, true);
        this->template each_back<kOfDx>(span, max(r.kept - round * r.steps, 0), span.count, [&](auto n, int64_t at) {
          VectorX vx[n.value];
          VectorY vdy[n.value];
          load_again(vx, vdy, span, at);
          write<false>(vx, vdy, span, channel, at);
        });
      }
    }
    for (int round = 0; round < r.rounds && round * r.steps < r.kept; ++round) {
      const Span span = this->span(round);
      Channels channel;
      load_channels(span, channel, true);
      this->template each_kept<kOfDx>(
          span, round, 0, min(r.kept - round * r.steps, span.count),
          [&](auto n, int slot, int64_t at) {
            VectorX vx[n.value];
            VectorY vdy[n.value];
            read(vx, vdy, slot);
            write<kKeepsGradient>(vx, vdy, span, channel, at);
          },
          [&](int step) {
            if constexpr (kGrid) copy_to(this->room_behind(round * r.steps + step));
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
    __syncthreads();
    block.reduce_units();
    block.reduce_channels();
    block.team.exchange([&] { block.copy_to(p.residence.slots); });
    block.project_groups();
    if (!kGrid && p.gradients.any()) block.write_totals();
    __syncthreads();
    block.team.has_read();
    block.complete_channels();
    if (p.dx != nullptr) block.write_dx();
    if constexpr (kGrid) {
      block.copy_to(2 * p.residence.kept);
      if (p.gradients.any()) block.write_totals();  // no other block waits for them
    }
  } while (block.next_item());
  block.team.leave();
}

inline cudaError_t launch_resident_backward(const BackwardParams& p, cudaStream_t stream) {
  return dispatch_resident(p.x_dtype, p.dy_dtype, [&](auto x_type, auto dy_type) {
    using X = decltype(x_type);
    using Y = decltype(dy_type);
    constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));
    const cudaError_t error = launch_resident(
        choose(p.residence.columns, p.residence.exchange == Exchange::grid, resident_backward<X, Y, V, false, false>,
               resident_backward<X, Y, V, false, true>, resident_backward<X, Y, V, true, false>,
               resident_backward<X, Y, V, true, true>),
        p, stream);
    return error ? error : launch_parameter_gradients<float>(p, stream);
  });
}

}  // namespace ldm_fused
