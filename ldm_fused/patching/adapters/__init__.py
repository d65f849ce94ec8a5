"""One file a library: its classes, by where they are defined, and their adapters.

Only classes stand here whose forward says more than a formula. Each is tried (trial.py), for libraries change, and
forks keep the names.
"""

from typing import Dict

from ... import bypass
from ..adapter import Adapter, imported
from . import comfy, diffusers, own, plain

CLASSES: Dict[str, Adapter] = {}
NORMS: Dict[str, bypass.Norm] = {}
CONVOLUTIONS: Dict[str, bypass.ObstacleOf] = {}
for _library in (plain, own, diffusers, comfy):
    CLASSES.update(getattr(_library, "CLASSES", {}))
    NORMS.update(getattr(_library, "NORMS", {}))
    CONVOLUTIONS.update(getattr(_library, "CONVOLUTIONS", {}))


def known_classes() -> Dict[type, Adapter]:
    """The classes that have an adapter, among those that are imported now. Nothing is imported for it: a class whose
    file was not imported has no instances."""
    for path, obstacle in CONVOLUTIONS.items():
        cls = imported(path)
        if cls is not None:
            bypass.know_convolution(cls, obstacle)
    for path, norm in NORMS.items():
        cls = imported(path)
        if cls is not None:
            bypass.know_norm(cls, norm)
    found: Dict[type, Adapter] = {}
    for path, adapter in CLASSES.items():
        cls = imported(path)
        if cls is not None:
            found.setdefault(cls, adapter)
    return found
