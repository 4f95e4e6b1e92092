"""python -m bench COMMAND [options]; each command prints its options with --help."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "cpu": "the CPU kernels against dense PyTorch: speed, small batches, share of the peak, memory, growth",
    "gpu": "the Triton kernels on a GPU: correctness, the GPU tests, speed, memory",
    "distributed": "the loss over ranks: memory, bytes sent, what a bfloat16 exchange rounds",
    "two_pass": "TwoPass against a plain step: time and memory",
    "peers": "other people's losses beside this one: time and memory, and their plots",
    "trainers": "a step in other people's training loops, their loss beside this one: time and memory",
    "host": "what the loss costs the host on a GPU, launches stubbed",
    "frames": "how deep a call of the loss goes before it computes",
    "compare": "two commits, interleaved, once both are found to be right",
    "loader": "the trainer's data path against open_clip's loader, on the same shards",
    "aot": "what the Triton kernels compile to for GPUs that are not at hand",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        lines = [f"  {name:12} {what}" for name, what in COMMANDS.items()]
        given = f"\nnot {sys.argv[1]!r}" if len(sys.argv) > 1 else ""
        raise SystemExit("\n".join(["usage: python -m bench COMMAND [options]", *lines]) + given)
    importlib.import_module(f".{sys.argv[1]}", __package__).main(sys.argv[2:])


if __name__ == "__main__":
    main()
