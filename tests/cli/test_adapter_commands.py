"""`genft merge`, `genft export-lora` and `genft inspect`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import matplotlib
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from genft_cli.plotting import update_norms
from genft_modules import GenFTConfig, GIFTConfig, WeGeFTConfig, save_adapter
from tests.cli.conftest import Genft, Result
from tests.support.disks import small_files
from tests.support.experts import TARGETS as EXPERTS
from tests.support.experts import adapted, moe, stacks

IDS = torch.arange(12).reshape(2, 6)
PROJECTIONS = ["q_proj", "v_proj"]
CONFIGS = {
    "wegeft": lambda **kw: WeGeFTConfig(r=3, target_modules=PROJECTIONS, task_type="CAUSAL_LM", **kw),
    "gift_own_class": lambda **kw: GIFTConfig(r=3, target_modules=PROJECTIONS, **kw),
    "genft-gelu": lambda **kw: GenFTConfig(
        generator_share_dim=2,
        individual_features=1,
        inner_activation="gelu",
        outer_activation="gelu",
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
        **kw,
    ),
    "peft-lora": lambda **kw: LoraConfig(
        r=3, target_modules=PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM", **kw
    ),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


Adapter = Callable[[str], torch.Tensor]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Adapter:
    """Saves a random adapter for the model under its name in CONFIGS; the logits that it gives."""

    def save(name: str) -> torch.Tensor:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), CONFIGS[name]())
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        save_adapter(model, tmp_path / name)
        return logits(model)

    return save


def refused(done: Result, *words: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith("genft: error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in last


@pytest.mark.parametrize("name", CONFIGS)
def test_merge(genft: Genft, adapter: Adapter, llama: Path, name: str) -> None:
    want = adapter(name)
    done = genft("merge", name, "--output", "deep/merged", "--device", "cpu")
    assert done.code == 0, done.err
    assert f"into {llama}, float32" in done.out
    merged = AutoModelForCausalLM.from_pretrained("deep/merged")
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    assert list(merged.state_dict()) == list(AutoModelForCausalLM.from_pretrained(llama).state_dict())
    assert len(AutoTokenizer.from_pretrained("deep/merged")) == 259
    assert sorted(path.name for path in Path("deep").iterdir()) == ["merged"]


def test_merge_in_another_dtype_and_from_another_place(genft: Genft, adapter: Adapter, llama: Path) -> None:
    adapter("wegeft")
    shutil.copytree(llama, "moved")
    config = json.loads(Path("wegeft/adapter_config.json").read_text())
    Path("wegeft/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused(genft("merge", "wegeft", "--output", "merged"), "--model is missing", "wegeft")
    done = genft("merge", "wegeft", "--model", "moved", "--output", "merged", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert {tensor.dtype for tensor in load_file("merged/model.safetensors").values()} == {torch.bfloat16}


def test_merge_a_classifier_whose_head_came_with_the_adapter(genft: Genft, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    BertForMaskedLM(config).save_pretrained("base")
    for name, fields in (("task", {"task_type": "SEQ_CLS"}), ("class", {"modules_to_save": ["classifier", "pooler"]})):
        base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
        base.bert.pooler.dense.weight.data.zero_()  # new in this class; as good as any
        base.bert.pooler.dense.bias.data.zero_()
        fields = {"modules_to_save": ["classifier"], **fields}
        model = get_peft_model(base, WeGeFTConfig(r=2, target_modules=["query"], **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        save_adapter(model, name)
        done = genft("merge", name, "--output", f"merged-{name}", "--model", "base")
        if name == "task":  # nothing has the pooler
            refused(done, "--model base", "bert.pooler.dense")
            continue
        assert done.code == 0, done.err
        merged = AutoModelForSequenceClassification.from_pretrained(f"merged-{name}")
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("wegeft", ()), ("genft-gelu", ("--max-error", 1e-4))])
def test_export(genft: Genft, adapter: Adapter, llama: Path, name: str, options: tuple[object, ...]) -> None:
    want = adapter(name)
    done = genft("export-lora", name, "--output", "lora", *options)
    assert done.code == 0, done.err
    exact = 4 if name == "wegeft" else 0
    assert f"{exact} of 4 layers exactly" in done.out
    assert done.out.count("| model.layers.") == 4
    assert type(PeftConfig.from_pretrained("lora")) is LoraConfig
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), "lora")
    torch.testing.assert_close(logits(loaded), want, rtol=1e-3, atol=1e-4)


def test_export_to_a_stated_rank(genft: Genft, adapter: Adapter) -> None:
    adapter("genft-gelu")
    done = genft("export-lora", "genft-gelu", "--output", "lora", "--rank", 2)
    assert done.code == 0, done.err
    assert done.out.count("approximated") == 4
    assert PeftConfig.from_pretrained("lora").r == 2
    refused(
        genft("export-lora", "genft-gelu", "--output", "other"),
        "--max-error, --rank: got neither",
        "model.layers.0.self_attn.q_proj has full rank",
    )
    assert not Path("other").exists()


def test_inspect_with_and_without_the_base(genft: Genft, adapter: Adapter, llama: Path) -> None:
    adapter("wegeft")
    done = genft("inspect", "wegeft", "--plot", "norms.svg")
    assert done.code == 0, done.err
    for text in ("wegeft", "r = 3", str(llama), "384 in 4 tensors, float32, 1.5 KiB", "phi 3×32, psi 3×32", "chart"):
        assert text in done.out
    base = AutoModelForCausalLM.from_pretrained(llama)
    tensors = load_file("wegeft/adapter_model.safetensors")
    prefix = "base_model.model.shared_generators.genft_shared.q_proj."
    weight = base.model.layers[1].self_attn.q_proj.weight.detach()
    delta = 8 / 3 * weight @ tensors[f"{prefix}phi"].T @ tensors[f"{prefix}psi"]
    row = next(line for line in done.out.splitlines() if "layers.1.self_attn.q_proj" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3", "0", "q_proj"]
    assert float(cells[4]) == pytest.approx(float(delta.norm()), rel=5e-3)
    assert float(cells[5].rstrip("%")) / 100 == pytest.approx(float(delta.norm() / weight.norm()), rel=5e-3, abs=1e-4)
    chart = Path("norms.svg").read_text()
    assert "<svg" in chart

    config = json.loads(Path("wegeft/adapter_config.json").read_text())
    Path("wegeft/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    done = genft("inspect", "wegeft")
    assert done.code == 0, done.err
    assert "use --model" in done.out
    assert "‖ΔW‖ " not in done.out
    refused(genft("inspect", "wegeft", "--plot", "norms.png"), "--plot", "--model")


@pytest.mark.parametrize("tied", [True, False])
def test_inspect_and_merge_experts(genft: Genft, tmp_path: Path, tied: bool) -> None:
    moe("mixtral").save_pretrained("moe")
    config = WeGeFTConfig(r=3, tied_experts=tied, target_modules=EXPERTS, task_type="CAUSAL_LM")
    model = adapted(AutoModelForCausalLM.from_pretrained("moe"), config)
    save_adapter(model, "adapter")
    done = genft("inspect", "adapter", "--model", "moe")
    assert done.code == 0, done.err
    assert ("phi 3×16, psi 3×16" if tied else "phi 4×3×16, psi 4×3×16") in done.out
    (layer,) = stacks(model).values()
    deltas = torch.stack([layer.get_delta_weight("default", "down_proj", expert) for expert in range(4)])
    row = next(line for line in done.out.splitlines() if "layers.0.mlp.experts.down_proj" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3", "0", "down_proj_experts"]
    assert float(cells[4]) == pytest.approx(float(deltas.detach().norm()), rel=5e-3)
    assert genft("merge", "adapter", "--model", "moe", "--output", "merged").code == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained("merged")), logits(model), rtol=1e-4, atol=1e-4
    )


def test_inspect_own_tensors_and_modules_saved_whole(genft: Genft, adapter: Adapter) -> None:
    adapter("genft-gelu")
    tensors = load_file("genft-gelu/adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.zeros(259, 32)
    save_file(tensors, "genft-gelu/adapter_model.safetensors")
    config = json.loads(Path("genft-gelu/adapter_config.json").read_text())
    Path("genft-gelu/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    done = genft("inspect", "genft-gelu")
    assert done.code == 0, done.err
    for text in ("not recorded", "generator_32x32", "model.layers.0.self_attn.q_proj", "lm_head.weight", "259×32"):
        assert text in done.out
    full = genft("inspect", "genft-gelu", "--model", config["base_model_name_or_path"])
    assert full.out.count("| full ") + full.out.count(" full |") >= 4


def test_charts_of_names_with_and_without_depth(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.attn.{kind}": (i + 1.0, 0.1) for i in range(3) for kind in ("q", "v")}
    with matplotlib.rc_context({"svg.fonttype": "path"}):  # texts are comments then
        update_norms(names | {"head": (1.0, 0.2)}, tmp_path / "chart.svg", "title")
    chart = (tmp_path / "chart.svg").read_text()
    assert chart.count("<!-- model.layers.*.attn.q -->") == 1
    assert chart.count("<!-- head -->") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["chart.svg"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", "nowhere", "--output", "out"), ("nowhere", "no such directory")),
        (("merge", "wegeft"), ("--output",)),
        (("merge", "--output", "out"), ("ADAPTER",)),
        (("merge", "wegeft", "--output", "full"), ("--output full", "not empty")),
        (("merge", "wegeft", "--output", "file"), ("--output file", "is a file")),
        (("merge", "wegeft", "--output", "file/below"), ("--output file/below",)),
        (("merge", "wegeft", "--output", "out", "--dtype", "int8"), ("--dtype int8", "bfloat16")),
        (("merge", "wegeft", "--output", "out", "--device", "tpu"), ("--device tpu",)),
        (("merge", "wegeft", "--output", "out", "--model", "./none"), ("--model ./none", "no such directory")),
        (("merge", "torn", "--output", "out"), ("torn", "adapter_model.safetensors", "not a valid safetensors file")),
        (("merge", "misfit", "--output", "out"), ("misfit", "does not match the model", "shape mismatch")),
        (
            ("merge", "nan", "--output", "out"),
            ("nan", "adapter_model.safetensors", "non-finite elements in base_model.model."),
        ),
        (("export-lora", "nan", "--output", "out"), ("nan", "non-finite elements in base_model.model.")),
        (("export-lora", "peft-lora", "--output", "out"), ("peft's own method LORA",)),
        (("export-lora", "wegeft", "--output", "full"), ("--output full",)),
        (("export-lora", "wegeft", "--output", "out", "--rank", "0"), ("--rank: got 0",)),
        (("export-lora", "wegeft", "--output", "out", "--max-error", "2"), ("--max-error: got 2",)),
        (("export-lora", "wegeft", "--output", "out", "--rank", "2", "--max-error", "0.1"), ("--rank", "--max-error")),
        (("inspect", "peft-lora"), ("peft's own method LORA",)),
        (("inspect", "wegeft", "--plot", "chart.xyz"), ("--plot chart.xyz", ".png")),
        (("inspect", "wegeft", "--plot", "none/chart.png"), ("--plot none/chart.png", "no such directory")),
        (("inspect", "wegeft", "--output", "out"), ("--output",)),
    ],
    ids=" ".join,
)
def test_mistakes(genft: Genft, saved: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = sorted(Path().rglob("*"))
    refused(genft(*arguments), *words)
    assert sorted(Path().rglob("*")) == before


@pytest.fixture
def saved(adapter: Adapter, genft: Genft) -> None:
    """Good and bad adapters, and places that are taken."""
    adapter("wegeft")
    adapter("peft-lora")
    for name in ("torn", "misfit", "nan"):
        shutil.copytree("wegeft", name)
    Path("torn/adapter_model.safetensors").write_bytes(b"torn")
    config = json.loads(Path("wegeft/adapter_config.json").read_text())
    Path("misfit/adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    tensors = load_file("wegeft/adapter_model.safetensors")
    save_file({key: tensor / 0 for key, tensor in tensors.items()}, "nan/adapter_model.safetensors")
    Path("full").mkdir()
    Path("full/precious").touch()
    Path("file").touch()


def test_help_has_examples(genft: Genft, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "export-lora", "inspect"):
        with pytest.raises(SystemExit) as done:
            genft(command, "--help")
        assert done.value.code == 0
        assert f"  genft {command} runs/wegeft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("merge", "wegeft", "--output", "deep/out"), 9_000),
        (("export-lora", "wegeft", "--output", "deep/out"), 900),
        (("inspect", "wegeft", "--plot", "deep/norms.png"), 9_000),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_full_disk_leaves_nothing(genft: Genft, adapter: Adapter, words: tuple[str, ...], size: int) -> None:
    adapter("wegeft")
    Path("deep").mkdir()
    before = sorted(Path().rglob("*"))
    with small_files(size):
        done = genft(*words)
    place = Path("deep").absolute() / "out" if "--output" in words else "deep"
    assert (done.code, done.err.splitlines()[-1]) == (1, f"genft: {place}: File too large")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("words", [("merge", "--output"), ("export-lora", "--output"), ("inspect", "--plot")])
def test_a_place_that_cannot_be_written(
    genft: Genft, adapter: Adapter, words: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter("wegeft")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind root
    done = genft(words[0], "wegeft", words[1], "out.png")
    refused(done, f"{words[1]} ", f"{Path().absolute()} cannot be written")
    assert "loading" not in done.err


def test_names_that_are_not_utf8(genft: Genft, adapter: Adapter) -> None:
    adapter("wegeft")
    refused(genft("merge", "wegeft", "--output", "out\udcff"), "--output out\\udcff: is not UTF-8")
    refused(genft("inspect", "no\udcff"), "no\\udcff: no such directory")


def test_a_reader_that_goes_away(genft: Genft, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter("wegeft")
    ends = os.pipe()
    os.close(ends[0])
    with open(ends[1], "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert genft("inspect", "wegeft").code == 1
        print("more", flush=True)  # as Python does at its end


def test_output_that_is_closed(genft: Genft, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter("wegeft")
    monkeypatch.setattr(sys, "stdout", None)
    assert genft("inspect", "wegeft").code == 0
    sys.stdout.close()


@pytest.fixture
def elsewhere(adapter: Adapter, genft: Genft, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place beside one with a model and an adapter that was trained on it from there; the adapter's place."""
    shutil.copytree(llama, "work/base")
    adapter("wegeft")
    Path("wegeft").rename("work/adapter")
    Path("elsewhere").mkdir()
    place = Path("work/adapter").absolute()
    monkeypatch.chdir("elsewhere")
    return place


