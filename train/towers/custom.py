"""Anyone's towers: `python:PACKAGE.MODULE:FACTORY`, where FACTORY(ModelOptions) returns a Bundle. The factory is called
again where a checkpoint is read, and the weights follow."""

from __future__ import annotations

import importlib

from ..options import ConfigError, ModelOptions
from .bundle import Bundle
from .contrastive import Contrastive


def build(name: str, options: ModelOptions) -> Bundle:
    """`name`: what follows `python:`. See towers.build."""
    module, _, factory = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.towers={options.towers}: there is no {factory!r} to be imported from {module!r} ({error}); "
            "allowed: python:PACKAGE.MODULE:FACTORY, with its folder on PYTHONPATH"
        ) from error
    bundle = made(options)
    if not isinstance(bundle, Bundle) or not isinstance(bundle.module, Contrastive):
        raise ConfigError(
            f"model.towers={options.towers}: the factory returned {type(bundle).__name__}; allowed: a towers.Bundle "
            "with a towers.Contrastive"
        )
    return bundle
