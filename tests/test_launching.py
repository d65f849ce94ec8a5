"""Launching: what the host asks the runtime and allocates, what a device refuses, and plans for a part of a device."""

import contextlib

import emulated
import pytest
import torch
from fresh import run_python
from oracle import GRADIENTS, LAYOUTS, assert_within_bound, make_case
from test_cuda_kernels import SHAPES, SMALL_DEVICES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import ldm_fused
from ldm_fused import functional, ops

REFUSALS = {"invalid configuration": 9, "out of resources": 701, "cooperative launch too large": 720,
            "not supported": 801, "invalid cluster size": 912}


def forward(case):
    return emulated.group_norm_act(*case.arguments())


def backward(case, mean, rstd, wanted=(True,) * 6):
    return emulated.group_norm_act_backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu,
                                            case.pre_bias, case.scale, case.shift, list(wanted))


def results(case):
    y, mean, rstd = forward(case)
    return {"y": y, **dict(zip(GRADIENTS, backward(case, mean, rstd)))}


def plain_case(shape, num_groups, layout="contiguous"):
    """With what the op for inference takes."""
    return make_case(shape, num_groups, layout=layout, options=("weight", "bias"))


def inference(case):
    return emulated.group_norm_act_inference(case.x, case.num_groups, case.weight, case.bias, case.eps, case.silu)


def plans_of(case, wanted=(True,) * 6):
    """The plans of a forward pass and of a backward pass."""
    bytes = sum(t.element_size() for t in (case.weight, case.bias, case.pre_bias, case.scale, case.shift)
                if t is not None)
    return (emulated.plan_forward(case.x, case.num_groups, parameter_bytes=bytes),
            emulated.plan_backward(case.x, case.num_groups, parameter_bytes=bytes,
                                   sums=3 if wanted[3] and case.pre_bias is not None else 2))


def tiers_of(case, wanted=(True,) * 6):
    return [plan["tier"] for plan in plans_of(case, wanted)]


@pytest.fixture(autouse=True)
def plans_may_give_way(monkeypatch):
    """`make gpu` says that they may not."""
    monkeypatch.delenv("LDM_FUSED_STRICT_PLAN", raising=False)


# ---- What a call costs the host


def test_every_tier_is_seen_below():
    found = [set(), set()]
    for properties in SMALL_DEVICES.values():
        for shape, num_groups in SHAPES:
            with emulated.device(properties):
                for tiers, tier in zip(found, tiers_of(plain_case(shape, num_groups))):
                    tiers.add(tier)
    assert found == [{"block", "cluster", "grid", "grid, in part", "two passes"}] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_a_second_call_asks_the_runtime_for_nothing_but_its_launches(name, shape, num_groups, layout):
    case = make_case(shape, num_groups, layout=layout)
    with emulated.device(emulated.fresh(SMALL_DEVICES[name])):
        with emulated.runtime_calls() as first:
            _, mean, rstd = forward(case)
            backward(case, mean, rstd)
        assert first["cudaDeviceGetAttribute"] >= 3, "somebody has to ask"
        resident = [plan["resident"] for plan in plans_of(case)]
        for call, launches in ((lambda: forward(case), 1 if resident[0] else 3),
                               (lambda: backward(case, mean, rstd), 2 if resident[1] else 4)):
            with emulated.runtime_calls() as second:
                call()
            assert second == {"cudaLaunchKernelEx": launches}


def test_a_second_call_of_the_residual_asks_the_runtime_for_nothing_but_its_launches():
    x = torch.randn(2, 20, 24, 32)
    for call, launches in ((lambda: emulated.bias_add_residual(x, x, None, None, 1.0), 1),
                           (lambda: emulated.channel_sums(x), 2)):
        call()
        with emulated.runtime_calls() as second:
            call()
        assert second == {"cudaLaunchKernelEx": launches}


@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_nothing_is_allocated_that_nobody_reads(name, shape, num_groups):
    case = make_case(shape, num_groups, options=("weight", "bias", "pre_bias"))
    elements, statistics, rows = case.x.numel(), shape[0] * num_groups, shape[0] * shape[1]
    with emulated.device(SMALL_DEVICES[name]):
        tier, _ = tiers_of(case)
        partials = 0 if tier in ("block", "cluster") else 1
        with emulated.allocated() as found:
            _, mean, rstd = forward(case)
        assert found[:3] == [elements, statistics, statistics] and len(found) == 3 + partials
        plain = plain_case(shape, num_groups)
        with emulated.allocated() as found:
            inference(plain)
        assert found[0] == elements and len(found) == 1 + (3 if tier == "two passes" else partials)
        for wanted, totals, projections in (((True,) + (False,) * 5, 0, 0), ((True, True, True) + (False,) * 3, 2, 0),
                                            ((False,) * 3 + (True,) + (False,) * 2, 3, 1)):
            with emulated.allocated() as found:
                backward(case, mean, rstd, wanted)
            _, tier = tiers_of(case, wanted)
            partials = 0 if tier in ("block", "cluster") else 1
            if tier == "two passes":
                totals, projections = max(totals, 2), 1
            given, none = sum(wanted), 6 - sum(wanted)
            workspaces = found[given:-none]  # between the gradients that are wanted and, empty, those that are not
            assert found[-none:] == [0] * none
            assert len(workspaces) == partials + (totals > 0) + projections
            assert workspaces[partials:] == [totals * rows] * (totals > 0) + [2 * statistics] * projections


