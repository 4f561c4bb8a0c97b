import math
import re

import numpy as np
import pytest

from prefopt_trl.experiments.kitchen import (
    DISHES,
    HEAT,
    INGREDIENTS,
    MAX_NEW_TOKENS,
    RICHNESS,
    ControlledTask,
    true_reward,
)

ORDER = "Ada wants a warm, hearty soup."  # heat 3, richness 3
SMALL = ControlledTask(num_sft=3000, num_prompts=300, num_eval_prompts=200, num_comparisons=6000)


def reward(completion, prompt=ORDER):
    return true_reward([prompt], [completion])[0]


def totals(completions):
    """Heat and richness of every ingredient named: (n, 2)."""
    names = [re.findall(r"\w+", completion) for completion in completions]
    return np.array([np.sum([(0, 0)] + [INGREDIENTS[w] for w in row if w in INGREDIENTS], axis=0) for row in names])


def wanted(prompts):
    """What the guest orders less what the dish brings: (n, 2)."""
    rows = [re.fullmatch(r"\w+ wants a (\w+), (\w+) (\w+)\.", prompt).groups() for prompt in prompts]
    return np.array([(HEAT[h] - DISHES[d][0], RICHNESS[r] - DISHES[d][1]) for h, r, d in rows])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (" Take pepper, garlic and walnuts.", 10),  # (2, 0) + (1, 1) + (0, 2)
        ("Combine walnuts, pepper and garlic.", 10),  # neither the order nor the opening nor the first space counts
        (" Take pepper and pesto.", 10 - 2 * 1),  # (3, 2)
        (" Take chili.", 10 - 2 * 3),  # (3, 0)
        (" Take lettuce.", 10 - 2 * math.sqrt(18)),  # (0, 0)
        (" pepper, garlic and walnuts.", 10 - 1),  # no opening
        (" Take pepper, garlic and walnuts", 10 - 1),  # no full stop
        (" Take pepper garlic walnuts", 10 - 3),  # no comma, and, full stop
        (" Take please pepper, garlic and walnuts!", 10 - 2),  # a word too many, a wrong mark
        (" Take pepper, garlic and walnuts. Ada Ada", 10 - 2),  # goes on after the end
        (" Take garlic, garlic and garlic.", 10 - 4),  # (3, 3), but two words and two separators too many
        ("", 10 - 2 * math.sqrt(18) - 3),  # nothing: opening, ingredient and full stop are missing
    ],
)
def test_marks_by_hand(completion, expected):
    assert reward(completion) == pytest.approx(expected, abs=1e-12)


def test_the_dish_brings_its_own_flavour():
    # A ragout brings (1, 1), so (2, 2) is missing.
    assert reward(" Take kimchi.", "Pia wants a warm, hearty ragout.") == 10
    assert reward(" Take kimchi.", "Pia wants a warm, hearty pie.") == pytest.approx(10 - 2 * 1)  # (3, 2) is missing


def test_only_six_ingredients_count_and_each_further_one_is_two_faults():
    six = " Take radish, ginger, onion, carrot, pumpkin and peas"  # (3, 3)
    assert reward(f"{six}.") == 10
    for more in range(1, 4):
        text = six.replace(" and peas", ", peas") + ", wasabi" * more
        # To be tidy: `,` before peas becomes `and`, what follows peas (2 * more words) becomes the full stop.
        assert reward(text) == 10 - 2 * more - 1


def test_more_is_better_up_to_the_optimum_and_worse_beyond():
    prompt = "Ada wants a hot, light soup."  # heat 5, richness 1
    dishes = ["carrot", "carrot and ginger", "carrot and chili"]
    dishes += ["carrot, chili and pepper", "carrot, chili and wasabi"]
    marks = [reward(f" Take {dish}.", prompt) for dish in dishes]
    assert marks == pytest.approx([0, 2, 6, 10, 8])  # heat 0, 1, 3, 5, 6


def test_every_order_has_a_perfect_dish():
    reachable = {0: {(0, 0)}}  # number of ingredients -> flavours, of different ingredients
    for heat, richness in INGREDIENTS.values():
        for count in range(min(5, max(reachable)), -1, -1):
            added = {(h + heat, r + richness) for h, r in reachable[count]}
            reachable[count + 1] = reachable.get(count + 1, set()) | added
    flavours = set().union(*(reachable[count] for count in range(1, 7)))
    assert {tuple(row) for row in wanted(SMALL.answers["prompt"]).tolist()} <= flavours
    orders = [(HEAT[h] - d[0], RICHNESS[r] - d[1]) for h in HEAT for r in RICHNESS for d in DISHES.values()]
    assert set(orders) <= flavours


def test_no_text_gets_more_than_ten():
    rng = np.random.default_rng(0)
    words = ["Take", ",", "and", ".", "Ada", *INGREDIENTS]
    texts = [" ".join(rng.choice(words, size=rng.integers(0, 15))) for _ in range(2000)]
    prompts = [SMALL.answers["prompt"][index] for index in rng.integers(300, size=2000)]
    assert max(true_reward(prompts, texts)) < 10


def test_reward_has_trls_signature_and_names_a_bad_row():
    assert true_reward([], []) == []
    marks = true_reward(prompts=[ORDER], completions=["."], completion_ids=[[1]], trainer_state=None)
    assert isinstance(marks, list) and isinstance(marks[0], float)
    with pytest.raises(ValueError, match=r"Prompt 1 is 'Ada wants a cake\.'.*Write it like 'Ada wants a mild"):
        true_reward([ORDER, "Ada wants a cake."], ["", ""])


