"""Minimal classes of the public structure of diffusion libraries that are not on the package index.

Their files are loaded under the names that the libraries' own have, which is what adapters go by.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FILES = {
    "ldm.modules.diffusionmodules.model": "ldm_model.py",
    "ldm.modules.diffusionmodules.util": "openai_nn.py",
    "ldm.modules.diffusionmodules.openaimodel": "openai_unet.py",
    "sgm.modules.diffusionmodules.model": "ldm_model.py",
    "sgm.modules.diffusionmodules.util": "openai_nn.py",
    "sgm.modules.diffusionmodules.openaimodel": "openai_unet.py",
    "guided_diffusion.nn": "openai_nn.py",
    "guided_diffusion.unet": "openai_unet.py",
    "improved_diffusion.nn": "openai_nn.py",
    "improved_diffusion.unet": "openai_unet.py",
    "training.networks": "edm_networks.py",
    "flux.modules.autoencoder": "flux_autoencoder.py",
    "comfy.ops": "comfy_ops.py",
    "ldm_patched.modules.ops": "comfy_ops.py",
    "backend.operations": "comfy_ops.py",
    "comfy.ldm.modules.diffusionmodules.model": "comfy_model.py",
    "somebodys.ddpm": "ddpm_blocks.py",
    "somebodys.copy": "ldm_model.py",  # a private copy of the LDM model file
    "somebodys.flux": "flux_autoencoder.py",
}


def load(name, monkeypatch):
    """The file of that name, imported for as long as the test runs."""
    file = Path(__file__).parent / FILES[name]
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    parts = name.split(".")
    for i in range(1, len(parts)):  # pickle imports packages, too
        package = ".".join(parts[:i])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
