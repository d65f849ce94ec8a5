"""Where the binary registers the ops. The build of a Hugging Face kernel puts a file with other names in this one's
place."""

import torch

ops = torch.ops.ldm_fused


def add_op_namespace_prefix(op_name: str) -> str:
    """An op's name, as ``torch.library`` takes it."""
    return f"ldm_fused::{op_name}"
