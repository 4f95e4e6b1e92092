"""open_clip's own main, run many times in one process or in two: `python -m helpers.hosts.open_clip_runs PLAN RANK`.

PLAN is a JSON file {"folder", "ranks", "runs": [{"name", "flags", "own", ...}]}, as `plan` makes it. Each run leaves
`NAME.RANK.pt`: a Recording, and what else `Run` records. A host whose models are registered and whose processes find
one another by a file can be started anew in the same process, and is imported once for all runs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.hosts import on_cpu
from helpers.hosts.digits import write_csv
from helpers.hosts.recording import Recorder, against
from softclip_kernels import ProgressiveSelfDistillation, schedules
from softclip_kernels.distributed.whole import full
from softclip_kernels.testing import dense_loss

PAIRS, BATCH = 320, 32  # ten steps an epoch
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32, "pool_type": "avg"},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MODELS = {
    "tiny": TINY,
    "tiny-bias": {**TINY, "init_logit_bias": -2.0},
    "tiny-teacher": {**TINY, "embed_dim": 24, "init_logit_scale": 3.5},
}
SGD = ("--opt", "timm/sgd", "--momentum", "0.9", "--lr", "0.004")
SEED = 5

seen: list[tuple[int, int]] = []  # the calls of `make`


def make(step: int, n: int) -> Any:
    """For --target: progressive self-distillation with half of the pairs from the first step on."""
    seen.append((step, n))
    return ProgressiveSelfDistillation(schedules.Constant(0.5), seed=SEED).at(step, n)


def write_models(folder: Path) -> None:
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))


def flags(folder: Path, batch: int = BATCH, model: str = "tiny", epochs: int = 2) -> list[str]:
    """What every run has: pictures as they are (a crop of all), fp32, a constant learning rate."""
    return [
        *("--train-data", str(folder / "pairs.csv"), "--dataset-type", "csv", "--model", model, "--device", "cpu"),
        *("--batch-size", str(batch), "--epochs", str(epochs), "--workers", "0", "--precision", "fp32"),
        *("--lr-scheduler", "const", "--warmup", "0", "--logs", str(folder / "logs"), "--save-frequency", "0"),
        *("--aug-cfg", "scale=(1.0,1.0)", "--image-mean", *["0.7"] * 3, "--image-std", *["0.2"] * 3),
    ]


def plan(folder: Path, name: str, own: list[str] | None, *more: str, **options: Any) -> dict[str, Any]:
    """A run under SGD. `own`: the launcher's flags, None for the host as it is; `more`: flags of the host. options:
    batch, model, epochs; accumulated: calls of the loss a step; dense: what the first step is compared with in float64,
    "clip", "psd", "distill" or None; observed: whether modules have hooks, which no compiled one should."""
    made = {key: options.pop(key) for key in ("batch", "model", "epochs") if key in options}
    return {"name": name, "own": own, "flags": [*flags(folder, **made), *SGD, *more], **options}


def load(folder: Path, name: str, rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(**torch.load(folder / f"{name}.{rank}.pt"))


def start(folder: Path, ranks: int, runs: list[dict[str, Any]], path: str = "") -> None:
    """Run them, in as many processes as there are ranks; raise what they say if one fails. `path` comes first on the
    processes' PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pairs.csv").exists():
        write_csv(folder, PAIRS)
        write_models(folder)
    plan = folder / f"plan-{ranks}.json"
    plan.write_text(json.dumps({"folder": str(folder), "ranks": ranks, "runs": runs}))
    tests = Path(__file__).parents[2]
    search = os.pathsep.join(one for one in (path, str(tests), str(tests.parent), os.environ.get("PYTHONPATH")) if one)
    processes = []
    for rank in range(ranks):
        # The host takes ranks from SLURM's names without asking for an address.
        slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(ranks), "SLURM_LOCALID": str(rank)}
        environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **(slurm if ranks > 1 else {})}
        with (folder / f"output-{ranks}-{rank}.txt").open("w") as output:
            command = (sys.executable, "-m", "helpers.hosts.open_clip_runs", str(plan), str(rank))
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            if process.wait(timeout=500):
                raise AssertionError((folder / f"output-{ranks}-{rank}.txt").read_text()[-6000:])
    finally:
        for process in processes:
            process.kill()


