"""The simulations of data pruning: grids and verdicts by hand, and small grids for real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from datapruning.scoring.methods import METHODS as KNOWN
from datapruning.selection.policies import POLICIES
from datapruning.selection.table import ScoreTable
from datapruning.students.comparison import (
    FULL,
    Cell,
    cells,
    compare_training,
    full_steps,
    result_table,
)
from prunelab.data.datasets import load_dataset
from prunelab.data.tensors import PREPROCESSING
from prunelab.errors import RunError
from prunelab.networks import build_model
from prunelab.runs.seeds import generator
from prunelab.training.loop import TrainingConfig
from simulations import kd_fractions, ten_metrics
from simulations.jobs import FAILED, FINISHED, Outcome, Workers, attempt
from simulations.kept import call
from simulations.kept.flipped import flipped
from simulations.kept.grid import (
    ALL,
    FRESH,
    PLAIN,
    RANDOM,
    AlphaKey,
    Choice,
    Plan,
    Setting,
    Student,
    alpha_keys,
    students,
    tuned,
    tuning_students,
)
from simulations.kept.jobs import (
    REFUSED,
    ScoreJob,
    StudentJob,
    TeacherJob,
    training_samples,
)
from simulations.kept.steps import Found, best_alphas, run_plan
from simulations.kept.tables import all_of, difference, verdict
from simulations.kept.teachers import Padded, Renormalised
from simulations.statistics import interval

TINY = Setting("digits", 120, 60, "resnet8", 1, 40)


def here(width: int = 1) -> Workers:
    """Does pieces in this process, when they are asked for."""
    from concurrent.futures import Future  # noqa: PLC0415

    def submit(job: Any, out: Path) -> Future[Outcome | None]:
        future: Future[Outcome | None] = Future()
        future.set_result(attempt(job, out))
        return future

    return Workers(width, submit)


def test_presets_name_known_methods_and_ten_metrics() -> None:
    assert len(ten_metrics.TEN) == 10
    for plan in (*kd_fractions.PRESETS.values(), *ten_metrics.PRESETS.values()):
        assert set(plan.methods) <= set(KNOWN)
        assert {c.policy for c in plan.choices if c not in PLAIN} <= set(POLICIES)
        assert not set(plan.seeds) & set(plan.tuning_seeds)


def test_grid_has_all_data_once_a_seed() -> None:
    """Two methods × three fractions × two budgets and all data: 13 cells a seed."""
    grid = cells(["a", "b"], [0.1, 0.5, 0.9], [0, 1], ["epochs", "steps"])
    assert len(grid) == 26
    assert len({cell.name for cell in grid}) == 26
    assert [cell.seed for cell in grid] == [0] * 13 + [1] * 13


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "steps"), [(10, 4, 6), (9, 4, 4), (8, 4, 4), (1, 4, 2)]
)
def test_full_steps(num_samples: int, batch_size: int, steps: int) -> None:
    """Two epochs: ⌈10/4⌉ = 3 steps each; of 9, the last batch of one joins the one before it."""
    assert full_steps(num_samples, TrainingConfig(epochs=2, batch_size=batch_size)) == steps


def test_result_table_by_hand() -> None:
    results: dict[Cell, dict[str, Any]] = {Cell(FULL, 1.0, s, "epochs"): {"test_accuracy": 0.9} for s in (0, 1)}  # noqa: E501  # fmt: skip
    for method, values in {"a": (0.52, 0.5), "b": (0.48, None)}.items():
        for seed, value in enumerate(values):
            result = {"refused": "constant"} if value is None else {"test_accuracy": value}
            results[Cell(method, 0.3, seed, "epochs")] = result
    header, rows = result_table(results, budget="epochs")
    assert header == ["method", "30 % kept"]
    assert rows == [["a", "51.00 ± 1.41"], ["b", "–"], [FULL, "90.00 ± 0.00"]]


def test_a_comparison_is_resumable_and_refuses_other_settings(tmp_path: Path) -> None:
    data = load_dataset("digits", num_train=120, num_test=60)
    arguments: dict[str, Any] = {
        "keeps": [0.5],
        "seeds": [0],
        "out": tmp_path,
        "training": TrainingConfig(epochs=1, batch_size=40),
        "scoring": {"training": TrainingConfig(epochs=1, batch_size=40)},
        "progress": lambda line: None,
    }
    first = compare_training(data, ["el2n", "random"], **arguments)
    assert len(first) == 5
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert compare_training(data, ["el2n", "random"], **arguments) == first
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    arguments["training"] = TrainingConfig(epochs=2, batch_size=40)
    with pytest.raises(RunError, match="of other settings"):
        compare_training(data, ["el2n", "random"], **arguments)


# --- a grid of kept sets --------------------------------------------------------------------------


def a_plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "setting": TINY,
        "choices": (RANDOM, Choice("el2n")),
        "kept": (0.1, 0.5),
        "seeds": (0, 1, 2),
        "teachers": ("small", "large"),
        "alphas": (0.0, 1.0),
        "noises": (0.2,),
    }
    return Plan(**{**values, **changes})


def chosen_alphas(plan: Plan) -> dict[AlphaKey, float]:
    return dict.fromkeys(alpha_keys(plan), 1.0)


def test_names_of_runs_differ() -> None:
    plan = a_plan(distilled=(RANDOM, Choice("el2n")))
    alphas = chosen_alphas(plan)
    every = [*students(plan, alphas), *dict.fromkeys(tuning_students(plan))]
    assert len({one.name for one in every}) == len(every)
    # A seed: all data; 2 budgets × 2 shares × (random + 2 teachers, el2n + 1); of changed labels
    # all data and 2 budgets × 2.
    assert len(students(plan, alphas)) == 3 * (1 + 2 * 2 * 5 + 1 + 4)


def test_without_a_choice_of_alpha_there_are_no_taught_students() -> None:
    assert not [one for one in students(a_plan(), {}) if one.teacher]


def test_the_best_alpha_by_hand() -> None:
    low, high, none = (AlphaKey("t", keep, "steps") for keep in (0.1, 0.5, 0.9))
    curves = {low: [50.0, 70.0, 70.0], high: [90.0, 80.0, 85.0], none: None}
    assert best_alphas([0.0, 0.5, 1.0], curves) == {low: 0.5, high: 1.0}


def filled(plan: Plan, accuracy: Callable[[Student], float]) -> Found:
    """What a plan finds where a student's accuracy follows from it alone."""
    found = Found(plan, alphas=chosen_alphas(plan))
    for one in (*students(plan, found.alphas), *tuning_students(plan)):
        key = "held_out_accuracy" if one.tuning else "test_accuracy"
        wobble = 0.001 * (one.seed % 7)
        found.outcomes[one.name] = Outcome(FINISHED, values={key: accuracy(one) + wobble})
    return found


