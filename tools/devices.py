"""GPUs as `make sass` needs them: how fast they move bytes and how many instructions they issue meanwhile.

Multiprocessors, clocks and the width of a multiprocessor are NVIDIA's: the data sheets (H100 SXM5, H200 SXM, B200,
A100 SXM4 80 GB, GeForce RTX 4090; boost clock) and the CUDA programming guide's table of throughput. The copy bandwidth
is what a large device-to-device copy is assumed to reach, read and written bytes together, 86 to 91 % of the data
sheets' peak (3.35, 4.8, 8.0, 2.04 and 1.01 TB/s). `make gpu` has measured the H200's: 4.2 TB/s, at 1.95 GHz.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    name: str
    multiprocessors: int
    clock_hz: float
    copy_bytes_per_second: float  # read and written together
    issue_per_cycle: int = 4  # warp instructions of a multiprocessor: one a scheduler
    mufu_lanes: int = 16  # of a multiprocessor: exponentials, reciprocals and roots a cycle

    @property
    def instructions_per_second(self) -> float:
        """What all threads together can issue."""
        return self.multiprocessors * self.issue_per_cycle * 32 * self.clock_hz

    @property
    def mufu_per_second(self) -> float:
        return self.multiprocessors * self.mufu_lanes * self.clock_hz

    def issue_share(self, instructions: float, moved: float) -> float:
        """The share of all issue slots that `instructions` take while `moved` bytes are copied; above 1 they bind."""
        return instructions / self.instructions_per_second * self.copy_bytes_per_second / moved

    def mufu_share(self, operations: float, moved: float) -> float:
        """As issue_share, of the unit that computes exponentials and reciprocals."""
        return operations / self.mufu_per_second * self.copy_bytes_per_second / moved


DEVICES = {gpu.name: gpu for gpu in (
    GPU("H100", 132, 1.755e9, 3.0e12),
    GPU("H200", 132, 1.755e9, 4.3e12),
    GPU("A100", 108, 1.41e9, 1.75e12),
    GPU("RTX 4090", 128, 2.52e9, 0.92e12),
    GPU("B200", 148, 1.9e9, 7.0e12),
)}
