import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl import losses
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.trainers.slic_config import SLiCConfig
from prefopt_trl.trainers.slic_trainer import CollatorWithTargets, SLiCTrainer

PAIRS = Dataset.from_dict(
    {
        "prompt": ["The capital of France is", "Tell me how to bake bread.", "Why?", "The dog"],
        "chosen": [" Paris.", " Mix the flour and the water, then wait.", " Because it is so.", " sleeps"],
        "rejected": [" the quick brown fox.", " No.", " I will not say, whatever you ask.", " jumps over the fox"],
        "reference": [" It is Paris.", " Mix, then wait for it.", " Who knows?", " sleeps on"],
    }
)


def losses_by_hand(model, loss_type="slic", delta=20.0, weight=0.0, target="chosen", unlikelihood_weight=1.0):
    """Calibration and regularisation of each pair: RSO eq. 1, DPO appendix C.3."""
    parts = []
    for row in PAIRS:
        chosen, rejected, y_ref = (
            model.logps(row["prompt"], row[name]).sum() for name in ("chosen", "rejected", target)
        )
        if loss_type == "slic":
            calibration = torch.relu(delta - chosen + rejected)
        else:
            calibration = -chosen + unlikelihood_weight * rejected
        parts.append((calibration, -weight * y_ref))
    return parts


CASES = {
    "slic": {},
    "slic, small margin": {"delta": 2.0},
    "slic, regularised on chosen": {"delta": 5.0, "regularization_weight": 0.5},
    "slic, regularised on the target": {"delta": 5.0, "regularization_weight": 0.5, "target_column": "reference"},
    "unlikelihood": {"loss_type": "unlikelihood"},
    "unlikelihood, weighted": {"loss_type": "unlikelihood", "unlikelihood_weight": 0.25},
}
WORDS = {"regularization_weight": "weight", "target_column": "target"}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_step_minimises_the_papers_equation(case, share_prefix, by_hand, one_step):
    settings = CASES[case]
    parts = losses_by_hand(by_hand, **{WORDS.get(name, name): value for name, value in settings.items()})
    loss = sum(calibration + regularization for calibration, regularization in parts) / 4
    dataset = PAIRS if "target_column" in settings else PAIRS.remove_columns("reference")
    step = one_step(SLiCTrainer, dataset, per_device_train_batch_size=4, share_prefix=share_prefix, **settings)
    step.assert_is(loss, by_hand.gradients(loss))
    assert step.num_rows == 4 * (1 if share_prefix else 3 if "target_column" in settings else 2)
    parts_logged = {name for name in step.log if name.startswith("loss/")}
    if settings.get("loss_type") == "unlikelihood":
        assert not parts_logged
    else:
        assert parts_logged == {"loss/calibration", "loss/regularization"}
        for name, values in zip(("calibration", "regularization"), zip(*parts, strict=True), strict=True):
            assert step.log[f"loss/{name}"] == pytest.approx(sum(map(float, values)) / 4, rel=1e-5)


def test_the_margin_is_met_by_some_pairs_only(by_hand):
    """So that the cases above have both sides of the hinge."""
    small = [float(calibration) for calibration, _ in losses_by_hand(by_hand, delta=2.0)]
    assert 0 < sum(value > 0 for value in small) < 4


def test_the_target_is_not_one_of_the_ranked(by_hand, one_step):
    """The metrics are of chosen and rejected alone, whether or not the target is a third row."""
    without = one_step(SLiCTrainer, PAIRS.remove_columns("reference"), regularization_weight=0.5).log
    log = one_step(SLiCTrainer, PAIRS, regularization_weight=0.5, target_column="reference").log
    names = {name for name in without if name.startswith(("rewards/", "ranking/", "logps/", "logits/"))}
    assert {"rewards/accuracies", "ranking/top1", "logps/rejected", "logits/rejected"} < names
    assert log.keys() == without.keys()
    compared = {*names, "mean_token_accuracy", "loss/calibration"}
    assert {name: log[name] for name in compared} == pytest.approx(
        {name: without[name] for name in compared}, rel=1e-5
    )
    assert log["loss/regularization"] != pytest.approx(without["loss/regularization"], rel=1e-2)
    chosen, rejected = (
        [by_hand.logps(row["prompt"], row[name]).sum().item() for row in PAIRS] for name in ("chosen", "rejected")
    )
    assert log["rewards/chosen"] == log["logps/chosen"] == pytest.approx(sum(chosen) / 4, rel=1e-5)
    assert log["rewards/rejected"] == log["logps/rejected"] == pytest.approx(sum(rejected) / 4, rel=1e-5)
    right = sum(one > other for one, other in zip(chosen, rejected, strict=True)) / 4
    assert log["rewards/accuracies"] == log["ranking/top1"] == right
    assert log["ranking/kendall_tau"] == 2 * right - 1


