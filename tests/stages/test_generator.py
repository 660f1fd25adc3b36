from types import SimpleNamespace

import torch

from evatok.artifacts import Artifact, Location
from evatok.models.generator import Generator
from evatok.models.sampling import Requests, SamplingConfig, sample
from evatok.models.tokens import Tokens
from evatok.stages.generator import STAGE
from evatok.stages.stage import Resources, StageContext
from evatok.training.token_table import ROWS, VOCABULARY, to_table


class Quiet:
    def log(self, stage, message):
        pass

    def progress(self, stage, done, total, unit, figures):
        pass


def test_generator_stage_learns_the_token_table_on_two_workers(tmp_path, ray_cluster):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 4])[torch.randint(3, (8, 3))]
    clips = Tokens(torch.randint(20, (int(lengths.sum()),)), lengths)
    tokens = Location.parse(tmp_path / "tokens")
    rows = [{"clip_id": f"c{k}", "row": k, "split": "train"} for k in range(8)]
    table = to_table(rows, list(range(8)), clips, None, augmentation=0)
    tokens.write_table(f"{ROWS}/0.parquet", table)
    held = table.set_column(2, "split", [["test"] * 8])
    tokens.write_table(f"{ROWS}/8.parquet", held)
    tokens.write_json(
        VOCABULARY, {"codes": 20, "choices": [1, 2, 4], "blocks": 3, "labels": list("abcdefgh")}
    )
    config = STAGE.config.model_validate(
        {
            "network": {
                "size": {"width": 48, "layers": 2, "heads": 2},
                "token_dropout": 0,
                "dropout": 0,
                "class_dropout": 0,
            },
            "train": {
                "steps": 150,
                "global_batch": 8,
                "lr": 3e-3,
                "final_lr": 0,
                "schedule": "wsd",
                "ema": 0,
                "checkpoint_every": 150,
            },
        }
    )
    context = StageContext(
        stage="generator",
        run_id="generator-test",
        location=Location.parse(tmp_path / "generator"),
        inputs={"tokens": Artifact(tokens, None)},
        config=config,
        experiment=SimpleNamespace(),
        seed=0,
        resources=Resources(workers=2),
        listener=Quiet(),
    )
    STAGE.run(context)
    model = Generator.from_pretrained(tmp_path / "generator" / "model")
    made = sample(model, Requests(torch.arange(8), torch.zeros(8).long()), SamplingConfig(temperature=0))
    assert torch.equal(made.lengths, clips.lengths)
    assert torch.equal(made.indices, clips.indices)
