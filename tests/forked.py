"""Processes that are forked from a program which has imported torch, once for all of them."""

import contextlib
import os
import signal
import sys
import traceback


def run(world, work):
    """``work(rank)`` in ``world`` processes; whether all came to its end. One that fails ends the others, which would
    wait for it for long."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    succeeded = True
    for _ in range(world):
        succeeded = os.wait()[1] == 0 and succeeded
        for child in [] if succeeded else children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    return succeeded
