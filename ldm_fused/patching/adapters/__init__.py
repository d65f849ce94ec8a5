"""One file a library. A class is known by where it is defined; what it computes is tried (trial.py)."""

from . import diffusers, ldm, plain

LIBRARIES = {**plain.CLASSES, **ldm.CLASSES, **diffusers.CLASSES}
