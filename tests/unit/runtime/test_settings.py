import datetime
import functools
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl.runtime.settings import (
    dataset_fingerprint,
    function_fingerprint,
    model_fingerprint,
    template_date,
    tokenizer_fingerprint,
)


def test_a_model_keeps_its_fingerprint_when_loaded_again_and_used(tiny_llama_dir):
    model, again = (AutoModelForCausalLM.from_pretrained(tiny_llama_dir) for _ in range(2))
    again(input_ids=torch.tensor([[1, 2, 3]]))
    assert model_fingerprint(model) == model_fingerprint(again)


def test_a_step_of_training_in_any_one_parameter_is_seen(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    seen = {model_fingerprint(model)}
    parameters = list(model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter += 1e-5
        seen.add(model_fingerprint(model))
    assert len(seen) == len(parameters) + 1


def test_another_dtype_shape_or_name_is_another_fingerprint():
    def layers(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.ParameterDict:
        return torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(shape, dtype=dtype))})

    models = [
        layers("a", (2, 3), torch.float32),
        layers("b", (2, 3), torch.float32),
        layers("a", (3, 2), torch.float32),
        layers("a", (2, 3), torch.bfloat16),
        layers("a", (), torch.float32),
    ]
    assert len({model_fingerprint(model) for model in models}) == len(models)


def test_few_elements_of_a_large_parameter_are_read(monkeypatch):
    model = torch.nn.Linear(1000, 1000, bias=False)
    sizes = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: sizes.append(tensor.numel()) or cpu(tensor))
    model_fingerprint(model)
    assert len(sizes) == 1 and 32 <= sizes[0] < 64


def test_a_tokenizer_is_told_from_one_with_another_vocabulary_template_or_special_token(tiny_llama_dir):
    def load():
        return AutoTokenizer.from_pretrained(tiny_llama_dir)

    larger, other_chat, other_pad = load(), load(), load()
    larger.add_tokens(["<new>"])
    other_chat.chat_template = "{{ messages[0]['content'] }}"
    other_pad.pad_token = other_pad.eos_token
    fingerprints = [tokenizer_fingerprint(tokenizer) for tokenizer in (load(), larger, other_chat, other_pad)]
    assert len(set(fingerprints)) == 4
    assert tokenizer_fingerprint(load()) == fingerprints[0]


def length(completions):
    return [len(completion) for completion in completions]


def with_other_source():
    def length(completions):
        return [len(completion) + 1 for completion in completions]

    length.__qualname__ = "length"
    return length


def typed(source: str):
    names: dict = {}
    exec(source, names)
    return names["f"]


def scaled(factor):
    def reward(prompts, completions, **kwargs):
        return [factor * len(completion) for completion in completions]

    return reward


class Scorer:
    def __init__(self, factor):
        self.factor = factor

    def reward(self, prompts, completions, **kwargs):
        return [self.factor * len(completion) for completion in completions]


@pytest.mark.parametrize(
    ("make", "make_other"),
    [
        (with_other_source, lambda: length),
        (lambda: typed("f = lambda x: x + 1"), lambda: typed("f = lambda x: x + 2")),  # has no source
        (lambda: functools.partial(length, 1), lambda: functools.partial(length, 2)),
        (lambda: scaled(1), lambda: scaled(-1)),  # what it closes over
        (lambda: Scorer(1).reward, lambda: Scorer(-1).reward),  # what the object of a method holds
    ],
)
def test_a_function_is_known_by_its_source_and_what_it_holds(make, make_other):
    assert function_fingerprint(make()) == function_fingerprint(make()) != function_fingerprint(make_other())
    name, _, digest = function_fingerprint(length).partition(":")
    assert name == "length" and len(digest) == 64


REWARDS = """
import functools

def plain(completions, factor=1):
    return [1 * factor for completion in completions]

def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return [reward * 2 for reward in function(*args, **kwargs)]
    return wrapper

class Base:
    def __init__(self, factor):
        self.factor, self.function = factor, plain

    def __call__(self, completions):
        return [self.factor * 3 for completion in completions]

class Scorer(Base):
    def reward(self, completions):
        return [self.factor * 4 for completion in completions]

    def again(self, completions):
        return self.again

decorated = doubled(plain)
partial = functools.partial(plain, factor=2)
of_partial = functools.partial(functools.partial(decorated), factor=Scorer(1))
cached = functools.cache(plain)
called = Scorer(2)
method = Scorer(2).reward
"""


