// What kernels do to a run, which is n consecutive elements. What belongs to a channel is one value for the whole run
// in a row, and an array along the run in a column. `at` hides the difference, so that each loop is written once.
// Included by kernels.inl.

template <class A>
struct SameForAll {
  Vector<A> value;
  LDM_FUSED_INLINE explicit SameForAll(A value) : value(all(value)) {}
  LDM_FUSED_INLINE Vector<A> at(int64_t) const { return value; }
  LDM_FUSED_INLINE Vector<A> part(int64_t, int) const { return value; }
  LDM_FUSED_INLINE A beyond() const { return value[0]; }  // in the lanes of a part that are not of the run
};

template <class A>
struct Along {
  const A* values;
  LDM_FUSED_INLINE Vector<A> at(int64_t i) const { return load(values + i); }
  LDM_FUSED_INLINE Vector<A> part(int64_t i, int count) const { return load_part<A>(values + i, count, A(0)); }
  LDM_FUSED_INLINE A beyond() const { return A(0); }
};

constexpr int kLine = 64;  // bytes of a cache line
constexpr int kAhead = 8;  // pixels between what is at hand and what is prefetched in the first walk through memory
constexpr int kInRow = 2, kPixels = 4;  // vectors side by side: as many as hide each other's latency
constexpr int kPixelsBackward = kVectorBytes == 64 ? 4 : 2;  // as many as registers hold beside the sums

// Asks for the lines of n consecutive elements that will be read soon. Any address will do.
template <int n, class T>
LDM_FUSED_INLINE void prefetch(const T* from) {
  for (int at = 0; at < n * int(sizeof(T)); at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(from) + at);
}

// Asks for a line of each of K pixels, `stride` elements apart, that will be read or written soon. Two or more vectors
// of a pixel share a line: the first one asks, where c, the channel that it begins with, is a multiple of a line's.
template <int K, class T>
LDM_FUSED_INLINE void prefetch_pixels(const T* from, int64_t stride, int64_t c) {
  if (c % (kLine / int(sizeof(T)))) return;
  for (int k = 0; k < K; ++k) __builtin_prefetch(from + k * stride + c);
}
template <int K, class T>
LDM_FUSED_INLINE void prefetch_pixels_to_write(T* to, int64_t stride, int64_t c) {
  if (c % (kLine / int(sizeof(T)))) return;
  for (int k = 0; k < K; ++k) __builtin_prefetch(to + k * stride + c, 1);
}

// Computes y of K vectors from element i on, `stride` elements apart.
template <int K, class X, class Y, bool Silu, class Source>
LDM_FUSED_INLINE void apply(const X* x, Y* y, int64_t stride, int64_t i, Source center, Source slope, Source offset) {
  const auto u = (load<K>(x + i, stride) - center.at(i)) * slope.at(i) + offset.at(i);
  store(y + i, stride, Silu ? silu(u) : u);
}

template <class X, class Y, bool Silu, class Source, class A = Accumulate<X>>
LDM_FUSED_INLINE void apply_part(const X* x, Y* y, int64_t i, int count, Source center, Source slope, Source offset) {
  Pack<A, 1> u;
  u.v[0] = (load_part<X>(x + i, count, 0) - center.part(i, count)) * slope.part(i, count) + offset.part(i, count);
  store_part<Y>(y + i, (Silu ? silu(u) : u).v[0], count);
}

// What both walks of the backward pass compute of each element: x - center, and dz = dy * activation'(u).
template <class A, int K>
struct Derivative {
  Pack<A, K> centered, dz;
};

template <int K, class X, class Y, bool Silu, class Source, class A = Accumulate<X>>
LDM_FUSED_INLINE Derivative<A, K> derivative(const X* x, const Y* dy, int64_t stride, int64_t i, Source center,
                                             Source slope, Source offset) {
  Derivative<A, K> d;
  d.centered = load<K>(x + i, stride) - center.at(i);
  d.dz = load<K>(dy + i, stride);
  if (Silu) d.dz = silu_backward(d.dz, d.centered * slope.at(i) + offset.at(i));
  return d;
}

template <class X, class Y, bool Silu, class Source, class A = Accumulate<X>>
LDM_FUSED_INLINE Derivative<A, 1> derivative_part(const X* x, const Y* dy, int64_t i, int count, Source center,
                                                  Source slope, Source offset) {
  Derivative<A, 1> d;
  d.centered.v[0] = load_part<X>(x + i, count, center.beyond()) - center.part(i, count);  // 0 beyond the run
  d.dz.v[0] = load_part<Y>(dy + i, count, 0);
  if (Silu) d.dz = silu_backward(d.dz, d.centered * slope.part(i, count) + offset.part(i, count));
  return d;
}

// `shortcut` is the shortcut's gradient, or null.
template <int K, class X, class Y, bool Silu, class Source>
LDM_FUSED_INLINE void input_gradient(const X* x, const Y* dy, const X* shortcut, X* dx, int64_t stride, int64_t i,
                                     Source center, Source slope, Source offset, Source k1, Source k2) {
  const auto d = derivative<K, X, Y, Silu>(x, dy, stride, i, center, slope, offset);
  auto gradient = d.dz * slope.at(i) - k1.at(i) - d.centered * k2.at(i);
  if (shortcut) gradient = gradient + load<K>(shortcut + i, stride);
  store(dx + i, stride, gradient);
}

template <class X, class Y, bool Silu, class Source>
LDM_FUSED_INLINE void input_gradient_part(const X* x, const Y* dy, const X* shortcut, X* dx, int64_t i, int count,
                                          Source center, Source slope, Source offset, Source k1, Source k2) {
  const auto d = derivative_part<X, Y, Silu>(x, dy, i, count, center, slope, offset);
  auto gradient = d.dz * slope.part(i, count) - k1.part(i, count) - d.centered * k2.part(i, count);
  if (shortcut) gradient.v[0] += load_part<X>(shortcut + i, count, 0);
  store_part<X>(dx + i, gradient.v[0], count);
}

// y = (x + residual + bias) * scale over a run.
template <class X, class Source, class A = Accumulate<X>>
LDM_FUSED_INLINE void add_residual(const X* x, const X* residual, X* y, int64_t n, Source bias, A scale) {
  constexpr int W = kLanes<A>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, (load(x + i) + load(residual + i) + bias.at(i)) * scale);
  if (const int rest = int(n - i)) {
    const Vector<A> sum = load_part<X>(x + i, rest, 0) + load_part<X>(residual + i, rest, 0) + bias.part(i, rest);
    store_part<X>(y + i, sum * scale, rest);
  }
}
