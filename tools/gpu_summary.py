"""Writes the page that sums up a GPU run, in Markdown, from run.json, timings.json and decoder.json alone."""

import collections
import itertools
from statistics import geometric_mean
from typing import Dict, Iterable, List, Optional, Sequence

GOOD = ("passed", "not available")
BASELINES = {
    "eager": "eager",
    "F.silu": "F.silu(F.group_norm(x))",
    "compile": "torch.compile of that",
    "cooperative": "the same with cooperative reductions",
    "triton": "two passes in Triton",
}
QUIET = (0.98, 1.02)  # bounds of ours over ours, timed twice in one run: outside of them the machine was noisy
# The targets: SHARES of the copy's bandwidth from LARGE bytes on; SPEEDUPS over these in the geometric mean.
LARGE = 32 << 20
SHARES = {"forward": 0.9, "backward": 0.85}
SPEEDUPS = {"eager": 4, "compile": 1.5}
Groups = Dict[tuple, List[dict]]


def summary(run: dict, timings: Optional[dict], decoder: Optional[dict] = None) -> str:
    name = "on a GPU" if run["device"] == "cuda" else "without a GPU: it says nothing about CUDA"
    parts = [f"# ldm_fused, {run['part']}, a run {name}", about(run), stages(run["stages"]), tests(run.get("tests"))]
    parts += ["  \n".join(run.get("instances") or []), sanitizer(run.get("sanitizer"))]
    parts += [noise(run.get("again")), speed(timings), blocks(timings), models(decoder)]
    return "\n\n".join(filter(None, parts)) + "\n"


def about(run: dict) -> str:
    """The machine, the versions, the commit."""
    m = run["machine"]
    build = m.get("build", {})

    def named(**texts: str) -> str:
        return ", ".join(text.format(m[key]) for key, text in texts.items() if m.get(key))

    kernels = f", kernels by nvcc {build['cuda']} for {', '.join(build['cuda_archs'])}" if build.get("cuda") else ""
    lines = [
        named(gpu="{}", memory="{}", capability="compute capability {}", driver="driver {}"),
        named(cpu="{}", cores="{} cores"),
        named(torch="torch {}", cuda="CUDA {}", python="Python {}") + kernels,
        f"commit {m.get('commit') or 'unknown'}, {run['started']}, {run['seconds']:.0f} s in all",
    ]
    return "  \n".join(filter(None, lines))


