// The inner loops. Included by kernels_*.cpp, each inside a namespace and a compiler target of its own.

#include "cpu/vectors.inl"

// ---- Runs -----------------------------------------------------------------------------------------------------
// A run is n consecutive elements. What belongs to a channel is one value for the whole run in a row and an array
// along the run in a column; `at` hides the difference, so that each loop is written once.

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

constexpr int kAhead = 8;  // pixels between what is at hand and what is prefetched in the first walk through memory
constexpr int kInRow = 2, kPixels = kVectorBytes == 64 ? 4 : 2;  // vectors side by side, as registers last

// Asks for K vectors, `stride` elements apart, that will be read or written soon. Any address will do.
template <int K, class T>
LDM_FUSED_INLINE void prefetch(const T* from, int64_t stride) {
  for (int k = 0; k < K; ++k) __builtin_prefetch(from + k * stride);
}
template <int K, class T>
LDM_FUSED_INLINE void prefetch_to_write(T* to, int64_t stride) {
  for (int k = 0; k < K; ++k) __builtin_prefetch(to + k * stride, 1);
}

// Of K vectors from element i on, `stride` elements apart.
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

// What both passes of backward have from each element: x - center, and dz = dy * activation'(u).
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

// `shortcut` is what reaches x by another way, or null.
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

// ---- Rows -----------------------------------------------------------------------------------------------------

// Mean and squared deviations in two steps over a chunk that stays in the cache. The first adds up x, each divided by
// the count so that no sum overflows, for a mean that is a few roundings off; the second measures how far off, and both
// results are corrected by that.
template <class X>
Moments row_moments(const X* x, int64_t n) {
  using A = Accumulate<X>;
  using V = Vector<A>;
  constexpr int W = kLanes<A>, kSums = 4;  // independent sums hide the adder's latency
  const A share = A(1) / A(n);
  V sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * W <= n; i += kSums * W) {
    for (int k = 0; k < kSums; ++k) sums[k] += load(x + i + k * W) * share;
  }
  for (; i + W <= n; i += W) sums[0] += load(x + i) * share;
  if (const int rest = int(n - i)) sums[1] += load_part<X>(x + i, rest, 0) * share;
  const A mean = sum_of<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));

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

template <class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void apply_row(const X* x, Y* y, const Rows& rows, const ChannelAffine<A>& affine) {
  constexpr int W = kLanes<A>;
  const SameForAll<A> center(affine.center), slope(affine.slope), offset(affine.offset);
  int64_t i = 0;
  for (; i + kInRow * W <= rows.length; i += kInRow * W) {
    prefetch<kInRow>(x + rows.ahead + i, W);
    apply<kInRow, X, Y, Silu>(x, y, W, i, center, slope, offset);
  }
  for (; i + W <= rows.length; i += W) apply<1, X, Y, Silu>(x, y, W, i, center, slope, offset);
  if (const int rest = int(rows.length - i)) apply_part<X, Y, Silu>(x, y, i, rest, center, slope, offset);
}

template <class X, class Y, class A = Accumulate<X>>
void rows_apply(const X* x, Y* y, const Rows& rows, const GroupAffine<A>& affine, bool silu) {
  for (int64_t row = 0; row < rows.count; ++row, x += rows.stride, y += rows.stride) {
    silu ? apply_row<X, Y, true>(x, y, rows, affine.channel(row))
         : apply_row<X, Y, false>(x, y, rows, affine.channel(row));
  }
}

// Sums of a row or of a piece of one, one a lane.
template <class A>
struct LaneSums {
  Vector<A> dz, dz_x;
};

