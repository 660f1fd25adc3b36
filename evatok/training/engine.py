"""A DeepSpeed engine and all of its state as whole tensors, the same at every ZeRO stage and world size."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from evatok.errors import UserError
from evatok.training.optimizers import MOMENTS, MUON_MOMENT, MuonWithAdamW, adamw, empty_state


@dataclass(frozen=True)
class World:
    """This process among the training processes."""

    rank: int
    size: int
    device: torch.device


def join_world(use_gpu: bool | None = None) -> World:
    """The process group this process trains in, and its device; ``use_gpu`` None: a GPU where there is one.

    Takes the one that is there (Ray Train), else the one torchrun's environment describes, else a
    group of one, which needs no port. Raises UserError where a GPU is asked for and there is none.
    """
    cuda = torch.cuda.is_available() if use_gpu is None else use_gpu
    if cuda and not torch.cuda.is_available():
        raise UserError("resources.use_gpu: torch finds no GPU here; set it false to train on CPUs")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(
                backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
            )
    return World(dist.get_rank(), dist.get_world_size(), device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device's own units compute in bfloat16; a GPU before Ampere only emulates it, slowly."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class EngineOptions:
    """How an engine steps. ``clip``: largest gradient norm, 0 for none; ``ema``: decay, 0 for no average;
    ``muon``: instead of AdamW, at ZeRO stage 0 alone, where every rank has whole matrices."""

    zero_stage: int
    micro_batch: int
    accumulation: int
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    ema: float
    bf16: bool
    muon: bool = False


class Engine:
    """One module with its optimizer and its moving average.

    ``forward`` is what a task calls. At stage 0 it is the bare module: DeepSpeed's forward would hang its
    backward hooks on outputs that belong to another engine's loss (a discriminator's logits).
    """

    def __init__(
        self, module: nn.Module, options: EngineOptions, world: World, saved: Mapping[str, Tensor] | None
    ):
        deepspeed = _start_deepspeed(world)
        self._options, self._world = options, world
        if saved is not None:
            _load_module(module, saved)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # The rate is set before every step; DeepSpeed gets a client optimizer so that it compiles none.
        kind = MuonWithAdamW if options.muon else adamw
        optimizer = kind(trained, options.betas, options.weight_decay)
        self._names = {p: name for name, p in trained.items()}
        self._moments = (*MOMENTS, MUON_MOMENT) if options.muon else MOMENTS
        if not options.zero_stage:
            optimizer.register_step_pre_hook(self._clip_or_drop)
        self._engine, *_ = deepspeed.initialize(
            model=module.to(world.device), optimizer=optimizer, config=_deepspeed_config(options, world)
        )
        self.module = module
        self.forward: Callable[..., Any] = self._engine if options.zero_stage else module
        self._average: dict[nn.Parameter, Tensor] = {}
        if options.ema:
            self._average = {p: self._local(p).clone() for p in self._names}
        self.updates = 0
        self._load_optimizer(saved or {})

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` (mean over a micro-batch) over the accumulation steps."""
        self._engine.backward(loss)

    def step(self, rate: float) -> bool:
        """Average gradients over the ranks, clip, update the parameters and their moving average.

        False, on every rank alike, when the gradient was not finite: then nothing was changed.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not self._engine.was_step_applied():
            return False
        self.updates += 1
        if self._average:
            # As TensorFlow's moving average does, so that short runs do not stay at the initial weights.
            decay = min(self._options.ema, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(
                list(self._average.values()), [self._local(p) for p in self._average], 1 - decay
            )
        return True

    def finite(self) -> Tensor:
        """Whether this rank's parameters, averages and buffers are: a bool scalar on the device."""
        values = [self._local(p) for p in self._names] + list(self._average.values())
        values += [buffer for _, buffer in self._buffers() if buffer.is_floating_point()]
        return torch.stack([value.isfinite().all() for value in values]).all()

    def _clip_or_drop(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0, after the ranks' gradients were averaged: what DeepSpeed does itself at stages 1 to 3."""
        parameters = [p for p in self._names if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.overflow = not bool(norm.isfinite())  # type: ignore[attr-defined]  # DeepSpeed reads it
        if optimizer.overflow:  # type: ignore[attr-defined]
            for parameter in parameters:
                parameter.grad = None
        elif self._options.clip:
            nn.utils.clip_grads_with_norm_(parameters, self._options.clip, norm)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in self._average.items():
            local = self._local(parameter)
            held = local.clone()
            local.copy_(average)
            average.copy_(held)

    def state(self) -> dict[str, Tensor]:
        """All ranks call it; rank 0 gets whole CPU tensors, the others an empty dict.

        Keys: ``parameter.NAME``, ``average.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``
        (Adam's count of updates), ``momentum_buffer.NAME`` (Muon's), ``buffer.NAME``, ``updates``.
        """
        found: dict[str, Tensor] = {"updates": torch.tensor(self.updates)}
        for parameter, name in self._names.items():
            found[f"parameter.{name}"] = self._whole(parameter, self._local(parameter))
            if parameter in self._average:
                found[f"average.{name}"] = self._whole(parameter, self._average[parameter])
            for moment in self._moments:
                value = self._moment(parameter, moment)
                if value is not None:
                    found[f"{moment}.{name}"] = value
            count = self._state(parameter).get("step")
            if count is not None:
                found[f"step.{name}"] = torch.as_tensor(count, dtype=torch.float32)
        for name, buffer in self._buffers():
            found[f"buffer.{name}"] = buffer
        return self._on_rank_zero(found)

    def weights(self) -> dict[str, Tensor]:
        """A state dict of the module, averaged weights where an average is kept. Called as ``state`` is."""
        found = dict(self._buffers())
        for name, parameter in self.module.named_parameters():
            found[name] = self._whole(parameter, self._average.get(parameter, self._local(parameter)))
        return self._on_rank_zero(found)

    def _on_rank_zero(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._world.rank != 0:
            return {}
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        kept = self.module.state_dict(keep_vars=True)
        return ((name, b) for name, b in self.module.named_buffers() if name in kept)

    def _load_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        self._create_moments(saved)
        if not saved:
            return
        self.updates = int(saved["updates"])
        for parameter, name in self._names.items():
            if parameter in self._average:
                self._average[parameter].copy_(self._part(parameter, saved[f"average.{name}"]))
        for parameter, name in self._names.items():
            for moment in self._moments:
                if f"{moment}.{name}" in saved:
                    self._set_moment(parameter, moment, saved[f"{moment}.{name}"])

    # What follows knows where DeepSpeed keeps things. Stage 0: everything whole on the parameter. Stages 1
    # and 2: whole parameters, moments in flat partitions. Stage 3: parameters in
    # flat shards, one per rank.

    def _local(self, parameter: nn.Parameter) -> Tensor:
        shard: Tensor = parameter.ds_tensor if self._options.zero_stage == 3 else parameter.data  # type: ignore[attr-defined]
        return shard

    def _whole(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        if self._options.zero_stage != 3:
            return local
        flat = local.new_empty(local.numel() * self._world.size)
        dist.all_gather_into_tensor(flat, local.contiguous())
        whole: Tensor = flat[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        return whole

    def _part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        if self._options.zero_stage != 3:
            return whole
        size = self._local(parameter).numel()
        padded = nn.functional.pad(whole.flatten(), (0, size * self._world.size - whole.numel()))
        return padded[size * self._world.rank :][:size]

    def _state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state that holds the parameter (at stage 1 to 3: a flat partition's)."""
        optimizer = self._engine.optimizer
        if self._options.zero_stage == 0:
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            return state
        return next((s for s in optimizer.optimizer.state.values() if s), {})

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        if self._options.zero_stage == 0:
            return self._state(parameter).get(moment)
        if self._options.zero_stage == 3:
            return self._whole(parameter, safe_get_local_optimizer_state(parameter, moment))
        whole: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return whole

    def _create_moments(self, saved: Mapping[str, Tensor]) -> None:
        optimizer = self._engine.optimizer
        counts = {name: saved.get(f"step.{name}", torch.tensor(0.0)) for name in self._names.values()}
        if self._options.zero_stage == 0:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    count = counts[self._names[parameter]]
                    optimizer.state[parameter] = empty_state(group, parameter, count)
            return
        if self._options.zero_stage == 3:
            flats = optimizer.fp32_partitioned_groups_flat
        else:
            flats = optimizer.single_partition_of_fp32_groups
        for flat in flats:
            group = optimizer.optimizer.param_groups[0]
            optimizer.optimizer.state[flat] = empty_state(group, flat, max(counts.values()))
        if self._options.zero_stage < 3:
            # DeepSpeed links them after the first group's first update, too early for a second group.
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: nn.Parameter, moment: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._options.zero_stage == 0:
            self._state(parameter)[moment].copy_(whole)
        elif self._options.zero_stage == 3:
            # The local form: the full one cannot cut tensors that the world size does not divide.
            safe_set_local_optimizer_state(parameter, self._part(parameter, whole), moment)
        else:
            safe_set_full_optimizer_state(parameter, whole, moment)


def _start_deepspeed(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # said every step
    import deepspeed

    # A collective for inference, which DeepSpeed would compile on every CPU worker: more than a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _load_module(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    kinds = ("parameter.", "buffer.")
    values = {key.split(".", 1)[1]: value for key, value in saved.items() if key.startswith(kinds)}
    missing, unexpected = module.load_state_dict(values, strict=False)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    if unexpected or set(missing) - frozen:
        raise RuntimeError(f"the checkpoint does not fit the module: {missing=} {unexpected=}")


def _deepspeed_config(options: EngineOptions, world: World) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "managed_gradient_accumulation": False,  # the loop says when a step ends
        "gradient_clipping": options.clip if options.zero_stage else 0.0,  # at stage 0 we clip
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": options.zero_stage,
            "overlap_comm": options.zero_stage == 2 and world.device.type == "cuda",
            "stage3_param_persistence_threshold": 0,  # every parameter is a shard, none is kept whole
        },
        # Weights, moments and communication stay fp32; the loop's autocast decides what computes in bf16.
        "torch_autocast": {
            "enabled": options.bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
