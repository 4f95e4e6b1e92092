"""From a kernel's file and name to a function of a device: compiled once, kept in a folder; and the reasons why a
device cannot run any. With a stand-in for the driver and one for the compiler."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.backends import needs_triton
from helpers.cuda_driver import StandIn

from softclip_kernels import info
from softclip_kernels.backends.cuda import Unavailable, cache, driver, kernels, launch, sources

GPU, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)
DEFINES = (("WIDTH", 512), ("TYPE", "bf16"))


class Compiler:
    """Stands for NVRTC."""

    version = (12, 8)

    def __init__(self):
        self.compiled = []

    def compile(self, name, text, headers, options):
        self.compiled.append((name, text, dict(headers), list(options)))
        return f"cubin {len(self.compiled)}".encode()


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """The folder with the kernels' text."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "softmax.cu").write_text("// kernels")
    (folder / "ptx.cuh").write_text("// a header")
    (folder / "notes.md").write_text("no text of a kernel")
    monkeypatch.setattr(sources, "FOLDERS", (tmp_path / "missing", folder))
    sources.texts.cache_clear()
    yield folder
    sources.texts.cache_clear()


@pytest.fixture
def machine(monkeypatch, tmp_path, texts):
    """Two Hopper GPUs with a driver and a compiler, and a new process on it. Returns driver and compiler."""
    stand_in, compiler = StandIn({"statistics": (8,), "gradient": (8, 8)}), Compiler()
    opened = driver.Driver(stand_in)
    for module in (kernels, launch):
        monkeypatch.setattr(module, "driver", lambda: opened)
    monkeypatch.setattr(kernels, "nvrtc", lambda: compiler)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SOFTCLIP_CUDA", raising=False)
    new_process(monkeypatch)
    return stand_in, compiler


def new_process(monkeypatch):
    sources.texts.cache_clear()
    for name in ("_modules", "_functions", "_reasons"):
        monkeypatch.setattr(kernels, name, {})


def get(name="statistics", defines=DEFINES, shared_bytes=1000, device=GPU):
    return kernels.kernel("softmax.cu", name, defines, shared_bytes, device)


# Compiled once.


def test_a_kernel_is_compiled_with_its_macros_and_headers(machine):
    stand_in, compiler = machine
    function = get()
    assert (function.name, function.shared_bytes, function.parameter_bytes) == ("statistics", 1000, [8])
    ((name, text, headers, options),) = compiler.compiled
    assert (name, text, headers) == ("softmax.cu", "// kernels", {"ptx.cuh": "// a header"})
    assert options == [*kernels.OPTIONS, "--define-macro=WIDTH=512", "--define-macro=TYPE=bf16"]
    assert "--gpu-architecture=sm_90a" in options
    assert stand_in.modules == [(1000, b"cubin 1")]


def test_a_device_has_one_module_of_a_file_and_its_macros(machine):
    stand_in, compiler = machine
    assert get() is get()
    del stand_in.called[:]
    get()
    assert stand_in.called == []
    assert get("gradient").name == "gradient" and get("gradient").module is get().module
    assert get(shared_bytes=2000) is not get() and get(shared_bytes=2000).module is get().module
    other = get(defines=(("WIDTH", 256), ("TYPE", "bf16")))
    assert other.module is not get().module
    assert get(device=OTHER).module.context == 1001 and get(device=torch.device("cuda")) is get(device=OTHER)
    assert stand_in.modules == [(1000, b"cubin 1"), (1000, b"cubin 2"), (1001, b"cubin 1")]
    assert len(compiler.compiled) == 2


def test_whether_one_is_loaded_can_be_asked(machine):
    stand_in, compiler = machine
    given = ("softmax.cu", "statistics", DEFINES, 1000)
    assert not kernels.loaded(GPU, *given) and not stand_in.modules and not compiler.compiled
    get()
    assert kernels.loaded(GPU, *given) and not kernels.loaded(OTHER, *given)
    assert not kernels.loaded(GPU, "softmax.cu", "gradient", DEFINES, 1000)


def test_threads_that_ask_at_once_wait_for_one_compilation(machine):
    stand_in, compiler = machine
    compile_now = compiler.compile

    def slowly(*arguments):
        time.sleep(0.2)
        return compile_now(*arguments)

    compiler.compile = slowly
    with ThreadPoolExecutor(4) as pool:
        found = {id(function) for function in pool.map(lambda _: get(), range(4))}
    assert len(compiler.compiled) == len(stand_in.modules) == 1 and len(found) == 1


def test_another_process_compiles_nothing(machine, monkeypatch):
    stand_in, compiler = machine
    get()
    new_process(monkeypatch)
    get()
    assert len(compiler.compiled) == 1 and stand_in.modules == [(1000, b"cubin 1")] * 2


