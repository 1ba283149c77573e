"""Every file of recipes/ from data in the published format to the score, on small models; only sizes are overridden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from genft_cli import arguments, job
from genft_cli.demo.bytes import byte_tokenizer
from recipes import prepare
from tests.cli.conftest import Genft

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SMALL = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1, "--use_cpu")
SMALL += ("--dtype", "float32", "--no_verify", "--output", "out")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2
}  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models of the recipes' architectures, long enough for the recipes' lengths."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=1024, **SIZES)).save_pretrained(root / "llama")
    RobertaForMaskedLM(RobertaConfig(vocab_size=259, max_position_embeddings=514, **SIZES)).save_pretrained(
        root / "roberta"
    )
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(root / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    for name in ("llama", "roberta"):
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in ("llama", "roberta", "vit")}


class Text(NamedTuple):
    """Data of a recipe for a language model, in the published format, and what `prepare` is asked for."""

    rows: list[dict[str, Any]]
    kind: str | None  # None: the file is used as it is
    test: list[dict[str, Any]]  # none: the score needs another tool
    test_kind: str
    scorer: str


COMMONSENSE = [
    {
        "instruction": f"Please answer the following question with true or false, question: is {i} even?\n\n"
        "Answer format: true/false",
        "input": "",
        "output": f"the correct answer is {str(i % 2 == 0).lower()}",
        "answer": str(i % 2 == 0).lower(),
    }
    for i in range(4)
]
ARITHMETIC = [
    {
        "instruction": f"What is {i} + 1,000?",
        "input": "",
        "output": f"{i} + 1,000 = {i + 1000}.",
        "answer": f"{i + 1000}.0",
    }
    for i in range(4)
]
METAMATH = [
    {
        "type": kind,
        "original_question": f"What is {i} + 1?",
        "query": f"What is {i} + 1?",
        "response": f"{i} + 1 = {i + 1}\n#### {i + 1}\nThe answer is: {i + 1}",
    }
    for kind in ("GSM_Rephrased", "MATH_AnsAug")
    for i in range(4)
]
GSM8K = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(3)]
CODE = [
    {"query": f"Print {i}.", "answer": f"So:\n```python\nprint({i})\n```\nThis prints {i}.", "lang": "python"}
    for i in range(4)
]
ALPACA = [{"instruction": f"Name {i} fruits.", "input": "red" * (i % 2), "output": "apple " * i} for i in range(1, 31)]
COMMON = Text(COMMONSENSE, "commonsense", COMMONSENSE, "commonsense-test", "commonsense")
MATHS = Text(ARITHMETIC, None, ARITHMETIC, "math-test", "gsm8k")
TEXTS = {
    "wegeft-commonsense170k": COMMON,
    "gift-commonsense170k": COMMON,
    "wegeft-math10k": MATHS,
    "gift-math10k": MATHS,
    "wegeft-metamathqa": Text(METAMATH, "metamathqa", GSM8K, "gsm8k-test", "gsm8k"),
    "wegeft-codefeedback": Text(CODE, "codefeedback", [], "", ""),
    "wegeft-wizardlm": Text(ALPACA, "wizardlm", [], "", ""),
    "gift-ultrafeedback": Text(ALPACA, None, [], "", ""),
    "genft-alpaca": Text(ALPACA, "genft-alpaca", [], "", ""),
}


def _json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def _glue(root: Path) -> None:
    """Files as in nyu-mll/glue."""
    for split, count in (("train", 6), ("validation", 4)):
        rows = [{"sentence": f"a {'good' if i % 2 else 'bad'} film", "label": i % 2, "idx": i} for i in range(count)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _vtab(root: Path) -> None:
    """Lists and images as in VTAB-1k."""
    for split, name, count in (("train800val200", "train800val200.txt", 4), ("test", "test.txt", 2)):
        (root / "images" / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), ("red", "blue")[i % 2]).save(root / "images" / split / f"{i:06d}.jpg")
        lines = [f"images/{split}/{i:06d}.jpg {i % 2}\n" for i in range(count)]
        (root / name).write_text("".join(lines))


def _fgvc(root: Path) -> None:
    """Mappings and images as in FGVC."""
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            Image.new("RGB", (30, 20), ("red", "blue")[i % 2]).save(root / f"{split}{i}.jpg")
        _json(root / f"{split}.json", {f"{split}{i}.jpg": i % 2 + 1 for i in range(count)})  # type: ignore[arg-type]


class Classes(NamedTuple):
    """Data of a recipe for `genft classify`."""

    model: str
    write: Callable[[Path], None]


CLASSES = {
    "genft-glue": Classes("roberta", _glue),
    "grft-glue": Classes("roberta", _glue),
    "genft-vtab1k": Classes("vit", _vtab),
    "genft-fgvc": Classes("vit", _fgvc),
    "sas-vtab1k": Classes("vit", _vtab),
}


@pytest.mark.parametrize("name", FILES)
def test_from_data_to_score(genft: Genft, models: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert name in {**TEXTS, **CLASSES}, f"recipes/{name}.yaml has no data here"
    if name in TEXTS:
        _language(genft, models["llama"], tmp_path, name, TEXTS[name])
    else:
        _classify(genft, models, tmp_path, name)


def _language(genft: Genft, model: Path, root: Path, name: str, text: Text) -> None:
    data = _json(root / "source.json", text.rows)
    if text.kind is not None:
        prepare.prepare(text.kind, str(data), str(root / "train.jsonl"), model=str(model))
        data = root / "train.jsonl"
    recipe = ROOT / f"recipes/{name}.yaml"
    held_out = "eval_fraction" in yaml.safe_load(recipe.read_text(encoding="utf-8"))
    steps = ("--eval_steps", 1, "--save_steps", 1) if held_out else ()  # 200 in the recipe
    done = genft("finetune", "--config", recipe, "--model", model, "--dataset", data, *SMALL, *steps)
    assert done.code == 0, done.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["steps"] == 2
    assert (record["held_out_after"] is not None) == held_out
    if not text.test:
        return
    prepare.prepare(text.test_kind, str(_json(root / "test.json", text.test)), str(root / "test.jsonl"), task="one")
    done = genft("generate", "out", "--dataset", "test.jsonl", "--output", "answers.jsonl", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    done = genft("score", "answers.jsonl", "--scorer", text.scorer, "--by", "task")
    assert done.code == 0, done.err
    result = json.loads(Path("answers.score.json").read_text())
    assert (result["rows"], list(result["by"])) == (len(text.test), ["one"])
    assert f"accuracy {result['accuracy']:.4f}" in done.out


def _classify(genft: Genft, models: dict[str, Path], root: Path, name: str) -> None:
    kind, data = CLASSES[name], root / "data"
    data.mkdir()
    kind.write(data)
    done = genft(
        "classify", "--config", ROOT / f"recipes/{name}.yaml", "--model", models[kind.model], "--dataset", data, *SMALL
    )
    assert done.code == 0, done.err
    record = json.loads(Path("out/run.json").read_text())
    assert record["steps"] == 2
    assert 0 <= record["metrics"]["accuracy"] <= 1
    assert f"{record['metrics']['accuracy']:.4f}" in done.out


@pytest.mark.parametrize(
    ("name", "config", "published"),
    [
        ("wegeft-commonsense170k", LlamaConfig(), 3_506_176),  # Llama-2-7B
        ("genft-glue", RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), 149_044),
        ("genft-vtab1k", ViTConfig(), 190_464),
        ("genft-fgvc", ViTConfig(), 190_464),
        ("genft-alpaca", LlamaConfig(), 2_170_896),  # LLaMA-7B
    ],
)
def test_the_published_number_of_parameters(name: str, config: Any, published: int) -> None:
    """Without the head."""
    assert _parameters(name, config) == published


def test_sas_is_as_small_as_published() -> None:
    assert _parameters("sas-vtab1k", ViTConfig()) == 29_984 < 43_000


def _parameters(name: str, config: Any) -> int:
    from transformers import AutoModel

    command = "finetune" if name in TEXTS else "classify"
    options = arguments.parse(command, ["--config", str(ROOT / f"recipes/{name}.yaml")], arguments.EXTRA.get(command))
    trainable, _ = job.rehearse(config, job.peft_config_of(options, None), name, AutoModel)
    return trainable


@pytest.mark.parametrize("name", FILES)
def test_it_names_its_source_and_two_paths(name: str) -> None:
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert "# Source: arXiv " in text
    assert list(values)[:2] == ["model_name_or_path", "dataset_name"]
    assert [key for key, value in values.items() if str(value).startswith("path/to/")] == list(values)[:2]
    assert values["output_dir"] == f"runs/{name}"
    table = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert f"[{name}]({name}.yaml)" in table


# --- preparation -------------------------------------------------------------------------------------------------


def _prepared(tmp_path: Path, kind: str, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    prepare.prepare(kind, str(_json(tmp_path / "source.json", rows)), str(tmp_path / "target.jsonl"), **options)
    return [json.loads(line) for line in (tmp_path / "target.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prepared_rows(tmp_path: Path, models: dict[str, Path]) -> None:
    model = str(models["llama"])
    ask = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert _prepared(tmp_path, "commonsense", COMMONSENSE[:1]) == [
        {"prompt": COMMONSENSE[0]["instruction"] + "\n", "completion": "the correct answer is true"}
    ]
    assert _prepared(tmp_path, "commonsense-test", COMMONSENSE[:1], task="boolq") == [
        {"prompt": COMMONSENSE[0]["instruction"] + "\n", "answer": "true", "task": "boolq"}
    ]
    assert _prepared(tmp_path, "math-test", ARITHMETIC[1:2]) == [
        {
            "prompt": f"{ask}\n\n### Instruction:\nWhat is 1 + 1,000?\n\n### Response:\n",
            "answer": "1001.0",
            "task": "math",
        }
    ]
    found = _prepared(tmp_path, "metamathqa", METAMATH, model=model)
    assert len(found) == 4  # without MATH
    assert found[0] == {"prompt": "Q: What is 0 + 1?\nA: ", "completion": " 0 + 1 = 1\n#### 1"}
    found = _prepared(tmp_path, "codefeedback", [*CODE[:1], {"query": "Why?", "answer": "No code."}], model=model)
    assert [row["completion"] for row in found] == [" So:\n```python\nprint(0)\n```"]
    long = {"instruction": "Go on.", "input": "", "output": "x" * 1100}
    sorry = {"instruction": "Go on.", "input": "", "output": "I am sorry."}
    assert len(_prepared(tmp_path, "wizardlm", [long, sorry, *ALPACA[:1]], model=model)) == 1
    found = _prepared(tmp_path, "genft-alpaca", ALPACA[:2])
    assert [row["prompt"].count("### Input:\nred\n") for row in found] == [1, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pile", "source.json", "target.jsonl"], "FORMAT pile: choose from commonsense"),
        (["wizardlm", "source.json", "target.jsonl"], "--model is missing: wizardlm leaves out rows with 1024"),
        (["gsm8k-test", "source.json", "target.jsonl"], "row 1 has no question; it has instruction, input"),
        (["gsm8k-test", "no.json", "target.jsonl"], "SOURCE no.json: no such file"),
    ],
)
def test_what_is_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _json(tmp_path / "source.json", ARITHMETIC)
    assert prepare.main(words) == 2
    assert message in capsys.readouterr().err
