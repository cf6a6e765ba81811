"""The disk space that a run will need, checked before its first step, so that a full disk isn't found after the last one."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.training import BYTES_PER_WEIGHT, TrainedModelConfig, TrainerConfig, models_beside
from rlhf_core.infra.errors import StorageError
from rlhf_core.infra.files import readable_size, storage_errors
from rlhf_core.infra.model_files import is_adapter
from rlhf_core.infra.safetensors_file import TensorEntry, nbytes, read_header
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.training.optimizer import state_bytes
from rlhf_core.training.roles import trained_roles

if TYPE_CHECKING:
    from rlhf_core.training.setup import RunSetup


@dataclass(frozen=True)
class DiskNeed:
    """The most that a run's directory holds at one time, apart from its logs."""

    checkpoints: int
    """How many checkpoints there are at one time."""
    checkpoint_bytes: int
    """Of one checkpoint."""
    model_bytes: int
    """Of all exported models."""

    @property
    def bytes(self) -> int:
        """Of checkpoints and exported models together."""
        return self.checkpoints * self.checkpoint_bytes + self.model_bytes

    def __str__(self) -> str:
        plural = "s" if self.checkpoints != 1 else ""
        return (
            f"{self.checkpoints} checkpoint{plural} of {readable_size(self.checkpoint_bytes)}"
            f" and models of {readable_size(self.model_bytes)}"
        )

    def require(self, output: Path, *, already_there: int = 0) -> int:
        """Return the free bytes of the disk that `output` is on, if they are enough.

        Args:
            already_there: bytes of the need that are on the disk already.

        Raises:
            StorageError: they are too few.
        """
        place = next(path for path in (output, *output.absolute().parents) if path.exists())
        with storage_errors(place):
            free = shutil.disk_usage(place).free
        if free < self.bytes - already_there:
            raise StorageError(
                f"too little free space for what the run will write: {self.bytes - already_there} bytes are needed ({self})",
                place=str(output),
                got=f"{free} bytes free",
                fix="free space, choose another `output`, or train less: `lora`, a smaller `checkpoint.keep`",
            )
        return free


def checkpoints_at_once(config: TrainerConfig, total_steps: int | None) -> int:
    """Return the most checkpoints that are on the disk at one time: those kept, the best one, and the one being written."""
    best = config.exported_by is not None
    most = config.checkpoint.keep + best + 1
    if config.checkpoint.minutes is None and not best:
        # By steps alone it is known when each is saved; the last one always is.
        every = config.checkpoint.every
        saved = 1 if not every else None if total_steps is None else -(-total_steps // every)
        most = most if saved is None else min(most, saved)
    return most if total_steps is None else min(most, max(1, total_steps))


def disk_need(setup: RunSetup, total_steps: int | None) -> DiskNeed:
    """Return what a run will write, from its built models; `total_steps` is None where the data decide their number."""
    state = state_bytes(setup.parameters, setup.config, setup.trainer.models)
    kept = nbytes(setup.distribution.full_state(setup.trainer.models))
    models = sum(_exported_bytes(setup.trainer.models[role]) for role in trained_roles(setup.trainer))
    return DiskNeed(checkpoints_at_once(setup.config, total_steps), kept + state, models)


def _exported_bytes(module: Any) -> int:
    """Return the least bytes of a model's export: of an adapter alone, or of all weights in the type they are saved in."""
    adapter = getattr(module, "has_adapter", False) and getattr(module, "base_path", None) is not None
    sizes = {id(p): p.nbytes for p in module.parameters() if p.requires_grad or not adapter}
    for part in module.modules():
        if isinstance(part, SequenceModel):
            if adapter and part.embeddings_resized:  # an adapter's file holds them, too
                tables = (part.network.get_input_embeddings(), part.network.get_output_embeddings())
                sizes |= {id(p): p.nbytes for table in tables if table is not None for p in table.parameters()}
            asked = part.save_precision
            width = part.saved_dtypes.main.itemsize if asked == "auto" else 4 if asked == "float32" else 2
            sizes |= {id(p): p.numel() * min(p.element_size(), width) for p in part.parameters() if id(p) in sizes}
    return sum(sizes.values())


def checkpoint_bytes_on_disk(directory: Path) -> int:
    """Return the bytes of all checkpoints in a run's directory."""
    files: Iterable[Path] = directory.glob("checkpoints/step-*/*")
    return sum(file.stat().st_size for file in files if file.is_file())


def disk_need_of_files(model: str, config: TrainerConfig) -> DiskNeed | None:
    """Return what a run on a model's directory would write, from the headers of its files; None where it can't be known.

    Models beside it that are trained, such as a critic, are those that the configuration names.
    """
    named = [other for other in models_beside(config).values() if isinstance(other, TrainedModelConfig)]
    # Which weights are matrices in layers isn't known here, and most are.
    per_weight = BYTES_PER_WEIGHT[config.optimizer.name]
    trained = stored = 0
    for source, lora in ((model, config.lora), *((other.path, other.lora) for other in named)):
        entries = _tensor_entries(Path(source).expanduser()) if lora is None else []
        if not entries:
            return None
        trained += sum(entry.count for entry in entries)
        stored += sum(entry.nbytes for entry in entries)
    return DiskNeed(checkpoints_at_once(config, config.max_steps), round((4 + per_weight) * trained), stored)


def _tensor_entries(path: Path) -> list[TensorEntry]:
    """Return the header entry of each tensor in a model directory; none where it isn't there, or is an adapter."""
    if not path.is_dir() or is_adapter(str(path)):
        return []
    try:
        return [entry for file in sorted(path.glob("*.safetensors")) for entry in read_header(file).values()]
    except (OSError, ValueError):
        return []
