"""Teaches transformers' auto classes to load pruned checkpoints, and imports neither transformers nor a family before it is asked for."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder

from .models.families import FAMILIES, PRUNED

MODULE = "transformers.models.auto.configuration_auto"  # the home of AutoConfig, which every auto class asks first


class RegisterOnImport:
    """An import hook: transformers' auto module is imported as usual, and then pruned models are registered."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == MODULE else None
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                register(module)

            spec.loader.exec_module = exec_module
        return spec


def register_in_time() -> None:
    """Registers pruned models where transformers is in use, or as soon as it is."""
    if MODULE in sys.modules:
        register(importlib.import_module(MODULE))  # where another thread is loading it, this waits for the end
    else:
        sys.meta_path.insert(0, RegisterOnImport)


def register(module) -> None:
    """Registers, in ``module``'s AutoConfig, a stand-in for each family's config."""
    for model_type in FAMILIES:
        module.AutoConfig.register(PRUNED + model_type, _stand_in(model_type), exist_ok=True)


def _stand_in(family: str) -> type:
    """What AutoConfig has in place of a config class that is not made yet; asked for a config, it makes and registers the family's."""
    from transformers.configuration_utils import PreTrainedConfig

    def real() -> type:
        from .modeling import slim_models

        return slim_models(family)["AutoModel"].config_class

    class StandIn(PreTrainedConfig):
        model_type = PRUNED + family

        def __new__(cls, *args, **settings):
            return real()(*args, **settings)

        @classmethod
        def from_dict(cls, config_dict, **settings):
            return real().from_dict(config_dict, **settings)

    return StandIn