template <class X, class Y, bool Silu, bool Keep, class A = Accumulate<X>>
LDM_FUSED_INLINE LaneSums<A> sums_of_piece(const X* x, const Y* dy, A* kept, int64_t n, int64_t ahead,
                                           const ChannelAffine<A>& affine) {
  constexpr int W = kLanes<A>;
  const SameForAll<A> center(affine.center), slope(affine.slope), offset(affine.offset);
  Pack<A, kInRow> dz{}, dz_x{};
  int64_t i = 0;
  for (; i + kInRow * W <= n; i += kInRow * W) {
    prefetch<kInRow>(x + ahead + i, W);
    prefetch<kInRow>(dy + ahead + i, W);
    const auto d = derivative<kInRow, X, Y, Silu>(x, dy, W, i, center, slope, offset);
    if (Keep) store(kept + i, W, d.dz);
    dz = dz + d.dz;
    dz_x = dz_x + d.dz * d.centered;
  }
  for (; i < n; i += W) {
    const int count = n - i < W ? int(n - i) : W;
    const auto d = count == W ? derivative<1, X, Y, Silu>(x, dy, W, i, center, slope, offset)
                              : derivative_part<X, Y, Silu>(x, dy, i, count, center, slope, offset);
    if (Keep) count == W ? store(kept + i, W, d.dz) : store_part<A>(kept + i, d.dz.v[0], count);
    dz.v[0] += d.dz.v[0];
    dz_x.v[0] += d.dz.v[0] * d.centered.v[0];
  }
  return {sum_of(dz), sum_of(dz_x)};
}

// Lanes are added up for several rows at once: a chain of additions at the end of each short row would keep the
// processor from looking ahead to the next.
template <class X, class Y, bool Silu, bool Keep, class A = Accumulate<X>>
LDM_FUSED_INLINE void sums_of_rows(const X* x, const Y* dy, A* kept, const Rows& rows, const GroupAffine<A>& affine,
                                   GradientSums<double>* sums) {
  constexpr int kTogether = 16;
  constexpr int64_t kPiece = kLongestSum * kInRow * kLanes<A>;
  LaneSums<A> pieces[kTogether];
  int64_t row_of[kTogether];
  int count = 0;
  const auto add_up = [&] {
    for (int i = 0; i < count; ++i) {
      sums[row_of[i]].merge({double(sum_of<A>(pieces[i].dz)), double(sum_of<A>(pieces[i].dz_x)), 0});
    }
    count = 0;
  };
  for (int64_t row = 0; row < rows.count; ++row) {
    sums[row] = {};
    const ChannelAffine<A> channel = affine.channel(row);
    for (int64_t i = 0; i < rows.length; i += kPiece) {
      const int64_t at = row * rows.stride + i, left = rows.length - i;
      pieces[count] = sums_of_piece<X, Y, Silu, Keep>(x + at, dy + at, Keep ? kept + at : kept,
                                                      left < kPiece ? left : kPiece, rows.ahead, channel);
      row_of[count++] = row;
      if (count == kTogether) add_up();
    }
  }
  add_up();
}

template <class X, class Y, class A = Accumulate<X>>
void rows_sums(const X* x, const Y* dy, A* kept, const Rows& rows, const GroupAffine<A>& affine, bool silu,
               GradientSums<double>* sums) {
  if (!silu) {
    sums_of_rows<X, Y, false, false>(x, dy, kept, rows, affine, sums);
  } else if (kept == nullptr) {
    sums_of_rows<X, Y, true, false>(x, dy, kept, rows, affine, sums);
  } else {
    sums_of_rows<X, Y, true, true>(x, dy, kept, rows, affine, sums);
  }
}

template <class X, class A = Accumulate<X>>
void rows_sum_x(const X* x, const Rows& rows, const GroupAffine<A>& affine, GradientSums<double>* sums) {
  constexpr int W = kLanes<A>;
  for (int64_t row = 0; row < rows.count; ++row, x += rows.stride) {
    const A center = affine.channel(row).center;
    for (int64_t i = 0; i < rows.length;) {
      const int64_t end = i + W * kLongestSum < rows.length ? i + W * kLongestSum : rows.length;
      Vector<A> sum{};
      for (; i + W <= end; i += W) sum += load(x + i) - center;
      if (i < end) sum += load_part<X>(x + i, int(end - i), center) - center;
      sums[row].x += double(sum_of<A>(sum));
      i = end;
    }
  }
}

