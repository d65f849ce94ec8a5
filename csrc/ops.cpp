// The table of contents: every op's schema, what the binary was built of, and the Python module that loads it.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

STABLE_TORCH_LIBRARY(ldm_fused, m) {
  // y = dropout(act(group_norm(x + pre_bias) * (1 + scale) + shift)), and the statistics (N, G) that backward needs.
  // With a dropout_seed, one int64 on x's device, elements are zeroed with probability dropout_p, the others multiplied
  // by 1 / (1 - dropout_p); which ones depends on the seed and on their place in memory (dropout.h).
  m.def(
      "group_norm_act(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? pre_bias, "
      "Tensor? scale, Tensor? shift, ScalarType? out_dtype, Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  // y alone, on the CPU, for the common arguments: small calls are bound by what is passed and returned.
  m.def(
      "group_norm_act_inference(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> "
      "Tensor y");
  // Gradients of what output_mask names: x, weight, bias, pre_bias, scale, shift. One not wanted has no elements. Added
  // to dx, before it is rounded, is what reaches x by another way: dx_shortcut, of x's dtype.
  m.def(
      "group_norm_act_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool silu, "
      "Tensor? pre_bias, Tensor? scale, Tensor? shift, bool[] output_mask, Tensor? dx_shortcut=None, "
      "Tensor? dropout_seed=None, float dropout_p=0.0) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dpre_bias, Tensor dscale, Tensor dshift)");
  // (x + residual + bias + residual_bias) * scale, all of x's dtype but the biases, which may be float32.
  m.def("bias_add_residual(Tensor x, Tensor residual, Tensor? bias, Tensor? residual_bias, float scale) -> Tensor y");
  // (C,): the sum of each channel over samples and pixels, in the dtype of arithmetic.
  m.def("channel_sums(Tensor x) -> Tensor sums");
}

#ifndef LDM_FUSED_CUDA
#define LDM_FUSED_CUDA ""
#endif
#ifndef LDM_FUSED_CUDA_ARCHS
#define LDM_FUSED_CUDA_ARCHS ""
#endif

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:s}", "version", LDM_FUSED_VERSION, "compiler", __VERSION__,
                       "built_with_torch", LDM_FUSED_TORCH, "cuda", LDM_FUSED_CUDA, "cuda_archs", LDM_FUSED_CUDA_ARCHS,
                       "cpu_isa", ldm_fused::cpu::isa(), "cpu_isas", ldm_fused::cpu::isas().c_str());
}

static PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this binary was built of and runs on, all strings; those of CUDA are empty without it."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
