"""One tree's side of `python -m bench compare` and of gpu_tools/ab.py. It runs in that tree's folder, with whatever
softclip_kernels is there, and so knows the public functions only. It takes a command a line and answers in a line, all
in JSON:

    {"problem": file}   read x, y, scale and what the target is made of; {} in return
    {"result": file}    write the loss and its gradients; {}
    {"calls": number}   so many forward and backward passes; {"seconds": those of one}

What fails is answered by {"error": message}. The first line says which softclip_kernels it is.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import softclip_kernels
from softclip_kernels import Hard, Mix, SelfTeacher, Target, Teacher


class Side:
    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "problem" in command:
            problem = torch.load(command["problem"], weights_only=True)
            self.operands = [problem[name].requires_grad_() for name in ("x", "y", "scale")]
            self.target = target(problem)
            return {}
        if "result" in command:
            loss, gradients = self.step()
            torch.save([loss.detach(), *gradients], command["result"])
            return {}
        if self.operands[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(command["calls"]):
            self.step()
        if self.operands[0].is_cuda:
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - start) / command["calls"]}

    def step(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        x, y, scale = self.operands
        loss: Any = softclip_kernels.softclip_loss(x, y, scale, self.target)
        return loss, torch.autograd.grad(loss, self.operands)


def target(problem: dict[str, Any]) -> Target:
    if problem["loss"] == "hard":
        return Hard()
    if problem["loss"] == "psd":
        return Mix(Hard(), SelfTeacher(swap="paired"), problem["soft"])
    return Mix(Hard(), Teacher(problem["a"], problem["b"], problem["teacher_scale"]), problem["soft"])


def main() -> None:
    if hasattr(softclip_kernels, "SlowerBackendWarning"):  # what is measured is the device's own backend, not another
        warnings.simplefilter("error", softclip_kernels.SlowerBackendWarning)
    side = Side()
    print(json.dumps({"file": softclip_kernels.__file__}), flush=True)
    for line in sys.stdin:
        try:
            answer = side.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
