"""The binary's own functions, under the name that ldm_fused has for them: the binary's differs from build to build."""

from . import _ops

_binary = getattr(_ops, _ops.ops.name)
build_info = _binary.build_info
has_cuda_code = _binary.has_cuda_code
limit_multiprocessors = _binary.limit_multiprocessors