def favourable(one: Student) -> float:
    """An accuracy with which every claim holds."""
    if one.tuning:  # the best α is 1 at the smallest share and 0 at the largest
        return 0.5 + 0.1 * (one.alpha > 0 if one.keep == 0.1 else one.alpha == 0)
    value = 0.6 if one.choice == ALL else 0.5
    if one.teacher == "small":
        value = 0.7
    if one.teacher == "large":
        value = 0.55
    return value + 0.001 * hash_of(one)


def hash_of(one: Student) -> float:
    """Some spread between seeds that differs from run to run."""
    return (sum(one.name.encode()) * (one.seed + 1)) % 5 - 2


def test_all_claims_hold_where_they_should() -> None:
    found = filled(a_plan(tuning_seeds=(1000, 1001, 1002)), favourable)
    rows = kd_fractions.claims(found)
    names = {row[0].partition(",")[0] for row in rows}
    assert names == {"1", "2", "3", "4", "5"}
    # α moves by 1 on each seed of the tuning, which has no spread.
    assert {row[2] for row in rows} == {"holds"}


@pytest.mark.parametrize(
    ("broken", "changed"),
    [
        ("1", lambda one: 0.9 if one.choice == Choice("el2n") and one.keep == 0.5 else None),
        ("2", lambda one: 0.9 if one.choice == ALL and not one.noise else None),
        ("4", lambda one: 0.9 if one.teacher == "large" and one.keep == 0.1 else None),
        ("5", lambda one: 0.9 if one.choice == ALL and one.noise else None),
    ],
)
def test_a_claim_fails_by_its_own_runs(broken: str, changed: Any) -> None:
    plan = a_plan(tuning_seeds=(1000, 1001, 1002))
    found = filled(plan, lambda one: changed(one) or favourable(one))
    verdicts = {row[0]: row[2] for row in kd_fractions.claims(found)}
    failed = {name.partition(",")[0] for name, text in verdicts.items() if "not hold" in text}
    assert failed == {broken}


