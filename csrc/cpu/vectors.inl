// Vectors of LDM_FUSED_VECTOR_BYTES: loads, stores, sums and the activation. Included by kernels.inl.
//
// Written with the vector types that GCC and Clang share. They are explicit where auto-vectorisation (`omp simd`,
// target_clones) leaves the conversions, the exponential and the ends of runs to luck. One source serves every
// instruction set, without depending on a library of intrinsics. An intrinsic stands only where the types cannot
// express an instruction: 16-bit conversions, masks, scaling by a power of two.

constexpr int kVectorBytes = LDM_FUSED_VECTOR_BYTES;
#define LDM_FUSED_INLINE inline __attribute__((always_inline))

template <class T, int Lanes>
struct VectorType {
  typedef T type __attribute__((vector_size(Lanes * sizeof(T))));
};
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));
template <class A>
using Vector = typename VectorType<A, kLanes<A>>::type;

using FloatVector = Vector<float>;
using IntVector = Vector<int32_t>;
using ShortVector = VectorType<uint16_t, kLanes<float>>::type;  // as many as there are floats

template <class A>
LDM_FUSED_INLINE Vector<A> all(A value) {
  return Vector<A>{} + value;
}

// ---- Loads and stores -----------------------------------------------------------------------------------------

template <class To>
LDM_FUSED_INLINE To read(const void* from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

#if LDM_FUSED_VECTOR_BYTES == 64

LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, BFloat16) {
  return (FloatVector)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
}
LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, Half) { return (FloatVector)_mm512_cvtph_ps((__m256i)v); }
LDM_FUSED_INLINE ShortVector narrow_all(FloatVector v, Half) {
  return (ShortVector)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}

#elif LDM_FUSED_VECTOR_BYTES == 32

LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, BFloat16) {  // GCC widens a convertvector in two halves
  return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
}
LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, Half) { return (FloatVector)_mm256_cvtph_ps((__m128i)v); }
LDM_FUSED_INLINE ShortVector narrow_all(FloatVector v, Half) {
  return (ShortVector)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}

#else

LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, BFloat16) {
  return (FloatVector)(__builtin_convertvector(v, IntVector) << 16);
}
LDM_FUSED_INLINE FloatVector widen_all(ShortVector v, Half) {
  FloatVector wide;
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = widen(Half{v[i]});
  return wide;
}
LDM_FUSED_INLINE ShortVector narrow_all(FloatVector v, Half) {
  ShortVector narrowed;
  for (int i = 0; i < kLanes<float>; ++i) narrowed[i] = narrow<Half>(v[i]).bits;
  return narrowed;
}

#endif

LDM_FUSED_INLINE ShortVector narrow_all(FloatVector v, BFloat16) {
#ifdef LDM_FUSED_AVX512_BF16  // one instruction; takes magnitudes below 2^-126 for zero
  return (ShortVector)_mm512_cvtneps_pbh((__m512)v);
#else
  const IntVector bits = (IntVector)v;
  const IntVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) | (v != v);  // NaN gets all bits set
#if LDM_FUSED_VECTOR_BYTES == 32  // GCC would mask what a convertvector narrows
  const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
  return (ShortVector)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  return __builtin_convertvector(rounded >> 16, ShortVector);
#endif
#endif
}

LDM_FUSED_INLINE FloatVector load(const float* from) { return read<FloatVector>(from); }
LDM_FUSED_INLINE Vector<double> load(const double* from) { return read<Vector<double>>(from); }
template <class T>
LDM_FUSED_INLINE FloatVector load(const T* from) {
  return widen_all(read<ShortVector>(from), T{});
}

LDM_FUSED_INLINE void store(float* to, FloatVector v) { memcpy(to, &v, sizeof v); }
LDM_FUSED_INLINE void store(double* to, Vector<double> v) { memcpy(to, &v, sizeof v); }
template <class T>
LDM_FUSED_INLINE void store(T* to, FloatVector v) {
  const ShortVector narrowed = narrow_all(v, T{});
  memcpy(to, &narrowed, sizeof narrowed);
}

