"""Several processes, perhaps on several hosts, that fit one run: who writes, and what all agree on.

All take the same steps; the first alone writes in the run directory and prints. What depends on a
clock or a signal is agreed on, so that none waits for a step that another does not take.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTOMATIC = "auto"
"""In place of an address: the cluster's environment says how many processes there are, and where"""

_SILENT = 30  # seconds without a sign of life, after which a process counts as lost
_START = 300  # seconds to wait for all processes at the start
_END = 30  # seconds to wait for all processes at the end
_LAST = 2  # seconds that the first process outlives the others
# Status codes of a lost process; in a ValueError while the program is still being dispatched.
_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")


class ProcessError(RuntimeError):
    """The processes of a fit cannot go on together: the message says why, and what to do."""


@contextmanager
def distributed(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Join the other processes of a fit, before JAX touches a device; none without a coordinator.

    Args:
        coordinator: HOST:PORT of the first process, the same for all; or "auto", where Slurm, Open
            MPI or another cluster that JAX knows says it all.
        num_processes: how many there are.
        process_id: number of this process, from 0.

    Raises:
        ValueError: if the three do not go together.
        ProcessError: if the others are not there in time, or one of them ends before this one.
    """
    _check(coordinator, num_processes, process_id)
    if coordinator is None:
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # signals are handled here
    try:
        jax.distributed.initialize(
            None if coordinator == AUTOMATIC else coordinator,
            num_processes,
            process_id,
            initialization_timeout=_START,
            heartbeat_timeout_seconds=_SILENT,
            shutdown_timeout_seconds=_END,
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes cannot be joined by {coordinator}: {error}") from None
    check_devices()
    process_id = jax.process_index()
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        of_jax = isinstance(error, RuntimeError) or _STATUS.match(str(error))
        if not of_jax or "RESOURCE_EXHAUSTED" in str(error):  # memory: not for want of a process
            raise
        raise ProcessError(
            f"process {process_id}: the processes cannot go on together, as when one of them is "
            f"gone ({error}); what was saved is as it was: go on with --resume, on as many "
            "processes as there are, and a --mesh of their devices"
        ) from None
    jax.distributed.shutdown()


def check_devices() -> None:
    """Start JAX's devices.

    Raises:
        RuntimeError: if there are none of the kind that JAX_PLATFORMS asks for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter says nothing
        asked = jax.config.jax_platforms
        why = f" ({error})" if str(error) else ""
        raise RuntimeError(
            f"JAX finds no device, and JAX_PLATFORMS is {asked!r}{why}: install JAX for such "
            "devices, or unset it to take what there is"
        ) from None


def use_one_processor() -> None:
    """Ask for one device where the host's processors are to look like several.

    A program of one device would else be divided among the threads of all, which takes several
    times its processor time. Nothing changes where JAX has started its devices already.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 1)


def exit_process(status: int) -> None:
    """End this process, if it has joined others, though they may be gone.

    JAX would wait for them, and abort. The first process goes last: the others see that it is gone,
    and would abort too, while they say by themselves why they end.
    """
    if _alone():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main_process():
        time.sleep(_LAST)
    os._exit(status)


def is_main_process() -> bool:
    """Tell whether this is the process that writes and prints: the first, or the only one."""
    return _alone() or jax.process_index() == 0


def agree_on(calls: int, signum: int) -> tuple[int, int]:
    """Return how many steps come next, as the first process says, and any process's signal."""
    if _alone():
        return calls, signum
    every = multihost_utils.process_allgather(np.array([calls, signum]))
    return int(every[0, 0]), int(every[:, 1].max())


def check_same_everywhere(what: str, *values: Any) -> None:
    """Refuse processes that are not told the same, or do not find the same.

    Raises:
        ProcessError: if the values differ, between any two processes.
    """
    if _alone():
        return
    digest = np.frombuffer(hashlib.sha256(repr(values).encode()).digest(), np.uint8)
    every = multihost_utils.process_allgather(digest)
    if (every != every[0]).any():
        others = np.flatnonzero((every != every[0]).any(axis=1))
        raise ProcessError(
            f"process {', '.join(map(str, others))} of {len(every)} has {what} other than the "
            "first: expected the same command, the same text and the same run directory, on a "
            "file system that all hosts share"
        )


def wait_for_all(what: str) -> None:
    """Wait until every process has come here."""
    if not _alone():
        multihost_utils.sync_global_devices(what)


def _alone() -> bool:
    # Not by the number of processes: JAX would start its devices to say it.
    return not jax.distributed.is_initialized()


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = f"--num-processes {num_processes} and --process-id {process_id}"
    if coordinator is None:
        if (num_processes, process_id) != (None, None):
            raise ValueError(
                f"{given} without --coordinator: expected HOST:PORT of the first process"
            )
        return
    if coordinator == AUTOMATIC:
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        raise ValueError(
            f"--coordinator is {coordinator!r}: expected HOST:PORT of the first process, the same "
            f"for all, or {AUTOMATIC}"
        )
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise ValueError(
            f"{given}: expected how many processes there are, and which of them this is, from 0"
        )
