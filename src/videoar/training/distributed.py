"""Many processes: who they are, what is split among them, and files that any number can read.

The batches of an optimizer step are shared among the ranks, so that one process or many compute the
same. Weights, gradients, averages and moments are split by FSDP2 (Zhao et al. 2023,
arXiv:2304.11277), block by block. What of torch takes a second to import is imported where it is
needed: a wrong option is told at once.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videoar.core.transformer import VideoTransformer
from videoar.weights import write_safetensors

TIMEOUT, PATIENCE = timedelta(minutes=10), timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is."""

    index: int = 0
    count: int = 1
    patient: Any = None
    """A group in which one may wait for the first for days."""

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first go ahead: what it puts on disc, however long it takes, the others find."""
        if self.count > 1 and not self.first:
            dist.barrier(self.patient)
        yield
        if self.count > 1 and self.first:
            dist.barrier(self.patient)

    def total(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers, which all ranks have under the same names."""
        if self.count == 1:
            return dict(terms)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        values = torch.tensor(list(terms.values()), dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return dict(zip(terms, values.tolist(), strict=True))


def join(device: str) -> tuple[Ranks, torch.device]:
    """Join the processes that `torchrun` started, if it did; return them and this one's device."""
    place = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), place
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), patient), place


def split(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Split the weights of a module among the ranks; they come together where they compute."""
    if ranks.count == 1:
        return
    mesh = dist.init_device_mesh(device.type, (ranks.count,))
    for child in module.children():
        _split(child, mesh)


def _split(module: nn.Module, mesh: dist.DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if isinstance(module, VideoTransformer):
        for block in module.blocks:
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, "text")
        fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(module, "encode_text")
    elif isinstance(module, nn.Sequential) or any(
        isinstance(each, VideoTransformer) for each in module.modules()
    ):  # what is inside is called by itself
        for child in module.children():
            _split(child, mesh)
    elif any(True for _ in module.parameters()):
        fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks; all must ask."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def gather(module: nn.Module, into: nn.Module) -> nn.Module:
    """Copy the weights and buffers of a split module into one that is whole; all must ask."""
    tensors = dict(into.named_parameters()) | dict(into.named_buffers())
    with torch.no_grad():
        for name, part in (dict(module.named_parameters()) | dict(module.named_buffers())).items():
            tensors[name].copy_(whole(part))
    return into


def save(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Write tensors as safetensors, every rank its shards."""
    dense = {name: value.detach().contiguous() for name, value in tensors.items()}
    if ranks.count == 1:
        folder.mkdir()
        write_safetensors(folder / "whole.safetensors", dense)
    else:
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dense, storage_writer=writer)


def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what a folder holds."""
    import torch.distributed.checkpoint as dcp

    found: Any = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(about.size) for name, about in found.state_dict_metadata.items()}


def load(folder: Path, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read tensors into `targets`, whatever the number of ranks that wrote them."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # torch says that one process is one process
        warnings.simplefilter("ignore", UserWarning)
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(dict(targets), storage_reader=reader, no_dist=ranks.count == 1)


def recompute_activations(model: VideoTransformer) -> None:
    """Keep only the inputs of blocks for the backward pass."""
    checkpoint = torch.utils.checkpoint.checkpoint
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