def test_the_rows_of_targets_are_behind_those_of_the_pairs():
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9]},
    ]
    pairs = DataCollatorForPreference(pad_token_id=0)(examples)
    targets = [
        {"target_prompt_ids": [1, 2], "target_ids": [10]},
        {"target_prompt_ids": [6], "target_ids": [11, 12, 13]},
    ]
    batch = CollatorWithTargets(pad_token_id=0)(
        [{**example, **target} for example, target in zip(examples, targets, strict=True)]
    )
    for name, rows in pairs.items():
        assert torch.equal(batch[name][:4], rows)
    assert batch["input_ids"][4:].tolist() == [[1, 2, 10, 0], [6, 11, 12, 13]]
    assert batch["completion_mask"][4:].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch["group_ids"].tolist() == [0, 1] * 3
    assert batch["is_target"].tolist() == [False] * 4 + [True] * 2


def test_it_is_the_papers_hinge_times_its_margin(by_hand, one_step):
    """RSO eq. 11 with gamma = 1 / delta."""
    step = one_step(SLiCTrainer, PAIRS.remove_columns("reference"), delta=8.0)
    logps = torch.tensor(
        [[by_hand.logps(row["prompt"], row[name]).sum() for name in ("chosen", "rejected")] for row in PAIRS]
    )
    assert step.log["loss"] == pytest.approx(8 * losses.hinge(logps, gamma=1 / 8).mean().item(), rel=1e-5)


def test_evaluation_and_accumulation(by_hand, make):
    expected = sum(float(calibration) for calibration, _ in losses_by_hand(by_hand)) / 4
    trainer = make(
        SLiCTrainer,
        PAIRS.remove_columns("reference"),
        eval_dataset={"all": PAIRS.remove_columns("reference")},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    trained, evaluated = trainer.state.log_history[:2]
    assert trained["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated["eval_all_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated["eval_loss/calibration"] == pytest.approx(expected, rel=1e-5)
    assert {"eval_rewards/margins", "eval_ranking/kendall_tau"} < evaluated.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "sigmoid"}, "`loss_type` must be one of slic, unlikelihood; got 'sigmoid'"),
        ({"loss_type": ["slic", "unlikelihood"]}, "`loss_type` must be one of slic"),
        (
            {"loss_type": "hinge"},
            "'slic' divided by `delta`.* Use 'slic' with that `delta`, and with .* times `delta`",
        ),
        ({"delta": 0.0}, "`delta` must be greater than 0 and finite, got 0.0"),
        ({"delta": float("nan")}, "`delta` must be greater than 0 and finite, got nan"),
        ({"regularization_weight": -1.0}, "`regularization_weight` must be at least 0 and finite, got -1.0"),
        ({"loss_type": "unlikelihood", "unlikelihood_weight": -1.0}, "`unlikelihood_weight` must be at least 0"),
        ({"loss_type": "unlikelihood", "delta": 1.0}, "`delta` has no effect with `loss_type='unlikelihood'`"),
        ({"loss_type": "unlikelihood", "regularization_weight": 1.0}, "`regularization_weight` has no effect with"),
        ({"unlikelihood_weight": 0.5}, "`unlikelihood_weight` needs `loss_type='unlikelihood'`"),
        ({"target_column": "reference"}, "`target_column`='reference' needs a `regularization_weight` above 0"),
        (
            {"sampling": "online", "target_column": "reference", "regularization_weight": 0.1},
            "`target_column` is tokenized before training, and `sampling='online'` makes the pairs later",
        ),
        ({"pairing": "ranking"}, "`pairing` must be one of first-round, .*correct-wrong, got 'ranking'"),
    ],
)
def test_what_has_no_effect_is_refused(given, message, config):
    with pytest.raises(ValueError, match=message):
        config(SLiCConfig, **given)


@pytest.mark.parametrize("missing", ["reference", "prompt", "rejected"])
def test_a_missing_target_is_named(missing, make):
    with pytest.raises(ValueError, match=f"The train dataset has no column '{missing}'"):
        make(SLiCTrainer, PAIRS.remove_columns(missing), regularization_weight=0.1, target_column="reference")


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({}, "chosen"),  # the sampled winner would be the target
        ({}, "reference"),  # and this one would be missed when everything is sampled
        ({"logps": [[-1.0], [-2.0]]}, "logps"),
    ],
)
def test_a_target_that_sampling_would_replace_is_refused_before_it(columns, target, make):
    prompts = Dataset.from_dict({"prompt": ["Why?", "The dog"], **columns})
    ranker = FunctionRanker(lambda prompts, completions: pytest.fail("nothing is to be sampled"))
    message = f"`target_column`='{target}' is no column of the train dataset that sampling keeps: it has prompt"
    with pytest.raises(ValueError, match=message):
        make(SLiCTrainer, prompts, ranker=ranker, regularization_weight=0.1, target_column=target)
