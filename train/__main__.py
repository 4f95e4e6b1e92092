"""`python -m train`."""

import sys

from .signals import stop

if __name__ == "__main__":
    stop.listen()  # before the imports, which take seconds

    from . import launch
    from .cli import main

    status = main()
    if launch.is_launched():
        launch.leave(status)
    sys.exit(status)
