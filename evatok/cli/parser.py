"""The commands and their options. Each command names the function that carries it out."""

from __future__ import annotations

import argparse
from typing import Any

from evatok import __version__

_STAGES = "stages [{name, skipped, seconds, metrics}]"


def parser() -> argparse.ArgumentParser:
    """Parsed arguments have ``command`` ("module of evatok.cli:function"), ``json`` and the options."""
    main = argparse.ArgumentParser(prog="evatok", description="Adaptive-length video tokenizers on Ray.")
    main.add_argument("--version", action="version", version=f"evatok {__version__}")
    commands = main.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: str, about: str, keys: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"With --json the last line of stdout is one JSON object: {keys}.",
        )
        added.add_argument("--json", action="store_true", help="print the result as one line of JSON")
        added.set_defaults(command=function)
        return added

    run = command("run", "runs:run", "run an experiment's stages", f"{{run, report, {_STAGES}}}")
    _experiment(run)
    _address(run)
    _stages(run)

    plan = command(
        "plan",
        "runs:plan",
        "show what a run would do, and start nothing",
        "{run, stages [{name, done, state, drift, inputs, outputs, models {name: {parameters}}, compute}]}",
    )
    _experiment(plan)

    status = command(
        "status",
        "runs:status",
        "show how far a run is",
        "{run, stages [{name, state, step, seconds, metrics}]}",
    )
    _experiment(status)

    index = command(
        "index",
        "runs:index",
        "index an experiment's videos: new and changed ones",
        f"{{run, report, {_STAGES}}}",
    )
    _experiment(index)
    _address(index)
    index.add_argument("--download", action="store_true", help="fetch the source's missing videos first")
    index.add_argument(
        "--materialize", type=int, metavar="SIZE", help="also decode all clips once, SIZE pixels"
    )

    evaluate = command(
        "eval",
        "runs:evaluate",
        "evaluate a run's tokenizers and policies on held-out clips",
        "{policies {name: {reward_percentile, reward_percentile_interval {value, low, high}, mean_tokens,"
        " regret {median, 90}, the mean of each of curate's metrics, token_saving_vs_uniform {value, low,"
        " high}, token_saving_vs_static {...}, the same two at the quoted setting as"
        " token_saving_at_setting_vs_..., final {metrics and savings with the final tokenizer in place of the"
        " proxy}}}, budget, clips, metric, generated {metrics of the generator's samples}}; a saving that"
        " cannot be measured is null, and generated is there once the stage generate is done",
    )
    _experiment(evaluate)
    _address(evaluate)
    evaluate.add_argument("--redo", choices=["evaluate"], help="delete the earlier evaluation first")

    report = command("report", "runs:report", "write the HTML report of a run or a sweep", "{run, report}")
    _experiment(report)

    tune = command(
        "tune",
        "runs:tune",
        "search over an experiment's settings",
        "{sweep, report, trials [{name, settings, metrics, state}], best [name], export}",
    )
    tune.add_argument("sweep", metavar="SWEEP", help="sweep file (*.yaml)")
    _overrides(tune)
    _address(tune)

    submit = command(
        "submit",
        "cluster:submit",
        "send an experiment to a cluster as a Ray job and follow its log",
        "{job, run, status}",
    )
    _experiment(submit)
    submit.add_argument(
        "--address", metavar="URL", help="job server; else RAY_API_SERVER_ADDRESS, else port 8265 here"
    )
    _stages(submit)
    submit.add_argument("--no-follow", action="store_true", help="start the job and return")

    generate = command(
        "generate",
        "generate:command",
        "sample videos from a run's generator",
        "{output, grid, clips [{file, tokens_file, class, seed, tokens, assignment}]}",
    )
    _generate(generate)

    encode = command(
        "encode", "codec:encode", "turn a video into tokens", "{output, fps, clips, tokens, assignments}"
    )
    _codec(encode, "the token file (*.safetensors); default: here, called like the video")
    decode = command(
        "decode", "codec:decode", "turn tokens back into a video", "{output, fps, clips, tokens, assignments}"
    )
    decode.add_argument("experiment", metavar="EXPERIMENT", help="experiment file (*.yaml) or a run's folder")
    decode.add_argument("tokens", metavar="TOKENS", help="token file that encode wrote")
    decode.add_argument("--fps", type=float, help="frames per second; the encoded video's where left out")
    decode.add_argument(
        "--output", metavar="FILE", help="the film (*.mp4, *.gif); default: *.mp4 here, called like TOKENS"
    )
    _overrides(decode)
    reconstruct = command(
        "reconstruct",
        "codec:reconstruct",
        "encode and decode a video, and measure what was lost",
        "{output, fps, psnr, clips, tokens, assignments}",
    )
    _codec(reconstruct, "the film (*.mp4, *.gif); default: VIDEO-reconstructed.mp4, here")

    weights = command(
        "weights", "weights:command", "list or fetch pretrained weights", "{weights [{name, path}]}"
    )
    weights.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="what to fetch: of the list, or a model of the Hugging Face hub; without it, the list",
    )

    bench = command("bench", "runs:bench", "measure this machine", "the benchmark's figures")
    bench.add_argument("name", metavar="NAME", nargs="?", help="which benchmark, or all; without it, a list")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="where the benchmarks that can choose run")
    _overrides(bench)
    return main


