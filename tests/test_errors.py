"""What ``F.group_norm`` refuses is refused, with the same exception type and a message that names the argument."""

import pytest
import torch
import torch.nn.functional as F

import ldm_fused
from ldm_fused import functional


def x(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (2, 4, 3, 3))).to(dtype)


# name: (arguments, the argument that the message must name, what the message must show of its value)
REFUSED = {
    "x of one dimension": (lambda: (x(4), 2), "x", "[4]"),
    "x of no dimensions": (lambda: (x().sum(), 2), "x", "[]"),
    "x is a list": (lambda: ([1.0, 2.0], 2), "x", "list"),
    "x is an array": (lambda: (x().numpy(), 2), "x", "ndarray"),
    "x is None": (lambda: (None, 2), "x", "NoneType"),
    "x of integers": (lambda: (torch.ones(2, 4, 3, dtype=torch.int64), 2), "x", "int64"),
    "x of bools": (lambda: (torch.ones(2, 4, 3, dtype=torch.bool), 2), "x", "bool"),
    "x is complex": (lambda: (x().to(torch.complex64), 2), "x", "complex64"),
    "x of 8 bits": (lambda: (x().to(torch.float8_e4m3fn), 2), "x", "float8_e4m3fn"),
    "x is sparse": (lambda: (x().to_sparse(), 2), "x", "sparse_coo"),
    "one value a group": (lambda: (x(1, 4, 1, 1), 4), "x", "[1, 4, 1, 1]"),
    "groups do not divide channels": (lambda: (x(), 3), "num_groups", "3"),
    "more groups than channels": (lambda: (x(), 8), "num_groups", "8"),
    "groups are a float": (lambda: (x(), 2.0), "num_groups", "2.0"),
    "groups are a string": (lambda: (x(), "2"), "num_groups", "'2'"),
    "groups are None": (lambda: (x(), None), "num_groups", "None"),
    "groups are a bool": (lambda: (x(), True), "num_groups", "True"),
    "weight too long": (lambda: (x(), 2, x(5)), "weight", "[5]"),
    "weight of two dimensions": (lambda: (x(), 2, x(4, 1)), "weight", "[4, 1]"),
    "weight is a list": (lambda: (x(), 2, [1.0] * 4), "weight", "list"),
    "weight is sparse": (lambda: (x(), 2, x(4).to_sparse()), "weight", "sparse_coo"),
    "weight of another dtype": (lambda: (x(), 2, x(4, dtype=torch.float64)), "weight", "float64"),
    "16-bit weight, float32 x": (lambda: (x(), 2, x(4, dtype=torch.bfloat16)), "weight", "bfloat16"),
    "weight of the other 16 bits": (
        lambda: (x(dtype=torch.float16), 2, x(4, dtype=torch.bfloat16)), "weight", "bfloat16"),
    "float32 weight, float64 x": (lambda: (x(dtype=torch.float64), 2, x(4)), "weight", "float32"),
    "weight on another device": (lambda: (x(), 2, torch.ones(4, device="meta")), "weight", "meta"),
    "bias too short": (lambda: (x(), 2, x(4), x(3)), "bias", "[3]"),
    "bias of another dtype": (lambda: (x(), 2, x(4), x(4, dtype=torch.float64)), "bias", "float64"),
    "bias of another dtype than weight": (
        lambda: (x(dtype=torch.bfloat16), 2, x(4), x(4, dtype=torch.bfloat16)), "bias", "bfloat16"),
    "eps is a string": (lambda: (x(), 2, None, None, "1e-5"), "eps", "'1e-5'"),
    "eps is None": (lambda: (x(), 2, None, None, None), "eps", "None"),
    "eps is complex": (lambda: (x(), 2, None, None, 1j), "eps", "1j"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_group_norm(name):
    arguments, argument, value = REFUSED[name]
    arguments = arguments()
    with pytest.raises(Exception) as theirs:
        F.group_norm(*arguments)
    for op in (ldm_fused.group_norm_silu, ldm_fused.group_norm_act):
        with pytest.raises(Exception) as ours:
            op(*arguments)
        # What catches theirs catches ours; torch releases differ between RuntimeError and its NotImplementedError.
        assert isinstance(ours.value, type(theirs.value)), theirs.value
        message = str(ours.value)
        assert message.startswith(argument) and value in message and ("must" in message), message


@pytest.mark.parametrize("name", REFUSED)
def test_refused_alike_where_pytorchs_kernel_takes_over(name, monkeypatch):
    monkeypatch.setattr(functional, "_LEAST_HANDED_OVER", 0)
    arguments, argument, value = REFUSED[name]
    arguments = arguments()
    with pytest.raises(Exception) as silu:
        ldm_fused.group_norm_act(*arguments)
    with pytest.raises(silu.type) as none:
        ldm_fused.group_norm_act(*arguments, activation=None)
    assert str(none.value) == str(silu.value)


@pytest.mark.parametrize("num_groups", [0, -1, -4])
def test_groups_below_one_are_a_value_error(num_groups):
    with pytest.raises(ValueError, match=f"num_groups must be at least 1, got {num_groups}"):
        ldm_fused.group_norm_silu(x(), num_groups)


OWN = {  # keyword arguments that F.group_norm does not have: (exception, what the message says)
    "activation": ({"activation": "relu"}, ValueError, "activation must be 'silu', 'swish' or None, got 'relu'"),
    "dropout_p above 1": ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout_p below 0": ({"dropout_p": -0.1}, ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    "dropout_p is NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be between 0 and 1, got nan"),
    "dropout_p is a string": ({"dropout_p": "a"}, TypeError, "dropout_p must be a float, got 'a'"),
    "pre_bias shape": ({"pre_bias": torch.ones(3, 4)}, RuntimeError, r"pre_bias must have shape \[4\] or \[2, 4\]"),
    "pre_bias dtype": ({"pre_bias": torch.ones(4).double()}, RuntimeError, "pre_bias must have .*got torch.float64"),
    "scale of one sample": ({"scale": torch.ones(4)}, RuntimeError, r"scale must have shape \[2, 4\].*got \[4\]"),
    "shift device": ({"shift": torch.ones(2, 4, device="meta")}, RuntimeError, "shift must be on x's device cpu"),
    "shift is a number": ({"shift": 1.0}, TypeError, "shift must be a Tensor or None, got float"),
}


@pytest.mark.parametrize("name", OWN)
def test_refused_keyword_arguments(name):
    keywords, exception, message = OWN[name]
    with pytest.raises(exception, match=message):
        ldm_fused.group_norm_act(x(), 2, **keywords)


ACCEPTED = {
    "no batch": lambda: (x(0, 4, 3, 3), 2),
    "no pixels": lambda: (x(2, 4, 0, 3), 2),
    "no channels": lambda: (x(2, 0, 3, 3), 2),
    "nothing": lambda: (x(0, 0), 1),
    "weight alone": lambda: (x(), 2, x(4)),
    "bias alone": lambda: (x(), 2, None, x(4)),
    "groups are a tensor": lambda: (x(), torch.tensor(2)),
    "eps is an int": lambda: (x(), 2, None, None, 1),
    "eps is a bool": lambda: (x(), 2, None, None, True),
    "eps is a tensor": lambda: (x(), 2, None, None, torch.tensor(1e-5)),
    "eps is NaN": lambda: (x(), 2, None, None, float("nan")),
    "weight is strided": lambda: (x(), 2, x(8)[::2], x(8)[::2]),
    "x is transposed": lambda: (x(4, 2, 3, 3).transpose(0, 1), 2),
    "x is expanded": lambda: (x(2, 4, 1, 1).expand(2, 4, 3, 3), 2),
    "x is negated lazily": lambda: (torch.randn(2, 4, 3, dtype=torch.complex64).conj().imag, 2),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_as_by_group_norm(name):
    arguments = ACCEPTED[name]()
    try:
        expected = F.silu(F.group_norm(*arguments))
    except RuntimeError:  # from torch 2.14 on, some empty tensors
        with pytest.raises(RuntimeError):
            ldm_fused.group_norm_silu(*arguments)
        return
    result = ldm_fused.group_norm_silu(*arguments)
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert result.is_contiguous() == expected.is_contiguous()


def test_empty_inputs_have_zero_gradients():
    weight = torch.ones(4, requires_grad=True)
    empty = x(0, 4, 3, 3).requires_grad_()
    ldm_fused.group_norm_silu(empty, 2, weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4)) and empty.grad.shape == empty.shape


@pytest.mark.parametrize("arguments", [
    pytest.param(lambda op: op(x(), 3, None, None, 1e-5, True, None, None, None, None), id="groups"),
    pytest.param(lambda op: op(x(), 0, None, None, 1e-5, True, None, None, None, None), id="no groups"),
    pytest.param(lambda op: op(x(4), 2, None, None, 1e-5, True, None, None, None, None), id="dimensions"),
    pytest.param(lambda op: op(x(), 2, x(3), None, 1e-5, True, None, None, None, None), id="weight"),
    pytest.param(lambda op: op(x(), 2, None, None, 1e-5, True, None, x(3, 4), None, None), id="scale"),
    pytest.param(lambda op: op(x(), 2, None, None, 1e-5, True, None, None, x(4), None), id="shift of one sample"),
    pytest.param(lambda op: op(x(), 2, None, None, 1e-5, True, None, None, None, torch.int32), id="out_dtype"),
    pytest.param(lambda op: op(x(), 2, None, None, 1e-5, True, None, None, None, torch.float64), id="pair"),
])
def test_raw_op_checks_what_memory_safety_needs(arguments):
    with pytest.raises(RuntimeError):
        arguments(torch.ops.ldm_fused.group_norm_act)


@pytest.mark.parametrize("wrong", ["dy shape", "dy dtype", "mean shape", "rstd dtype", "mask"])
def test_raw_backward_checks_what_memory_safety_needs(wrong):
    a = x()
    y, mean, rstd = torch.ops.ldm_fused.group_norm_act(a, 2, None, None, 1e-5, True, None, None, None, None)
    dy, mask = torch.ones_like(y), [True] * 6
    if wrong == "dy shape":
        dy = dy[:, :, :2]
    elif wrong == "dy dtype":
        dy = dy.double()
    elif wrong == "mean shape":
        mean = mean[:1]
    elif wrong == "rstd dtype":
        rstd = rstd.double()
    else:
        mask = mask[:5]
    with pytest.raises(RuntimeError):
        torch.ops.ldm_fused.group_norm_act_backward(dy, a, mean, rstd, None, None, True, None, None, None, mask)