// The last `count` elements of a run, fewer than a vector: the lanes beyond hold `fill`.
template <class T>
LDM_FUSED_INLINE Vector<Accumulate<T>> load_part(const T* from, int count, Accumulate<T> fill) {
  Vector<Accumulate<T>> v = all(fill);
  for (int i = 0; i < count; ++i) v[i] = widen(from[i]);
  return v;
}

template <class T>
LDM_FUSED_INLINE void store_part(T* to, Vector<Accumulate<T>> v, int count) {
  for (int i = 0; i < count; ++i) to[i] = narrow<T>(v[i]);
}

// By masks, whose accesses AddressSanitizer does not see unless they are stand-ins: under it the loops above stay, with
// the same counts.
#if LDM_FUSED_VECTOR_BYTES == 64 && (!defined(__SANITIZE_ADDRESS__) || defined(LDM_FUSED_AVX512_STAND_INS))

LDM_FUSED_INLINE __mmask16 first_lanes(int count) { return __mmask16((1u << count) - 1); }

template <>
LDM_FUSED_INLINE FloatVector load_part<float>(const float* from, int count, float fill) {
  return (FloatVector)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(count), from);
}
template <>
LDM_FUSED_INLINE void store_part<float>(float* to, FloatVector v, int count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v);
}

#define LDM_FUSED_SHORT_PARTS(T)                                                            \
  template <>                                                                               \
  LDM_FUSED_INLINE FloatVector load_part<T>(const T* from, int count, float fill) {         \
    const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), from);                \
    const __m512 wide = (__m512)widen_all((ShortVector)bits, T{});                          \
    return (FloatVector)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(count), wide); \
  }                                                                                         \
  template <>                                                                               \
  LDM_FUSED_INLINE void store_part<T>(T * to, FloatVector v, int count) {                   \
    _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)narrow_all(v, T{}));          \
  }
LDM_FUSED_SHORT_PARTS(Half)
LDM_FUSED_SHORT_PARTS(BFloat16)
#undef LDM_FUSED_SHORT_PARTS

#endif

// The sum of all lanes, added up in halves.
template <class A, int Lanes = kLanes<A>>
LDM_FUSED_INLINE A sum_of(typename VectorType<A, Lanes>::type v) {
  if constexpr (Lanes == 2) {
    return v[0] + v[1];
  } else {
    using HalfVector = typename VectorType<A, Lanes / 2>::type;
    HalfVector halves[2];
    memcpy(halves, &v, sizeof v);
    return sum_of<A, Lanes / 2>(halves[0] + halves[1]);
  }
}

// ---- Packs ----------------------------------------------------------------------------------------------------

// K vectors that go through the same arithmetic side by side, operation by operation. The exponential is a chain of 17
// operations, each waiting for the one before: a processor does not look far enough ahead to fill its units with one.
template <class A, int K>
struct Pack {
  Vector<A> v[K];
};

#define LDM_FUSED_PACK_OPERATOR(op)                                                         \
  template <class A, int K>                                                                 \
  LDM_FUSED_INLINE Pack<A, K> operator op(Pack<A, K> a, const Pack<A, K>& b) {              \
    for (int k = 0; k < K; ++k) a.v[k] = a.v[k] op b.v[k];                                  \
    return a;                                                                               \
  }                                                                                         \
  template <class A, int K>                                                                 \
  LDM_FUSED_INLINE Pack<A, K> operator op(Pack<A, K> a, typename Same<Vector<A>>::type b) { \
    for (int k = 0; k < K; ++k) a.v[k] = a.v[k] op b;                                       \
    return a;                                                                               \
  }                                                                                         \
  template <class A, int K>                                                                 \
  LDM_FUSED_INLINE Pack<A, K> operator op(typename Same<Vector<A>>::type a, Pack<A, K> b) { \
    for (int k = 0; k < K; ++k) b.v[k] = a op b.v[k];                                       \
    return b;                                                                               \
  }
template <class T>
struct Same {  // keeps an argument out of template deduction
  using type = T;
};
LDM_FUSED_PACK_OPERATOR(+)
LDM_FUSED_PACK_OPERATOR(-)
LDM_FUSED_PACK_OPERATOR(*)
LDM_FUSED_PACK_OPERATOR(/)
#undef LDM_FUSED_PACK_OPERATOR

