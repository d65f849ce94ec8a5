// The inner loops, for vectors of LDM_FUSED_VECTOR_BYTES. Included by kernels_*.cpp, each inside a namespace and a
// compiler target of its own. Written with the compiler's vector types, which GCC and Clang share: they are explicit
// where auto-vectorisation of conversions and exponentials is left to luck, and read like the arithmetic they do.

constexpr int kVectorBytes = LDM_FUSED_VECTOR_BYTES;
#define LDM_FUSED_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

using FloatVector = Vector<float>;
using IntVector = VectorOf<float>::bits;
typedef uint16_t ShortVector __attribute__((vector_size(kVectorBytes / 2)));  // as many as there are floats

// ---- Loads and stores -----------------------------------------------------------------------------------------

template <class To, class From>
LDM_FUSED_INLINE To read(const From* from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

LDM_FUSED_INLINE FloatVector load(const float* from) { return read<FloatVector>(from); }
LDM_FUSED_INLINE Vector<double> load(const double* from) { return read<Vector<double>>(from); }

LDM_FUSED_INLINE FloatVector load(const BFloat16* from) {
#if LDM_FUSED_VECTOR_BYTES == 32  // GCC widens a convertvector in two halves
  return (FloatVector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16);
#else
  return (FloatVector)(__builtin_convertvector(read<ShortVector>(from), IntVector) << 16);
#endif
}

LDM_FUSED_INLINE FloatVector load(const Half* from) {
#if LDM_FUSED_VECTOR_BYTES == 32
  return (FloatVector)_mm256_cvtph_ps(read<__m128i>(from));
#else
  FloatVector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(from[i]);
  return v;
#endif
}

LDM_FUSED_INLINE void store(float* to, FloatVector v) { memcpy(to, &v, sizeof v); }
LDM_FUSED_INLINE void store(double* to, Vector<double> v) { memcpy(to, &v, sizeof v); }

LDM_FUSED_INLINE void store(BFloat16* to, FloatVector v) {
  const IntVector bits = (IntVector)v;
  const IntVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVector quiet_nan = (bits >> 16) | 0x0040;
  const ShortVector narrowed = __builtin_convertvector(v == v ? rounded : quiet_nan, ShortVector);
  memcpy(to, &narrowed, sizeof narrowed);
}

LDM_FUSED_INLINE void store(Half* to, FloatVector v) {
#if LDM_FUSED_VECTOR_BYTES == 32
  const __m128i narrowed = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &narrowed, sizeof narrowed);
#else
  for (int i = 0; i < kLanes<float>; ++i) to[i] = narrow<Half>(v[i]);
#endif
}

// The last `count` elements of a run, fewer than a vector: the lanes beyond hold `fill`.
template <class T>
LDM_FUSED_INLINE Vector<Accumulate<T>> load_part(const T* from, int count, Accumulate<T> fill) {
  Vector<Accumulate<T>> v = Vector<Accumulate<T>>{} + fill;
  for (int i = 0; i < count; ++i) v[i] = widen(from[i]);
  return v;
}

template <class T>
LDM_FUSED_INLINE void store_part(T* to, Vector<Accumulate<T>> v, int count) {
  for (int i = 0; i < count; ++i) to[i] = narrow<T>(v[i]);
}

