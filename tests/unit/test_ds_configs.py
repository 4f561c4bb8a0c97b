"""The engines' configs: what the libraries make of them, and that each value has its reason in the README."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from deepspeed.runtime import constants
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
JSON_FILES = sorted(path.name for path in CONFIGS.glob("*.json"))
YAML_FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
FOUR = ["--num_processes", "4"]
STAGES = {"zero3.json": 3, "zero3_offload.json": 3, "zero2.json": 2}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))  # JSON is YAML


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def reasons(heading: str) -> dict[str, Any]:
    """The values below a heading of the README, each of which has a reason."""
    readme = (CONFIGS / "README.md").read_text(encoding="utf-8")
    section = readme.split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([\w.]+): (.+?)` \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 2 and all(reason.strip() for *_, reason in rows)
    return {name: json.loads(value) for name, value, _ in rows}


def test_all_files_are_here():
    assert set(JSON_FILES) == STAGES.keys()
    assert {name.removesuffix(".yaml") for name in YAML_FILES} == {"zero3", "zero3_offload", "zero2", "ddp", "fsdp2"}


@pytest.mark.parametrize("name", [*JSON_FILES, *YAML_FILES])
def test_each_value_has_its_reason_and_each_reason_its_value(name):
    shared = reasons("All JSON files") if name in JSON_FILES else {}
    own = reasons(f"`{name}`")
    assert not shared.keys() & own.keys()
    assert leaves(read(name)) == shared | own


@pytest.mark.parametrize("name", JSON_FILES)
def test_no_value_of_deepspeed_is_unknown_or_its_default(name):
    values = read(name)
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert values.keys() <= known | {"zero_optimization"}
    fields = DeepSpeedZeroConfig.model_fields
    by_alias = {field.alias or field_name: field_name for field_name, field in fields.items()}
    default = DeepSpeedZeroConfig()
    for key, value in values["zero_optimization"].items():
        assert getattr(default, by_alias[key]) != value
    assert DeepSpeedBF16Config().enabled is False and constants.ZERO_FORCE_DS_CPU_OPTIMIZER_DEFAULT is True
    assert values.get("zero_force_ds_cpu_optimizer", False) is False


@pytest.mark.parametrize("name", JSON_FILES)
def test_deepspeed_reads_what_the_trainer_fills_in(name, tmp_path, tiny_llama_dir):
    given = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_grad_norm": 0.7}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True, **given)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)  # before the config, which ZeRO-3's loading looks at
    filled = HfTrainerDeepSpeedConfig(str(CONFIGS / name))
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, model, num_training_steps=10)
    assert "auto" not in leaves(filled.config).values()

    config = DeepSpeedConfig(filled.config)
    assert config.zero_config.stage == STAGES[name]
    assert config.bfloat16_config.enabled is True
    assert config.train_batch_size == 15 and config.gradient_clipping == 0.7
    assert config.zero_config.reduce_bucket_size == 32**2
    assert config.zero_config.gather_16bit_weights_on_model_save is (STAGES[name] == 3)
    offloaded = [config.zero_config.offload_optimizer, config.zero_config.offload_param]
    assert [place and place.device for place in offloaded] == (["cpu"] * 2 if "offload" in name else [None] * 2)


def launched(monkeypatch: pytest.MonkeyPatch, config: Path | str, *arguments: str) -> Any:
    """The arguments with which `accelerate launch` would start its launcher."""
    started: list[Any] = []
    for launcher in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        monkeypatch.setattr(launch, launcher, started.append)
    parser = launch.launch_command_parser()
    config = f"--config_file={CONFIGS / config}"
    launch.launch_command(parser.parse_args([config, *arguments, "--main_process_port", "0", "train.py"]))
    return started[0]


def enter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero2"])
def test_accelerate_starts_deepspeed(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = launched(monkeypatch, f"{name}.yaml", *FOUR)
    assert arguments.use_deepspeed and arguments.num_processes == 4 and arguments.num_machines == 1
    enter(monkeypatch, prepare_deepspeed_cmd_env(arguments)[1])

    plugin = DeepSpeedPlugin()  # as the trainer makes it; raises where YAML and JSON are in each other's way
    plugin.set_mixed_precision("bf16")
    assert plugin.zero_stage == STAGES[f"{name}.json"]
    assert plugin.deepspeed_config["bf16"]["enabled"] is True
    assert plugin.is_zero3_init_enabled() is plugin.zero3_save_16bit_model is name.startswith("zero3")
    device = "cpu" if name == "zero3_offload" else "none"
    assert plugin.offload_optimizer_device == plugin.offload_param_device == device


def test_the_readme_is_right_that_a_precision_beside_the_json_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "zero3.yaml"
    path.write_text((CONFIGS / "zero3.yaml").read_text() + "mixed_precision: bf16\n")
    arguments = launched(monkeypatch, path, *FOUR)
    enter(monkeypatch, prepare_deepspeed_cmd_env(arguments)[1])
    with pytest.raises(ValueError, match="mixed_precision"):
        DeepSpeedPlugin()


def test_a_path_on_the_command_line_wins(monkeypatch):
    path = str(CONFIGS / "zero2.json")
    arguments = launched(monkeypatch, "zero3.yaml", *FOUR, "--deepspeed_config_file", path)
    assert arguments.deepspeed_config_file == path


@pytest.mark.parametrize("name", YAML_FILES)
def test_accelerate_asks_for_the_number_of_processes(name, monkeypatch):
    with pytest.raises(ValueError, match="--num_processes"):
        launched(monkeypatch, name)


def test_several_nodes_need_no_hostfile(monkeypatch):
    monkeypatch.chdir(ROOT)
    nodes = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--num_processes", "16"]
    arguments = launched(monkeypatch, "zero3.yaml", *nodes)
    command, _ = prepare_deepspeed_cmd_env(arguments)
    assert command is None  # torch's launcher in this process, rather than DeepSpeed's
    assert (arguments.nproc_per_node, arguments.nnodes, arguments.node_rank) == ("8", "2", 1)
    assert arguments.rdzv_endpoint.startswith("10.0.0.1:")


def test_accelerate_starts_ddp(monkeypatch):
    arguments = launched(monkeypatch, "ddp.yaml", *FOUR)
    assert arguments.multi_gpu and not arguments.use_deepspeed and not arguments.use_fsdp
    assert (arguments.num_processes, arguments.num_machines, arguments.mixed_precision) == (4, 1, "no")


def test_accelerate_starts_fsdp2_and_wraps_decoder_layers(monkeypatch, tiny_llama_dir):
    arguments = launched(monkeypatch, "fsdp2.yaml", *FOUR)
    assert arguments.use_fsdp
    enter(monkeypatch, prepare_multi_gpu_env(arguments))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True and plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.activation_checkpointing is False  # the trainer's, and both together are refused
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama_dir))
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert {type(module) for module in model.modules() if wraps(module)} == {LlamaDecoderLayer}
