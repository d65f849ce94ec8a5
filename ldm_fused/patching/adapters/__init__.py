"""One file a library: its classes, by where they are defined, and the adapters that serve them.

What a class computes is tried (trial.py), for libraries change, and forks keep their names.
"""

from typing import Dict

from ... import pristine
from ..adapter import Adapter, imported
from . import comfy, diffusers, ldm, plain

CLASSES: Dict[str, Adapter] = {}
NORMS: Dict[str, pristine.Norm] = {}
CONVOLUTIONS: Dict[str, pristine.WhyNot] = {}
for _library in (plain, ldm, diffusers, comfy):
    CLASSES.update(getattr(_library, "CLASSES", {}))
    NORMS.update(getattr(_library, "NORMS", {}))
    CONVOLUTIONS.update(getattr(_library, "CONVOLUTIONS", {}))


def known_classes() -> Dict[type, Adapter]:
    """The classes that exist now and have an adapter. They are looked for among what is imported, and nothing is
    imported for it: a class whose file was not has no instances."""
    for path, why_not_now in CONVOLUTIONS.items():
        cls = imported(path)
        if cls is not None:
            pristine.know_convolution(cls, why_not_now)
    for path, norm in NORMS.items():
        cls = imported(path)
        if cls is not None:
            pristine.know_norm(cls, norm)
    found: Dict[type, Adapter] = {}
    for path, adapter in CLASSES.items():
        cls = imported(path)
        if cls is not None:
            found.setdefault(cls, adapter)
    return found
