import dataclasses
import json
import math
import pickle

import pytest
import yaml
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from prefopt_trl import SamplingOptions
from prefopt_trl.trainers.base_config import REFERENCE_ARGUMENTS, TRL_LOSS_ARGUMENTS, PreferenceConfig, refuse
from prefopt_trl.trainers.listwise_dpo_config import ListwiseDPOConfig
from prefopt_trl.trainers.pro_config import PROConfig
from prefopt_trl.trainers.rrhf_config import RRHFConfig
from prefopt_trl.trainers.rso_config import RSOConfig
from prefopt_trl.trainers.slic_config import SLiCConfig

CONFIGS = [RSOConfig, SLiCConfig, PROConfig, RRHFConfig, ListwiseDPOConfig]
ON_RANKINGS = [PROConfig, RRHFConfig, ListwiseDPOConfig]
REFERENCE_FREE = [SLiCConfig, PROConfig, RRHFConfig]
DPO_FIELDS = {field.name: field for field in dataclasses.fields(DPOConfig)}
# A value other than the default, of every argument of TRL's losses
OTHER_VALUES = {
    "loss_weights": [1.0],
    "ld_alpha": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "label_smoothing": 0.1,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "loss_type": ["hinge"],
    "beta": 0.3,
    "precompute_ref_log_probs": True,
    "precompute_ref_batch_size": 2,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 3,
    "sampling_policy": "reference",
}
# What a user may set for each, from the command line too
SETTINGS = {
    RSOConfig: {"gamma": 0.2, "loss_type": ["hinge"], "rejection_beta": 1.5, "sampling": "online"},
    SLiCConfig: {"loss_type": ["slic"], "delta": 4.0, "regularization_weight": 0.5, "target_column": "reference"},
    PROConfig: {"reward_temperature": "none", "sft_weight": 0.0, "first_term_only": True, "temperature": 0.7},
    RRHFConfig: {"sft_weight": 0.5, "num_samples": 6},
    ListwiseDPOConfig: {"beta": 0.3, "sampling": "online", "sampling_policy": "reference"},
}


def own_fields(config_class):
    return [field for field in dataclasses.fields(config_class) if field.name not in DPO_FIELDS]


def init_arguments(config_class):
    # transformers writes every token, such as one for the Hub, as a placeholder
    return {field.name for field in dataclasses.fields(config_class) if field.init and "token" not in field.name}


def test_the_lists_of_arguments_are_trls():
    assert {*TRL_LOSS_ARGUMENTS, *REFERENCE_ARGUMENTS} <= DPO_FIELDS.keys() | {"sampling_policy"}
    assert set(OTHER_VALUES) == {*TRL_LOSS_ARGUMENTS, *REFERENCE_ARGUMENTS, "loss_type"}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_other_default_is_trls(config_class, config):
    ours, trls = config(config_class), config(DPOConfig)
    redefined = {
        name
        for parent in config_class.__mro__[: config_class.__mro__.index(DPOConfig)]
        for name in vars(parent).get("__annotations__", ())
    }
    assert redefined & DPO_FIELDS.keys() <= {"loss_type", "beta"}
    for name in DPO_FIELDS.keys() - redefined:
        assert getattr(ours, name) == getattr(trls, name), name


def test_the_defaults_of_each_method(config):
    slic, pro, rrhf, listwise = map(config, (SLiCConfig, PROConfig, RRHFConfig, ListwiseDPOConfig))
    assert (slic.loss_type, slic.delta, slic.regularization_weight) == (["slic"], 20.0, 0.0)
    assert (slic.strategy, slic.pairing, slic.num_samples) == ("sft", "tournament", 8)
    assert (pro.reward_temperature, pro.sft_weight, pro.first_term_only) == ("dynamic", 0.05, False)
    assert (rrhf.sft_weight, listwise.beta) == (1.0, 0.1)
    assert [(args.strategy, args.pairing, args.num_samples) for args in (pro, rrhf, listwise)] == [
        ("sft", "ranking", 4),
        ("sft", "ranking", 4),
        ("rso", "ranking", 4),
    ]


