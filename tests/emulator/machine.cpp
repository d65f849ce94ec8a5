// Schedules a launch's threads, and completes what they wait in (machine.h).
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

#include "observer.h"
#include "threads.h"

namespace emulator {
namespace {

std::string formatted(const char* pattern, va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, pattern, arguments);
  return text;
}

}  // namespace

std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  const std::string text = formatted(pattern, arguments);
  va_end(arguments);
  return text;
}

std::string format(uint3 index) { return format("(%u,%u,%u)", index.x, index.y, index.z); }

std::string message(const Thread& thread, const std::string& what) {
  return "block " + format(thread.block->index) + ", thread " + format(thread.index) + ": " + what;
}

static std::string format(const Call& call) {
  const std::string mask = call.scope == Scope::warp ? format(" with mask 0x%08x", call.mask) : std::string();
  return format("%s%s at %s:%d", call.name, mask.c_str(), call.site.file, call.site.line);
}

namespace {

constexpr unsigned kMaxYields = 1 << 14;

bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

bool same(const Call& a, const Call& b) {
  return a.scope == b.scope && a.mask == b.mask && a.site.line == b.site.line && same(a.name, b.name) &&
         same(a.site.file, b.site.file);
}

class Machine {
 public:
  void set_order(const std::string& order, unsigned seed) {
    if (order != "forward" && order != "reverse" && order != "random") {
      throw std::invalid_argument("order is '" + order + "', expected 'forward', 'reverse' or 'random'");
    }
    random_ = order == "random";
    reverse_ = order == "reverse";
    seed_ = seed;
  }

  void run(const Launch& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    running.launch = &launch;
    running.block_size = launch.block.x * launch.block.y * launch.block.z;
    indices.grid_dim = launch.grid;
    indices.block_dim = launch.block;
    generator_.seed(seed_);
    shared_offsets_.clear();
    static_bytes_ = 0;
    error_.clear();
    begin_launch();
    try {
      run_grid();
    } catch (...) {
      callback_stack_ = nullptr;
      for (Block* block : running.blocks) {
        for (unsigned i = 0; i < running.block_size; ++i) block->threads[i].fiber.cancel();
      }
      throw;
    }
  }

  // ---- Of the running thread --------------------------------------------------------------------------------------

  uint64_t wait(const Call& call) {
    Thread& self = *running.thread;
    if (call.scope == Scope::warp && !(call.mask >> self.lane() & 1)) {
      fail(format(call) + ", which does not name the calling lane");
    }
    self.call = call;
    suspend(State::waiting);
    return self.result;
  }

  void suspend(State state) {
    running.thread->state = state;
    Fiber::suspend();
  }

  [[noreturn]] void fail(const std::string& what) {
    error_ = message(*running.thread, what);
    for (;;) Fiber::suspend();
  }

  uint32_t living_lanes() const {
    uint32_t lanes = 0;
    const unsigned first = running.thread->rank - running.thread->lane();
    for (unsigned i = first; i < std::min(first + kWarpSize, running.block_size); ++i) {
      lanes |= uint32_t(running.thread->block->threads[i].state != State::exited) << (i - first);
    }
    return lanes;
  }

  Block& block() const { return *running.thread->block; }

  void* shared(const void* variable, size_t bytes, size_t alignment) {
    const auto [found, is_new] = shared_offsets_.try_emplace(variable, 0);
    if (is_new) {
      const size_t offset = (static_bytes_ + alignment - 1) / alignment * alignment;
      if (offset + bytes > kMaxStaticBytes) fail("more than 48 KB of static shared memory");
      found->second = offset;
      static_bytes_ = offset + bytes + kGap;
    }
    void* const address = block().static_memory() + found->second;
    for (const Region& region : block().static_shared) {
      if (region.begin == address) return address;
    }
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(address, bytes);
#endif
    std::fill_n(static_cast<unsigned char*>(address), bytes, kPoison);
    block().static_shared.push_back(observed_shared(address, bytes));
    return address;
  }

