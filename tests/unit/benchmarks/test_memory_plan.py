"""The plan's parts against DeepSpeed's estimator, and against bytes counted on small models."""

import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.optimization import Adafactor

from prefopt_trl.shared_prefix.packing import pack_rows

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))  # where the scripts import each other from

import memory_plan as plan  # noqa: E402

CONFIG = plan.llama_7b()
SIZE = plan.sizes(CONFIG)


def tiny(dtype: torch.dtype = torch.float32) -> tuple[Any, LlamaConfig, plan.Sizes]:
    """A small model, its configuration and its sizes."""
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=96, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=dtype), config, plan.sizes(config)


def num_bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def states_bytes(optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> int:
    """Bytes of the states, without the count of steps."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return num_bytes(tensor for tensor in tensors if tensor.dtype == dtype and tensor.ndim)


def stepped(model: torch.nn.Module, optimizer_class: Any = torch.optim.AdamW, **options: Any) -> Any:
    """An optimizer after one step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_class(trained, lr=1e-3, **options)
    optimizer.step()
    return optimizer


def test_parameters_of_llama_7b():
    # Attention 4 x 4096^2 and MLP 3 x 4096 x 11008 in each of 32 layers; an embedding is 32000 x 4096
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    norms = (2 * 32 + 1) * 4096
    assert SIZE.linear == linear
    assert SIZE.model == linear + norms + 2 * 32000 * 4096 == 6_738_415_616
    assert SIZE.largest == 32000 * 4096
    assert SIZE.decoder_layer == linear / 32 + 2 * 4096
    assert SIZE.adapter == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


@pytest.mark.parametrize("gpus", plan.GPUS)
def test_zero3_agrees_with_deepspeeds_estimator(gpus):
    states = plan.zero3(SIZE, CONFIG, gpus)
    given = {"num_gpus_per_node": gpus, "cpu_offload": False, "cpu_offload_params": False}
    _, on_gpu, largest = estimate_zero3_model_states_mem_needs(SIZE.model, SIZE.largest, **given)
    assert states.weights + states.gradients + states.optimizer + largest == pytest.approx(on_gpu, abs=1)
    # Beside what it counts, parameters stay gathered
    assert states.buffers - largest == 2 * DeepSpeedZeroConfig().max_live_parameters == 2e9


@pytest.mark.parametrize("gpus", plan.GPUS)
def test_offload_agrees_with_deepspeeds_estimator(gpus):
    states = plan.zero3_offload(SIZE, CONFIG, gpus)
    _, on_gpu, largest = estimate_zero3_model_states_mem_needs(SIZE.model, SIZE.largest, num_gpus_per_node=gpus)
    assert states.buffers - 2e9 == on_gpu == largest == 4 * 32000 * 4096
    # 18 bytes and half as much again, and the reference model in bfloat16
    assert states.host == pytest.approx(SIZE.model * (18 * 1.5 + 2), abs=1)


@pytest.mark.parametrize("gpus", plan.GPUS)
def test_zero2_agrees_with_deepspeeds_estimator_on_what_is_trained(gpus):
    states = plan.zero2_lora(SIZE, CONFIG, gpus)
    _, on_gpu = estimate_zero2_model_states_mem_needs(SIZE.adapter, num_gpus_per_node=gpus, cpu_offload=False)
    trained = states.weights - 2 * SIZE.model + states.gradients + states.optimizer
    assert trained == pytest.approx(on_gpu, abs=1)


def test_full_states_are_the_bytes_of_a_float32_model():
    model, config, size = tiny()
    optimizer = stepped(model)
    for engine in (plan.ddp, plan.fsdp2):
        states = engine(size, config, 1)
        assert states.weights == num_bytes(model.parameters())
        assert states.gradients == num_bytes(parameter.grad for parameter in model.parameters())
        assert states.optimizer == states_bytes(optimizer, torch.float32)


def test_adafactor_keeps_one_whole_state_of_a_flat_vector_and_rows_and_columns_of_a_matrix():
    options = {"scale_parameter": False, "relative_step": False}
    flat, matrix = torch.nn.ParameterList([torch.zeros(60)]), torch.nn.ParameterList([torch.zeros(6, 10)])
    assert states_bytes(stepped(flat, Adafactor, **options), torch.float32) == 4 * 60
    assert states_bytes(stepped(matrix, Adafactor, **options), torch.float32) == 4 * (6 + 10)
    states, adamw = plan.zero3_adafactor(SIZE, CONFIG, 2), plan.zero3(SIZE, CONFIG, 2)
    assert adamw.optimizer - states.optimizer == 4 * SIZE.model / 2


def test_lora_states_are_the_bytes_of_an_adapter_in_float32_on_a_bfloat16_model():
    base, config, size = tiny(torch.bfloat16)
    model = get_peft_model(base, plan.lora())
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = plan.ddp_lora(size, config, 1)
    assert states.weights == num_bytes(model.parameters())
    optimizer = stepped(model)
    assert states.gradients == num_bytes(parameter.grad for parameter in adapter)
    assert states.optimizer == states_bytes(optimizer, torch.float32)
    assert plan.ddp_lora(size, config, 2).buffers == num_bytes(adapter) and states.buffers == 0


def test_nf4_bytes_are_those_of_a_quantised_layer():
    nf4 = {"quant_type": "nf4", "compress_statistics": True}
    layer = bnb.nn.Linear4bit(512, 256, bias=False, **nf4)
    layer.weight = bnb.nn.Params4bit(torch.randn(256, 512), requires_grad=False, **nf4)
    layer.to("cpu")
    state = layer.weight.quant_state
    scales = num_bytes([state.absmax, state.state2.absmax])
    assert plan.nf4_bytes(512 * 256) == layer.weight.nbytes + scales
    codebooks = num_bytes([state.code, state.state2.code, state.offset])
    assert codebooks == 4 * (16 + 256 + 1)  # of each layer: left out of the plan


def test_qlora_states():
    model, config, size = tiny(torch.bfloat16)
    states = plan.ddp_qlora(size, config, 1)
    unquantised = num_bytes(model.parameters()) - 2 * size.linear
    assert states.weights == plan.nf4_bytes(size.linear) + unquantised + 2 * size.adapter
    assert states.gradients == 2 * size.adapter
    # Matrices large enough for 8 bits: a byte for each of two states, and for each 256 of them a scale
    trained = torch.nn.ParameterList([torch.zeros(64, 256, dtype=torch.bfloat16)])
    optimizer = stepped(trained, bnb.optim.AdamW8bit)
    eight_bit = states_bytes(optimizer, torch.uint8)
    state = optimizer.state[trained[0]]
    scales = num_bytes([state["absmax1"], state["absmax2"]])
    assert (eight_bit + scales) / (64 * 256) == pytest.approx(states.optimizer / size.adapter)


def test_layer_activations_are_what_a_decoder_layer_saves():
    rows, row_length = 2, 320
    model, config, _ = tiny(torch.bfloat16)
    layer = model.model.layers[0]
    assert config._attn_implementation == "sdpa"
    hidden = torch.randn(rows, row_length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(row_length).expand(rows, -1)
    mask = torch.ones(rows, 1, row_length, row_length, dtype=torch.bool).tril()
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}
    kept = []  # alive, so that no two share an address

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, attention_mask=mask, position_embeddings=model.model.rotary_emb(hidden, positions))
    assert plan.layer_activations(config, rows, row_length) == sum(saved.values())