@pytest.mark.parametrize("config_class", [RSOConfig, SLiCConfig])
def test_batches_of_given_pairs_may_be_dispatched_as_by_trl(config_class, config):
    assert config(config_class, accelerator_config={"dispatch_batches": True}).accelerator_config.dispatch_batches


@pytest.mark.parametrize("config_class", [SLiCConfig, *ON_RANKINGS])
@pytest.mark.parametrize("name", [*TRL_LOSS_ARGUMENTS, "loss_type"])
def test_arguments_of_trls_losses_are_refused_by_name(name, config_class, config):
    own = {SLiCConfig: "unlikelihood", ListwiseDPOConfig: "lambda"}
    if name == "loss_type" and config_class in own:
        assert config(config_class, loss_type=own[config_class]).loss_type == [own[config_class]]
        return
    with pytest.raises(ValueError, match=f"`{name}`=.* has no effect in {config_class.__name__}: .* Leave it out."):
        config(config_class, **{name: OTHER_VALUES[name]})


@pytest.mark.parametrize("config_class", REFERENCE_FREE)
@pytest.mark.parametrize("name", REFERENCE_ARGUMENTS)
def test_arguments_of_a_reference_model_are_refused_by_name(name, config_class, config):
    with pytest.raises(ValueError, match=f"`{name}`=.* has no effect in {config_class.__name__}: .*no reference"):
        config(config_class, **{name: OTHER_VALUES[name]})


@pytest.mark.parametrize("config_class", REFERENCE_FREE)
def test_an_argument_at_its_default_may_be_written_out(config_class, config):
    assert config(config_class, beta=DPO_FIELDS["beta"].default, label_smoothing=0.0, sync_ref_model=False)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampling": "on-line"}, "`sampling` must be one of offline, online, got 'on-line'"),
        ({"strategy": "best"}, "`strategy` must be one of rso, sft, top-k, got 'best'"),
        ({"pairing": "second-round"}, "`pairing` must be one of .*, got 'second-round'"),
        ({"rejection_beta": -1.0}, "`rejection_beta` must be 'auto', or at least 0, got -1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(given, message, config_class, config):
    with pytest.raises(ValueError, match=message):
        config(config_class, **given)


@pytest.mark.parametrize("config_class", ON_RANKINGS)
@pytest.mark.parametrize("pairing", ["first-round", "tournament", "all"])
def test_rankings_are_not_paired(pairing, config_class, config):
    with pytest.raises(ValueError, match=f"`pairing` must be one of ranking, got '{pairing}'"):
        config(config_class, pairing=pairing)


@pytest.mark.parametrize("pairing", ["ranking", "best"])
@pytest.mark.parametrize("config_class", [RSOConfig, SLiCConfig])
def test_pairs_are_not_ranked(config_class, pairing, config):
    with pytest.raises(ValueError, match=f"`pairing` must be one of first-round, .*correct-wrong, got '{pairing}'"):
        config(config_class, pairing=pairing)


def test_a_policy_to_sample_from_is_one_of_two(config):
    with pytest.raises(ValueError, match="`sampling_policy` must be one of current, reference, got 'old'"):
        config(RSOConfig, sampling="online", sampling_policy="old")


def test_online_pairs_cannot_be_precomputed(config):
    with pytest.raises(ValueError, match="`precompute_ref_log_probs` needs the pairs before training"):
        config(RSOConfig, sampling="online", precompute_ref_log_probs=True)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_sampling_temperature_is_above_zero(value, config_class, config):
    with pytest.raises(ValueError, match=f"`temperature` must be greater than 0 and finite, got {value}"):
        config(config_class, temperature=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward_temperature": "Dynamic"}, "`reward_temperature` must be one of dynamic, none, got 'Dynamic'"),
        ({"sft_weight": -0.1}, "`sft_weight` must be at least 0 and finite, got -0.1. The paper uses 0.05."),
        ({"sft_weight": math.nan}, "`sft_weight` must be at least 0 and finite, got nan"),
        (
            {"bootstrap_parts": 2, "sampling": "online"},
            "`bootstrap_parts` adds samples to completions, and `sampling=",
        ),
        ({"bootstrap_parts": -1}, "`bootstrap_parts` must be a whole number, at least 0, got -1"),
    ],
)
def test_pros_numbers(given, message, config):
    with pytest.raises(ValueError, match=message):
        config(PROConfig, **given)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_rrhfs_weight(value, config):
    with pytest.raises(ValueError, match=f"`sft_weight` must be at least 0 and finite, got {value}"):
        config(RRHFConfig, sft_weight=value)


