"""Predicts how long the op takes on GPUs that are not at hand, and what binds it.

    python tools/time_model.py [--device H200] [--suite all] [--dtype bfloat16] [--write]

A model, not a measurement. It is there to be held against the first GPU, and to say meanwhile where time goes. For each
workload, direction and layout csrc/cuda/plan.h says, through the emulator, which kernel runs on which grid and what
it moves; benchmarks/results/issue-sm_90.json what an element costs in instructions and MUFU operations, as `make sass`
counted it in the machine code; tools/devices.py what the device can do; csrc/cuda/estimates.h what launches and
exchanges cost, the numbers that the plan itself decides by. All terms are times, of which a prediction is the sum:

  bytes      what is moved at copy bandwidth; what is read again out of L2 at L2's;
  issue, MUFU, chain   what blocks compute while nothing is moved, or beyond what is: limited by issue slots, by the
             unit of exponentials, or by chains of dependent instructions that too few warps overlap (Little's law);
  latency    of memory, where nothing hides it, and loads of which too few bytes are in flight to fill it;
  exchange   waits for the rest of a team;
  waves      the last, partly filled wave of blocks, beyond its share;
  launch     one for each kernel.

How blocks overlap:
  - A grid is in lock step, for its blocks wait for each other. Of each item the last segment's reduction has memory
    idle; all else that is computed overlaps with copies of the next item and stores of this one. The longest counts of
    what all move, of what a multiprocessor computes, and of one block's computing and waiting.
  - Blocks and clusters that take one item each begin in lock step: load, reduce, exchange, write. From the second wave
    on those that share a multiprocessor overlap: the longest counts of what all move, of what all compute, and of the
    turn of one of them.
  - A streaming kernel is as long as the longest of what it moves, computes and has in flight.
The plan's bytes count as DRAM's, as if each tensor were in DRAM before. Nothing is known of DRAM's pages and sectors,
bank conflicts, of clocks below boost, and of pipes narrower than the issue. Without an activation the model still
counts one.
"""

import argparse
import itertools
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import emulated  # noqa: E402
import torch  # noqa: E402
from oracle import laid_out  # noqa: E402

from benchmarks import report, workloads  # noqa: E402
from tools import element_costs  # noqa: E402
from tools.devices import DEVICES  # noqa: E402
from tools.element_costs import REGISTERS, TYPES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NOTES = ROOT / "benchmarks" / "NOTES.md"
MARKS = "<!-- printed by `make predict`: -->", "<!-- end -->"

WAYS = {"forward": ("statistics", "apply"), "backward": ("sums", "dx")}  # the phases that reduce, and that write
PASSES = {"forward": 2, "backward": 3}  # tensors that are moved at least
LARGE = 32 << 20  # bytes: from here on time should follow bytes
GOAL = 0.9  # of the copy bandwidth, for those
TARGETS = {(1, 128, 20, 256, 256): 200, (1, 256, 17, 256, 256): 330}  # microseconds on an H200, forward, bfloat16

# What plans are made for. An H100 has an H200's chip.
PLANNED = {**emulated.DEVICES, "H100": emulated.DEVICES["H200"],
           "B200": dict(emulated.DEVICES["H200"], multiprocessors=148, major=10, l2_bytes=126 << 20)}

# Assumed, like the numbers in estimates.h, and of all devices. Nanoseconds, unless something else is said.
LATENCY = 700  # of DRAM under load; alone 270 (H100) to 330 (A100): 480 and 466 cycles (Luo et al., arXiv:2402.13499)
L2_TRIP = 200  # a read that L2 answers: 260 to 270 cycles (the same)
CHAIN = 85  # cycles: an exponential, a reciprocal and the instructions between, each waiting for the one before it
BLOCK_WAIT = 300  # to merge a block's own partial results: two barriers and ten shuffles
BYTES_PER_CYCLE = 64  # that a multiprocessor can take from L2; all of them together reach half of it
L2_KEEPS = 0.5  # of L2, of what was read last: an H100's halves hold copies of each other's lines
IN_FLIGHT = 64  # bytes of plain loads that a thread of a streaming kernel waits for at once: kVectorsInFlight
AGAIN_IN_FLIGHT = 128  # the same of what a grid reads again: kOfStatistics, kOfDx; half in channels_last's apply
GPCS = 8  # a cluster's multiprocessors are of one of them
RANKS_A_TRIP = 32  # of which write_totals() has the sums on their way at once: a lane each
HOST = 11100  # of a call in eager mode at the least: the op's way through Python and C++, as timed on CPU tensors