  void* map_shared_rank(void* address, unsigned rank) {
    Block& here = block();
    const unsigned blocks = running.launch->cluster.x * running.launch->cluster.y * running.launch->cluster.z;
    if (rank >= blocks) fail(format("block %u of a cluster of %u", rank, blocks));
    if (!here.dynamic_shared.has(address)) fail("map_shared_rank() takes addresses of dynamic shared memory");
    Block& other = *running.blocks[index_of(here) - here.cluster_rank + rank];
    return other.dynamic_memory() + here.dynamic_shared.offset(address);
  }

 private:
  static constexpr size_t kGap = 64;  // between static shared variables

  // ---- Running ----------------------------------------------------------------------------------------------------

  void run_grid() {
    const dim3 grid = running.launch->grid, cluster = running.launch->cluster;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t clusters = blocks / (cluster.x * cluster.y * cluster.z);
    if (running.launch->cooperative) {
      prepare(0, clusters);
      run_resident();
      return;
    }
    // A stride that has no divisor in common with the number of clusters visits each cluster once.
    uint64_t first = reverse_ ? clusters - 1 : 0, stride = reverse_ ? clusters - 1 : 1;
    if (random_) {
      first = generator_() % clusters;
      do stride = 1 + generator_() % clusters;
      while (std::gcd(stride, clusters) != 1);
    }
    for (uint64_t i = 0, c = first; i < clusters; ++i, c = (c + stride) % clusters) {
      prepare(c, c + 1);
      run_resident();
    }
  }

  // Makes the blocks of some clusters resident, in their clusters' order.
  void prepare(uint64_t first_cluster, uint64_t end_cluster) {
    const dim3 cluster = running.launch->cluster, grid = running.launch->grid;
    const unsigned size = cluster.x * cluster.y * cluster.z;
    running.blocks.clear();
    for (uint64_t c = first_cluster; c < end_cluster; ++c) {
      const unsigned nx = grid.x / cluster.x, ny = grid.y / cluster.y;
      const uint3 corner{unsigned(c % nx) * cluster.x, unsigned(c / nx % ny) * cluster.y,
                         unsigned(c / nx / ny) * cluster.z};
      for (unsigned rank = 0; rank < size; ++rank) {
        const uint3 index{corner.x + rank % cluster.x, corner.y + rank / cluster.x % cluster.y,
                          corner.z + rank / (cluster.x * cluster.y)};
        if (running.blocks.size() == blocks_.size()) blocks_.emplace_back(new Block);
        Block& block = *blocks_[running.blocks.size()];
        running.blocks.push_back(&block);
        block.index = index;
        block.id = (index.z * grid.y + index.y) * grid.x + index.x;
        block.cluster_rank = rank;
        start(block);
      }
    }
  }

  void start(Block& block) {
    const size_t bytes = running.launch->dynamic_shared_bytes;
    block.epoch = 1;
    block.warp_epochs.assign((running.block_size + kWarpSize - 1) / kWarpSize, 1);
    block.clock.clear();
    block.exited = false;
    block.static_shared.clear();
    block.dynamic_shared = bytes ? observed_shared(block.dynamic_memory(), bytes) : Region();
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(block.memory.get(), Block::kBytes);
    __asan_unpoison_memory_region(block.dynamic_memory(), bytes);
#endif
    std::fill_n(block.dynamic_memory(), bytes, kPoison);
    while (block.threads.size() < running.block_size) block.threads.emplace_back();
    for (unsigned i = 0; i < running.block_size; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.rank = i;
      const dim3 dim = running.launch->block;
      thread.index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
      thread.state = State::ready;
      thread.call = {};
      thread.event = 0;
      thread.acquired.clear();
      thread.released.clear();
      thread.acquiring.clear();
      thread.fenced = false;
      thread.accesses.clear();
      thread.copies.clear();
      thread.committed_groups = 0;
      thread.fiber.start(running.launch->kernel, running.launch->arguments);
    }
  }

  void run_resident() {
    std::vector<unsigned> order;
    for (unsigned yields = 0;;) {
      bool progress = false;
      arrange(order, unsigned(running.blocks.size()));
      for (const unsigned i : order) progress |= run_block(*running.blocks[i]);
      for (Block* block : running.blocks) progress |= complete(block->threads[0], Scope::cluster);
      progress |= complete(running.blocks[0]->threads[0], Scope::grid);
      if (progress) {
        yields = 0;
        continue;
      }
      if (!wake_yielding()) break;
      if (++yields > kMaxYields) throw std::runtime_error("threads spin for what no other thread will do");
    }
    for (Block* block : running.blocks) {
      for (unsigned i = 0; i < running.block_size; ++i) {
        if (block->threads[i].state == State::waiting) report_deadlock(block->threads[i]);
      }
    }
  }

