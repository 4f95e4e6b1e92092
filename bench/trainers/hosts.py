"""What every process of this benchmark is forked from: the hosts, imported and not used yet."""

import importlib

from ..torchvision_beside_cpu import describe_torchvision
from .loops import LOOPS

describe_torchvision()
for module in dict.fromkeys(loop.module for loop in LOOPS):
    try:
        importlib.import_module(module)
    except Exception:  # it fails again where it is used, and is told of there
        continue
