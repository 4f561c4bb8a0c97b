"""Every trainer on every engine gives the losses of one process on the same batches, and what it saves can be loaded.

Two processes with gloo on CPU. Three ways of starting them look right and train one process, or two that never meet:
so the number of processes and the wrapper of the model are looked at, too.
"""

import math

import pytest
import torch
from cells import ENGINES, Cell, cells
from engines import Engines, results
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.distributed

WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPModule",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
TOLERANCE = 1e-3  # of a loss, relative to it

MATRIX = [pytest.param(engine, cell, id=f"{engine}, {cell}") for engine in ENGINES for cell in cells(engine)]


@pytest.mark.parametrize(("engine", "cell"), MATRIX)
def test_losses_are_those_of_one_process(engine: str, cell: Cell, engines: Engines) -> None:
    alone = engines.records("alone")[0][str(cell)]
    assert alone["world_size"] == 1
    for records in engines.records(engine):
        record = records[str(cell)]
        assert record["world_size"] == 2
        assert WRAPPERS[engine] in record["wrapper"]
        assert record["spread"] == (engine in ("fsdp2", "zero3"))
        assert record["shards"] == (4 if cell.data == "offline" else 0)  # of 8 prompts, each sampled by one process
        assert record["stage"] == {"zero2": 2, "zero3": 3}.get(engine)
        assert len(record["losses"]) == 3 and len(set(record["losses"])) == 3
        assert record["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
        if cell.weights == "object":  # it begins at its own reference: ln 2 for a pair, ln 3! for a ranking of three
            assert record["losses"][0] == pytest.approx(math.log(2 if cell.trainer == "RSO" else 6), rel=1e-4)
        in_bfloat16 = cell.weights == "qlora"  # TRL's choice for adapters of quantised models: 8 bits of precision
        assert record["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-2 if in_bfloat16 else TOLERANCE)
        if cell.data == "given":
            assert record["eval_loss"] == pytest.approx(alone["eval_loss"], rel=TOLERANCE)
        if cell.data == "judged":
            assert record["best"] == alone["best"]
            assert {"eval_kl", "eval_lc_win_rate"} < alone["evaluations"][3].keys()
            rewards = [found["eval_reward"] for found in alone["evaluations"]]
            assert record["after"] == pytest.approx(max(rewards[1:]), rel=TOLERANCE) and len({*rewards}) == 4
            for one in (record["evaluations"], record["resumed_evaluations"]):
                assert one == [pytest.approx(found, rel=TOLERANCE, abs=1e-4) for found in alone["evaluations"]]
        assert record["holds_reference_model"] == alone["holds_reference_model"]
        # TRL shards a reference model as one unit: docs/scaling.md counts on it
        assert record["reference_units"] == (engine == "fsdp2" and record["holds_reference_model"])
        assert record["resumed_losses"] == pytest.approx(record["losses"], rel=TOLERANCE)
    pairs = zip(record["losses"], alone["losses"], strict=True)
    results[engine, str(cell)] = max(abs(one - other) / abs(other) for one, other in pairs), record["seconds"]


@pytest.mark.parametrize(("engine", "cell"), MATRIX)
def test_what_is_saved_loads_without_the_engine(engine: str, cell: Cell, engines: Engines) -> None:
    engines.records(engine)
    engines.records("alone")
    name = str(cell).replace(", ", "-")
    expected = token_logps(engines, "alone", name, "saved")
    before = token_logps(engines, None, name, "tied" if cell.weights == "tied" else "policy")
    assert (expected - before).abs().max() > 5e-3  # training has moved it
    for folder in ["saved"] if cell.data == "judged" else ["saved", "checkpoint-3"]:
        torch.testing.assert_close(token_logps(engines, engine, name, folder), expected, rtol=1e-3, atol=1e-3)
    if cell.weights in ("lora", "qlora", "adapter"):
        file = "adapter_model.safetensors"
        saved, alone = (load_file(engines.folder / one / name / "saved" / file) for one in (engine, "alone"))
        assert saved.keys() == alone.keys() and all(saved[key].shape == alone[key].shape for key in alone)


def token_logps(engines: Engines, engine: str | None, name: str, folder: str) -> torch.Tensor:
    """Log-probabilities of a text's tokens under what a training has saved; with no engine, before it."""
    path = engines.folder / folder if engine is None else engines.folder / engine / name / folder
    is_adapter = (path / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(engines.folder / "policy" if is_adapter else path)
    if is_adapter:
        model = PeftModel.from_pretrained(model, str(path))
    elif "adapter" in name:
        model = PeftModel.from_pretrained(model, str(engines.folder / "adapter"))
    ids = AutoTokenizer.from_pretrained(engines.folder / "policy")(
        "The capital of France is Paris.", return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**ids).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids["input_ids"][0, 1:, None])[:, 0]


def test_only_full_fine_tunes_with_a_reference_hold_a_second_model(engines: Engines) -> None:
    for cell in cells("alone"):
        has_reference = cell.trainer in ("RSO", "ListwiseDPO") and cell.weights in ("full", "tied", "object")
        computed = not {"precompute_ref_log_probs", "reference_logps"} & cell.options.keys()
        holds = engines.records("alone")[0][str(cell)]["holds_reference_model"]
        assert holds == (has_reference and computed), str(cell)
