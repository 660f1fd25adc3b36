"""Run under torchrun by the tests: trains the toy at every ZeRO stage, cuts it off, and goes on."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from evatok.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from toy import ToyTask, toy_run


def main(folder: Path, alone: Path) -> None:
    try:
        toy_run(folder / "broken", ToyTask(broken="no weights here"))
    except UserError as error:
        (folder / f"broken{dist.get_rank()}").write_text(str(error))
    for stage in range(4):
        kept = folder / f"stage{stage}"
        rows, _ = toy_run(kept, zero_stage=stage)
        cut_off(kept / "step-000000012")
        resumed, trained = toy_run(kept, zero_stage=stage)
        # A checkpoint that one process wrote at stage 0.
        other = folder / f"from-alone{stage}"
        if first():
            shutil.copytree(alone / "step-000000006", other / "step-000000006")
        dist.barrier()
        continued, _ = toy_run(other, zero_stage=stage)
        gan, _ = toy_run(folder / f"gan{stage}", ToyTask(adversarial=True), zero_stage=stage)
        steep, spared = toy_run(folder / f"steep{stage}", ToyTask(steep=(3, 7, 11)), zero_stage=stage)
        if first():
            losses = {"rows": rows.losses, "resumed": resumed.losses, "continued": continued.losses}
            losses |= {"gan": [row.get("margin") for row in gan], "gan_loss": gan.losses}
            losses["skipped"] = [row["skipped"] for row in steep]
            losses["weights"] = flat(trained.weights)
            losses["spared"] = flat(spared.weights)
            (folder / f"stage{stage}.json").write_text(json.dumps(losses))
    # Not by way of the interpreter's end, where gloo's threads abort one process in forty under load.
    dist.barrier()
    os._exit(0)


def flat(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in weights.items()}


def first() -> bool:
    return dist.get_rank() == 0


def cut_off(newest: Path) -> None:
    dist.barrier()
    if first():
        shutil.rmtree(newest)
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
