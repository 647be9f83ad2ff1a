"""A Ray of the command's own: no more processes than one command needs.

`ray.init` starts five Python processes beside the node's manager: an API server, which job submission and the state
API ask, an autoscaler's monitor, a log monitor, which prints workers' output in the driver, and the agents of the
dashboard and of runtime environments. Nobody asks the first, the next two have nothing to do, and on two cores each
takes a second from the first step. The dashboard's agent starts small, and serves no metrics. Internals of Ray 2.60,
which is why its version is pinned.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping

# Ray Train trains in a thread, where glibc gives large blocks back to the kernel and faults them in again every
# step: one arena, and keep what was freed (man mallopt; 32 MiB is the largest threshold it takes). Arrow's own
# allocator has a heap for each thread, which only that thread can trim: loader processes keep what others have freed.
MALLOC = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
}


@contextlib.contextmanager
def few_processes(environment: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, ray.init starts a node without monitors and API server, and with the small dashboard agent.

    Args:
        environment: variables that the node and all its processes have besides this process's.
    """
    from ray._private import node, parameter, services, utils

    whole = parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error
    # A terminal that goes, and `timeout`, signal the whole group: without Ray the workers could write no checkpoint.
    popen = services.ConsolePopen
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    parameter.RayParams = functools.partial(whole[0], no_monitor=True, include_log_monitor=False)
    node.Node.start_api_server = lambda *_, **__: None
    utils.get_dashboard_dependency_error = lambda: ImportError("not wanted here")
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        services.ConsolePopen = popen
        parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error = whole
