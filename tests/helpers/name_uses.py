"""Who uses which name of the product, read from the sources with `ast`.

A name is a function, class or constant at the top of a module. A use is resolved through imports:
`from a.b import c`, `a.b.c` of an imported module, "a.b:c" in a string, and what a package's
`__init__` passes on. Members of classes are told by their name alone.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rollout", "engine", "kernels", "trainer_bridge", "recipes")
OTHERS = ("tests", "benchmarks", "docs", "scripts")
_DOTTED = re.compile(r"([A-Za-z_][\w.]*)[.:](\w+)")

Name = tuple[str, str]
"""(module, name at its top)."""


@dataclass
class Module:
    """One source file: its tree, the names at its top, and what its imports bind."""

    name: str
    path: Path
    tree: ast.Module
    tops: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, Name] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_init(self) -> bool:
        return self.path.name == "__init__.py"


def read_modules() -> dict[str, Module]:
    """Every module of the product and of what uses it, by dotted name."""
    found = {}
    for top in (*PACKAGES, *OTHERS):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            module = Module(name, path, ast.parse(path.read_text()))
            module.tops = dict(_tops(module.tree))
            module.imported = dict(_imported(module.tree))
            found[name] = module
    return found


def _tops(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Assign(targets=targets):
                for target in targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            yield part.id, node
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node


def _imported(tree: ast.Module) -> Iterator[tuple[str, Name]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], ("", alias.asname or alias.name)


class Uses:
    """The graph of uses. `by[name]`: modules that use it outside its own definition."""

    def __init__(self) -> None:
        self.modules = read_modules()
        self.by: dict[Name, set[str]] = defaultdict(set)
        self._from: dict[Name, set[Name]] = defaultdict(set)
        self._roots: dict[str, set[Name]] = defaultdict(set)
        for module in self.modules.values():
            self._read(module)

    def public(self) -> list[Name]:
        """Names at the top of the product's modules without a leading underscore."""
        return [
            (module.name, name)
            for module in self.modules.values()
            if module.package in PACKAGES
            for name in module.tops
            if not name.startswith("_")
        ]

    def in_product(self, name: Name) -> bool:
        """Whether the product uses it."""
        return any(user.split(".")[0] in PACKAGES for user in self.by[name])

    @cached_property
    def tested(self) -> set[Name]:
        """Names that a test uses, or that something uses which one of these uses."""
        found: set[Name] = set()
        todo = [
            used
            for module in self.modules.values()
            if module.package == "tests"
            for used in self._roots[module.name] | self._of_names(module)
        ]
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                # Whoever imports a module runs its top.
                todo += self._from[name] | self._roots[name[0]]
        return found

    def _of_names(self, module: Module) -> set[Name]:
        return {used for name in module.tops for used in self._from[module.name, name]}

    def _read(self, module: Module) -> None:
        owners: dict[int, str] = {id(node): name for name, node in module.tops.items()}
        for statement in module.tree.body:
            names = [name for name, node in module.tops.items() if node is statement]
            for used in self._used(module, statement, passes_on=not module.is_init):
                if not names or used != (module.name, names[0]):
                    self.by[used].add(module.name)
                if id(statement) in owners:
                    for name in names:
                        self._from[module.name, name].add(used)
                else:
                    self._roots[module.name].add(used)

    def _used(self, module: Module, tree: ast.AST, *, passes_on: bool) -> Iterator[Name]:
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=name, ctx=ast.Load()):
                    if name in module.imported:
                        yield self._origin(*module.imported[name])
                    elif name in module.tops:
                        yield module.name, name
                case ast.Attribute(value=value, attr=attr):
                    owner = self._module_of(module, value)
                    if owner:
                        yield self._origin(owner, attr)
                case ast.ImportFrom(module=str(source)) if passes_on:
                    # An import that is not at the top binds what is used right there.
                    for alias in node.names:
                        yield self._origin(source, alias.name)
                case ast.Constant(value=str(text)) if len(text) < 300:
                    for source, name in _DOTTED.findall(text):
                        if source in self.modules:
                            yield source, name

    def _module_of(self, module: Module, value: ast.expr) -> str:
        """The module that an expression is, if it is one."""
        if isinstance(value, ast.Name) and value.id in module.imported:
            source, name = module.imported[value.id]
            dotted = f"{source}.{name}" if source else name
        elif isinstance(value, ast.Attribute):
            owner = self._module_of(module, value.value)
            dotted = f"{owner}.{value.attr}" if owner else ""
        else:
            return ""
        return dotted if dotted in self.modules else ""

    def _origin(self, source: str, name: str) -> Name:
        """Where a name comes from that `source` may only pass on."""
        for _ in range(5):
            module = self.modules.get(source)
            if module is None or name in module.tops or name not in module.imported:
                break
            source, name = module.imported[name]
        return source, name


def members(modules: dict[str, Module]) -> Iterator[tuple[str, str, str]]:
    """(module, class, member) of the product's public classes: methods and annotated fields."""
    for module in modules.values():
        for name, node in module.tops.items():
            if module.package not in PACKAGES or not isinstance(node, ast.ClassDef):
                continue
            for part in node.body:
                match part:
                    case ast.FunctionDef(name=member) | ast.AsyncFunctionDef(name=member):
                        pass
                    case ast.AnnAssign(target=ast.Name(id=member)):
                        pass
                    case _:
                        continue
                if not member.startswith("_"):
                    yield module.name, name, member


def read_attributes(module: Module) -> set[str]:
    """Names of attributes that a module reads, and words of its strings that may be such."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(attr=attr, ctx=ast.Load()):
                found.add(attr)
            case ast.MatchClass(kwd_attrs=names):
                found.update(names)
            case ast.Constant(value=str(text)) if text.isidentifier():
                found.add(text)
    return found
