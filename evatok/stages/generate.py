"""Generate: many clips from the generator, spread over the cluster, and how far they are from real ones.

Leaves ``table/*.parquet`` (a row per clip: number, label, seed, indices, lengths, features, mp4),
``samples.json`` with ``samples/*.mp4`` (the first clips), and with ``frechet`` also ``reference/*.parquet``
(features of real clips) and ``rejected.parquet`` (real clips that could not be decoded).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from evatok import weights
from evatok.artifacts import Location
from evatok.config import OPERATIONAL, Config
from evatok.metrics.frechet import I3D, FeatureStatistics, frechet_distance, precision_recall
from evatok.models.generator import Generator
from evatok.models.sampling import Requests, SamplingConfig, sample
from evatok.models.sequence import NO_CLASS
from evatok.models.tokenizer import VideoTokenizer
from evatok.models.tokens import Tokens
from evatok.stages.fanning import ClipReader, fan_out_models, write_rejected
from evatok.stages.judge import encoded
from evatok.stages.stage import Stage, StageContext
from evatok.stages.tokens import gives_labels, open_clips
from evatok.training.token_table import read_rows
from evatok.video.decode import ClipFormat

if TYPE_CHECKING:
    from evatok.distributed.fanout import FanOutSummary, ShardOutput

DECODED_AT_ONCE = (
    16  # fixed: how clips are batched decides the last digits, so it must not follow the cluster
)

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("label", pa.int64()),  # -1 for none
        ("seed", pa.int64()),
        ("indices", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("features", pa.list_(pa.float32())),  # null without frechet
        ("mp4", pa.binary()),  # of the clips that are shown
    ]
)


class GenerateConfig(Config):
    clips: int = Field(10_000, ge=1, description="clips to generate, classes in turn (gFVD: 10,000)")
    sampling: SamplingConfig = SamplingConfig()
    budget: int | None = Field(None, ge=1, description="the most tokens a clip may have")
    assignment: tuple[int, ...] = Field((), description="tokens of each block, 0 where the model chooses")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the generator, but for its logits, which are fp32 in any case"
    )
    regenerate: bool = Field(
        False, description="frame prediction: sample the given frames again too (paper 4.4); else copy them"
    )
    frechet: bool = Field(False, description="measure gFVD, precision and recall (needs the weights i3d)")
    reference: Literal["train", "test"] = Field(
        "train", description="real clips to compare with; UCF-101: train (LARP), K600: test"
    )
    shown: int = Field(16, ge=0, description="clips that become mp4 files for the report")
    clips_per_task: Annotated[int, OPERATIONAL] = Field(64, gt=0)
    gpu_per_task: Annotated[float, OPERATIONAL] = Field(
        1.0, gt=0, le=1, description="share of a GPU that a task holds, with resources.use_gpu"
    )


@dataclass(frozen=True)
class Producer:
    """What every task needs; travels to the workers once.

    ``condition``: codes int64 ``[n, P]`` of given frames that a frame predictor goes on from, in turn.
    """

    generator: Generator
    tokenizer: VideoTokenizer
    clips: ClipReader
    config: GenerateConfig
    features: I3D | None
    condition: Tensor | None
    seed: int
    device: str

    def __call__(self) -> Producer:
        """In a worker process: move the models to the device."""
        self.generator.to(self.device).eval()
        if self.config.precision == "bf16":
            self.generator.to_bf16()
        self.tokenizer.to(self.device).eval()
        if self.features is not None:
            self.features.to(self.device)
        return self

    def requests(self, numbers: Tensor) -> Requests:
        """What is asked for the clips of these numbers int64 ``[n]``."""
        seeds, config = self.seed + numbers, self.generator.config
        wanted = self.config.assignment
        forced = torch.tensor(wanted).repeat(len(numbers), 1) if wanted else None
        if self.condition is not None:
            condition = self.condition[numbers % len(self.condition)]
            return Requests.predicting(
                config,
                condition,
                seeds,
                self.config.budget,
                assignment=forced,
                regenerate=self.config.regenerate,
            )
        classes = len(config.labels)
        labels = numbers % classes if classes else torch.full_like(numbers, NO_CLASS)
        return Requests(labels, seeds, forced, budget=self.config.budget)


def run(context: StageContext) -> dict[str, Any]:
    """Generate in Ray tasks, measure; returns the headline metrics."""
    config: GenerateConfig = context.config
    producer = assemble(context)
    if producer.condition is not None and len(producer.condition) < config.clips:
        context.log(
            f"{len(producer.condition)} conditions for {config.clips} clips: each is continued several times;"
            " raise tokens.held_out"
        )
    done = _fan_out(context, producer, produce, "table", np.arange(config.clips))
    table = context.location.read_table("table")
    metrics: dict[str, Any] = {
        "clips": len(table),
        "mean_tokens": pc.sum(pc.list_flatten(table["lengths"])).as_py() / len(table),
        "clips_per_second": (done.items - done.kept) / done.seconds,
    }
    if producer.features is not None:
        split = np.asarray(producer.clips.index.column("split").to_pylist())
        real = np.random.default_rng(context.seed).permutation(np.flatnonzero(split == config.reference))
        taken = _fan_out(context, producer, take_features, "reference", real[: config.clips])
        metrics["reference_rejected"] = write_rejected(context, taken)
        metrics |= distances(context.location, producer.features.name)
    _show(context.location, table, producer.generator.config.labels)
    return metrics


def assemble(context: StageContext) -> Producer:
    """The models, and the frames that a frame predictor goes on from."""
    config: GenerateConfig = context.config
    generator = Generator.from_artifact(context.inputs["generator"].location)
    condition = None
    if generator.config.condition:
        rows = read_rows(context.inputs["tokens"].location, "test", ["condition"])
        condition = torch.from_numpy(np.stack(rows["condition"].to_numpy()).astype(np.int64))
    return Producer(
        generator=generator,
        tokenizer=VideoTokenizer.from_artifact(context.inputs["tokenizer"].location),
        clips=ClipReader(open_clips(context)),
        config=config,
        features=I3D(weights.find("i3d")) if config.frechet else None,
        condition=condition,
        seed=context.seed,
        device="cuda" if context.resources.use_gpu else "cpu",
    )


def produce(numbers: NDArray[np.int64], producer: Producer) -> ShardOutput:
    """One task: sample and decode the clips of these numbers."""
    from evatok.distributed.fanout import ShardOutput

    requests = producer.requests(torch.from_numpy(numbers))
    clips = sample(producer.generator, requests, producer.config.sampling).to_sequences()
    rows = []
    for start in range(0, len(numbers), DECODED_AT_ONCE):
        part = clips[start : start + DECODED_AT_ONCE]
        pixels: Sequence[Tensor | None] = [None] * len(part)
        if producer.features is not None or numbers[start] < producer.config.shown:
            pixels = list(producer.tokenizer.decode(Tokens.from_sequences(part)))
        for place, (blocks, clip) in enumerate(zip(part, pixels), start):
            number = int(numbers[place])
            shown = number < producer.config.shown
            rows.append(
                {
                    "number": number,
                    "label": int(requests.labels[place]),
                    "seed": int(requests.seeds[place]),
                    "indices": torch.cat(blocks).tolist(),
                    "lengths": [len(block) for block in blocks],
                    "features": _features(producer, clip),
                    "mp4": encoded(to_bytes(clip)) if clip is not None and shown else None,
                }
            )
    return ShardOutput(pa.Table.from_pylist(rows, SCHEMA))


def take_features(rows: NDArray[np.int64], producer: Producer) -> ShardOutput:
    """One task: features of the real clips at these rows of the index."""
    from evatok.distributed.fanout import ShardOutput

    shape = producer.tokenizer.config
    _, clips, rejected = producer.clips.read(rows, ClipFormat(frames=shape.frames, size=shape.size))
    found = [
        {"features": _features(producer, torch.from_numpy(clip).to(producer.device) / 255)} for clip in clips
    ]
    return ShardOutput(pa.Table.from_pylist(found, pa.schema([SCHEMA.field("features")])), rejected)


def to_bytes(clips: Tensor) -> NDArray[np.uint8]:
    """Float in [0, 1] to uint8, on the CPU."""
    pixels: NDArray[np.uint8] = (clips * 255).round().byte().cpu().numpy()
    return pixels


def distances(location: Location, network: str) -> dict[str, float]:
    """gFVD, precision and recall by the features of both tables; the network is part of their names."""
    generated, real = (
        torch.from_numpy(np.stack(location.read_table(name, ["features"])["features"].to_numpy()))
        for name in ("table", "reference")
    )
    precision, recall = precision_recall(real, generated)
    return {
        f"frechet[{network}]": frechet_distance(FeatureStatistics.of(generated), FeatureStatistics.of(real)),
        f"precision[{network}]": precision,
        f"recall[{network}]": recall,
    }


def _features(producer: Producer, pixels: Tensor | None) -> list[float] | None:
    if producer.features is None or pixels is None:
        return None
    found: list[float] = producer.features(pixels[None])[0].tolist()
    return found


def _fan_out(context: StageContext, producer: Producer, work: Any, target: str, items: Any) -> FanOutSummary:
    """Run ``work`` over the items, in shards."""
    from evatok.distributed.schedule import Shard, shard_ranges

    config: GenerateConfig = context.config
    return fan_out_models(
        context,
        [
            Shard(f"{start:08d}-{stop:08d}.parquet", stop - start, items[start:stop])
            for start, stop in shard_ranges(len(items), config.clips_per_task)
        ],
        work,
        target,
        state=producer,
    )


def _show(location: Location, table: pa.Table, labels: tuple[str, ...]) -> None:
    clips = []
    for row in table.filter(pc.is_valid(table["mp4"])).to_pylist():
        video = f"samples/{row['number']:04d}.mp4"
        location.write_bytes(video, row["mp4"])
        title = labels[row["label"]] if row["label"] != NO_CLASS else f"sample {row['number']}"
        clips.append(
            {"video": video, "title": title, "tokens": sum(row["lengths"]), "assignment": row["lengths"]}
        )
    location.write_json("samples.json", {"clips": clips})


def _check(config: GenerateConfig, experiment: Any) -> Iterator[tuple[str, str]]:
    tokenizer, tokens = experiment.tokenizer.model, experiment.tokens
    if config.assignment and len(config.assignment) != tokenizer.blocks:
        yield "generate.assignment", f"{len(config.assignment)} blocks; the tokenizer has {tokenizer.blocks}"
    if unknown := set(config.assignment) - {0, *tokenizer.choices}:
        yield (
            "generate.assignment",
            f"{sorted(unknown)} are not among the token choices {list(tokenizer.choices)} or 0",
        )
    if any(count not in (0, given) for count, given in zip(config.assignment, tokens.condition)):
        yield (
            "generate.assignment",
            f"must begin with tokens.condition, {list(tokens.condition)}, or leave those blocks 0",
        )
    forced = {**dict(enumerate(config.assignment)), **dict(enumerate(tokens.condition))}
    least = sum(forced.get(block) or tokenizer.choices[0] for block in range(tokenizer.blocks))
    if config.budget is not None and config.budget < least:
        yield (
            "generate.budget",
            f"{config.budget} tokens; a clip needs {least} at least, under generate.assignment and"
            " tokens.condition",
        )
    classes = tokens.labels and gives_labels(experiment)
    if config.sampling.guidance != 1 and not (classes and experiment.generator.network.class_dropout):
        yield (
            "generate.sampling.guidance",
            f"{config.sampling.guidance} needs classes (of index.source, with tokens.labels) and"
            " generator.network.class_dropout above 0; leave it at 1 otherwise",
        )


STAGE = Stage(
    name="generate",
    config=GenerateConfig,
    run=run,
    inputs=("index", "tokenizer", "tokens", "generator"),
    outputs=("table/", "samples.json"),
    check=_check,
    weights=lambda config: ["i3d"] if config.frechet else [],
)
