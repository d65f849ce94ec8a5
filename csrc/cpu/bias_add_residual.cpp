// bias_add_residual on the CPU.
//
// Memory passes: x and the residual are read once, y is written once.

#include "calls.h"
#include "cpu/isa.h"
#include "cpu/parameters.h"

namespace ldm_fused {
namespace cpu {
namespace {

template <class X>
struct Residual {
  using A = Accumulate<X>;

  const ResidualArgs& args;
  const Shape& shape = args.shape;
  const X* x = static_cast<const X*>(args.x);
  const X* residual = static_cast<const X*>(args.residual);
  X* y = static_cast<X*>(args.y);
  A scale = A(args.scale);
  const Kernels<X, X>& kernel = kernels<X, X>();

  void run() const {
    const Buffer<A> bias(shape.channels), of_residual(shape.channels);
    widen_parameter<A>(args.bias, 0, shape.channels, 0, bias.data());
    widen_parameter<A>(args.residual_bias, 0, shape.channels, 0, of_residual.data());
    for (int64_t c = 0; c < shape.channels; ++c) bias[c] += of_residual[c];
    if (shape.walks_columns()) {
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

void run_residual(const ResidualCall& call) {
  dispatch_pair(call.args.dtype, call.args.dtype,
                [&](auto type, auto) { Residual<decltype(type)>{call.args}.run(); });
}

constexpr auto residual_op = &bias_add_residual<NoGuard, run_residual>;

}  // namespace
}  // namespace cpu
}  // namespace ldm_fused

STABLE_TORCH_LIBRARY_IMPL(LDM_FUSED_LIBRARY, CPU, m) {
  m.impl("bias_add_residual", TORCH_BOX(ldm_fused::cpu::residual_op));
}
