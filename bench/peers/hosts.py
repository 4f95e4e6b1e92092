"""What every process of this benchmark is forked from: torch and the hosts, imported and not used yet."""

from .losses import import_hosts

import_hosts()