  // A warp runs as far as it can before the next one does. Between two barriers threads cannot drift further apart,
  // and that is what brings a missing barrier to light. In random order any warp may fall behind at any point, and any
  // block behind the others. True if anything ran.
  bool run_block(Block& block) {
    if (block.exited) return false;
    bool progress = false;
    std::vector<unsigned>& order = warp_order_;
    for (;;) {
      bool interrupted = false;
      arrange(order, unsigned(block.warp_epochs.size()));
      for (const unsigned warp : order) {
        while (!interrupted && step(block, warp * kWarpSize, progress)) interrupted = random_ && generator_() % 4 == 0;
      }
      if (interrupted && running.blocks.size() > 1 && generator_() % 8 == 0) return true;
      if (interrupted || complete(block.threads[0], Scope::block)) continue;
      block.exited = std::all_of(block.threads.begin(), block.threads.begin() + running.block_size,
                                 [](const Thread& thread) { return thread.state == State::exited; });
      if (block.exited) count_traffic(block);
      return progress;
    }
  }

  // Runs each ready lane of a warp to where it waits next, then completes what all the lanes it names have reached.
  // True if that made a lane ready.
  bool step(Block& block, unsigned first, bool& ran) {
    arrange(lane_order_, kWarpSize);
    const unsigned end = std::min(first + kWarpSize, running.block_size);
    for (const unsigned lane : lane_order_) {
      if (first + lane >= end || block.threads[first + lane].state != State::ready) continue;
      resume(block.threads[first + lane]);
      ran |= block.threads[first + lane].state != State::yielding;
    }
    bool progress = false;
    for (unsigned i = first; i < end; ++i) progress |= complete(block.threads[i], Scope::warp);
    return progress;
  }

  void resume(Thread& thread) {
    running.thread = &thread;
    indices.thread = thread.index;
    indices.block = thread.block->index;
    resumed();
    callback_stack_ = &thread.fiber;
    thread.fiber.resume();
    callback_stack_ = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
    if (!thread.fiber.finished()) return;
    thread.state = State::exited;
    if (!thread.copies.empty()) {  // it could arrive in the memory of a later block
      throw std::runtime_error(message(thread, "exits before the asynchronous copy" +
                                                   source_of(thread.copies[0].instruction) +
                                                   " has arrived: no wait is for it"));
    }
  }

  bool wake_yielding() {
    bool woke = false;
    for (Block* block : running.blocks) {
      for (unsigned i = 0; i < running.block_size; ++i) {
        if (block->threads[i].state != State::yielding) continue;
        block->threads[i].state = State::ready;
        woke = true;
      }
    }
    return woke;
  }

  // ---- Completing -------------------------------------------------------------------------------------------------

  size_t index_of(const Block& block) const {
    return size_t(std::find(running.blocks.begin(), running.blocks.end(), &block) - running.blocks.begin());
  }

  // The threads that a thread's call names. The lanes that a block's last, partial warp lacks are no threads.
  std::vector<Thread*>& named(const Thread& thread) {
    std::vector<Thread*>& threads = named_;
    threads.clear();
    const Call& call = thread.call;
    size_t first_block = index_of(*thread.block), blocks = 1;
    unsigned begin = 0, end = running.block_size;
    if (call.scope == Scope::warp) {
      begin = thread.rank - thread.rank % kWarpSize;
      end = std::min(begin + kWarpSize, running.block_size);
    } else if (call.scope == Scope::cluster) {
      blocks = running.launch->cluster.x * running.launch->cluster.y * running.launch->cluster.z;
      first_block -= thread.block->cluster_rank;
    } else if (call.scope == Scope::grid) {
      first_block = 0;
      blocks = running.blocks.size();
    }
    for (size_t b = first_block; b < first_block + blocks; ++b) {
      for (unsigned i = begin; i < end; ++i) {
        if (call.scope == Scope::warp && !(call.mask >> (i - begin) & 1)) continue;
        threads.push_back(&running.blocks[b]->threads[i]);
      }
    }
    return threads;
  }

