"""What pyproject.toml promises, what the constraints pin, what is installed and what CI runs must agree."""

import ast
import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import prefopt_trl
from prefopt_trl.trainers.base import TESTED

REPO_ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# A build of torch for NVIDIA or AMD brings these at the versions it names itself.
ACCELERATOR_LIBRARIES = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")


INSTALLED = os.environ.get("PREFOPT_CONSTRAINTS", "constraints.txt")  # what this environment was made from


def constraints(name: str) -> dict[str, str]:
    lines = (REPO_ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def ranges() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    texts = PROJECT["dependencies"] + [text for extra in extras for text in extras[extra]]
    found = [item for item in map(Requirement, texts) if item.name != "prefopt-trl"]
    assert len(found) >= 7
    return found


def needed(requirements: list[str], extra: str) -> list[Requirement]:
    """Return the requirements that hold on this machine when `extra` ("" for none) is asked for."""
    parsed = (Requirement(text) for text in requirements)
    return [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": extra})]


def dev_closure(extra: str) -> set[str]:
    """Return the names of all that `pip install prefopt-trl[extra]` brings, as the installed metadata tells it."""
    extras = PROJECT["optional-dependencies"]
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(f"prefopt-trl[{extra}]")]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen or ACCELERATOR_LIBRARIES.match(name):
                continue
            seen.add((name, extra))
            if name == "prefopt-trl":
                queue += needed(extras[extra] if extra else PROJECT["dependencies"], extra)
            else:
                queue += needed(metadata.requires(name) or [], extra)
    return {name for name, _ in seen} - {"prefopt-trl"}


def test_a_lower_bound_is_what_the_oldest_environment_has_and_an_upper_bound_has_its_reason() -> None:
    newest, oldest = constraints("constraints.txt"), constraints("constraints-oldest.txt")
    lines = (REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    dev = {Requirement(text).name for text in PROJECT["optional-dependencies"]["dev"]} - {"prefopt-trl"}
    for item in ranges():
        name = canonicalize_name(item.name)
        assert item.specifier.contains(newest[name]), f"constraints.txt leaves the range {item}"
        (lower,) = (bound for bound in item.specifier if bound.operator == ">=")
        if name not in dev:  # which lint and check types, on the pins alone
            bound, tested = (Version(version).release for version in (lower.version, oldest[name]))
            assert tested[: len(bound)] == bound and not any(tested[len(bound) :]), f"{item} is tested on {tested}"
        if {bound.operator for bound in item.specifier} != {">="}:
            (line,) = (line for line in lines if f'"{item.name}>=' in line)
            assert " # " in line, f"the upper bound of {item} has no comment that says what it keeps out"


def test_all_that_ci_installs_is_pinned_and_all_that_is_pinned_is_installed() -> None:
    pins = constraints(INSTALLED)
    closure = dev_closure("dev" if INSTALLED == "constraints.txt" else "test")
    assert set(pins) - closure - {"setuptools"} == set()
    if INSTALLED == "constraints.txt":  # the others leave what they do not name to the registry
        assert closure - set(pins) == set()


def test_the_installed_versions_are_the_pinned_ones() -> None:
    pins = constraints(INSTALLED)
    installed = {name: Version(metadata.version(name)).public for name in pins}
    assert installed == {name: str(Version(version)) for name, version in pins.items()}


def test_pins_are_exact_and_portable() -> None:
    torch = {}
    for name in ("constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"):
        pins = constraints(name)
        torch[name] = pins["torch"]
        assert [
            pin for pin in pins.values() if not re.fullmatch(r"[0-9]+(\.[0-9]+)*(b[0-9]+|\.post[0-9]+)?", pin)
        ] == []
    assert torch["constraints.txt"] == torch["constraints-newest.txt"] == "2.13.0"


def test_the_version_is_the_same_everywhere() -> None:
    assert prefopt_trl.__version__ == PROJECT["version"] == metadata.version("prefopt-trl")


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent.relative_to(REPO_ROOT) for file in (REPO_ROOT / "prefopt_trl").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(setuptools["packages"]) - {"prefopt_trl.ds_configs"}


def test_type_checkers_know_every_public_name_from_its_file() -> None:
    tree = ast.parse(Path(prefopt_trl.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {f"{part.module}.{alias.name}" for part in block.body for alias in part.names}
    homes = {f"prefopt_trl.{module}.{name}" for name, module in prefopt_trl._HOME.items()}
    assert imported == homes | {"prefopt_trl.losses"}


def test_the_console_script_names_a_function() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="prefopt-trl")
    assert script.value == PROJECT["scripts"]["prefopt-trl"]
    assert callable(script.load())


def test_pre_commit_and_ci_run_the_same_make_targets() -> None:
    hooks = yaml.safe_load((REPO_ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    commands = {hook["entry"] for repo in hooks for hook in repo["hooks"]}
    makefile = (REPO_ROOT / "Makefile").read_text(encoding="utf-8")
    before_test = re.search(r"^test: ([a-z ]+?) *##", makefile, re.MULTILINE).group(1)
    assert commands == {f"make {before_test}", "make test"}
    assert {repo["repo"] for repo in hooks} == {"local"}
    in_ci = (REPO_ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-4:]
    assert in_ci == ["make test", "make test-distributed", "make test-oldest", "make test-newest"]


def test_the_documented_versions_are_those_of_the_constraints() -> None:
    page = (REPO_ROOT / "docs/versions.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    names = [canonicalize_name(name) for name in rows[0][2:-1]]
    tested = {row[0]: dict(zip(names, row[2:-1], strict=True)) for row in rows[2:6]}
    for name, file in (("oldest", "constraints-oldest.txt"), ("pinned", "constraints.txt")):
        assert tested[name].items() <= constraints(file).items()
    trl, transformers = re.findall(r"(\S+) to (\S+)", TESTED)
    for bounds, name in ((trl, "trl"), (transformers, "transformers")):
        assert [f"{bound}.0" for bound in bounds] == [tested[row][name] for row in ("oldest", "newest")]
