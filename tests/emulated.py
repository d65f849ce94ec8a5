"""The package's CUDA operators, run by the emulator on CPU tensors: ``torch.ops.ldm_fused_emulated``.

They run on a small device by default; LDM_FUSED_EMULATED_DEVICE names one of ``DEVICES`` instead. With
LDM_FUSED_EMULATOR=none a test that asks for them is skipped.
"""

import itertools
import os
from contextlib import contextmanager

import pytest
import torch
from emulator import build

import ldm_fused  # noqa: F401 - it registers the operators

DEVICES = {  # from NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities
    "H200": dict(multiprocessors=132, major=9, minor=0, l2_bytes=50 << 20, shared_per_multiprocessor=228 << 10,
                 shared_per_block=227 << 10, threads_per_multiprocessor=2048),
    "A100": dict(multiprocessors=108, major=8, minor=0, l2_bytes=40 << 20, shared_per_multiprocessor=164 << 10,
                 shared_per_block=163 << 10, threads_per_multiprocessor=2048),
    "RTX 4090": dict(multiprocessors=128, major=8, minor=9, l2_bytes=72 << 20, shared_per_multiprocessor=100 << 10,
                     shared_per_block=99 << 10, threads_per_multiprocessor=1536),
    "T4": dict(multiprocessors=40, major=7, minor=5, l2_bytes=4 << 20, shared_per_multiprocessor=64 << 10,
               shared_per_block=64 << 10, threads_per_multiprocessor=1024),
}


def small_device(multiprocessors, kilobytes, clusters, grid_teams=0):
    """One whose shared memory tests' tensors can fill. With `grid_teams` plans are grids of so many teams wherever they
    fit; by the estimates such small tensors would be for two passes."""
    return dict(DEVICES["H200"], multiprocessors=multiprocessors, major=9 if clusters else 8,
                shared_per_block=kilobytes << 10, shared_per_multiprocessor=(kilobytes + 1) << 10,
                grid_teams=grid_teams)


SMALL = {**DEVICES["H200"], "multiprocessors": 4}  # the default: tests' tensors are small too
_default = DEVICES[os.environ["LDM_FUSED_EMULATED_DEVICE"]] if "LDM_FUSED_EMULATED_DEVICE" in os.environ else SMALL

_copies = itertools.count(1)
_current = _default
_schemas = torch.library.Library("ldm_fused_emulated", "DEF")
_operators = ("group_norm_act", "group_norm_act_training", "group_norm_act_inference", "group_norm_act_backward",
              "group_norm_act_training_backward", "bias_add_residual", "channel_sums", "group_norm_statistics",
              "group_norm_apply", "group_norm_backward_sums", "group_norm_backward_apply")
for _name in _operators:
    _schemas.define(str(getattr(torch.ops.ldm_fused, _name).default._schema).removeprefix("ldm_fused::"))


class _Library:
    """The compiled kernels. They compile for minutes, so a run that uses none of them does without."""

    def __getattr__(self, name):
        if os.environ.get("LDM_FUSED_EMULATOR") == "none":
            pytest.skip("LDM_FUSED_EMULATOR=none")
        module = build.load("library")  # registers the kernels
        module.set_device(_current)
        self.__dict__.update(vars(module))
        return getattr(module, name)


_library = _Library()


def is_compiled():
    """Whether something here has asked for the kernels."""
    return bool(vars(_library))


def __getattr__(name):
    """The operators."""
    if name not in _operators:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _library.set_device(_current)
    return getattr(torch.ops.ldm_fused_emulated, name).default


@contextmanager
def device(properties):
    """Launches run on a device of these properties, as those in ``DEVICES``."""
    global _current
    before, _current = _current, properties
    _library.set_device(_current)
    try:
        yield
    finally:
        _current = before
        _library.set_device(_current)


def fresh(properties):
    """A device of these properties that nothing is known of yet."""
    return dict(properties, copy=next(_copies))


def has_code():
    """Whether the device runs the binary's code."""
    return _library.has_code()


@contextmanager
def multiprocessors(limit):
    """Plans use at most so many of the device's multiprocessors."""
    before = _library.limit_multiprocessors(limit)
    try:
        yield
    finally:
        _library.limit_multiprocessors(before)


@contextmanager
def runtime_calls():
    """Gives a dict that holds, at the end, how often each function of the CUDA runtime was called."""
    calls = {}
    _library.take_runtime_calls()
    try:
        yield calls
    finally:
        calls.update(_library.take_runtime_calls())


@contextmanager
def allocated():
    """Gives a list that holds, at the end, the number of elements of each tensor that an op has made."""
    elements = []
    _library.take_allocated()
    try:
        yield elements
    finally:
        elements += _library.take_allocated()


@contextmanager
def captured():
    """Gives a function that says, later, how each launch made here would end if a CUDA graph replayed it."""
    _library.capture(True)
    try:
        yield _library.replay
    finally:
        _library.capture(False)


@contextmanager
def kernels_that_do_nothing():
    """Kernels are launched, and do not run; nothing is watched."""
    _library.run_kernels(False)
    try:
        yield
    finally:
        _library.run_kernels(True)


@contextmanager
def order(name, seed=0):
    """Blocks, warps and lanes run in this order: "forward", "reverse" or "random"."""
    _library.set_order(name, seed)
    try:
        yield
    finally:
        _library.set_order("forward", 0)


@contextmanager
def traffic():
    """Gives a list that holds, at the end, what each launch has moved; races are not looked for meanwhile."""
    launches = []
    _library.observe(False, True)
    try:
        yield launches
    finally:
        _library.observe(True, False)
        launches += _library.take_traffic()


def _sizes(x):
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _dtype(dtype):
    return str(dtype).removeprefix("torch.")


def plan_forward(x, num_groups, *, out_dtype=None, aligned=True, parameter_bytes=4):
    """The plan for x. ``parameter_bytes``: of one channel's parameters, by default a weight and a bias in 16 bits."""
    return _library.plan_forward(_sizes(x), num_groups, not x.is_contiguous(), _dtype(x.dtype),
                                 _dtype(out_dtype or x.dtype), aligned, parameter_bytes)


def plan_backward(x, num_groups, *, dy_dtype=None, aligned=True, parameter_bytes=4, sums=2, shortcut=False):
    return _library.plan_backward(_sizes(x), num_groups, not x.is_contiguous(), _dtype(x.dtype),
                                  _dtype(dy_dtype or x.dtype), aligned, parameter_bytes, sums, shortcut)


def plan_residual(x, *, bias_bytes=4):
    """The plan for x and a residual. ``bias_bytes``: of one channel's biases, by default two of 16 bits."""
    return _library.plan_residual(_sizes(x), not x.is_contiguous(), _dtype(x.dtype), bias_bytes)


def plan_channel_sums(x):
    return _library.plan_channel_sums(_sizes(x), not x.is_contiguous(), _dtype(x.dtype))
