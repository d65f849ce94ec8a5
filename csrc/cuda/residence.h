// One read: how whole groups stay on the chip between their reduction and their use. Plain C++, no CUDA, no torch.
//
// An item is a bundle of whole groups of one sample; a team of blocks shares it, each block a chunk of every channel.
// A thread copies its own vectors to shared memory, each to a slot that no other thread touches: together the slots are
// a larger register file, in which loads can be in flight. What a thread streams is cut into units, which a few lanes
// reduce together:
//   rows     contiguous memory: a unit is a part of one channel's chunk, and a thread takes `rounds` of them;
//   columns  channels_last: the only unit is the block's chunk of pixels, whose rows lie across the lanes of a warp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/divisor.h"
#include "cuda/estimates.h"
#include "cuda/tiling.h"
#include "problem.h"

namespace ldm_fused {

enum class Exchange {
  block,    // a team is one block
  cluster,  // a thread-block cluster: partial results go through distributed shared memory
  grid      // all blocks are resident, and teams exchange through global memory
};

struct Residence {
  Exchange exchange;
  bool columns;
  int vector;        // consecutive elements a thread moves at once: 16 bytes of the narrowest tensor
  int bundle;        // groups of an item
  int width;         // channels of an item
  int64_t items;     // of the tensor
  int team;          // blocks that share an item
  int teams;         // in the grid; team i takes items i, i + teams, ...
  int threads;       // of a block
  int extent;        // of a channel: rows: vectors; columns: pixels
  int chunk;         // of it in one block
  int lanes;         // rows: of a unit, a power of two up to 32; columns: vectors that cover the width, up to 32
  int parts;         // rows: units that a channel's chunk is cut into
  int length;        // rows: vectors of a unit
  int rounds;        // units of a thread
  int steps;         // vectors of a thread in a unit
  int entries;       // partial results of a block
  int slots;         // of a thread: vectors that fit shared memory
  int kept;          // of a thread: vectors of an item that stay in its slots; the rest is read again
  int segment;       // of a thread: vectors of a unit that it waits for together
  int tables;        // bytes of shared memory in front of the slots
  int shared_bytes;  // of shared memory, in all
  int abreast;       // of a block's threads: rows: units, columns: pixels that they have side by side
  Divisor by_items_of_sample, by_team, by_lanes, by_parts, by_abreast, by_group_channels;

