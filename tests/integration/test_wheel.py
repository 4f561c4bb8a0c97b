"""The package as a user installs it: a wheel, in an environment of its own, away from this repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

REPO_ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path) -> str:
    # No path of this repository leaks into what is run
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without an index, of a copy, so that no earlier build is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for name in ("prefopt_trl", "ds_configs"):
        shutil.copytree(REPO_ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO_ROOT / name, copy)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*build, "-w", str(folder), str(copy)], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, whose dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site_packages = Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    run([*install, str(wheel)], folder)
    # Only after it is installed, and only its folder: an editable install there is a file that this does not read
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_it_holds_the_package_and_nothing_else(wheel):
    names = set(ZipFile(wheel).namelist())
    package = REPO_ROOT / "prefopt_trl"
    files = [*package.rglob("*.py"), *package.rglob("templates/*.md"), *package.rglob("prompts/*.md")]
    sources = {path.relative_to(REPO_ROOT).as_posix() for path in files}
    assert len(sources) > 50 and "prefopt_trl/runtime/templates/model.md" in sources
    configs = {
        f"prefopt_trl/ds_configs/{path.name}"
        for path in (REPO_ROOT / "ds_configs").iterdir()
        if path.suffix in (".json", ".yaml")
    }
    assert len(configs) >= 8
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == sources | configs | {"prefopt_trl/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_the_command_runs(python, tmp_path):
    command = str(python.with_name("prefopt-trl"))
    assert run([command, "--version"], tmp_path) == f"prefopt-trl {PROJECT['version']}\n"
    assert "quickstart" in run([command, "--help"], tmp_path)


def test_it_is_imported_from_where_it_is_installed_and_computes(python, tmp_path):
    code = (
        "import importlib.resources, torch, prefopt_trl\n"
        "print(prefopt_trl.__file__)\n"
        "print(importlib.resources.files('prefopt_trl').joinpath('ds_configs/zero3.json').is_file())\n"
        "print(prefopt_trl.losses.sigmoid_norm(torch.tensor([[1.0, -1.0]]), gamma=0.5).item())\n"
        "print(*(getattr(prefopt_trl, name).__name__ for name in prefopt_trl.__all__))\n"
    )
    file, has_configs, loss, names = run([str(python), "-c", code], tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert has_configs == "True"
    assert float(loss) == pytest.approx(0.313262, abs=1e-6)  # log(1 + exp(-0.5 * 2))
    assert "RSOTrainer" in names and "PairwiseRanker" in names