template <class A>
LDM_FUSED_INLINE A sum_of(Vector<A> v) {
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

// ---- Activation -----------------------------------------------------------------------------------------------

// exp by 2^n * e^r with |r| <= ln 2 / 2 and the Taylor series of e^r to the 7th power, whose error there is below a
// tenth of a unit in the last place. 2^n is multiplied in two halves, so that results overflow to infinity and
// underflow through the subnormals to zero as they should. NaN passes.
LDM_FUSED_INLINE FloatVector exponential(FloatVector x) {
  x = x > 105.0f ? FloatVector{} + 105.0f : x;
  x = x < -105.0f ? FloatVector{} - 105.0f : x;
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const FloatVector shifted = x * 1.44269504088896f + kMagic;
  const FloatVector n = shifted - kMagic;
  const IntVector exponent = (IntVector)shifted - (IntVector)(FloatVector{} + kMagic);
  FloatVector r = x - n * 0.693145751953125f;  // ln 2 in two parts, the first exact in products with n
  r = r - n * 1.42860682030941723212e-6f;
  FloatVector p = FloatVector{} + 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IntVector half = exponent >> 1;
  return p * (FloatVector)((half + 127) << 23) * (FloatVector)((exponent - half + 127) << 23);
}

LDM_FUSED_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
LDM_FUSED_INLINE V silu_of(V u) {
  return u / (exponential(-u) + 1);
}

// d/du (u * sigmoid(u))
template <class V>
LDM_FUSED_INLINE V silu_slope(V u) {
  const V s = 1 / (exponential(-u) + 1);
  return s * (1 + u * (1 - s));
}

// ---- Runs -----------------------------------------------------------------------------------------------------
// A run is n consecutive elements. What belongs to a channel is one value for the whole run in a row and an array
// along the run in a column; `at` hides the difference, so that each loop is written once.

template <class A>
struct SameForAll {
  A value;
  LDM_FUSED_INLINE Vector<A> at(int64_t) const { return Vector<A>{} + value; }
  LDM_FUSED_INLINE Vector<A> part(int64_t, int) const { return Vector<A>{} + value; }
};

template <class A>
struct Along {
  const A* values;
  LDM_FUSED_INLINE Vector<A> at(int64_t i) const { return load(values + i); }
  LDM_FUSED_INLINE Vector<A> part(int64_t i, int count) const { return load_part<A>(values + i, count, A(0)); }
};

template <class X, class Y, bool Silu, class Source>
LDM_FUSED_INLINE void apply_run(const X* x, Y* y, int64_t n, Source center, Source slope, Source offset) {
  using A = Accumulate<X>;
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vector<A> u = (load(x + i) - center.at(i)) * slope.at(i) + offset.at(i);
    store(y + i, Silu ? silu_of(u) : u);
  }
  if (const int rest = int(n - i)) {
    const Vector<A> u =
        (load_part<X>(x + i, rest, 0) - center.part(i, rest)) * slope.part(i, rest) + offset.part(i, rest);
    store_part<Y>(y + i, Silu ? silu_of(u) : u, rest);
  }
}

template <class X, class Y, bool Silu, class Source>
LDM_FUSED_INLINE void input_gradient_run(const X* x, const Y* dy, X* dx, int64_t n, Source center, Source slope,
                                         Source offset, Source k1, Source k2) {
  using A = Accumulate<X>;
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vector<A> centered = load(x + i) - center.at(i), s = slope.at(i);
    Vector<A> dz = load(dy + i);
    if (Silu) dz *= silu_slope(centered * s + offset.at(i));
    store(dx + i, s * dz - k1.at(i) - k2.at(i) * centered);
  }
  if (const int rest = int(n - i)) {
    const Vector<A> centered = load_part<X>(x + i, rest, 0) - center.part(i, rest), s = slope.part(i, rest);
    Vector<A> dz = load_part<Y>(dy + i, rest, 0);
    if (Silu) dz *= silu_slope(centered * s + offset.part(i, rest));
    store_part<X>(dx + i, s * dz - k1.part(i, rest) - k2.part(i, rest) * centered, rest);
  }
}

// ---- Rows -----------------------------------------------------------------------------------------------------

