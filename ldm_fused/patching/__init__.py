"""One line for a model that exists: ``ldm_fused.patch(model)`` fuses every GroupNorm and activation that it knows."""

from ..readers import disabled
from .adapter import Adapter, Block, register_block, register_norm
from .api import is_patched, patch, patched, unpatch
from .report import PatchReport, RunReport

__all__ = ["Adapter", "Block", "PatchReport", "RunReport", "disabled", "is_patched", "patch", "patched",
           "register_block", "register_norm", "unpatch"]
