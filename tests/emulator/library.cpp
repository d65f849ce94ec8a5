// The package's CUDA sources as they are, launchers and checks included, built for the emulator: operators
// ldm_fused_emulated::* on CPU tensors. And for the tests the plan, the device's properties and what was counted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <chrono>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>

#include "machine.h"
#include "runtime.h"

// ---- What stands between the sources and torch -------------------------------------------------------------------
// The names of some functions of torch's C interface are made the emulator's before the sources see them.

namespace {

struct Extent {
  void* begin;
  size_t bytes;
};

Extent extent_of(AtenTensorHandle tensor) {
  void* begin;
  int64_t dim, *sizes, *strides, itemsize, elements = 1;
  aoti_torch_get_data_ptr(tensor, &begin);
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  int32_t dtype;
  aoti_torch_get_dtype(tensor, &dtype);
  const bool is_wide = dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64();
  itemsize = is_wide ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
  for (int64_t axis = 0; axis < dim; ++axis) {
    if (sizes[axis] == 0) return {begin, 0};
    elements += (sizes[axis] - 1) * strides[axis];
  }
  return {begin, size_t(elements * itemsize)};
}

constexpr unsigned char kPoison = 0xff;  // a NaN in every dtype

std::vector<int64_t> allocated;  // elements of each tensor since the last look

// A kernel may touch the tensors whose pointers its launcher takes. One that is still as it was allocated must be
// written before it is read.
AOTITorchError watched_data_ptr(AtenTensorHandle tensor, void** pointer) {
  if (!emulator::runs_kernels) return aoti_torch_get_data_ptr(tensor, pointer);
  const auto [begin, bytes] = extent_of(tensor);
  const auto* const memory = static_cast<const unsigned char*>(begin);
  const bool fresh = bytes > 0 && memory[0] == kPoison && !std::memcmp(memory, memory + 1, bytes - 1);
  emulator::allow(begin, bytes, fresh);
  *pointer = begin;
  return 0;
}

AOTITorchError poisoned_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                      int32_t device_type, int32_t /*device_index*/, AtenTensorHandle* tensor) {
  const AOTITorchError error = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, -1, tensor);
  if (error || !emulator::runs_kernels) return error;
  allocated.push_back(std::accumulate(sizes, sizes + dim, int64_t(1), std::multiplies<>()));
  const auto [begin, bytes] = extent_of(*tensor);
  if (bytes > 0) std::memset(begin, kPoison, bytes);
  return 0;
}

// An operator's call begins with its device guard.
AOTITorchError begin_call(int32_t /*device_index*/, DeviceGuardHandle* guard) {
  emulator::forget_allowed();
  *guard = nullptr;
  return 0;
}

AOTITorchError end_call(DeviceGuardHandle /*guard*/) { return 0; }

AOTITorchError emulated_ordinal(AtenTensorHandle /*tensor*/, int32_t* device_index) {
  *device_index = emulator::device.ordinal;
  return 0;
}

AOTITorchError default_stream(int32_t /*device_index*/, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace

#define aoti_torch_get_data_ptr watched_data_ptr
#define aoti_torch_empty_strided poisoned_empty_strided
#define aoti_torch_create_device_guard begin_call
#define aoti_torch_delete_device_guard end_call
#define aoti_torch_get_device_index emulated_ordinal
#define aoti_torch_get_current_cuda_stream default_stream

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) _STABLE_TORCH_LIBRARY_IMPL(ldm_fused_emulated, CPU, m, C10_UID)

#ifdef LDM_FUSED_EMULATOR_WITHOUT_FLOAT16
// Sanitizers compile for minutes, and three of eight pairs of dtypes have float16. Its kernels are those of bfloat16, but
// for how a number is widened and narrowed.
#include "dtypes.h"

namespace ldm_fused {

template <class F>
auto dispatch_without_float16(Dtype x, Dtype y, F&& f) {
  if (x == Dtype::float64 && y == x) return f(double{}, double{});
  if (x == Dtype::float32 && y == x) return f(float{}, float{});
  if (x == Dtype::bfloat16 && y == x) return f(BFloat16{}, BFloat16{});
  if (x == Dtype::bfloat16 && y == Dtype::float32) return f(BFloat16{}, float{});
  if (x == Dtype::float32 && y == Dtype::bfloat16) return f(float{}, BFloat16{});
  throw std::invalid_argument("this emulator was built without float16");
}

}  // namespace ldm_fused

#define dispatch_pair dispatch_without_float16
#endif

