// bias_add_residual and the gradient of its biases on the CPU.
//
// Memory passes: bias_add_residual reads x and the residual and writes y, once each; channel_sums reads x once.

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parameters.h"
#include "cpu/work.h"
#include "tensors.h"

namespace ldm_fused {
namespace cpu {
namespace {

constexpr int64_t kNothingReadAgain = 0;  // bytes of each element, of which caches have to hold none

// f(row, Rows, piece, offset) for all rows of the tensor, whole ones or a piece of one, on all threads; the rows of a
// call are of one sample.
template <class F>
void over_rows(const Shape& shape, const F& f) {
  const Tiles tiles(shape.channels, shape.spatial, kNothingReadAgain);
  parallel_over(
      shape.batch * tiles.count, shape.elements() / (shape.batch * tiles.count), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / tiles.count;
          const Tiles::Tile tile = tiles[i % tiles.count];
          f(n * shape.channels + tile.channel, tile.rows, tile.piece, n * shape.channels * shape.spatial + tile.at);
        }
      });
}

// f(chunk, Columns, offset) for all pixels of the tensor, on all threads: no more of them in a chunk than a sum of
// floats may be long.
template <class F>
void over_columns(const Shape& shape, const Chunks& pixels, const F& f) {
  parallel_over(pixels.count, pixels.size * shape.channels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      f(k, Columns{pixels.extent(k), shape.channels, shape.channels, 0}, pixels.begin(k) * shape.channels);
    }
  });
}

template <class X>
struct Residual {
  using A = Accumulate<X>;

  const ResidualCall& call;
  A scale;
  const Shape& shape = call.shape;
  const X* x = static_cast<const X*>(call.x.data_ptr());
  const X* residual = static_cast<const X*>(call.residual.data_ptr());
  X* y = static_cast<X*>(call.y.data_ptr());
  const Kernels<X, X>& kernel = kernels<X, X>();

  void run() const {
    const Buffer<A> bias(shape.channels), of_residual(shape.channels);
    widen_parameter<A>(call.bias, 0, shape.channels, 0, bias.data());
    widen_parameter<A>(call.residual_bias, 0, shape.channels, 0, of_residual.data());
    for (int64_t c = 0; c < shape.channels; ++c) bias[c] += of_residual[c];
    if (walks_columns(shape)) {
      over_columns(shape, Chunks(shape.batch * shape.spatial, kLongestSum),
                   [&](int64_t, const Columns& columns, int64_t at) {
                     kernel.columns_residual(x + at, residual + at, y + at, columns, bias.data(), scale);
                   });
    } else {
      over_rows(shape, [&](int64_t row, const Rows& rows, int64_t, int64_t at) {
        kernel.rows_residual(x + at, residual + at, y + at, rows, bias.data() + row % shape.channels, scale);
      });
    }
  }
};

template <class X>
struct ChannelSums {
  using A = Accumulate<X>;

  const Shape& shape;
  const X* x;
  A* sums;
  const Kernels<X, X>& kernel = kernels<X, X>();

  void run() const {
    const std::vector<A> zeros(shape.channels);
    std::vector<double> totals(shape.channels);
    if (walks_columns(shape)) {
      const Chunks pixels(shape.batch * shape.spatial, kLongestSum);
      const Buffer<A> partials(pixels.count * shape.channels);
      over_columns(shape, pixels, [&](int64_t k, const Columns& columns, int64_t at) {
        kernel.columns_sum_x(x + at, columns, zeros.data(), partials.data() + k * shape.channels);
      });
      add_up(totals, pixels.count, [&](int64_t i) { return double(partials[i]); });
    } else {
      const int64_t pieces = Tiles(shape.channels, shape.spatial, kNothingReadAgain).pieces.count;
      const GroupAffine<A> none{0, 0, zeros.data(), zeros.data(), nullptr};
      std::vector<GradientSums<double>> partials(pieces * shape.rows());
      over_rows(shape, [&](int64_t row, const Rows& rows, int64_t piece, int64_t at) {
        kernel.rows_sum_x(x + at, rows, none, partials.data() + piece * shape.rows() + row);
      });
      add_up(totals, pieces * shape.batch, [&](int64_t i) { return partials[i].x; });
    }
    std::copy(totals.begin(), totals.end(), sums);
  }

  // Adds `count` partial results of each channel, which lie one channel after the other.
  template <class F>
  void add_up(std::vector<double>& totals, int64_t count, const F& partial) const {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t c = 0; c < shape.channels; ++c) totals[c] += partial(k * shape.channels + c);
    }
  }
};

Tensor bias_add_residual(const Tensor& x, const Tensor& residual, const OptionalTensor& bias,
                         const OptionalTensor& residual_bias, double scale) {
  const ResidualCall call(x, residual, bias, residual_bias);
  if (call.is_empty()) return call.y;
  dispatch_pair(call.dtype, call.dtype, [&](auto type, auto) {
    using X = decltype(type);
    Residual<X>{call, Accumulate<X>(scale)}.run();
  });
  return call.y;
}

Tensor channel_sums(const Tensor& x) {
  const ChannelSumsCall call(x);
  if (call.is_empty()) return call.sums;
  dispatch_pair(call.dtype, call.dtype, [&](auto type, auto) {
    using X = decltype(type);
    using A = Accumulate<X>;
    ChannelSums<X>{call.shape, static_cast<const X*>(call.x.data_ptr()), static_cast<A*>(call.sums.data_ptr())}.run();
  });
  return call.sums;
}

}  // namespace
}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(ldm_fused, CPU, m) {
  m.impl("bias_add_residual", TORCH_BOX(&ldm_fused::cpu::bias_add_residual));
  m.impl("channel_sums", TORCH_BOX(&ldm_fused::cpu::channel_sums));
}