  LDM_FUSED_HD int total() const { return rounds * steps; }  // vectors of a thread in an item
  LDM_FUSED_HD int segments() const { return (kept + segment - 1) / segment; }
  int64_t blocks() const { return int64_t(team) * teams; }
};

// What the tensors of a pass ask for.
struct Demand {
  int vector;     // elements, see Residence
  int bytes;      // of one element in all tensors that are read
  int narrowest;  // bytes of an element of the narrowest tensor
  int moved;      // bytes of an element that are read and written
  int partial;    // floats of a partial result
  int totals;     // floats of each channel's totals; 0: nobody asks for them
  int channel;    // floats that are known of each channel
  int together;   // vectors that a thread works on side by side
  Rates rates;    // what its kernels take
};

constexpr int kMostSegments = 4;  // of an item: what a thread begins with is a quarter of its vectors
constexpr int kMostLanes = 32;
constexpr int kLine = 8;                  // vectors of 16 bytes that make a line of 128 bytes
constexpr int kLeastRow = 64;             // bytes of a channels_last row, where groups can be bundled to it
constexpr int kSector = 32;               // bytes: a row that is no multiple of it wastes a part of one
constexpr int kSmallItem = 8192;          // bytes: smaller groups share a block
constexpr int kEnoughResidentBlocks = 2;  // a multiprocessor: as many blocks as a bundle of groups must leave

// Bytes of shared memory beside the slots: each channel's parameters, the partial results, each group's result, and
// what the team exchanges of a group and of its channels.
inline int tables_of(const Residence& r, const Demand& demand) {
  const int floats = (demand.channel + demand.totals) * r.width + demand.partial * r.entries + 4 * r.bundle;
  return int(round_up(4 * floats, 16));
}

// Vectors in a piece of memory, rounded up to whole lines or sectors where it is long enough for that.
inline int64_t whole(int64_t vectors) { return round_up(vectors, vectors >= 8 * kLine ? kLine : vectors >= 2 ? 2 : 1); }

// Cuts a block's chunk into units so that the fewest lanes are idle. The lanes of a unit read whole lines, where the
// chunk has any; reducing a unit costs about as much as one more vector.
inline void cut_rows(Residence& r) {
  r.chunk = int(whole(ceil_div(r.extent, r.team)));
  int64_t least = INT64_MAX;
  for (int lanes = kMostLanes; lanes >= 1; lanes /= 2) {
    if (lanes > 1 && lanes / 2 >= r.chunk) continue;
    if (lanes < kLine && least < INT64_MAX) break;
    const int abreast = r.threads / lanes;
    for (int rounds = 1; rounds <= 4; ++rounds) {
      const int length = int(whole(ceil_div(r.chunk, std::max(1, rounds * abreast / r.width))));
      const int parts = int(ceil_div(r.chunk, length));
      const int taken = int(ceil_div(int64_t(r.width) * parts, abreast));
      const int steps = int(ceil_div(length, lanes));
      const int64_t cost = int64_t(taken) * (steps + 1);
      if (cost >= least) continue;
      least = cost;
      r.lanes = lanes;
      r.parts = parts;
      r.length = length;
      r.rounds = taken;
      r.steps = steps;
    }
  }
  r.entries = r.width * r.parts;
}

inline void cut_columns(Residence& r) {
  r.chunk = int(ceil_div(r.extent, r.team));
  r.lanes = r.width / r.vector;
  r.parts = r.rounds = 1;
  r.length = r.chunk;
  const int warps = r.threads / 32;
  r.steps = int(ceil_div(r.chunk, warps * (32 / r.lanes)));
  r.entries = r.width * warps;
}

// How many groups an item has; 0: none fits.
inline int bundle_of(const Shape& shape, bool columns, const Demand& demand, const Device& device) {
  const int64_t per_group = shape.channels_per_group();
  int found = 0;
  if (!columns) {
    const int64_t bytes = per_group * shape.spatial * demand.bytes;
    for (int bundle = 1; bundle <= shape.groups && (bundle == 1 || bundle * bytes <= kSmallItem); ++bundle) {
      if (shape.groups % bundle) continue;
      const int64_t items = shape.batch * shape.groups / bundle;
      if (bundle == 1 || items >= kEnoughResidentBlocks * device.multiprocessors) found = bundle;
    }
    return found;
  }
  for (int bundle = 1; bundle <= shape.groups && bundle * per_group <= kMostLanes * demand.vector; ++bundle) {
    if (shape.groups % bundle || bundle * per_group % demand.vector) continue;
    const int64_t row = bundle * per_group * demand.narrowest;
    if (row % kSector == 0 && row >= kLeastRow) return bundle;
    if (found == 0 || row % kSector == 0) found = bundle;
  }
  return found;
}

// How a team of so many blocks shares an item; kept is 0 where no vector fits.
inline Residence reside(const Shape& shape, bool columns, int bundle, int team, int threads, const Demand& demand,
                        const Device& device) {
  Residence r{};
  r.columns = columns;
  r.vector = demand.vector;
  r.bundle = bundle;
  r.width = int(bundle * shape.channels_per_group());
  r.items = shape.batch * (shape.groups / bundle);
  r.team = team;
  const int64_t vectors = shape.spatial * r.width / demand.vector;
  r.threads = int(std::min<int64_t>(threads, round_up(ceil_div(vectors, team), 32)));
  r.extent = int(columns ? shape.spatial : shape.spatial / demand.vector);
  columns ? cut_columns(r) : cut_rows(r);
  r.abreast = columns ? r.threads / 32 * (32 / r.lanes) : r.threads / r.lanes;
  r.tables = tables_of(r, demand);
  const int slot = r.threads * demand.vector * demand.bytes;
  r.slots = std::max(0, device.shared_per_block - r.tables) / slot;
  r.kept = std::min(r.slots, r.total());
  r.segment =
      r.rounds > 1 ? r.steps : int(std::max<int64_t>(1, round_up(ceil_div(r.kept, kMostSegments), demand.together)));
  return r;
}

inline void finish(Residence& r, Exchange exchange, int64_t teams, int64_t slots, int64_t items_of_sample,
                   const Demand& demand) {
  r.exchange = exchange;
  r.teams = int(teams);
  r.slots = int(std::min<int64_t>(r.slots, slots));
  r.shared_bytes = r.tables + r.slots * r.threads * demand.vector * demand.bytes;
  r.by_items_of_sample = Divisor(uint32_t(items_of_sample));
  r.by_team = Divisor(uint32_t(r.team));
  r.by_lanes = Divisor(uint32_t(r.lanes));
  r.by_parts = Divisor(uint32_t(r.parts));
  r.by_abreast = Divisor(uint32_t(r.abreast));
  r.by_group_channels = Divisor(uint32_t(r.width / r.bundle));
}

// Blocks that a multiprocessor holds at once, by their registers and shared memory. The system keeps 1 KB of shared
// memory for each block; shared_per_block, the most that a block may ask for, leaves it out.
inline int blocks_abreast(const Residence& r, const Device& device) {
  constexpr int kReserved = 1024, kRegisters = 65536;
  const int registers = kRegisters / kMostThreads;
  return std::max(1, std::min(kRegisters / (registers * r.threads),
                              (device.shared_per_block + kReserved) / (r.shared_bytes + kReserved)));
}

// Clusters that the device holds at once. The multiprocessors of a cluster lie in one part of the chip, and those that
// a part has above a multiple of the cluster's stay without.
inline int64_t clusters_abreast(const Residence& r, const Device& device) {
  const int processors = device.multiprocessors;
  const int usable = r.team <= 2 ? processors : int(processors * kUsedByClusters) / r.team * r.team;
  return std::max<int64_t>(1, int64_t(usable) * blocks_abreast(r, device) / r.team);
}

// Bytes that an item's blocks read again, because they do not fit.
inline int64_t read_again(const Residence& r, const Demand& demand) {
  if (r.kept == r.total()) return 0;
  const int64_t unit = r.columns ? r.abreast : r.lanes;  // threads side by side
  const auto beyond = [&](int64_t length, int64_t kept) { return std::max<int64_t>(0, length - kept * unit); };
  // Of a block that has so much of each channel, in vectors, or for columns in rows of them.
  const auto of_block = [&](int64_t chunk) -> int64_t {
    if (r.columns) return beyond(chunk, r.kept) * r.lanes;
    const int64_t whole_parts = chunk / r.length, rest = chunk % r.length;
    int64_t again = 0;
    for (int round = 0; round < r.rounds; ++round) {
      const int64_t kept = std::min(std::max(0, r.kept - round * r.steps), r.steps);
      again += whole_parts * beyond(r.length, kept) + beyond(rest, kept);
    }
    return again * r.width / r.rounds;  // as if each round had its share of all parts
  };
  const int64_t vectors = r.extent / r.chunk * of_block(r.chunk) + of_block(r.extent % r.chunk);
  return vectors * r.vector * demand.bytes;
}

// Nanoseconds, by estimate.
inline double time_of(const Residence& r, const Shape& shape, const Demand& demand, const Device& device) {
  const double moved = double(r.width) * double(shape.spatial) * demand.moved / r.team;  // by a block, of an item
  if (r.exchange == Exchange::grid) {
    const double again = double(read_again(r, demand)) / r.team;
    return time_of_grid(ceil_div(r.items, r.teams), moved, again, r.columns, r.team, demand.rates);
  }
  const int64_t abreast = std::min(r.items, clusters_abreast(r, device));
  const int64_t blocks = ceil_div(abreast * r.team, device.multiprocessors);
  return time_of_clusters(ceil_div(r.items, abreast), moved * double(blocks), r.team,
                          double(blocks) * r.threads / kMostThreads, demand.rates);
}

inline double time_of_two_passes(const Shape& shape, const Demand& demand, const Device& device) {
  const double bytes = double(shape.elements()) * (demand.moved + demand.bytes) / device.multiprocessors;
  return time_of_streaming(bytes, shape.walks_columns(),
                           partials_of(shape, tile(shape, demand.vector, /*aligned=*/true, device)));
}

// Keeps the whole item in one block or cluster, one item a team.
inline bool reside_in_clusters(const Shape& shape, bool columns, int bundle, const Demand& demand, const Device& device,
                               Residence& found) {
  const int64_t items = shape.batch * (shape.groups / bundle);
  double least = 0;
  for (int team = 1; team <= device.max_cluster && items * team < int64_t(1) << 31; team *= 2) {
    for (const int threads : {kFewerThreads, kMostThreads}) {
      Residence r = reside(shape, columns, bundle, team, threads, demand, device);
      if (r.kept < r.total() || (threads == kMostThreads && r.threads <= kFewerThreads)) continue;
      if (device.wanted.team > 0 && (team != device.wanted.team || threads != device.wanted.threads)) continue;
      finish(r, team == 1 ? Exchange::block : Exchange::cluster, items, r.total(), shape.groups / bundle, demand);
      const double time = time_of(r, shape, demand, device);
      if (least == 0 || time < least) {
        least = time;
        found = r;
      }
    }
  }
  return least > 0;
}

// One block a multiprocessor, in teams of equal size that take one item after the other. Slots that an item leaves free
// take loads of the next one. False: no slot fits.
inline bool reside_in_grid(const Shape& shape, bool columns, int bundle, const Demand& demand, const Device& device,
                           Residence& found) {
  const int64_t items = shape.batch * (shape.groups / bundle), most = std::min<int64_t>(items, device.multiprocessors);
  double least = 0;
  const auto consider = [&](int64_t teams) {
    Residence r =
        reside(shape, columns, bundle, int(device.multiprocessors / teams), device.grid_threads, demand, device);
    if (r.kept == 0) return;
    finish(r, Exchange::grid, teams, 2 * int64_t(r.total()), shape.groups / bundle, demand);
    const double time = time_of(r, shape, demand, device);
    if (least > 0 && time >= least) return;
    least = time;
    found = r;
  };
  if (device.wanted.grid_teams > 0) {
    consider(std::min<int64_t>(most, device.wanted.grid_teams));
    return least > 0;
  }
  int64_t last = 0;
  for (int64_t rounds = 1; last != 1; rounds += 1 + rounds / 4) {
    const int64_t teams = std::min(ceil_div(items, std::min(rounds, items)), most);
    if (teams != last) consider(teams);
    last = teams;
  }
  return least > 0;
}

// Plans one read of the tensors. False: it is not possible, or two passes take less time.
inline bool reside(const Shape& shape, const Demand& demand, const Device& device, Residence& found) {
  const bool columns = shape.walks_columns();
  if ((columns ? shape.channels : shape.spatial) % demand.vector || shape.spatial >= int64_t(1) << 31) return false;
  if (shape.batch * shape.groups >= int64_t(1) << 31) return false;
  const int bundle = bundle_of(shape, columns, demand, device);
  const int64_t width = bundle * int64_t(shape.channels_per_group());
  if (width == 0 || width > device.shared_per_block / 32) return false;  // else the tables leave no room, or overflow
  const Wanted& wanted = device.wanted;
  if (wanted.two_passes) return false;
  const bool fits = reside_in_clusters(shape, columns, bundle, demand, device, found);
  Residence in_grid{};
  if (wanted.team > 0 || !device.grids || !reside_in_grid(shape, columns, bundle, demand, device, in_grid)) return fits;
  const double least = fits ? time_of(found, shape, demand, device) : time_of_two_passes(shape, demand, device);
  if (wanted.grid_teams == 0 && time_of(in_grid, shape, demand, device) >= least) return fits;
  found = in_grid;
  return true;
}

}  // namespace ldm_fused