template <bool Silu, class X, class Y, class A = Accumulate<X>>
LDM_FUSED_INLINE void input_gradient_of_row(const X* x, const Y* dy, const X* shortcut, X* dx, int64_t n,
                                            const ChannelAffine<A>& affine, const Projection<A>& projection) {
  constexpr int W = kLanes<A>;
  const SameForAll<A> center(affine.center), slope(affine.slope), offset(affine.offset);
  const SameForAll<A> k1(projection.k1), k2(projection.k2);
  int64_t i = 0;
  for (; i + kInRow * W <= n; i += kInRow * W) {
    input_gradient<kInRow, X, Y, Silu>(x, dy, shortcut, dx, W, i, center, slope, offset, k1, k2);
  }
  for (; i + W <= n; i += W) {
    input_gradient<1, X, Y, Silu>(x, dy, shortcut, dx, W, i, center, slope, offset, k1, k2);
  }
  if (const int rest = int(n - i)) {
    input_gradient_part<X, Y, Silu>(x, dy, shortcut, dx, i, rest, center, slope, offset, k1, k2);
  }
}

template <class X, class Y, class A = Accumulate<X>>
void rows_input_gradient(const X* x, const Y* dy, const A* kept, const X* shortcut, X* dx, const Rows& rows,
                         const GroupAffine<A>& affine, const Projection<A>& projection, bool silu) {
  for (int64_t row = 0, at = 0; row < rows.count; ++row, at += rows.stride) {
    const ChannelAffine<A> channel = affine.channel(row);
    const X* added = shortcut ? shortcut + at : nullptr;
    if (!silu) {
      input_gradient_of_row<false>(x + at, dy + at, added, dx + at, rows.length, channel, projection);
    } else if (kept == nullptr) {
      input_gradient_of_row<true>(x + at, dy + at, added, dx + at, rows.length, channel, projection);
    } else {
      input_gradient_of_row<false>(x + at, kept + at, added, dx + at, rows.length, channel, projection);
    }
  }
}

// ---- Columns --------------------------------------------------------------------------------------------------

// Adds what K pixels differ from `center`, divided by the count, and the squares of that, to arrays over channels.
template <int K, class X, class A>
LDM_FUSED_INLINE void add_deviations(const X* x, int64_t stride, int channels, const A* center, A share, A* off,
                                     A* squares) {
  constexpr int W = kLanes<A>;
  int c = 0;
  for (; c + W <= channels; c += W) {
    prefetch<K>(x + kAhead * stride + c, stride);
    const Vector<A> middle = load(center + c);
    Vector<A> error = load(off + c), square = load(squares + c);
    for (int k = 0; k < K; ++k) {
      const Vector<A> centered = load(x + k * stride + c) - middle;
      error += centered * share;
      square += centered * centered;
    }
    store(off + c, error);
    store(squares + c, square);
  }
  for (; c < channels; ++c) {
    for (int k = 0; k < K; ++k) {
      const A centered = widen(x[k * stride + c]) - center[c];
      off[c] += centered * share;
      squares[c] += centered * centered;
    }
  }
}

