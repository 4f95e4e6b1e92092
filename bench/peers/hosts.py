"""What every process of this benchmark is forked from: torch and the hosts, imported and not used yet."""

from ..installed import import_all
from .losses import PEERS

import_all(["torch._dynamo", *(peer.host for peer in PEERS if peer.host is not None)])