// The vectors of a pack are `stride` elements apart.
template <int K, class T, class A = Accumulate<T>>
LDM_FUSED_INLINE Pack<A, K> load(const T* from, int64_t stride) {
  Pack<A, K> pack;
  for (int k = 0; k < K; ++k) pack.v[k] = load(from + k * stride);
  return pack;
}

template <class T, int K>
LDM_FUSED_INLINE void store(T* to, int64_t stride, const Pack<Accumulate<T>, K>& pack) {
  for (int k = 0; k < K; ++k) store(to + k * stride, pack.v[k]);
}

template <class A, int K>
LDM_FUSED_INLINE Vector<A> sum_of(const Pack<A, K>& pack) {
  Vector<A> sum = pack.v[0];
  for (int k = 1; k < K; ++k) sum += pack.v[k];
  return sum;
}

// ---- Activation -----------------------------------------------------------------------------------------------

// 1 + e^-u, which is all that the activation wants of an exponential: infinite where e^-u is, and 1 where it is too
// small to count. NaN need not pass: u takes part in the activation by itself. The chain from u to the result takes
// longer than the number of its operations, so both are kept small.
#if LDM_FUSED_VECTOR_BYTES == 64

// e^-u = 2^n * e^-r with n in sixteenths and |r| <= ln 2 / 32. AVX-512 has instructions for all that is not the
// polynomial: both limits at once, a table in a register, which takes the lowest four bits for its index, and scaling
// by 2^floor(n). The polynomial is 2 e^-r, with a term in r^2 that also takes up half of what r^4 would give: its
// largest relative error is 1.6e-9. It is doubled, and the table halved, so that no factor overflows before the product
// does.
template <int K>
LDM_FUSED_INLINE Pack<float, K> one_plus_exponential_of_minus(Pack<float, K> u) {
  const FloatVector magic = all(786432.0f);  // 1.5 * 2^19 rounds to sixteenths what is added to it
  const FloatVector half_roots = {0.5f,         0.522136867f, 0.545253873f, 0.56939429f,  0.594603539f, 0.620928884f,
                                  0.648419797f, 0.677127779f, 0.707106769f, 0.738413095f, 0.771105409f, 0.805245161f,
                                  0.840896428f, 0.878126085f, 0.917004049f, 0.957603276f};  // 2^(i/16 - 1)
  for (int k = 0; k < K; ++k) u.v[k] = (FloatVector)_mm512_range_ps((__m512)u.v[k], _mm512_set1_ps(89), 2);
  const Pack<float, K> shifted = magic - u * all(1.44269504088896f), n = shifted - magic;
  // ln 2 in two parts, the first exact in products with n
  const Pack<float, K> r = u + n * all(0.693145751953125f) + n * all(1.42860682030941723212e-6f);
  const Pack<float, K> p = all(2.0f) - r * (all(2.0f) - r * (all(1.0000324f) - r * all(0.3333333f)));
  Pack<float, K> scale;
  for (int k = 0; k < K; ++k) {
    const __m512 root = _mm512_permutexvar_ps((__m512i)shifted.v[k], (__m512)half_roots);
    scale.v[k] = (FloatVector)_mm512_scalef_ps(root, (__m512)n.v[k]);
  }
  return p * scale + all(1.0f);
}

#elif LDM_FUSED_VECTOR_BYTES == 32