// Mean and squared deviations of every channel in one step over at most kLongestSum pixels: relative to the mean of
// four of them, so that what cancels in the correction is at most a small multiple of what is left.
template <class X, class A = Accumulate<X>>
void column_moments(const X* x, const Columns& columns, A* mean, A* m2) {
  constexpr int kBlock = 2560;
  const int64_t pixels = columns.pixels, stride = columns.stride;
  const A share = A(1) / A(pixels);
  for (int64_t first = 0; first < columns.channels; first += kBlock, x += kBlock, mean += kBlock, m2 += kBlock) {
    const int block = int(columns.channels - first < kBlock ? columns.channels - first : kBlock);
    A center[kBlock], off[kBlock], squares[kBlock];
    const X *second = x + pixels / 4 * stride, *third = x + pixels / 2 * stride, *last = x + (pixels - 1) * stride;
    for (int c = 0; c < block; ++c) {  // in pairs, which makes it exact where all are the same
      center[c] =
          (widen(x[c]) * A(0.25) + widen(second[c]) * A(0.25)) + (widen(third[c]) * A(0.25) + widen(last[c]) * A(0.25));
      off[c] = squares[c] = 0;
    }
    int64_t p = 0;
    for (; columns.ahead && p + kPixels <= pixels; p += kPixels) {
      add_deviations<kPixels>(x + p * stride, stride, block, center, share, off, squares);
    }
    for (; p < pixels; ++p) add_deviations<1>(x + p * stride, stride, block, center, share, off, squares);
    for (int c = 0; c < block; ++c) {
      mean[c] = A(double(center[c]) + double(off[c]));
      const double left = double(squares[c]) - double(off[c]) * double(off[c]) * double(pixels);
      m2[c] = left < 0 ? A(0) : A(left);  // NaN passes
    }
  }
}

// Of K pixels side by side.
template <int K, class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void apply_pixels(const X* x, Y* y, const Columns& columns, const ColumnAffine<A>& affine) {
  constexpr int W = kLanes<A>;
  const int64_t stride = columns.stride;
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  int64_t c = 0;
  for (; c + W <= columns.channels; c += W) {
    prefetch<K>(x + columns.ahead + c, stride);
    prefetch<K>(x + kAhead * stride + c, stride);
    prefetch_to_write<K>(y + kAhead / 2 * stride + c, stride);
    apply<K, X, Y, Silu>(x, y, stride, c, center, slope, offset);
  }
  for (int k = 0; c < columns.channels && k < K; ++k) {
    apply_part<X, Y, Silu>(x + k * stride, y + k * stride, c, int(columns.channels - c), center, slope, offset);
  }
}

template <class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void apply_columns(const X* x, Y* y, const Columns& columns, const ColumnAffine<A>& affine) {
  const int64_t stride = columns.stride;
  constexpr int kStep = Silu ? kPixels : 1;  // in memory's order where there is nothing to wait for but memory
  int64_t p = 0;
  for (; p + kStep <= columns.pixels; p += kStep) {
    apply_pixels<kStep, X, Y, Silu>(x + p * stride, y + p * stride, columns, affine);
  }
  for (; p < columns.pixels; ++p) apply_pixels<1, X, Y, Silu>(x + p * stride, y + p * stride, columns, affine);
}

template <class X, class Y, class A = Accumulate<X>>
void columns_apply(const X* x, Y* y, const Columns& columns, const ColumnAffine<A>& affine, bool silu) {
  silu ? apply_columns<X, Y, true>(x, y, columns, affine) : apply_columns<X, Y, false>(x, y, columns, affine);
}

