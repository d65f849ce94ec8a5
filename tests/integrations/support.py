"""What every library's models are held to: before and after ``patch``."""

import copy

import torch
from patched import randomize

import ldm_fused


def results(model, call, inputs):
    """Output and the gradients of the floating-point inputs and of all parameters that have one."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, torch.Tensor) else t for t in inputs]
    y = call(model, *inputs)
    leaves = [t for t in (*inputs, *model.parameters()) if isinstance(t, torch.Tensor) and t.requires_grad]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


def cast(inputs, dtype):
    return [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]


def assert_no_less_accurate(ours, eager, exact, dtype):
    """Root mean square and largest error of an output, by the bound of tests/oracle.py."""
    unit = torch.finfo(dtype).eps
    for measure, times, units in ((lambda t: t.square().mean().sqrt(), 2, 1), (lambda t: t.abs().max(), 4, 4)):
        error, theirs = (measure(y.double() - exact) for y in (ours, eager))
        assert error <= times * theirs + units * unit * measure(exact)


def check(model, call, inputs, *, fused=1, memory_format=None, switches=None, **options):
    """``call(model, *inputs)``: outputs and gradients before ``patch`` and after, state dict, ``unpatch``; reports.

    ``memory_format`` is the model's own, before; ``switches`` are more of ``patch``'s options.
    """
    randomize(model)
    options.update(switches or {})
    if memory_format is not None:
        model.to(memory_format=memory_format)
        inputs = [t.contiguous(memory_format=memory_format) if isinstance(t, torch.Tensor) and t.dim() == 4 else t
                  for t in inputs]
    exact_model, exact_inputs = copy.deepcopy(model).double(), cast(inputs, torch.float64)
    exact = results(exact_model, call, exact_inputs)
    with torch.no_grad():
        before = call(model, *inputs)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [(name, type(m).__name__, type(m).__module__, type(m)) for name, m in model.named_modules()]

    ldm_fused.patch(exact_model, **options)
    found = results(exact_model, call, exact_inputs)
    assert len(found) == len(exact)
    largest = max(b.abs().max().item() for b in exact)
    for a, b in zip(found, exact):  # some gradients are zero but for their rounding, as that of attention's k bias
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * largest)

    patched = ldm_fused.patch(model, **options)
    assert ldm_fused.patch(model, **options).replaced == []
    for (name, cls, module, original), m in zip(classes, dict(model.named_modules()).values()):
        assert type(m).__name__ == cls and type(m).__module__ == module and isinstance(m, original), name
    model.load_state_dict(state, strict=True)
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        after = call(model, *inputs)
        assert_no_less_accurate(after, before, exact[0], before.dtype)
        run = ldm_fused.report(model)
        assert run.fused >= fused and run.share > 0, str(run)
        other = copy.deepcopy(model)
        assert ldm_fused.is_patched(other) and torch.equal(call(other, *inputs), after)
        with ldm_fused.disabled():
            if "memory_format" in options:  # weights lie as they are laid out
                assert_no_less_accurate(call(model, *inputs), before, exact[0], before.dtype)
            else:
                assert torch.equal(call(model, *inputs), before)
        ldm_fused.unpatch(model)
        assert torch.equal(call(model, *inputs), before)
    assert not ldm_fused.is_patched(model) and [type(m) for m in model.modules()] == [c[3] for c in classes]
    return patched, run