// e^-u = 2^n * e^-r with n in eighths and |r| <= ln 2 / 16. The table holds the bits of 2^(i/8 - 1) less i * 2^20, so
// that adding n's eighths, which are the lowest bits of `shifted`, at that place makes 2^(n-1) of it. The polynomial is
// 2 e^-r, with a term in r^2 that also takes up most of what r^4 would give: its largest relative error is 2.6e-8, where
// half a unit in the last place is 6e-8.
template <int K>
LDM_FUSED_INLINE Pack<float, K> one_plus_exponential_of_minus(Pack<float, K> u) {
  const FloatVector magic = all(1572864.0f);  // 1.5 * 2^20 rounds to eighths what is added to it
  const IntVector roots = {0x3f000000, 0x3efb95c2, 0x3ef837f0, 0x3ef5fed7,
                           0x3ef504f3, 0x3ef5672a, 0x3ef744fd, 0x3efac0c7};
  for (int k = 0; k < K; ++k) {
    u.v[k] = (FloatVector)_mm256_max_ps(_mm256_set1_ps(-89), _mm256_min_ps(_mm256_set1_ps(87), (__m256)u.v[k]));
  }
  const Pack<float, K> shifted = magic - u * all(1.44269504088896f), n = shifted - magic;
  // ln 2 in two parts, the first exact in products with n
  const Pack<float, K> r = u + n * all(0.693145751953125f) + n * all(1.42860682030941723212e-6f);
  const Pack<float, K> p = all(2.0f) - r * (all(2.0f) - r * (all(1.0001295f) - r * all(0.33333333f)));
  Pack<float, K> scale;
  for (int k = 0; k < K; ++k) {
    const IntVector root = (IntVector)_mm256_permutevar8x32_epi32((__m256i)roots, (__m256i)shifted.v[k]);
    scale.v[k] = (FloatVector)(root + ((IntVector)shifted.v[k] << 20));
  }
  return p * scale + all(1.0f);
}

#else

// v between the limits.
LDM_FUSED_INLINE FloatVector clamped(FloatVector v, float low, float high) {
  v = v < low ? all(low) : v;
  return high < v ? all(high) : v;
}

// e^-u = 2^n * e^-r with |r| <= ln 2 / 2, and e^-r by the polynomial of degree 6 that begins with 1 - r and whose
// largest relative error is least (3.1e-9, a twentieth of half a unit in the last place). Its terms are paired so that
// few operations wait for each other.
template <int K>
LDM_FUSED_INLINE Pack<float, K> one_plus_exponential_of_minus(Pack<float, K> u) {
  // 1.5 * 2^23 rounds to whole numbers what is added to it, and has them in its lowest bits: with 126 on top, those of
  // the exponent of 2^(n-1), which is a float for all n wanted.
  const FloatVector magic = all(12582912.0f + 126.0f);
  for (int k = 0; k < K; ++k) u.v[k] = clamped(u.v[k], -89, 87);
  const Pack<float, K> shifted = magic - u * all(1.44269504088896f), n = shifted - magic;
  // ln 2 in two parts, the first exact in products with n
  const Pack<float, K> r = u + n * all(0.693145751953125f) + n * all(1.42860682030941723212e-6f);
  const Pack<float, K> r2 = r * r;
  const Pack<float, K> high = all(0.0416683907835f) - r * all(0.00836874510894f) + r2 * all(0.00138145401768f);
  const Pack<float, K> low = all(0.499999934321f) - r * all(0.16666520399f);
  Pack<float, K> p = (all(1.0f) - r) + r2 * (low + r2 * high);
  for (int k = 0; k < K; ++k) p.v[k] = (p.v[k] + p.v[k]) * (FloatVector)((IntVector)shifted.v[k] << 23) + 1.0f;
  return p;
}

#endif

template <int K>
LDM_FUSED_INLINE Pack<double, K> one_plus_exponential_of_minus(Pack<double, K> u) {
  for (int k = 0; k < K; ++k) {
    for (int i = 0; i < kLanes<double>; ++i) u.v[k][i] = 1 + std::exp(-u.v[k][i]);
  }
  return u;
}

template <class A, int K>
LDM_FUSED_INLINE Pack<A, K> silu(const Pack<A, K>& u) {
  return u / one_plus_exponential_of_minus(u);
}

// dy * d/du (u * sigmoid(u))
template <class A, int K>
LDM_FUSED_INLINE Pack<A, K> silu_backward(const Pack<A, K>& dy, const Pack<A, K>& u) {
  const Vector<A> one = all(A(1));
  const Pack<A, K> sigmoid = one / one_plus_exponential_of_minus(u);
  return (dy * sigmoid) * (one + u * (one - sigmoid));
}
