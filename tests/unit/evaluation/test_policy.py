"""Policies evaluated, against values known beforehand: sampled, given or chosen; in any number of pieces."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl import BestOf, FunctionRanker, evaluate_policy, sample_completions
from prefopt_trl.evaluation import policy as module
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.experiments.kitchen import MAX_NEW_TOKENS, ControlledTask, true_reward
from prefopt_trl.runtime.settings import write_text
from prefopt_trl.sampling import store
from tests.hub_server import contents
from tests.unit.known_rankers import Reader
from tests.unit.sampling.test_shards import failing

PROMPTS = [f"The fox number {number}" for number in range(10)]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def length(prompts, completions, **kwargs):
    return [float(len(text_of(one))) for one in completions]


LENGTH = FunctionRanker(length)


@pytest.fixture
def model(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


def biased(model, end_bias):
    """The model with other odds of its end; all other tokens are equally likely."""
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[model.config.eos_token_id] = end_bias
    return model


def load(folder, seed=0):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.lm_head.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return loaded


def evaluate(policies, tokenizer, prompts=PROMPTS, judges=LENGTH, **options):
    return evaluate_policy(policies, tokenizer, prompts, judges=judges, **{"max_new_tokens": 6, **options})


def completions_of(found, name):
    return [row["completion"] for row in found.policies[name].rows]


def test_a_better_and_a_worse_policy_are_told_apart_and_a_policy_from_itself_is_not():
    """A policy of random words in the kitchen, and its best and its worst of 4 by the truth.

    The differences are more than 6 standard errors, so a test at p < 0.01 misses one with a chance below 1e-3. The
    policy against itself, with another seed, is wrongly told apart with a chance of 1% by each of the two numbers.
    """
    task, truth = ControlledTask(num_eval_prompts=150), FunctionRanker(true_reward)
    tokenizer, prompts = task.tokenizer(), task.eval_dataset["prompt"][:]
    base = biased(task.policy_model(tokenizer), end_bias=3.0)
    again = sample_completions(base, tokenizer, prompts, 2, max_new_tokens=MAX_NEW_TOKENS, seed=1)
    lie = FunctionRanker(lambda prompts, completions: [-one for one in true_reward(prompts, completions)])
    policies = {"base": base, "better": BestOf(base, 4, truth), "worse": BestOf(base, 4, lie), "again": again}
    options = {"max_new_tokens": MAX_NEW_TOKENS, "num_completions": 2, "against": "base"}
    found = evaluate(policies, tokenizer, prompts, {"truth": truth}, **options)
    for name, sign in (("better", 1), ("worse", -1), ("again", 0)):
        for one, equal in (found.difference(name, "base"), 0), (found.judged["truth"][name]["win_rate"], 0.5):
            assert sign * (one.mean - equal) >= 6 * abs(sign) * one.standard_error
            assert (one.p_value(equal) < 0.01) == bool(sign)
    assert completions_of(found, "again") != completions_of(found, "base")


def test_kl_and_entropy_of_policies_with_a_known_distribution(tiny_llama_dir, tokenizer):
    # One that ends at once against one for which every token is equally likely: KL = ln(vocabulary)
    policies = {"certain": biased(load(tiny_llama_dir), 100.0), "uniform": biased(load(tiny_llama_dir), 0.0)}
    found = evaluate(policies, tokenizer, reference="uniform", num_completions=2).estimates
    certain = {"kl": np.log(len(tokenizer)), "entropy": 0, "finished": 1, "tokens": 1, "characters": 0}
    assert {name: of.mean for name, of in found["certain"].items()} == pytest.approx(certain, abs=1e-4)
    assert found["uniform"]["kl"] == Estimate(0.0, 0.0)
    assert found["uniform"]["entropy"].mean == pytest.approx(np.log(len(tokenizer)), abs=1e-4)


def test_kl_is_that_of_the_tokens_drawn(tiny_llama_dir, tokenizer):
    # Many of a random model's tokens are parts of a character, which a text does not keep
    policies = {"policy": load(tiny_llama_dir), "reference": load(tiny_llama_dir, seed=1)}
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    logps, ref_logps = (of(ids).logits[0, -1].detach().double().log_softmax(-1) for of in policies.values())
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    found = evaluate(policies, tokenizer, ["The fox"] * 2000, reference="reference", max_new_tokens=1)
    kl, of = found.estimates["policy"]["kl"], found.policies["policy"]
    error = (of.logps - of.ref_logps).std(ddof=1) / np.sqrt(2000)
    assert exact > 0.1
    assert abs(kl.mean - exact) < 5 * error < 0.5 * exact  # by chance wrong once in a million
    assert np.isnan(kl.standard_error)  # of a single prompt
    only, reference = {"policy": policies["policy"]}, policies["reference"]
    alone = evaluate(only, tokenizer, ["The fox"] * 2000, reference=reference, max_new_tokens=1)
    assert list(alone.policies) == ["policy"]  # a reference that is no policy is neither sampled nor judged
    assert alone.estimates["policy"]["kl"].mean == kl.mean and "KL from the reference" in str(alone)
    assert alone.settings["reference_model"] == found.settings["policies"]["reference"]


def test_where_the_kl_is_not_known(model, tokenizer, tiny_llama_dir, caplog):
    other = AutoTokenizer.from_pretrained(tiny_llama_dir)
    other.add_tokens(["fox"])
    policies = {"policy": model, "best": BestOf(model, 2, LENGTH), "other": (load(tiny_llama_dir), other)}
    policies["other"][0].resize_token_embeddings(len(other))
    found = evaluate(policies, tokenizer, reference="policy", against="policy")
    assert [name for name in policies if "kl" in found.estimates[name]] == ["policy"]
    assert caplog.messages.count("The KL of policies with another tokenizer than policy is not known.") == 1
    assert "entropy" in found.estimates["other"] and "entropy" not in found.estimates["best"]
    assert "win_rate" in found.judged["FunctionRanker"]["other"]  # texts are compared
    found = evaluate({"policy": model}, tokenizer, reference="policy", temperature=0.7)
    assert set(found.estimates["policy"]) == {"tokens", "characters", "finished"}


def test_wins_against_targets_count_ties_as_half(tiny_llama_dir, tokenizer):
    policy = biased(load(tiny_llama_dir), 100.0)  # every sample is empty
    rows = Dataset.from_dict({"prompt": PROMPTS, "target": [""] * 5 + ["longer"] * 5, "level": range(10)})

    def odd(prompts, completions, level):
        return [float(len(text)) if one % 2 else None for text, one in zip(completions, level, strict=True)]

    judges = {"all": LENGTH, "odd": FunctionRanker(odd), "pairs": Reader(0.0)}
    judges["pairs"].both_orders = lambda prompts, first, second, rows=None: np.full((len(prompts), 2), 0.75)
    found = evaluate(policy, tokenizer, rows, judges, against="target").judged
    assert found["all"]["policy"]["win_rate"].mean == 0.25 and found["all"]["policy"]["reward"].mean == 0
    assert found["odd"]["policy"]["win_rate"].mean == 0.2  # two ties in five prompts
    assert found["odd"]["policy"]["win_rate"].standard_error == pytest.approx(np.sqrt(0.3 / 4 / 5))
    assert [found["pairs"]["policy"][name].mean for name in ("win", "tie", "loss")] == [0.5, 0.5, 0]


@pytest.mark.parametrize("is_chat", [False, True])
def test_models_columns_lists_and_the_best_of_n(is_chat, model, tokenizer):
    def completion(text):
        return [{"role": "assistant", "content": text}] if is_chat else text

    prompts = [[{"role": "user", "content": one}] for one in PROMPTS] if is_chat else PROMPTS
    rows = Dataset.from_dict({"prompt": prompts, "target": [completion("four")] * 10})
    several = [[completion("x" * place) for place in range(row % 3 + 4)] for row in range(10)]
    policies = {"model": model, "given": several, "target": "target"}
    policies |= {"best": BestOf(model, 3, LENGTH), "best given": BestOf(several, 2, LENGTH)}
    found = evaluate(policies, tokenizer, rows, against="target", num_completions=2)
    assert all(isinstance(one, list) == is_chat for name in policies for one in completions_of(found, name))
    texts = {name: [text_of(one) for one in completions_of(found, name)] for name in policies}
    assert texts["given"] == ["x" * place for row in range(10) for place in range(row % 3 + 4)]
    assert texts["target"] == ["four"] * 10
    of_one = evaluate({"model": BestOf(model, 1, LENGTH)}, tokenizer, rows, num_completions=2)
    assert [text_of(one) for one in completions_of(of_one, "model")] == texts["model"] and len(texts["best"]) == 20
    assert texts["model"] != [text_of(one) for one in completions_of(evaluate(model, tokenizer, rows), "policy")]
    drawn = evaluate({"best": model}, tokenizer, rows, num_completions=6).policies["best"].rows
    groups = [[text_of(one["completion"]) for one in drawn[start : start + 3]] for start in range(0, 60, 3)]
    assert texts["best"] == [max(group, key=len) for group in groups]
    assert texts["best given"][:4] == ["x", "xxx", "x", "xxx"]  # of 4, and of 5, whose last is left over
    judged = found.judged["FunctionRanker"]["given"]
    assert [judged["win"].mean, judged["tie"].mean] == pytest.approx([3 / 49, 6 / 49])


def test_greedy_stop_strings_and_several_judges(model, tokenizer):
    found = evaluate(model, tokenizer, temperature=0, max_new_tokens=8)
    for prompt, completion in zip(PROMPTS, completions_of(found, "policy"), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**ids, do_sample=False, max_new_tokens=8)[0, ids["input_ids"].shape[1] :]
        assert completion == tokenizer.decode(made, skip_special_tokens=True)
    shorter = FunctionRanker(lambda prompts, completions: [-float(len(one)) for one in completions])
    policies, judges = {"stopped": model, "target": ["xxx"] * 10}, {"long": LENGTH, "short": shorter}
    options = {"max_new_tokens": 40, "generation_kwargs": {"stop_strings": ["e", "o"]}}
    found = evaluate(policies, tokenizer, judges=judges, against="target", **options)
    assert not any(stop in one for one in completions_of(found, "stopped") for stop in ("e", "o"))
    assert found.estimates["stopped"]["finished"].mean > 0 and "entropy" in found.estimates["stopped"]
    long, short = (found.judged[judge]["stopped"] for judge in judges)
    assert long["win_rate"].mean == 1 - short["win_rate"].mean > 0.5 and long["win"] == short["loss"]


def test_conversations_are_written_with_the_tools_and_arguments_of_their_row(tiny_llama_dir):
    reads, says = (AutoTokenizer.from_pretrained(tiny_llama_dir) for _ in range(2))
    reads.chat_template = "{{ style }}{{ tools[0]['name'] }}" + reads.chat_template
    says.chat_template = "tersesum" + says.chat_template
    policies = {"policy": load(tiny_llama_dir), "reference": load(tiny_llama_dir, seed=1)}
    prompts = {"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]}

    def measured(tokenizer, name="", style=""):
        told = {"tools": [json.dumps([{"name": name}])] * 10, "chat_template_kwargs": [{"style": style}] * 10}
        found = evaluate(policies, tokenizer, Dataset.from_dict(prompts | told), reference="reference")
        return found.estimates, completions_of(found, "policy")

    assert measured(reads, "sum", "terse") == measured(says) != measured(reads)


@pytest.fixture
def in_shards(monkeypatch, model, tokenizer):
    """An evaluation in three shards, in a folder; and the calls that sample."""
    monkeypatch.setattr(module, "COMPLETIONS_PER_SHARD", 8)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.01)
    sampled, own = [], module.sample
    monkeypatch.setattr(module, "sample", lambda *args: sampled.append(args) or own(*args))
    rows = Dataset.from_dict({"prompt": PROMPTS, "target": ["four"] * 10})
    policies = {"policy": model, "best": BestOf(model, 2, LENGTH)}

    def call(folder, fails_at=None, policies=policies, **options):
        judge = FunctionRanker(length)
        judge.score_with_columns = failing(judge.score_with_columns, fails_at, RuntimeError("The judge is gone."))
        how = {"against": "target", "reference": "policy", "num_completions": 2, "output_dir": folder}
        return evaluate(policies, tokenizer, rows, judge, **how | options)

    return SimpleNamespace(call=call, sampled=sampled, policies=policies)


def test_what_a_judge_interrupts_is_resumed_to_the_same_bytes(in_shards, tmp_path, monkeypatch):
    whole = in_shards.call(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    files = {"manifest.json", "samples.jsonl", *(f"evaluation.{ending}" for ending in ("json", "md", "png"))}
    outputs = {f"alpaca_eval/{name}/model_outputs.json" for name in ("policy", "best", "target")}
    annotations = {f"alpaca_eval/{name}/annotations by FunctionRanker.json" for name in ("policy", "best")}
    assert set(expected) == files | outputs | annotations
    in_shards.sampled.clear()
    with pytest.raises(RuntimeError, match="The judge is gone") as caught:
        in_shards.call(tmp_path / "resumed", fails_at=2)
    assert caught.value.__notes__ == [
        "Verdicts of FunctionRanker: rows are counted from row 4 of `prompts`.",
        f"Interrupted: 13 shards of completions or verdicts are saved in {tmp_path}/resumed; the same call resumes.",
    ]
    assert len(in_shards.sampled) == 6
    swapped = {"policies": dict(reversed(in_shards.policies.items()))}
    for change, there in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"top_k": 5}, "top_k: 0 there, 5 now"),
        (swapped, r"order: \[\['policy', 'best', 'target'\], .* now"),
    ):
        with pytest.raises(ValueError, match=there):
            in_shards.call(tmp_path / "resumed", **change)
    resumed = in_shards.call(tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == expected and resumed == whole
    for path in ("shards/00000.verdicts-0.jsonl", "alpaca_eval/best/model_outputs.json.partial"):  # of a killed run
        write_text(tmp_path / "whole" / path, "half")
    assert in_shards.call(tmp_path / "whole", fails_at=1) == whole and len(in_shards.sampled) == 6
    assert contents(tmp_path / "whole") == expected and not (tmp_path / "whole" / "shards").exists()


def test_what_another_run_has_finished_is_not_made_again(in_shards, tmp_path, monkeypatch):
    own = store.ShardStore.held

    def after_another(held):
        monkeypatch.setattr(store.ShardStore, "held", own)
        in_shards.call(held.folder)
        return own(held)

    monkeypatch.setattr(store.ShardStore, "held", after_another)
    assert in_shards.call(tmp_path).settings["seed"] == 0 and len(in_shards.sampled) == 6
    with pytest.raises(RuntimeError) as caught:
        in_shards.call(None, fails_at=1)
    assert not any("saved" in note for note in caught.value.__notes__)  # its folder is gone


def test_two_processes_write_the_bytes_of_one(in_shards, tmp_path, monkeypatch):
    def become(index):
        state = SimpleNamespace(process_index=index, num_processes=2, is_main_process=index == 0)
        monkeypatch.setattr(module, "process_state", lambda: state)

    def run_the_other(held):
        become(1)
        with pytest.raises(TimeoutError):
            in_shards.call(tmp_path / "two")
        assert held.shards_with("verdicts-0") == [0, 1, 2]

    expected = in_shards.call(tmp_path / "one")
    monkeypatch.setattr(store.ShardStore, "wait_for_shards", run_the_other)
    monkeypatch.setattr(store.ShardStore, "wait_until_finished", failing(print, 1, TimeoutError()))
    in_shards.sampled.clear()
    become(0)
    assert in_shards.call(tmp_path / "two") == expected == in_shards.call(tmp_path / "two")  # the latter as the other
    assert len(in_shards.sampled) == 6 and contents(tmp_path / "two") == contents(tmp_path / "one")
    with pytest.raises(ValueError, match="Several processes share their results in `output_dir`. Give one"):
        in_shards.call(None)


def test_the_weights_of_all_models_are_gathered(model, tokenizer, monkeypatch):
    held, gathered = [], module.gathered
    monkeypatch.setattr(module, "gathered", lambda *models: held.extend(models) or gathered(*models))
    ranker, judge = FunctionRanker(length), FunctionRanker(length)
    ranker.model, judge.model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    evaluate({"best": BestOf(BestOf(model, 1, LENGTH), 1, ranker)}, tokenizer, judges=judge)
    assert {id(one) for one in held if one is not None} == {id(one) for one in (model, ranker.model, judge.model)}


MESSAGE = [{"role": "assistant", "content": "a"}]
ROWS = {"prompt": PROMPTS[:3], "target": ["a", None, "b"], "lists": [["a"], [], ["b", "c"]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "chosen"}, "'chosen' is neither a policy nor a column of `prompts`, which has prompt, target"),
        ({"against": "target"}, "the policy 'target', row 1 is NoneType; give it as text, .* Leave the row out"),
        ({"policies": {"a": "lists"}}, "policy 'a' has no completion for row 1 of `prompts`. Leave the row out"),
        ({"policies": {"a": [MESSAGE[0]] * 3}}, "Completion 0 of the policy 'a', row 0 is dict; give it as text"),
        ({"policies": {"a": ["a", MESSAGE, "b"]}}, "'a', row 1 is a list of messages, and its prompt text. Give both"),
        ({"policies": {"a": ["a"]}}, "The policy 'a' has completions of 1 prompts; there are 3"),
        ({"policies": {"a": BestOf(["a"] * 3, 2, LENGTH)}}, "`BestOf` of 'a' needs 2 completions, and row 0 .* has 1"),
        ({"policies": {}}, "`policies` and `judges` need at least one entry each"),
        ({"policies": 5}, "The policy 'policy' is a int without a tokenizer. Give a model that generates"),
        ({"prompts": PROMPTS[:1]}, "Standard errors need at least 2 prompts, and `prompts` has 1"),
        ({"prompts": Dataset.from_dict({"text": ["a"]})}, "`prompts` has no column `prompt`; it has text. Rename one"),
        ({"reference": "a"}, "`reference` is 'a'. Give a model, or the name of a model among `policies`"),
        ({"judges": {"mine": length}}, "`judges` is a function, not a ranker. Wrap a function in `FunctionRanker`"),
        ({"judges": Reader(0.0)}, "The judge 'Reader' compares completions, so it needs an opponent. Give `against`"),
        ({"judges": FunctionRanker(lambda prompts, completions, level: [])}, "needs the column `level`.* Add it"),
    ],
)
def test_bad_input_is_named_with_its_row_and_remedy(changes, message):
    given = {"policies": {"a": ["x", "", "y"]}, "prompts": Dataset.from_dict(ROWS), **changes}
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(given.pop("policies"), None, given.pop("prompts"), given.pop("judges", LENGTH), **given)
    with pytest.raises(ValueError, match="`n` of `BestOf` must be a whole number, at least 1, got 0"):
        BestOf(["a"], 0, LENGTH)


def test_one_policy_needs_no_opponent():
    found = evaluate({"a": ["x", "", "yy"]}, None, PROMPTS[:3]).judged["FunctionRanker"]["a"]
    assert set(found) == {"reward", "sigmoid_reward"} and found["reward"].mean == 1
