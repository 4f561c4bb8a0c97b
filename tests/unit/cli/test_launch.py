"""What is handed to `accelerate launch`, and what is refused before that because it could not work."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch as accelerate_launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from prefopt_trl.cli import launch, parsing
from prefopt_trl.cli.main import main

ARGUMENTS = ["rso", "--gamma", "0.1"]
OURS = Path(__file__).parents[3] / "ds_configs"


@pytest.fixture
def gpus(monkeypatch):
    """Make as many GPUs as are asked for; none at first. Whatever accelerate may be set up with here is left out."""

    def have(number):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: number)

    have(0)
    monkeypatch.setattr(launch, "default_config_file", "no/such/file.yaml")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return have


def launching(options, use_cpu=False, ddp_backend=None):
    return launch.launch_arguments(parsing._options(options.split()), ARGUMENTS, use_cpu, ddp_backend)


def test_a_process_runs_the_command_as_a_module(gpus):
    given = launching("", use_cpu=True)
    assert (given.module, given.training_script) == (True, "prefopt_trl.cli.run")
    assert given.training_script_args == ["rso", "--gamma", "0.1"]
    assert given.num_processes == 1


def test_without_a_number_all_devices_are_used(gpus):
    gpus(4)
    assert launching("").num_processes == 4
    assert launching("--accelerate_config ddp").num_processes == 4
    assert launching("--accelerate_config ddp --num_processes 2").num_processes == 2


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero2", "ddp", "fsdp2"])
def test_our_configs_by_name_from_any_folder(gpus, name, tmp_path, monkeypatch):
    gpus(8)
    monkeypatch.chdir(tmp_path)
    given = launching(f"--accelerate_config {name} --num_processes 8")
    assert given.config_file == str(OURS / f"{name}.yaml")
    engine = yaml.safe_load((OURS / f"{name}.yaml").read_text()).get("deepspeed_config", {})
    named = engine.get("deepspeed_config_file")
    assert given.deepspeed_config_file == (named and str(OURS.parent / named))


def test_the_option_wins_over_the_deepspeed_file_that_the_config_names(gpus, tmp_path, monkeypatch):
    gpus(1)
    monkeypatch.chdir(tmp_path)
    given = launching("--accelerate_config zero2 --num_processes 1")
    merged, *_ = accelerate_launch._validate_launch_command(given)
    assert merged.use_deepspeed
    assert merged.deepspeed_config_file == str(OURS / "zero2.json")


def test_a_config_of_ones_own_finds_the_deepspeed_file_beside_it(gpus, tmp_path):
    gpus(1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ds.json").write_text("{}")
    own = tmp_path / "mine" / "own.yaml"
    own.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n")
    assert launching(f"--accelerate_config {own}").deepspeed_config_file == str(tmp_path / "mine" / "ds.json")
    own.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: lost.json\n")
    with pytest.raises(FileNotFoundError, match="names the DeepSpeed file lost.json, which is not there"):
        launching(f"--accelerate_config {own}")
    own.write_text("- zero3\n")
    with pytest.raises(ValueError, match="own.yaml must hold a YAML mapping"):
        launching(f"--accelerate_config {own}")


def test_a_number_of_zero_is_passed_on(gpus):
    gpus(1)
    options = {"main_process_port": 0, "num_machines": None, "multi_gpu": False}
    assert launch.launch_arguments(options, ARGUMENTS).main_process_port == 0


def test_the_last_config_wins(gpus):
    gpus(1)
    given = launching("--accelerate_config zero3 --num_processes 8 --accelerate_config ddp --num_processes 1")
    assert (Path(given.config_file).stem, given.num_processes) == ("ddp", 1)


@pytest.mark.parametrize(
    ("num_gpus", "options", "use_cpu", "message"),
    [
        (0, "--accelerate_config zero9", False, "neither a file nor one of ddp, fsdp2, zero2, zero3, zero3_offload"),
        (0, "--accelerate_config", False, "neither a file nor one of ddp"),
        (0, "--accelerate_config zero3", False, "on the CPU accelerate starts one, without Deep.*DS_ACCELERATOR"),
        (0, "--accelerate_config zero3 --num_processes 8", False, r"zero3 is to start 8 process.*on the CPU"),
        (0, "--accelerate_config zero3", True, "DS_ACCELERATOR=cpu .* --ddp_backend gloo --use_cpu False"),
        (0, "--use_deepspeed", False, "without DeepSpeed and FSDP"),
        (1, "--accelerate_config zero2 --cpu", False, "without DeepSpeed and FSDP"),
        (2, "--accelerate_config fsdp2", True, "without DeepSpeed and FSDP"),
        (2, "--use_fsdp --cpu", False, "without DeepSpeed and FSDP"),
        (0, "--cpu --num_processes 2", False, "accelerate is to start 2 .*`torchrun --nproc_per_node 2 -m pre"),
        (0, "--num_processes 3", True, "is to start 3 process.*on the CPU accelerate starts one"),
        (0, "--accelerate_config ddp --num_processes 2", False, "ddp is to start 2 .*on the CPU"),
        (1, "--accelerate_config zero3 --num_processes 8", False, r"zero3 is to start 8 .* Pass --num_processes 1\."),
        (4, "--num_processes 5", False, r"this one has 4 GPU\(s\). Pass --num_processes 4"),
        (4, "--num_machines 2 --num_processes 9", False, r"9 process.* on 2 machine\(s\).*Pass --num_processes 8"),
        (1, "--num_processes 1 script.py", False, "unexpected argument 'script.py'"),
    ],
)
def test_what_could_not_work_is_refused_with_a_remedy(gpus, num_gpus, options, use_cpu, message):
    gpus(num_gpus)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        launching(options, use_cpu)


def test_deepspeed_runs_on_the_cpu_where_it_is_told_to(gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert launching("--accelerate_config zero3 --num_processes 2", ddp_backend="gloo").num_processes == 2
    assert launching("--accelerate_config zero3", ddp_backend="gloo").num_processes == 1
    with pytest.raises(ValueError, match="--ddp_backend gloo"):  # its processes would not know of each other
        launching("--accelerate_config zero3 --num_processes 2")


def test_a_recipe_for_8_gpus_is_refused_for_its_config_not_for_its_dtype(gpus, capsys):
    recipe = Path(__file__).parents[3] / "examples" / "recipes" / "llama-7b" / "rso_full_zero3.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["rso", "--config", str(recipe)])
    assert stop.value.code == 2
    assert "error: zero3 is to start 8 process(es), and on the CPU accelerate starts one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (subprocess.CalledProcessError(3, ["python"]), 3),
        (subprocess.CalledProcessError(-9, ["python"]), 137),
        (ChildFailedError("run", {0: ProcessFailure(0, 1, 7, "no/error/file")}), 7),
        (ImportError("DeepSpeed is not installed"), 2),
    ],
)
def test_a_failed_process_gives_its_exit_code_and_nothing_on_top(failure, code, training, monkeypatch, capsys):
    monkeypatch.setattr(launch, "default_config_file", "no/such/file.yaml")

    def fail(arguments):
        raise failure

    monkeypatch.setattr(launch, "launch_command", fail)
    with pytest.raises(SystemExit) as stop:
        main(["rso", *training, "--output_dir", "out"])
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert said == ("prefopt-trl rso: error: DeepSpeed is not installed\n" if code == 2 else "")


def test_the_launcher_hands_every_argument_on_and_takes_no_device(training, monkeypatch):
    monkeypatch.setattr(launch, "default_config_file", "no/such/file.yaml")
    handed = []
    monkeypatch.setattr(launch, "launch_command", handed.append)
    arguments = [*training, "--output_dir", "out", "--ddp_backend", "gloo", "--num_processes", "1"]
    main(["rso", *arguments])  # outside of a process group, the backend alone would be an error
    assert handed[0].training_script_args == ["rso", *arguments], shlex.join(handed[0].training_script_args)
    assert not Path("out").exists()
