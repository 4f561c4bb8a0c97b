"""Start the processes of a command with `accelerate launch`, as TRL's commands do."""

import os
import signal
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]  # installed with accelerate
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import prefopt_trl
from prefopt_trl.cli.parsing import LaunchOptions, read
from prefopt_trl.cli.run import USER_ERRORS, fail
from prefopt_trl.runtime.settings import read_json

MODULE = "prefopt_trl.cli.run"  # what each process runs
ONE_PHASE = "PREFOPT_ONE_PHASE"  # in the environment of `rounds`, whose phases are launched one after the other
ON_THE_CPU = (
    "Two ways work without a GPU: `torchrun --nproc_per_node 2 -m prefopt_trl.cli.run COMMAND ... --use_cpu`, with "
    "`--bf16 False` to train; and, to train, DeepSpeed, with DS_ACCELERATOR=cpu in the environment and "
    "`--num_processes 2 --ddp_backend gloo --use_cpu False --bf16 False`."
)


def launch(name: str, arguments: Sequence[str]) -> None:
    """Start the processes of a command. They check the values of its arguments.

    Raises:
        SystemExit: with exit code 2 for arguments that cannot work, or with that of a process that failed.
    """
    try:
        _, given, options = read(name, arguments)
        backend = getattr(given, "ddp_backend", None)
        launched = launch_arguments(options, [name, *arguments], given.use_cpu, backend)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave_to_children)
        if name.startswith("rounds "):
            os.environ[ONE_PHASE] = "1"
        launch_command(launched)
        while ONE_PHASE in os.environ and not _is_finished(given.output_dir):
            launch_command(launch_arguments(options, [name, *arguments], given.use_cpu, backend))
    except USER_ERRORS as error:
        fail(name, error)
    except SignalException as error:  # torchrun's
        raise SystemExit(128 + error.sigval) from None
    except (subprocess.CalledProcessError, ChildFailedError) as error:
        code = error.get_first_failure()[1].exitcode if isinstance(error, ChildFailedError) else error.returncode
        raise SystemExit(code if code >= 0 else 128 - code) from None  # as a shell does if a signal ended the process


def _is_finished(output_dir: str | None) -> bool:
    """Return whether rounds have no phase left; the main process has written that, where all nodes see it."""
    written = read_json(Path(output_dir or "trainer_output", "rounds.json"))
    if written is None:
        raise ValueError(f"This machine does not see the files of the main process in {output_dir}. Share the folder.")
    return bool(written["finished"])


def launch_arguments(
    options: LaunchOptions, arguments: Sequence[str], use_cpu: bool = False, ddp_backend: str | None = None
) -> Namespace:
    """Return the arguments of `accelerate launch`, for its options and the arguments of each process.

    Raises:
        ValueError: if accelerate could not start the processes, or would start others than were asked for.
        FileNotFoundError: if there is no such configuration.
    """
    options, named = dict(options), "accelerate"
    if "accelerate_config" in options:
        file = _config_file(str(options.pop("accelerate_config")))
        options, named = {"config_file": file, **_deepspeed_file(file), **options}, file.stem
    given_options = {option: value for option, value in options.items() if value is not None and value is not False}
    words = [f"--{option}" if value is True else f"--{option}={value}" for option, value in given_options.items()]
    given = launch_command_parser().parse_args([*words, "--module", MODULE, *arguments])
    default = default_config_file if os.path.isfile(default_config_file) else None
    config = _read(given.config_file or default)
    if not config:  # accelerate warns unless its own defaults are given
        given.num_machines = given.num_machines or 1
        given.mixed_precision = given.mixed_precision or "no"
        given.dynamo_backend = given.dynamo_backend or "no"
    flags = {"DEEPSPEED": given.use_deepspeed, "FSDP": given.use_fsdp, "MULTI_GPU": given.multi_gpu}
    engine = next((engine for engine, is_on in flags.items() if is_on), config.get("distributed_type"))
    cpu_is_set = use_cpu or given.cpu or config.get("use_cpu", False)
    on_cpu = cpu_is_set or not torch.accelerator.is_available()
    num_gpus, num_machines = torch.accelerator.device_count(), given.num_machines or config.get("num_machines", 1)
    num_processes = given.num_processes or config.get("num_processes", -1)
    if num_processes == -1:  # by default one for each device
        num_processes = given.num_processes = 1 if on_cpu else num_gpus
    start = f"{named} is to start {num_processes} process(es)"
    if not on_cpu and num_processes > num_machines * num_gpus:
        raise ValueError(
            f"{start} on {num_machines} machine(s), and this one has {num_gpus} GPU(s). Pass --num_processes "
            f"{num_machines * num_gpus}."
        )
    deepspeed_on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" and ddp_backend == "gloo" and not cpu_is_set
    several = engine != "DEEPSPEED" and num_processes > 1 and given.mpirun_hostfile is None
    if on_cpu and (engine == "FSDP" or (engine == "DEEPSPEED" and not deepspeed_on_cpu) or several):
        raise ValueError(
            f"{start}, and on the CPU accelerate starts one, without DeepSpeed and FSDP. Use GPUs, or leave the "
            f"options out. {ON_THE_CPU}"
        )
    return given


def configs() -> Path:
    """Return the folder of the package's configurations: next to the package in a clone, inside it if installed."""
    package = Path(prefopt_trl.__file__).parent
    return next(folder for folder in (package.parent / "ds_configs", package / "ds_configs") if folder.is_dir())


def _config_file(name: str) -> Path:
    path = Path(name) if Path(name).is_file() else configs() / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in configs().glob("*.yaml")))
        raise FileNotFoundError(f"--accelerate_config {name!r} is neither a file nor one of {names}.")
    return path


def _deepspeed_file(config_file: Path) -> LaunchOptions:
    """Return the option for the DeepSpeed file that a configuration names, with the file's absolute path."""
    named = (_read(config_file).get("deepspeed_config") or {}).get("deepspeed_config_file")
    if named is None:
        return {}
    folder = config_file.resolve().parent
    for place in (folder.parent / named, folder / named, Path.cwd() / named):
        if place.is_file():
            return {"deepspeed_config_file": place}
    raise FileNotFoundError(f"{config_file} names the DeepSpeed file {named}, which is not there. Check its path.")


def _read(config_file: str | Path | None) -> dict[str, Any]:
    """Read a configuration of accelerate."""
    config = yaml.safe_load(Path(config_file).read_text(encoding="utf-8")) if config_file is not None else {}
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a YAML mapping, as `accelerate config` writes it.")
    return config


def _leave_to_children(number: int, frame: FrameType | None) -> None:
    """Wait for the processes, which print what is saved. They receive Ctrl-C from the terminal, and SIGTERM here."""
    children = psutil.Process().children()
    if not children:
        raise SystemExit(128 + number)
    for child in children if number == signal.SIGTERM else []:
        child.send_signal(number)
