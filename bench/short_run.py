"""A process for the work on the GPU, beside the one that keeps the record: a hang, a crash or a lost CUDA context ends
the step that met it, and the next step gets a fresh process."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


class Failed(Exception):
    """A step's failure in the other process: one line, and the traceback where there is one."""

    def __init__(self, line: str, details: str = "", assertion: bool = False) -> None:
        super().__init__(line)
        self.details = details
        self.assertion = assertion  # a wrong result; everything else may have left the GPU's context unusable


class Worker:
    """Runs functions one after the other in one other process, which `prepare` readies."""

    def __init__(self, prepare: Callable[[], object] | None = None) -> None:
        self._prepare = prepare
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float) -> Any:
        """function(**arguments) in the other process. Raises Failed where it raises, dies or takes longer."""
        connection = self._start() if self._connection is None else self._connection
        try:
            connection.send((function, dict(arguments)))
            answered = connection.poll(seconds)
            answer = connection.recv() if answered else None
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.end()
            raise Failed(f"its process ended with exit code {code}") from None
        if answer is None:
            self.end()
            raise Failed(f"not finished after {seconds:.0f} s")
        result, failure = answer
        if failure is not None:
            if not failure.assertion:
                self.end()
            raise failure
        return result

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(5)
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._prepare), daemon=True)
        self._process.start()
        other.close()  # the other process holds the only copy, so that its end is noticed
        return self._connection


def _serve(connection: Connection, prepare: Callable[[], object] | None) -> None:
    import torch

    if prepare is not None:
        prepare()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Failed | None]
        try:
            answer = function(**arguments), None
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            details = traceback.format_exc()[-4000:]
            answer = None, Failed(f"{type(error).__name__}: {line}", details, isinstance(error, AssertionError))
        connection.send(answer)
        del answer
        gc.collect()
        torch.cuda.empty_cache()  # for the other processes of the run
