"""Pairs as text for SFT that says which answer is the better one: Chain of Hindsight (arXiv 2302.02676)."""

from prefopt_trl.data.formats import Row, completion_text, wrap_completion

HELPFUL, UNHELPFUL = "A helpful answer:", "An unhelpful answer:"


def chain_of_hindsight(pair: Row) -> list[Row]:
    """Return two rows for SFT, whose completions hold both answers of a pair, each after its label, in both orders.

    The loss counts labels, too, where the paper masks them. To use the trained model, end the prompt with `" A helpful
    answer:"`, or let the assistant's message begin with it (`continue_final_message` of the chat template).

    >>> pair = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    >>> chain_of_hindsight(pair)[0]
    {'prompt': 'The sky is', 'completion': ' A helpful answer: blue.\\n\\nAn unhelpful answer: green.'}
    """
    chosen, rejected = (completion_text(pair[name]).strip() for name in ("chosen", "rejected"))
    answers = [f"{HELPFUL} {chosen}", f"{UNHELPFUL} {rejected}"]
    space = " " if isinstance(pair["prompt"], str) else ""
    texts = (space + "\n\n".join(order) for order in (answers, answers[::-1]))
    return [{"prompt": pair["prompt"], "completion": wrap_completion(pair["prompt"], text)} for text in texts]
