"""Starting a command, by `accelerate launch` as TRL's commands do; what cannot work is refused before that."""

import os
import signal
import subprocess
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # of accelerate
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import TrainingArguments

import prefopt_trl
from prefopt_trl.cli.checks import check_arguments
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.cli.parsing import fail, launch_options, parse
from prefopt_trl.cli.run import INTERRUPTS, main

MODULE = "prefopt_trl.cli.run"  # what each process runs


def start(name: str, arguments: Sequence[str]) -> None:
    """Run a command, in processes that `accelerate launch` starts if it is one to be launched.

    Raises:
        SystemExit: with exit code 2 for arguments that cannot work, or with that of a process that failed.
    """
    if not COMMANDS[name].launched:
        main(name, arguments)
        return
    options, given = launch_options(name, arguments)
    try:
        # First, as transformers would only say that this machine has no GPU
        ddp_backend = getattr(given, "ddp_backend", None)
        launch_arguments = launching(options, [name, *arguments], given.use_cpu, ddp_backend)
        with _devices_left_alone():
            parsed, _ = parse(name, arguments)
        check_arguments(*parsed)
    except (ValueError, FileNotFoundError) as error:
        fail(name, error)
    for number in INTERRUPTS:
        signal.signal(number, _leave_to_children)
    try:
        launch_command(launch_arguments)
    except subprocess.CalledProcessError as error:
        raise SystemExit(_exit_code(error.returncode)) from None
    except SignalException as error:  # torchrun's
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        raise SystemExit(_exit_code(error.get_first_failure()[1].exitcode)) from None


def launching(
    options: Sequence[str], arguments: Sequence[str], use_cpu: bool = False, ddp_backend: str | None = None
) -> Namespace:
    """The arguments of `accelerate launch`, of its options (and `--accelerate_config`) and those of each process.

    Raises:
        ValueError: if it could not start them, or would start something else than what is asked for.
        FileNotFoundError: if there is no such configuration.
    """
    options, config_file = _take_config(list(options))
    if config_file is not None:
        options = ["--config_file", str(config_file), *_deepspeed_file(config_file), *options]
    given = launch_command_parser().parse_args([*options, "--module", MODULE, *arguments])
    if given.training_script != MODULE:
        raise ValueError(f"unexpected argument {given.training_script!r}: options have names.")
    has_config = given.config_file is not None or os.path.isfile(default_config_file)
    config: Any = load_config_from_file(given.config_file) if has_config else Namespace()
    engine = _engine(given, config)
    told = use_cpu or given.cpu or getattr(config, "use_cpu", False)
    on_cpu = told or not torch.accelerator.is_available()
    num_processes = given.num_processes or getattr(config, "num_processes", -1)
    if num_processes == -1:  # where nothing says how many, as many as there are devices
        num_processes = given.num_processes = 1 if on_cpu else torch.accelerator.device_count()
    if not has_config:  # accelerate's own defaults, which it would warn of
        given.num_machines = given.num_machines or 1
        given.mixed_precision = given.mixed_precision or "no"
        given.dynamo_backend = given.dynamo_backend or "no"
    name = config_file.stem if config_file is not None else "accelerate"
    if engine == DistributedType.DEEPSPEED:
        _check_deepspeed(f"{name} is to start {num_processes} process(es)", on_cpu, told, ddp_backend)
    elif engine == DistributedType.FSDP and on_cpu:
        raise ValueError("on the CPU accelerate ignores the settings of FSDP. Use a GPU, or leave the config out.")
    elif on_cpu and num_processes > 1 and given.mpirun_hostfile is None:
        raise ValueError(
            f"on the CPU accelerate starts one process, not {num_processes}. Leave `--num_processes` out, or give the "
            f"other options to `torchrun --nproc_per_node {num_processes} -m {MODULE} {arguments[0]} --use_cpu`."
        )
    num_machines = given.num_machines or getattr(config, "num_machines", 1)
    num_devices = torch.accelerator.device_count()
    if not on_cpu and num_processes > num_machines * num_devices:
        raise ValueError(
            f"{name} is to start {num_processes} processes on {num_machines} machine(s), and this one has "
            f"{num_devices} GPU(s). Pass --num_processes {num_machines * num_devices}."
        )
    return given


def configs() -> Path:
    """The folder of our own configurations: beside the package in a clone, inside it where it is installed."""
    package = Path(prefopt_trl.__file__).parent
    return next(folder for folder in (package.parent / "ds_configs", package / "ds_configs") if folder.is_dir())


@contextmanager
def _devices_left_alone() -> Iterator[None]:
    """While entered, a training configuration takes no device and joins no process group: those it launches do."""
    arguments: Any = TrainingArguments
    set_up = vars(arguments)["_setup_devices"]
    arguments._setup_devices = torch.device("cpu")
    try:
        yield
    finally:
        arguments._setup_devices = set_up


def _take_config(options: list[str]) -> tuple[list[str], Path | None]:
    """The options without `--accelerate_config`, and the file that the last one names."""
    path = None
    while "--accelerate_config" in options:
        place = options.index("--accelerate_config")
        if place + 1 == len(options):
            raise ValueError("--accelerate_config needs a value: a name, or a file.")
        given = options[place + 1]
        path = Path(given) if Path(given).is_file() else configs() / f"{given}.yaml"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in configs().glob("*.yaml")))
            raise FileNotFoundError(f"--accelerate_config {given!r} is neither a file nor one of {names}.")
        options = options[:place] + options[place + 2 :]
    return options, path


def _deepspeed_file(config_file: Path) -> list[str]:
    """The option with the absolute path of the DeepSpeed file that a configuration names relative to its own place."""
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a YAML mapping, as `accelerate config` writes it.")
    named = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named is None:
        return []
    folder = config_file.resolve().parent
    for place in (folder.parent / named, folder / named, Path.cwd() / named):
        if place.is_file():
            return ["--deepspeed_config_file", str(place)]
    raise FileNotFoundError(f"{config_file} names the DeepSpeed file {named}, which is not there. Check its path.")


def _engine(given: Namespace, config: Any) -> DistributedType | None:
    if given.use_deepspeed:
        return DistributedType.DEEPSPEED
    if given.use_fsdp:
        return DistributedType.FSDP
    return None if given.multi_gpu else getattr(config, "distributed_type", None)


def _check_deepspeed(start: str, on_cpu: bool, told: bool, ddp_backend: str | None) -> None:
    on_the_cpu = (
        "To try DeepSpeed on the CPU, set DS_ACCELERATOR=cpu in the environment and pass `--use_cpu False "
        "--bf16 False --ddp_backend gloo --num_processes 2`."
    )
    if find_spec("deepspeed") is None:
        raise ValueError("DeepSpeed is not installed. Run `pip install 'prefopt-trl[deepspeed]'`.")
    if told:
        raise ValueError(
            f"{start} of DeepSpeed, and with `use_cpu` or `--cpu` there is no DeepSpeed. Leave the one or the other "
            f"out. {on_the_cpu}"
        )
    if on_cpu and (os.environ.get("DS_ACCELERATOR") != "cpu" or ddp_backend != "gloo"):
        raise ValueError(f"{start}, and this torch finds no GPU for DeepSpeed. {on_the_cpu}")


def _leave_to_children(number: int, frame: Any) -> None:
    """Wait for the processes, which say what is saved. The terminal sends them Ctrl-C, and SIGTERM is passed on."""
    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children if number == signal.SIGTERM else []:
        child.send_signal(number)


def _exit_code(returncode: int) -> int:
    """That of a shell, where a signal ended the process."""
    return returncode if returncode >= 0 else 128 - returncode