def table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """`numbers`: the columns that are flush right."""
    rule = ["---:" if i in numbers else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def stages(found: List[dict]) -> str:
    lines = []
    for stage in found:
        status = stage["status"] if stage["status"] in (*GOOD, "running") else f"**{stage['status']}**"
        lines.append([stage["name"], status, f"{stage['seconds']:.0f}", "; ".join(stage["notes"]).replace("|", "/")])
    return table(["stage", "status", "seconds", "notes"], lines, numbers=[2])


def tests(found: Optional[dict]) -> str:
    if not found:
        return ""
    text = "Tests: {passed} passed, {failed} failed, {skipped} skipped."
    used = "Of those that put a tensor on the GPU, {passed} passed and {failed} failed."
    lines = [f"{text.format(**found)} {used.format(**found['on_gpu'])}", ""]
    lines += some([f"- failed: `{test}`: {why}" for test, why in found["failures"].items()])
    lines += some([f"- running when its process died or was ended: `{test}`" for test in found["interrupted"]])
    lines += some([f"- skipped, {number} times: {why}" for why, number in found["skips"].items()])
    return "\n".join(lines).strip()


def some(lines: List[str], most: int = 10) -> List[str]:
    """Keeps the first of them, so that all fits one page."""
    return lines if len(lines) <= most else [*lines[:most], f"- and {len(lines) - most} more such lines, in run.json"]


def counted(things: Iterable[str]) -> Dict[str, int]:
    """Counts each, the most frequent first."""
    return dict(collections.Counter(things).most_common())


def sanitizer(found: Optional[dict]) -> str:
    if not found:
        return ""
    lines = []
    for tool, verdict in found.items():
        errors = "n/a" if verdict["errors"] is None else str(verdict["errors"])
        lines.append([tool, verdict["status"], errors, verdict["why"]])
    return table(["compute-sanitizer", "status", "errors", "notes"], lines, numbers=[2])


# ---- timings


def again(results: List[dict]) -> Optional[dict]:
    """How many times as fast as itself ours is: the geometric mean over the op's cases, and the farthest from 1."""
    found = ratios([result for result in results if result["level"] == "op"], "again")
    if not found:
        return None
    mean = geometric_mean(found)
    noisy = not QUIET[0] <= mean <= QUIET[1]
    outside = sum(not QUIET[0] <= ratio <= QUIET[1] for ratio in found)
    return {"mean": mean, "least": min(found), "most": max(found), "outside": outside, "cases": len(found),
            "noisy": noisy}


def noise(found: Optional[dict]) -> str:
    if not found:
        return ""
    head = "**NOISY**: do not compare these times. " if found["noisy"] else ""
    return (f"{head}Ours against itself: {found['mean']:.3f}x in the geometric mean, from {found['least']:.3f}x to"
            f" {found['most']:.3f}x; {found['outside']} of {found['cases']} cases outside {QUIET[0]} to {QUIET[1]}.")


def targets(results: List[dict]) -> str:
    """What was wanted beside what was measured."""
    lines = []

    def line(what: str, wanted: float, found: List[float], value: Optional[float], text: str) -> None:
        if found:
            met = "met" if value >= wanted else "**missed**"
            lines.append([what, text.format(wanted), text.format(value), str(len(found)), met])

    for mode, wanted in SHARES.items():
        large = [r for r in results if r["mode"] == mode and r["tensor_bytes"] >= LARGE]
        found = [share for r in large if (share := r["providers"]["ours"]["share_of_copy"])]
        line(f"{mode}, of copy, the worst from 32 MB on", wanted, found, min(found, default=None), "{:.0%}")
    for (name, wanted), mode in itertools.product(SPEEDUPS.items(), SHARES):
        found = ratios([r for r in results if r["mode"] == mode], name)
        line(f"{mode}, vs {name}, geometric mean", wanted, found, geometric_mean(found) if found else None, "{:.2f}x")
    for mode in SHARES:
        found = ratios([r for r in results if r["mode"] == mode], "compile")
        line(f"{mode}, vs compile, the worst", 1, found, min(found, default=None), "{:.2f}x")
    return table(["target", "wanted", "measured", "cases", ""], lines, numbers=[1, 2, 3]) if lines else ""


def blocks(timings: Optional[dict]) -> str:
    """Whose time is also that of convolutions."""
    lines = []
    for result in (timings or {}).get("results", []):
        if result["level"] == "op" or not result["providers"].get("ours", {}).get("wall_seconds"):
            continue
        speedups = [ratios([result], name) for name in BASELINES if name != "triton"]
        values = ["n/a" if not each else f"{each[0]:.2f}x" for each in speedups]
        ours = f"{1e3 * result['providers']['ours'][result['clock'] + '_seconds']:.3f}"
        lines.append([result["level"], result["mode"], shape(result), result["layout"], result["dtype"], ours, *values])
    head = ["what", "pass", "of", "layout", "dtype", "ours, ms", *(f"vs {n}" for n in BASELINES if n != "triton")]
    return table(head, lines, numbers=range(5, len(head))) if lines else ""


def models(decoder: Optional[dict]) -> str:
    """A line a way to run the model."""
    lines = []
    for result in (decoder or {}).get("results", []):
        for name, numbers in result["providers"].items():
            if numbers["wall_seconds"]:
                speedup = f"{numbers['speedup']:.2f}x" if numbers["speedup"] else "n/a"
                lines.append([result["model"], result["mode"], f"{result['resolution']} pixels", result["dtype"], name,
                              f"{1e3 * numbers['wall_seconds']:.3f}", speedup])
    head = ["model", "pass", "of", "dtype", "way", "ms", "vs eager"]
    return table(head, lines, numbers=[5, 6]) if lines else ""


def speed(timings: Optional[dict]) -> str:
    """Two tables, by device time and by wall time, and the worst cases."""
    groups: Groups = {}
    for result in timings["results"] if timings else []:
        if result["level"] == "op":
            groups.setdefault((result["dtype"], result["mode"], result["layout"]), []).append(result)
    if not groups:
        return ""
    results = [result for group in groups.values() for result in group]
    by_replay = any(result["clock"] == "device" for result in results)
    clock = "device time (CUDA-graph replay)" if by_replay else "wall time"
    copies = [result["copy_bytes_per_second"] for result in results if result["copy_bytes_per_second"]]
    head = ["dtype", "pass", "layout", "cases", "of copy", *(f"vs {name}" for name in BASELINES)]
    lines = []
    for key, group in groups.items():
        shares = [share for result in group if (share := result["providers"]["ours"]["share_of_copy"])]
        values = [mean_and_worst([100 * share for share in shares], "{:.0f}%")]
        values += [mean_and_worst(ratios(group, name), "{:.2f}x") for name in BASELINES]
        lines.append([*key, str(len(group)), *values])
    parts = [
        f"The op, by {clock}: the geometric mean over the workloads, and in parentheses the worst of them. of copy: the"
        f" least bytes that the op can move, over its time, against torch's copy_ in the same run"
        f" (up to {max(copies, default=0) / 1e9:.0f} GB/s, read and written). vs: how many times as fast as"
        f" {', '.join(BASELINES.values())}; below 1 is slower.",
        table(head, lines, numbers=range(3, len(head))),
        targets(results) if by_replay else "",
        worst_cases(groups),
    ]
    if by_replay:
        lines = []
        for key, group in groups.items():
            values = [mean_and_worst(ratios(group, name, "wall_seconds"), "{:.2f}x") for name in BASELINES]
            lines.append([*key, *values])
        head = ["dtype", "pass", "layout", *(f"vs {name}" for name in BASELINES)]
        parts += ["By wall time, as a caller waits:", table(head, lines, numbers=range(3, len(head)))]
    return "\n\n".join(filter(None, parts))


def mean_and_worst(values: List[float], text: str) -> str:
    if not values:
        return "n/a"
    return f"{text.format(geometric_mean(values))} ({text.format(min(values))})"


def ratios(group: List[dict], name: str, clock: str = "") -> List[float]:
    """How many times as fast ours is, where both were measured; by the case's own clock if none is named."""
    found = []
    for result in group:
        key = clock or f"{result.get('clock', 'wall')}_seconds"
        ours, other = (result["providers"].get(provider, {}).get(key) for provider in ("ours", name))
        if ours and other:
            found.append(other / ours)
    return found


def worst_cases(groups: Groups) -> str:
    """Of each group the smallest share of the copy's bandwidth, and the slowest case against the best of the others."""
    lines = []
    for key, group in groups.items():
        shares = [(result["providers"]["ours"]["share_of_copy"], shape(result)) for result in group]
        slower = [
            (min(sum((ratios([result], name) for name in BASELINES), []), default=None), shape(result))
            for result in group
        ]
        found = []
        for pairs, text in ((shares, "{:.0%} of copy at {}"), (slower, "{:.2f}x the fastest other at {}")):
            pairs = [pair for pair in pairs if pair[0]]
            found += [text.format(*min(pairs))] if pairs else []
        if found:
            lines.append(f"- {', '.join(key)}: {'; '.join(found)}")
    return "\n".join(["Worst cases:", "", *lines])


def shape(result: dict) -> str:
    return "x".join(map(str, result["shape"]))


def gaps(timings: Optional[dict]) -> List[str]:
    """What was not measured, and why."""
    if not timings:
        return []
    results, chosen, notes = timings["results"], timings["chosen"], []
    if len(results) < chosen:
        measured = ", ".join(f"{number} {dtype}" for dtype, number in counted(r["dtype"] for r in results).items())
        notes.append(f"time was out: {chosen - len(results)} of {chosen} cases not measured (measured: {measured})")
    reasons = counted(f"{name}: {p['reason']}" for r in results for name, p in r["providers"].items() if p["reason"])
    notes += [f"{number} times {reason}" for reason, number in list(reasons.items())[:5]]
    by_wall = sum(result["device"] == "cuda" and result["clock"] != "device" for result in results)
    return [*notes, f"{by_wall} cases compared by wall time, for want of device time"] if by_wall else notes
