// The kernels that walk columns: pixels of all channels, in channels_last memory. Included by kernels.inl.

// Adds to arrays over channels the differences of K pixels from `center`, times `share`, and the squares of these.
template <int K, class X, class A>
LDM_FUSED_INLINE void add_deviations(const X* x, int64_t stride, int channels, const A* center, A share, A* off,
                                     A* squares) {
  constexpr int W = kLanes<A>;
  int c = 0;
  for (; c + W <= channels; c += W) {
    prefetch_pixels<K>(x + kAhead * stride, stride, c);
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

// Computes mean and squared deviations of every channel in one step over at most kLongestSum pixels. They are relative
// to the mean of four pixels, so that what cancels in the correction is at most a small multiple of what is left.
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
    // Several pixels share loads and stores of the sums. A whole sample of 32-bit numbers is read faster one by one.
    const bool together = columns.ahead || sizeof(X) == 2;
    int64_t p = 0;
    for (; together && p + kPixels <= pixels; p += kPixels) {
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

// Computes y of K pixels side by side.
template <int K, class X, class Y, bool Silu, class A = Accumulate<X>>
LDM_FUSED_INLINE void apply_pixels(const X* x, Y* y, const Columns& columns, const ColumnAffine<A>& affine) {
  constexpr int W = kLanes<A>;
  const int64_t stride = columns.stride;
  const Along<A> center{affine.center}, slope{affine.slope}, offset{affine.offset};
  int64_t c = 0;
  for (; c + W <= columns.channels; c += W) {
    if (Silu) {  // without it pixels are walked in memory's order, which the processor prefetches by itself
      prefetch_pixels<K>(x + columns.ahead, stride, c);
      prefetch_pixels<K>(x + kAhead * stride, stride, c);
      prefetch_pixels_to_write<K>(y + kAhead / 2 * stride, stride, c);
    }
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
    prefetch_pixels<K>(x + columns.ahead, stride, c);
    prefetch_pixels<K>(dy + columns.ahead, stride, c);
    prefetch_pixels<K>(x + K * stride, stride, c);
    prefetch_pixels<K>(dy + K * stride, stride, c);
    const auto d = derivative<K, X, Y, Silu>(x, dy, stride, c, center, slope, offset);
    if (Keep) prefetch_pixels_to_write<K>(kept + K * stride, stride, c);
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
  for (; p + kPixelsBackward <= columns.pixels; p += kPixelsBackward, at += kPixelsBackward * columns.stride) {
    add_sums_of_pixels<kPixelsBackward, X, Y, Silu, Keep>(x + at, dy + at, Keep ? kept + at : kept, columns, affine, dz,
                                                          dz_x);
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
      prefetch_pixels<1>(x + kAhead * columns.stride, 0, c);
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
    prefetch_pixels<K>(x + K * stride, stride, c);
    prefetch_pixels<K>(dy + K * stride, stride, c);
    prefetch_pixels_to_write<K>(dx + K * stride, stride, c);
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
  for (; p + kPixelsBackward <= columns.pixels; p += kPixelsBackward, at += kPixelsBackward * columns.stride) {
    input_gradient_of_pixels<kPixelsBackward, X, Y, Silu>(x + at, dy + at, shortcut ? shortcut + at : nullptr, dx + at,
                                                          columns, affine, k1, k2);
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

template <class X, class A = Accumulate<X>>
void columns_residual(const X* x, const X* residual, X* y, const Columns& columns, const A* bias, A scale) {
  for (int64_t p = 0, at = 0; p < columns.pixels; ++p, at += columns.stride) {
    add_residual(x + at, residual + at, y + at, columns.channels, Along<A>{bias}, scale);
  }
}