  static bool is_in(const Thread& thread, const Call& call) {
    return thread.state == State::waiting && same(thread.call, call);
  }

  // Once all threads that the thread's call names are in it, gives them their results and lets them go on.
  bool complete(Thread& thread, Scope scope) {
    if (thread.state != State::waiting || thread.call.scope != scope) return false;
    const Call call = thread.call;
    const std::vector<Thread*>& members = named(thread);
    for (const Thread* member : members) {
      if (!is_in(*member, call)) return false;
    }
    uint64_t count = 0, lanes = 0;
    for (const Thread* member : members) {
      count += member->call.value != 0;
      lanes |= uint64_t(member->call.value != 0) << member->rank % kWarpSize;
    }
    for (Thread* member : members) {
      member->state = State::ready;
      member->result = scope == Scope::warp ? lanes : count;
      const unsigned source = member->call.source;
      if (source == Call::kNoSource) continue;
      const Thread* from = nullptr;
      for (const Thread* other : members) {
        if (other->rank % kWarpSize == source) from = other;
      }
      if (!from) {
        throw std::runtime_error(
            message(*member, format(member->call) + format(" reads lane %u, which takes no part", source)));
      }
      member->result = from->call.value;
    }
    synchronize(call, members);
    return true;
  }

  [[noreturn]] void report_deadlock(const Thread& thread) {
    for (const Thread* other : named(thread)) {
      if (is_in(*other, thread.call)) continue;
      const std::string of_block = other->block == thread.block ? "" : " of block " + format(other->block->index);
      throw std::runtime_error(message(
          thread, "deadlock: waits in " + format(thread.call) + " for thread " + format(other->index) + of_block +
                      ", which " + (other->state == State::exited ? "has exited" : "waits in " + format(other->call))));
    }
    throw std::logic_error("the emulator has lost a thread");
  }

  // Only a random order has to be made anew each time.
  void arrange(std::vector<unsigned>& order, unsigned count) {
    if (!random_ && order.size() == count && (count < 2 || (order[0] > order[1]) == reverse_)) return;
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
    if (reverse_) std::reverse(order.begin(), order.end());
    if (random_) std::shuffle(order.begin(), order.end(), generator_);
  }

  std::mutex mutex_;
  bool random_ = false, reverse_ = false;
  unsigned seed_ = 0;
  std::minstd_rand generator_;
  std::vector<std::unique_ptr<Block>> blocks_;  // as many as were ever resident at once

  // Of the launch.
  std::string error_;
  std::vector<unsigned> warp_order_, lane_order_;
  std::vector<Thread*> named_;
  std::map<const void*, size_t> shared_offsets_;  // of static variables
  size_t static_bytes_ = 0;
};

Machine machine;

}  // namespace

const Fiber* callback_stack_ = nullptr;

int Device::blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) const {
  const int by_threads = threads_per_multiprocessor / int((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  return std::min(by_threads, shared_per_multiprocessor / int(shared_bytes + 1024));  // 1 KB of each is the system's
}

void run(const Launch& launch) { machine.run(launch); }

uint64_t wait(const Call& call) {
  const Work work;
  return machine.wait(call);
}

void yield() {
  const Work work;
  machine.suspend(State::yielding);
}

void fail(const std::string& what) { machine.fail(what); }

void fail(const char* pattern, ...) {
  const Work work;
  va_list arguments;
  va_start(arguments, pattern);
  machine.fail(formatted(pattern, arguments));
}

void* shared(const void* variable, size_t bytes, size_t alignment) {
  const Work work;
  return machine.shared(variable, bytes, alignment);
}

void* map_shared_rank(void* address, unsigned rank) {
  const Work work;
  return machine.map_shared_rank(address, rank);
}

unsigned lane() { return running.thread->lane(); }
uint32_t living_lanes() { return machine.living_lanes(); }
dim3 cluster_dim() { return running.launch->cluster; }
unsigned block_rank() { return running.thread->block->cluster_rank; }
void* dynamic_shared() { return running.thread->block->dynamic_memory(); }

void set_order(const std::string& order, unsigned seed) { machine.set_order(order, seed); }

}  // namespace emulator