def test_plans_cost_microseconds_and_are_kept():
    assert emulated._library.time_plan((2, 1280, 64), 32, 100) < 200
    assert emulated._library.time_kept_plan((2, 1280, 64), 32, 1000) < 20


# ---- Without statistics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_the_ops_of_common_arguments_give_the_same_bits_in_every_tier(name, shape, num_groups, layout):
    case = plain_case(shape, num_groups, layout)
    with emulated.device(SMALL_DEVICES[name]):
        y, mean, rstd = forward(case)
        assert torch.equal(inference(case), y) and y.stride() == case.x.stride()
        arguments = case.x, case.num_groups, case.weight, case.bias, case.eps, case.silu
        assert all(map(torch.equal, emulated.group_norm_act_training(*arguments), (y, mean, rstd)))


@pytest.mark.parametrize("x,num_groups,weight,bias,message", [
    (torch.randn(2, 4, 1), 4, None, None, "more than 1 value per group"),
    (torch.randn(0, 4, 5), 2, None, None, "more than 1 value per group"),
    (torch.randn(2, 4, 5), 3, None, None, "divide the number of channels"),
    (torch.randn(2, 4, 5), 2, torch.ones(3), None, "weight must have one element a channel"),
    (torch.randn(2, 4, 5), 2, torch.ones(4).double(), None, "weight must have x's dtype"),
    (torch.randn(2, 4, 5).half(), 2, torch.ones(4).half(), torch.ones(4), "bias must have weight's dtype"),
])
@pytest.mark.parametrize("device", [ops, emulated], ids=["cpu", "emulated"])
@pytest.mark.parametrize("op", ["group_norm_act_training", "group_norm_act_inference"])
def test_the_ops_of_common_arguments_refuse_what_python_does(op, device, x, num_groups, weight, bias, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(device, op)(x, num_groups, weight, bias, 1e-5, True)


def on_fake_cuda(monkeypatch, call, has_code=True):
    """What call(x) calls an op of the common arguments with, if it does, for an x on a device that is not there."""
    calls = []
    plain = type("Plain", (), {"apply": lambda x, *rest: calls.append(("training", *rest)) or x})
    monkeypatch.setattr(functional, "_KERNEL_DEVICES", frozenset({"cpu", "meta", "cuda"}))
    monkeypatch.setattr(ops, "has_cuda_code", lambda index: has_code)
    monkeypatch.setattr(ops, "group_norm_act_inference", lambda x, *rest: calls.append(("inference", *rest)) or x)
    monkeypatch.setattr(ops, "PlainGroupNormAct", plain)
    monkeypatch.setattr(functional, "_PLAIN", {FakeTensor})
    monkeypatch.setattr(functional, "route", lambda op, a: a.x)
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # as if the mode below were not one
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda")
        call(x)
    return calls


@pytest.mark.parametrize("way", ["inference", "training"])
def test_a_cuda_tensor_takes_the_fast_way_of_a_cpu_tensor(way, monkeypatch):
    def call(x):
        return ldm_fused.group_norm_silu(x.requires_grad_(way == "training"), 2)

    assert on_fake_cuda(monkeypatch, call) == [(way, 2, None, None, 1e-5, True)]


@pytest.mark.parametrize("reason", ["autocast", "hooks", "dropout", "a device without code"])
def test_a_cuda_tensor_takes_the_long_way_for(reason, monkeypatch):
    def call(x):
        keep = contextlib.nullcontext()
        if reason == "hooks":  # on what a differentiated call saves
            x.requires_grad_()
            keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with keep:
            return ldm_fused.group_norm_act(x, 2, dropout_p=0.5 * (reason == "dropout"))

    torch.set_autocast_enabled("cuda", reason == "autocast")
    try:
        assert on_fake_cuda(monkeypatch, call, has_code=reason != "a device without code") == []
    finally:
        torch.set_autocast_enabled("cuda", False)


# ---- Kernels' attributes


def large_and_small():
    """Bytes of shared memory: both need to be asked for."""
    most = emulated.SMALL["shared_per_block"]
    return most, most // 3


def test_host_threads_do_not_take_shared_memory_from_each_other():
    large, small = large_and_small()
    for device in (emulated.fresh(emulated.SMALL), emulated.SMALL):
        for sizes in ((large, small), (small, large)):
            with emulated.device(device):
                assert emulated._library.launch_stand_ins_side_by_side(*sizes) == ("no error", "no error")


def test_more_than_the_device_has_is_refused():
    with emulated.device(emulated.fresh(emulated.SMALL)):
        assert emulated._library.launch_stand_in(large_and_small()[0] + 1) == "invalid argument"


def test_a_graph_can_be_replayed_after_smaller_calls():
    large, small = make_case((4, 4, 64, 160), 2), make_case((4, 4, 64, 112), 2)
    with emulated.device(emulated.fresh(emulated.SMALL)):
        needs = [plan["residence"]["shared_bytes"] for case in (large, small)
                 for plan in plans_of(case)]
        assert needs[0] > needs[2] > 48 << 10, "of the forward pass: large, small"
        with emulated.captured() as replay:
            results(large)
        results(small)
        assert replay() == ["no error"] * 3


def test_attributes_are_set_once_a_kernel_and_device():
    for device in (emulated.fresh(emulated.SMALL), emulated.fresh(emulated.SMALL)):
        with emulated.device(device), emulated.runtime_calls() as calls:
            for bytes in (60000, 100000, 60000, 220000):
                emulated._library.launch_stand_in(bytes)
        assert calls["cudaFuncSetAttribute"] == 2, "shared memory, and clusters above 8"


# ---- What a device refuses


CLUSTERS = emulated.small_device(64, 12, clusters=True)
GRIDS = emulated.small_device(4, 32, clusters=False, grid_teams=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("what,properties,shape,num_groups", [
    ("cluster", dict(CLUSTERS, refused_cluster=2), (2, 20, 24, 32), 2),
    ("cluster", dict(CLUSTERS, refused_cluster=4), (2, 20, 24, 32), 2),
    ("grid", dict(GRIDS, refused_grid=1), (1, 32, 32, 64), 4),
], ids=["clusters", "large clusters", "grids"])
def test_a_plan_that_is_refused_gives_way_to_another(what, properties, shape, num_groups, error, layout):
    case = make_case(shape, num_groups, layout=layout)
    with emulated.device(emulated.fresh(dict(properties, refusal=REFUSALS[error]))):
        assert all(tier.startswith(what) for tier in tiers_of(case))
        assert_within_bound(case, results(case))
        assert emulated._library.last_error() == 0, "others would take it for theirs"
        _, mean, rstd = forward(case)
        for call in (lambda: forward(case), lambda: backward(case, mean, rstd)):
            with emulated.runtime_calls() as calls:
                call()
            assert list(calls) == ["cudaLaunchKernelEx"], "what was refused once is not tried again"
            assert emulated._library.last_error() == 0


@pytest.mark.parametrize("what,properties,shape,num_groups", [
    ("cluster", dict(CLUSTERS, refused_cluster=2), (2, 20, 24, 32), 2),
    ("grid", dict(GRIDS, refused_grid=1), (1, 32, 32, 64), 4),
])
def test_strict_plans_do_not_give_way(what, properties, shape, num_groups, monkeypatch):
    case = make_case(shape, num_groups)
    with emulated.device(emulated.fresh(dict(properties, refusal=REFUSALS["out of resources"]))):
        monkeypatch.setenv("LDM_FUSED_STRICT_PLAN", "1")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"refused the plan '{what}.* bytes of shared memory: too many res"):
                forward(case)
        monkeypatch.setenv("LDM_FUSED_STRICT_PLAN", "0")
        forward(case)


def test_other_errors_are_raised():
    case = make_case((2, 20, 24, 32), 2)
    with emulated.device(emulated.fresh(dict(CLUSTERS, refused_cluster=2, refusal=1))):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="group_norm_act failed: invalid argument"):
                forward(case)
            assert emulated._library.last_error() == 0


