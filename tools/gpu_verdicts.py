"""The verdicts on gpu.py's commands: a status and a reason, from what tests wrote down and what tools printed."""

import json
import re
from typing import Dict, List

from tools.gpu_summary import counted


def worst(statuses) -> str:
    """The worst of the statuses: it stands for all of them."""
    return next(s for s in ("timed out", "failed", "passed", "not available") if s in statuses)


def totals(records: List[str]) -> dict:
    """Adds up what the parts wrote down: the counts, those of tests that used the GPU, and what failed."""
    outcomes, whys, on_gpu, lost, interrupted = {}, {}, set(), [], []
    for record in records:
        chosen = []
        for text in record.splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off when its process was ended
                continue
            if "chosen" in line:
                chosen = line["chosen"]
            elif outcomes.get(line["id"]) != "failed":  # a test that passed can still fail in its teardown
                outcomes[line["id"]], whys[line["id"]] = line["outcome"], line["why"]
            if line.get("on_gpu"):
                on_gpu.add(line["id"])
        left = [i for i in chosen if i not in outcomes]
        lost, interrupted = lost + left, interrupted + left[:1]

    def counts(ids) -> Dict[str, int]:
        return {kind: sum(outcomes[i] == kind for i in ids) for kind in ("passed", "failed", "skipped")}

    return {
        **counts(outcomes),
        "on_gpu": counts(on_gpu),
        "failures": {i: whys[i] for i in sorted(outcomes) if outcomes[i] == "failed"},
        "interrupted": interrupted,
        "without_outcome": lost,
        "skips": counted(whys[i] for i in outcomes if outcomes[i] == "skipped"),
    }


def judged(found: dict, device: str) -> List[str]:
    """The reasons why the tests have not passed; empty where they have."""
    lost = len(found["without_outcome"])
    reasons = {
        f"{found['failed']} failed": found["failed"],
        f"{lost} have no outcome: their process died, or was ended": lost,
        "no test passed": not found["passed"],
        "no test that used the GPU passed": device == "cuda" and not found["on_gpu"]["passed"],
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def sanitized(log: str, status: str, sign: str = "") -> dict:
    """The verdict on a tool's output: status, number of errors, and why. With `sign`, a pattern, the run contains a
    mistake, and passes only if the tool reports it."""

    def verdict(status: str, why: str) -> dict:
        return {"status": status, "errors": errors, "why": why}

    counts = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log, re.M)
    errors = sum(map(int, counts)) if counts else None
    cases = re.findall(r"^cases right(?: so far)?: (\d+)", log, re.M)
    if status == "timed out":
        return verdict("timed out", f"it ran out of time, {cases[-1] if cases else 'no'} cases right so far")
    if re.search(r"^=+ .*Device not supported", log, re.M):
        return verdict("not available", "it does not support this device")
    if errors is None:
        said = re.search(r"^=+ Error: (.*)", log, re.M)
        return verdict("failed", f"no summary{f': {said[1]}' if said else ''}")
    if sign:
        found = errors and re.search(f"^=+ .*{sign}", log, re.M)
        return verdict("passed", "found") if found else verdict("failed", "the mistake went unseen")
    if errors:
        return verdict("failed", f"{errors} errors")
    if status != "passed" or not re.search(r"^cases right: ", log, re.M):
        return verdict("failed", "no error, but the cases did not end well")
    return verdict("passed", f"{cases[-1]} cases right")