def test_what_is_kept_belongs_to_all_that_it_was_made_of(machine, texts, monkeypatch):
    """Another text, header, option or compiler is another cubin."""
    _, compiler = machine

    def change(what):
        if what in ("softmax.cu", "ptx.cuh"):
            (texts / what).write_text("// changed")
        elif what == "a new header":
            (texts / "new.cuh").write_text("")
        elif what == "options":
            monkeypatch.setattr(kernels, "OPTIONS", (*kernels.OPTIONS, "--another"))
        else:
            compiler.version = (12, 9)

    get()
    for count, what in enumerate(("softmax.cu", "ptx.cuh", "a new header", "options", "compiler"), start=2):
        new_process(monkeypatch)
        change(what)
        get()
        assert len(compiler.compiled) == count, what
    (texts / "notes.md").write_text("changed")
    new_process(monkeypatch)
    get()
    assert len(compiler.compiled) == count


def test_a_file_that_is_not_there_is_an_error(machine):
    for file in ("softmin.cu", "ptx.cuh"):
        with pytest.raises(ValueError, match=f"no kernels in '{file}'; there are softmax.cu"):
            kernels.kernel(file, "statistics", (), 0, GPU)


# The folder.


@needs_triton
def test_the_folder_is_beside_the_tuners_choices(machine):
    from softclip_kernels.backends.triton import tuning

    get()
    (kept,) = cache.folder().iterdir()
    assert cache.folder() == tuning.path().parent / "cubins" and len(kept.name) == 64


@pytest.mark.parametrize("damage", ("empty", "cut off", "one bit", "a folder"))
def test_a_damaged_file_is_compiled_again_and_replaced(machine, monkeypatch, caplog, damage):
    _, compiler = machine
    get()
    (path,) = cache.folder().iterdir()
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        changed = bytes([*content[:-1], content[-1] ^ 1])
        path.write_bytes({"empty": b"", "cut off": content[:-1], "one bit": changed}[damage])
    new_process(monkeypatch)
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        assert get().module.handle
    assert len(compiler.compiled) == 2 and "ignored" in caplog.messages[0]
    if damage != "a folder":
        assert path.read_bytes()[32:] == b"cubin 2"
    assert [each for each in cache.folder().iterdir() if each.suffix == ".tmp"] == []


def test_a_folder_that_cannot_be_written_is_no_error(machine, monkeypatch, tmp_path, caplog):
    _, compiler = machine
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "softclip_kernels"):
        get()
    assert len(compiler.compiled) == 1 and "is not written" in caplog.messages[-1]


def test_no_home_is_no_error(machine, monkeypatch):
    _, compiler = machine

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    get()
    assert len(compiler.compiled) == 1


def test_a_compiler_that_fails_leaves_nothing(machine):
    _, compiler = machine
    compiler.compile = lambda *_: (_ for _ in ()).throw(ValueError("of a test"))
    with pytest.raises(ValueError, match="of a test"):
        get()
    assert not cache.folder().exists() and kernels._modules == {}


def _keep_many(folder, content):
    os.environ["XDG_CACHE_HOME"] = folder
    for index in range(50):
        kept = cache.cubin(str(index % 5), lambda: content * 10_000)
        assert kept in (b"a" * 10_000, b"b" * 10_000)


def test_two_processes_that_write_at_once_leave_whole_files(monkeypatch, tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_keep_many, args=(str(tmp_path), content)) for content in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = sorted(cache.folder().iterdir())
    assert [file.name for file in files] == list("01234")
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    for name in "01234":
        assert cache.cubin(name, bytes) in (b"a" * 10_000, b"b" * 10_000)


# Why not.


def test_a_hopper_gpu_with_driver_and_compiler_can(machine):
    assert kernels.why_not(GPU) is None and kernels.why_not(torch.device("cuda")) is None
    assert kernels.versions() == {"driver": "12.8", "NVRTC": "12.8"}


def unavailable(reason):
    def raising():
        raise Unavailable(reason)

    return raising


