import dataclasses
import json
import math
import pickle

import pytest
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from prefopt_trl.trainers.rso_config import RSOConfig

DPO_FIELDS = {field.name: field for field in dataclasses.fields(DPOConfig)}
OWN_FIELDS = [
    field for field in dataclasses.fields(RSOConfig) if field.name in RSOConfig.__annotations__
]  # those it adds or redefines


def config(**given) -> RSOConfig:
    return RSOConfig("outputs/rso", use_cpu=True, bf16=False, **given)


def test_defaults_are_the_papers():
    """RSO section 5: beta 0.5, gamma 0.05, 64 candidates, 8 kept, first-round pairs, samples of the policy itself."""
    args = config()
    assert (args.gamma, args.beta, args.rejection_beta) == (0.05, 0.05, 0.5)
    assert (args.num_candidates, args.num_samples, args.pairing, args.strategy) == (64, 8, "first-round", "rso")
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 1.0, 0)
    assert args.loss_type == ["sigmoid"] and args.share_prefix is True


def test_every_other_default_is_trls():
    own = {field.name for field in OWN_FIELDS}
    ours, trls = config(), DPOConfig("outputs/rso", use_cpu=True, bf16=False)
    for name in DPO_FIELDS.keys() - own:
        assert getattr(ours, name) == getattr(trls, name), name
    assert own & DPO_FIELDS.keys() == {"beta", "loss_type"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"gamma": 0.3}, 0.3), ({"beta": 0.3}, 0.3), ({"gamma": 0.3, "beta": 0.3}, 0.3), ({}, 0.05)],
)
def test_gamma_and_beta_are_one_number(given, expected):
    args = config(**given)
    assert args.gamma == args.beta == expected


def test_two_different_temperatures_are_refused():
    with pytest.raises(ValueError, match="`gamma`=0.1 and `beta`=0.5 are two names .* `rejection_beta`"):
        config(gamma=0.1, beta=0.5)


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=f"must be greater than 0 and finite, got {value}. The paper uses 0.05"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sigmoid-norm", ["sigmoid"]),
        ("hinge-norm", ["hinge"]),
        ("sigmoid", ["sigmoid"]),
        (["hinge"], ["hinge"]),
        ("ipo", ["ipo"]),
        (["hinge-norm", "sft"], ["hinge", "sft"]),
        ("sigmoid_norm", ["sigmoid_norm"]),
        ("of_a_later_trl", ["of_a_later_trl"]),
    ],
)
def test_losses_go_by_their_names_in_trl(given, expected):
    assert config(loss_type=given).loss_type == expected


@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        ({}, ["`gamma` is not set and is 0.05"]),
        ({"gamma": 0.05}, []),
        ({"beta": 0.1}, []),
        ({"gamma": 0.1, "loss_type": ["hinge-norm", "sigmoid_norm"]}, ["`loss_type='sigmoid_norm'` is TRL's length-"]),
    ],
)
def test_what_differs_from_trl_by_the_same_name_is_logged(given, warnings, caplog):
    config(**given)
    found = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert len(found) == len(warnings) and all(map(str.startswith, found, warnings))


def test_weights_are_counted_against_the_losses():
    with pytest.raises(ValueError, match="2 weights for 1 loss types"):
        config(loss_type="hinge-norm", loss_weights=[1.0, 2.0])


def test_every_argument_has_a_help_text_of_its_own():
    texts = {field.name: field.metadata.get("help", "") for field in OWN_FIELDS}
    assert all(len(text) > 10 and text.endswith(".") for text in texts.values()), texts
    others = [field.metadata.get("help") for field in dataclasses.fields(RSOConfig) if field not in OWN_FIELDS]
    assert len(set(texts.values())) == len(texts) and not set(texts.values()) & set(others)
    help_page = HfArgumentParser(RSOConfig).format_help()  # argparse expands % in help texts
    assert all(f"--{name}" in help_page for name in texts)


COMMAND_LINE = [
    "--output_dir=out", "--gamma", "0.1", "--loss_type", "hinge-norm", "--num_candidates", "16", "--pairing", "all",
    "--share_prefix", "False", "--use_cpu", "--bf16", "False",
]  # fmt: skip


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_the_command_line(parser):
    (args,) = parser(RSOConfig).parse_args_into_dataclasses(COMMAND_LINE)
    assert (args.gamma, args.beta, args.loss_type) == (0.1, 0.1, ["hinge"])
    assert (args.num_candidates, args.pairing, args.share_prefix) == (16, "all", False)
    assert args == RSOConfig(
        "out",
        gamma=0.1,
        loss_type="hinge-norm",
        num_candidates=16,
        pairing="all",
        share_prefix=False,
        use_cpu=True,
        bf16=False,
    )


def test_several_losses_on_the_command_line():
    (args,) = TrlParser(RSOConfig).parse_args_into_dataclasses(
        ["--loss_type", "hinge-norm", "sft", "--loss_weights", "1", "0.5", "--use_cpu", "--bf16", "False"]
    )
    assert args.loss_type == ["hinge", "sft"] and args.loss_weights == [1.0, 0.5]


@pytest.mark.parametrize(("name", "value"), [("strategy", "direct"), ("pairing", "second-round")])
def test_unknown_choices_are_refused_on_the_command_line(name, value, capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(RSOConfig).parse_args_into_dataclasses([f"--{name}", value])
    assert f"invalid choice: '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("losses", ["hinge-norm", "[hinge-norm, sft]"])
def test_a_yaml_file_and_what_overrides_it(losses, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"output_dir: out\nbeta: 0.2\nloss_type: {losses}\nnum_samples: 4\nuse_cpu: true\nbf16: false\n")
    (args,) = TrlParser(RSOConfig).parse_args_and_config(["--config", str(file), "--num_samples", "6"])
    assert (args.gamma, args.beta, args.num_samples) == (0.2, 0.2, 6)
    assert args.loss_type == (["hinge"] if losses == "hinge-norm" else ["hinge", "sft"])


def test_the_config_of_a_checkpoint_makes_the_same_config():
    args = config(gamma=0.1, loss_type="hinge-norm", num_samples=4, rejection_beta=2.0)
    assert pickle.loads(pickle.dumps(args)) == args  # training_args.bin
    assert json.loads(args.to_json_string())["gamma"] == 0.1
    # transformers writes every token, such as one for the Hub, as a placeholder
    init = {field.name for field in dataclasses.fields(RSOConfig) if field.init and not field.name.endswith("_token")}
    saved = {name: value for name, value in json.loads(args.to_json_string()).items() if name in init}
    assert RSOConfig(**saved).to_dict() == args.to_dict()
    assert dataclasses.replace(args, num_samples=6).gamma == 0.1
