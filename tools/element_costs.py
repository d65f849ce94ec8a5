"""What the CUDA kernels issue for an element: a snapshot, so that predictions need no compiler.

`make sass` leaves its counts of sm_90's machine code in build/sass/issue.json; take() keeps in results/issue-sm_90.json
what the time model needs of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "build" / "sass" / "issue.json"
SNAPSHOT = ROOT / "benchmarks" / "results" / "issue-sm_90.json"

TYPES = {"bfloat16": "BFloat16", "float16": "Half", "float32": "float"}
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Phase:
    """Of an element: instructions and MUFU operations; of a thread's turn: elements, and exponentials in a row."""

    instructions: float = 0.0
    mufu: float = 0.0
    elements: float = 1.0
    in_a_row: float = 0.0  # that wait for each other: 1 where they stand side by side, or others in their place


@dataclass(frozen=True)
class Kernel:
    registers: int
    phases: dict  # {name: Phase}


def read():
    """{name: Kernel} of the snapshot."""
    kernels = {}
    for row in json.loads(SNAPSHOT.read_text())["kernels"]:
        phases = {name: Phase(p["instructions"], p["mufu"], p["elements"],
                              0 if name == "copy" else max(1, bool(row["alone"]) * p["exponentials"] * p["elements"]))
                  for name, p in row["phases"].items()}
        kernels[row["kernel"]] = Kernel(row["registers"], phases)
    return kernels


def take():
    """Makes the snapshot from what `make sass` has left, if it has. An entry's `alone`: exponentials that are alone in
    their basic block, 0 where it does not say; `registers`: of a thread, where it does not say all that it may have."""
    if not MEASURED.exists():
        return
    rows = []
    for name, entry in sorted(json.loads(MEASURED.read_text()).items()):
        base, _, types = name.partition("<")
        types = types.rstrip(">").split(", ")
        if base.startswith(("residual", "channel_sums")) or "1" in types or len(set(types) & set(TYPES.values())) > 1:
            continue
        phases = {phase: {key: round(p[key], 3) for key in ("instructions", "mufu", "exponentials", "elements")}
                  for phase, p in entry.items() if isinstance(p, dict)}
        most = 256 if name.startswith("resident") and types[-1] == "true" or not name.startswith("resident") else 512
        rows.append({"kernel": name, "registers": entry.get("registers", min(255, REGISTERS // most)),
                     "alone": entry.get("alone", 0), "phases": phases})
    what = "an element's instructions and MUFU operations on sm_90, counted by make sass"
    SNAPSHOT.write_text(report.json_rows({"what": what}, "kernels", rows))
