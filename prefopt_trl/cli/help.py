"""The first screen of `prefopt-trl COMMAND --help`: the options that people set, without importing torch."""

from argparse import ArgumentParser, HelpFormatter
from dataclasses import MISSING, fields

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.trainers import METHODS, Options

# Options of TRL's and transformers' configurations, with their defaults, which a test compares with the real parser's
MODEL: Options = {
    "model_name_or_path": (None, "Model: a folder or Hub id, of a model or of an adapter."),
    "dtype": ("float32", "Type of the weights."),
    "load_in_4bit": (False, "Quantize the weights, with bitsandbytes."),
}
TRAINING: Options = {
    "output_dir": (None, "Folder for the model, its checkpoints and config.yaml."),
    "learning_rate": (1e-6, "Largest learning rate of AdamW."),
    "num_train_epochs": (3.0, "Passes over the data."),
    "max_steps": (-1, "Steps of the optimizer, in place of epochs."),
    "per_device_train_batch_size": (8, "Rows per step on each process."),
    "gradient_accumulation_steps": (1, "Batches per step of the optimizer."),
    "max_length": (1024, "Longest prompt and completion, in tokens."),
    "use_peft": (False, "Train a LoRA adapter in place of all weights."),
    "lora_r": (16, "Rank of the adapter."),
    "eval_strategy": ("no", "When to evaluate: no, steps or epoch."),
    "save_steps": (500, "Steps between checkpoints."),
    "resume_from_checkpoint": (None, "Resume the latest checkpoint in `output_dir`, or the one at a path."),
    "report_to": ("none", "Trackers, such as wandb."),
    "push_to_hub": (False, "Push the model to the Hub once it is saved."),
    "use_cpu": (False, "Leave accelerators alone."),
}
SAMPLING = ["num_candidates", "rejection_beta", "max_new_tokens"]  # of `SamplingOptions`
USAGE = (
    "Options are given on the command line or in the YAML file of --config; the command line wins. A bool is set by "
    "its name, and unset by `--NAME False`."
)
LAUNCHING = (
    "Processes are started by `accelerate launch`, whose options are taken too, such as --num_processes 8; "
    "--accelerate_config is ddp, fsdp2, zero2, zero3, zero3_offload or a file."
)


def first_screen(name: str) -> str:
    """Return what `prefopt-trl NAME --help` prints."""
    command = COMMANDS[name]
    sentences = [f"{command.summary[0].upper()}{command.summary[1:]}.", USAGE]
    parser = ArgumentParser(
        usage=f"prefopt-trl {name} [--config FILE.yaml] [--OPTION VALUE ...]",
        description=" ".join([*sentences, LAUNCHING] if command.launched else sentences),
        epilog="`--help all` lists every option.",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36),
        add_help=False,
    )
    for title, options in option_groups(name).items():
        group = parser.add_argument_group(title)
        for option, (default, text) in options.items():
            note = "required" if default is MISSING else f"default: {default}"
            shown = text if default is None or default is False else f"{text} ({note})"
            group.add_argument(f"--{option}", metavar="", help=shown)
    return parser.format_help()


def option_groups(name: str) -> dict[str, Options]:
    """Return the options of a command that people set, with their defaults and help, by title and name."""
    own = _options_of(COMMANDS[name].own)
    ranker = {option: own.pop(option) for option in list(own) if option.startswith("ranker")}
    trains = issubclass(COMMANDS[name].own, TrainingData)
    groups = {"data" if trains else "data, sampling and results": own}
    if ranker:
        groups["ranker"] = ranker
    if name in METHODS:
        sampling = _options_of(SamplingOptions)
        groups["method"] = METHODS[name].options
        groups["sampling, for prompts without completions"] = {option: sampling[option] for option in SAMPLING}
    groups["model"] = MODEL
    if trains:
        of_sft = {"learning_rate": (2e-5, TRAINING["learning_rate"][1])} if name in ("sft", "ranker") else {}
        groups["training"] = TRAINING | of_sft
    return groups


def _options_of(dataclass: type) -> Options:
    return {field.name: (field.default, field.metadata["help"]) for field in fields(dataclass)}
