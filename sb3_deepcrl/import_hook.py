"""
Lets something be done as soon as another package is imported, without importing it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class ImportHook(MetaPathFinder):
    """
    Waits in ``sys.meta_path`` until a module is imported, to call a function then. It finds no module itself.

    :param name: Name of the module
    :param function: What to call with the module, once it has been executed
    """

    def __init__(self, name: str, function: Callable[[ModuleType], Any]):
        self.name = name
        self.function = function

    @property
    def is_installed(self) -> bool:
        """Whether it waits."""
        return self in sys.meta_path

    def install(self) -> None:
        """Wait for the module. If it is there already, the function is called now."""
        if not self.is_installed:
            sys.meta_path.insert(0, self)
        if (module := sys.modules.get(self.name)) is not None:
            self.function(module)

    def remove(self) -> None:
        """Wait no longer."""
        if self.is_installed:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """
        :param fullname: Name of the module that is looked for
        :param path: Where to look for it
        :param target: The module, if it is reloaded
        :return: For the module what the other finders find, None for all others
        """
        if fullname != self.name:
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        loader = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loader.exec_module = execute  # type: ignore[method-assign]
                loader.exec_module(module)
                if self.is_installed:
                    self.function(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
