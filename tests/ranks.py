"""Several processes as a launcher would start them, from one server that has imported everything once."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch


def start(function: Callable[..., None], *arguments: Any, world: int) -> None:
    """Run `function(rank, world, *arguments)` in `world` processes of one thread each; an error in one is raised here."""
    # torch._dynamo is what DistributedDataParallel imports on first use, and takes longer than the rest of torch.
    multiprocessing.set_forkserver_preload(["torch._dynamo", "unimodal.cli.train", "toy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, args=(world, port, function, arguments), nprocs=world, daemon=True, start_method="forkserver"
    )


def _rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What torchrun sets.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    function(rank, world, *arguments)