@pytest.mark.parametrize("shape,expected", [((1, 16, 64, 64), [16, 16, 16, 1, 1]), ((1, 16, 64, 32), [8] * 5)], ids=str)
def test_clusters_of_16_give_way_where_none_fits(shape, expected):
    """To a grid, since smaller ones have no room for the item; where they have, they are planned at once."""
    case = make_case(shape, 2)
    properties = dict(emulated.small_device(32, 12, clusters=True), shared_per_multiprocessor=10 << 10,
                      refused_grid=1, refusal=REFUSALS["cooperative launch too large"])
    launched = []
    for group, largest in ((0, 16), (16, 16), (20, 16), (8, 16), (0, 8)):
        with emulated.device(emulated.fresh(dict(properties, multiprocessors_per_group=group,
                                                 largest_cluster=largest))):
            with emulated.captured():
                y, *_ = forward(case)
            launched.append(emulated._library.captured_cluster())
        assert_within_bound(case, {"y": y})
    assert launched == expected


def test_code_for_an_older_device_plans_no_clusters():
    case = make_case((2, 20, 24, 32), 2)
    for code, clusters in ((90, True), (80, False)):
        with emulated.device(dict(CLUSTERS, code_version=code)):
            assert ("cluster" in tiers_of(case)) == clusters
            assert_within_bound(case, results(case))


