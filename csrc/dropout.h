// Dropout's mask: what is kept of a tensor is a function of a seed and of each element's place in memory, so that it is
// computed where it is wanted, forward and again backward, and never stored. The same on CPU and CUDA.
//
// The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the
// seed. Counter i gives 128 bits, 16 for each of the elements 8 i to 8 i + 7, which meet a probability to 2^-17. 32
// would take twice the multiplications; an estimate speaks against them (benchmarks/NOTES.md).
#pragma once

#include "dtypes.h"

namespace ldm_fused {

struct Dropout {
  const int64_t* seed;  // one element, where the kernels run; null: no dropout
  uint32_t keep_below;  // an element whose 16 bits are below is kept
  double scale;         // and multiplied by this, the others by 0: NaN stays NaN
  float scale_single;   // the same for arithmetic in float: a kernel does not convert it for every vector

  template <class A>
  LDM_FUSED_HD A scale_as() const {
    if constexpr (sizeof(A) == 8) return scale;
    return scale_single;
  }
};

inline Dropout dropout_of(const int64_t* seed, double p) {
  const double scale = 1 / (1 - p);
  return {seed, uint32_t((1 - p) * 65536 + 0.5), scale, float(scale)};
}

constexpr int kPhiloxRounds = 10, kElementsPerCounter = 8;
constexpr uint32_t kPhiloxFactor[] = {0xD2511F53, 0xCD9E8D57}, kPhiloxWeyl[] = {0x9E3779B9, 0xBB67AE85};

struct RandomBits {
  uint32_t words[4];

  // The bits of the counter's i-th element. They are chosen by conditions, since a GPU's registers have no index.
  LDM_FUSED_HD uint32_t of(int i) const {
    const uint32_t first = i < 2 ? words[0] : words[1], second = i < 6 ? words[2] : words[3];
    return (i < 4 ? first : second) >> (i % 2 * 16) & 0xffff;
  }
};

LDM_FUSED_HD RandomBits random_bits(uint64_t seed, uint64_t counter) {
  constexpr uint32_t kFactor0 = kPhiloxFactor[0], kFactor1 = kPhiloxFactor[1];
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 5  // not whole: the loops of several vectors would run side by side, and more registers than there are
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t(kFactor0) * c0, product1 = uint64_t(kFactor1) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace ldm_fused
