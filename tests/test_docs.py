"""What the documentation says is there: pages, links, public names, and the code that is marked to run."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import genft_kernels
import genft_modules
from benchmarks.measure import results
from benchmarks.report import budget, frontier, readme
from benchmarks.report.devices import read_devices

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")),
    *PAGES,
]
RUN = re.compile(r"^<!-- run(?:: ([\w, ]+))? -->\n\n?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^][]*\]\(([^)\s]+)\)")
NO_PAGE = {"METHODS"}  # a dict


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav(part)]


def test_the_site_has_every_page():
    listed = nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in PAGES)


def anchors(path: Path) -> set[str]:
    """Of its headings, as python-markdown's toc makes them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", FENCED.sub("", path.read_text()), re.MULTILINE):
        ascii_only = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower()))
    return found


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_links_lead_somewhere(text):
    for target in LINK.findall(FENCED.sub("", text.read_text())):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        path = (text.parent / place).resolve() if place else text
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("package", [genft_kernels, genft_modules], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    text = "".join(page.read_text() for page in (DOCS / "reference").iterdir())
    described = re.findall(rf"^::: {package.__name__}\.(\w+)$", text, re.MULTILINE)
    assert sorted(described) == sorted(set(package.__all__) - NO_PAGE)


def test_times_of_the_guide_are_those_of_the_run_that_it_names():
    text = (DOCS / "guides" / "choose.md").read_text()
    (file,) = (ROOT / "benchmarks" / "results").rglob(re.findall(r"run `([^`]+)`", text)[0] + ".json")
    shape = {"suite": "layer", "n": [1024], "k": 1024, "r": 16, "dtype": "fp32"}
    found = {
        (record["contender"], record["mode"], record["m"]): record
        for record in json.loads(file.read_text())["records"]
        if shape.items() <= record.items()
    }
    rows = re.findall(r"^\| [^|]+ \| `([\w-]+)` \| ([\d.]+) \| ([\d.]*) ?\| ([^|]+) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for contender, step, decode, saved in rows:
        record = found[contender, "step", 2048]
        assert (f"{record['ratio']['median']:.2f}", size(record["memory"]["saved"])) == (step, saved)
        decoded = found.get((contender, "decode", 1))
        assert decode == (f"{decoded['ratio']['median']:.2f}" if decoded else "")


def test_the_readmes_figures_are_those_of_the_result_files():
    """`python -m benchmarks.report` writes them; counts of parameters are those of the guide's block, which runs."""
    text = (ROOT / "README.md").read_text()
    adapted = [data for _, data in budget.load_folder(results.FOLDER)]
    studied = next((files for _, files in frontier.load_folder(results.FOLDER)), [])
    for block, made in readme.blocks(read_devices(results.FOLDER), adapted, studied).items():
        assert made
        assert f"<!-- {block}:start -->\n{made}<!-- {block}:end -->" in text
    guide = (DOCS / "guides" / "choose.md").read_text()
    counted = re.findall(r"^assert trained\((\w+)Config\(.*\) == ([\d_]+)$", guide, re.MULTILINE)
    shown = re.findall(r"^\| \*\*(\w+)\*\*.* \| ([\d.]+) M \|", text, re.MULTILINE)
    assert len(shown) == len(readme.SHOWN)
    assert {(name, float(count)) for name, count in shown} <= {
        (name, float(f"{int(n) / 1e6:.3g}")) for name, n in counted
    }


def size(count: float) -> str:
    unit, factor = next(((u, f) for u, f in (("MiB", 2**20), ("KiB", 2**10)) if count >= f), ("B", 1))
    return f"{count / factor:.3g} {unit}"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A directory with the model that the texts call path/to/model."""
    directory = tmp_path_factory.mktemp("docs")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "path" / "to" / "model")
    tokenizer().save_pretrained(directory / "path" / "to" / "model")
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a chat template that marks what the assistant says."""
    words = WordLevel({letter: i for i, letter in enumerate(" <>abcdefghijklmnopqrstuvwxyz.,:?")}, unk_token="<")
    core = Tokenizer(words)
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=">", pad_token="<", unk_token="<")
    made.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {% if turn.role == 'assistant' %}"
        "{% generation %}{{ turn.content }}>{% endgeneration %}{% else %}{{ turn.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


@pytest.mark.parametrize("text", [text for text in TEXTS if RUN.search(text.read_text())], ids=name)
def test_marked_code_runs(text, base, tmp_path, monkeypatch, recwarn):
    """The blocks of a text run one after the other, in one namespace that has `data`, beside `path/to/model`. A block
    may name packages, `<!-- run: timm, diffusers -->`: without them the test is skipped from there on."""
    (tmp_path / "path").symlink_to(base / "path")
    monkeypatch.chdir(tmp_path)
    rows = [[(7 * i + j) % 64 for j in range(12)] for i in range(8)]
    namespace: dict[str, Any] = {"data": [{"input_ids": row, "labels": row} for row in rows]}
    source = text.read_text()
    for block in RUN.finditer(source):
        for package in re.findall(r"\w+", block[1] or ""):
            pytest.importorskip(package)
        line = source.count("\n", 0, block.start(2))
        exec(compile("\n" * line + block[2], str(text), "exec"), namespace)  # line numbers are the text's
