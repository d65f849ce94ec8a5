// channel_sums on the CPU.
//
// Memory passes: x is read once.

#include <algorithm>
#include <vector>

#include "calls.h"
#include "cpu/isa.h"
#include "cpu/work.h"

namespace ldm_fused {
namespace cpu {
namespace {

template <class X>
struct ChannelSums {
  using A = Accumulate<X>;

  const ChannelSumsArgs& args;
  const Shape& shape = args.shape;
  const X* x = static_cast<const X*>(args.x);
  const Kernels<X, X>& kernel = kernels<X, X>();

  void run() const {
    const std::vector<A> zeros(shape.channels);
    std::vector<double> totals(shape.channels);
    if (shape.walks_columns()) {
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
    std::copy(totals.begin(), totals.end(), static_cast<A*>(args.sums));
  }

  // Adds `count` partial results of each channel, which lie one channel after the other.
  template <class F>
  void add_up(std::vector<double>& totals, int64_t count, const F& partial) const {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t c = 0; c < shape.channels; ++c) totals[c] += partial(k * shape.channels + c);
    }
  }
};

void run_channel_sums(const ChannelSumsCall& call) {
  dispatch_pair(call.args.dtype, call.args.dtype,
                [&](auto type, auto) { ChannelSums<decltype(type)>{call.args}.run(); });
}

constexpr auto channel_sums_op = &channel_sums<NoGuard, run_channel_sums>;

}  // namespace
}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CPU, m) {
  m.impl("channel_sums", TORCH_BOX(ldm_fused::cpu::channel_sums_op));
}
