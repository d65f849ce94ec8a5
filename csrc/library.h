// The name of the library that the ops are registered in. torch.ops has one library of a name, and a process may load
// builds of several versions: each then has a name of its own.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/macros/Macros.h>

#ifndef LDM_FUSED_LIBRARY
#define LDM_FUSED_LIBRARY ldm_fused
#endif

// Torch's macro would paste the macro's name, and not what it stands for.
#define STABLE_TORCH_LIBRARY_NAMED(name, m) STABLE_TORCH_LIBRARY(name, m)