def trained_on(adapter: Path, base: str) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return adapter


@pytest.mark.parametrize("base", ["base", "./base", "../base"])
def test_the_base_model_is_found_from_the_adapters_directory(genft: Genft, elsewhere: Path, base: str) -> None:
    adapter = trained_on(elsewhere, base)
    done = genft("merge", adapter, "--output", "merged", "--device", "cpu")
    assert done.code == 0, done.err
    assert f"into {adapter.parent}" in done.out
    assert "‖ΔW‖" in genft("inspect", adapter, "--device", "cpu").out
    done = genft("generate", adapter, "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu")
    assert done.code == 0, done.err
    if base != "../base":
        Path("base").symlink_to(adapter.parent / "base")  # as given comes first
        assert "into ./base" in genft("merge", adapter, "--output", "again", "--device", "cpu").out


@pytest.mark.parametrize("command", [("merge", "--output", "out"), ("generate", "--prompt", "a")], ids=lambda c: c[0])
def test_a_base_model_that_is_gone_is_named_at_once(
    genft: Genft, elsewhere: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a question to the Hub if the name can be none of its; else with one, not with six."""
    asked: list[str] = []

    def unreachable(self: object, name: str, **kwargs: object) -> None:
        asked.append(name)
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("asked"))
    for base in ("./gone", "../gone", "/gone/model", "~/gone", "a/b/gone", "b" * 4000, "gone", "somebody/gone"):
        refused(genft(command[0], trained_on(elsewhere, base), *command[1:]), "--model", base[:100])
    assert asked == ["gone", "somebody/gone"]
    assert not list(Path().iterdir())


def test_a_model_that_was_given_is_looked_for_here_only(genft: Genft, elsewhere: Path) -> None:
    refused(genft("merge", elsewhere, "--output", "out", "--model", "./base"), "--model ./base", "no such directory")
