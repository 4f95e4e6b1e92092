"""open_clip 4's own main with our loss: tasks, FSDP2, compilation. The version is in no registry: the environment
variable SOFTCLIP_OPEN_CLIP_4 names a folder with its packages open_clip and open_clip_train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.hosts import open_clip_runs as runs
from helpers.hosts.recording import furthest

SOURCE = os.environ.get("SOFTCLIP_OPEN_CLIP_4", "")
pytest.importorskip("open_clip")
if not SOURCE:
    pytest.skip("open_clip 4 not run: SOFTCLIP_OPEN_CLIP_4 names no source of it", allow_module_level=True)

SAME = 1e-6  # of any parameter after 20 steps of SGD with momentum
EXACT = 1e-5  # of a gradient against float64
OURS = ["softclip_kernels.integrations.open_clip.ContrastiveLoss"]
MAKE = ["--target", "helpers.hosts.open_clip_runs:make"]
BOTH = ("--local-loss", "--gather-with-grad")
FOUR = ("--accum-freq", "4")
SHARDED = ("--fsdp", "--fsdp-checkpoint", "sharded")
COMPILED = {"observed": False, "dense": None}


def distilled(folder):
    return ("--distill-model", "tiny-teacher", "--distill-pretrained", str(folder / "teacher.pt"))


def compiled(strategy):
    return ("--torchcompile", "--torchcompile-strategy", strategy)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process. Batches of 32, or four of 8 accumulated."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name, own, *more, **options):
        return runs.plan(folder, name, own, *more, **options)

    accumulated = {"batch": 8, "accumulated": 4}
    runs.start(
        folder,
        1,
        [
            run("host", None),
            run("ours", []),
            run("ours-4", [], *FOUR, **accumulated),
            run("host-4", None, *FOUR, **accumulated),
            run("host-distill", None, *distilled(folder), dense="distill"),
            run("ours-distill", [], *distilled(folder), dense="distill"),
            run("psd", MAKE, dense="psd"),
            run("psd-4", MAKE, *FOUR, **accumulated, dense="psd"),
        ],
        SOURCE,
    )
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes. Batches of 16 each, or four of 4 accumulated."""
    folder = tmp_path_factory.mktemp("pair")

    def run(name, own, *more, batch=16, **options):
        return runs.plan(folder, name, own, *more, batch=batch, **options)

    accumulated = {"batch": 4, "accumulated": 4}
    checkpoints = folder / "logs"
    runs.start(
        folder,
        2,
        [
            run("host", None, *BOTH),
            run("ours", []),
            run("ours-4", [], *FOUR, **accumulated),
            run("fsdp", [], "--fsdp"),
            run("fsdp-4", [], "--fsdp", *FOUR, **accumulated),
            run("host-distill", None, *BOTH, *distilled(folder), dense="distill"),
            run("ours-distill", [], *distilled(folder), dense="distill"),
            run("psd", MAKE, dense="psd"),
            run("psd-4", MAKE, *FOUR, **accumulated, epochs=1, dense="psd"),
            run("psd-4-resumed", MAKE, *FOUR, "--resume", str(checkpoints / "psd-4/checkpoints/epoch_1.pt"),
                **accumulated, dense=None),
            run("sharded", MAKE, *SHARDED, epochs=1, dense="psd"),
            run("sharded-resumed", MAKE, *SHARDED, "--resume", str(checkpoints / "sharded/checkpoints/epoch_1"),
                dense=None),
        ],
        SOURCE,
    )  # fmt: skip
    return folder


def assert_exact(run):
    assert len(run.exact) > 30
    assert {key: value for key, value in run.exact.items() if abs(value[0] - 1) > EXACT or value[1] > EXACT} == {}


def assert_alike(folder, ours, host, within=SAME):
    ours, host = runs.load(folder, ours), runs.load(folder, host)
    assert ours.steps == host.steps == 20
    host.parameters = {name: value.reshape(ours.parameters[name].shape) for name, value in host.parameters.items()}
    assert furthest(ours, host) < within