def test_how_to_sample(config):
    given = {"max_new_tokens": 9, "top_p": 0.8, "top_k": 11, "generation_batch_size": 5, "share_prefix": False}
    ranking = {"strategy": "sft", "num_samples": 4, "pairing": "ranking"}
    pro = config(PROConfig, temperature=0.7, **given)
    assert SamplingOptions.of(pro) == SamplingOptions(temperature=0.7, **ranking, **given)
    slic = config(SLiCConfig, temperature=0.7, **given)
    assert SamplingOptions.of(slic) == SamplingOptions(strategy="sft", pairing="tournament", temperature=0.7, **given)
    rso = config(RSOConfig, rejection_beta=2.0, num_candidates=16)
    assert SamplingOptions.of(rso) == SamplingOptions(rejection_beta=2.0, num_candidates=16)
    assert not rso.keep_logps and config(RSOConfig, reference_logps="sampled").keep_logps


def test_arguments_without_effect_are_refused_by_name(config):
    args = config(PreferenceConfig, label_smoothing=0.25)
    with pytest.raises(ValueError, match="`label_smoothing`=0.25 has no effect in PreferenceConfig: it is so. Leave"):
        refuse(args, ["label_smoothing"], "it is so")
    refuse(args, ["beta", "loss_type", "loss_weights"], "these are at their defaults")


# The command line and files


def command_line(settings):
    line = ["--output_dir=out", "--use_cpu", "--bf16", "False"]
    for name, value in settings.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_command_line(parser, config_class):
    settings = {**SETTINGS[config_class], "share_prefix": False, "max_new_tokens": 32}
    (args,) = parser(config_class).parse_args_into_dataclasses(command_line(settings))
    assert {name: getattr(args, name) for name in settings} == settings
    assert args == config_class("out", use_cpu=True, bf16=False, **settings)
    (plain,) = parser(config_class).parse_args_into_dataclasses(command_line({}))
    assert plain == config_class("out", use_cpu=True, bf16=False)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("name", ["sampling", "strategy", "pairing"])
def test_unknown_choices_are_refused_on_the_command_line(name, config_class, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(config_class).parse_args_into_dataclasses([f"--{name}", "unknown"])
    assert "invalid choice: 'unknown'" in capsys.readouterr().err


def test_pros_temperature_is_a_choice_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(PROConfig).parse_args_into_dataclasses(["--reward_temperature", "0.7"])
    assert "invalid choice: '0.7' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_yaml_file_and_what_overrides_it(config_class, tmp_path):
    settings = {**SETTINGS[config_class], "num_candidates": 12}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"output_dir": "out", "use_cpu": True, "bf16": False, **settings})
    )
    line = ["--config", str(tmp_path / "config.yaml"), "--num_candidates", "10"]
    (args,) = TrlParser(config_class).parse_args_and_config(line)
    assert args == config_class("out", use_cpu=True, bf16=False, **{**settings, "num_candidates": 10})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_argument_has_a_help_text_of_its_own(config_class):
    names = [field.name for field in own_fields(config_class)]
    texts = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(config_class)}
    assert all(len(texts[name]) > 10 and texts[name].endswith(".") for name in names), texts
    assert len({texts[name] for name in names}) == len(names)
    help_page = HfArgumentParser(config_class).format_help()  # argparse expands % in help texts
    assert all(f"--{name}" in help_page for name in names)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_config_makes_the_same_config(config_class, config):
    args = config(config_class, **SETTINGS[config_class])
    assert pickle.loads(pickle.dumps(args)) == args  # training_args.bin
    init = init_arguments(config_class)
    for saved in (dataclasses.asdict(args), json.loads(args.to_json_string())):
        again = config_class(**{name: value for name, value in saved.items() if name in init})
        assert again.to_dict() == args.to_dict()
    assert dataclasses.replace(args, num_candidates=32).num_candidates == 32
