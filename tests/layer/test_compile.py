"""torch.compile and torch.export of every method: one graph, whatever the number of rows, and the eager result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from genft_modules import METHODS, FusedGenLinear
from tests.support.cases import CASES, DEVICE, LAYERS, REPRESENTATIVES, llama, randomize

K, N = 10, 6
TARGETS = ["q_proj", "k_proj", "down_proj"]
# Inductor on a CPU needs a C++ compiler; without one, the same graphs run as they were captured.
INDUCTOR = "inductor" if DEVICE == "cuda" or any(map(shutil.which, ("g++", "clang++"))) else "aot_eager"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(case: str, kind: str = "Linear") -> FusedGenLinear:
    torch.manual_seed(0)
    return randomize(FusedGenLinear.from_linear(LAYERS[kind](K, N).to(DEVICE), CASES[case]())).train()


def rows(m: int) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(DEVICE).requires_grad_()


def results(run: nn.Module, layer: FusedGenLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and every gradient."""
    layer.zero_grad()
    x.grad = None
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.adapter_parameters().values())]


def test_every_method_has_a_case() -> None:
    assert {CASES[case]().method for case in REPRESENTATIVES} == set(METHODS)


def graphs_of_operators(counter: CompileCounterWithBackend) -> int:
    return sum(any("genft." in str(node.target) for node in module.graph.nodes) for module in counter.graphs)


@pytest.mark.parametrize("case", REPRESENTATIVES)
def test_one_graph_for_every_number_of_rows(case: str) -> None:
    layer = make(case)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (7, 12, 200):
        torch.testing.assert_close(results(compiled, layer, rows(m)), results(layer, layer, rows(m)))
    assert graphs_of_operators(counter) == 1


@pytest.mark.parametrize("kind", ["Linear_no_bias", "Conv1D"])
def test_sizes_become_symbols_by_themselves(kind: str) -> None:
    """Without dynamic=True: once for the first number of rows, once more for all others."""
    layer = make("wegeft", kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for m in (7, 12, 33, 200):
        torch.testing.assert_close(results(compiled, layer, rows(m)), results(layer, layer, rows(m)))
    assert graphs_of_operators(counter) == 2


# Graphs of earlier runs are kept on the disk and looked up without a look at our fake implementations; and which vector
# units the compiler knows takes long to try.
@torch._inductor.config.patch({"force_disable_caches": True, "cpp.vec_isa_ok": False})
def test_inductor_fuses_around_the_operator() -> None:
    """Generated code before and after our operator, in both directions, has the layout that it expects."""
    layer = make("wegeft")
    block = nn.Sequential(nn.GELU(), layer, nn.GELU())
    found, want = (results(run, layer, rows(7)) for run in (torch.compile(block, backend=INDUCTOR), block))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("case", "field"),
    [("wegeft", "wegeft_dropout"), ("lora", "lora_dropout"), ("hira", "hira_dropout"), ("genft", "drop")],
)
def test_compiled_dropout_is_new_in_every_call(case: str, field: str) -> None:
    config = CASES[case](**{field: 0.5})
    layer = randomize(FusedGenLinear.from_linear(nn.Linear(K, N).to(DEVICE), config)).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = rows(7)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 exports no Llama of a free length, adapted or not"
)
@pytest.mark.parametrize("case", ["wegeft", "gift_mlp", "genft_gelu"])
def test_export(case: str) -> None:
    """An adapted model as one program, with a length that is free; shared factors are found where they live."""
    model = llama(use_cache=False)
    randomize(get_peft_model(model, CASES[case](target_modules=TARGETS)))
    ids = torch.arange(24, device=DEVICE).reshape(2, 12) * 7 % 61
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model.eval(), (), {"input_ids": ids}, dynamic_shapes={"input_ids": {1: length}})
    for width in (12, 5):
        want = model(input_ids=ids[:, :width]).logits
        torch.testing.assert_close(program.module()(input_ids=ids[:, :width]).logits, want)


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 12) * 7 % 61
        return {"input_ids": ids, "labels": ids}


def test_trainer_with_torch_compile(tmp_path) -> None:
    """A run of the Trainer with torch_compile=True ends where the eager one does."""
    ends = []
    for compiled in (False, True):
        model = get_peft_model(llama(), CASES["wegeft"](target_modules=TARGETS))
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
            use_cpu=DEVICE == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(1)
        Trainer(model, arguments, train_dataset=Tokens()).train()
        ends.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    eager, other = ends
    assert any(p.ne(0).any() for p in eager.values())
    for name, parameter in eager.items():
        torch.testing.assert_close(other[name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
