"""The command line: exit codes, the JSON line, quick help, a clean Ctrl-C."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evatok.cli import main
from evatok.cli.console import Console, duration
from evatok.experiment import CHAIN


@pytest.fixture
def toy(toy_chain, tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: toy\nstorage: {tmp_path / 'runs'}\nindex: {{}}\nrouter: {{}}\nevaluate: {{}}\n")
    return str(path)


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, "people read stderr when --json is given"
    return json.loads(lines[0])


def test_help_is_quick_and_imports_neither_torch_nor_ray():
    code = (
        "import sys, time\n"
        "from evatok.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'ray', 'pyarrow', 'pydantic'} & set(sys.modules), 'too much imported'\n"
        "assert time.process_time() < 0.5, 'the whole process, start to end'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run an experiment's stages" in done.stdout


def test_run_names_the_stages_that_it_may_stop_after(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert ", ".join(CHAIN) in " ".join(capsys.readouterr().out.split())


def test_importing_the_package_imports_neither_torch_nor_ray():
    code = "import sys, evatok; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_run_reports_stages_as_json(toy, capsys):
    assert main(["run", toy, "--json"]) == 0
    found = result(capsys)
    assert set(found) == {"run", "report", "stages"}
    assert [set(stage) for stage in found["stages"]] == [{"name", "skipped", "seconds", "metrics"}] * 3
    assert found["report"].endswith("toy/report.html")


def test_plan_counts_parameters_and_starts_nothing(toy, toy_chain, capsys):
    assert main(["plan", toy, "--json"]) == 0
    found = result(capsys)
    keys = {"name", "done", "state", "drift", "inputs", "outputs", "models", "compute"}
    assert [set(stage) for stage in found["stages"]] == [keys] * 3
    router = found["stages"][1]
    assert router["models"] == {"router": {"parameters": 1234}}
    assert (router["done"], router["state"], router["inputs"]) == (False, "missing", ["index"])
    assert toy_chain.ran == []
    assert not Path(found["run"]).exists()


def test_plan_for_people_names_states_and_drift(toy, capsys):
    main(["run", toy, "--until", "router"])
    capsys.readouterr()
    assert main(["plan", toy, "--set", "router.lr=0.3"]) == 0
    text = capsys.readouterr().out
    assert "index: done, will be skipped" in text
    assert "router.lr: was 0.1, is 0.3" in text
    assert "1,234 parameters" in text


def test_status_of_a_run_folder(toy, capsys):
    main(["run", toy, "--until", "index", "--json"])
    run = result(capsys)["run"]
    assert main(["status", run, "--json"]) == 0
    found = result(capsys)
    assert [set(stage) for stage in found["stages"]] == [{"name", "state", "step", "seconds", "metrics"}] * 3
    assert [stage["state"] for stage in found["stages"]] == ["done", "missing", "missing"]


def test_index_runs_the_first_stage_alone(toy, toy_chain):
    assert main(["index", toy]) == 0
    assert toy_chain.ran == ["index"]


def test_eval_of_another_config_names_the_option_that_does_it_anew(toy, toy_chain, capsys, monkeypatch):
    summary = {"policies": {}}
    monkeypatch.setattr(
        sys.modules["evatok.stages.evaluate"], "evaluation", lambda run: summary, raising=False
    )
    main(["run", toy])
    toy_chain.ran.clear()
    changed = ["eval", toy, "--set", "evaluate.policies=[static]"]
    capsys.readouterr()
    assert main(changed) == 2
    assert "evatok eval ... --redo evaluate" in capsys.readouterr().err
    assert main([*changed, "--redo", "evaluate"]) == 0
    assert toy_chain.ran == ["evaluate"]


def test_report_needs_a_run(toy, capsys):
    assert main(["report", toy]) == 2
    main(["run", toy])
    assert main(["report", toy, "--json"]) == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "TOY", "--set", "router.lrr=1"], "Did you mean 'lr'?"),
        (["run", "TOY", "--set", "router.lr=fast"], "found 'fast'"),
        (["run", "TOY", "--set", "router.batch=5"], "cannot be split over 2 workers"),
        (["run", "TOY", "--until", "rooter"], "not a stage of this experiment"),
        (["bench", "nothing"], "no such benchmark"),
    ],
)
def test_mistake_of_the_user_is_one_message_and_exit_code_2(toy, capsys, words, part):
    assert main([toy if word == "TOY" else word for word in words]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_benchmark_says_how_far_it_is(monkeypatch, capsys):
    from evatok.benchmarks import sample

    def run(settings: sample.Settings) -> dict[str, float]:
        sample.log.info("%d batch sizes to go", len(settings.batches))
        return {"ratio": 2.0}

    monkeypatch.setattr(sample, "run", run)
    for _ in range(2):
        assert main(["bench", "sample", "--json", "--set", "batches=[1]"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == {"ratio": 2.0}
        assert captured.err.count("1 batch sizes to go") == 1


def test_fault_leaves_its_traceback_in_the_run(toy, toy_chain, capsys):
    toy_chain.broken["router"] = ZeroDivisionError("boom")
    assert main(["run", toy]) == 1
    captured = capsys.readouterr()
    assert "Traceback (most recent" not in captured.err
    path = Path(captured.err.rsplit("Traceback: ", 1)[1].strip())
    assert "ZeroDivisionError: boom" in path.read_text()
    assert path.parent.parent.name == "toy"


def test_interrupt_prints_the_command_that_goes_on(toy, toy_chain, capsys):
    main(["run", toy])
    capsys.readouterr()
    toy_chain.broken["router"] = KeyboardInterrupt()
    assert main(["run", toy, "--redo", "router", "--set", "resources.workers=1"]) == 130
    assert f"evatok run {toy} --set resources.workers=1\n" in capsys.readouterr().err
    assert main(["run", toy, "--set", "resources.workers=1"]) == 0


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 5.0, 11.0, 12.0])
    monkeypatch.setattr("evatok.cli.console.time.monotonic", lambda: next(now))
    with Console(people=sys.stdout) as console:
        for done in (0, 10, 50, 60, 100):
            console.progress("proxy", done, 100, "steps", {"loss": 0.5})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "proxy     0/100 steps, loss 0.5",
        "proxy     60/100 steps, 7 s left, loss 0.5",
        "proxy     100/100 steps, 0 s left, loss 0.5",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