// Mean and squared deviations in two steps over a chunk that stays in the cache. The first step sums what x differs
// from its first element, divided by a power of two that keeps the sum from overflowing; the second measures how far
// the rounded mean was off, and both results are corrected by that.
template <class X>
Moments row_moments(const X* x, int64_t n) {
  using A = Accumulate<X>;
  using V = Vector<A>;
  constexpr int W = kLanes<A>, kSums = 4;  // independent sums hide the adder's latency
  const A first = widen(x[0]);
  A power = 1;
  for (int64_t m = n; m > 1; m /= 2) power *= A(0.5);

  V sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * W <= n; i += kSums * W) {
    for (int k = 0; k < kSums; ++k) sums[k] += (load(x + i + k * W) - first) * power;
  }
  for (; i + W <= n; i += W) sums[0] += (load(x + i) - first) * power;
  if (const int rest = int(n - i)) sums[1] += (load_part<X>(x + i, rest, first) - first) * power;
  const double sum = double(sum_of<A>((sums[0] + sums[1]) + (sums[2] + sums[3])));
  const A mean = A(double(first) + sum / double(power) / double(n));

  V squares[kSums]{}, off[kSums]{};
  for (i = 0; i + kSums * W <= n; i += kSums * W) {
    for (int k = 0; k < kSums; ++k) {
      const V centered = load(x + i + k * W) - mean;
      squares[k] += centered * centered;
      off[k] += centered;
    }
  }
  for (; i < n; i += W) {
    const V centered = (n - i < W ? load_part<X>(x + i, int(n - i), mean) : load(x + i)) - mean;
    squares[0] += centered * centered;
    off[0] += centered;
  }
  const double m2 = double(sum_of<A>((squares[0] + squares[1]) + (squares[2] + squares[3])));
  const double error = double(sum_of<A>((off[0] + off[1]) + (off[2] + off[3]))) / double(n);
  return {double(n), double(mean) + error, m2 - error * error * double(n)};
}

template <class X, class Y, class A = Accumulate<X>>
void row_apply(const X* x, Y* y, int64_t n, const ChannelAffine<A>& affine, bool silu) {
  const SameForAll<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  silu ? apply_run<X, Y, true>(x, y, n, center, slope, offset) : apply_run<X, Y, false>(x, y, n, center, slope, offset);
}

template <class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE GradientSums<double> sums_run(const X* x, const Y* dy, int64_t n, const ChannelAffine<A>& affine) {
  using V = Vector<A>;
  constexpr int W = kLanes<A>;
  V sum_dz{}, sum_dz_x{}, sum_x{};
  for (int64_t i = 0; i < n; i += W) {
    const int count = n - i < W ? int(n - i) : W;
    const V centered = (count < W ? load_part<X>(x + i, count, affine.center) : load(x + i)) - affine.center;
    V dz = count < W ? load_part<Y>(dy + i, count, 0) : load(dy + i);
    if (Silu) dz *= silu_slope(centered * affine.slope + affine.offset);
    sum_dz += dz;
    sum_dz_x += dz * centered;
    sum_x += centered;
  }
  return {double(sum_of<A>(sum_dz)), double(sum_of<A>(sum_dz_x)), double(sum_of<A>(sum_x))};
}

template <class X, class Y, class A = Accumulate<X>>
GradientSums<double> row_sums(const X* x, const Y* dy, int64_t n, const ChannelAffine<A>& affine, bool silu) {
  return silu ? sums_run<X, Y, true>(x, dy, n, affine) : sums_run<X, Y, false>(x, dy, n, affine);
}

template <class X, class Y, class A = Accumulate<X>>
void row_input_gradient(const X* x, const Y* dy, X* dx, int64_t n, const ChannelAffine<A>& affine,
                        const Projection<A>& projection, bool silu) {
  const SameForAll<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  const SameForAll<A> k1{projection.k1}, k2{projection.k2};
  silu ? input_gradient_run<X, Y, true>(x, dy, dx, n, center, slope, offset, k1, k2)
       : input_gradient_run<X, Y, false>(x, dy, dx, n, center, slope, offset, k1, k2);
}

// ---- Columns --------------------------------------------------------------------------------------------------

// As row_moments, for every channel at once. `m2` serves as the array of sums of the first step.
template <class X, class A = Accumulate<X>>
void column_moments(const X* x, int64_t pixels, int64_t channels, A* mean, A* m2) {
  constexpr int W = kLanes<A>;
  const A share = A(1) / A(pixels);
  for (int64_t c = 0; c < channels; ++c) m2[c] = 0;
  for (int64_t p = 1; p < pixels; ++p) {
    const X* row = x + p * channels;
    int64_t c = 0;
    for (; c + W <= channels; c += W) store(m2 + c, load(m2 + c) + (load(row + c) - load(x + c)) * share);
    for (; c < channels; ++c) m2[c] += (widen(row[c]) - widen(x[c])) * share;
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = widen(x[c]) + m2[c];
    m2[c] = 0;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    const X* row = x + p * channels;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      const Vector<A> centered = load(row + c) - load(mean + c);
      store(m2 + c, load(m2 + c) + centered * centered);
    }
    for (; c < channels; ++c) {
      const A centered = widen(row[c]) - mean[c];
      m2[c] += centered * centered;
    }
  }
}

