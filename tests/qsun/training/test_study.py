"""The study in small: prepared, cut into units, run, judged, compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from qsun.checkpoint.reader import open_checkpoint
from qsun.errors import CheckpointError
from qsun.evaluation.jsonl_task import JsonlTask
from qsun.training.study.collect import ArmResult, collect, summarise
from qsun.training.study.families import Family, library_functions, load_family
from qsun.training.study.folder import StudyFolder
from qsun.training.study.prepare import prepare
from qsun.training.study.run import Settings, Study, result_name
from qsun.training.study.statistics import bootstrap_interval, mcnemar, sign_flip
from qsun.training.study.units import COMPARISONS, UNITS
from qsun_kernels import QuantSpec


def chats(word: str, count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": word[::-1]}]
        for n in range(count)
    ]


@pytest.fixture
def small(bench, tmp_path: Path):
    """Two families of reversed words, and their tasks."""
    families = {}
    for word in ("sun", "moon"):
        file = tmp_path / f"{word}.jsonl"
        rows = [
            {"messages": chat[:1], "answer": word[::-1], "id": str(n)}
            for n, chat in enumerate(chats(word, 4))
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = JsonlTask.load(file, max_tokens=6)
        families[word] = Family(chats(word, 12), chats(word, 3), task)
    settings = prepare(bench.base, families, tmp_path / "study", part_bytes=50_000)
    assert settings["counts"]["sun"] == {**settings["counts"]["sun"], "train": 12, "held": 3, "test": 4}
    return StudyFolder.open(tmp_path / "study"), {name: f.task for name, f in families.items()}


def quantisation(path: Path) -> QuantSpec:
    reader = open_checkpoint(path)
    try:
        assert reader.quantization is not None
        return reader.quantization.spec
    finally:
        reader.close()


def study_of(folder, tmp_path: Path, **more) -> Study:
    # Rates a hundred times those of a real model: this one is tiny and trains for a dozen steps.
    settings = Settings(
        torch.device("cpu"), torch.float32, epochs=6, batch_size=6, pack_tokens=256, batch=4, rate=30.0,
        memory="8MiB",
    )  # fmt: skip
    return Study(folder, tmp_path / "work", tmp_path / "results", settings, tell=lambda text: None, **more)


@pytest.mark.slow
def test_every_unit_runs_and_the_outcome_is_written(small, tmp_path: Path) -> None:
    folder, tasks = small
    assert len(folder.weights["model.safetensors"]) > 2
    study = study_of(folder, tmp_path)
    units = ["base", "full", "sun", "sun-prefill", "qsun3", "qsun3-gptq", "lora", "qsun4-lora"]
    assert study.run(["sun", "moon"], units, [0])
    assert {path.name for path in (tmp_path / "results").glob("*.gz")} == {
        result_name(family, unit, 0) for family in ("sun", "moon") for unit in units
    }
    # The pairs come back as a folder that the engine takes.
    assert (tmp_path / "results" / "sun.qsun4-lora.s0" / "adapter_config.json").is_file()
    assert study.run(["sun"], ["sun"], [1])
    summary = collect(folder, tmp_path / "results", tasks, tmp_path / "accuracy.json", {"commit": "abc"})
    assert json.loads((tmp_path / "accuracy.json").read_text()) == json.loads(json.dumps(summary))
    arms = {(row["family"], row["arm"]): row for row in summary["arms"]}
    expected = [s.arm for unit in units for s in UNITS[unit].servings]
    assert sorted(arm for family, arm in arms if family == "moon") == sorted(expected)
    assert arms["sun", "sun"]["seeds"] == [0, 1] and arms["moon", "sun"]["seeds"] == [0]
    # Each way to quantise has a decoder of its own, made once.
    spec = {place.name: quantisation(place) for place in (tmp_path / "work").glob("base-w3-*")}
    assert spec == {
        "base-w3-awq-48": QuantSpec(3, 32, True),
        "base-w3-gptq-g32-zeros-192": QuantSpec(3, 32, False),
    }
    # Training lowers the loss of responses that were never seen; the naive combination is another model.
    for family in ("sun", "moon"):
        base = arms[family, "base"]["loss"]
        assert arms[family, "full"]["loss"] < base and arms[family, "sun"]["loss"] < base
        assert arms[family, "naive"]["loss"] != arms[family, "full"]["loss"]
    rows = {(row["family"], row["a"], row["b"]): row for row in summary["comparisons"]}
    assert rows["sun", "sun", "base"]["seeds"] == 2 and rows["moon", "sun", "base"]["seeds"] == 1
    assert rows["sun", "sun", "base"]["loss_difference"] < 0
    assert summary["training"] and summary["header"]["commit"] == "abc"
    assert "dequantised" in summary["header"]["note"]


def test_a_study_that_ran_out_of_time_goes_on(small, tmp_path: Path) -> None:
    folder, _ = small
    looks = []

    def soon() -> bool:
        looks.append(1)
        return len(looks) > 5

    assert not study_of(folder, tmp_path, out_of_time=soon).run(["sun"], ["qsun3"], [0])
    assert not list((tmp_path / "results").iterdir())
    assert list((tmp_path / "work").glob("sun.qsun3.s0/state/step-*"))
    steps = []
    again = study_of(folder, tmp_path, out_of_time=lambda: bool(steps.append(1)))
    assert again.run(["sun"], ["qsun3"], [0])
    whole = study_of(folder, tmp_path / "whole")
    assert whole.run(["sun"], ["qsun3"], [0])
    name = result_name("sun", "qsun3", 0)
    first, second = ((path / "results" / name) for path in (tmp_path, tmp_path / "whole"))
    import gzip

    a, b = (json.loads(gzip.decompress(path.read_bytes())) for path in (first, second))
    assert a["servings"] == b["servings"] and a["training"]["losses"] == b["training"]["losses"]


def test_a_damaged_folder_is_named(small, tmp_path: Path) -> None:
    folder, tasks = small
    part = folder.path / "weights" / "model.safetensors.part01"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"part01 is missing or damaged"):
        study_of(folder, tmp_path).run(["sun"], ["base"], [0])
    assert not (tmp_path / "work" / "base").exists()
    with pytest.raises(CheckpointError, match="has no results"):
        collect(folder, tmp_path / "results", tasks, tmp_path / "accuracy.json")
    (tmp_path / "results" / "sun.base.s0.json.gz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="a unit's results"):
        collect(folder, tmp_path / "results", tasks, tmp_path / "accuracy.json")
    with pytest.raises(CheckpointError, match="expected a folder that `prepare` wrote"):
        StudyFolder.open(tmp_path)


def test_families_that_were_not_asked_for_are_left_out(small, tmp_path: Path) -> None:
    folder, tasks = small
    assert study_of(folder, tmp_path).run(["sun", "moon"], ["base"], [0])
    summary = collect(folder, tmp_path / "results", {"sun": tasks["sun"]}, tmp_path / "accuracy.json")
    assert [row["family"] for row in summary["arms"]] == ["sun"]
    with pytest.raises(CheckpointError, match=r"has no results of \['stars'\]"):
        collect(folder, tmp_path / "results", {"stars": tasks["sun"]}, tmp_path / "accuracy.json")


def test_every_comparison_is_of_arms_that_exist() -> None:
    arms = {serving.arm for unit in UNITS.values() for serving in unit.servings}
    assert {arm for pair in COMPARISONS for arm in pair} <= arms
    wanted = {"base", "full", "sun", "sun-prefill", "naive", "lora", "sun-lora"}
    wanted |= {f"{kind}{bits}" for kind in ("full-awq", "qsun-ptq", "qsun") for bits in (4, 3, 2)}
    wanted |= {f"qsun{bits}-gptq" for bits in (4, 3, 2)}
    assert wanted <= arms


def test_mcnemar_against_values_by_hand() -> None:
    assert mcnemar(0, 0) == 1 and mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(2000, 1000) < 1e-60


def test_sign_flips() -> None:
    assert sign_flip([]) == 1 and sign_flip([0.0, 0.0]) == 1
    assert sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)  # of eight sums only +6 and -6 are as large
    assert sign_flip([1.0] * 40) == pytest.approx(1 / 20_001)
    balanced = [(-1.0) ** n for n in range(100)]
    assert sign_flip(balanced) == 1.0


def test_the_interval_of_a_mean() -> None:
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    # The normal interval of a share of one half of 400 is 0.451 to 0.549.
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)
    with pytest.raises(ValueError, match="differences is empty"):
        bootstrap_interval([])


def test_a_comparison_pairs_items() -> None:
    a = ArmResult({0: {"x": True, "y": True, "z": False}}, {0: [(1.0, 2), (2.0, 2)]})
    b = ArmResult({0: {"x": False, "y": True, "z": False}}, {0: [(3.0, 2), (2.0, 2)]})
    summary = summarise({("f", "sun"): a, ("f", "full"): b}, [], {})
    (row,) = summary["comparisons"]
    assert (row["a"], row["b"], row["only_a_right"], row["only_b_right"]) == ("sun", "full", 1, 0)
    assert row["difference"] == pytest.approx(1 / 3) and row["p"] == 1.0
    assert row["loss_difference"] == pytest.approx(-0.5)
    arms = {row["arm"]: row for row in summary["arms"]}
    assert arms["sun"]["perplexity"] == pytest.approx(math.exp(3 / 4))


def test_training_functions_are_not_those_of_the_test(tmp_path: Path) -> None:
    """A live problem that offers a tested function, or whose answer its own rules refuse, is left out."""

    def entry(identity: str, name: str) -> dict:
        parameters = {"type": "dict", "required": ["n"], "properties": {"n": {"type": "integer"}}}
        function = {"name": name, "description": f"Does {name}.", "parameters": parameters}
        return {"id": identity, "question": [[{"role": "user", "content": "go"}]], "function": [function]}

    files = {
        "simple_python": [("s0", "get_it", [3])],
        "multiple": [("m0", "find.it", [3])],
        "live_simple": [("l0", "Get.It", [3]), ("l1", "other", [3]), ("l2", "broken", [])],
        "live_multiple": [("l3", "third", [4])],
    }
    (tmp_path / "possible_answer").mkdir()
    for category, problems in files.items():
        name = f"BFCL_v4_{category}.json"
        (tmp_path / name).write_text("".join(json.dumps(entry(i, f)) + "\n" for i, f, _ in problems))
        answers = [{"id": i, "ground_truth": [{f: {"n": n}}]} for i, f, n in problems]
        (tmp_path / "possible_answer" / name).write_text("".join(json.dumps(a) + "\n" for a in answers))
    family = load_family("tools", gsm8k=tmp_path, bfcl=tmp_path)
    calls = [chat[-1]["content"] for chat in family.train]
    assert calls[:2] == ["[other(n=3)]", "[third(n=4)]"] and len(calls) == 4  # and a template of each
    assert {call.split("(")[0] for call in calls} == {"[other", "[third"}
    assert len(family.task.items) == 2
    for chat in family.train[2:]:
        assert chat[-1]["content"].split("=")[1][:-2] in chat[1]["content"]


def test_functions_of_the_standard_library() -> None:
    import email

    functions = library_functions(Path(email.__file__).parent)
    assert len(functions) > 10
    for name, head, source in functions:
        assert source.startswith(f"def {name}") and source.startswith(head.rstrip("\n")) and source != head
        compile(source, name, "exec")
