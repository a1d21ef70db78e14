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
OF_A_TABLE = ("main", "router", "OPTIONS", "layers")
"""Found by their name in modules that a table lists or a process runs: entry points, routes,
architectures."""
_LONGEST = 300
"""Characters of a text that may be more than prose."""
_DOTTED = re.compile(r"([A-Za-z_][\w.]*)[.:](\w+)")
_MEMBER = re.compile(r"(?:\.|\?\.|[{,]\s)([a-z]\w*)")

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
                top = alias.name.split(".")[0]
                yield alias.asname or top, ("", alias.name if alias.asname else top)


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
        owners: dict[int, list[Name]] = defaultdict(list)
        for name, node in module.tops.items():
            owners[id(node)].append((module.name, name))
        for statement in module.tree.body:
            defined = owners[id(statement)]
            used = set(self._used(module, statement))
            for name in used.difference(defined):
                self.by[name].add(module.name)
            for name in defined:
                self._from[name] |= used
            if not defined:
                self._roots[module.name] |= used

    def _used(self, module: Module, tree: ast.AST) -> Iterator[Name]:
        owners = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owners.add(id(node.value))
                owner = self._module_of(module, node.value)
                if owner:
                    yield self._origin(owner, node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield from self._named(module, node.id, whole=id(node) not in owners)
            elif isinstance(node, ast.ImportFrom) and node.module and not module.is_init:
                for alias in node.names:
                    yield self._origin(node.module, alias.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self._spelled(node.value)

    def _named(self, module: Module, name: str, *, whole: bool) -> Iterator[Name]:
        """What a bare name stands for. whole: not for the sake of one attribute of it, so that a
        module may be asked for any name that tables find in modules."""
        if name in module.tops:
            yield module.name, name
        elif name in module.imported:
            source, of = module.imported[name]
            yield self._origin(source, of)
            if whole and f"{source}.{of}" in self.modules:
                yield from ((f"{source}.{of}", by_table) for by_table in OF_A_TABLE)

    def _spelled(self, text: str) -> Iterator[Name]:
        """A text "a.b:c" or "a.b.c" means a name, "a.b" a module that a table or process opens."""
        if text in self.modules:
            yield from ((text, by_table) for by_table in OF_A_TABLE)
        elif len(text) < _LONGEST:
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
    """Names of the attributes that a module reads."""
    found: set[str] = set()
    for node in ast.walk(module.tree):
        match node:
            case ast.Attribute(attr=attr, ctx=ast.Load()):
                found.add(attr)
            case ast.MatchClass(kwd_attrs=names):
                found.update(names)
    return found


def read_by_scripts() -> set[str]:
    """Names of members that the scripts of the product's page read."""
    scripts = (ROOT / "rollout" / "dashboard" / "static").glob("*.js")
    return {name for path in scripts for name in _MEMBER.findall(path.read_text())}
