"""``python -m train``."""

import sys

from train import launch
from train.main import main

if __name__ == "__main__":
    status = main()
    if launch.is_launched():
        launch.leave(status)
    sys.exit(status)
