// The toy kernels as a Python module, for tests/test_emulator.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "toy_kernels.cuh"
#include "wrong_kernels.cuh"

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

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
  // `tiles` are bytes; an element has `bytes` of them.
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