def test_activations_by_hand():
    # PRO: 2 rows of 384 + 4 x 128 = 896 tokens, of which 1024 in all are scored
    inputs = 32 * 1792 * 2 * 4096
    head = 2 * 1024 * 32000 + 4 * 1024 * 4096
    layer = plan.layer_activations(CONFIG, 2, 896)
    assert plan.activations(CONFIG, plan.PRO, trains_head=False) == inputs + layer + head
    assert plan.activations(CONFIG, plan.PRO, trains_head=True) == inputs + layer + head + 4 * 32000 * 4096


@pytest.mark.parametrize("job", [plan.RSO, plan.PRO])
def test_rows_are_as_long_as_packing_makes_them(job):
    prompt = torch.full((job.completions, job.prompt_length), 7)
    completions = torch.arange(job.completions)[:, None].expand(-1, job.completion_length)
    rows = torch.cat([prompt, completions], dim=1)
    packed = pack_rows(rows, torch.ones_like(rows), rows, torch.zeros(job.completions, dtype=torch.long))
    assert packed.input_ids.shape == (1, job.row_length - 1)  # the last token of the prompt heads each completion


def test_total_and_verdict():
    states = plan.zero3(SIZE, CONFIG, 2)
    held = states.weights + states.gradients + states.optimizer + states.buffers
    pro = plan.total("zero3", 2, plan.PRO, CONFIG, SIZE)
    assert pro == held + plan.activations(CONFIG, plan.PRO, trains_head=True)
    rso = plan.total("zero3", 2, plan.RSO, CONFIG, SIZE)
    assert rso == held + states.reference + plan.activations(CONFIG, plan.RSO, trains_head=True)
    assert states.reference == SIZE.model  # 2 bytes, shared by 2

    verdicts = [plan.verdict({plan.RSO: rso * plan.GB, plan.PRO: pro * plan.GB}) for rso, pro in [(80, 1), (85, 80)]]
    assert verdicts == ["yes", "PRO only: RSO is 5 over"]
    assert plan.verdict({plan.RSO: 91 * plan.GB, plan.PRO: 88 * plan.GB}) == "no: 8 over"


def test_what_was_measured_stands_beside_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    assert plan.measured_peaks() == {}
    for job, results in {"rso": {"ours": {"peak_memory_gb": 23.4}}, "pro": {"error": "TimeoutError"}}.items():
        (tmp_path / f"gpu_memory_7b_{job}.json").write_text(json.dumps({"results": results}))
    lines = plan.table(plan.measured_peaks()).splitlines()
    measured = [line for line in lines if "not measured | not measured" not in line][2:]
    assert len(measured) == 1
    assert measured[0].startswith("| ddp, LoRA | 1 |") and measured[0].endswith("| 23.4 | not measured |")


def test_the_documentation_has_this_table():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert plan.table(plan.measured_peaks()) in page
