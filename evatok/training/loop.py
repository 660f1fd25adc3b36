"""The training loop: steps a task's engines over batches and can stop and go on at any step."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from evatok.config import OPERATIONAL, Config, problems
from evatok.errors import UserError
from evatok.training.checkpoint import Checkpoints, TrainState
from evatok.training.curves import Curves, Sink, mean_over_ranks
from evatok.training.engine import Engine, EngineOptions, World, has_bf16, join_world
from evatok.training.schedules import Shape, learning_rate
from evatok.training.tasks import Batch, Task
from evatok.training.tracking import Tracker

log = logging.getLogger(__name__)


class TrainConfig(Config):
    """How a model is trained; what it is trained on is the stage's business."""

    steps: int = Field(ge=1, description="optimizer steps")
    global_batch: int = Field(
        default=128, ge=1, description="clips per step over all workers (EVATok Sec. H: 128)"
    )
    micro_batch: Annotated[int | None, OPERATIONAL] = Field(
        default=None,
        ge=1,
        description="clips per forward pass of one worker; default: its whole share of a step. A "
        "quantizer's terms are means over the tokens of these clips, the entropy term's mean assignment too; "
        "the batch norm in the heads of a VideoMAE adversary is over groups of at most 8 of them",
    )
    lr: float = Field(default=1e-4, gt=0, description="peak learning rate (EVATok Sec. H)")
    final_lr: float = Field(default=1e-6, ge=0, description="learning rate of the last step (EVATok Sec. H)")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up; EVATok states none")
    schedule: Shape = Field(
        default="cosine", description="cosine, or wsd: constant, then 1 - sqrt to final_lr"
    )
    decay: float = Field(
        default=0.2, gt=0, le=1, description="share of the steps that wsd decays (EVATok Sec. H)"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: on the matrices of the model's layers, AdamW on the rest (EVATok states neither);"
        " small models learn in about half the steps",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW (GigaTok; EVATok states none)")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="on matrices only (GigaTok; EVATok states none)"
    )
    clip: float = Field(default=10.0, ge=0, description="largest gradient norm, 0 for none (GigaTok)")
    ema: float = Field(
        default=0.9999, ge=0, lt=1, description="decay of averaged weights, 0 for none (GigaTok)"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the computation; auto is bf16 on GPUs that have it, else fp32"
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3], OPERATIONAL] = Field(
        default=0, description="DeepSpeed ZeRO stage of the model; a discriminator always has stage 0"
    )
    compile: Annotated[bool, OPERATIONAL] = Field(default=False, description="torch.compile the modules")
    recompute: Annotated[bool, OPERATIONAL] = Field(
        default=False, description="keep each layer's input only and run the layer again in backward"
    )
    max_skipped: int = Field(
        default=10, ge=1, description="non-finite losses or gradients in a row that end the run"
    )
    log_every: Annotated[int, OPERATIONAL] = Field(
        default=50, ge=1, description="steps that a curve's point averages"
    )
    eval_every: Annotated[int, OPERATIONAL] = Field(
        default=0, ge=0, description="steps between evaluations, 0: none"
    )
    trackers: Annotated[tuple[Tracker, ...], OPERATIONAL] = Field(
        default=(), description="tensorboard, wandb (offline unless WANDB_MODE says otherwise)"
    )
    checkpoint_every: Annotated[int, OPERATIONAL] = Field(default=1000, ge=1, description="steps")
    keep_checkpoints: Annotated[int, OPERATIONAL] = Field(
        default=2, ge=1, description="checkpoints kept: the newest, or under workers the best by keep_by"
    )
    keep_by: Annotated[str, OPERATIONAL] = Field(
        default="",
        pattern=r"^(|(min|max) \w+)$",
        description="'max eval_psnr', 'min loss', ...: which are the best; the newest always stays",
    )

    def problems(self, workers: int) -> Iterator[tuple[str, str]]:
        """(key, what is wrong and what is allowed) for everything one field's type cannot say."""
        if self.global_batch % workers:
            yield "global_batch", f"{self.global_batch} clips cannot be split evenly over {workers} workers"
        elif self.global_batch % (workers * self.micro(workers)):
            share = self.global_batch // workers
            yield (
                "micro_batch",
                f"{self.micro_batch} does not divide a worker's share of the batch, which is {share} "
                f"(global_batch {self.global_batch} / {workers} workers)",
            )
        if self.optimizer == "muon" and self.zero_stage:
            yield (
                "optimizer",
                f"muon works on whole matrices, which ZeRO stage {self.zero_stage} cuts up; set zero_stage 0,"
                " or optimizer adamw",
            )
        if self.warmup >= self.steps:
            yield "warmup", f"{self.warmup} must be less than steps, which is {self.steps}"
        if self.final_lr > self.lr:
            yield "final_lr", f"{self.final_lr} must not exceed lr, which is {self.lr}"

    def check(self, workers: int, where: str = "train") -> None:
        """Raises UserError that lists every problem; starts nothing."""
        found = [(f"{where}.{key}", problem) for key, problem in self.problems(workers)]
        if found:
            raise problems(found, "the training config")

    def micro(self, workers: int) -> int:
        """Clips per forward pass of one worker."""
        return self.micro_batch or max(1, self.global_batch // workers)

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, 0 being the first."""
        return learning_rate(
            step,
            steps=self.steps,
            peak=self.lr,
            final=self.final_lr,
            warmup=self.warmup,
            shape=self.schedule,
            decay=self.decay,
        )


@dataclass(frozen=True)
class Trained:
    """``metrics``: of the last point of the curves; ``weights``: state dict of the model, on rank 0 only."""

    metrics: Mapping[str, float]
    weights: Mapping[str, Tensor]


def train(
    task: Task,
    config: TrainConfig,
    batches: Callable[[int], Iterable[Batch]],
    *,
    seed: int,
    checkpoints: Checkpoints,
    sinks: Sequence[Sink] = (),
    evaluation: Sequence[Batch] = (),
    use_gpu: bool | None = None,
) -> Trained:
    """Train to ``config.steps``, from the newest checkpoint on. Every rank calls it.

    ``batches(start)``: this rank's micro-batches in order, from global sample position ``start`` on.
    ``evaluation``: this rank's held-out batches, equally many on every rank.
    ``use_gpu``: as ``join_world`` takes it.
    Raises UserError, on every rank, when one cannot build the task, and when losses or gradients stay
    non-finite, or weights become so; the newest checkpoint is then one from before.
    """
    world = join_world(use_gpu)
    config.check(world.size)
    saved = checkpoints.latest()
    run = _Run(task, config, world, seed, saved)
    log.info("training on %s from step %d to %d", world.device, run.step, config.steps)
    curves = Curves(world, sinks, run.step, run.samples, config.steps, saved.metrics if saved else {})
    source = iter(batches(run.samples))
    while run.step < config.steps:
        run.take_step(source, curves)
        last = run.step == config.steps
        save = last or run.step % config.checkpoint_every == 0
        if save or run.step % config.log_every == 0:
            curves.point(run.step, run.samples)
        if evaluation and (last or (config.eval_every and run.step % config.eval_every == 0)):
            curves.evaluated(run.step, run.samples, run.evaluate(evaluation))
        if save and not run.in_a_row["model"]:
            run.check_weights()
            curves.flush()
            log.info("checkpoint at step %d, %d losses or updates skipped so far", run.step, run.skipped)
            checkpoints.save(
                run.state(curves.latest), {**curves.latest, "step": run.step, "samples": run.samples}
            )
    curves.flush()
    run.check_weights()
    return Trained(curves.latest, run.engines["model"].weights())


class _Run:
    """What a step changes, and the step."""

    def __init__(self, task: Task, config: TrainConfig, world: World, seed: int, saved: TrainState | None):
        self.task, self.config, self.world, self.seed = task, config, world, seed
        self.step = saved.step if saved else 0
        self.samples = saved.samples if saved else 0
        self.skipped = saved.skipped if saved else 0
        # Per engine, losses and updates skipped since its last update.
        self.in_a_row: Counter[str] = Counter()
        self.accumulation = config.global_batch // (config.micro(world.size) * world.size)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16(world.device))
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)
        torch.manual_seed(seed)
        self.engines = {
            name: Engine(module, self._options(name, bf16), world, saved.engines[name] if saved else None)
            for name, module in _agreed(world, lambda: self._prepared(task.build(world.device))).items()
        }
        self.modules = {name: engine.forward for name, engine in self.engines.items()}
        parts = [part for engine in self.engines.values() for part in engine.module.modules()]
        self.learners: list[Any] = [part for part in parts if hasattr(part, "end_step")]

    def _prepared(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        for name, module in modules.items():
            layers = [part for part in module.modules() if hasattr(part, "recompute")]
            if self.config.recompute and name == "model" and not layers:
                raise UserError(
                    "train.recompute: this model has no layers that it can run again; set it false"
                )
            for part in layers:
                part.recompute = self.config.recompute  # type: ignore[assignment]
            if self.config.compile:
                module.compile(dynamic=True)
        return modules

    def _options(self, name: str, bf16: bool) -> EngineOptions:
        main = name == "model"
        return EngineOptions(
            zero_stage=self.config.zero_stage if main else 0,
            micro_batch=self.config.micro(self.world.size),
            accumulation=self.accumulation,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            clip=self.config.clip,
            ema=self.config.ema if main else 0.0,
            bf16=bf16,
            muon=main and self.config.optimizer == "muon",
        )

    def take_step(self, source: Iterator[Batch], curves: Curves) -> None:
        """One optimizer step of every engine that got a loss, over ``global_batch`` clips."""
        stepping: set[str] = set()
        lost: Counter[str] = Counter()
        for index in range(self.accumulation):
            with curves.timed("data"):
                batch = self._receive(source)
            self._seed_random(index)
            losses = self.task.losses(self.modules, batch, self.step)
            finite = True
            while finite:
                with curves.timed("forward"):
                    with self.autocast:
                        found = next(losses, None)
                    if found is None:
                        break
                    name, loss, metrics = found
                    finite = self._everywhere(loss.detach().isfinite())
                if finite:
                    with curves.timed("backward"):
                        self.engines[name].backward(loss)
                    stepping.add(name)
                    curves.add(metrics)
                else:
                    lost[name] += 1
        for learner in self.learners:
            learner.end_step()
        rate = self.config.rate(self.step)
        with curves.timed("optimizer"):
            stepped = {
                name: self.engines[name].step(rate * self.task.rate_scale(name)) for name in sorted(stepping)
            }
        self._count(lost, stepped)
        self.step += 1
        self.samples += self.config.global_batch
        curves.add({"lr": rate, "skipped": float(self.skipped)})

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The task's metrics with the averaged weights, mean over the samples of all ranks."""
        sums: dict[str, Tensor | float] = defaultdict(float)
        samples = 0
        engine = self.engines["model"]
        engine.module.eval()
        with engine.averaged():
            for index, batch in enumerate(batches):
                self._seed_random(index)
                with self.autocast:
                    metrics = self.task.evaluate(self.modules, _to(batch, self.world.device))
                size = len(next(iter(batch.values())))
                samples += size
                for name, value in metrics.items():
                    sums[name] = sums[name] + value * size
        engine.module.train()
        means = mean_over_ranks({name: value / samples for name, value in sums.items()}, self.world)
        found = self.task.summary(means)
        if missing := set(self.task.evaluated) - set(found):
            raise RuntimeError(f"the task says that it evaluates {sorted(missing)}, and did not")
        return found

    def state(self, metrics: Mapping[str, float]) -> TrainState | None:
        """Whole state on rank 0, None on the others; every rank calls it."""
        engines = {name: engine.state() for name, engine in self.engines.items()}
        if self.world.rank != 0:
            return None
        return TrainState(self.step, self.samples, self.skipped, engines, metrics)

    def _receive(self, source: Iterator[Batch]) -> Batch:
        batch = next(source)
        if (position := batch.get("position")) is not None:
            first, last = int(position.min()), int(position.max())
            if first < self.samples or last >= self.samples + self.config.global_batch:
                raise RuntimeError(
                    f"the stream is out of order: step {self.step} takes clips from position {self.samples} "
                    f"on and was given {first} to {last}"
                )
        return _to(batch, self.world.device)

    def _seed_random(self, index: int) -> None:
        # Whatever a module draws (dropout) depends on where in the run it is and on nothing before it, so
        # no generator's state has to be kept.
        place = [self.seed, self.step, index, self.world.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _everywhere(self, finite: Tensor) -> bool:
        """Whether a bool scalar is true on every rank."""
        flag = finite.float()
        if self.world.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    def _count(self, lost: Counter[str], stepped: Mapping[str, bool]) -> None:
        """``lost``: non-finite losses per engine; ``stepped``: whether its gradient was finite."""
        lost.update(name for name, finite in stepped.items() if not finite)
        self.skipped += lost.total()
        for name in self.engines:
            self.in_a_row[name] = 0 if stepped.get(name) else self.in_a_row[name] + lost[name]
            if self.in_a_row[name] >= self.config.max_skipped:
                raise self._diverged(
                    f"{self.in_a_row[name]} losses or gradients in a row were not finite, the last at step "
                    f"{self.step}"
                )

    def check_weights(self) -> None:
        """Every rank calls it and raises UserError alike when a weight is not finite."""
        finite = torch.stack([engine.finite() for engine in self.engines.values()]).all()
        if not self._everywhere(finite):
            raise self._diverged(f"the weights are not finite after step {self.step}")

    def _diverged(self, how: str) -> UserError:
        return UserError(
            f"training diverged: {how}. The newest checkpoint is from before and is kept. Lower train.lr or "
            "train.clip, lengthen train.warmup, or set train.precision to fp32."
        )


def _agreed(world: World, build: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
    """What ``build`` gives, once it went well on every rank; the first rank's UserError is raised on all.

    A rank that went on alone would wait for the others in its first collective.
    """
    built: dict[str, nn.Module] = {}
    problem: str | None = None
    try:
        built = build()
    except UserError as error:
        problem = str(error)
    problems = [problem] * world.size
    if world.size > 1:
        dist.all_gather_object(problems, problem)
    for rank, problem in enumerate(problems):
        if problem is not None:
            where = f" (on worker {rank} of {world.size})" if world.size > 1 else ""
            raise UserError(problem + where)
    return built


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
