"""Sweep files: what they say, the names and configurations of their runs, and every problem at once."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest

from sdlora.config.loading import load_config
from sdlora.errors import ConfigError, ResumeError, SdloraError, TargetError
from sdlora.progress import Silence
from sdlora.sweeps.means import mean_lines, means_of
from sdlora.sweeps.naming import LONGEST
from sdlora.sweeps.planning import PlannedRun, check_runs, plan_sweep
from sdlora.sweeps.results import RunResult, State, SweepReport, read_results, table_lines, write_results
from sdlora.sweeps.run import sweep
from sdlora.sweeps.run_folder import check_same, prepare
from sdlora.sweeps.sweep_file import read_sweep
from tests.conftest import write_images

BASE = """
[data]
images = "a"
trigger = "zorb"
[train]
steps = 40
[output]
path = "out/zorb.safetensors"
"""


def planned(tmp_path: Path, text: str, *overrides: str, base: str = BASE) -> tuple[PlannedRun, ...]:
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs" / "base.toml").write_text(base)
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return plan_sweep(read_sweep(file), tmp_path / "out", overrides)


def problems_of(tmp_path: Path, text: str, *overrides: str, base: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, text, *overrides, base=base)
    return [problem.replace(str(tmp_path) + os.sep, "").replace(os.sep, "/") for problem in caught.value.problems]


def test_a_grid_has_every_combination_in_order_and_readable_names(tmp_path: Path) -> None:
    runs = planned(
        tmp_path,
        'config = "configs/base.toml"\n[grid]\n"lora.rank" = [4, 8]\ntrain.seed = [0, 1]\n'
        '[grid.optimizer]\nname = ["lion"]\n',
    )
    assert [run.name for run in runs] == [
        "rank=4,seed=0,name=lion",
        "rank=4,seed=1,name=lion",
        "rank=8,seed=0,name=lion",
        "rank=8,seed=1,name=lion",
    ]
    assert [(r.config.lora.rank, r.config.train.seed, r.config.optimizer.name) for r in runs] == [
        (4, 0, "lion"),
        (4, 1, "lion"),
        (8, 0, "lion"),
        (8, 1, "lion"),
    ]
    assert {run.config.train.steps for run in runs} == {40}
    assert runs[0].output == tmp_path / "out" / runs[0].name / f"{runs[0].name}.safetensors"


def test_each_table_of_runs_meets_each_combination(tmp_path: Path) -> None:
    runs = planned(
        tmp_path,
        'config = "configs/base.toml"\n[grid]\nlora.rank = [4, 8]\n'
        '[[runs]]\nname = "the zorb"\n[[runs]]\ndata.images = "b"\ndata.trigger = "blip"\n',
    )
    assert [run.name for run in runs] == [
        "the-zorb,rank=4",
        "the-zorb,rank=8",
        "images=b,trigger=blip,rank=4",
        "images=b,trigger=blip,rank=8",
    ]
    assert [run.config.trigger for run in runs] == ["zorb", "zorb", "blip", "blip"]
    assert runs[3].settings == {"data.images": "b", "data.trigger": "blip", "lora.rank": 8}


def test_paths_go_by_the_file_that_states_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = BASE + '[base]\npath = "models/x"\nvae = "vae.safetensors"\n'
    text = 'config = "configs/base.toml"\n[base]\nvae = "mine.safetensors"\n[grid]\n"data.images" = ["a", "x/b"]\n'
    first, second = planned(tmp_path, text, "lora.start_from=start.safetensors", base=base)
    places = (first.config.base.path, first.config.base.vae, first.config.data.images, first.config.lora.start_from)
    assert list(map(os.path.abspath, filter(None, places))) == [
        str(tmp_path / "configs" / "models" / "x"),
        str(tmp_path / "mine.safetensors"),
        str(tmp_path / "a"),
        str(tmp_path / "start.safetensors"),
    ]
    assert os.path.abspath(second.config.data.images or "") == str(tmp_path / "x" / "b")
    # The configuration in the folder of a run leads to the same places, and names no folder of this machine.
    prepare(second)
    written = (second.folder / "run.toml").read_text()
    assert str(tmp_path) not in written
    again = load_config(second.folder / "run.toml")
    assert os.path.realpath(again.base.path) == os.path.realpath(second.config.base.path)
    assert os.path.realpath(again.data.images or "") == os.path.realpath(tmp_path / "x" / "b")
    assert os.path.realpath(again.output.path) == os.path.realpath(second.output)


def test_the_configuration_of_a_run_says_all_that_the_sweep_says(tmp_path: Path) -> None:
    """Tables, lists, rules, sets and a preset survive the way into the file and back."""
    base = """
