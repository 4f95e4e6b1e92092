"""The benchmarks' records: nothing that a run did not measure is lost, and nothing damaged is written over."""

from __future__ import annotations

import json

import pytest

from bench import cpu, distributed, peers, records
from bench.records import RESULTS, Record
from bench.timing import Timing

LABELS = ("table", "n")


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Makes the record of a run on a machine."""

    def make(machine="AMD EPYC, 2 CPUs", commit="a", kind="cpu"):
        monkeypatch.setattr(records, "machine", lambda device: machine)
        monkeypatch.setattr(records, "environment", lambda: {"time": f"2026-01-01T{commit}", "commit": commit})
        return Record(kind, "cpu", LABELS, tmp_path)

    return make


def _read(record):
    return json.loads(record.path.read_text())


def test_machines_and_kinds_have_files_of_their_own(record, tmp_path):
    for machine, kind in (("AMD EPYC, 2 CPUs", "cpu"), ("NVIDIA H100", "gpu"), ("AMD EPYC, 8 CPUs", "cpu")):
        record(machine, kind=kind).add([{"table": "speed", "n": 8, "seconds": 1.0}])
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    assert names == ["cpu/amd-epyc-2-cpus.json", "cpu/amd-epyc-8-cpus.json", "gpu/nvidia-h100.json"]
    assert _read(record())["machine"] == "AMD EPYC, 2 CPUs"


def test_generations_of_one_name_are_machines_of_their_own(tmp_path, monkeypatch):
    names = []
    for family, model in ((25, 17), (26, 2)):
        cpuinfo = tmp_path / "cpuinfo"
        core = f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"
        cpuinfo.write_text(f"{core}\n{core}")
        monkeypatch.setattr(records, "CPUINFO", cpuinfo)
        names.append(records.machine.__wrapped__("cpu"))  # not the one remembered
    assert [name.rpartition(",")[0] for name in names] == [
        "AMD EPYC (family 25, model 17)",
        "AMD EPYC (family 26, model 2)",
    ]
    monkeypatch.setattr(records, "CPUINFO", tmp_path / "none")
    assert records.machine.__wrapped__("cpu").endswith(" CPUs")


def test_a_partial_run_replaces_what_it_measured_and_nothing_else(record):
    first = record(commit="a")
    first.add({"table": table, "n": n, "seconds": 1.0} for table in ("speed", "memory") for n in (8, 16))
    before = first.path.read_text().splitlines()
    record(commit="b").add([{"table": "speed", "n": 16, "seconds": 2.0}, {"table": "speed", "n": 32, "seconds": 3.0}])
    found = _read(first)
    assert [(row["table"], row["n"], row["seconds"], row["run"][-1]) for row in found["rows"]] == [
        ("speed", 8, 1.0, "a"), ("speed", 16, 2.0, "b"), ("memory", 8, 1.0, "a"), ("memory", 16, 1.0, "a"),
        ("speed", 32, 3.0, "b"),
    ]  # fmt: skip
    assert [run["commit"] for run in found["runs"].values()] == ["a", "b"]
    # One row a line: what stays is not touched, but for the comma behind what was the last.
    kept = [line for line in before if '"n": 16' not in line or "memory" in line]
    after = first.path.read_text().splitlines()
    assert {line.rstrip(",") for line in kept} <= {line.rstrip(",") for line in after}
    record(commit="c").add({"table": table, "n": n} for table in ("speed", "memory") for n in (8, 16, 32))
    assert [run["commit"] for run in _read(first)["runs"].values()] == ["c"]  # runs without rows go


def test_what_was_not_measured_takes_no_place(record):
    record(commit="a").add([{"table": "speed", "n": 8, "seconds": 1.0}])
    late = record(commit="b")
    late.add([{"table": "speed", "n": n, "outcome": "no time left"} for n in (8, 16)], replace=False)
    assert [(row["n"], row["run"][-1]) for row in _read(late)["rows"]] == [(8, "a"), (16, "b")]


@pytest.mark.parametrize(
    ("git", "told", "commit"),
    ((None, None, "unknown"), (None, "", "unknown"), (None, "abc", "abc"), ("def", "", "def"), ("def", "abc", "abc")),
)
def test_the_commit_is_the_one_that_is_told_or_gits(git, told, commit, monkeypatch):
    monkeypatch.setattr(records, "_git", lambda *_: git)
    monkeypatch.delenv("SOFTCLIP_COMMIT", raising=False)
    if told is not None:
        monkeypatch.setenv("SOFTCLIP_COMMIT", told)
    assert records.environment()["commit"] == commit


def test_runs_at_once_keep_each_others_rows(record):
    one, other = record(commit="a"), record(commit="b")
    one.add([{"table": "speed", "n": 8}])
    other.add([{"table": "memory", "n": 8}])
    one.add([{"table": "speed", "n": 16}])
    assert [row["run"][-1] for row in _read(one)["rows"]] == ["a", "b", "a"]


def test_figures_keep_six_digits(record):
    made = record()
    made.add([{"table": "speed", "n": 8, "seconds": Timing.of((1.23456789,)), "goals": {"x": (True, 1e-9 / 3)}}])
    (row,) = _read(made)["rows"]
    assert row["seconds"] == {"median": 1.23457, "low": 1.23457, "high": 1.23457, "seconds": [1.23457]}
    assert row["goals"] == {"x": [True, 3.33333e-10]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    (
        (lambda text: text[:-9], "JSONDecodeError"),
        (lambda text: "", "JSONDecodeError"),
        (lambda text: "[]", "TypeError"),
        (lambda text: text.replace('"rows"', '"row"'), "KeyError"),
        (lambda text: text.replace('"kind": "cpu"', '"kind": "gpu"'), "of gpu on"),
        (lambda text: text.replace('"machine": "AMD', '"machine": "Intel'), "on Intel EPYC"),
        (lambda text: text.replace('"run": "2026', '"run": "2025'), "runs that it does not know"),
    ),
)
def test_a_damaged_record_is_refused_by_name_and_kept(record, damage, reason):
    made = record()
    made.add([{"table": "speed", "n": 8}])
    damaged = damage(made.path.read_text())
    made.path.write_text(damaged)
    for attempt in (record, lambda: made.add([{"table": "speed", "n": 16}])):
        with pytest.raises(SystemExit, match=reason) as refused:
            attempt()
        assert str(made.path) in refused.value.code and "left as it is" in refused.value.code
        assert made.path.read_text() == damaged


def test_an_interrupted_write_leaves_the_old_record(record, monkeypatch):
    made = record()
    made.add([{"table": "speed", "n": 8}])
    monkeypatch.setattr(type(made.path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = made.path.read_text()
    with pytest.raises(KeyboardInterrupt):
        made.add([{"table": "speed", "n": 16}])
    assert made.path.read_text() == before


@pytest.mark.parametrize(
    ("kind", "labels"), (("cpu", cpu.LABELS), ("distributed", distributed.LABELS), ("peers", peers.LABELS))
)
def test_the_records_in_the_tree_can_be_added_to(kind, labels, tmp_path, monkeypatch):
    paths = list((RESULTS / kind).glob("*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text())
        monkeypatch.setattr(records, "machine", lambda device, name=found["machine"]: name)
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / path.name).write_text(path.read_text())
        record = Record(kind, "cpu", labels, tmp_path)
        record.add([])
        assert record.path.name == path.name and record.path.read_text() == path.read_text()
