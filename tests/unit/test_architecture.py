"""The rules of the house (CONTRIBUTING.md), checked by reading the imports of every file."""

import ast
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).parents[2]

# Lowest first. A file imports from lower floors and from its own package.
FLOORS = [
    {"losses", "runtime", "shared_prefix"},
    {"data"},
    {"generation"},
    {"rankers"},
    {"sampling"},
    {"trainers", "evaluation"},
    {"rounds"},
    {"prefopt_trl"},  # __init__.py, the public names
    {"experiments"},
    {"cli"},
]
ALLOWED_LIBRARIES = {
    "prefopt_trl/losses/": {"torch", "prefopt_trl.losses"},
    "prefopt_trl/sampling/rejection.py": {"numpy"},
    "prefopt_trl/sampling/pairing.py": {"numpy"},
}
# What `prefopt-trl --help` imports: the standard library alone, and each other
LIGHT = {
    "prefopt_trl",
    "prefopt_trl.cli.arguments",
    "prefopt_trl.cli.commands",
    "prefopt_trl.cli.help",
    "prefopt_trl.cli.main",
    "prefopt_trl.generation.options",
    "prefopt_trl.rounds",
    "prefopt_trl.rounds.options",
    "prefopt_trl.runtime.quiet",
    "prefopt_trl.sampling.options",
    "prefopt_trl.trainers",
}
TRL_SUBMODULES = {module.name for module in pkgutil.iter_modules(find_spec("trl").submodule_search_locations)}
# In a submodule only, but documented by TRL under that path, so public.
TRL_PUBLIC = {"trl.trainer.dpo_trainer.DataCollatorForPreference"}


@dataclass(frozen=True)
class Import:
    target: str  # with the imported name: "trl.DPOTrainer" for `from trl import DPOTrainer`
    line: int
    eager: bool  # runs when the file is imported


@dataclass(frozen=True)
class SourceFile:
    path: str  # "prefopt_trl/losses/pairwise.py"
    text: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def imports(self) -> list[Import]:
        package = self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]
        return list(find_imports(ast.parse(self.text), package, eager=True))


def find_imports(node: ast.AST, package: str, eager: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, eager) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        source = ".".join(filter(None, [base, node.module]))
        yield from (Import(f"{source}.{alias.name}", node.lineno, eager) for alias in node.names)
    elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("trl."):
        yield Import(ast.unparse(node), node.lineno, eager)  # `import trl` and then a name by its full path
    else:
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from find_imports(child, package, eager and not in_function and not for_types)


def inside(target: str, module: str) -> bool:
    return target == module or target.startswith(module + ".")


def package_of(target: str) -> str:
    """Return the package that an import of ours reaches; a public name (prefopt_trl.RSOTrainer) is __init__'s."""
    name = target.removeprefix("prefopt_trl.").split(".")[0]
    return name if any(name in packages for packages in FLOORS) else "prefopt_trl"


def floor(package: str) -> int:
    return next(height for height, packages in enumerate(FLOORS) if package in packages)