preset = "character"
[data]
trigger = "zorb"
sets = [{ images = "a", repeats = 3 }, { images = "b", role = "validation" }]
resolution = [64, 80]
[optimizer]
betas = [0.9, 0.98]
[[lora.rules]]
pattern = "*.to_q"
rank = 4
[samples]
prompts = ["zorb, \\"quoted\\"", "über"]
"""
    (run,) = planned(tmp_path, 'config = "configs/base.toml"\n[grid]\nlora.rank = [8]\n', base=base)
    prepare(run)
    again = load_config(run.folder / "run.toml")
    one, other = run.config.flat(), again.flat()
    assert {key for key in one if one[key] != other[key]} <= {"data.sets", "output.path"}
    assert [os.path.realpath(each.images) for each in again.data.sets] == [
        os.path.realpath(tmp_path / "configs" / name) for name in "ab"
    ]
    assert [each.model_dump(exclude={"images"}) for each in again.data.sets] == [
        each.model_dump(exclude={"images"}) for each in run.config.data.sets
    ]
    assert again.preset == "character"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ('"data.images" = ["a/x", "b/x", "c/y"]', ["images=a-x", "images=b-x", "images=c-y"]),
        ('"data.resolution" = [64, [64, 80]]', ["resolution=64", "resolution=64+80"]),
        ('"optimizer.learning_rate" = [1e-4, 0.001]', ["learning_rate=0.0001", "learning_rate=0.001"]),
        ('"data.flip" = [true, false]', ["flip=true", "flip=false"]),
        ('"output.title" = ["../up", "a:b?", "..", "A:B?"]', ["title=up", "title=a-b", "title=-", "title=A-B~"]),
        ('"lora.rank" = [4]\n"data.flip" = [true]\n', ["rank=4,flip=true"]),
        ('"output.title" = ["é"]', ["title=é"]),
    ],
)
def test_names_are_readable_distinct_and_safe(tmp_path: Path, values: str, names: list[str]) -> None:
    found = [run.name for run in planned(tmp_path, f'config = "configs/base.toml"\n[grid]\n{values}\n')]
    assert [re.sub("~[0-9a-f]{6}$", "~", name) for name in found] == names
    assert len({name.casefold() for name in found}) == len(found)


def test_a_long_name_is_cut_and_stays_distinct(tmp_path: Path) -> None:
    titles = json.dumps(["t" * 300 + end for end in "ab"])
    one, other = planned(tmp_path, f'config = "configs/base.toml"\n[grid]\noutput.title = {titles}\n')
    assert one.name != other.name
    assert max(len(one.name), len(other.name)) <= LONGEST


def test_keys_of_one_name_are_written_whole(tmp_path: Path) -> None:
    text = (
        'config = "configs/base.toml"\n[grid]\nlora.kind = ["loha"]\ntrain.save_every = [5]\noutput.save_every = [9]\n'
    )
    (run,) = planned(tmp_path, text)
    assert run.name == "kind=loha,train.save_every=5,output.save_every=9"


def test_every_problem_of_the_form_is_reported_at_once(tmp_path: Path) -> None:
    text = """config = "nothing.toml"
gridd = 1

[grid]
"lora.rank" = 4
"train.seed" = [1, 1]
"output.path" = ["x.safetensors"]
"tran.steps" = [1]
lora.alpha = []

