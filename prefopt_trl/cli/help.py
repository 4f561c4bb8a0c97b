"""`prefopt-trl COMMAND --help`, at once: the fields of dataclasses read from their source, without importing torch."""

import ast
import builtins
import shutil
import textwrap
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefopt_trl.cli.commands import COMMANDS

# Where public names that a source file imports are written
HOMES = {
    "trl.DPOConfig": "trl.trainer.dpo_config",
    "trl.SFTConfig": "trl.trainer.sft_config",
    "trl.ModelConfig": "trl.trainer.model_config",
    "transformers.TrainingArguments": "transformers.training_args",
}
# Groups of fields, by the class that wrote their help; those not named here are the command's own
GROUPS = {
    "DataArguments": "data",
    "TrainingData": "data",
    "PreferenceArguments": "data",
    "RankerTemplate": "ranker",
    "RankerArguments": "ranker",
    "ModelConfig": "model, adapter and quantisation (trl.ModelConfig)",
    "GenerationOptions": "shared prompts and sampling",
    "SamplingOptions": "shared prompts and sampling",
    "PreferenceConfig": "shared prompts and sampling",
    "RSOConfig": "the method",
    "SLiCConfig": "the method",
    "PROConfig": "the method",
    "ListwiseDPOConfig": "the method",
    "RRHFConfig": "the method",
    "DPOConfig": "training (trl.DPOConfig)",
    "SFTConfig": "training (trl.SFTConfig)",
    "_BaseConfig": "training (trl and transformers)",
    "TrainingArguments": "training (transformers.TrainingArguments)",
}
# Made by a function call in its source file, which only an import would run
LOG_LEVELS = dict.fromkeys(["detail", "debug", "info", "warning", "error", "critical", "passive"])
REQUIRED = object()
LAUNCHING = (
    "Launched by `accelerate launch`, whose options are taken too, such as --num_processes 8; --accelerate_config is "
    "zero3, zero3_offload, zero2, ddp or fsdp2, or a file."
)


@dataclass(frozen=True)
class Field:
    """A field of a dataclass, as it is written."""

    type: str
    default: Any
    metadata: dict[str, Any]  # and under "owner" the class whose file this is written in

    @property
    def group(self) -> str:
        return GROUPS.get(self.metadata["owner"], "the command's own")


def fields(path: str) -> dict[str, Field]:
    """The fields of the dataclass at a path such as `trl.ModelConfig`, by name, with those of its bases."""
    module, _, name = path.rpartition(".")
    return _source(HOMES.get(path, module))[name].__dataclass_fields__


def command_help(name: str) -> str:
    """What `prefopt-trl NAME --help` prints."""
    command = COMMANDS[name]
    width = min(shutil.get_terminal_size().columns, 119)
    found = {field: value for path in command.takes for field, value in fields(path).items()}
    groups: dict[str, list[str]] = {}
    for field, value in found.items():
        groups.setdefault(value.group, []).append(_entry(field, value, width))
    order = ["the command's own", *dict.fromkeys(GROUPS.values())]
    parts = [
        f"usage: prefopt-trl {name} [--config FILE.yaml] [--OPTION VALUE ...]",
        textwrap.fill(f"{command.summary[0].upper()}{command.summary[1:]}.", width),
        textwrap.fill(
            "Options are given on the command line or in the YAML file of `--config`; the command line wins. A bool "
            "is set by its name, and unset by `--NAME False`.",
            width,
        ),
        *([textwrap.fill(LAUNCHING, width)] if command.launched else []),
        *(f"{title}:\n" + "\n".join(groups[title]) for title in order if title in groups),
    ]
    return "\n\n".join(parts)


def _entry(name: str, field: Field, width: int) -> str:
    default = "required" if field.default is REQUIRED else f"default: {field.default}"
    text = field.metadata.get("help", "").replace("%%", "%")
    if choices := field.metadata.get("choices"):
        text += f" One of {', '.join(map(str, choices))}."
    wrapped = textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return f"  --{name} {field.type} ({default})\n{wrapped}"


class _Source(dict[str, Any]):
    """The names of a source file, each evaluated when it is first asked for."""

    def __init__(self, path: Path, module: str) -> None:
        self.module = module
        self.nodes = {name: node for node in _statements(ast.parse(path.read_text("utf-8"))) for name in _names(node)}

    def __missing__(self, name: str) -> Any:
        node = self.nodes[name]  # a KeyError sends `eval` on to the builtins
        if isinstance(node, ast.ClassDef):
            self[name] = self._class(node)
        elif isinstance(node, ast.FunctionDef):
            self[name] = None  # it may stand in a table whose keys are wanted
        elif isinstance(node, ast.ImportFrom):
            base = self.module.split(".")[: -node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            self[name] = _source(HOMES.get(f"{module}.{name}", module))[name]
        else:
            self[name] = self.evaluate(node.value, {})
        return self[name]

    def evaluate(self, node: ast.AST, scope: dict[str, Any]) -> Any:
        code = compile(ast.Expression(node), "", "eval")  # type: ignore[arg-type]
        known = {"field": _field, "trainer_log_levels": LOG_LEVELS}
        return eval(code, vars(builtins).copy(), ChainMap(known, scope, self))

    def _class(self, node: ast.ClassDef) -> Any:
        bases = [ast.unparse(base) for base in node.bases]
        if any(base.endswith("Enum") for base in bases):
            members: list[Any] = [part for part in node.body if isinstance(part, ast.Assign)]
            return SimpleNamespace(**{name: part.value.value for part in members for name in _names(part)})
        found: dict[str, Field] = {}
        for base in reversed(bases):
            found |= self[base].__dataclass_fields__
        constants = [part for part in _statements(node) if isinstance(getattr(part, "value", None), ast.Constant)]
        scope = {name: part.value.value for part in constants for name in _names(part)}
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                default = REQUIRED if part.value is None else self.evaluate(part.value, scope)
                if not isinstance(default, SimpleNamespace):
                    default = _field(default=default)
                default.metadata.setdefault("owner", node.name)
                if choices := self._choices(part.annotation):
                    default.metadata.setdefault("choices", choices)
                found[part.target.id] = Field(ast.unparse(part.annotation), default.default, default.metadata)
        return SimpleNamespace(__dataclass_fields__=found)

    def _choices(self, annotation: ast.expr) -> list[str]:
        """Values of the enumeration in `Enumeration | str`."""
        match annotation:
            case ast.BinOp(left=ast.Name(id=name), right=ast.Name(id="str")) if name in self.nodes:
                return list(vars(self[name]).values())
        return []


def _field(
    default: Any = REQUIRED, default_factory: Any = None, metadata: dict[str, Any] | None = None
) -> SimpleNamespace:
    """Stands for `dataclasses.field`."""
    value = default if default_factory is None else default_factory()
    return SimpleNamespace(default=value, metadata={} if metadata is None else metadata)


def _statements(node: ast.AST) -> Iterator[Any]:
    """The statements of a module or class, also those under a condition."""
    for part in ast.iter_child_nodes(node):
        yield part
        if isinstance(part, ast.If | ast.Try):
            yield from _statements(part)


def _names(node: ast.AST) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@cache
def _source(module: str) -> _Source:
    root, *rest = module.split(".")
    spec = find_spec(root)  # of the package alone: looking further down would import it
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    package = path / "__init__.py"
    return _Source(package if package.is_file() else path.with_suffix(".py"), module)
