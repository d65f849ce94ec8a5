// The kernels that walk rows: runs of one channel, in contiguous memory. Included by kernels.inl.

// Computes mean and squared deviations in two steps over a chunk that stays in the cache. The first step adds up x,
// divided by the count so that no sum overflows: this mean is a few roundings off. The second step measures how far off
// it is, and both results are corrected by that.
template <class X>
Moments<double> row_moments(const X* x, int64_t n) {
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
    prefetch<kInRow * W>(x + rows.ahead + i);
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

// Partial sums of a row, or of a piece of one, in each lane.
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
    prefetch<kInRow * W>(x + ahead + i);
    prefetch<kInRow * W>(dy + ahead + i);
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
  constexpr int kPieces = 16;
  constexpr int64_t kPiece = kLongestSum * kInRow * kLanes<A>;
  LaneSums<A> pieces[kPieces];
  int64_t row_of[kPieces];
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
      if (count == kPieces) add_up();
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

template <class X, class A = Accumulate<X>>
void rows_residual(const X* x, const X* residual, X* y, const Rows& rows, const A* bias, A scale) {
  for (int64_t row = 0, at = 0; row < rows.count; ++row, at += rows.stride) {
    add_residual(x + at, residual + at, y + at, rows.length, SameForAll<A>(bias[row]), scale);
  }
}
