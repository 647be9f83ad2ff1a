"""The C++ compiler of this machine, which --compile true needs; asked for without torch."""

import functools
import os
import subprocess
import sysconfig

from orchestrator.errors import one_line

# What torch's generated kernels include (torch/_inductor/codecache.py and cpp_prefix.h) beside torch's own headers.
PROBE = "#include <Python.h>\n#include <omp.h>\n#include <cmath>\n"
WHAT_TO_DO = "install one (apt install g++ libpython3-dev), name it in CXX, or leave --compile out"


def name() -> str:
    """The compiler that torch takes: CXX, else g++."""
    return os.environ.get("CXX") or "g++"


def problem() -> str:
    """Why nothing can be compiled here, and what to do, on one line; "" where it can."""
    off = [name for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE") if os.environ.get(name) == "1"]
    if off:  # the run would go on without it, and say that it had compiled
        return f"torch's compiler is switched off by {off[0]}=1; unset that, or leave --compile out"
    headers = sysconfig.get_paths()["include"]
    command = [name(), "-fsyntax-only", "-fopenmp", "-x", "c++", "-I", headers, "-"]
    try:
        done = subprocess.run(command, input=PROBE, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C++ compiler {name()} cannot be run ({one_line(error, 200)}); {WHAT_TO_DO}"
    if done.returncode:
        said = " ".join((done.stderr.strip().splitlines() or ["it says nothing"])[0].split())[:200]
        return f"the C++ compiler {name()} cannot compile for Python ({said}); {WHAT_TO_DO}"
    return ""


@functools.cache
def version() -> str:
    """The compiler's name and version as it tells them; raises CalledProcessError or OSError where there is none."""
    done = subprocess.run([name(), "--version"], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()[0].strip()
