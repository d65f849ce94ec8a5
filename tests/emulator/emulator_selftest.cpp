// Toy kernels, right ones and wrong ones, with which tests/test_emulator.py tests the emulator itself.
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
  __shared__ float partial[32];
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
  float* kept = static_cast<float*>(emulator::dynamic_shared());
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

// The last block to finish adds up what all blocks have written.
__global__ void count_threads(unsigned* per_block, unsigned* finished, unsigned* total) {
  __shared__ bool last;
  atomicAdd(&per_block[blockIdx.x], 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x < gridDim.x) atomicAdd(total, per_block[threadIdx.x]);
}

// Copies what dynamic shared memory holds at a block's start, then fills it, and `past` bytes more.
__global__ void touch_dynamic_shared(unsigned char* found, int bytes, int past) {
  unsigned char* shared = static_cast<unsigned char*>(emulator::dynamic_shared());
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) found[blockIdx.x * bytes + i] = shared[i];
  for (int i = threadIdx.x; i < bytes + past; i += blockDim.x) shared[i] = 0;
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
  if (threadIdx.x % warpSize < 16) out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void mixed_masks(int* out) {
  const int lane = threadIdx.x % warpSize;
  out[0] = __shfl_sync(lane < 16 ? 0xffffffffu : 0xffff0000u, 1, 16);
}

__global__ void foreign_mask() { __syncwarp(0x0000ffffu); }

__global__ void absent_source(int* out) {
  if (threadIdx.x % warpSize < 16) out[0] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 0)
    __syncthreads();
  else
    out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void trap() {
  if (blockIdx.x == 1 && threadIdx.x == 33) __trap();
  __syncthreads();
}

__global__ void misaligned(const float* x, int* out) { out[0] = int(__ldg(reinterpret_cast<const float4*>(x + 1)).x); }

// For AddressSanitizer alone to see: an overflow on the stack of a thread that has been suspended.
__attribute__((no_sanitize("undefined"))) __global__ void stack_overflow(int index, int* out) {
  int local[4] = {1, 2, 3, 4};
  __syncthreads();
  local[index] = 5;
  __syncthreads();
  out[0] = local[0];
}

// ---- Python ---------------------------------------------------------------------------------------------------

static cudaLaunchConfig_t config_of(std::vector<unsigned> grid, std::vector<unsigned> block, size_t shared_bytes = 0) {
  grid.resize(3, 1);
  block.resize(3, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared_bytes;
  return config;
}

template <class... Parameters, class... Arguments>
static void launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments... arguments) {
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaGetLastError()) throw std::logic_error("cudaGetLastError() is not the launch's error");
  if (error != cudaSuccess) throw std::invalid_argument(cudaGetErrorString(error));
}

template <class T>
static Array<T> run_shuffle(Shuffle kind, Array<T> in, int by, int width) {
  Array<T> out(in.size());
  launch(config_of({1}, {unsigned(in.size())}), shuffle<T>, kind, in.data(), out.mutable_data(), by, width);
  return out;
}

PYBIND11_MODULE(emulator_selftest, m) {
  m.def("set_order", &emulator::set_order, py::arg("order"), py::arg("seed") = 0);

  m.def("indices", [](std::vector<unsigned> grid, std::vector<unsigned> block) {
    const cudaLaunchConfig_t config = config_of(grid, block);
    const dim3 g = config.gridDim, b = config.blockDim;
    Array<int> out({g.z, g.y, g.x, b.z, b.y, b.x, 6u});
    launch(config, write_indices, out.mutable_data());
    return out;
  });

  m.def(
      "normalize",
      [](Array<float> x, unsigned threads, bool before_write, bool before_read) {
        const int columns = int(x.shape(1));
        Array<float> y({x.shape(0), x.shape(1)});
        const cudaLaunchConfig_t config = config_of({unsigned(x.shape(0))}, {threads}, columns * sizeof(float));
        auto* kernel = !before_write  ? normalize<false, true>
                       : !before_read ? normalize<true, false>
                                      : normalize<true, true>;
        launch(config, kernel, x.data(), y.mutable_data(), columns);
        return y;
      },
      py::arg("x"), py::arg("threads") = 256, py::arg("before_write") = true, py::arg("before_read") = true);

  py::dict kinds;
  for (auto [name, kind] : {std::pair("idx", indexed), {"up", up}, {"down", down}, {"xor", exclusive_or}}) {
    kinds[name] = int(kind);
  }
  m.attr("shuffles") = kinds;
  m.def("shuffle", [](int kind, py::array in, int by, int width) -> py::array {
    if (in.dtype().is(py::dtype::of<float>())) return run_shuffle<float>(Shuffle(kind), in, by, width);
    if (in.dtype().is(py::dtype::of<double>())) return run_shuffle<double>(Shuffle(kind), in, by, width);
    if (in.dtype().is(py::dtype::of<int>())) return run_shuffle<int>(Shuffle(kind), in, by, width);
    return run_shuffle<int64_t>(Shuffle(kind), in, by, width);
  });

  m.def("vote", [](Array<int> in) {
    Array<unsigned> out({in.size(), py::ssize_t(7)});
    launch(config_of({1}, {unsigned(in.size())}), vote, in.data(), out.mutable_data());
    return out;
  });

  m.def("count_threads", [](unsigned blocks, unsigned threads) {
    std::vector<unsigned> per_block(blocks);
    unsigned finished = 0, total = 0;
    launch(config_of({blocks}, {threads}), count_threads, per_block.data(), &finished, &total);
    return std::pair(total, finished);
  });

  m.def(
      "touch_dynamic_shared",
      [](unsigned blocks, int bytes, int limit, int past) {
        if (cudaFuncSetAttribute(touch_dynamic_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) !=
            cudaSuccess) {
          throw std::invalid_argument(cudaGetErrorString(cudaGetLastError()));
        }
        Array<unsigned char> found({blocks, unsigned(bytes)});
        launch(config_of({blocks}, {64}, bytes), touch_dynamic_shared, found.mutable_data(), bytes, past);
        return found;
      },
      py::arg("blocks"), py::arg("bytes"), py::arg("limit") = 0, py::arg("past") = 0);

  m.def(
      "launch",
      [](const std::string& kernel, std::vector<unsigned> grid, std::vector<unsigned> block) {
        const cudaLaunchConfig_t config = config_of(grid, block);
        int out = 0;
        alignas(16) float x[8] = {};
        if (kernel == "divergent_barrier")
          launch(config, divergent_barrier);
        else if (kernel == "early_exit")
          launch(config, early_exit);
        else if (kernel == "missing_lanes")
          launch(config, missing_lanes, &out);
        else if (kernel == "mixed_masks")
          launch(config, mixed_masks, &out);
        else if (kernel == "foreign_mask")
          launch(config, foreign_mask);
        else if (kernel == "absent_source")
          launch(config, absent_source, &out);
        else if (kernel == "barrier_against_shuffle")
          launch(config, barrier_against_shuffle, &out);
        else if (kernel == "trap")
          launch(config, trap);
        else if (kernel == "misaligned")
          launch(config, misaligned, x, &out);
        else if (kernel == "stack_overflow")
          launch(config, stack_overflow, 4, &out);
        else
          throw std::invalid_argument("no kernel is named " + kernel);
      },
      py::arg("kernel"), py::arg("grid") = std::vector<unsigned>{1}, py::arg("block") = std::vector<unsigned>{64});

  m.def("fast_math",
        [](float x, float y) { return std::tuple(__expf(x), __fdividef(x, y), rsqrtf(x), min(x, y), max(x, y)); });
}
