"""The binary's own functions. Its name differs from build to build."""

from . import _ops

_binary = getattr(_ops, _ops.ops.name)
build_info, has_cuda_code, limit_multiprocessors = (
    _binary.build_info, _binary.has_cuda_code, _binary.limit_multiprocessors)
