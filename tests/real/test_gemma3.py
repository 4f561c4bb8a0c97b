"""Gemma 3 270M: a sliding window of 512 tokens, and a tokenizer that falls back to bytes."""

from typing import Any

import pytest
import torch

from prefopt_trl import sample_completions
from prefopt_trl.shared_prefix.scoring import completion_logps

pytestmark = pytest.mark.real

TEXT = " ".join(f"Item {number} costs {3 * number} coins." for number in range(200))


# Rows of 450 tokens are within the window, and the packed row of 600 is not
@pytest.mark.parametrize(("prompt", "completion"), [(504, 8), (300, 150), (505, 8), (600, 8)])
def test_prompts_within_and_beyond_the_window(gemma3: Any, prompt: int, completion: int, caplog: Any) -> None:
    model, tokenizer = gemma3
    ids, length = torch.tensor(tokenizer(TEXT)["input_ids"]), prompt + completion
    rows = torch.stack([ids[:length], torch.cat([ids[:prompt], ids[-completion:]])])
    with torch.no_grad():
        logits = torch.cat([model(row[None], logits_to_keep=completion + 1).logits[:, :-1] for row in rows]).double()
        completion_mask = (torch.arange(length) >= prompt).long().expand(2, -1)
        logps, counts = completion_logps(model, rows, torch.ones_like(rows), completion_mask)
    expected = logits.log_softmax(-1).gather(2, rows[:, prompt:, None]).sum(dim=(1, 2))
    assert counts.tolist() == [completion] * 2
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=1e-4)

    text = tokenizer.decode(ids[1:prompt])
    (texts,) = sample_completions(model, tokenizer, [text], 2, max_new_tokens=completion, top_k=1)
    assert texts == [greedy(model, tokenizer, text, completion)] * 2
    reason = f"rows of up to {length} tokens exceed the attention window of gemma3_text (`sliding_window`=512)"
    logged = [record.getMessage() for record in caplog.records if "Prompts are not shared" in record.getMessage()]
    assert logged == ([f"{NOT_SHARED}: {reason}."] if length > 512 else [])  # once for both


NOT_SHARED = "Prompts are not shared, each completion is run as a separate row"


def greedy(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """The text of the tokens that `generate` adds, by themselves: Gemma's decoder drops no space."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=length)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [2, 4])  # of the four bytes of an emoji, or all of them
@pytest.mark.parametrize("prompt", ["I like 🦙🦙", "🦙 is a llama. Here it is again:", "One\n\nTwo\n\n", "A  sky  is"])
def test_completions_of_bytes(gemma3: Any, prompt: str, length: int) -> None:
    expected = greedy(*gemma3, prompt, length)
    assert expected.startswith({"I": "🦙" if length == 4 else "��", "🦙": "\n\n�", "O": "Three", "A": " "}[prompt[0]])
    assert sample_completions(*gemma3, [prompt], 2, max_new_tokens=length, top_k=1) == [[expected] * 2]