def test_verdicts_by_hand() -> None:
    assert verdict(interval([1.0, 1.1, 0.9])) == "holds"
    assert verdict(interval([-1.0, -1.1, -0.9])) == "does not hold"
    # Spread 1, mean 1: of four values half the interval is 1.59, of seven .92; 1 at six is 1.05.
    assert verdict(interval([0.0, 1.0, 2.0])) == "undecided; 7 seeds would tell"
    assert verdict(interval([1.0])) == "undecided"
    assert verdict(None) == "undecided; it has not been run"
    good, bad, open_ = (interval([v, v + 0.1, v - 0.1]) for v in (1.0, -1.0, 0.0))
    assert all_of([good, good]) == "holds"
    assert all_of([good, open_]) == "undecided: holds in 1 of 2"
    assert all_of([good, open_, bad]) == "does not hold: below in 1 of 3"


def test_differences_are_paired_by_the_seeds_of_both() -> None:
    found = difference({0: 3.0, 1: 5.0, 2: 9.0}, {1: 4.0, 2: 6.0, 3: 1.0})
    assert found is not None
    assert (found.mean, found.count) == (2.0, 2)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_flipped_labels_are_as_many_as_asked_for_and_all_others() -> None:
    labels = torch.arange(10).repeat(100)
    changed, again, other = (
        flipped(labels, 0.4, num_classes=10, random=generator(seed)) for seed in (3, 3, 4)
    )
    assert int((changed != labels).sum()) == 400
    assert torch.equal(changed, again)
    assert not torch.equal(changed, other)
    moves = ((changed - labels) % 10)[changed != labels].bincount(minlength=10)
    assert moves[0] == 0
    assert (moves[1:] > 20).all()  # 44 expected of each
    assert torch.equal(flipped(labels, 0.0, num_classes=10, random=generator(3)), labels)


def test_a_small_grid_for_real(tmp_path: Path) -> None:
    """Everything is run once; a page comes of it; a second command runs nothing."""
    plan = a_plan(
        teachers=("resnet8", "resnet20"), kept=(0.5,), seeds=(0, 1), noises=(0.2,),
        choices=(RANDOM, FRESH, Choice("el2n"), Choice("aum", "ccs")),
    )  # fmt: skip
    found = run_plan(plan, tmp_path, here())
    assert {one.status for one in found.outcomes.values()} == {FINISHED}
    page = "\n".join(kd_fractions.body(found))
    assert "| random + KD, resnet20 teacher |" in page
    assert "| 20 % | steps |" in page
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    again = run_plan(plan, tmp_path, here())
    assert again.outcomes == found.outcomes
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    looked = run_plan(plan, tmp_path, None)
    assert looked.outcomes == found.outcomes
    assert "| rs2 |" in "\n".join(ten_metrics.body(looked))


def test_tuning_leaves_the_test_set_alone(tmp_path: Path) -> None:
    key = AlphaKey("resnet8", 0.5, "epochs")
    outcome = StudentJob(TINY, tuned(key, 0.0, 1000), ()).run(tmp_path)
    assert set(outcome.values) >= {"held_out_accuracy"}
    assert "test_accuracy" not in outcome.values
    # A fifth of the samples is held out: of 60 kept rows about 48 are trained on.
    assert 36 <= outcome.values["samples_seen"] < 60


def test_a_choice_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """Equal scores rank nothing."""
    samples, job = training_samples(TINY), ScoreJob(TINY, ("ddd",), 0)
    job.file(tmp_path).parent.mkdir()
    ScoreTable(
        samples.ids, torch.zeros(len(samples)).double(), "ddd", "digits", samples.fingerprint, 0
    ).write(job.file(tmp_path))
    student = Student(Choice("ddd", "moderate"), 0.5, "epochs", 0)
    outcome = StudentJob(TINY, student, ("ddd",)).run(tmp_path)
    assert outcome.status == REFUSED
    assert "equal" in outcome.reason