def in_host(script):
    """What a Python of its own prints that sees open_clip 4."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join((SOURCE, str(tests), str(tests.parent)))
    begin = "from helpers.hosts import on_cpu; on_cpu.prepare()\n"
    begin += "import open_clip_train.main as trainer\nfrom softclip_kernels.integrations import open_clip as adapter\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + script],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout + done.stderr


def test_this_is_the_known_host_and_others_are_errors():
    printed = in_host(
        "from argparse import Namespace\n"
        "import torch\n"
        "for hook in adapter.HOOKS: hook.find()\n"
        "print('hooks', adapter.HOOKS is adapter.HOOKS_4)\n"
        "adapter.install()\n"
        "args = Namespace(distill=False, siglip=True, model='tiny', rank=0, world_size=1, loss_dist_impl=None)\n"
        "try: trainer.create_task(args, model=torch.nn.Linear(1, 1))\n"
        "except ValueError as error: print(error)\n"
        "try: trainer.main(['--model', 'coca_ViT-B-32'])\n"
        "except ValueError as error: print(error)\n"
        "adapter.uninstall()\n"
        "trainer.create_task = lambda args, model: None\n"
        "adapter.install()\n"
    )
    assert "hooks True" in printed
    assert "--model tiny trains by a SigLIPTask; allowed: CLIPTask and DistillCLIPTask" in printed
    assert "--model coca_ViT-B-32: CoCa's loss has a captioning part" in printed
    assert "UnknownHost: open_clip_train.main:create_task takes (args, model); this adapter knows" in printed


@pytest.mark.parametrize("name", ("ours", "ours-4", "ours-distill", "psd", "psd-4"))
def test_the_first_gradients_are_those_of_float64(alone, name):
    assert_exact(runs.load(alone, name))


@pytest.mark.parametrize("name", ("ours", "ours-4", "fsdp", "fsdp-4", "ours-distill", "psd", "psd-4", "sharded"))
@pytest.mark.parametrize("rank", (0, 1))
def test_the_first_gradients_over_ranks_are_those_of_float64(pair, name, rank):
    assert_exact(runs.load(pair, name, rank))


@pytest.mark.parametrize(("ours", "host"), (("ours", "host"), ("ours-4", "host"), ("ours-distill", "host-distill")))
def test_parameters_are_the_hosts(alone, ours, host):
    assert_alike(alone, ours, host)
    assert runs.load(alone, "ours").kinds == OURS
    assert runs.load(alone, "host").losses[-1] < runs.load(alone, "host").losses[0] - 0.3  # something was learned


@pytest.mark.parametrize(
    ("ours", "host"),
    (
        ("ours", "host"),
        ("ours-4", "host"),
        ("fsdp", "host"),
        ("fsdp-4", "host"),
        ("ours-distill", "host-distill"),
    ),
)
def test_parameters_over_ranks_are_those_of_the_host_with_both_flags(pair, ours, host):
    assert_alike(pair, ours, host)


def test_the_hosts_own_accumulation_counts_the_scale_four_times(alone):
    exact = runs.load(alone, "host-4").exact
    assert exact["logit_scale"][0] == pytest.approx(4, abs=1e-4)
    assert exact["visual.proj"][0] == pytest.approx(1, abs=1e-4)


def test_every_step_draws_once_whatever_is_accumulated_for_it(alone):
    assert runs.load(alone, "psd").seen == [(step, 32) for step in range(20)]
    assert runs.load(alone, "psd-4").seen == [(step, 32) for step in range(20) for _ in range(4)]
    assert furthest(runs.load(alone, "psd-4"), runs.load(alone, "psd")) < SAME


def test_a_resumed_run_goes_on_with_the_steps_and_the_scales_cure(pair):
    """Accumulated, saved after an epoch and resumed, against 20 steps at a time without either."""
    assert runs.load(pair, "psd-4").seen == [(step, 32) for step in range(10) for _ in range(4)]
    resumed = runs.load(pair, "psd-4-resumed")
    assert resumed.seen == [(step, 32) for step in range(10, 20) for _ in range(4)]
    assert furthest(resumed, runs.load(pair, "psd")) < SAME


def test_a_run_resumed_from_a_sharded_checkpoint_goes_on_with_the_steps(pair):
    """Sharded checkpoints hold nothing that a new optimizer's state lacks: the host's own count is taken."""
    resumed, psd = runs.load(pair, "sharded-resumed"), runs.load(pair, "psd")
    assert resumed.seen == [(step, 32) for step in range(10, 20)]
    psd.parameters = {name: value.reshape(resumed.parameters[name].shape) for name, value in psd.parameters.items()}
    assert furthest(resumed, psd) < SAME


@pytest.mark.long
def test_a_compiled_task_trains_as_the_hosts(tmp_path):
    """Not as an eager one: compilation draws from the random numbers that shuffle the second epoch."""
    task = compiled("task")
    runs.start(
        tmp_path,
        1,
        [runs.plan(tmp_path, "host", None, *task, **COMPILED), runs.plan(tmp_path, "ours", [], *task, **COMPILED)],
        SOURCE,
    )
    assert_alike(tmp_path, "ours", "host")


@pytest.mark.long
def test_a_compiled_step_over_ranks_trains_as_the_hosts(tmp_path):
    """Tower, gathering, loss and backward in one graph: rounding of its own, beside the host's with both flags."""
    step = compiled("step")
    runs.start(
        tmp_path,
        2,
        [
            runs.plan(tmp_path, "host", None, *BOTH, *step, **COMPILED, batch=16),
            runs.plan(tmp_path, "ours", [], *step, **COMPILED, batch=16),
        ],
        SOURCE,
    )
    assert_alike(tmp_path, "ours", "host", within=1e-5)
    assert "the loss is ContrastiveLoss" in (tmp_path / "logs" / "ours" / "out.log").read_text()