#include "cuda/bias_add_residual.cu"
#include "cuda/device.cpp"
#include "cuda/group_norm_act.cu"

// ---- Python ------------------------------------------------------------------------------------------------------

namespace py = pybind11;
using namespace ldm_fused;

namespace {

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float64") return Dtype::float64;
  throw std::invalid_argument("no dtype " + name);
}

Device device() { return cuda::device_of(emulator::device.ordinal); }

// Each set of properties is a device of its own: what is known of a device is asked once.
void set_device(const std::map<std::string, int>& properties) {
  static std::map<std::map<std::string, int>, int> ordinals;
  emulator::Device d;
  int grid_teams = 0, team = 0, threads = 0;  // the plan that is wanted
  const std::map<std::string, int*> members = {{"multiprocessors", &d.multiprocessors},
                                               {"major", &d.major},
                                               {"minor", &d.minor},
                                               {"l2_bytes", &d.l2_bytes},
                                               {"shared_per_multiprocessor", &d.shared_per_multiprocessor},
                                               {"shared_per_block", &d.shared_per_block},
                                               {"threads_per_multiprocessor", &d.threads_per_multiprocessor},
                                               {"code_version", &d.code_version},
                                               {"multiprocessors_per_group", &d.multiprocessors_per_group},
                                               {"largest_cluster", &d.largest_cluster},
                                               {"refused_cluster", &d.refused_cluster},
                                               {"refused_grid", &d.refused_grid},
                                               {"refusal", &d.refusal},
                                               {"copy", &d.copy},
                                               {"grid_teams", &grid_teams},
                                               {"team", &team},
                                               {"threads", &threads}};
  for (const auto& [name, value] : properties) *members.at(name) = value;
  if (!properties.count("code_version")) d.code_version = 10 * d.major + d.minor;
  d.ordinal = ordinals.try_emplace(properties, int(ordinals.size())).first->second;
  emulator::device = d;
  cuda::wanted = Wanted{0, int16_t(grid_teams), int16_t(team), int16_t(threads)};
}

// A kernel that does nothing, launched in one block with `shared_bytes` of shared memory.
struct StandInParams {
  Residence residence;
  int device;
};

void stand_in(StandInParams) {}

std::string launch_stand_in(int shared_bytes) {
  StandInParams params{};
  params.residence.team = params.residence.teams = 1;
  params.residence.threads = 32;
  params.residence.shared_bytes = shared_bytes;
  params.device = emulator::device.ordinal;
  return cudaGetErrorString(launch_resident(stand_in, params, nullptr));
}

std::vector<emulator::CapturedLaunch> captured;

using Sizes = std::tuple<int64_t, int64_t, int64_t>;  // batch, channels, spatial

Shape shape_of(const Sizes& sizes, int64_t groups, bool channels_last) {
  return {std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes), groups, channels_last};
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

py::dict as_dict(const Residence& r) {
  py::dict d;
  d["columns"] = r.columns;
  d["vector"] = r.vector;
  d["bundle"] = r.bundle;
  d["width"] = r.width;
  d["items"] = r.items;
  d["team"] = r.team;
  d["teams"] = r.teams;
  d["threads"] = r.threads;
  d["chunk"] = r.chunk;
  d["lanes"] = r.lanes;
  d["parts"] = r.parts;
  d["length"] = r.length;
  d["rounds"] = r.rounds;
  d["steps"] = r.steps;
  d["slots"] = r.slots;
  d["kept"] = r.kept;
  d["segment"] = r.segment;
  d["shared_bytes"] = r.shared_bytes;
  return d;
}

py::dict as_dict(const Plan& plan) {
  py::dict d;
  d["tier"] = plan.tier();
  d["resident"] = plan.resident;
  d["residence"] = as_dict(plan.residence);
  d["reduce"] = as_dict(plan.reduce);
  d["apply"] = as_dict(plan.apply);
  d["bytes_read"] = plan.bytes_read;
  d["bytes_written"] = plan.bytes_written;
  return d;
}

Plan plan_bfloat16(const Shape& shape) {
  return plan_forward(shape, Dtype::bfloat16, Dtype::bfloat16, true, 4, device());
}

// Microseconds of one call of f, which gives a plan.
template <class F>
double microseconds(int repetitions, F&& f) {
  int64_t sum = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repetitions; ++i) sum += f().bytes_read;
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - start;
  return sum > 0 ? taken.count() / repetitions : 0.0;
}