template <int K, class X, class Y, bool Silu, bool Keep, class A = Accumulate<X>>
LDM_FUSED_INLINE void add_sums_of_pixels(const X* x, const Y* dy, A* kept, const Columns& columns,
                                         const ColumnAffine<A>& affine, A* dz, A* dz_x) {
  constexpr int W = kLanes<A>;
  const int64_t stride = columns.stride;
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  int64_t c = 0;
  for (; c + W <= columns.channels; c += W) {
    prefetch<K>(x + columns.ahead + c, stride);
    prefetch<K>(dy + columns.ahead + c, stride);
    prefetch<K>(x + K * stride + c, stride);
    prefetch<K>(dy + K * stride + c, stride);
    const auto d = derivative<K, X, Y, Silu>(x, dy, stride, c, center, slope, offset);
    if (Keep) prefetch_to_write<K>(kept + K * stride + c, stride);
    if (Keep) store(kept + c, stride, d.dz);
    store(dz + c, load(dz + c) + sum_of(d.dz));
    store(dz_x + c, load(dz_x + c) + sum_of(d.dz * d.centered));
  }
  for (int k = 0; c < columns.channels && k < K; ++k) {
    const int64_t at = k * stride;
    const int rest = int(columns.channels - c);
    const auto d = derivative_part<X, Y, Silu>(x + at, dy + at, c, rest, center, slope, offset);
    if (Keep) store_part<A>(kept + at + c, d.dz.v[0], rest);
    store_part<A>(dz + c, load_part<A>(dz + c, rest, 0) + d.dz.v[0], rest);
    store_part<A>(dz_x + c, load_part<A>(dz_x + c, rest, 0) + d.dz.v[0] * d.centered.v[0], rest);
  }
}

template <class X, class Y, bool Silu, bool Keep, class A = Accumulate<X>>
LDM_FUSED_INLINE void sums_of_columns(const X* x, const Y* dy, A* kept, const Columns& columns,
                                      const ColumnAffine<A>& affine, A* dz, A* dz_x) {
  int64_t p = 0, at = 0;
  for (; p + kPixels <= columns.pixels; p += kPixels, at += kPixels * columns.stride) {
    add_sums_of_pixels<kPixels, X, Y, Silu, Keep>(x + at, dy + at, Keep ? kept + at : kept, columns, affine, dz, dz_x);
  }
  for (; p < columns.pixels; ++p, at += columns.stride) {
    add_sums_of_pixels<1, X, Y, Silu, Keep>(x + at, dy + at, Keep ? kept + at : kept, columns, affine, dz, dz_x);
  }
}

template <class X, class Y, class A = Accumulate<X>>
void columns_sums(const X* x, const Y* dy, A* kept, const Columns& columns, const ColumnAffine<A>& affine, bool silu,
                  A* dz, A* dz_x) {
  for (int64_t c = 0; c < columns.channels; ++c) dz[c] = dz_x[c] = 0;
  if (!silu) {
    sums_of_columns<X, Y, false, false>(x, dy, kept, columns, affine, dz, dz_x);
  } else if (kept == nullptr) {
    sums_of_columns<X, Y, true, false>(x, dy, kept, columns, affine, dz, dz_x);
  } else {
    sums_of_columns<X, Y, true, true>(x, dy, kept, columns, affine, dz, dz_x);
  }
}

template <class X, class A = Accumulate<X>>
void columns_sum_x(const X* x, const Columns& columns, const A* center, A* sum_x) {
  constexpr int W = kLanes<A>;
  for (int64_t c = 0; c < columns.channels; ++c) sum_x[c] = 0;
  for (int64_t p = 0; p < columns.pixels; ++p, x += columns.stride) {
    int64_t c = 0;
    for (; c + W <= columns.channels; c += W) {
      prefetch<1>(x + kAhead * columns.stride + c, 0);
      store(sum_x + c, load(sum_x + c) + (load(x + c) - load(center + c)));
    }
    for (; c < columns.channels; ++c) sum_x[c] += widen(x[c]) - center[c];
  }
}

template <int K, class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void input_gradient_of_pixels(const X* x, const Y* dy, const X* shortcut, X* dx,
                                               const Columns& columns, const ColumnAffine<A>& affine, const A* k1,
                                               const A* k2) {
  constexpr int W = kLanes<A>;
  const int64_t stride = columns.stride;
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset}, first{k1}, second{k2};
  int64_t c = 0;
  for (; c + W <= columns.channels; c += W) {
    prefetch<K>(x + K * stride + c, stride);
    prefetch<K>(dy + K * stride + c, stride);
    prefetch_to_write<K>(dx + K * stride + c, stride);
    input_gradient<K, X, Y, Silu>(x, dy, shortcut, dx, stride, c, center, slope, offset, first, second);
  }
  for (int k = 0; c < columns.channels && k < K; ++k) {
    const int64_t at = k * stride;
    input_gradient_part<X, Y, Silu>(x + at, dy + at, shortcut ? shortcut + at : nullptr, dx + at, c,
                                    int(columns.channels - c), center, slope, offset, first, second);
  }
}