# ---- The model ------------------------------------------------------------------------------------------------------


class Terms(Counter):
    """Nanoseconds by what they are spent on."""

    @property
    def time(self):
        return sum(self.values())

    @property
    def binds(self):
        return max(self, key=self.get)

    def scaled(self, factor):
        return Terms({name: factor * value for name, value in self.items()})


def total(*terms):
    found = Terms()
    for each in terms:
        found.update(each)
    return found


def longest(*terms):
    return max(terms, key=lambda each: each.time)


class Machine:
    """What one device does with blocks of one kernel. Times are in nanoseconds, rates a nanosecond."""

    def __init__(self, gpu, estimates):
        self.processors = gpu.multiprocessors
        self.clock = gpu.clock_hz / 1e9
        self.copy = gpu.copy_bytes_per_second / 1e9
        self.issue = gpu.issue_per_cycle * 32 * self.clock  # instructions of a thread, a multiprocessor
        self.mufu = gpu.mufu_lanes * self.clock
        self.estimates = estimates

    def compute(self, phase, elements, warps):
        """The Terms of what one multiprocessor computes."""
        turns = elements / (32 * warps) / phase.elements  # of each warp, one after the other
        issued = phase.elements * phase.instructions  # at one a cycle
        cycles = max(issued, phase.in_a_row * CHAIN) if phase.in_a_row > 1 else issued + phase.in_a_row * CHAIN
        return longest(Terms(issue=elements * phase.instructions / self.issue),
                       Terms(MUFU=elements * phase.mufu / self.mufu), Terms(chain=turns * cycles / self.clock))

    def move(self, moved, processors=None):
        """At copy bandwidth, or what those multiprocessors can take."""
        processors = min(processors or self.processors, self.processors)
        return Terms(bytes=moved / min(self.copy, processors * BYTES_PER_CYCLE * self.clock))

    def from_l2(self, moved):
        return Terms(bytes=moved / (self.processors * self.clock * BYTES_PER_CYCLE / 2))

    def starve(self, moved, in_flight):
        """The time beyond that at copy bandwidth, where a multiprocessor has only so many bytes in flight."""
        trips = moved / (self.processors * in_flight)
        return Terms(latency=max(0, trips * LATENCY - moved / self.copy))

    def launches(self, number):
        return Terms(launch=number * self.estimates["launch"])


def overlap(moving, computing, parts):
    """Loads of which `parts` come one after the other, and what is computed of each as soon as it is there."""
    first, second = (moving, computing) if moving.time >= computing.time else (computing, moving)
    return total(first, second.scaled(1 / parts))


