// Runs the blocks of a grid one after another, and the threads of a block as fibers.
//
// A thread runs until a barrier or a warp primitive, and a primitive is completed only when all threads that it names
// wait in it. If nothing is left to run or to complete, it never will be, and both sides of the disagreement are known.
// This is stricter than the hardware on purpose: naming a thread that has exited, or reaching a primitive on different
// source lines, is an error here, since what a GPU makes of it depends on the architecture and on the compiler.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "vector_types.h"

namespace emulator {

inline constexpr unsigned kWarpSize = 32;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // of one block, on compute capability 9.0 and 10.0

// A line of kernel source. As a default argument, `Site site = Site::here()` is where the function was called.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a thread brings to a barrier, a vote or a shuffle.
struct Call {
  static constexpr unsigned kNoSource = ~0u;

  const char* name;
  Site site;
  uint32_t mask = 0;            // lanes of the warp that take part; 0: all threads of the block
  uint64_t value = 0;           // a predicate, or the bits to shuffle
  unsigned source = kNoSource;  // shuffles: the lane to read from

  bool same_as(const Call& other) const {
    return site.line == other.site.line && mask == other.mask && !std::strcmp(name, other.name) &&
           !std::strcmp(site.file, other.site.file);
  }
};

inline std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

inline std::string format(uint3 index) { return format("(%u,%u,%u)", index.x, index.y, index.z); }

inline std::string format(const Call& call) {
  const std::string mask = call.mask ? format(" with mask 0x%08x", call.mask) : "";
  return format("%s%s at %s:%d", call.name, mask.c_str(), call.site.file, call.site.line);
}

class Machine {
 public:
  uint3 thread_index{}, block_index{};
  dim3 block_dim, grid_dim;

  // In which order blocks, warps and lanes run: "forward", "reverse" or "random". A kernel without races gives the
  // same bits in all of them.
  void set_order(const std::string& order, unsigned seed) {
    if (order != "forward" && order != "reverse" && order != "random") {
      throw std::invalid_argument("order is '" + order + "', expected 'forward', 'reverse' or 'random'");
    }
    random_ = order == "random";
    reverse_ = order == "reverse";
    seed_ = seed;
  }