template <class X, class Y, class A = Accumulate<X>>
void column_apply(const X* x, Y* y, int64_t pixels, int64_t channels, const ColumnAffine<A>& affine, bool silu) {
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  for (int64_t p = 0; p < pixels; ++p, x += channels, y += channels) {
    silu ? apply_run<X, Y, true>(x, y, channels, center, slope, offset)
         : apply_run<X, Y, false>(x, y, channels, center, slope, offset);
  }
}

template <class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void column_sums_run(const X* x, const Y* dy, int64_t channels, const ColumnAffine<A>& affine, A* dz,
                                      A* dz_x, A* sum_x) {
  using V = Vector<A>;
  constexpr int W = kLanes<A>;
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  int64_t c = 0;
  for (; c + W <= channels; c += W) {
    const V centered = load(x + c) - center.at(c);
    V z = load(dy + c);
    if (Silu) z *= silu_slope(centered * slope.at(c) + offset.at(c));
    store(dz + c, load(dz + c) + z);
    store(dz_x + c, load(dz_x + c) + z * centered);
    store(sum_x + c, load(sum_x + c) + centered);
  }
  if (const int rest = int(channels - c)) {
    const V centered = load_part<X>(x + c, rest, 0) - center.part(c, rest);
    V z = load_part<Y>(dy + c, rest, 0);
    if (Silu) z *= silu_slope(centered * slope.part(c, rest) + offset.part(c, rest));
    store_part<A>(dz + c, load_part<A>(dz + c, rest, 0) + z, rest);
    store_part<A>(dz_x + c, load_part<A>(dz_x + c, rest, 0) + z * centered, rest);
    store_part<A>(sum_x + c, load_part<A>(sum_x + c, rest, 0) + centered, rest);
  }
}

template <class X, class Y, class A = Accumulate<X>>
void column_sums(const X* x, const Y* dy, int64_t pixels, int64_t channels, const ColumnAffine<A>& affine, bool silu,
                 A* dz, A* dz_x, A* sum_x) {
  for (int64_t c = 0; c < channels; ++c) dz[c] = dz_x[c] = sum_x[c] = 0;
  for (int64_t p = 0; p < pixels; ++p, x += channels, dy += channels) {
    silu ? column_sums_run<X, Y, true>(x, dy, channels, affine, dz, dz_x, sum_x)
         : column_sums_run<X, Y, false>(x, dy, channels, affine, dz, dz_x, sum_x);
  }
}

template <class X, class Y, class A = Accumulate<X>>
void column_input_gradient(const X* x, const Y* dy, X* dx, int64_t pixels, int64_t channels,
                           const ColumnAffine<A>& affine, const A* k1, const A* k2, bool silu) {
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset}, first{k1}, second{k2};
  for (int64_t p = 0; p < pixels; ++p, x += channels, dy += channels, dx += channels) {
    silu ? input_gradient_run<X, Y, true>(x, dy, dx, channels, center, slope, offset, first, second)
         : input_gradient_run<X, Y, false>(x, dy, dx, channels, center, slope, offset, first, second);
  }
}

// ---- Table ----------------------------------------------------------------------------------------------------

template <class X, class Y>
Kernels<X, Y> kernels() {
  return {row_moments<X>,    row_apply<X, Y>,    row_sums<X, Y>,    row_input_gradient<X, Y>,
          column_moments<X>, column_apply<X, Y>, column_sums<X, Y>, column_input_gradient<X, Y>};
}

template Kernels<double, double> kernels();
template Kernels<float, float> kernels();
template Kernels<float, Half> kernels();
template Kernels<float, BFloat16> kernels();
template Kernels<Half, Half> kernels();
template Kernels<Half, float> kernels();
template Kernels<BFloat16, BFloat16> kernels();
template Kernels<BFloat16, float> kernels();

#undef LDM_FUSED_INLINE
