"""Fused GroupNorm + SiLU (swish) and ResNet blocks for latent diffusion models."""

import torch

from . import ops, reference
from .functional import bias_add_residual, group_norm_act, group_norm_silu
from .modules import FusedResnetBlock, GroupNormSiLU, UnsupportedBlock
from .multiprocessors import limit_multiprocessors
from .parts import group_norm_apply, group_norm_statistics
from .patching import Adapter, PatchReport, disabled, is_patched, patch, patched, register_block, register_norm, unpatch
from .patching.report import report

__all__ = [
    "Adapter",
    "FusedResnetBlock",
    "GroupNormSiLU",
    "PatchReport",
    "UnsupportedBlock",
    "bias_add_residual",
    "build_info",
    "disabled",
    "group_norm_act",
    "group_norm_apply",
    "group_norm_silu",
    "group_norm_statistics",
    "is_patched",
    "limit_multiprocessors",
    "patch",
    "patched",
    "reference",
    "register_block",
    "register_norm",
    "report",
    "unpatch",
]

__version__ = ops._C.build_info()["version"]


def build_info() -> dict:
    """What this build is: versions, whether CUDA kernels are compiled in, and for which architectures.

    Returns:
        ``version``; ``built_with_torch`` and ``torch`` (the one running); ``compiler``; ``cpu_isa``, the instruction
        set that the CPU kernels use here, and ``cpu_isas``, a list of those that they could use on this processor (the
        environment variable ``LDM_FUSED_CPU_ISA`` chooses one); ``cuda``, the toolkit's version, or None in a build
        without CUDA kernels; ``cuda_archs``, a list such as ``["8.0", "9.0"]``.
    """
    info = ops._C.build_info()
    info["torch"] = torch.__version__
    info["cpu_isas"] = info["cpu_isas"].split(";")
    info["cuda"] = info["cuda"] or None
    info["cuda_archs"] = [arch for arch in info["cuda_archs"].split(";") if arch]
    return info