# ---- A device that no code was compiled for


def test_a_device_knows_whether_there_is_code_for_it():
    for code in (90, 0):
        with emulated.device(dict(emulated.SMALL, code_version=code)), emulated.runtime_calls() as calls:
            assert emulated.has_code() == emulated.has_code() == (code > 0)
            assert emulated._library.last_error() == 0
        assert calls.get("cudaFuncGetAttributes", 0) <= 1
    with emulated.device(dict(emulated.SMALL, code_version=0)):
        with pytest.raises(RuntimeError, match="no code that CUDA device .* runs"):
            forward(make_case((2, 8, 4, 4), 2))


def test_a_device_without_code_composes_with_one_warning(monkeypatch):
    monkeypatch.setattr(functional, "_KERNEL_DEVICES", frozenset({"cpu", "meta", "cuda"}))
    monkeypatch.setattr(functional, "_warned", set())
    monkeypatch.setattr(ops, "_devices_with_code", {0: False})
    composed = []
    for name in ("GROUP_NORM_ACT", "BIAS_ADD_RESIDUAL"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, op._replace(
            composed=lambda a, name=name, op=op: composed.append(name) or op.composed(a)))
    said = "cuda:0 runs none of the code.*TORCH_CUDA_ARCH_LIST"
    with FakeTensorMode(), pytest.warns(UserWarning, match=said) as seen:
        x = torch.empty(2, 8, 4, 4, device="cuda:0")
        for y in (ldm_fused.group_norm_silu(x, 2), ldm_fused.group_norm_act(x, 2, dropout_p=0.5),
                  ldm_fused.bias_add_residual(x, x)):
            assert y.shape == x.shape and y.device == x.device
    assert len(seen) == 1 and composed == ["GROUP_NORM_ACT", "GROUP_NORM_ACT", "BIAS_ADD_RESIDUAL"]


def test_a_compiler_takes_the_answer_for_a_constant(monkeypatch):
    monkeypatch.setattr(ops, "_devices_with_code", {0: True, 1: False})
    compiled = torch.compile(lambda x: x + (1 if ops.has_cuda_code(0) else 2) + (10 if ops.has_cuda_code(1) else 20),
                             fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 21


# ---- A part of a device


@pytest.mark.parametrize("shape,num_groups", [((1, 32, 32, 64), 4), ((2, 20, 24, 32), 2)], ids=str)
def test_grids_leave_multiprocessors_to_others(shape, num_groups):
    case = make_case(shape, num_groups)
    with emulated.device(emulated.small_device(8, 32, clusters=False, grid_teams=2)):
        for limit, most in ((-1, 8), (7, 7), (4, 4), (400, 8)):
            with emulated.multiprocessors(limit):
                for plan in plans_of(case):
                    assert plan["tier"].startswith("grid")
                    assert 0 < plan["residence"]["team"] * plan["residence"]["teams"] <= most
                assert_within_bound(case, results(case))
        with emulated.multiprocessors(0):
            assert not any(tier.startswith("grid") for tier in tiers_of(case))
            assert_within_bound(case, results(case))


def test_the_bound_is_set_and_given_back():
    before = ldm_fused.limit_multiprocessors(100)
    try:
        assert ldm_fused.limit_multiprocessors(0) == 100 and ldm_fused.limit_multiprocessors(None) == 0
        assert ldm_fused.limit_multiprocessors(7) is None
        for wrong, error in (("8", TypeError), (True, TypeError), (-1, ValueError), (2**31, ValueError)):
            with pytest.raises(error, match="limit must be"):
                ldm_fused.limit_multiprocessors(wrong)
        assert ldm_fused.limit_multiprocessors(None) == 7
    finally:
        ldm_fused.limit_multiprocessors(before)


@pytest.mark.parametrize("value,said", [("", "None"), ("0", "0"), ("96", "96")])
def test_the_environment_sets_the_bound(value, said):
    result = run_python("import ldm_fused; print(ldm_fused.limit_multiprocessors(None))",
                        LDM_FUSED_MULTIPROCESSORS=value)
    assert result.stdout.strip() == said, result.stderr


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_bound_that_is_no_number_is_refused(value):
    last = run_python("import ldm_fused", LDM_FUSED_MULTIPROCESSORS=value).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "LDM_FUSED_MULTIPROCESSORS" in last and f"'{value}'" in last
