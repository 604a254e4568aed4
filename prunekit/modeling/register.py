"""Makes transformers know what prunekit adds, without importing transformers for it.

transformers maps a model type to the name of a configuration class, and looks that name up in the module
`transformers.models.<model type>` when a folder asks for it. An import hook adds our names to that map as soon as it
exists, and supplies the module, with the class of `modeling_prunekit.py`. Registering the classes themselves at that
point would import model code while transformers is half imported.

`attn_implementation="prunekit"` is a name that transformers looks up in two interfaces; it is added once their modules
are there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from prunekit.modeling.families import hetero_config_class, hetero_families, hetero_model_type

_MAP = "transformers.models.auto.configuration_auto"
ATTENTION = "prunekit"
_MODULES = f"transformers.models.{hetero_model_type('')}"


def register_import_hook(attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Lets `AutoConfig` and the `AutoModel` classes load heterogeneous folders from now on; may be called twice.

    Args:
        attention: what `attn_implementation="prunekit"` stands for.
        mask: what makes the mask that it takes.
    """
    actions: dict[str, Callable[[ModuleType], None]] = {
        _MAP: _add_names,
        "transformers.modeling_utils": lambda module: module.AttentionInterface.register(ATTENTION, attention),
        "transformers.masking_utils": lambda module: module.AttentionMaskInterface.register(ATTENTION, mask),
    }
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(actions))


def _add_names(auto: ModuleType) -> None:
    auto.CONFIG_MAPPING_NAMES.update(
        {hetero_model_type(family): hetero_config_class(family) for family in hetero_families()}
    )


def _family(module: str) -> str | None:
    """Stock model type that a module is for; its name has underscores for dashes."""
    named = module.removeprefix(_MODULES)
    return next((family for family in hetero_families() if family.replace("-", "_") == named), None)


class _Finder(MetaPathFinder):
    """Finds the modules of heterogeneous models, and does what is to be done once a module is imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(_MODULES) and _family(fullname) is not None:
            return ModuleSpec(fullname, _HeterogeneousLoader())
        if fullname not in self._actions:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader, self._actions[fullname])
        return spec


class _HeterogeneousLoader(Loader):
    """Fills a module with a family's heterogeneous configuration."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from prunekit.modeling import modeling_prunekit

        family = _family(module.__name__)
        if family is not None:
            name = hetero_config_class(family)
            setattr(module, name, getattr(modeling_prunekit, name))


class _FollowedLoader(Loader):
    """Loads a module as its own loader does, then acts on it."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action(module)