def _experiment(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "experiment", metavar="EXPERIMENT", help="experiment file (*.yaml) or a run's folder"
    )
    _overrides(command)


def _stages(command: argparse.ArgumentParser) -> None:
    names = "index, proxy, curate, router, tokenizer, tokens, generator, generate, evaluate"
    command.add_argument("--until", metavar="STAGE", help=f"stop after this stage: {names}")
    command.add_argument(
        "--redo", metavar="STAGE", help="delete this stage's result and what depends on it first"
    )


def _codec(command: argparse.ArgumentParser, output: str) -> None:
    _experiment(command)
    command.add_argument("video", metavar="VIDEO", help="video file")
    command.add_argument(
        "--policy",
        help="what chooses the tokens: router, static, oracle, '{kind: difference, rate: 0.5}', ...; default:"
        " tokenizer.policy, which the run's tokenizer was trained under",
    )
    command.add_argument("--budget", type=int, metavar="TOKENS", help="most tokens of a clip, by the router")
    command.add_argument("--output", metavar="FILE", help=output)


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one setting (dotted key, value as in YAML); may be given again",
    )


def _address(command: argparse.ArgumentParser) -> None:
    command.add_argument("--address", help="Ray cluster (HOST:PORT); else RAY_ADDRESS, else a local Ray")


def _generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", metavar="RUN", help="experiment file (*.yaml) or a run's folder")
    options: dict[str, dict[str, Any]] = {
        "--class": {
            "action": "append",
            "dest": "classes",
            "help": "class name or number; may be given again",
        },
        "--count": {"type": int, "default": 4, "help": "clips of each class named, or in all"},
        "--seed": {"type": int, "default": 0, "help": "of the sampling"},
        "--guidance": {"type": float, "help": "classifier-free guidance scale"},
        "--temperature": {"type": float},
        "--top-k": {"type": int},
        "--top-p": {"type": float},
        "--precision": {"choices": ("fp32", "bf16"), "help": "of the generator"},
        "--budget": {"type": int, "metavar": "TOKENS", "help": "most tokens of a clip"},
        "--assignment": {"metavar": "A,B,C,D", "help": "token count of each block; 0: the generator chooses"},
        "--frames": {"metavar": "FILE", "help": "video or token file to go on from"},
        "--keep": {"type": int, "default": 1, "metavar": "BLOCKS", "help": "blocks of a token file to keep"},
        "--output": {"metavar": "FOLDER", "help": "where the clips go"},
        "--format": {"choices": ("mp4", "gif"), "default": "mp4"},
    }
    for name, option in options.items():
        command.add_argument(name, **option)