template <class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void input_gradient_of_columns(const X* x, const Y* dy, const X* shortcut, X* dx,
                                                const Columns& columns, const ColumnAffine<A>& affine, const A* k1,
                                                const A* k2) {
  int64_t p = 0, at = 0;
  for (; p + kPixels <= columns.pixels; p += kPixels, at += kPixels * columns.stride) {
    input_gradient_of_pixels<kPixels, X, Y, Silu>(x + at, dy + at, shortcut ? shortcut + at : nullptr, dx + at, columns,
                                                  affine, k1, k2);
  }
  for (; p < columns.pixels; ++p, at += columns.stride) {
    input_gradient_of_pixels<1, X, Y, Silu>(x + at, dy + at, shortcut ? shortcut + at : nullptr, dx + at, columns,
                                            affine, k1, k2);
  }
}

template <class X, class Y, class A = Accumulate<X>>
void columns_input_gradient(const X* x, const Y* dy, const A* kept, const X* shortcut, X* dx, const Columns& columns,
                            const ColumnAffine<A>& affine, const A* k1, const A* k2, bool silu) {
  if (!silu) {
    input_gradient_of_columns<X, Y, false>(x, dy, shortcut, dx, columns, affine, k1, k2);
  } else if (kept == nullptr) {
    input_gradient_of_columns<X, Y, true>(x, dy, shortcut, dx, columns, affine, k1, k2);
  } else {
    input_gradient_of_columns<X, A, false>(x, kept, shortcut, dx, columns, affine, k1, k2);
  }
}

// ---- Residual -------------------------------------------------------------------------------------------------

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

template <class X, class A = Accumulate<X>>
void rows_residual(const X* x, const X* residual, X* y, const Rows& rows, const A* bias, A scale) {
  for (int64_t row = 0, at = 0; row < rows.count; ++row, at += rows.stride) {
    add_residual(x + at, residual + at, y + at, rows.length, SameForAll<A>(bias[row]), scale);
  }
}

template <class X, class A = Accumulate<X>>
void columns_residual(const X* x, const X* residual, X* y, const Columns& columns, const A* bias, A scale) {
  for (int64_t p = 0, at = 0; p < columns.pixels; ++p, at += columns.stride) {
    add_residual(x + at, residual + at, y + at, columns.channels, Along<A>{bias}, scale);
  }
}

// ---- Dropout --------------------------------------------------------------------------------------------------

#include "cpu/dropout.inl"

// ---- Table ----------------------------------------------------------------------------------------------------

template <class X, class Y>
Kernels<X, Y> kernels() {
  using A = Accumulate<X>;
  return {row_moments<X>,    rows_apply<X, Y>,    rows_sums<X, Y>,    rows_sum_x<X>,      rows_input_gradient<X, Y>,
          column_moments<X>, columns_apply<X, Y>, columns_sums<X, Y>, columns_sum_x<X>,   columns_input_gradient<X, Y>,
          drop<A, Y, A>,     drop<Y, A, A>,       rows_residual<X>,   columns_residual<X>};
}

#ifndef LDM_FUSED_AVX512_BF16
template Kernels<double, double> kernels();
template Kernels<float, float> kernels();
template Kernels<float, Half> kernels();
template Kernels<Half, Half> kernels();
template Kernels<Half, float> kernels();
#endif
template Kernels<float, BFloat16> kernels();
template Kernels<BFloat16, BFloat16> kernels();
template Kernels<BFloat16, float> kernels();

#undef LDM_FUSED_INLINE
