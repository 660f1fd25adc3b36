"""A fabricated run folder: artifacts of the right form with plausible numbers, no training."""

import io
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from evatok.artifacts import CurveWriter, Location, Manifest, publish

CHOICES = [8, 16, 32, 64, 128]
CLIPS = 40
BEGIN = datetime(2026, 11, 25, 1, 0, tzinfo=timezone.utc)


def _quality(motion: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """DSSIM [clips] that falls with tokens, more slowly where a block moves more."""
    carried = np.cumsum(np.log2(assignment) * np.array([1.0, 0.5, 0.3, 0.2]), axis=1)
    return (0.30 + 0.08 * motion - 0.021 * carried * (0.4 + motion)).mean(1)


def _policies(motion: np.ndarray) -> dict[str, list[tuple[str, np.ndarray]]]:
    draws = np.random.default_rng(3)
    choices = np.asarray(CHOICES)
    clips = len(motion)
    fixed = lambda row: np.tile(row, (clips, 1))  # noqa: E731
    moving = lambda shift, noise: choices[  # noqa: E731
        np.clip(np.round(motion * 3 + np.array([2, 0, -0.5, -0.8]) + shift + noise), 0, 4).astype(int)
    ]
    found = {
        "uniform": [(str(k), fixed([k] * 4)) for k in CHOICES],
        "static": [
            (f"w_q {w}", fixed(r))
            for w, r in [(0.8, [16, 8, 8, 8]), (1.2, [64, 16, 8, 8]), (1.6, [128, 64, 32, 16])]
        ],
        "random": [("", draws.choice(choices, (clips, 4)))],
    }
    for name, spread in [
        ("oracle", 0.0),
        ("router", 0.35),
        ("threshold", 0.7),
        ("ilp", 0.9),
        ("information", 1.1),
        ("difference", 1.6),
        ("recurrent", 0.8),
        ("budgeted", 0.4),
    ]:
        noise = draws.normal(0, spread, (clips, 4))
        found[name] = [(f"w_q {w}", moving(s, noise)) for w, s in [(0.8, -1.5), (1.2, -0.6), (1.6, 0.6)]]
    return found


def video(pixels: np.ndarray) -> bytes:
    """H.264 mp4 of uint8 [F, H, W, 3]."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _moving_square(size: int, blur: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    frames = []
    for t in range(16):
        centre = 0.2 + 0.04 * t
        disc = 1 / (1 + np.exp((np.hypot(x - centre, y - 0.5) - 0.18) / (0.01 + blur)))
        frames.append(np.stack([0.2 + 0.7 * disc, 0.3 + 0.3 * y, 0.75 - 0.5 * disc * x], -1))
    return (np.stack(frames) * 255).astype(np.uint8)


def fabricate(run: Location, stages: int = 6) -> Location:
    """A run whose first ``stages`` of six stages are done."""
    draws = np.random.default_rng(0)
    motion = draws.beta(1, 2, (CLIPS, 4))
    names = ["index", "proxy", "curate", "router", "tokenizer", "evaluate"][:stages]
    makers = {
        "index": _index,
        "proxy": _curves,
        "curate": _statistics,
        "router": _curves,
        "tokenizer": _curves,
        "evaluate": lambda stage: _evaluate(stage, motion),
    }
    run.write_bytes("experiment.yaml", b"name: fabricated\nseed: 0\nproxy:\n  steps: 400\n  batch: 8\n")
    at = BEGIN
    for name, seconds in zip(names, [4, 160, 45, 70, 180, 60]):
        makers[name](run / name)
        end = at + timedelta(seconds=seconds)
        publish(
            run / name,
            Manifest(
                stage=name,
                state="done",
                config={},
                fingerprint="0" * 16,
                inputs={},
                seed=0,
                started=at,
                finished=end,
                versions={"python": "3.11.2", "torch": "2.14.1", "ray": "2.60.0"},
                metrics={"loss": 0.123, "eval_top1": 0.117},
            ),
        )
        at = end
    return run


def _index(stage: Location) -> None:
    rows = [
        {
            "clip_id": f"c{i}",
            "uri": f"v{i // 2}.mp4",
            "split": "test" if i % 5 == 0 else "train",
            "frames": 16,
            "width": 64,
            "height": 64,
            "fps": 8.0,
        }
        for i in range(200)
    ]
    stage.write_table("clips.parquet", pa.Table.from_pylist(rows))
    codes = ["unreadable"] * 3 + ["no-video-stream"]
    stage.write_table("rejected.parquet", pa.table({"uri": list("abcd"), "code": codes, "detail": [""] * 4}))


def _curves(stage: Location) -> None:
    draws = np.random.default_rng(1)
    writer = CurveWriter(stage)
    for step in range(1, 401):
        decay = math.exp(-step / 90)
        row = {"step": step, "samples": 8 * step, "time": 0.4 * step}
        writer.write(
            {
                **row,
                "split": "train",
                "loss": 0.2 + 2 * decay + draws.normal(0, 0.02),
                "l1": 0.05 + 0.2 * decay + draws.normal(0, 0.004),
                "vq": 0.02 + 0.5 * decay,
                "time_data": 0.1,
                "time_forward": 0.4,
                "time_backward": 0.45,
                "learning_rate": 1e-4 * (1 + math.cos(step / 400 * math.pi)) / 2,
            }
        )
        if step % 50 == 0:
            writer.write({**row, "split": "eval", "loss": 0.21 + 2 * decay, "dssim": 0.2 + 0.1 * decay})
    writer.flush()


def _statistics(stage: Location) -> None:
    stage.write_json(
        "statistics.json",
        {
            "dssim": {"mean": 0.234, "std": 0.055},
            "length": {"mean": 198.4, "std": 87.3},
            "metric": "dssim",
            "w_q": 1.2,
            "w_l": 0.8,
            "choices": CHOICES,
            "blocks": 4,
        },
    )


def _evaluate(stage: Location, motion: np.ndarray) -> None:
    policies, rows = {}, []
    for name, points in _policies(motion).items():
        headline = len(points) // 2
        entry = []
        for i, (label, assignment) in enumerate(points):
            dssim, tokens = _quality(motion, assignment), assignment.sum(1)
            reward = -1.2 * (dssim - 0.234) / 0.055 - 0.8 * (tokens - 198.4) / 87.3
            entry.append(
                {
                    "label": label,
                    "knob": float(i),
                    "headline": i == headline,
                    "mean_tokens": float(tokens.mean()),
                    "dssim": float(dssim.mean()),
                    "psnr": float((-10 * np.log10(dssim / 8)).mean()),
                    "reward": float(reward.mean()),
                    "reward_percentile": 90 + 5 * float(reward.mean()),
                    "intervals": {"dssim": [float(dssim.mean()) - 0.01, float(dssim.mean()) + 0.01]},
                    "final": {"dssim": float(dssim.mean()) - 0.01, "psnr": 22.0},
                }
            )
            rows += [
                {
                    "clip_id": f"c{5 * c}",
                    "policy": name,
                    "headline": i == headline,
                    "tokens": int(tokens[c]),
                    "assignment": assignment[c].tolist(),
                    "reward": float(reward[c]),
                    "dssim": float(dssim[c]),
                }
                for c in range(CLIPS)
            ]
        policies[name] = {"knob": "w_q", "deployable": name != "oracle", "points": entry}
    stage.write_json(
        "policies.json",
        {
            "metric": "dssim",
            "metrics": ["dssim", "psnr"],
            "choices": CHOICES,
            "blocks": 4,
            "clips": CLIPS,
            "policies": policies,
        },
    )
    stage.write_table("clips.parquet", pa.Table.from_pylist(rows))
    stage.write_json("summary.json", _summary(policies))
    _samples(stage, motion)


def _summary(policies: dict) -> dict:
    uniform = policies["uniform"]["points"]
    best = max(uniform, key=lambda p: p["reward"])
    entries = {}
    for name, policy in policies.items():
        point = next(p for p in policy["points"] if p["headline"])
        entry = {k: point[k] for k in ("reward_percentile", "mean_tokens", "dssim", "psnr")}
        value = 10.0 * len(name) - 50
        entry["token_saving_vs_uniform"] = {"value": value, "low": value - 6, "high": value + 5}
        entry["token_saving_vs_static"] = {"value": value - 20, "low": value - 28, "high": value - 12}
        entry["token_saving_at_setting_vs_static"] = {"value": 4.0, "low": -3.0, "high": 11.0}
        percentile = entry["reward_percentile"]
        entry["reward_percentile_interval"] = {
            "value": percentile,
            "low": percentile - 1,
            "high": percentile + 1,
        }
        entries[name] = entry
    return {
        "metric": "dssim",
        "clips": CLIPS,
        "policies": entries,
        "headline": {
            "best_uniform": {
                "label": best["label"],
                "tokens": best["mean_tokens"],
                "reward": best["reward"],
                "reward_percentile": best["reward_percentile"],
            },
            "quality_by_tokens": [{"tokens": p["mean_tokens"], "dssim": p["dssim"]} for p in uniform],
            "rises_with_tokens": True,
            "oracle_reward": 1.9,
            "oracle_beats_uniforms": True,
            "single_point": {
                "reference": "32",
                "tokens_percent": -29.6,
                "quality": 0.12,
                "reference_quality": 0.119,
            },
        },
    }


def _samples(stage: Location, motion: np.ndarray) -> None:
    clips = []
    for c in range(3):
        columns = []
        stage.write_bytes(f"samples/{c}-original.mp4", video(_moving_square(64, 0)))
        for name in ("uniform", "static", "router", "oracle"):
            label, assignment = _policies(motion)[name][1]
            recon = _moving_square(64, 0.3 / math.sqrt(assignment[c].sum()))
            error = (np.abs(recon.astype(int) - _moving_square(64, 0)) * 4).clip(0, 255).astype(np.uint8)
            stage.write_bytes(f"samples/{c}-{name}.mp4", video(np.concatenate([recon, error], axis=1)))
            columns.append(
                {
                    "policy": name,
                    "label": label,
                    "assignment": assignment[c].tolist(),
                    "tokens": int(assignment[c].sum()),
                    "quality": 0.12,
                    "video": f"samples/{c}-{name}.mp4",
                }
            )
        clips.append(
            {
                "clip_id": f"c{5 * c}",
                "motion": motion[c].tolist(),
                "original": f"samples/{c}-original.mp4",
                "policies": columns,
            }
        )
    stage.write_json("samples.json", {"metric": "dssim", "width": 64, "height": 64, "clips": clips})


def add_generated(run: Location) -> None:
    """Samples as the generate stage leaves them."""
    clips = []
    for c, title in enumerate(("Archery", "Bowling")):
        (run / "generate").write_bytes(f"samples/{c}.mp4", video(_moving_square(64, 0.01)))
        clips.append(
            {"video": f"samples/{c}.mp4", "title": title, "tokens": 104, "assignment": [64, 16, 16, 8]}
        )
    (run / "generate").write_json("samples.json", {"clips": clips})


@pytest.fixture
def fabricated_run(tmp_path: Path) -> Location:
    return fabricate(Location.parse(tmp_path / "fabricated"))


@pytest.fixture(name="add_generated")
def _add_generated():
    """``add_generated(run)``."""
    return add_generated


@pytest.fixture(name="fabricate")
def _fabricate():
    """``fabricate(run, stages)``."""
    return fabricate