def upward_imports(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        own_package = package_of(file.module)
        for imported in file.imports:
            target = package_of(imported.target) if inside(imported.target, "prefopt_trl") else own_package
            if target != own_package and floor(target) >= floor(own_package):
                yield f"{file.path}:{imported.line} imports {imported.target}, which is not on a lower floor"


def homeless_files(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        if file.module != "prefopt_trl" and package_of(file.module) == "prefopt_trl":
            yield f"{file.path} stands on no floor: give its package one, in FLOORS and in CONTRIBUTING.md"


def import_cycles(files: list[SourceFile]) -> Iterator[str]:
    modules = {file.module for file in files}
    graph: dict[str, set[str]] = {}
    for file in files:
        targets = [imported.target for imported in file.imports]
        # The last part of a target is a module or a name in one.
        graph[file.module] = {name if name in modules else name.rpartition(".")[0] for name in targets}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "these import each other: " + " <- ".join(error.args[1])


def heavy_equations(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        for place, allowed in ALLOWED_LIBRARIES.items():
            if not file.path.startswith(place):
                continue
            for imported in file.imports:
                standard = imported.target.split(".")[0] in sys.stdlib_module_names
                if not standard and not any(inside(imported.target, library) for library in allowed):
                    names = " and ".join(sorted(allowed))
                    yield f"{file.path}:{imported.line} imports {imported.target}: only {names} may be imported here"


def private_trl_names(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        if file.path in ("prefopt_trl/trainers/base.py", "benchmarks/head.py"):  # the latter is measured against them
            continue
        for imported in file.imports:
            root, *names = imported.target.split(".")
            if root != "trl" or not names or imported.target in TRL_PUBLIC:
                continue
            if names[0] in TRL_SUBMODULES or any(name.startswith("_") for name in names):
                yield f"{file.path}:{imported.line} reaches {imported.target}: TRL's private names belong to base.py"


def slow_commands(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        if file.module not in LIGHT:
            continue  # the other files of `cli` are the commands, which are imported when they run
        for imported in file.imports:
            standard = imported.target.split(".")[0] in sys.stdlib_module_names
            own = imported.target == "prefopt_trl.__version__" or imported.target.rpartition(".")[0] in LIGHT
            if imported.eager and not standard and not own:
                yield f"{file.path}:{imported.line} imports {imported.target} outside of a function"


def long_files(files: list[SourceFile]) -> Iterator[str]:
    for file in files:
        trainer = file.path.startswith("prefopt_trl/trainers/") and file.path.endswith(("_trainer.py", "_config.py"))
        limit, length = 200 if trainer else 450, len(file.text.splitlines())
        if length >= limit:
            yield f"{file.path} has {length} lines: it must stay under {limit}"


RULES = [upward_imports, homeless_files, import_cycles, heavy_equations, private_trl_names, slow_commands, long_files]
Rule = Callable[[list[SourceFile]], Iterator[str]]


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_every_rule(rule: Rule) -> None:
    folders = ["prefopt_trl", "examples", "benchmarks"] if rule is private_trl_names else ["prefopt_trl"]
    paths = [path for folder in folders for path in sorted((REPO_ROOT / folder).rglob("*.py"))]
    files = [SourceFile(path.relative_to(REPO_ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    assert len(files) > 1
    assert list(rule(files)) == []


LOSS = SourceFile("prefopt_trl/losses/pairwise.py", "import math\nimport torch\n")
STORE = SourceFile("prefopt_trl/sampling/store.py", "")
LOSSES_INIT = SourceFile("prefopt_trl/losses/__init__.py", "from .pairwise import hinge\n")


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (upward_imports, "prefopt_trl/rankers/base.py", "from prefopt_trl.sampling.store import x"),
        (upward_imports, "prefopt_trl/rankers/base.py", "def f():\n    from ..sampling import store"),
        (upward_imports, "prefopt_trl/data/formats.py", "from prefopt_trl import rankers"),
        (upward_imports, "prefopt_trl/trainers/base.py", "from prefopt_trl import RSOTrainer"),
        (homeless_files, "prefopt_trl/utils/text.py", ""),
        (homeless_files, "prefopt_trl/utils.py", ""),
        (import_cycles, "prefopt_trl/losses/pairwise.py", "from prefopt_trl.losses import pro"),
        (import_cycles, "prefopt_trl/sampling/store.py", "from . import store"),
        (heavy_equations, "prefopt_trl/losses/listwise.py", "import numpy as np"),
        (heavy_equations, "prefopt_trl/sampling/pairing.py", "from prefopt_trl.sampling.store import x"),
        (private_trl_names, "prefopt_trl/data/collators.py", "from trl.trainer.utils import pad"),
        (private_trl_names, "prefopt_trl/data/collators.py", "from trl import trainer"),
        (private_trl_names, "prefopt_trl/data/collators.py", "import trl\ntrl.trainer.utils.pad(x)"),
        (private_trl_names, "prefopt_trl/data/collators.py", "from trl import _compat"),
        (slow_commands, "prefopt_trl/cli/main.py", "if True:\n    import torch"),
        (slow_commands, "prefopt_trl/cli/main.py", "from prefopt_trl.experiments import worlds"),
        (long_files, "prefopt_trl/trainers/rso_trainer.py", "\n" * 200),
        (long_files, "prefopt_trl/sampling/pipeline.py", "\n" * 450),
    ],
)
def test_a_rule_sees_what_breaks_it(rule: Rule, path: str, text: str) -> None:
    others = [file for file in (LOSS, STORE, LOSSES_INIT) if file.path != path]
    assert len(list(rule([*others, SourceFile(path, text)]))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("prefopt_trl/__init__.py", "from prefopt_trl import losses"),
        ("prefopt_trl/losses/listwise.py", "from collections.abc import Callable\nfrom .pairwise import hinge"),
        ("prefopt_trl/trainers/base.py", "from trl.trainer.utils import pad\n" + "\n" * 448),
        ("prefopt_trl/data/collators.py", "from trl.trainer.dpo_trainer import DataCollatorForPreference"),
        ("prefopt_trl/rankers/pairwise.py", "import trl\nfrom trl import SFTTrainer\ntrl.SFTConfig(x)"),
        ("prefopt_trl/cli/main.py", "import argparse\ndef main():\n    import torch\n    import prefopt_trl.losses"),
        ("prefopt_trl/cli/main.py", "from prefopt_trl import __version__"),
        ("prefopt_trl/experiments/cells.py", "import torch"),
        ("prefopt_trl/trainers/rso_trainer.py", "\n" * 199),
    ],
)
def test_no_rule_objects_to_what_is_allowed(path: str, text: str) -> None:
    files = [LOSS, STORE, LOSSES_INIT, SourceFile(path, text)]
    assert [problem for rule in RULES for problem in rule(files)] == []
