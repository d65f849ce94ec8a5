"""Programs that need a Python in which ldm_fused was not imported yet. Torch takes most of the time that one takes to
start: they are forked from one that has imported torch, and nothing else."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import ldm_fused

ROOT = Path(ldm_fused.__file__).parents[1]
SERVER = """
import json, os, sys, torch, traceback
for line in sys.stdin:
    code, folder, environment, files = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@functools.cache
def _server():
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_python(code, cwd=ROOT, path=(ROOT, ROOT / "tests"), **environment):
    """``returncode``, ``stdout`` and ``stderr`` of a program with this in its environment, modules being in ``path``."""
    path = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        request = [code, str(cwd), {**os.environ, "PYTHONPATH": path, **environment}, [*map(str, files)]]
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return SimpleNamespace(returncode=int(server.stdout.readline()), stdout=files[0].read_text(),
                               stderr=files[1].read_text())