[[runs]]
name = ""
"""
    assert problems_of(tmp_path, text) == [
        "sweep.toml:2: unknown key gridd; did you mean grid?",
        "nothing.toml: no such configuration file",
        'sweep.toml:5: grid lora.rank = 4: expected "section.key" = [values], for example "lora.rank" = [4, 16]',
        "sweep.toml:6: grid train.seed: 1 is listed twice",
        "sweep.toml:7: grid output.path: each run writes into a folder of its own; leave it out, and name the folder of all "
        "with --out",
        "sweep.toml:8: grid tran.steps: there is no section tran; did you mean train?",
        'sweep.toml:9: grid lora.alpha = []: expected "section.key" = [values], for example "lora.rank" = [4, 16]',
        'sweep.toml:11: [[runs]] name = "": expected text, for example "high-rank"',
    ]


def test_wrong_settings_are_reported_once_with_their_line_and_the_runs_that_have_them(tmp_path: Path) -> None:
    text = """config = "configs/base.toml"
[train]
stepps = 3
[grid]
"lora.rank" = [4, 0, "many"]
"train.seed" = [0, 1]
"""
    assert problems_of(tmp_path, text, base=BASE + "[lora]\nalpha = -1\n") == [
        "configs/base.toml:10: lora.alpha = -1: must be more than 0",
        "sweep.toml:3: unknown key train.stepps; did you mean train.steps?",
        "sweep.toml:5: lora.rank = 0: must be at least 1 (run rank=0,seed=0 and 1 more)",
        "sweep.toml:5: lora.rank = 'many': must be a whole number, for example 16 (run rank=many,seed=0 and 1 more)",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "problem"),
    [
        ("[data]\nimages = 'a'\n", (), "nothing to try; add [grid]"),
        ("config = 3\n[grid]\nlora.rank = [4]\n", (), 'config = 3: expected a file, for example "style.toml"'),
        ("grid = 3\n", (), "grid must be a table [grid]"),
        ("runs = 3\n", (), "runs must be tables [[runs]]"),
        ("slurm = 3\n[grid]\nlora.rank = [4]\n", (), "slurm must be a table [slurm]"),
        ("[grid]\nrank = [4]\n", (), 'expected "section.key" = [values]'),
        ("[grid]\nlora.rank = [4]\n[[runs]]\nlora.rank = 8\n", (), "lora.rank is in [grid] too; keep one of them"),
        ("[[runs]]\nname = 'A'\n[[runs]]\nname = 'a'\n", (), 'name = "a" is used twice'),
        ("[grid]\nlora.rank = [4]\n", ("lora.rank=3",), "tries values of lora.rank; leave it out"),
        ("[grid]\nlora.rank = [4]\n", ("output.path=x.safetensors",), "name the folder of all with --out"),
        ("[grid]\nlora.rank = [4]\n", ("steps=3",), "it is train.steps or samples.steps here"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, overrides: tuple[str, ...], problem: str) -> None:
    assert any(problem in line for line in problems_of(tmp_path, text, *overrides))


def test_numbers_of_runs_and_processes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path / "nothing.toml", jobs=0, processes=-1)
    assert caught.value.problems == (
        "--jobs 0: expected a whole number, at least 1",
        "--processes -1: expected a whole number, at least 1",
    )


def test_images_are_checked_for_every_run_before_any_is_trained(tmp_path: Path, tiny_base: Path) -> None:
    write_images(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    text = f"""