  // Each thread of the grid calls kernel(arguments).
  void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*kernel)(void*), void* arguments) {
    const std::lock_guard<std::mutex> lock(mutex_);  // __shared__ is static storage: one block at a time
    grid_dim = grid;
    block_dim = block;
    count_ = block.x * block.y * block.z;
    while (threads_.size() < count_) threads_.emplace_back();
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i].rank = i;
      threads_[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
    generator_.seed(seed_);
    arrange(warp_order_, (count_ + kWarpSize - 1) / kWarpSize);
    arrange(lane_order_, kWarpSize);
    try {
      run_blocks(dynamic_shared_bytes, kernel, arguments);
    } catch (...) {
      for (unsigned i = 0; i < count_; ++i) threads_[i].fiber.cancel();
      throw;
    }
  }

  // Called by a thread: waits until the call is complete. The result is the number of non-zero values for a barrier,
  // the lanes that have one for a vote, the source's value for a shuffle.
  uint64_t wait(const Call& call) {
    Thread& self = *running_;
    if (call.mask && !(call.mask >> lane() & 1)) fail(format(call) + ", which does not name the calling lane");
    self.call = call;
    self.state = State::waiting;
    Fiber::suspend();
    return self.result;
  }

  // Called by a thread: ends the launch with an exception.
  [[noreturn]] void fail(const std::string& what) const { fail(*running_, what); }

  unsigned threads_per_block() const { return count_; }
  unsigned lane() const { return running_->rank % kWarpSize; }

  // Those of the calling thread's warp that have not exited.
  uint32_t living_lanes() const {
    const unsigned first = running_->rank - lane();
    uint32_t lanes = 0;
    for (unsigned i = first; i < std::min(first + kWarpSize, count_); ++i) {
      lanes |= uint32_t(threads_[i].state != State::exited) << (i - first);
    }
    return lanes;
  }

  unsigned char* dynamic_shared() { return shared_ + 16; }  // CUDA promises no alignment above 16 bytes: nor does this

 private:
  enum class State { ready, waiting, exited };

  struct Thread {
    Fiber fiber;
    unsigned rank;  // in the block
    uint3 index;
    State state;
    Call call;  // while waiting
    uint64_t result;
  };

  // The threads that a call names: those of [begin, end) whose lane is in the mask. The lanes that a block's last,
  // partial warp lacks are no threads.
  struct Group {
    unsigned begin, end;
    uint32_t mask;

    bool has(unsigned rank) const { return rank < end && mask >> (rank - begin) % kWarpSize & 1; }
  };

  void run_blocks(size_t dynamic_shared_bytes, void (*kernel)(void*), void* arguments) {
    const uint64_t blocks = uint64_t(grid_dim.x) * grid_dim.y * grid_dim.z;
    // A stride that has no divisor in common with the number of blocks visits each block once.
    uint64_t block = reverse_ ? blocks - 1 : 0, stride = reverse_ ? blocks - 1 : 1;
    if (random_) {
      block = generator_() % blocks;
      do stride = 1 + generator_() % blocks;
      while (std::gcd(stride, blocks) != 1);
    }
    unsigned char* const sentinel = dynamic_shared() + dynamic_shared_bytes;
    for (uint64_t i = 0; i < blocks; ++i, block = (block + stride) % blocks) {
      const uint64_t row = block / grid_dim.x;
      block_index = {unsigned(block % grid_dim.x), unsigned(row % grid_dim.y), unsigned(row / grid_dim.y)};
      std::fill(dynamic_shared(), sentinel + kSentinelBytes, kPoison);
      for (unsigned t = 0; t < count_; ++t) {
        threads_[t].state = State::ready;
        threads_[t].fiber.start(kernel, arguments);
      }
      run_block();
      if (std::count(sentinel, sentinel + kSentinelBytes, kPoison) != kSentinelBytes) {
        throw std::runtime_error(format("block %s wrote past its %zu bytes of dynamic shared memory",
                                        format(block_index).c_str(), dynamic_shared_bytes));
      }
    }
  }

  // A warp runs as far as it can before the next one does. Between two barriers threads cannot drift further apart,
  // and that is what brings a missing barrier to light. In random order any warp may fall behind at any point.
  void run_block() {
    for (;;) {
      bool interrupted = false;
      if (random_) arrange(warp_order_, unsigned(warp_order_.size()));
      for (unsigned warp : warp_order_) {
        while (!interrupted && step(warp * kWarpSize)) interrupted = random_ && generator_() % 4 == 0;
      }
      if (interrupted || complete(threads_[0])) continue;
      for (unsigned i = 0; i < count_; ++i) {
        if (threads_[i].state == State::waiting) report_deadlock(threads_[i]);
      }
      return;
    }
  }

  // Runs each ready lane of a warp to where it waits next, then completes what all the lanes it names have reached.
  // True if that made a lane ready.
  bool step(unsigned first) {
    if (random_) arrange(lane_order_, kWarpSize);
    for (unsigned lane : lane_order_) {
      if (first + lane >= count_ || threads_[first + lane].state != State::ready) continue;
      running_ = &threads_[first + lane];
      thread_index = running_->index;
      running_->fiber.resume();
      if (running_->fiber.finished()) running_->state = State::exited;
    }
    bool progress = false;
    for (unsigned i = first; i < std::min(first + kWarpSize, count_); ++i) {
      if (threads_[i].call.mask) progress |= complete(threads_[i]);
    }
    return progress;
  }

  Group group(const Thread& thread) const {
    if (!thread.call.mask) return {0, count_, ~0u};
    const unsigned first = thread.rank - thread.rank % kWarpSize;
    return {first, std::min(first + kWarpSize, count_), thread.call.mask};
  }

  // A thread that the thread's call names and that is not in it; null if there is none.
  const Thread* missing(const Thread& thread) const {
    const Group named = group(thread);
    for (unsigned i = named.begin; i < named.end; ++i) {
      const bool there = threads_[i].state == State::waiting && threads_[i].call.same_as(thread.call);
      if (named.has(i) && !there) return &threads_[i];
    }
    return nullptr;
  }

  // Once all threads that the thread's call names are in it, gives them their results and lets them go on.
  bool complete(const Thread& thread) {
    if (thread.state != State::waiting || missing(thread)) return false;
    const Group named = group(thread);
    uint64_t count = 0, lanes = 0;
    for (unsigned i = named.begin; i < named.end; ++i) {
      const uint64_t vote = named.has(i) && threads_[i].call.value;
      count += vote;
      lanes |= vote << (i - named.begin) % kWarpSize;
    }
    for (unsigned i = named.begin; i < named.end; ++i) {
      if (!named.has(i)) continue;
      Thread& member = threads_[i];
      member.state = State::ready;
      member.result = member.call.mask ? lanes : count;
      if (member.call.source == Call::kNoSource) continue;
      const unsigned source = named.begin + member.call.source;
      if (!named.has(source)) {
        fail(member, format(member.call) + format(" reads lane %u, which takes no part", member.call.source));
      }
      member.result = threads_[source].call.value;
    }
    return true;
  }

  [[noreturn]] void report_deadlock(const Thread& thread) const {
    const Thread& other = *missing(thread);
    fail(thread, "deadlock: waits in " + format(thread.call) + " for thread " + format(other.index) + ", which " +
                     (other.state == State::exited ? "has exited" : "waits in " + format(other.call)));
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& what) const {
    throw std::runtime_error("block " + format(block_index) + ", thread " + format(thread.index) + ": " + what);
  }

  void arrange(std::vector<unsigned>& order, unsigned count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (reverse_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
  }

  static constexpr unsigned char kPoison = 0xff;  // a NaN as a floating-point number of any size
  static constexpr ptrdiff_t kSentinelBytes = 256;

  std::mutex mutex_;
  bool random_ = false, reverse_ = false;
  unsigned seed_ = 0;
  std::minstd_rand generator_;
  std::deque<Thread> threads_;  // of the largest block so far: fibers are created once
  unsigned count_ = 0;          // threads in a block of this launch
  Thread* running_ = nullptr;
  std::vector<unsigned> warp_order_, lane_order_;
  alignas(128) unsigned char shared_[16 + kMaxSharedBytes + kSentinelBytes];
};

inline Machine machine;

inline void set_order(const std::string& order, unsigned seed = 0) { machine.set_order(order, seed); }
inline void* dynamic_shared() { return machine.dynamic_shared(); }

// Accesses of global memory that go through a function come here: the place for a guard that knows the allocations.
// Alignment is checked already, since the hardware faults where x86 does not care.
template <class T>
T* checked(T* address) {
  const auto offset = reinterpret_cast<uintptr_t>(address) % alignof(T);
  if (offset) machine.fail(format("access of %zu bytes is misaligned by %zu bytes", sizeof(T), size_t(offset)));
  return address;
}

}  // namespace emulator
