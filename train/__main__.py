"""`python -m train`, and `softclip-train` where the package is installed."""

import importlib
import sys
from typing import NoReturn

from .signals import stop

COMMANDS = {  # besides training
    "plot": ".plot",
    "evaluate": ".evaluate.__main__",
    "robustness": ".evaluate.robustness",
    "grid": ".study.grid",
    "compare": ".study.compare",
    "export": ".export.__main__",
    "data": ".data.__main__",
}


def main() -> NoReturn:
    if sys.argv[1:] and sys.argv[1] in COMMANDS:
        sys.exit(importlib.import_module(COMMANDS[sys.argv[1]], __package__).main(sys.argv[2:]))
    stop.listen()  # before the imports, which take seconds

    from . import cli, launch

    status = cli.main()
    if launch.is_launched():
        launch.leave(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