def test_runs_without_their_scores_are_left_out(tmp_path: Path) -> None:
    plan = a_plan(
        setting=replace(TINY, runs=1), choices=(RANDOM, Choice("memorization")),
        kept=(0.5,), seeds=(0,), teachers=(), noises=(),
    )  # fmt: skip
    found = run_plan(plan, tmp_path, here())
    status = {name: one.status for name, one in found.outcomes.items()}
    assert [name for name in status if status[name] == FAILED] == ["scores-s0"]
    assert not [name for name in status if name.startswith("memorization")]


def test_given_teachers_see_images_as_they_were_trained_on(tmp_path: Path) -> None:
    """Pixels 0 and 1 reach the network as (0 − mean) / std and (1 − mean) / std."""
    network = torch.nn.Flatten()
    wrapped = Renormalised(network, (0.2, 0.4, 0.5), (0.5, 0.25, 1.0))
    ours = torch.tensor([0.0, 1.0]).sub(PREPROCESSING.mean[0]).div(PREPROCESSING.std[0])
    seen = wrapped(ours.reshape(2, 1, 1, 1).expand(2, 3, 1, 1))
    expected = torch.tensor([[-0.4, -1.6, -0.5], [1.6, 2.4, 0.5]])
    assert torch.allclose(seen, expected, atol=1e-6)


def test_a_shortcut_without_parameters_by_hand() -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    shown = Padded(2, 1, 4)(image)
    assert shown.shape == (1, 4, 2, 2)
    assert shown[0, 1].tolist() == [[0, 2], [6, 8]]
    assert shown[0, [0, 2, 3]].abs().sum() == 0


def test_given_teachers_are_read_and_checked(tmp_path: Path) -> None:
    model = build_model("resnet8", num_classes=10, input_shape=(1, 8, 8), seed=5)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("batches_tracked")}
    save_file(state, tmp_path / "resnet8.safetensors")
    setting = replace(TINY, teachers=str(tmp_path))
    job = TeacherJob(setting, "resnet8", 0)
    assert job.name == TeacherJob(setting, "resnet8", 1).name == "teacher-resnet8"
    images = training_samples(setting).batch(torch.arange(4))[0]
    assert torch.equal(job.model(tmp_path)(images), model.eval()(images))
    with pytest.raises(RunError, match=r"resnet20\.safetensors is no resnet20"):
        TeacherJob(setting, "resnet20", 0).model(tmp_path)
    padded = {k.replace("fc.", "linear."): v for k, v in state.items() if ".downsample." not in k}
    save_file(padded, tmp_path / "resnet8.safetensors")  # of shortcuts without parameters
    other = job.model(tmp_path)
    assert not any(".downsample." in name for name, _ in other.named_parameters())
    assert other(images).shape == (4, 10)
    save_file(state, tmp_path / "resnet20.safetensors")
    with pytest.raises(RunError, match="does not match"):
        TeacherJob(setting, "resnet20", 0).model(tmp_path)
    # What has seen the right labels is no teacher for wrong ones.
    assert not TeacherJob(setting, "resnet8", 0, noise=0.2).is_given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,x"], "expected whole numbers"),
        (["--seeds", "0,1000"], "has had some of these"),
        (["--table-only"], "there are no runs in"),
        (["--jobs", "-1"], "--jobs -1"),
        (["--data", "nothing"], "nothing"),
        (["--teachers", "nowhere"], "there is no nowhere"),
    ],
)
def test_what_cannot_be_is_told_before_a_run(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan(teachers=("resnet8", "resnet20"))
    with pytest.raises(SystemExit):
        call.main("x", "X", {"small": plan}, kd_fractions.body,
                  ["--out", str(tmp_path / "out"), *words])  # fmt: skip
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "outcomes").exists()


@pytest.mark.slow
def test_the_command_writes_its_page_and_refuses_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan(teachers=("resnet8",), kept=(0.5,), seeds=(0,), noises=(), choices=(RANDOM,))
    words = ["--out", str(tmp_path / "a b"), "--data", "digits", "--jobs", "2"]
    call.main("ten_metrics", "Title", {"small": plan}, ten_metrics.body, words)
    text = (tmp_path / "a b" / "table.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert "--preset small --seeds 0 --data digits`" in text
    other = replace(plan, setting=replace(TINY, epochs=2))
    with pytest.raises(SystemExit):
        call.main("ten_metrics", "Title", {"small": other}, ten_metrics.body, words)
    assert "holds runs of other settings" in capsys.readouterr().err