def test_datasets_have_their_columns_sizes_and_disjoint_prompts():
    columns = {
        "sft_dataset": (["prompt", "completion"], 3000),
        "answers": (["prompt", "first", "second", "poor", "fair", "good"], 300),
        "eval_dataset": (["prompt", "completion"], 200),
        "comparisons": (["prompt", "chosen", "rejected"], 6000),
    }
    for name, (names, size) in columns.items():
        dataset = getattr(SMALL, name)
        assert (dataset.column_names, len(dataset)) == (names, size)
    eval_prompts = set(SMALL.eval_dataset["prompt"])
    assert len(eval_prompts) == 200 and len(set(SMALL.answers["prompt"])) == 300
    for name in ("sft_dataset", "answers", "comparisons"):
        assert not eval_prompts & set(getattr(SMALL, name)["prompt"])


def test_datasets_depend_on_the_seed_alone():
    sizes = {"num_sft": 20, "num_prompts": 20, "num_eval_prompts": 20, "num_comparisons": 20}
    first, again, other = (ControlledTask(seed=seed, **sizes) for seed in (0, 0, 1))
    for name in ("sft_dataset", "answers", "eval_dataset", "comparisons"):
        assert getattr(first, name).to_dict() == getattr(again, name).to_dict()
        assert getattr(first, name).to_dict() != getattr(other, name).to_dict()


def test_the_sft_corpus_is_tidy_and_too_shy():
    prompts, completions = list(SMALL.sft_dataset["prompt"]), list(SMALL.sft_dataset["completion"])
    distance = np.linalg.norm(totals(completions) - wanted(prompts), axis=1)
    # Without a fault, the marks are the distance's alone.
    np.testing.assert_allclose(true_reward(prompts, completions), 10 - 2 * distance, atol=1e-12)
    # Standard errors are about 0.05; of 3,000 rows, a fifth of the wish is far from each bound.
    share = totals(completions).mean(axis=0) / wanted(prompts).mean(axis=0)
    assert (share > 0.45).all() and (share < 0.7).all()


def test_the_comparisons_are_shyer_noisy_and_not_always_tidy():
    pairs = SMALL.comparisons
    prompts = list(pairs["prompt"])
    texts = [list(pairs["chosen"]), list(pairs["rejected"])]
    chosen, rejected = (np.array(true_reward(prompts, column)) for column in texts)
    everything = np.concatenate([totals(column) for column in texts])
    sft = totals(list(SMALL.sft_dataset["completion"]))
    assert (everything.mean(axis=0) < sft.mean(axis=0) - 0.1).all()  # standard error 0.04
    # Each label is right with the probability that Bradley and Terry give to it: the sum of what is left over is 0
    # within five standard errors, which fails by chance once in two million seeds.
    gap = np.abs(chosen - rejected)
    right = (chosen > rejected)[gap > 0]
    probability = 1 / (1 + np.exp(-gap[gap > 0]))
    error = math.sqrt((probability * (1 - probability)).sum())
    assert abs((right - probability).sum()) < 5 * error
    assert 0.8 < right.mean() < 0.95
    distance = np.concatenate([np.linalg.norm(totals(column) - wanted(prompts), axis=1) for column in texts])
    faulty = np.concatenate([chosen, rejected]) < 10 - 2 * distance - 0.5
    assert 0.1 < faulty.mean() < 0.25
    # More of everything is mostly what is preferred.
    more = (totals(texts[0]) - totals(texts[1])).sum(axis=1)
    assert (more > 0).sum() > 1.3 * (more < 0).sum()


def test_every_text_is_kept_and_prompt_and_completion_join():
    tokenizer = SMALL.tokenizer()
    rows = [(row["prompt"], row["completion"]) for row in SMALL.sft_dataset.select(range(500))]
    pairs = SMALL.comparisons.select(range(500))
    rows += [(row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected")]
    prompts, completions = zip(*rows, strict=True)
    prompt_ids, completion_ids = tokenizer(list(prompts))["input_ids"], tokenizer(list(completions))["input_ids"]
    joint_ids = tokenizer([p + c for p, c in rows])["input_ids"]
    assert joint_ids == [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
    assert tokenizer.batch_decode(joint_ids) == [p + c for p, c in rows]
    assert {len(ids) for ids in prompt_ids} == {8}
    assert max(map(len, completion_ids)) + 1 <= 14 < MAX_NEW_TOKENS
    assert set(map(len, prompt_ids)) == {len(re.findall(r"\w+|[,.]", ORDER))}  # one token per word and mark


def test_extra_words_make_a_rankers_input_tokens():
    marks = ["[CONTEXT] ", " [RESPONSE A] ", " [RESPONSE B] ", " [ANSWER]\n", "A", "B"]
    tokenizer = SMALL.tokenizer(extra_words=marks)
    text = f"[CONTEXT] {ORDER} [RESPONSE A] Take peas. [RESPONSE B]  Use cream. [ANSWER]\nB"
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if token in marks] == [*marks[:4], "B"]
    assert "".join(tokens) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_policy_model_fits_the_tokenizer():
    tokenizer = SMALL.tokenizer(extra_words=["A", "B"])
    model = SMALL.policy_model(tokenizer, seed=1)
    assert model.config.vocab_size == len(tokenizer)
    assert 60_000 < model.num_parameters() < 400_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
