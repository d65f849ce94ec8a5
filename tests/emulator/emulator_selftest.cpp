// Toy kernels, right ones and wrong ones, with which tests/test_emulator.py tests the emulator itself.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// ---- Right ones -----------------------------------------------------------------------------------------------

__global__ void write_indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int* to = out + 6 * (block * threads + thread);
  to[0] = blockIdx.x, to[1] = blockIdx.y, to[2] = blockIdx.z;
  to[3] = threadIdx.x, to[4] = threadIdx.y, to[5] = threadIdx.z;
}

__device__ float warp_sum(float value) {
  for (int by = warpSize / 2; by > 0; by /= 2) value += __shfl_xor_sync(0xffffffffu, value, by);
  return value;
}

// The sum of `value` over the block, in all its threads. `partial` is used again by the next call, so the barrier
// before its first write is as necessary as the one before its first read: each can be left out here.
template <bool BarrierBeforeWrite, bool BarrierBeforeRead>
__device__ float block_sum(float value) {
  using Partial = float[32];
  LDM_FUSED_SHARED(Partial, partial);
  value = warp_sum(value);
  if (BarrierBeforeWrite) __syncthreads();
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = value;
  if (BarrierBeforeRead) __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / warpSize; ++w) sum += partial[w];
  return sum;
}

// y = (x - mean) / std of each row; a block a row. One read and one write of x, which stays in shared memory.
template <bool BarrierBeforeWrite, bool BarrierBeforeRead>
__global__ void __launch_bounds__(1024) normalize(const float* __restrict__ x, float* __restrict__ y, int columns) {
  LDM_FUSED_DYNAMIC_SHARED(float, kept);
  x += int64_t(blockIdx.x) * columns;
  y += int64_t(blockIdx.x) * columns;
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += kept[i] = x[i];
  const float mean = block_sum<BarrierBeforeWrite, BarrierBeforeRead>(sum) / columns;
  float squares = 0;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) squares += (kept[i] - mean) * (kept[i] - mean);
  const float rstd = rsqrtf(block_sum<BarrierBeforeWrite, BarrierBeforeRead>(squares) / columns);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = (kept[i] - mean) * rstd;
}

enum Shuffle { indexed, up, down, exclusive_or };

template <class T>
__global__ void shuffle(Shuffle kind, const T* in, T* out, int by, int width) {
  const T value = in[threadIdx.x];
  switch (kind) {
    case indexed: out[threadIdx.x] = __shfl_sync(0xffffffffu, value, by, width); break;
    case up: out[threadIdx.x] = __shfl_up_sync(0xffffffffu, value, by, width); break;
    case down: out[threadIdx.x] = __shfl_down_sync(0xffffffffu, value, by, width); break;
    case exclusive_or: out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, by, width); break;
  }
}

// The two halves of a warp take different ways, and meet again.
__global__ void vote(const int* in, unsigned* out) {
  const int predicate = in[threadIdx.x], lane = threadIdx.x % warpSize;
  unsigned* to = out + 7 * threadIdx.x;
  if (lane < 16) {
    to[0] = __ballot_sync(0x0000ffffu, predicate);
  } else {
    to[0] = __ballot_sync(0xffff0000u, predicate);
  }
  __syncwarp();
  to[1] = __any_sync(0xffffffffu, predicate);
  to[2] = __all_sync(0xffffffffu, predicate);
  to[3] = __syncthreads_count(predicate);
  to[4] = __syncthreads_or(predicate);
  to[5] = __syncthreads_and(predicate);
  to[6] = __activemask();
}

// The last block to finish adds up what all blocks have written. Without a fence it may see nothing of it.
template <bool Fence>
__global__ void count_threads(unsigned* per_block, unsigned* finished, unsigned* total) {
  LDM_FUSED_SHARED(bool, last);
  unsigned count = __syncthreads_count(true);
  if (threadIdx.x == 0) {
    per_block[blockIdx.x] = count;
    if (Fence) __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    if (Fence) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x < gridDim.x) atomicAdd(total, per_block[threadIdx.x]);
}

