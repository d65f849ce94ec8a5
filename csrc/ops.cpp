// The table of contents: every op's schema, what the binary was built of, and the Python module that loads it.
#include <Python.h>
#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#endif

#include <exception>
#include <string>

#include "cpu/isa.h"
#include "cuda/device.h"
#include "cuda/plan.h"
#include "library.h"

STABLE_TORCH_LIBRARY_NAMED(LDM_FUSED_LIBRARY, m) {
  // y = dropout(act(group_norm(x + pre_bias) * (1 + scale) + shift)), and the statistics (N, G) that backward needs.
  // With a dropout_seed, one int64 on x's device, elements are zeroed with probability dropout_p, the others multiplied
  // by 1 / (1 - dropout_p); which ones depends on the seed and on their place in memory (dropout.h).
  m.def(
      "group_norm_act(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? pre_bias, "
      "Tensor? scale, Tensor? shift, ScalarType? out_dtype, Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  // The same for the common arguments, since small calls are bound by what is passed and returned; then y alone.
  m.def(
      "group_norm_act_training(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> "
      "(Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_act_inference(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> "
      "Tensor y");
  // Gradients of what output_mask names: x, weight, bias, pre_bias, scale, shift. One not wanted has no elements. The
  // shortcut's gradient, dx_shortcut, has x's dtype and is added to dx before that is rounded.
  m.def(
      "group_norm_act_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool silu, "
      "Tensor? pre_bias, Tensor? scale, Tensor? shift, bool[] output_mask, Tensor? dx_shortcut=None, "
      "Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpre_bias, Tensor dscale, Tensor dshift)");
  // The same behind group_norm_act_training.
  m.def(
      "group_norm_act_training_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "bool silu, bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  // The two halves of group_norm_act, for a tensor that is cut in parts: (3, N, G), the count, mean and sum of squared
  // deviations of each group of one part; and y of one part from the statistics (parts, 3, N, G) of all, which are
  // merged in their order.
  m.def("group_norm_statistics(Tensor x, int num_groups, Tensor? pre_bias=None) -> Tensor statistics");
  m.def(
      "group_norm_apply(Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, float eps, bool silu, "
      "Tensor? pre_bias, Tensor? scale, Tensor? shift, ScalarType? out_dtype, Tensor? dropout_seed=None, "
      "float dropout_p=0.0) -> (Tensor y, Tensor mean, Tensor rstd)");
  // The two halves of its backward: (2 or with a pre_bias 3, N, C), sums of each channel of one part, and (N, G, 2),
  // the projections k1 and k2 (problem.h) if there were no other part; then the gradients, from the projections of the
  // whole.
  m.def(
      "group_norm_backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
      "bool silu, Tensor? pre_bias, Tensor? scale, Tensor? shift, Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor totals, Tensor projections)");
  m.def(
      "group_norm_backward_apply(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor totals, Tensor projections, "
      "Tensor? weight, Tensor? bias, bool silu, Tensor? pre_bias, Tensor? scale, Tensor? shift, bool[] output_mask, "
      "Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpre_bias, Tensor dscale, Tensor dshift)");
  // (x + residual + bias + residual_bias) * scale, all of x's dtype but the biases, which may be float32.
  m.def("bias_add_residual(Tensor x, Tensor residual, Tensor? bias, Tensor? residual_bias, float scale) -> Tensor y");
  // (C,): the sum of each channel over samples and pixels, in the dtype of arithmetic.
  m.def("channel_sums(Tensor x) -> Tensor sums");
}

// What setup.py tells, and a build without it does not.
#ifndef LDM_FUSED_VERSION
#define LDM_FUSED_VERSION ""
#endif
#ifndef LDM_FUSED_TORCH
#define LDM_FUSED_TORCH ""
#endif
#ifndef LDM_FUSED_CUDA_ARCHS
#define LDM_FUSED_CUDA_ARCHS ""
#endif

static std::string cuda_version() {
#ifdef USE_CUDA
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  return "";
#endif
}

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:s}", "version", LDM_FUSED_VERSION, "compiler", __VERSION__,
                       "built_with_torch", LDM_FUSED_TORCH, "cuda", cuda_version().c_str(), "cuda_archs",
                       LDM_FUSED_CUDA_ARCHS, "cpu_isa", ldm_fused::cpu::isa(), "cpu_isas",
                       ldm_fused::cpu::isas().c_str());
}

static PyObject* limit_multiprocessors(PyObject*, PyObject* limit) {
  const long most = PyLong_AsLong(limit);
  if (most == -1 && PyErr_Occurred()) return nullptr;
  return PyLong_FromLong(ldm_fused::cuda::multiprocessor_limit.exchange(int(most)));
}

static PyObject* want_plan(PyObject*, PyObject* args) {
  short two_passes, grid_teams, team, threads;
  if (!PyArg_ParseTuple(args, "hhhh", &two_passes, &grid_teams, &team, &threads)) return nullptr;
  ldm_fused::cuda::wanted = ldm_fused::Wanted{two_passes, grid_teams, team, threads};
  Py_RETURN_NONE;
}

// What asks a device, with its C++ exceptions as Python's.
template <typename Question>
static PyObject* answer(const Question& question) {
  try {
    return question();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

static PyObject* plan(PyObject*, PyObject* args) {
  int backward, channels_last, itemsize, ordinal;
  long long batch, channels, spatial, groups;
  if (!PyArg_ParseTuple(args, "iLLLLiii", &backward, &batch, &channels, &spatial, &groups, &channels_last, &itemsize,
                        &ordinal))
    return nullptr;
#ifdef USE_CUDA
  return answer([&] {
    using namespace ldm_fused;
    const Shape shape{batch, channels, spatial, groups, channels_last != 0};
    const Dtype dtype = itemsize == 2 ? Dtype::bfloat16 : Dtype::float32;
    const Device device = cuda::device_of(ordinal);
    const Plan found = backward ? plan_backward(shape, dtype, dtype, true, 2 * itemsize, 2, false, device)
                                : plan_forward(shape, dtype, dtype, true, 2 * itemsize, device);
    const Residence& r = found.residence;
    return Py_BuildValue("(siii)", found.tier(), r.teams, r.team, r.threads);
  });
#else
  Py_RETURN_NONE;
#endif
}

static PyObject* has_cuda_code(PyObject*, PyObject* device) {
  const long ordinal = PyLong_AsLong(device);
  if (ordinal == -1 && PyErr_Occurred()) return nullptr;
#ifdef USE_CUDA
  return answer([&] { return PyBool_FromLong(ldm_fused::cuda::has_code(int(ordinal))); });
#else
  Py_RETURN_FALSE;
#endif
}

static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this binary was built of and runs on, all strings; those of CUDA are empty without it."},
    {"limit_multiprocessors", limit_multiprocessors, METH_O,
     "Sets csrc/cuda/device.h's multiprocessor_limit, and returns what it was."},
    {"want_plan", want_plan, METH_VARARGS,
     "Sets csrc/cuda/device.h's wanted plan: two_passes, grid_teams, team, threads."},
    {"plan", plan, METH_VARARGS,
     "The (tier, teams, team, threads) of a pass, or None without CUDA kernels. Takes backward, batch, channels, "
     "spatial, groups, channels_last, itemsize (2 or 4) and the CUDA device."},
    {"has_cuda_code", has_cuda_code, METH_O, "Whether there is code in this binary that the CUDA device runs."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, C10_STRINGIZE(TORCH_EXTENSION_NAME), nullptr, -1, methods};

PyMODINIT_FUNC C10_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