def segments_of(r):
    """Parts of an item that a block waits for one after the other; one, where the plan has none."""
    return -(-r["kept"] // (r.get("segment") or r["kept"]))


def abreast(machine, properties, r, kernel, cluster):
    """Blocks that run at the same time."""
    each = min(properties["shared_per_multiprocessor"] // (r["shared_bytes"] + 1024),
               properties["threads_per_multiprocessor"] // r["threads"],
               REGISTERS // (r["threads"] * -(-kernel.registers // 8) * 8), 32)
    each = max(1, each)
    if not cluster:
        return machine.processors * each
    least = machine.processors // GPCS // 2 * 2
    wider = (machine.processors - GPCS * least) // 2  # GPCs that have a pair more
    return max(r["team"], sum((least + 2 * (i < wider)) * each // r["team"] * r["team"] for i in range(GPCS)))


def in_teams(machine, properties, plan, shape, way, kernel):
    """A block or a cluster for each item."""
    r, (reduce, write) = plan["residence"], WAYS[way]
    blocks, cluster = r["team"] * r["items"], plan["tier"] == "cluster"
    elements = r["chunk"] * r["width"] * (1 if r["columns"] else r["vector"])
    wait = machine.estimates["cluster_wait"] if cluster else BLOCK_WAIT

    def turn(together):
        """So many blocks in lock step."""
        on_one = -(-together // machine.processors)
        warps = on_one * r["threads"] / 32
        loads = machine.move(together / blocks * plan["bytes_read"], together)
        computed = total(machine.compute(kernel.phases["copy"], on_one * elements, warps),
                         machine.compute(kernel.phases[reduce], on_one * elements, warps))
        stores = longest(machine.move(together / blocks * plan["bytes_written"], together),
                         machine.compute(kernel.phases[write], on_one * elements, warps))
        return total({"latency": LATENCY, "exchange": wait}, overlap(loads, computed, segments_of(r)), stores)

    full = abreast(machine, properties, r, kernel, cluster)
    if blocks <= full:
        return turn(blocks)
    each = full / machine.processors  # of a multiprocessor, which overlap
    warps = each * r["threads"] / 32
    period = longest(machine.move(full / blocks * (plan["bytes_read"] + plan["bytes_written"])),
                     total(*(machine.compute(phase, each * elements, warps) for name, phase in kernel.phases.items()
                             if "not kept" not in name)),
                     turn(full / max(1, each)))
    more, rest = blocks // full - 1, blocks % full
    found = total(turn(full), period.scaled(more + rest / full))
    if rest:
        last = min(period.time, turn(rest).time)
        found["waves"] += max(0, last - rest / full * period.time)
    return found


def in_grid(machine, properties, plan, shape, way, kernel):
    """Teams that take one item after the other."""
    r, (reduce, write) = plan["residence"], WAYS[way]
    steps = r["rounds"] * r["steps"]
    again, kept = (steps - r["kept"] - r["held"]) / steps, r["kept"] / steps
    on_one = -(-r["team"] * r["teams"] // machine.processors)
    rounds, warps = -(-r["items"] // r["teams"]), r["threads"] / 32
    elements = rounds * r["chunk"] * r["width"] * (1 if r["columns"] else r["vector"])  # of a block

    # What is read again: by all teams at once, so much that L2 may not have it all.
    once = plan["bytes_read"] / (1 + again)
    hits = again * once * min(1, L2_KEEPS * properties["l2_bytes"] / max(1, again * once / rounds))
    loads_of_phases = AGAIN_IN_FLIGHT, AGAIN_IN_FLIGHT // (1 + (way == "forward" and r["columns"]))
    moving = total(machine.move(plan["bytes_read"] + plan["bytes_written"] - hits), machine.from_l2(hits),
                   *(machine.starve(again * once, on_one * r["threads"] * loads) for loads in loads_of_phases))
    hidden = on_one > 1 or r["slots"] >= steps + steps // 2  # as the plan has it
    exchange = {name: Terms(exchange=rounds * machine.estimates[name]) for name in ("wait", "hidden_wait")}
    totals = Terms()
    if way == "backward":  # the sums of each channel, of all the team's blocks; memory is busy meanwhile
        totals = Terms(exchange=rounds * -(-r["team"] // RANKS_A_TRIP) * L2_TRIP)

    def computed(blocks):
        return [machine.compute(kernel.phases[name], blocks * elements, blocks * warps)
                for name in (reduce, "copy", write)]

    reducing = computed(on_one)[0].scaled(kept / segments_of(r) / on_one)
    return total({"latency": LATENCY}, longest(
        total(moving, reducing, exchange["hidden_wait" if hidden else "wait"]),
        total(machine.move(once / rounds), *computed(on_one)),
        total(machine.move(once / rounds), *computed(1), totals, exchange["wait"])))


def streaming(machine, properties, tiling, kernel, phase, elements, read, written, hits=0):
    """One kernel that streams over tensors."""
    threads = tiling["block"][0] * tiling["block"][1]
    each = min(properties["threads_per_multiprocessor"] // threads,
               REGISTERS // (threads * -(-kernel.registers // 8) * 8))
    blocks = tiling["grid"][0] * tiling["grid"][1]
    each = max(1, min(each, -(-blocks // machine.processors)))
    waves = blocks / machine.processors / each
    moving = total(machine.move(read + written - hits, blocks), machine.from_l2(hits),
                   machine.starve(read, each * threads * IN_FLIGHT))
    computing = machine.compute(kernel.phases[phase], elements / machine.processors, each * threads / 32)
    found = total({"latency": LATENCY}, longest(moving, computing))
    found["waves"] += computing.time * (-(-waves // 1) / waves - 1) if waves > 1 else 0
    return found


def in_two_passes(machine, properties, plan, shape, way, kernels, itemsize):
    """The first pass reads the tensors, the second one reads them again, backward, and writes."""
    tensor = itemsize * shape.numel()
    read = (PASSES[way] - 1) * tensor
    hits = min(read, L2_KEEPS * properties["l2_bytes"])
    merging = {"latency": 2 * LATENCY}  # of partial results, which are few
    second = plan["bytes_read"] + plan["bytes_written"] - read - tensor
    return total(
        streaming(machine, properties, plan["reduce"], kernels[0], WAYS[way][0], shape.numel(), read, 0),
        merging,
        streaming(machine, properties, plan["apply"], kernels[1], WAYS[way][1], shape.numel(), second, tensor, hits))


def names_of(plan, way, dtype):
    """The kernels that the plan launches."""
    name, vector = TYPES[dtype], 16 // getattr(torch, dtype).itemsize
    if plan["resident"]:
        columns, grid = (str(flag).lower() for flag in (plan["residence"]["columns"], "grid" in plan["tier"]))
        return [f"resident_{way}<{name}, {name}, {vector}, {columns}, {grid}>"]
    columns = "columns" if plan["reduce"]["columns"] else "rows"
    if way == "forward":
        return [f"statistics_{columns}<{name}, {vector}>", f"apply_{columns}<{name}, {name}, {vector}>"]
    return [f"{kernel}_{columns}<{name}, {name}, {vector}>" for kernel in ("sums", "input_gradient")]


def time_of(gpu, properties, plan, shape, way, dtype, issue, estimates):
    """The Terms of one call; `shape` is a torch.Size."""
    machine = Machine(gpu, estimates)
    kernels = [issue[name] for name in names_of(plan, way, dtype)]
    if plan["resident"]:
        tier = in_grid if "grid" in plan["tier"] else in_teams
        found = tier(machine, properties, plan, shape, way, kernels[0])
        launches = 1
    else:
        found = in_two_passes(machine, properties, plan, shape, way, kernels, getattr(torch, dtype).itemsize)
        launches = 3
    if way == "backward":  # parameter_gradients()
        found["latency"] += 2 * LATENCY
        launches += 1
    return total(machine.launches(launches), found)


# ---- Predictions ----------------------------------------------------------------------------------------------------


COLUMNS = ("layout", "way", "tier", "blocks", "us", "eager_us", "of_copy", "largest_terms_us")


@dataclass(frozen=True)
class Prediction:
    device: str
    workload: object
    layout: str
    way: str
    dtype: str
    tier: str
    blocks: int
    terms: Terms
    estimates: dict

    @property
    def bytes(self):
        return self.workload.numel * getattr(torch, self.dtype).itemsize

    @property
    def microseconds(self):
        return self.terms.time / 1000

    @property
    def eager(self):
        """Microseconds of a call of many, each from Python."""
        return max(self.terms.time, HOST) / 1000

    @property
    def share(self):
        """Of the copy bandwidth, which bench_fused.py measures of a copy of x: by what must be moved at least."""
        copy = self.estimates["launch"] + LATENCY + 2 * self.bytes / DEVICES[self.device].copy_bytes_per_second * 1e9
        return PASSES[self.way] * self.bytes / self.terms.time / (2 * self.bytes / copy)

    @property
    def binds(self):
        return self.terms.binds

    @property
    def lost(self):
        """What takes the most time beside the bytes."""
        return Terms({name: value for name, value in self.terms.items() if name != "bytes"}).binds

    @property
    def row(self):
        """In the order of COLUMNS."""
        terms = {name: round(value / 1000, 1) for name, value in self.terms.most_common(4) if value >= 50}
        return [self.layout, self.way, self.tier, self.blocks,
                round(self.microseconds, 1), round(self.eager, 1), round(self.share, 3), terms]


def predict(workload, layout, way, device, dtype="bfloat16", issue=None, estimates=None):
    """The Prediction for one call of the workload."""
    estimates = estimates or emulated.ESTIMATES
    x = laid_out(torch.empty(workload.shape, dtype=getattr(torch, dtype), device="meta"), layout)
    with emulated.device(PLANNED[device]):
        plan = (emulated.plan_forward if way == "forward" else emulated.plan_backward)(
            x, workload.groups, parameter_bytes=2 * x.element_size())
    r, grid = plan["residence"], plan["reduce"]["grid"]
    terms = time_of(DEVICES[device], PLANNED[device], plan, x.shape, way, dtype, issue or element_costs.read(),
                    estimates)
    blocks = r["team"] * r["teams"] if plan["resident"] else grid[0] * grid[1]
    return Prediction(device, workload, layout, way, dtype, plan["tier"], blocks, terms, estimates)


def predict_all(chosen, devices=DEVICES, dtype="bfloat16"):
    """Of each shape one, on each device, in each layout and direction."""
    issue, distinct = element_costs.read(), {(w.shape, w.groups): w for w in chosen}.values()
    return [predict(w, layout, way, device, dtype, issue) for device in devices for w in distinct
            for layout in w.layouts("both") for way in WAYS]


def table(predictions):
    lines = [f"{'device':<10}{'shape':<20}{'layout':<15}{'way':<10}{'us':>9}{'eager':>9}{'of copy':>9}"
             f"  {'tier':<15}{'blocks':>7}  {'binds':<9} terms, us"]
    for p in predictions:
        terms = ", ".join(f"{name} {us:g}" for name, us in p.row[-1].items())
        lines.append(f"{p.device:<10}{p.workload.shape_text:<20}{p.layout:<15}{p.way:<10}{p.microseconds:>9.1f}"
                     f"{p.eager:>9.1f}{100 * p.share:>7.0f} %  {p.tier:<15}{p.blocks:>7}  {p.binds:<9} {terms}")
    return "\n".join(lines)


def summary(predictions):
    """The summary in Markdown: large tensors' shares of the copy bandwidth, the targets, the worst, and what binds."""
    lines = [f"Of tensors of 32 MB and more in {predictions[0].dtype}, all workloads in both layouts: the share of the "
             "copy bandwidth", "(worst, median), how many reach 90 %, and what the worst loses most to beside bytes.",
             "",
             "| | forward worst | median | reach 90 % | loses to | backward worst | median | reach 90 % | loses to |",
             "|---|---:|---:|---:|---|---:|---:|---:|---|"]
    for device in dict.fromkeys(p.device for p in predictions):
        cells = [device]
        for way in WAYS:
            some = sorted((p for p in predictions if p.device == device and p.way == way and p.bytes >= LARGE),
                          key=lambda p: p.share)
            if some:
                reach = sum(p.share >= GOAL for p in some)
                cells += [f"{100 * some[0].share:.0f} %", f"{100 * some[len(some) // 2].share:.0f} %",
                          f"{reach} of {len(some)}", some[0].lost]
            else:
                cells += ["none", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "On an H200, forward:", "", "| shape | layout | us | target | of copy | tier | loses to |",
              "|---|---|---:|---:|---:|---|---|"]
    lines += [f"| {p.workload.shape_text} | {p.layout} | {p.microseconds:.0f} | {TARGETS[p.workload.shape]} | "
              f"{100 * p.share:.0f} % | {p.tier} | {p.lost} |" for p in predictions
              if p.device == "H200" and p.way == "forward" and p.workload.shape in TARGETS]
    return "\n".join(lines)


def write(predictions, dtype):
    """Writes the table into results and the summary into the notes."""
    head = {"what": "a prediction of tools/time_model.py: no GPU has measured any of it", "dtype": dtype,
            "columns": ["device", "shape", ["of each layout and way", *COLUMNS]]}
    rows = [[device, shape, [p.row for p in some]] for (device, shape), some in itertools.groupby(
        predictions, lambda p: (p.device, p.workload.shape_text))]
    (RESULTS / f"prediction-{dtype}.json").write_text(report.json_rows(head, "predictions", rows))
    before, _, rest = NOTES.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    NOTES.write_text(f"{before}{MARKS[0]}\n\n{summary(predictions)}\n\n{MARKS[1]}{after}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["all", *DEVICES], default="all")
    parser.add_argument("--suite", choices=["all", *workloads.SUITES], default="all")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    parser.add_argument("--worst", type=int, default=20, help="how many to repeat at the end (20)")
    parser.add_argument("--write", action="store_true",
                        help="take what make sass counted; all predictions go to results, their summary to the notes")
    options = parser.parse_args(arguments)
    if options.write:
        element_costs.take()
    devices = DEVICES if options.device == "all" else [options.device]
    predictions = predict_all(workloads.select(options.suite), devices, options.dtype)
    print(f"Predictions, not measurements, for {options.dtype}\n\n{table(predictions)}")
    large = [p for p in predictions if p.bytes >= LARGE]
    print("\nThe worst of 32 MB and more:\n" + table(sorted(large, key=lambda p: p.share)[: options.worst]))
    binding = Counter(p.binds for p in large)
    print("\nWhat takes the most time: " + ", ".join(f"{name} {number}" for name, number in binding.most_common()))
    print(f"\n{summary(predictions)}")
    if options.write:
        write(predictions, options.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
