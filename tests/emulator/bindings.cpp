// The op's CUDA kernels and launches, run by the emulator, and its plan: for the tests, through numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/group_norm_act_backward.cuh"
#include "cuda/group_norm_act_forward.cuh"

namespace py = pybind11;
using namespace ldm_fused;

namespace {

// A dense tensor as a flat array: 16-bit types as uint16.
using Flat = py::array;
// An array with its dtype and batch stride.
using PerChannel = std::optional<std::tuple<Flat, std::string, int64_t>>;

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float64") return Dtype::float64;
  throw std::invalid_argument("no dtype " + name);
}

Shape shape_of(const std::tuple<int64_t, int64_t, int64_t>& sizes, int64_t groups, bool channels_last) {
  return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes), groups, channels_last};
}

Parameter parameter(const PerChannel& p) {
  if (!p) return {};
  return {std::get<0>(*p).data(), dtype_of(std::get<1>(*p)), std::get<2>(*p)};
}

Gradient gradient(PerChannel& p) {
  if (!p) return {};
  return {std::get<0>(*p).mutable_data(), dtype_of(std::get<1>(*p)), std::get<2>(*p)};
}

Affine affine_of(const std::vector<PerChannel>& p) {
  return {parameter(p.at(0)), parameter(p.at(1)), parameter(p.at(2)), parameter(p.at(3)), parameter(p.at(4))};
}

bool is_aligned(const Flat& a) { return reinterpret_cast<uintptr_t>(a.data()) % 16 == 0; }

// Device memory that nothing has written: NaN in every dtype.
std::vector<uint64_t> workspace(int64_t elements) { return std::vector<uint64_t>(elements, ~uint64_t(0)); }

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

py::dict as_dict(const Tiling& t) {
  py::dict d;
  d["columns"] = t.columns;
  d["vector"] = t.vector;
  d["team"] = t.team;
  d["block"] = py::make_tuple(t.block_x, t.block_y);
  d["chunk"] = t.chunk;
  d["chunks"] = t.chunks;
  d["grid"] = py::make_tuple(t.grid_x, t.grid_y);
  return d;
}

py::dict as_dict(const Plan& plan) {
  py::dict d;
  d["reduce"] = as_dict(plan.reduce);
  d["apply"] = as_dict(plan.apply);
  d["bytes_read"] = plan.bytes_read;
  d["bytes_written"] = plan.bytes_written;
  return d;
}

void forward(const Flat& x, Flat y, Flat mean, Flat rstd, std::tuple<int64_t, int64_t, int64_t> sizes, int64_t groups,
             bool channels_last, const std::string& x_dtype, const std::string& y_dtype,
             const std::vector<PerChannel>& parameters, double eps, bool silu, int multiprocessors) {
  const Shape shape = shape_of(sizes, groups, channels_last);
  const Dtype xd = dtype_of(x_dtype), yd = dtype_of(y_dtype);
  const Plan plan = plan_forward(shape, xd, yd, is_aligned(x) && is_aligned(y), {multiprocessors});
  auto partials = workspace(2 * partials_of(shape, plan.reduce));
  ForwardParams params{};
  params.x = x.data();
  params.y = y.mutable_data();
  params.mean = mean.mutable_data();
  params.rstd = rstd.mutable_data();
  params.partials = partials.data();
  params.affine = affine_of(parameters);
  params.shape = shape;
  params.reduce = plan.reduce;
  params.apply = plan.apply;
  params.eps = eps;
  params.silu = silu;
  check(group_norm_act_forward(params, xd, yd, nullptr));
}

void backward(const Flat& dy, const Flat& x, const Flat& mean, const Flat& rstd, std::optional<Flat> dx,
              std::tuple<int64_t, int64_t, int64_t> sizes, int64_t groups, bool channels_last,
              const std::string& x_dtype, const std::string& dy_dtype, const std::vector<PerChannel>& parameters,
              std::vector<PerChannel> gradients, bool silu, int multiprocessors) {
  const Shape shape = shape_of(sizes, groups, channels_last);
  const Dtype xd = dtype_of(x_dtype), yd = dtype_of(dy_dtype);
  const int sums = gradients.at(2) ? 3 : 2;
  const bool aligned = is_aligned(x) && is_aligned(dy) && (!dx || is_aligned(*dx));
  const Plan plan = plan_backward(shape, xd, yd, aligned, sums, {multiprocessors});
  auto partials = workspace(sums * partials_of(shape, plan.reduce));
  auto totals = workspace(sums * shape.rows());
  auto projections = workspace(2 * shape.batch * shape.groups);
  BackwardParams params{};
  params.dy = dy.data();
  params.x = x.data();
  params.mean = mean.data();
  params.rstd = rstd.data();
  params.dx = dx ? dx->mutable_data() : nullptr;
  params.partials = partials.data();
  params.totals = totals.data();
  params.projections = projections.data();
  params.affine = affine_of(parameters);
  params.gradients = {gradient(gradients[0]), gradient(gradients[1]), gradient(gradients[2]), gradient(gradients[3]),
                      gradient(gradients[4])};
  params.shape = shape;
  params.reduce = plan.reduce;
  params.apply = plan.apply;
  params.sums = sums;
  params.silu = silu;
  check(group_norm_act_backward(params, xd, yd, nullptr));
}

}  // namespace

PYBIND11_MODULE(bindings, m) {
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("plan_forward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int64_t groups, bool channels_last,
                           const std::string& x, const std::string& y, bool aligned, int multiprocessors) {
    return as_dict(
        plan_forward(shape_of(sizes, groups, channels_last), dtype_of(x), dtype_of(y), aligned, {multiprocessors}));
  });
  m.def("plan_backward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int64_t groups, bool channels_last,
                            const std::string& x, const std::string& dy, bool aligned, int sums, int multiprocessors) {
    return as_dict(plan_backward(shape_of(sizes, groups, channels_last), dtype_of(x), dtype_of(dy), aligned, sums,
                                 {multiprocessors}));
  });
  m.def("set_order", &emulator::set_order, py::arg("order"), py::arg("seed") = 0);
}
