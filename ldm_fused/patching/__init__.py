"""One line for a model that exists: ``ldm_fused.patch(model)`` serves every GroupNorm and activation that it knows."""

from .adapter import Adapter, register_block, register_norm
from .patch import PatchReport, is_patched, patch, patched, unpatch
from .site import RunReport, disabled, report

__all__ = ["Adapter", "PatchReport", "RunReport", "disabled", "is_patched", "patch", "patched", "register_block",
           "register_norm", "report", "unpatch"]