@pytest.mark.parametrize(
    ("changed", "reason"),
    (
        ({"capability": (8, 0)}, "compute capability 9.0, and this GPU has 8.0"),
        ({"capability": (9, 1)}, "compute capability 9.0, and this GPU has 9.1"),
        ({"capability": (10, 0)}, "compute capability 9.0, and this GPU has 10.0"),
        ({"hip": "6.4"}, "this torch is built for AMD's"),
        ({"driver": unavailable("there is no NVIDIA driver")}, "there is no NVIDIA driver"),
        ({"nvrtc": unavailable("there is no compiler")}, "there is no compiler"),
        ({"FOLDERS": ()}, "the text of the CUDA kernels is in none of"),
        ({"SOFTCLIP_CUDA": "0"}, "SOFTCLIP_CUDA=0 turns them off"),
    ),
    ids=lambda each: each if isinstance(each, str) else ",".join(each),
)
def test_what_is_missing_is_the_reason(machine, monkeypatch, changed, reason):
    for name, value in changed.items():
        if name == "capability":
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=value: value)
        elif name == "hip":
            monkeypatch.setattr(torch.version, "hip", value)
        elif name == "SOFTCLIP_CUDA":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr(sources if name == "FOLDERS" else kernels, name, value)
    sources.texts.cache_clear()
    assert reason in kernels.why_not(GPU)


def test_what_is_no_gpu_is_not_asked(machine, monkeypatch):
    for name in ("get_device_capability", "current_device"):
        monkeypatch.setattr(torch.cuda, name, unavailable("asked"))
    assert kernels.why_not(torch.device("cpu")) == "they run on GPUs, not on cpu"


def test_an_older_gpu_opens_no_library(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for name in ("driver", "nvrtc"):
        monkeypatch.setattr(kernels, name, lambda: pytest.fail("opened"))
    assert "has 8.9" in kernels.why_not(GPU)


def test_a_device_is_asked_once(machine, monkeypatch):
    assert kernels.why_not(GPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", unavailable("asked again"))
    assert kernels.why_not(GPU) is None
    monkeypatch.setenv("SOFTCLIP_CUDA", "0")  # which may change
    assert "SOFTCLIP_CUDA=0" in kernels.why_not(GPU)


@pytest.mark.parametrize(("value", "forced"), (("", False), ("0", False), ("1", True)))
def test_the_variable_has_three_values(machine, monkeypatch, value, forced):
    monkeypatch.setenv("SOFTCLIP_CUDA", value)
    assert kernels.forced() is forced
    assert (kernels.why_not(GPU) is None) is (value != "0")


@pytest.mark.parametrize("value", ("2", "off", "true", " 1"))
def test_another_value_is_an_error(machine, monkeypatch, value):
    monkeypatch.setenv("SOFTCLIP_CUDA", value)
    for question in (kernels.forced, lambda: kernels.why_not(GPU), lambda: kernels.why_not(torch.device("cpu"))):
        with pytest.raises(ValueError, match=f"SOFTCLIP_CUDA='{value}'; allowed: unset or ''.*'0'.*'1'"):
            question()


# The text.


def test_the_text_is_that_of_the_source_tree():
    sources.texts.cache_clear()
    folder = ROOT / "csrc" / "cuda"
    files = [path.name for suffix in ("*.cu", "*.cuh") for path in folder.glob(suffix)]
    assert sorted(sources.texts()) == sorted(files) and files
    assert all(sources.texts()[name] == (folder / name).read_text() for name in files)


def test_a_package_has_its_own(machine, monkeypatch, texts, tmp_path):
    (tmp_path / "missing").mkdir()
    for name in ("packaged.cu", "packaged.md"):
        (tmp_path / "missing" / name).write_text("// packaged")
    sources.texts.cache_clear()
    assert sources.texts() == {"packaged.cu": "// packaged"}


# The report.


def test_the_report_says_whether_they_can_be_used(machine, monkeypatch):
    monkeypatch.setattr(info, "_devices", lambda: {"cpu": "a CPU", "cuda:0": "a GPU"})
    monkeypatch.setattr(info, "_probe", lambda device, dtype: real_probe("cpu", dtype))
    found = info.report()
    assert found["cuda kernels"] == {
        "why_not": {"cpu": "they run on GPUs, not on cpu", "cuda:0": None},
        "versions": {"driver": "12.8", "NVRTC": "12.8"},
    }
    text = info._text(found)
    assert "CUDA kernels (driver 12.8, NVRTC 12.8)\n  cpu: not: they run on GPUs, not on cpu\n  cuda:0: can run" in text
    monkeypatch.setenv("SOFTCLIP_CUDA", "yes")
    assert "SOFTCLIP_CUDA='yes'; allowed" in info.report()["cuda kernels"]["why_not"]["cuda:0"]


real_probe = info._probe


def test_without_a_gpu_the_report_opens_no_library():
    code = """
import json, torch
torch.cuda.is_available = lambda: False
from softclip_kernels import info
found = info.report()
print(json.dumps([found["cuda kernels"], torch.cuda.is_initialized()]))
print(any("libcuda.so" in line or "libnvrtc" in line for line in open("/proc/self/maps")))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    report, opened = run.stdout.splitlines()
    assert json.loads(report) == [{"why_not": {"cpu": "they run on GPUs, not on cpu"}, "versions": {}}, False]
    assert opened == "False"