[base]
path = {json.dumps(str(tiny_base))}
[data]
trigger = "zorb"
[grid]
"data.images" = ["good", "empty", "nothing"]
"lora.targets" = ["attention", ["unet.nothing*"]]
"""
    with pytest.raises(SdloraError) as caught:
        check_runs(planned(tmp_path, text), Silence(), None)
    problems = [problem.replace(str(tmp_path) + os.sep, "") for problem in caught.value.problems]
    assert len(problems) == 3
    assert re.fullmatch(r"lora\.targets.*unet\.nothing.*\(run images=good,targets=unet\.nothing.*\)", problems[0])
    assert re.fullmatch(r"empty: no image .*\(run images=empty,targets=attention and 1 more\)", problems[1])
    assert re.fullmatch(r"nothing: no such folder.*\(run images=nothing,targets=attention and 1 more\)", problems[2])


def test_a_folder_of_other_settings_is_refused_with_the_differences(tmp_path: Path) -> None:
    text = 'config = "configs/base.toml"\n[grid]\nlora.rank = [4, 8]\n'
    for run in planned(tmp_path, text):
        prepare(run)
    check_same(planned(tmp_path, text))
    check_same(planned(tmp_path, text, "train.save_every=7", "output.title=x", 'samples.prompts=["x"]'))
    with pytest.raises(ResumeError) as caught:
        check_same(planned(tmp_path, text, "train.steps=41", "data.images=b"))
    assert len(caught.value.problems) == 2
    assert re.search(r"rank=4: made with other settings: data\.images was \".*a\", is now \".*b\"", str(caught.value))
    assert "train.steps was 40, is now 41; undo that, choose another --out, or remove the folder" in str(caught.value)


def test_the_table_is_written_read_and_shown(tmp_path: Path) -> None:
    done = RunResult(
        run="rank=4", state="done", settings={"lora.rank": 4, "data.resolution": [64, 80]}, steps=12, loss=0.12345678,
        seconds=3.4, file="rank=4/rank=4.safetensors",
    )  # fmt: skip
    failed = RunResult(run="x", state="failed", settings={"lora.kind": "loha"}, message='a, "b"')
    report = SweepReport(folder=tmp_path, runs=(done, failed))
    write_results(report)
    assert read_results(tmp_path) == {"rank=4": done, "x": failed}
    with (tmp_path / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "run": "rank=4", "state": "done", "lora.rank": "4", "data.resolution": "[64, 80]", "lora.kind": "", "steps": "12",
        "loss": "0.1234568", "validation_loss": "", "seconds": "3.4", "file": "rank=4/rank=4.safetensors", "message": "",
    }  # fmt: skip
    assert (second["lora.kind"], second["message"], second["loss"]) == ("loha", 'a, "b"', "")
    assert table_lines(report.runs) == [
        "run     state   steps    loss  time",
        "rank=4  done       12  0.1235   3 s",
        "x       failed",
    ]


@pytest.mark.parametrize("text", ["[]", "{", '{"runs": [{"run": 1}]}', '{"loss": 3}'])
def test_a_file_that_has_no_results_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(TargetError, match="has no results of a sweep; move it, or choose another --out"):
        read_results(tmp_path)


def test_runs_that_differ_in_the_seed_alone_have_a_mean(tmp_path: Path) -> None:
    """Losses 1, 2 and 6: mean 3, sample deviation sqrt(7), t of 2 degrees of freedom 4.30265: 4.30265 sqrt(7 / 3)."""

    def run(rank: int, seed: int, loss: float | None, state: State = "done") -> RunResult:
        settings = {"lora.rank": rank, "train.seed": seed}
        return RunResult(run=f"rank={rank},seed={seed}", state=state, settings=settings, loss=loss, validation_loss=2.5)

    runs = [run(4, 0, 1.0), run(8, 0, 1.0), run(4, 1, 2.0), run(8, 1, None, "failed"), run(4, 2, 6.0)]
    (mean,) = means_of(runs)
    assert (mean.runs, mean.seeds, mean.loss, mean.settings) == ("rank=4", 3, 3.0, {"lora.rank": 4})
    assert mean.loss_interval == pytest.approx(4.302653 * (7 / 3) ** 0.5, rel=1e-6)
    assert (mean.validation_loss, mean.validation_loss_interval) == (2.5, 0.0)
    assert mean_lines([mean]) == [
        "mean over seeds  seeds             loss       validation",
        "rank=4               3  3.0000 ± 6.5724  2.5000 ± 0.0000",
    ]
    assert means_of(runs[:2]) == ()
    assert mean_lines(()) == []
