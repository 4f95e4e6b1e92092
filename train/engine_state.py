"""What an engine holds, by parameter: its part of a checkpoint, for any number of ranks and any ZeRO stage.

Parameters are fp32, and ZeRO's master copies are the same numbers, so beside the weights a checkpoint needs nothing but
the optimizer's state. Each rank writes the pieces of it that it holds, and which elements of which parameter they are;
each rank reads the pieces that it holds now, out of as many files as there were ranks. So the state is moved, never
computed, and a run goes on with other ranks or at another stage as exactly as with the same.

(DeepSpeed's universal checkpoint is for the same purpose. Its reader (0.19.8) knows Adam's moments alone, gives all
groups of ZeRO 3 the options of the first, fails on a rank without a part of some group, has no ZeRO 0, and unpickles
whatever a file holds.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from . import checkpoint
from .engine import LossScale
from .engine_files import FORMAT, file_of, read, tensors, write

MASTER = "master copy"


@dataclass(frozen=True)
class Piece:
    """The elements of a parameter whose update is this rank's.

    name   of the parameter, in the module
    start  of the first one, among the parameter's
    count  how many
    held   what the optimizer updates: many pieces in a row, or, at stage 0, the parameter. Its state has that shape
    at     of the first one, among those of `held`
    """

    name: str
    start: int
    count: int
    held: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """A view of this piece in `held`, or in a state of its shape: (count,)."""
        return tensor.detach().view(-1)[self.at : self.at + self.count]


def pieces(engine: Any) -> list[Piece]:
    """Of all trained parameters, in the order of the module's; those that this rank has nothing of are left out."""
    found = (_piece(engine, name, parameter) for name, parameter in engine.module.named_parameters())
    return [piece for piece in found if piece is not None and piece.count > 0]


def _piece(engine: Any, name: str, parameter: Any) -> Piece | None:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not parameter.requires_grad:
        return None
    if stage == 0:
        return Piece(name, 0, parameter.numel(), parameter, 0)
    if stage == 3:
        index, at, width = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = width * dist.get_rank(engine.data_parallel_group)
        count = min(width, parameter.ds_numel - start)  # the last ranks' are filled up
        return Piece(name, start, count, optimizer.fp32_partitioned_groups_flat[index], at)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inner, outer = mapping.lp_fragment_address, mapping.hp_fragment_address
    held = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Piece(name, inner.start, inner.numel, held, outer.start)


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    """PyTorch's, below ZeRO's."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def save_engine(engine: Any, folder: Path) -> None:
    """Write this rank's part into `folder`, which all ranks share. Raises OSError where the disk does not take it."""
    optimizer, stage, rank = _optimizer(engine), engine.zero_optimization_stage(), dist.get_rank()
    parts = []
    for piece in pieces(engine) if stage or rank == 0 else []:  # at stage 0 all hold the same
        state = optimizer.state.get(piece.held, {})
        cut = {key: piece.of(value) for key, value in state.items() if _runs_along(piece.held, value)}
        whole = {key: value for key, value in state.items() if key not in cut}
        parts.append({"name": piece.name, "start": piece.start, "count": piece.count, "cut": cut, "whole": whole})
    groups = [{key: value for key, value in one.items() if key != "params"} for one in optimizer.param_groups]
    scaler = None if engine.scaler is None else asdict(engine.scaler)
    content = {"format": FORMAT, "parts": parts, "groups": groups, "loss_scale": scaler}
    folder.mkdir(exist_ok=True)
    write(folder / file_of(rank), content)