py::dict as_dict(const Streaming& plan) {
  py::dict d;
  d["tier"] = "streaming";
  d["tiling"] = as_dict(plan.tiling);
  d["bytes_read"] = plan.bytes_read;
  d["bytes_written"] = plan.bytes_written;
  return d;
}

}  // namespace

PYBIND11_MODULE(library, m) {
  m.def("set_device", &set_device);
  m.def("limit_multiprocessors", [](int limit) { return cuda::multiprocessor_limit.exchange(limit); });
  m.def("has_code", [] { return cuda::has_code(emulator::device.ordinal); });
  m.def("run_kernels", [](bool run) { emulator::runs_kernels = run; });
  m.def("take_runtime_calls", [] { return std::exchange(emulator::runtime_calls, {}); });
  m.def("take_allocated", [] { return std::exchange(allocated, {}); });
  m.def("last_error", [] { return int(cudaPeekAtLastError()); });
  m.def("launch_stand_in", &launch_stand_in);
  // How both launches end if another host thread makes the other one between the first one's preparations and the
  // first one itself.
  m.def("launch_stand_ins_side_by_side", [](int shared_bytes, int others) {
    std::string other;
    emulator::before_launch = [&] { std::thread([&] { other = launch_stand_in(others); }).join(); };
    const std::string first = launch_stand_in(shared_bytes);
    return std::pair(first, other);
  });
  m.def("capture", [](bool begin) {
    if (begin) captured.clear();
    emulator::capture = begin ? &captured : nullptr;
  });
  m.def("captured_cluster", [] {  // blocks of the last launch's cluster
    const auto& attributes = captured.back().attributes;
    return attributes.empty() ? 1u : attributes[0].val.clusterDim.x;
  });
  m.def("replay", [] {
    std::vector<std::string> errors;
    for (emulator::CapturedLaunch& launch : captured) errors.push_back(cudaGetErrorString(launch.replay()));
    return errors;
  });
  // Microseconds of one plan, of a forward pass in bfloat16: made, and found again.
  m.def("time_plan", [](const Sizes& sizes, int64_t groups, int repetitions) {
    const Shape shape = shape_of(sizes, groups, false);
    return microseconds(repetitions, [&] { return plan_bfloat16(shape); });
  });
  m.def("time_kept_plan", [](const Sizes& sizes, int64_t groups, int repetitions) {
    const Shape shape = shape_of(sizes, groups, false);
    const PlanKey key = plan_key(0, shape, Dtype::bfloat16, Dtype::bfloat16, true, 4, 0, device());
    PlanMemory memory;
    return microseconds(repetitions, [&] { return memory.find(key, [&] { return plan_bfloat16(shape); }); });
  });
  m.def("set_order", &emulator::set_order);
  m.def("observe", &emulator::observe);
  m.def("take_traffic", [] {
    py::list launches;
    for (const emulator::Traffic& t : emulator::take_traffic()) {
      py::dict d;
      d["bytes_read"] = t.bytes_read;
      d["bytes_written"] = t.bytes_written;
      d["sectors_read"] = t.sectors_read;
      d["sectors_written"] = t.sectors_written;
      d["requests"] = t.requests;
      launches.append(d);
    }
    return launches;
  });
  m.def("plan_forward", [](const Sizes& sizes, int64_t groups, bool channels_last, const std::string& x,
                           const std::string& y, bool aligned, int64_t parameter_bytes) {
    return as_dict(plan_forward(shape_of(sizes, groups, channels_last), ::dtype_of(x), ::dtype_of(y), aligned,
                                parameter_bytes, device()));
  });
  m.def("plan_residual", [](const Sizes& sizes, bool channels_last, const std::string& x, int64_t bias_bytes) {
    return as_dict(plan_residual(shape_of(sizes, 1, channels_last), ::dtype_of(x), true, bias_bytes, device()));
  });
  m.def("plan_channel_sums", [](const Sizes& sizes, bool channels_last, const std::string& x) {
    return as_dict(plan_channel_sums(shape_of(sizes, 1, channels_last), ::dtype_of(x), true, device()));
  });
  m.def("plan_backward", [](const Sizes& sizes, int64_t groups, bool channels_last, const std::string& x,
                            const std::string& dy, bool aligned, int64_t parameter_bytes, int sums, bool shortcut) {
    return as_dict(plan_backward(shape_of(sizes, groups, channels_last), ::dtype_of(x), ::dtype_of(dy), aligned,
                                 parameter_bytes, sums, shortcut, device()));
  });
}