@pytest.mark.parametrize(
    ("name", "edits"),
    [
        ("plain", ["1 * factor"]),
        ("decorated", ["1 * factor", "reward * 2"]),
        ("partial", ["1 * factor", "plain, factor=2"]),
        ("of_partial", ["1 * factor", "reward * 2", "self.factor * 3", "self.factor * 4", "Scorer(1)"]),
        ("cached", ["1 * factor"]),
        ("called", ["1 * factor", "self.factor * 3", "self.factor * 4", "called = Scorer(2)"]),
        ("method", ["1 * factor", "self.factor * 3", "self.factor * 4", "method = Scorer(2)"]),
    ],
)
def test_a_function_of_a_file_is_known_by_the_source_of_all_it_holds_and_not_by_its_path(
    name, edits, tmp_path, monkeypatch
):
    def of_file(path, source):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        spec = spec_from_file_location(path, path)  # as the command line loads `--ranker path/to/file.py:name`
        monkeypatch.setitem(sys.modules, path, module := module_from_spec(spec))
        spec.loader.exec_module(module)
        return function_fingerprint(getattr(module, name))

    monkeypatch.chdir(tmp_path)
    expected = of_file("rewards.py", REWARDS)
    for path in ("other/rewards.py", "./rewards.py", f"{tmp_path}/third/renamed.py"):
        assert of_file(path, REWARDS) == expected
    for number, edit in enumerate(edits):
        assert REWARDS.count(edit) == 1
        edited = REWARDS.replace(edit, re.sub(r"\d", "7", edit))
        assert of_file(f"edited{number}/rewards.py", edited) != expected


def test_a_function_that_closes_over_itself_has_a_fingerprint():
    def make(factor):
        def countdown(number):
            return [factor, *countdown(number - 1)] if number else []

        return countdown

    assert function_fingerprint(make(1)) == function_fingerprint(make(1)) != function_fingerprint(make(2))


def test_a_callable_that_cannot_be_known_says_what_to_do():
    judge = functools.partial(length, (question for question in []))  # generators do not pickle
    with pytest.raises(ValueError, match=r"partial changes between runs.*plain `def` function"):
        function_fingerprint(judge)


def test_the_scale_of_an_adapter_counts(tiny_llama_dir):
    prints = set()
    for lora_alpha in (8, 8, 64):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        prints.add(
            model_fingerprint(get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_alpha=lora_alpha)))
        )
    assert len(prints) == 2


def test_whether_an_adapter_is_on_or_merged_counts(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    # A new adapter adds nothing: the weights are the same whether it is merged or not
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = model_fingerprint(model)
    with model.disable_adapter():
        disabled = model_fingerprint(model)
    assert model_fingerprint(model) == before
    model.merge_adapter()
    merged = model_fingerprint(model)
    model.unmerge_adapter()
    assert model_fingerprint(model) == before
    assert len({before, disabled, merged}) == 3


def test_a_tokenizer_that_was_used_is_the_same_one(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # no BOS any more
    assert tokenizer_fingerprint(tokenizer) != before


def test_datasets_differ_by_their_rows_alone():
    rows = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    assert dataset_fingerprint(rows) == dataset_fingerprint(Dataset.from_list(list(rows)))
    assert dataset_fingerprint(rows) != dataset_fingerprint(rows.select([1, 0]))


def test_a_column_that_json_cannot_write_is_refused_and_the_columns_are_named():
    rows = Dataset.from_dict({"prompt": ["a"], "asked": [datetime.datetime(2026, 1, 2)]})
    with pytest.raises(TypeError, match=r"columns prompt, asked cannot be written as JSON .*datetime.*remove_columns"):
        dataset_fingerprint(rows)
    assert len(dataset_fingerprint(rows.remove_columns("asked"))) == 64


def on(monkeypatch, *day):
    clock = SimpleNamespace(now=lambda: datetime.datetime(*day))
    monkeypatch.setattr("prefopt_trl.runtime.settings.datetime", clock)


@pytest.mark.parametrize(
    ("template", "dates"),
    [
        ("{%- set date_string = strftime_now('%d %b %Y') %}", ["27 Nov 2026", "28 Nov 2026"]),
        ('{{ strftime_now("%B") }}{{ strftime_now( "%d") }}', ["November, 27", "November, 28"]),
        ("{{ strftime_now(day) }}", ["2026-11-27", "2026-11-28"]),
        ("{{ 'no date' }}", []),
    ],
)
def test_the_date_that_a_chat_template_writes_is_a_setting(template, dates, monkeypatch):
    seen = []
    for day in (27, 28):
        on(monkeypatch, 2026, 11, day)
        seen += template_date(SimpleNamespace(chat_template=template)).values()
    assert seen == dates