// Adds up over a cluster, in distributed shared memory. The first barrier is needed because others read what a block
// writes, the last because a block's shared memory is gone when it exits.
template <bool BarrierBefore, bool BarrierAfter>
__global__ void cluster_sum(const int* in, int* out) {
  const auto cluster = cooperative_groups::this_cluster();
  LDM_FUSED_DYNAMIC_SHARED(int, own);
  own[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (BarrierBefore) cluster.sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += cluster.map_shared_rank(own, rank)[threadIdx.x];
  if (BarrierAfter) cluster.sync();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Each block writes, and after the grid's barrier reads what the next one has written.
template <bool Barrier>
__global__ void rotate(const int* in, int* between, int* out) {
  const unsigned here = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  between[here] = in[here];
  if (Barrier) cooperative_groups::this_grid().sync();
  out[here] = between[(here + blockDim.x) % all];
}

// The same with a barrier made by hand.
template <bool Fence>
__global__ void rotate_by_hand(const int* in, int* between, unsigned* arrived, int* out) {
  const unsigned here = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  between[here] = in[here];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (Fence) __threadfence();
    atomicAdd(arrived, 1);
    while (atomicAdd(arrived, 0) < gridDim.x) __nanosleep(20);
    if (Fence) __threadfence();
  }
  __syncthreads();
  out[here] = between[(here + blockDim.x) % all];
}

// All blocks read what block 0 has written, which writes anew when all have read, if it waits for them.
template <bool Waits>
__global__ void broadcast(int* between, unsigned* arrived, int* out) {
  unsigned target = 0;
  const auto meet = [&] {
    __syncthreads();
    target += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (atomicAdd(arrived, 0) < target) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  };
  if (blockIdx.x == 0) between[threadIdx.x] = int(threadIdx.x);
  meet();
  out[blockIdx.x * blockDim.x + threadIdx.x] = between[(threadIdx.x + 1) % blockDim.x];
  if (Waits) meet();
  __syncthreads();
  if (blockIdx.x == 0) between[threadIdx.x] = 0;
}

// Lanes hand values on through shared memory within their warp.
template <bool Barrier>
__global__ void next_lane(int* out) {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  values[threadIdx.x] = threadIdx.x;
  if (Barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Each thread reads `bytes` bytes, a multiple of 4, at its own place, `stride` bytes behind the one before.
__global__ void strided_reads(const char* in, int stride, int bytes, int* out) {
  int sum = 0;
  for (int i = 0; i < bytes; i += 4) sum += *reinterpret_cast<const int*>(in + threadIdx.x * stride + i);
  if (sum == 1) out[0] = sum;
}
__global__ void vector_reads(const int4* in, int4* out) { out[threadIdx.x] = in[threadIdx.x]; }

__global__ void async_vector_reads(const int4* in, int4* out) {
  using Values = int4[32];
  LDM_FUSED_SHARED(Values, values);
  __pipeline_memcpy_async(&values[threadIdx.x], &in[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = values[threadIdx.x];
}

enum Mistake { none, no_commit, no_wait, waits_for_too_few, no_barrier_before_read, no_barrier_after_read };

// Reverses each tile of 64 elements. Two of them have a place in shared memory: while one is read, the next is copied.
template <class T>
__global__ void reverse_tiles(const T* in, T* out, int count, Mistake mistake) {
  using Tiles = T[2][64];
  LDM_FUSED_SHARED(Tiles, tiles);
  const unsigned here = threadIdx.x;
  const auto copy = [&](int tile) {
    __pipeline_memcpy_async(&tiles[tile % 2][here], &in[tile * 64 + here], sizeof(T));
    if (mistake != no_commit) __pipeline_commit();
  };
  copy(0);
  for (int tile = 0; tile < count; ++tile) {
    const bool is_last = tile + 1 == count;
    if (!is_last) copy(tile + 1);
    if (mistake != no_wait) __pipeline_wait_prior((is_last ? 0 : 1) + (mistake == waits_for_too_few));
    if (mistake != no_barrier_before_read) __syncthreads();
    out[tile * 64 + here] = tiles[tile % 2][63 - here];
    if (mistake != no_barrier_after_read) __syncthreads();
  }
}

// ---- Wrong ones -----------------------------------------------------------------------------------------------

__global__ void divergent_barrier() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_exit() {
  if (threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void missing_lanes(int* out) {
  if (threadIdx.x % warpSize < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void mixed_masks(int* out) {
  const int lane = threadIdx.x % warpSize;
  out[threadIdx.x] = __shfl_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, 1, 16);
}

__global__ void foreign_mask() { __syncwarp(0x0000ffffu); }

__global__ void absent_source(int* out) {
  if (threadIdx.x % warpSize < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void trap() {
  if (blockIdx.x == 1 && threadIdx.x == 33) __trap();
  __syncthreads();
}

__global__ void misaligned(int* x) { *reinterpret_cast<int4*>(x) = *reinterpret_cast<const int4*>(x + 3); }
__global__ void reads_past_global(const int* x, int* out) {
  if (x[threadIdx.x] == 1) out[0] = 1;
}
__global__ void writes_past_global(int* out) { out[threadIdx.x] = 1; }
__global__ void reads_before_global(const int* x, int* out) { out[0] = x[-1]; }

__global__ void reads_past_shared(int* out) {
  using Few = int[8];
  LDM_FUSED_SHARED(Few, few);
  if (threadIdx.x < 8) few[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = few[8 + blockIdx.x];
}

__global__ void writes_past_dynamic_shared() {
  LDM_FUSED_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 0;
}

// By way of other memory, so that each place is looked up anew.
__global__ void writes_the_end_first(int* memory, int* out) {
  memory[40] = 1;
  memory[0] = 2;
  out[0] = 3;
  out[0] = memory[0];
}

__global__ void reads_unwritten_shared(int* out) {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  if (threadIdx.x != 33) values[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = values[33];
}

__global__ void all_write_one(int* out) { out[0] = threadIdx.x; }
__global__ void blocks_write_one(int* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}
__global__ void writes_what_others_read(int* out) {
  const int before = out[0];
  if (threadIdx.x == 63 && before == 0) out[0] = 1;
}
__global__ void plain_beside_atomic(unsigned* out) {
  if (threadIdx.x == 0) atomicAdd(out, 1);
  if (threadIdx.x == 40) out[0] = 0;
}
__global__ void waits_for_nobody(unsigned* out) {
  while (atomicAdd(out, 0) == 0) __nanosleep(20);
}
__global__ void spins(volatile unsigned* out) {
  while (out[0] == 0) {
  }
}
__global__ void one_block_leaves_the_grid() {
  if (blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
}

__device__ int* some_shared() {
  using Values = int[64];
  LDM_FUSED_SHARED(Values, values);
  return values;
}

__device__ int* copies_own(const int* in) {
  int* const own = some_shared() + threadIdx.x;
  __pipeline_memcpy_async(own, in + threadIdx.x, sizeof *own);
  __pipeline_commit();
  return own;
}

__global__ void copies_misaligned_from(const int* in) { __pipeline_memcpy_async(some_shared(), in + 1, 16); }
__global__ void copies_misaligned_to(const int* in) { __pipeline_memcpy_async(some_shared() + 1, in, 8); }
__global__ void copies_12_bytes(const int* in) { __pipeline_memcpy_async(some_shared(), in, 12); }
__global__ void copies_zeros(const int* in) { __pipeline_memcpy_async(some_shared(), in, 16, 4); }
__global__ void copies_from_shared() {
  int* const own = some_shared() + 2 * (threadIdx.x / 2);
  own[threadIdx.x % 2] = 1;
  __syncthreads();
  __pipeline_memcpy_async(own, own + 1, 4);
}
__global__ void copies_to_global(const int* in, int* out) { __pipeline_memcpy_async(out, in, 4); }
__global__ void copies_past_global(const int* in) { __pipeline_memcpy_async(some_shared(), in + 8, 4); }
__global__ void copies_and_exits(const int* in) { copies_own(in); }
__global__ void copies_uncommitted_and_exits(const int* in) {
  __pipeline_memcpy_async(some_shared() + threadIdx.x, in + threadIdx.x, 4);
  __pipeline_wait_prior(0);
}
__global__ void reads_what_was_there(const int* in, int* out) {
  some_shared()[threadIdx.x] = 1;
  out[0] = *copies_own(in);
}
__global__ void overwrites_copy(const int* in) {
  *copies_own(in) = 1;
  __pipeline_wait_prior(0);
}
__global__ void copies_twice(const int* in) {
  copies_own(in);
  copies_own(in);
  __pipeline_wait_prior(0);
}
__global__ void copies_what_others_read(const int* in, int* out) {
  int* const values = some_shared();
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
  copies_own(in);
  __pipeline_wait_prior(0);
}
__global__ void changes_source(int* in) {
  copies_own(in);
  in[threadIdx.x] ^= 1;
  __pipeline_wait_prior(0);
}
__global__ void reads_copy_of_neighbour(const int* in, int* out) {
  copies_own(in);
  __syncthreads();
  __pipeline_wait_prior(0);
  out[threadIdx.x] = some_shared()[threadIdx.x ? threadIdx.x - 1 : 0];
}

// For AddressSanitizer alone to see: an overflow on the stack of a thread that has been suspended.
__attribute__((no_sanitize("undefined"))) __global__ void stack_overflow(int index, int* out) {
  int local[4] = {1, 2, 3, 4};
  __syncthreads();
  local[index] = 5;
  __syncthreads();
  out[0] = local[0];
}

// ---- Python ---------------------------------------------------------------------------------------------------

// Memory that the next launch may touch.
template <class T>
static T* give(T* memory, size_t elements) {
  emulator::allow(const_cast<std::remove_const_t<T>*>(memory), elements * sizeof(T), false);
  return memory;
}
template <class T>
static const T* in(const Array<T>& array) {
  return give(array.data(), size_t(array.size()));
}
template <class T>
static T* out(Array<T>& array) {
  return give(array.mutable_data(), size_t(array.size()));
}

struct Config : cudaLaunchConfig_t {
  cudaLaunchAttribute attributes[2];

  Config(std::vector<unsigned> grid, std::vector<unsigned> block, size_t shared_bytes = 0, unsigned cluster = 1,
         bool cooperative = false)
      : cudaLaunchConfig_t{} {
    grid.resize(3, 1);
    block.resize(3, 1);
    gridDim = dim3(grid[0], grid[1], grid[2]);
    blockDim = dim3(block[0], block[1], block[2]);
    dynamicSmemBytes = shared_bytes;
    attrs = attributes;
    if (cluster > 1) {
      attributes[numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[numAttrs++].val.clusterDim = {cluster, 1, 1};
    }
    if (cooperative) {
      attributes[numAttrs].id = cudaLaunchAttributeCooperative;
      attributes[numAttrs++].val.cooperative = 1;
    }
  }
  Config(const Config&) = delete;
};

template <class... Parameters, class... Arguments>
static void launch(const Config& config, void (*kernel)(Parameters...), Arguments... arguments) {
  struct Given {
    ~Given() { emulator::forget_allowed(); }
  } given;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaGetLastError()) throw std::logic_error("cudaGetLastError() is not the launch's error");
  if (error != cudaSuccess) throw std::invalid_argument(cudaGetErrorString(error));
}

template <class T>
static Array<T> run_shuffle(Shuffle kind, Array<T> values, int by, int width) {
  Array<T> shuffled(values.size());
  launch(Config({1}, {unsigned(values.size())}), shuffle<T>, kind, in(values), out(shuffled), by, width);
  return shuffled;
}

template <class T>
static py::bytes run_reverse_tiles(py::buffer tiles, Mistake mistake) {
  const py::buffer_info info = tiles.request();
  const size_t count = size_t(info.size * info.itemsize) / sizeof(T);
  std::vector<T> values(count), reversed(count);
  memcpy(values.data(), info.ptr, count * sizeof(T));
  launch(Config({1}, {64}), reverse_tiles<T>, give<const T>(values.data(), count), give(reversed.data(), count),
         int(count / 64), mistake);
  return py::bytes(reinterpret_cast<const char*>(reversed.data()), count * sizeof(T));
}

PYBIND11_MODULE(emulator_selftest, m) {
  m.def("set_order", &emulator::set_order, py::arg("order"), py::arg("seed") = 0);
  m.def("set_device", [](int multiprocessors, int major, int shared_per_block) {
    emulator::device.multiprocessors = multiprocessors;
    emulator::device.major = major;
    emulator::device.shared_per_block = shared_per_block;
  });

  m.def("indices", [](std::vector<unsigned> grid, std::vector<unsigned> block) {
    const Config config(grid, block);
    const dim3 g = config.gridDim, b = config.blockDim;
    Array<int> indices({g.z, g.y, g.x, b.z, b.y, b.x, 6u});
    launch(config, write_indices, out(indices));
    return indices;
  });

  // Memory that was freed and given again, and is more now.
  m.def("memory_given_again", [] {
    std::vector<int> memory(64, -1);
    Array<int> result(1);
    emulator::allow(memory.data(), 32 * sizeof(int), true);
    emulator::allow(memory.data(), 64 * sizeof(int), true);
    launch(Config({1}, {1}), writes_the_end_first, memory.data(), out(result));
    return result;
  });

  m.def(
      "normalize",
      [](Array<float> x, unsigned threads, bool before_write, bool before_read) {
        const int columns = int(x.shape(1));
        Array<float> y({x.shape(0), x.shape(1)});
        const Config config({unsigned(x.shape(0))}, {threads}, columns * sizeof(float));
        auto* kernel = !before_write  ? normalize<false, true>
                       : !before_read ? normalize<true, false>
                                      : normalize<true, true>;
        launch(config, kernel, in(x), out(y), columns);
        return y;
      },
      py::arg("x"), py::arg("threads") = 256, py::arg("before_write") = true, py::arg("before_read") = true);

  py::dict kinds;
  for (auto [name, kind] : {std::pair("idx", indexed), {"up", up}, {"down", down}, {"xor", exclusive_or}}) {
    kinds[name] = int(kind);
  }
  m.attr("shuffles") = kinds;
  m.def("shuffle", [](int kind, py::array values, int by, int width) -> py::array {
    if (values.dtype().is(py::dtype::of<float>())) return run_shuffle<float>(Shuffle(kind), values, by, width);
    if (values.dtype().is(py::dtype::of<double>())) return run_shuffle<double>(Shuffle(kind), values, by, width);
    if (values.dtype().is(py::dtype::of<int>())) return run_shuffle<int>(Shuffle(kind), values, by, width);
    return run_shuffle<int64_t>(Shuffle(kind), values, by, width);
  });

  m.def("vote", [](Array<int> predicates) {
    Array<unsigned> votes({predicates.size(), py::ssize_t(7)});
    launch(Config({1}, {unsigned(predicates.size())}), vote, in(predicates), out(votes));
    return votes;
  });

  m.def(
      "count_threads",
      [](unsigned blocks, unsigned threads, bool fence) {
        std::vector<unsigned> per_block(blocks);
        unsigned finished = 0, total = 0;
        launch(Config({blocks}, {threads}), fence ? count_threads<true> : count_threads<false>,
               give(per_block.data(), blocks), give(&finished, 1), give(&total, 1));
        return std::pair(total, finished);
      },
      py::arg("blocks"), py::arg("threads"), py::arg("fence") = true);

  m.def(
      "cluster_sum",
      [](Array<int> values, unsigned cluster, bool before, bool after, bool large) {
        auto* kernel = !before ? cluster_sum<false, true> : !after ? cluster_sum<true, false> : cluster_sum<true, true>;
        if (large && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
          throw std::invalid_argument(cudaGetErrorString(cudaGetLastError()));
        }
        const unsigned blocks = unsigned(values.shape(0)), threads = unsigned(values.shape(1));
        Array<int> sums({blocks, threads});
        launch(Config({blocks}, {threads}, threads * sizeof(int), cluster), kernel, in(values), out(sums));
        return sums;
      },
      py::arg("values"), py::arg("cluster"), py::arg("before") = true, py::arg("after") = true,
      py::arg("large") = false);

  m.def(
      "rotate",
      [](Array<int> values, bool by_hand, bool synchronized, bool cooperative) {
        const unsigned blocks = unsigned(values.shape(0)), threads = unsigned(values.shape(1));
        Array<int> between({blocks, threads}), rotated({blocks, threads});
        unsigned arrived = 0;
        const Config config({blocks}, {threads}, 0, 1, cooperative);
        if (by_hand) {
          launch(config, synchronized ? rotate_by_hand<true> : rotate_by_hand<false>, in(values), out(between),
                 give(&arrived, 1), out(rotated));
        } else {
          launch(config, synchronized ? rotate<true> : rotate<false>, in(values), out(between), out(rotated));
        }
        return rotated;
      },
      py::arg("values"), py::arg("by_hand") = false, py::arg("synchronized") = true, py::arg("cooperative") = true);

  m.def("broadcast", [](unsigned blocks, unsigned threads, bool waits) {
    Array<int> between({threads}), read({blocks, threads});
    unsigned arrived = 0;
    launch(Config({blocks}, {threads}, 0, 1, true), waits ? broadcast<true> : broadcast<false>, out(between),
           give(&arrived, 1), out(read));
    return read;
  });

  m.def("next_lane", [](bool barrier) {
    Array<int> values(64);
    launch(Config({1}, {64}), barrier ? next_lane<true> : next_lane<false>, out(values));
    return values;
  });

  py::dict mistakes;
  for (auto [name, mistake] : {std::pair("none", none),
                               {"no_commit", no_commit},
                               {"no_wait", no_wait},
                               {"waits_for_too_few", waits_for_too_few},
                               {"no_barrier_before_read", no_barrier_before_read},
                               {"no_barrier_after_read", no_barrier_after_read}}) {
    mistakes[name] = int(mistake);
  }
  m.attr("mistakes") = mistakes;
  // The tiles, as bytes, of elements of so many bytes.
  m.def("reverse_tiles", [](py::buffer tiles, int bytes, int mistake) {
    return (bytes == 4   ? run_reverse_tiles<int>
            : bytes == 8 ? run_reverse_tiles<int2>
                         : run_reverse_tiles<int4>)(tiles, Mistake(mistake));
  });

  // Bytes and sectors of one warp's reads.
  m.def("count_reads", [](int stride, int bytes, const std::string& kind, int offset) {
    alignas(32) static char memory[64 * 1024];
    alignas(32) static int4 copied[33];
    int nothing;
    emulator::observe(false, true);
    if (kind != "strided")
      launch(Config({1}, {32}), kind == "vectors" ? vector_reads : async_vector_reads,
             give(reinterpret_cast<int4*>(memory) + offset, 32), give(copied, 32));
    else
      launch(Config({1}, {32}), strided_reads, give(memory + offset, sizeof memory / 2), stride, bytes,
             give(&nothing, 1));
    emulator::observe(true, false);
    const emulator::Traffic t = emulator::take_traffic().back();
    return std::tuple(t.bytes_read, t.sectors_read, t.bytes_written, t.sectors_written, t.requests);
  });

  m.def(
      "touch_dynamic_shared",
      [](unsigned bytes, int limit) {
        if (cudaFuncSetAttribute(writes_past_dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) !=
            cudaSuccess) {
          throw std::invalid_argument(cudaGetErrorString(cudaGetLastError()));
        }
        launch(Config({1}, {64}, bytes), writes_past_dynamic_shared);
      },
      py::arg("bytes"), py::arg("limit") = 0);

  m.def(
      "launch",
      [](const std::string& kernel, std::vector<unsigned> grid, std::vector<unsigned> block) {
        int result = 0;
        unsigned count = 0;
        alignas(16) int x[8] = {}, y[64] = {};
        std::vector<int> z(64);
        give(&result, 1), give(&count, 1), give(x, 8), give(y, 64), give(z.data(), 64);
        const Config config(grid, block);
#define LAUNCH(name, ...) \
  if (kernel == #name) return launch(config, name, ##__VA_ARGS__)
        LAUNCH(divergent_barrier);
        LAUNCH(early_exit);
        LAUNCH(missing_lanes, y);
        LAUNCH(mixed_masks, y);
        LAUNCH(foreign_mask);
        LAUNCH(absent_source, y);
        LAUNCH(barrier_against_shuffle, y);
        LAUNCH(trap);
        LAUNCH(misaligned, x);
        LAUNCH(reads_past_global, x, &result);
        LAUNCH(writes_past_global, x);
        LAUNCH(reads_before_global, x, &result);
        LAUNCH(reads_past_shared, &result);
        LAUNCH(reads_unwritten_shared, &result);
        LAUNCH(all_write_one, &result);
        LAUNCH(blocks_write_one, &result);
        LAUNCH(writes_what_others_read, &result);
        LAUNCH(plain_beside_atomic, &count);
        LAUNCH(waits_for_nobody, &count);
        LAUNCH(spins, &count);
        LAUNCH(copies_misaligned_from, y);
        LAUNCH(copies_misaligned_to, y);
        LAUNCH(copies_12_bytes, y);
        LAUNCH(copies_zeros, y);
        LAUNCH(copies_from_shared);
        LAUNCH(copies_to_global, x, &result);
        LAUNCH(copies_past_global, x);
        LAUNCH(copies_and_exits, y);
        LAUNCH(copies_uncommitted_and_exits, y);
        LAUNCH(reads_what_was_there, y, &result);
        LAUNCH(overwrites_copy, y);
        LAUNCH(copies_twice, y);
        LAUNCH(copies_what_others_read, y, z.data());
        LAUNCH(changes_source, y);
        LAUNCH(reads_copy_of_neighbour, y, z.data());
        LAUNCH(stack_overflow, 4, &result);
        if (kernel == "one_block_leaves_the_grid") {
          return launch(Config(grid, block, 0, 1, true), one_block_leaves_the_grid);
        }
        throw std::invalid_argument("no kernel is named " + kernel);
      },
      py::arg("kernel"), py::arg("grid") = std::vector<unsigned>{1}, py::arg("block") = std::vector<unsigned>{64});

  m.def("fast_math",
        [](float x, float y) { return std::tuple(__expf(x), __fdividef(x, y), rsqrtf(x), min(x, y), max(x, y)); });
}
