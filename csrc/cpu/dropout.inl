// Dropout's factors over a run (dropout.h), by as many counters side by side as a vector has 64-bit lanes. Included by
// kernels.inl.

using WideVector = Vector<uint64_t>;
constexpr int kCounters = kLanes<uint64_t>;
constexpr int64_t kDrawn = 1024;  // elements whose bits are drawn at once, into the first-level cache

// The products of the lanes' lower halves.
LDM_FUSED_INLINE WideVector multiply_lower(WideVector a, uint32_t b) {
#if LDM_FUSED_VECTOR_BYTES == 64
  return (WideVector)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif LDM_FUSED_VECTOR_BYTES == 32
  return (WideVector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffff) * b;
#endif
}

// random_bits() of kCounters counters. What the upper halves of the words hold meanwhile does not matter.
LDM_FUSED_INLINE void draw(uint64_t seed, uint64_t counter, uint16_t* bits) {
  WideVector c0, c2{}, c3{};
  for (int i = 0; i < kCounters; ++i) c0[i] = counter + i;
  WideVector c1 = c0 >> 32;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideVector product0 = multiply_lower(c0, kPhiloxFactor[0]), product1 = multiply_lower(c2, kPhiloxFactor[1]);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c1 = product1;
    c3 = product0;
    key0 += kPhiloxWeyl[0];
    key1 += kPhiloxWeyl[1];
  }
  const WideVector first = (c0 & 0xffffffff) | c1 << 32, second = (c2 & 0xffffffff) | c3 << 32;
  uint64_t words[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    words[2 * i] = first[i];
    words[2 * i + 1] = second[i];
  }
  memcpy(bits, words, sizeof words);  // in the order of RandomBits::of() where the lowest byte comes first
}

// The factor of each lane, from the bits of as many elements.
template <class A>
LDM_FUSED_INLINE Vector<A> factors(const uint16_t* bits, const Dropout& dropout) {
  using Int = typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type;
  const auto drawn = __builtin_convertvector(read<typename VectorType<uint16_t, kLanes<A>>::type>(bits), Vector<Int>);
  return drawn < all(Int(dropout.keep_below)) ? all(A(dropout.scale)) : all(A(0));
}

// to = from * factors for n elements, which are the tensor's from `first` on.
template <class From, class To, class A>
void drop(const From* from, To* to, int64_t n, int64_t first, const Dropout& dropout) {
  constexpr int W = kLanes<A>;
  constexpr int64_t kStep = kCounters * kElementsPerCounter;
  const uint64_t seed = uint64_t(*dropout.seed);
  uint16_t bits[kDrawn];
  for (int64_t done = 0; done < n;) {
    const int64_t skipped = (first + done) % kElementsPerCounter;
    const int64_t count = n - done < kDrawn - W - skipped ? n - done : kDrawn - W - skipped;
    const uint64_t counter = uint64_t(first + done) / kElementsPerCounter;
    for (int64_t at = 0; at < skipped + count + W; at += kStep) {  // enough for whole vectors
      draw(seed, counter + uint64_t(at / kElementsPerCounter), bits + at);
    }
    int64_t i = 0;
    for (; i + W <= count; i += W) {
      store(to + done + i, load(from + done + i) * factors<A>(bits + skipped + i, dropout));
    }
    if (const int rest = int(count - i)) {
      const Vector<A> factor = factors<A>(bits + skipped + i, dropout);
      store_part<To>(to + done + i, load_part<From>(from + done + i, rest, 0) * factor, rest);
    }
    done += count;
  }
}
