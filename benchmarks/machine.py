"""What the numbers come from: the machine, the versions, and how much memory there is and was used."""

import ctypes
import datetime
import gc
import itertools
import os
import platform
import subprocess
from pathlib import Path
from typing import Callable, Dict, Optional

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: str) -> Dict[str, object]:
    """Everything a reader needs to judge a number: goes into each result file."""
    import ldm_fused  # here, since the rest is also asked before it is built

    build = ldm_fused.build_info()
    return {
        "machine": gpu_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ldm_fused": ldm_fused.__version__,
        "compiler": build.get("compiler"),
        "cpu_isa": build.get("cpu_isa"),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def headline(named: Dict[str, object]) -> str:
    """The machine and the versions in one line."""
    where = named["machine"]
    if where == named["cpu"]:
        where = f"{where} ({counted(named['cores'], 'core')}, {counted(named['threads'], 'thread')})"
    commit = f", commit {named['commit']}" if named["commit"] else ""
    return f"{where}, torch {named['torch']}, Python {named['python']}, ldm_fused {named['ldm_fused']}{commit}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def cores() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def busy() -> bool:
    """Whether other programs take a good part of the machine."""
    return os.getloadavg()[0] > 0.5 * cores()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def commit() -> Optional[str]:
    """What COMMIT says, or the commit of this tree, with "+" where the tree has changed since; None without git."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def cache_bytes(device) -> int:
    """The last-level cache: the GPU's L2, or the largest of the CPU's (32 MiB where the system does not say)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1))
    return max(sizes, default=32 << 20)


def available_bytes(device) -> int:
    """Memory that can still be allocated."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    status = proc_fields("/proc/meminfo")
    return status.get("MemAvailable", 1 << 62)


def proc_fields(path: str) -> Dict[str, int]:
    """The lines "Name: 123 kB" of a file under /proc, in bytes."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":")[::2] for line in lines if line.endswith("kB"))
    return {name: int(value.split()[0]) << 10 for name, value in pairs}


def keep_freed_memory(keep: bool = True) -> None:
    """Makes glibc keep freed memory and hand it out again, or take each tensor of 128 KiB and more from the system.

    Otherwise it depends on what was freed before whether a call pays the page faults of fresh memory. Tensors of 32 MiB
    and more always pay them: glibc keeps no larger pieces.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(mmap_threshold, 32 << 20 if keep else 128 << 10)
    mallopt(trim_threshold, (1 << 31) - 1)


def peak_bytes(run: Callable[[], object], device) -> int:
    """The most bytes that torch's allocator has handed out at a time while `run` runs, above what it had before: for
    tensors, and for what an op needs by itself. On a CPU by the profiler, which sees each allocation."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes, initial=0))
