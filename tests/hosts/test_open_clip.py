"""open_clip 3.3's own main with our loss, on digits: one process and two, accumulation 1 and 4, distillation, PSD."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers.hosts import open_clip_runs as runs
from helpers.hosts.recording import furthest
from helpers.hosts.saved import growth

from softclip_kernels import Hard, ProgressiveSelfDistillation, schedules
from softclip_kernels.integrations.hooks import UnknownHost

open_clip = pytest.importorskip("open_clip")
trainer = pytest.importorskip("open_clip_train.main")
if hasattr(trainer, "create_task"):
    pytest.skip("the installed open_clip makes tasks: tests/hosts/test_open_clip_4.py", allow_module_level=True)

from softclip_kernels.integrations import open_clip as adapter  # noqa: E402  (after its host)

SAME = 1e-6  # of any parameter after 20 steps of SGD with momentum
EXACT = 1e-5  # of a gradient against float64
OURS = ["softclip_kernels.integrations.open_clip.ContrastiveLoss"]
MAKE = ["--target", "helpers.hosts.open_clip_runs:make"]
BOTH = ("--local-loss", "--gather-with-grad")
FOUR = ("--accum-freq", "4")


def distilled(folder):
    return ("--distill-model", "tiny-teacher", "--distill-pretrained", str(folder / "teacher.pt"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process. Batches of 32, or four of 8 accumulated."""
    folder = tmp_path_factory.mktemp("alone")

    def run(name, own, *more, **options):
        return runs.plan(folder, name, own, *more, **options)

    saved = str(folder / "logs" / "host-epoch" / "checkpoints" / "epoch_1.pt")
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
            run("host-bias", None, model="tiny-bias"),
            run("ours-bias", [], model="tiny-bias"),
            run("psd", MAKE, dense="psd"),
            run("psd-4", MAKE, *FOUR, **accumulated, dense="psd"),
            run("ramp", ["--psd", "0.5", "--psd-steps", "10"]),
            run("host-epoch", None, epochs=1),
            run("psd-after-host", MAKE, "--resume", saved, dense=None),
            run("adamw", [], "--opt", "adamw", "--lr", "0.001", "--precision", "amp", dense=None),
        ],
    )
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes. Batches of 16 each, or four of 4 accumulated."""
    folder = tmp_path_factory.mktemp("pair")

    def run(name, own, *more, batch=16, **options):
        return runs.plan(folder, name, own, *more, batch=batch, **options)

    saved = str(folder / "logs" / "psd-4" / "checkpoints" / "epoch_1.pt")
    accumulated = {"batch": 4, "accumulated": 4}
    runs.start(
        folder,
        2,
        [
            run("host", None, *BOTH),
            run("ours", []),
            run("ours-4", [], *FOUR, **accumulated),
            run("host-distill", None, *BOTH, *distilled(folder), dense="distill"),
            run("ours-distill", [], *distilled(folder), dense="distill"),
            run("psd", MAKE, dense="psd"),
            run("psd-4", MAKE, *FOUR, **accumulated, epochs=1, dense="psd"),
            run("psd-4-resumed", MAKE, *FOUR, "--resume", saved, **accumulated, dense=None),
        ],
    )
    return folder


def assert_alike(folder, ours, host):
    ours, host = runs.load(folder, ours), runs.load(folder, host)
    assert ours.steps == host.steps == 20
    assert furthest(ours, host) < SAME


@pytest.mark.parametrize("name", ("ours", "ours-4", "ours-distill", "ours-bias", "psd", "psd-4", "ramp"))
def test_the_first_gradients_are_those_of_float64(alone, name):
    exact = runs.load(alone, name).exact
    assert len(exact) > 30
    assert {key: value for key, value in exact.items() if abs(value[0] - 1) > EXACT or value[1] > EXACT} == {}


@pytest.mark.parametrize("name", ("ours", "ours-4", "ours-distill", "psd", "psd-4"))
@pytest.mark.parametrize("rank", (0, 1))
def test_the_first_gradients_over_ranks_are_those_of_float64(pair, name, rank):
    exact = runs.load(pair, name, rank).exact
    assert {key: value for key, value in exact.items() if abs(value[0] - 1) > EXACT or value[1] > EXACT} == {}


@pytest.mark.parametrize(
    ("ours", "host"),
    (("ours", "host"), ("ours-4", "host"), ("ours-distill", "host-distill"), ("ours-bias", "host-bias")),
)
def test_parameters_are_the_hosts(alone, ours, host):
    assert_alike(alone, ours, host)
    assert runs.load(alone, "ours").kinds == OURS
    assert runs.load(alone, "host").losses[-1] < runs.load(alone, "host").losses[0] - 0.3  # something was learned


@pytest.mark.parametrize(("ours", "host"), (("ours", "host"), ("ours-4", "host"), ("ours-distill", "host-distill")))
def test_parameters_over_ranks_are_those_of_the_host_with_both_flags(pair, ours, host):
    assert_alike(pair, ours, host)
    first, second = (runs.load(pair, ours, rank).parameters for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_hosts_own_accumulation_counts_the_scale_four_times(alone):
    exact = runs.load(alone, "host-4").exact
    assert exact["logit_scale"][0] == pytest.approx(4, abs=1e-4)
    assert exact["visual.proj"][0] == pytest.approx(1, abs=1e-4)


def test_distillation_logs_the_hosts_two_losses(alone):
    for name in ("ours-distill", "host-distill"):
        log = (alone / "logs" / name / "out.log").read_text()
        assert "Contrastive_loss: 3.8" in log and "Distill_loss: 3." in log
    assert runs.load(alone, "ours-distill").losses == pytest.approx(runs.load(alone, "host-distill").losses, abs=2e-6)


def test_a_bias_is_connected_and_learns_nothing(alone):
    ours = runs.load(alone, "ours-bias")
    assert ours.gradients["logit_bias"] == 0
    assert ours.parameters["logit_bias"] == -2.0


def test_every_step_draws_once_whatever_is_accumulated_for_it(alone, pair):
    assert runs.load(alone, "psd").seen == [(step, 32) for step in range(20)]
    assert runs.load(alone, "psd-4").seen == [(step, 32) for step in range(20) for _ in range(4)]
    assert furthest(runs.load(alone, "psd-4"), runs.load(alone, "psd")) < SAME
    assert furthest(runs.load(alone, "psd"), runs.load(alone, "ours")) > 1e-3
    for rank in (0, 1):
        assert runs.load(pair, "psd", rank).seen == [(step, 32) for step in range(20)]


def test_psd_trains(alone):
    ramp = runs.load(alone, "ramp")
    assert ramp.count == 19  # before the last of 20 steps
    assert ramp.losses[0] == pytest.approx(runs.load(alone, "ours").losses[0], abs=1e-6)  # no share yet
    assert ramp.losses[-1] < ramp.losses[0] - 0.3
    assert furthest(ramp, runs.load(alone, "ours")) > 1e-4


def test_a_resumed_run_goes_on_with_the_steps_and_the_scales_cure(pair):
    """Accumulated, saved after an epoch and resumed, against 20 steps at a time without either."""
    resumed = runs.load(pair, "psd-4-resumed")
    assert resumed.seen == [(step, 32) for step in range(10, 20) for _ in range(4)]
    assert furthest(resumed, runs.load(pair, "psd")) < SAME


def test_a_run_resumed_from_the_hosts_own_takes_the_hosts_count(alone):
    assert runs.load(alone, "psd-after-host").seen == [(step, 32) for step in range(10, 20)]
    assert "the checkpoint does not count" in (alone / "logs" / "psd-after-host" / "out.log").read_text()


def test_the_hosts_default_precision_and_optimizer_train(alone):
    adamw = runs.load(alone, "adamw")
    assert adamw.kinds == OURS and adamw.losses[-1] < adamw.losses[0] - 0.3


def test_nobody_is_warned_of_a_right_run(alone, pair):
    for folder, name in ((alone, "ours"), (alone, "psd-4"), (alone, "ours-distill"), (pair, "ours")):
        assert [one for one in runs.load(folder, name).warnings if "pin_memory" not in one] == []


@pytest.fixture
def hooked(tmp_path):
    """The host as it was, afterwards; flags that would start a run in `tmp_path`."""
    yield ["--logs", str(tmp_path / "logs"), "--dataset-type", "synthetic", "--device", "cpu"]
    adapter.uninstall()


def test_flags_of_other_losses_are_refused_before_anything_starts(hooked, tmp_path):
    adapter.install()
    for more, told in (
        (["--siglip"], "--siglip trains a sigmoid loss"),
        (["--model", "coca_ViT-B-32"], "--model coca_ViT-B-32: CoCa's loss has a captioning part"),
        (["--horovod"], "--horovod: SoftClipLoss communicates by torch.distributed"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer.main([*hooked, *more])
    assert not (tmp_path / "logs").exists()


ARGS = Namespace(distill=False, accum_freq=1, local_loss=True, gather_with_grad=True, rank=0, world_size=1)


def test_the_ranks_that_the_host_counts_must_be_the_jobs(hooked):
    adapter.install()
    assert trainer.create_loss(ARGS).group is None
    with pytest.raises(ValueError, match=r"world_size=2, but torch\.distributed is not initialized"):
        trainer.create_loss(Namespace(**{**vars(ARGS), "world_size": 2}))


def test_an_unknown_host_is_an_error_and_stays_as_it_is(hooked, monkeypatch):
    originals = {name: getattr(trainer, name) for name in ("parse_args", "train_one_epoch")}
    monkeypatch.setattr(trainer, "create_loss", lambda args, model: None)
    with pytest.raises(UnknownHost, match=r"create_loss takes \(args, model\); this adapter knows open_clip_torch 3.3"):
        adapter.install(lambda step, n: Hard())
    monkeypatch.delattr(trainer, "create_loss")
    with pytest.raises(UnknownHost, match="create_loss is not there"):
        adapter.install()
    assert all(getattr(trainer, name) is original for name, original in originals.items())


def test_installing_again_replaces_and_uninstalling_restores(hooked):
    originals = {name: getattr(trainer, name) for name in ("parse_args", "create_loss", "train_one_epoch")}
    adapter.install(lambda step, n: Hard())
    assert all(getattr(trainer, name) is not original for name, original in originals.items())
    adapter.install(Hard(smoothing=0.1))
    assert trainer.create_loss(ARGS).target == Hard(smoothing=0.1)
    assert trainer.train_one_epoch is originals["train_one_epoch"]  # nobody asks for steps
    with pytest.raises(TypeError, match=r"target is a ProgressiveSelf.*allowed: None, a Target, or make\(step, n\)"):
        adapter.install(ProgressiveSelfDistillation(schedules.Constant(0.5)))
    adapter.uninstall()
    assert all(getattr(trainer, name) is original for name, original in originals.items())


@pytest.mark.parametrize(
    ("own", "told"),
    (
        (["--psd", "0.4"], "--psd ALPHA and --psd-steps N go together"),
        (["--psd-steps", "9"], "--psd ALPHA and --psd-steps N go together"),
        (["--psd", "0.4", "--psd-steps", "9", "--target", "json:loads"], "give --psd or --target, not both"),
        (["--target", "json"], "--target json: allowed is MODULE:MAKE"),
        (["--pds", "0.4"], "unrecognized arguments: --pds"),
    ),
)
def test_wrong_flags_of_the_launcher_are_refused(own, told, capsys):
    with pytest.raises(SystemExit):
        adapter.main([*own, "--", "--model", "ViT-B-32"])
    assert told in capsys.readouterr().err


def test_a_share_above_1_is_refused(hooked):
    with pytest.raises(ValueError, match=r"end=1\.5 must lie in"):
        adapter.main(["--psd", "1.5", "--psd-steps", "9", "--", *hooked])


def test_what_is_saved_for_the_backward_pass_grows_linearly(hooked, tmp_path):
    runs.write_models(tmp_path)
    open_clip.add_model_config(tmp_path / "tiny.json")
    model = open_clip.create_model("tiny", output_dict=True)
    adapter.install(lambda step, n: runs.make(0, n))
    losses = {"psd": trainer.create_loss(Namespace(**{**vars(ARGS), "accum_freq": 4}))}
    adapter.install()
    losses["clip"] = trainer.create_loss(ARGS)
    losses["distill"] = trainer.create_loss(Namespace(**{**vars(ARGS), "distill": True}))

    def step(loss, n):
        images, texts = torch.rand(n, 3, 32, 32), torch.randint(1, 49000, (n, 16))
        out = model(images, texts)
        if loss is losses["distill"]:
            out |= {f"dist_{name}": value.detach() for name, value in out.items()}
        return loss(**out, output_dict=True)

    sizes = (256, 512, 1024)
    for loss in losses.values():
        assert growth(sizes, lambda n, loss=loss: step(loss, n)) == pytest.approx(1, abs=0.01)
    assert growth(sizes, lambda n: step(open_clip.ClipLoss(), n)) > 1.03  # what the bound sees


def test_the_command_line_trains_under_torchrun(tmp_path):
    """With --logs first, which torchrun takes for an option of its own where no -- stands before it."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_cfg": runs.TINY, "preprocess_cfg": {"mean": [0.7] * 3, "std": [0.2] * 3}}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    runs.write_csv(tmp_path, 64)
    flags = runs.flags(tmp_path, 16, f"local-dir:{model}", 1)
    flags = [*flags[flags.index("--logs") :], *flags[: flags.index("--logs")], "--name", "run"]
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("-m", "helpers.hosts.on_cpu", "-m", adapter.__name__),
            *("--psd", "0.5", "--psd-steps", "2", "--", *flags),
        ],
        env={**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "the loss is ContrastiveLoss(target=EachStep(" in log and "over 2 processes" in log
    state = torch.load(tmp_path / "logs" / "run" / "checkpoints" / "epoch_1.pt")["optimizer"]
    assert state["param_groups"][0]["softclip_kernels_steps"] == 2


def test_flags_without_a_separator_are_the_hosts():
    """torchrun drops a -- that comes first."""
    own, flags = adapter.split_flags(["--logs", "x", "--psd", "0.4", "--psd-steps", "9", "--lr", "1"])
    assert (own.psd, flags) == (0.4, ["--logs", "x", "--lr", "1"])
    own, flags = adapter.split_flags(["--psd", "0.4", "--psd-steps", "9", "--", "--logs", "x", "--lr", "1"])
    assert (own.psd, flags) == (0.4, ["--logs", "x", "--lr", "1"])