class Run:
    """One run of main in this process, and what it records beside Recording: `exact`, by parameter, how far the first
    step's gradients lie from those of the whole batch in float64; `losses` by step; `kinds` of losses; `seen`, the
    calls of `make`; `warnings`; `count`, what the optimizer's own group says of its steps."""

    def __init__(self, trainer: Any, ranks: int, dense: str | None = "clip", observed: bool = True) -> None:
        self.trainer, self.ranks, self.dense, self.observed = trainer, ranks, dense, observed
        self.models: list[torch.nn.Module] = []
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.calls: list[float] = []
        self.kinds: set[str] = set()
        self.count: Any = None
        self.exact: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        host = self.trainer.create_model_and_transforms
        hook = torch.nn.modules.module.register_module_forward_hook(self._after_forward) if self.observed else None
        step = register_optimizer_step_pre_hook(self._before_step)

        def create(*arguments: Any, **options: Any) -> Any:
            made = host(*arguments, **options)
            if not self.models and self.observed:
                made[0].register_forward_pre_hook(self._before_model, with_kwargs=True)
            self.models.append(made[0])
            return made

        self.trainer.create_model_and_transforms = create
        try:
            yield
        finally:
            self.trainer.create_model_and_transforms = host
            step.remove()
            if hook is not None:
                hook.remove()

    def named(self) -> list[tuple[str, Tensor]]:
        return list(self.models[0].named_parameters())

    def _before_model(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self.exact:
            self.batches.append(given or (named["image"], named["text"]))

    def _after_forward(self, module: torch.nn.Module, given: Any, output: Any) -> None:
        if type(module).__name__.endswith("Loss"):
            self.kinds.add(f"{type(module).__module__}.{type(module).__name__}")
            self.calls.append(float(sum(value.detach() for value in output.values())))

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self.count = optimizer.param_groups[0].get("softclip_kernels_steps")
        if self.observed and self.dense and not self.exact:
            self.exact = self._against_float64()

    def _against_float64(self) -> dict[str, tuple[float, float]]:
        import open_clip

        images, texts = (torch.cat(one) for one in zip(*self.batches, strict=True))
        found = {name: full(parameter.grad).clone() for name, parameter in self.named()}
        state = {name: full(value).clone() for name, value in self.models[0].state_dict().items()}
        if self.ranks > 1:
            shares: list[Any] = [None] * self.ranks
            dist.all_gather_object(shares, (images, texts))
            images, texts = (torch.cat(one) for one in zip(*shares, strict=True))
        model = open_clip.create_model(self.args.model).double()
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
        x, y, scale = model(images.double(), texts)[:3]
        target = ProgressiveSelfDistillation(schedules.Constant(0.5), seed=SEED).at(0, len(images))
        loss = dense_loss(x, y, scale, target if self.dense == "psd" else None)
        if self.dense == "distill":
            teacher = open_clip.create_model("tiny-teacher").double().eval()
            teacher.load_state_dict(self.models[1].state_dict())
            with torch.no_grad():
                a, b, its_scale = teacher(images.double(), texts)[:3]
            t, z = its_scale * a @ b.T, scale * x @ y.T
            for one, other in ((t, z), (t.T, z.T)):
                loss = loss - 0.5 * (one.softmax(1) * other.log_softmax(1)).sum(1).mean()
        loss.backward()
        exact = {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in model.named_parameters()
        }
        return against({name: value.reshape(exact[name].shape) for name, value in found.items()}, exact)

    def __call__(self, own: list[str] | None, given: list[str], accumulated: int) -> dict[str, Any]:
        seen.clear()
        logging.getLogger().handlers.clear()
        self.args = self.trainer.parse_args(given)
        with warnings.catch_warnings(record=True) as told, self.watching(), Recorder(self.named) as recording:
            warnings.simplefilter("always")
            if own is not None:
                from softclip_kernels.integrations import open_clip as adapter

                adapter.install(adapter.target_of(adapter.split_flags([*own, "--"])[0]))
            try:
                result = self.trainer.main(given)
            finally:
                if own is not None:
                    adapter.uninstall()
        assert result is None, result
        if dist.is_initialized():
            dist.destroy_process_group()
        assert len(self.calls) % accumulated == 0, (len(self.calls), accumulated)
        recording.losses = [
            sum(self.calls[k : k + accumulated]) / accumulated for k in range(0, len(self.calls), accumulated)
        ]
        return {
            **vars(recording),
            "exact": self.exact,
            "kinds": sorted(self.kinds),
            "seen": list(seen),
            "count": self.count,
            "warnings": sorted({str(one.message) for one in told}),
        }


def main(plan: dict[str, Any], rank: int) -> None:
    on_cpu.prepare()
    folder, ranks = Path(plan["folder"]), plan["ranks"]
    import open_clip
    import open_clip_train.main as trainer

    for model in MODELS:
        open_clip.add_model_config(folder / f"{model}.json")
    if rank == 0 and not (folder / "teacher.pt").exists():
        torch.manual_seed(1)
        torch.save(open_clip.create_model("tiny-teacher").state_dict(), folder / "teacher.pt")
    for run in plan["runs"]:
        name, given = run["name"], list(run["flags"])
        if ranks > 1:
            given += ["--dist-url", f"file://{folder / (name + '.rendezvous')}"]
        given += ["--name", run.get("experiment", name)]
        watched = Run(trainer, ranks, run.get("dense", "clip"), run.get("observed", True))
        torch.save(watched(run["own"], given, run.get("accumulated", 1)), folder / f"{name}.{rank}.pt")
        del watched
        gc.collect()
        print(f"ran {name}", flush=True)


if __name__ == "__main__":
    import helpers.hosts.open_clip_runs as itself  # of which --target speaks

    itself.main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
