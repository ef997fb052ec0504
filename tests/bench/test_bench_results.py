"""The format of recorded runs, and what may be recorded."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qsun_bench import results
from qsun_bench.results import Header, Record, ResultsError, Run

HEADER = Header("cpu (test)", "0123456789ab", "2026-01-31", "2.13.0", None, None, "qsun-bench wna16", 0.02)


def record(
    case: str = "a.w4g128.M1", backend: str = "torch", us: float | None = 10.0, ok: bool = True
) -> Record:
    fields = {"M": 1, "N": 64, "K": 128, "bits": 4, "group_size": 128, "symmetric": True, "dtype": "bfloat16"}
    return Record("wna16_linear", case, backend, us, 4096, 0.5 if ok else 7.0, ok, fields)


def test_a_run_survives_its_file() -> None:
    run = Run(HEADER, (record(), record(backend="dense", us=None, ok=False)))
    assert results.parse(run.to_json(), "file") == run


def test_a_note_is_written_only_where_there_is_one() -> None:
    noted = replace(record(backend="gemlite"), note="not tuned here")
    run = Run(HEADER, (record(), noted))
    assert results.parse(run.to_json(), "file") == run
    assert [("note" in row) for row in json.loads(run.to_json())["records"]] == [False, True]
    # A note says how, not what: it does not make another problem of it.
    assert noted.key == record(backend="gemlite").key


def test_a_plan_is_written_only_where_there_is_one() -> None:
    planned = replace(record(backend="fa3"), plan_us=3.5)
    run = Run(HEADER, (record(), planned))
    assert results.parse(run.to_json(), "x") == run
    assert [row.get("plan_us") for row in json.loads(run.to_json())["records"]] == [None, 3.5]
    assert planned.key == record(backend="fa3").key
    damaged = run.to_json().replace('"plan_us": 3.5', '"plan_us": -1')
    with pytest.raises(ResultsError, match=r"records\[1\].plan_us is -1, expected a positive time"):
        results.parse(damaged, "x")


def test_further_figures_survive_the_file_and_are_no_part_of_the_problem() -> None:
    told = replace(record(backend="cuda"), measured={"tpot_us": {"p99": 12.5}, "memory": {"peak": None}})
    run = Run(HEADER, (record(), told))
    assert results.parse(run.to_json(), "x") == run
    assert ["measured" in row for row in json.loads(run.to_json())["records"]] == [False, True]
    assert told.key == record(backend="cuda").key
    damaged = run.to_json().replace(
        '"measured": {"tpot_us": {"p99": 12.5}, "memory": {"peak": null}}', '"measured": 3'
    )
    with pytest.raises(ResultsError, match=r"records\[1\].measured is 3, expected an object"):
        results.parse(damaged, "x")


def test_failed_is_told_from_wrong() -> None:
    wrong = record(us=None, ok=False)
    assert not wrong.failed and replace(wrong, error=None).failed and not record().failed


def test_the_file_has_exactly_the_documented_keys() -> None:
    data = json.loads(Run(HEADER, (record(),)).to_json())
    assert set(data) == {"header", "records"}
    assert set(data["header"]) == {
        "device", "commit", "date", "torch", "triton", "cuda", "command", "read_tb_s",
    }  # fmt: skip
    assert list(data["records"][0])[:7] == ["op", "case", "backend", "us", "bytes", "error", "ok"]
    assert {"M", "N", "K", "bits", "group_size", "dtype"} <= set(data["records"][0])


def test_one_record_a_line() -> None:
    text = Run(HEADER, tuple(record(case=f"case{i}") for i in range(3))).to_json()
    assert [sum(f'"case{i}"' in line for line in text.splitlines()) for i in range(3)] == [1, 1, 1]


def broken(change: str) -> str:
    data = json.loads(Run(HEADER, (record(),)).to_json())
    match change:
        case "no header":
            del data["header"]
        case "header lacks commit":
            del data["header"]["commit"]
        case "header has more":
            data["header"]["host"] = "x"
        case "bandwidth is text":
            data["header"]["read_tb_s"] = "3"
        case "records is an object":
            data["records"] = {}
        case "record lacks bytes":
            del data["records"][0]["bytes"]
        case "ok is a number":
            data["records"][0]["ok"] = 1
        case "right without a time":
            data["records"][0]["us"] = None
        case "negative time":
            data["records"][0]["us"] = -1.0
        case "time is true":
            data["records"][0]["us"] = True
        case "note is a number":
            data["records"][0]["note"] = 1
        case "record is a list":
            data["records"][0] = []
    return json.dumps(data)


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("no header", "expected an object with the keys header and records"),
        ("header lacks commit", "header has no commit"),
        ("header has more", r"header has the unknown keys \['host'\]"),
        ("bandwidth is text", r"header\.read_tb_s is '3', expected float or int"),
        ("records is an object", "records is dict, expected a list"),
        ("record lacks bytes", r"records\[0\] has no bytes"),
        ("ok is a number", r"records\[0\]\.ok is 1, expected bool"),
        ("right without a time", r"records\[0\]\.us is None, expected a positive time"),
        ("negative time", r"records\[0\]\.us is -1\.0, expected a positive time"),
        ("time is true", r"records\[0\]\.us is True, expected float or int or null"),
        ("note is a number", r"records\[0\]\.note is 1, expected str"),
        ("record is a list", r"records\[0\] is list, expected an object"),
    ],
)
def test_damaged_files_are_refused(change: str, says: str) -> None:
    with pytest.raises(ResultsError, match=f"damaged.json: ?.*{says}"):
        results.parse(broken(change), "damaged.json")


@pytest.mark.damaged
def test_a_file_that_is_no_json_is_refused() -> None:
    with pytest.raises(ResultsError, match=r"damaged\.json is not JSON"):
        results.parse('{"header": ', "damaged.json")


def test_bandwidth_of_a_record() -> None:
    assert record(us=2.0).gb_s == pytest.approx(2.048)
    assert record(us=None, ok=False).gb_s is None


def test_folder_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert results.device_folder(torch.device("cpu")) == "cpu"
    for name, folder in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert results.device_folder(torch.device("cuda")) == folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one recorded run, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    results.write(Run(HEADER, (record(us=10.0),)), tmp_path / "bench/results/cpu/wna16.json")
    (tmp_path / "kernel.cu").write_text("// v1\n")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "one"],
    ):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_a_clean_checkout_may_record(checkout: Path) -> None:
    root, commit = results.recordable_commit(None)
    assert root.resolve() == checkout.resolve()
    assert commit == subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], text=True).strip()


def test_a_changed_checkout_may_not_record(checkout: Path) -> None:
    (checkout / "kernel.cu").write_text("// v2\n")
    with pytest.raises(ResultsError, match=r"differs from its commit in 1 files \(kernel\.cu\)"):
        results.recordable_commit(None)
    assert results.current_commit().endswith("-dirty")


def test_an_untracked_source_may_not_record(checkout: Path) -> None:
    (checkout / "new_kernel.cu").write_text("// v1\n")
    with pytest.raises(ResultsError, match=r"new_kernel\.cu"):
        results.recordable_commit(None)


def test_the_results_themselves_may_differ(checkout: Path) -> None:
    """Recording one suite must not forbid recording the next."""
    results.write(Run(HEADER, (record(us=5.0),)), checkout / "bench/results/cpu/wna16.json")
    results.write(Run(HEADER, (record(us=5.0),)), checkout / "bench/results/cpu/attention.json")
    results.recordable_commit(None)


def test_a_commit_is_stated_only_where_git_cannot_tell(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResultsError, match="commit is stated, expected it only where"):
        results.recordable_commit("0123456789ab")
    bare = checkout / "bare"
    (bare / results.RESULTS).mkdir(parents=True)
    monkeypatch.chdir(bare)
    monkeypatch.setattr(results, "git", lambda *arguments, cwd=None: None)
    assert results.recordable_commit("0123456789abcdef") == (Path.cwd(), "0123456789ab")
    with pytest.raises(ResultsError, match="this is no git checkout"):
        results.recordable_commit(None)
    with pytest.raises(ResultsError, match="commit is 'main', expected 7 to 40 hexadecimal digits"):
        results.recordable_commit("main")


def test_a_revision_of_a_file_is_loaded(checkout: Path) -> None:
    path = "bench/results/cpu/wna16.json"
    results.write(Run(HEADER, (record(us=5.0),)), checkout / path)
    assert results.load(f"HEAD:{path}").records[0].us == 10.0
    assert results.load(path).records[0].us == 5.0


@pytest.mark.damaged
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere.json", r"nowhere\.json: no such file, expected PATH or REVISION:PATH"),
        ("HEAD:nowhere.json", "git shows no file 'nowhere.json' at revision 'HEAD'"),
    ],
)
def test_a_missing_file_is_named(checkout: Path, name: str, says: str) -> None:
    with pytest.raises(ResultsError, match=says):
        results.load(name)
