"""A function of a test, run by several processes that torchrun starts; what each rank returns comes back.

The function lies in a module beside the test and gets its arguments by keyword. It finds a gloo group set up, and no
GPU. What it returns is stored with ``torch.save`` (tensors, numbers, strings and containers of them). A function that
raises ends the run with that rank's traceback; one that hangs ends it after ``timeout`` seconds.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
#: Seconds after which a collective that some rank didn't come to is an error on the others.
PATIENCE = 120


class ProcessesError(AssertionError):
    """Some rank raised, or the run took too long; holds what all ranks printed."""


def in_processes(
    function: Callable[..., Any], size: int = 2, *, timeout: float = 480, patience: float = PATIENCE, **arguments: Any
) -> list[Any]:
    """What ``function(**arguments)`` returns on each of ``size`` ranks, in their order.

    Raises:
        ProcessesError: a rank raised or died (the others are then ended), or ``timeout`` seconds went by.
    """
    module = sys.modules[function.__module__]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.pickle"
        task.write_bytes(pickle.dumps((module.__file__, function.__qualname__, arguments, patience)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        with (Path(folder) / "printed").open("w+") as printed:
            run = subprocess.Popen(
                [*torchrun, __file__, folder],
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"},
            )
            try:
                status: int | str = run.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"nothing after {timeout:.0f} s"
            finally:
                _end(run)
            printed.seek(0)
            text = printed.read()
        errors = "\n".join(f"rank {file.stem}: {file.read_text()}" for file in sorted(Path(folder).glob("*.error")))
        if status != 0 or errors:
            raise ProcessesError(f"{function.__qualname__} on {size} processes: {status}\n{errors or text[-8000:]}")
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(size)]


def _end(run: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks, which have a session of their own each."""
    if run.poll() is None:
        run.send_signal(signal.SIGTERM)  # it ends its ranks
        try:
            run.wait(15)
        except subprocess.TimeoutExpired:
            run.kill()


def _rank(folder: Path) -> None:
    """What each process does: find the function, run it, store what it returns or what went wrong."""
    import importlib.util

    import torch.distributed as dist

    file, name, arguments, patience = pickle.loads((folder / "task.pickle").read_bytes())
    sys.path[:0] = [str(TESTS), str(Path(file).parent)]
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=patience))
        torch.manual_seed(0)
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        function: Any = module
        for part in name.split("."):
            function = getattr(function, part)
        result = function(**arguments)
        torch.save(result, folder / f"{rank}.result")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
