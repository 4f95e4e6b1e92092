"""What every process of this benchmark is forked from: the hosts, imported and not used yet."""

from ..installed import import_all
from .loops import LOOPS

import_all(loop.module for loop in LOOPS)
