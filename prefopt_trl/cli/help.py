"""The first screen of `prefopt-trl COMMAND --help`: the common options, printed without importing torch."""

from argparse import ArgumentParser, HelpFormatter
from dataclasses import MISSING, fields

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.trainers import METHODS, Options

# Options of TRL's and transformers' configurations
MODEL = {
    "model_name_or_path": "Model: a folder or Hub id, of a model or of an adapter.",
    "dtype": "Type of the weights.",
    "load_in_4bit": "Quantize the weights, with bitsandbytes.",
}
TRAINING = {
    "output_dir": "Folder for the model, its checkpoints and config.yaml.",
    "learning_rate": "Largest learning rate of AdamW.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, instead of epochs.",
    "per_device_train_batch_size": "Rows per step on each process.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "max_length": "Longest prompt and completion, in tokens.",
    "use_peft": "Train a LoRA adapter instead of all weights.",
    "lora_r": "Rank of the adapter.",
    "eval_strategy": "When to evaluate: no, steps or epoch.",
    "save_steps": "Steps between checkpoints.",
    "resume_from_checkpoint": "Resume the latest checkpoint in `output_dir`, or the one at a path.",
    "report_to": "Trackers, such as wandb.",
    "push_to_hub": "Push the model to the Hub once it is saved.",
    "use_cpu": "Run on the CPU.",
}
SAMPLING = ["num_candidates", "rejection_beta", "max_new_tokens"]  # of `SamplingOptions`
USAGE = (
    "Options are given on the command line or in the YAML file of --config; the command line wins. A bool is set by "
    "its name, and unset by `--NAME False`."
)
LAUNCHING = (
    "Processes are started by `accelerate launch`, and its options are accepted, such as --num_processes 8; "
    "--accelerate_config is ddp, fsdp2, zero2, zero3, zero3_offload or a file."
)


def first_screen(name: str) -> str:
    """Return what `prefopt-trl NAME --help` prints."""
    command = COMMANDS[name]
    sentences = [f"{command.summary[0].upper()}{command.summary[1:]}.", USAGE]
    parser = ArgumentParser(
        usage=f"prefopt-trl {name} [--config FILE.yaml] [--OPTION VALUE ...]",
        description=" ".join([*sentences, LAUNCHING] if command.launched else sentences),
        epilog="`--help all` lists every option, with its default.",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36),
        add_help=False,
    )
    groups = {title: _with_defaults(options) for title, options in own_options(name).items()}
    groups |= {"model": MODEL} if command.takes_model else {}
    groups |= {"training": TRAINING} if issubclass(command.own, TrainingData) else {}
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option, text in options.items():
            group.add_argument(f"--{option}", metavar="", help=text)
    return parser.format_help()


def own_options(name: str) -> dict[str, Options]:
    """Return the common options of a command that are not TRL's, with defaults and help, by title and name."""
    own = _options_of(COMMANDS[name].own)
    ranker = {option: own.pop(option) for option in list(own) if option.startswith("ranker")}
    groups = {"data" if issubclass(COMMANDS[name].own, TrainingData) else "data, sampling and results": own}
    if ranker:
        groups["ranker"] = ranker
    if (method := name.split()[-1]) in METHODS:
        sampling = _options_of(SamplingOptions)
        groups["method"] = METHODS[method].options
        groups["sampling, for prompts without completions"] = {option: sampling[option] for option in SAMPLING}
    return groups


def _options_of(dataclass: type) -> Options:
    return {field.name: (field.default, field.metadata["help"]) for field in fields(dataclass)}


def _with_defaults(options: Options) -> dict[str, str]:
    def described(default: object, text: str) -> str:
        if default is None or default is False:
            return text
        return f"{text} (required)" if default is MISSING else f"{text} (default: {default})"

    return {name: described(*option) for name, option in options.items()}
