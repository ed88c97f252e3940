"""FSDP2 for the trainer: Lightning's model parallelism over every process of every node, with checkpoints that a kill leaves whole."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy

from unimodal import files
from unimodal.hub.training import check_training_checkpoint


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer states cut among all processes (Zhao et al. 2023, arXiv 2304.11277); `Task` does the cutting.

    Args:
        save_distributed_checkpoint: every process writes its part of a resume checkpoint, which then is a folder; otherwise the first
            gathers and writes all of it.
        process_group_backend: how processes talk; by default nccl on GPUs and gloo elsewhere.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        # The first process decides where, and exchanges the parts of the old checkpoint for the new ones when all have written.
        with files.replacing_contents(filepath, lambda _: True) if self.is_global_zero else nullcontext() as fresh:
            super().save_checkpoint(checkpoint, fresh, storage_options)  # type: ignore[arg-type]
            self.barrier()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if self.is_global_zero and path.is_dir():
            files.restore(path)
        self.barrier()
        check_training_checkpoint(path)
        return super().load_checkpoint(path, weights_only=True)