def _runs_along(held: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == held.shape and value.dim() > 0


def load_engine(engine: Any, folder: Path) -> None:
    """Go on from the checkpoint in `folder`, with its weights and its optimizer's state. Rank 0 has checked it before;
    what does not fit this model is found out only here, and raises CheckpointError."""
    try:
        _load_weights(engine, folder / checkpoint.WEIGHTS)
        _load_state(engine, folder / checkpoint.ENGINE)
    except Exception as error:
        raise checkpoint.CheckpointError(
            f"{folder}: the run cannot go on from it ({type(error).__name__}: {error}); remove this checkpoint, so "
            "that an older one is used, or start a new run"
        ) from error


@torch.no_grad()
def _load_weights(engine: Any, path: Path) -> None:
    partitioned = engine.zero_optimization_partition_weights()
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    held = engine.module.state_dict(keep_vars=True)
    with safe_open(path, framework="pt") as weights:
        for name, tensor in held.items():  # before the first one is gathered, for which all ranks wait
            shapes = tuple(weights.get_slice(name).get_shape()), tuple(getattr(tensor, "ds_shape", tensor.shape))
            if shapes[0] != shapes[1]:
                raise ValueError(f"{name} has shape {shapes[0]} there and {shapes[1]} here")
        for name, tensor in held.items():
            gathered = partitioned and name in parameters
            # One at a time: whole, the model may not fit.
            with deepspeed.zero.GatheredParameters([tensor] if gathered else [], modifier_rank=0, enabled=gathered):
                if not gathered or dist.get_rank() == 0:
                    tensor.copy_(weights.get_tensor(name))
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()


@torch.no_grad()
def _load_state(engine: Any, folder: Path) -> None:
    contents = [read(path, mmap=True) for path in sorted(folder.iterdir())]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for part in (part for content in contents for part in content["parts"]):
        by_name.setdefault(part["name"], []).append(part)
    optimizer = _optimizer(engine)
    optimizer.state.clear()
    for piece in pieces(engine):
        sources = by_name[piece.name]
        if not sources[0]["cut"] and not sources[0]["whole"]:
            continue  # no step was taken before it was written
        state = optimizer.state[piece.held]
        for key in sources[0]["cut"]:
            if key not in state:
                state[key] = torch.zeros_like(piece.held)
            _fill(piece, piece.of(state[key]), sources, key)
        for key, value in sources[0]["whole"].items():
            state[key] = _placed(key, value, piece.held.device)
    for group, saved in zip(optimizer.param_groups, contents[0]["groups"], strict=True):
        group.update(saved)
    scaler = contents[0]["loss_scale"]
    if engine.scaler is not None and scaler is not None:
        engine.scaler = LossScale(**scaler)


def _fill(piece: Piece, view: Tensor, sources: list[dict[str, Any]], key: str) -> None:
    """Copy what `sources` hold of the piece's elements; together they must hold them all."""
    filled = 0
    for source in sources:
        low = max(piece.start, source["start"])
        high = min(piece.start + piece.count, source["start"] + source["count"])
        if low < high:
            found = source["cut"][key][low - source["start"] : high - source["start"]]
            view[low - piece.start : high - piece.start] = found
            filled += high - low
    if filled != piece.count:
        raise ValueError(f"it holds {filled} of {piece.count} elements of {piece.name} ({key})")


def _placed(key: str, value: Any, device: torch.device) -> Any:
    """A state that does not run along the elements, where PyTorch's optimizers keep it: their counters on the CPU."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if key == "step" else value.to(device, copy=True)


def gather_weights(engine: Any) -> dict[str, Tensor]:
    """On rank 0 the whole model's parameters and buffers, on the CPU; nothing on the others. Every rank must call it:
    under ZeRO-3 each parameter is gathered, one at a time."""
    first = dist.get_rank() == 0
    return {name: tensor.to("cpu", copy=True) for name, tensor, _ in _whole(engine) if first}


@torch.no_grad()
def copy_weights(engine: Any, module: torch.nn.Module) -> None:
    """The whole model into `module`, towers like the engine's, on every rank. Buffers become those of rank 0, as a
    checkpoint has them: batch norm's differ. Every rank must call it, as gather_weights."""
    into = module.state_dict(keep_vars=True)
    for name, tensor, is_parameter in _whole(engine):
        if not is_parameter:
            tensor = tensor.clone()
            dist.broadcast(tensor, src=0, group=engine.data_parallel_group)
        into[name].copy_(tensor)


def _whole(engine: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """The model's parameters and buffers by name, each whole until the next one is asked for; the last: whether it is a
    parameter. Every rank must go through all of them."""
    partitioned = engine.zero_optimization_partition_weights()
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        gathered = partitioned and name in parameters
        with deepspeed.zero.GatheredParameters([tensor] if gathered else [], enabled=gathered):
            yield name, tensor.detach(), name in parameters


@torch.no_grad()
def nonfinite(engine: Any, weights: dict[str, Tensor], group: Any) -> list[str]:
    """What holds NaN or infinity of `weights` (rank 0's, see gather_weights), and of the fp32 master copies and the
    optimizer's state, of which each rank holds its part: by parameter, and the same on every rank. Every rank calls
    it."""
    bad = _nonfinite_here(engine, weights)
    found = torch.tensor(float(bool(bad)), device=engine.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    if not found:
        return []
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, bad, group=group)
    return sorted(set().union(*names))


def _nonfinite_here(engine: Any, weights: dict[str, Tensor]) -> list[str]:
    """What this rank alone can name."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    optimizer = _optimizer(engine)
    for piece in pieces(engine):
        state = optimizer.state.get(piece.held, {})
        parts = {key: piece.of(value) if _runs_along(piece.held, value) else value for key, value in state.items()}
        parts[MASTER] = piece.of(piece.held)
        for key, part in parts.items():
            if any(not torch.isfinite(tensor).all() for tensor in tensors(part)):
                bad.append(f"{piece.name} ({key})")
    return bad
