"""A plugin of pytest: runs one part of the suite, for processes side by side, and writes down each outcome as it comes.

pytest -p tools.part --part 2/8 --record FILE, with the repository in PYTHONPATH. FILE gets a line of JSON for each: first
{"chosen": [id, ...]}, then {"id", "outcome": "passed" | "failed" | "skipped", "why", "on_gpu"}. Which part a test
belongs to depends on its id alone, so the parts cover the suite whatever their processes do.
"""

import json
import sys
from zlib import crc32


def part(text):
    index, parts = map(int, text.split("/"))
    if not 1 <= index <= parts:
        raise ValueError(f"--part {text}: expected I/N with I from 1 to N")
    return index - 1, parts


def pytest_addoption(parser):
    parser.addoption("--part", type=part, default=(0, 1), metavar="I/N")
    parser.addoption("--record", metavar="FILE")


def pytest_configure(config):
    if config.getoption("record"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


def pytest_collection_modifyitems(config, items):
    index, parts = config.getoption("part")
    mine = [item for item in items if crc32(item.nodeid.encode()) % parts == index]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


class Recorder:
    def __init__(self, path):
        self.file, self.allocations = open(path, "w", buffering=1), 0  # line by line

    def write(self, **line):
        self.file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report):
        if not report.passed:  # a file that cannot be imported, or is skipped as a whole
            self.write(id=report.nodeid, outcome=report.outcome, why=reason(report), on_gpu=False)

    def pytest_collection_finish(self, session):
        self.write(chosen=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self):
        self.allocations = gpu_allocations()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:  # of setup and teardown only what went wrong
            on_gpu = gpu_allocations() > self.allocations
            self.write(id=report.nodeid, outcome=report.outcome, why=reason(report), on_gpu=on_gpu)


def gpu_allocations():
    """How often tensors got memory on the GPU: a test with "cuda" in its name may not have used it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0)


def reason(report):
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line, message
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().split("\n")
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]  # where a file cannot be imported: the last
    return (errors[-1] if errors else lines[0])[:300]
