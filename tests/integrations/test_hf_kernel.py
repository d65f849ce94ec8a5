"""The kernel that Hugging Face's kernels package loads: its functions, its layers in diffusers' models, and all of it
beside ldm_fused in one process."""

import copy
from collections import Counter
from pathlib import Path

import kernel_abi_check
import peft
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from kernels import (LocalLayerRepository, Mode, _rust, get_loaded_kernels, get_local_kernel, kernelize,
                     replace_kernel_forward_from_hub, use_kernel_mapping)
from support import assert_no_less_accurate, cast, randomize, results
from test_diffusers import BLOCKS, reconstruct_unet, unet, unet_inputs
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ldm_fused

KERNEL = Path(__file__).parents[2] / "build" / "hf-kernel"  # `make hf-kernel` makes it
TRAINING, INFERENCE = Mode.TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE


@pytest.fixture(scope="module")
def kernel():
    return get_local_kernel(KERNEL)


class Calls(TorchDispatchMode):
    """Counts calls of ops, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name] += 1
        return function(*args, **(kwargs or {}))

    def of(self, library):
        return sum(n for name, n in self.count.items() if name.split("::")[0] == library)


@pytest.fixture
def through_the_layer(kernel):
    """Makes a model's ResNet blocks run through the kernel's layer."""
    replace_kernel_forward_from_hub(ResnetBlock2D, "ResnetBlock2D")
    layer = LocalLayerRepository(KERNEL, layer_name="ResnetBlock2D")

    def kernelized(model, mode=TRAINING):
        with use_kernel_mapping({"ResnetBlock2D": {"cpu": {TRAINING: layer, INFERENCE: layer}}}):
            return kernelize(model, mode=mode, device="cpu", use_fallback=False)

    yield kernelized
    del ResnetBlock2D.kernel_layer_name


def blocks(model):
    return [m for m in model.modules() if isinstance(m, ResnetBlock2D)]


# ---- The kernel ------------------------------------------------------------------------------------------------------


def test_it_is_loaded_under_a_name_of_its_own_and_gives_the_bits_of_ldm_fused(kernel):
    assert kernel.__name__ in [loaded.metadata.id for loaded in get_loaded_kernels()]
    assert kernel.__name__.startswith("_ldm_fused_cpu_") and kernel.ops.ops.name == kernel.__name__
    arguments = [torch.randn(2, 32, 9, 7), torch.randn(32), torch.randn(32)]
    found = []
    for library, package in ((kernel.__name__, kernel), ("ldm_fused", ldm_fused)):
        with Calls() as calls:
            found.append(results(nn.Module(), lambda _, x, w, b: package.group_norm_silu(x, 8, w, b), arguments))
        assert calls.of(library) == 2 and calls.of(kernel.__name__) + calls.of("ldm_fused") == 2  # and its backward
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found))
    want = F.silu(F.group_norm(arguments[0], 8, *arguments[1:]))
    torch.testing.assert_close(found[0][0], want)


def test_its_ops_are_registered_in_full(kernel):
    ops = getattr(torch.ops, kernel.__name__)
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.group_norm_act.default,
                          (x, 4, None, None, 1e-5, True, None, None, None, None))
    torch.library.opcheck(ops.bias_add_residual.default, (x, x.detach(), None, None, 0.5))
    assert {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{kernel.__name__}::")} == {
        str(s).replace("ldm_fused::", f"{kernel.__name__}::") for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("ldm_fused::")}


def test_bounds_and_switches_are_each_package_s_own(kernel):
    x = torch.randn(2, 8, 5, 3)
    before = ldm_fused.limit_multiprocessors(3)
    try:
        assert kernel.limit_multiprocessors(None) is None
        for package, other in ((kernel, ldm_fused), (ldm_fused, kernel)):
            with package.disabled(), Calls() as calls:
                assert torch.equal(package.group_norm_silu(x, 4), F.silu(F.group_norm(x, 4)))
                assert calls.of(kernel.__name__) == calls.of("ldm_fused") == 0
                other.group_norm_silu(x, 4)
                assert calls.of(kernel.__name__) + calls.of("ldm_fused") == 1
    finally:
        assert ldm_fused.limit_multiprocessors(before) == 3


def test_the_parser_of_its_build_system_reads_its_project(kernel):
    """The package has the parser of build.toml in its private part."""
    backends = _rust.Build.open(KERNEL).general.backends
    assert backends == [_rust.Backend.CPU, _rust.Backend.CUDA]
    metadata = next(loaded.metadata for loaded in get_loaded_kernels() if loaded.module is kernel)
    assert (str(metadata.name), metadata.license, metadata.backend.backend_type) == ("ldm-fused", "mit", backends[0])
    variant = Path(kernel.__file__).parent
    metadata.digest.validate(_rust.Digest.hash_variant(_rust.DigestAlgorithm.SHA256, variant))


def test_its_binary_has_what_kernels_may_use_of_python(kernel):
    binary = next(Path(kernel.__file__).parent.glob("*.so"))
    assert kernel_abi_check.ObjectFile(binary).check_python_abi("3.9") == []


# ---- Its layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(resnet_time_scale_shift="scale_shift")], ids=["default", "scale_shift"])
def test_a_unet_runs_through_the_layer(kernel, through_the_layer, options):
    model, inputs = randomize(unet(**options)), unet_inputs()
    exact = results(copy.deepcopy(model).double(), reconstruct_unet, cast(inputs, torch.float64))
    with torch.no_grad():
        before = reconstruct_unet(model, *inputs)
    state = list(model.state_dict())
    double = through_the_layer(copy.deepcopy(model).double())
    with Calls() as calls:
        found = results(double, reconstruct_unet, cast(inputs, torch.float64))
    norms = 2 * len(blocks(model))
    assert calls.count[f"{kernel.__name__}::group_norm_act"] == norms > 0
    assert calls.count[f"{kernel.__name__}::group_norm_act_backward"] == norms and calls.of("ldm_fused") == 0
    largest = max(b.abs().max().item() for b in exact)
    assert len(found) == len(exact)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * largest)
    through_the_layer(model, INFERENCE)
    with torch.no_grad():
        assert_no_less_accurate(reconstruct_unet(model, *inputs), before, exact[0], torch.float32)
    assert list(model.state_dict()) == state


@pytest.mark.parametrize("name", BLOCKS)
def test_each_option_of_a_block(kernel, through_the_layer, name):
    block = randomize(ResnetBlock2D(in_channels=32, groups=8, **{"temb_channels": 24, **BLOCKS[name]})).double()
    inputs = [torch.randn(2, 32, 8, 8, dtype=torch.float64),
              None if block.time_emb_proj is None else torch.randn(2, 24, dtype=torch.float64)]
    for module in (block.train(), block.eval()):
        want = results(module, lambda b, x, t: b(x, t), inputs)
        with Calls() as calls:
            found = results(through_the_layer(copy.deepcopy(module)), lambda b, x, t: b(x, t), inputs)
        assert calls.count[f"{kernel.__name__}::group_norm_act"] == 2
        largest = max(b.abs().max().item() for b in want)
        for a, b in zip(found, want):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * largest)


def block_and_inputs():
    block = randomize(ResnetBlock2D(in_channels=32, groups=8, temb_channels=24)).double()
    return block, torch.randn(2, 32, 8, 8, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)


def test_a_whole_graph_is_compiled_with_its_ops(kernel, through_the_layer):
    block, _, temb = block_and_inputs()
    through_the_layer(block)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for size in (6, 9):
        inputs = [torch.randn(2, 32, size, size + 1, dtype=torch.float64), temb]
        found, want = (results(b, lambda b, x, t: b(x, t), inputs) for b in (compiled, block))
        for a, b in zip(found, want):
            torch.testing.assert_close(a, b)
    assert graphs and all(graph.count(f"{kernel.__name__}.group_norm_act.default") == 2 for graph in graphs)


def hook(block):
    block.norm2.register_forward_hook(lambda module, args, output: 2 * output)


def lora(block):
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), block)


def mish(block):
    block.nonlinearity = nn.Mish()


@pytest.mark.parametrize("disturb, fused", [(hook, 1), (lora, 2), (mish, 0)])
def test_parts_that_other_code_has_changed_are_called(kernel, through_the_layer, disturb, fused):
    block, *inputs = block_and_inputs()
    disturb(block)
    want = block(*inputs)
    through_the_layer(block)
    with Calls() as calls:
        torch.testing.assert_close(block(*inputs), want)
    assert calls.count[f"{kernel.__name__}::group_norm_act"] == fused


def test_what_the_layer_does_not_take_is_left_to_the_class(kernel, through_the_layer):
    block, x, temb = block_and_inputs()
    want = block(x, temb)
    through_the_layer(block)
    with pytest.warns(FutureWarning, match="scale"):
        assert torch.equal(block(x, temb, scale=1.0), want)
    with pytest.raises(TypeError, match="silu"):
        block(x, None)


def test_a_subclass_with_a_forward_of_its_own_runs_that(kernel, through_the_layer):
    class Doubling(ResnetBlock2D):
        def forward(self, input_tensor, temb, *args, **kwargs):
            return 2 * super().forward(input_tensor, temb)

    class Same(ResnetBlock2D):
        pass

    for cls, factor in ((Doubling, 2), (Same, 1)):
        block, *inputs = block_and_inputs()
        want = factor * block(*inputs)
        block.__class__ = cls
        with Calls() as calls:
            torch.testing.assert_close(through_the_layer(block)(*inputs), want)
        assert calls.count[f"{kernel.__name__}::group_norm_act"] == (2 if cls is Same else 0)


def test_a_norm_that_activates_runs_through_the_layer(kernel):
    class Activated(nn.GroupNorm):
        def forward(self, input):
            return F.silu(super().forward(input))

    replace_kernel_forward_from_hub(Activated, "GroupNormSiLU")
    norm, x = randomize(Activated(4, 8)), torch.randn(2, 8, 5, 3)
    want = norm(x)
    layer = LocalLayerRepository(KERNEL, layer_name="GroupNormSiLU")
    with use_kernel_mapping({"GroupNormSiLU": {"cpu": {TRAINING: layer}}}), Calls() as calls:
        torch.testing.assert_close(kernelize(norm, mode=TRAINING, device="cpu", use_fallback=False)(x), want)
    assert calls.of(kernel.__name__) == 1


# ---- Beside ldm_fused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["patch", "kernelize"])
def test_a_model_that_is_patched_and_kernelized_is_right(kernel, through_the_layer, first):
    """Blocks that are patched stay so. Of those that are not, patch takes the norms."""
    model, inputs = randomize(unet()), unet_inputs()
    exact = reconstruct_unet(copy.deepcopy(model).double(), *cast(inputs, torch.float64)).detach()
    with torch.no_grad():
        before = reconstruct_unet(model, *inputs)
        steps = [ldm_fused.patch, through_the_layer]
        for step in steps if first == "patch" else reversed(steps):
            step(model)
        with Calls() as calls:
            assert_no_less_accurate(reconstruct_unet(model, *inputs), before, exact, torch.float32)
        assert calls.of("ldm_fused") >= 2 * len(blocks(model))
        ldm_fused.unpatch(model)
        with Calls() as calls:
            assert_no_less_accurate(reconstruct_unet(model, *inputs), before, exact, torch.float32)
        assert calls.of("ldm_fused") == 0 and calls.of(kernel.__name__) == 2 * len(blocks(model))


def test_two_models_in_one_checkpoint_decide_each_for_itself(kernel, through_the_layer):
    block, x, temb = block_and_inputs()
    patched = copy.deepcopy(block)
    want = results(block, lambda b, x, t: b(b(x, t), t), [x, temb])
    through_the_layer(block)
    ldm_fused.patch(patched)

    def both(_, x, temb):
        return torch.utils.checkpoint.checkpoint(lambda x, t: patched(block(x, t), t), x, temb, use_reentrant=False)

    found = results(nn.ModuleList([block, patched]), both, [x, temb])
    for a, b in zip(found[:3], want[:3]):  # the result, and the gradients of x and temb
        torch.testing.assert_close(a, b)
