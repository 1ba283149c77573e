"""The frontier of methods: what is tried, kept and reported; its target tasks; training and held-out bits."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import frontier
from benchmarks.measure import results
from benchmarks.measure.store import Store
from benchmarks.report import frontier as report
from benchmarks.report import readme
from benchmarks.report.text import plus_minus
from benchmarks.subjects import tasks
from benchmarks.subjects.tasks import IGNORED, Rows
from benchmarks.suites import training
from genft_cli.demo import stages
from genft_cli.demo.run import NAMES, Demo
from genft_modules import METHODS

TINY = Demo(
    hidden=32, layers=2, heads=1, feed_forward=48, seq_len=32, pretrain_steps=2, pretrain_batch=2, pretrain_lr=1e-3
)
STUDY = frontier.Study(
    {4: TINY}, budgets=(250,), methods=("grft", "lora", "full"), seeds=(0, 1), steps=2, tokens=64, held_out=96, rounds=2
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_goes_on_where_it_stopped_and_the_report_shows_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stages, "in_process", lambda stage, *arguments: stage(*arguments))
    monkeypatch.setattr(frontier, "STUDY", STUDY)
    monkeypatch.setattr(frontier, "EXTENSIONS", 0)
    monkeypatch.setattr(frontier, "write_report", lambda arguments: 0)
    folder = tmp_path / "results"
    places = ["--results", str(folder), "--cache-dir", str(tmp_path / "cache"), "--tasks", "prose", "--depths", "4"]
    made, whole = [], frontier.Comparison._made

    def counted(self, *arguments):
        made.append(arguments)
        if len(made) == 3:
            self.deadline = -math.inf
        return whole(self, *arguments)

    monkeypatch.setattr(frontier.Comparison, "_made", counted)
    assert frontier.main(places) == 0
    assert len(made) == 3, "and no run after the deadline"
    assert "stopped after 60 minutes at prose-4" in capsys.readouterr().err
    (path,) = folder.glob("*/frontier/prose-4.json")
    assert not json.loads(path.read_text())["about"]["finished"]
    assert frontier.main([*places, "--parts", "train", "steps"]) == 0
    data = json.loads(path.read_text())
    # Three learning rates and a second configuration where there is one, and two seeds of each.
    assert len(made) == len(data["runs"]) == (4 + 2) + (4 + 2) + (3 + 2)
    assert data["about"]["finished"]
    found = report.points(data)
    assert [(point.method, len(point.bits), point.diverged) for point in found] == [
        ("full", 2, 0),
        ("grft", 2, 0),
        ("lora", 2, 0),
    ]
    assert all(abs(point.trainable / 250 - 1) <= 0.25 for point in found[1:])
    assert all(1 < bits < 8.2 for point in found for bits in point.bits), "a byte has eight bits"
    assert set(data["steps"]["points"]) == {point.key for point in found}
    assert data["steps"]["points"]["full"]["times_full"] == [1, 1, 1]
    assert data["steps"]["points"]["full"]["state_mib"] > data["steps"]["points"]["lora 250"]["state_mib"] > 0

    monkeypatch.undo()
    ((slug, files),) = report.load_folder(folder)
    assert slug == path.parent.parent.name
    page = "\n".join(report.section(files, tmp_path / "charts" / "it.svg", tmp_path))
    for point in found[1:]:
        assert plus_minus(point.bits) in page
        assert f"{point.modules}; " in page
    assert f"full fine-tuning {plus_minus(found[0].bits)} with {found[0].trainable:,} parameters" in page
    assert "Runs: 17, in 0 minutes" in page


def test_a_run_is_made_again_only_where_its_settings_changed(tmp_path):
    store = Store(tmp_path / "it.json", 1)
    store.data["runs"] = {"a": {"settings": {"lr": 1}}, "b": {"settings": {"lr": 2}}}
    store.flush()
    again = Store(tmp_path / "it.json", 1)
    assert again.has("a", {"lr": 1})
    assert not again.has("a", {"lr": 2})
    assert not again.has("c", {"lr": 1})
    again.keep(["a"], among=lambda settings: settings["lr"] == 1)
    assert set(again.data["runs"]) == {"a", "b"}
    again.keep(["a"])
    assert set(again.data["runs"]) == {"a"}


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0, [-1, 0, 1]),
        (1, [-1, 0, 1, 2]),
        (2, [-1, 0, 1, 2, 3]),
        (9, [-1, 0, 1, 2, 3]),
        (-9, [-3, -2, -1, 0, 1]),
    ],
)
def test_learning_rates_go_on_while_the_best_is_at_an_edge(best, tried):
    seen = {}

    def bits(lr):
        step = round(math.log(lr / 0.01, 2.5))
        seen[step] = lr
        return 2 + abs(step - best)

    lr, least = frontier.tuned(bits, 0.01)
    assert sorted(seen) == tried
    assert least == 2 + min(abs(step - best) for step in tried)
    assert (
        lr
        == seen[min(tried, key=lambda step: abs(step - best))]
        == pytest.approx(0.01 * 2.5 ** round(math.log(lr / 0.01, 2.5)), rel=2e-3)
    )


def test_rates_that_all_diverge_are_not_followed():
    seen = []
    assert frontier.tuned(lambda lr: seen.append(lr) or math.inf, 0.01)[1] == math.inf
    assert len(seen) == 3


def test_a_budget_starts_from_what_was_best_at_the_one_before():
    """And the narrower configuration is tried at the best learning rate of the wider one alone."""
    wide, narrow = (frontier.Candidate("lora", modules, (("r", 1),)) for modules in ("all linear", "v"))
    comparison, tried = object.__new__(frontier.Comparison), []
    comparison.last = {}
    comparison.sizes = SimpleNamespace(candidates=lambda method, budget: [wide, narrow] if budget < 5000 else [])

    def run(candidate, budget, lr, seed):
        assert seed == report.TUNING_SEED
        tried.append((candidate.modules, lr))
        return abs(math.log(lr / 0.025)) + (0.1 if candidate is (wide if budget == 1000 else narrow) else 0.0)

    comparison.run = run
    assert frontier.RATES["lora"] == 0.01
    assert comparison.chosen("lora", 1000) == (narrow, 0.025)
    assert tried == [*(("all linear", lr) for lr in (0.004, 0.01, 0.025, 0.0625)), ("v", 0.025)]
    tried.clear()
    assert comparison.chosen("lora", 4000) == (wide, 0.025)
    assert tried == [*(("all linear", lr) for lr in (0.01, 0.025, 0.0625)), ("v", 0.025)]
    assert comparison.chosen("lora", 16000) is None


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(
        vocab_size=259, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return frontier.Sizes(folder)


def test_the_bases_have_equally_many_parameters():
    def count(demo):
        layer = 4 * demo.hidden**2 + 3 * demo.hidden * demo.feed_forward + 2 * demo.hidden
        return demo.layers * layer + 260 * demo.hidden

    counts = [count(demo) for demo in frontier.STUDY.bases.values()]
    assert counts[0] == 837_120
    assert max(counts) < 1.03 * min(counts)
    assert all(demo.hidden % 16 == demo.feed_forward % 16 == 0 for demo in frontier.STUDY.bases.values())


def test_every_method_is_compared():
    assert {*METHODS, "genft-gelu", "full"} == set(frontier.STUDY.methods)
    assert set(frontier.ORDER) == {(task, depth) for task in tasks.TASKS for depth in frontier.STUDY.bases}


def test_the_widest_configurations_near_the_budget_are_tried(sizes):
    found = sizes.candidates("lora", 10_000)
    assert [(one.modules, dict(one.options), one.trainable) for one in found] == [
        ("all linear", {"r": 1}, 4 * (4 * 256 + 3 * 480)),
        ("attention", {"r": 2}, 4 * 4 * 2 * 256),
    ]
    assert [(one.modules, one.trainable) for one in sizes.candidates("lora", 1_000)] == [
        ("v", 4 * 256),
        ("v, upper half", 2 * 2 * 256),
    ], "a rank cannot fall below one, so fewer modules are adapted"
    split, alone = sizes.candidates("genft", 30_000)
    assert dict(split.options) == {"generator_share_dim": 2, "individual_features": 2}
    assert dict(alone.options) == {"generator_share_dim": 12, "individual_features": 0}
    assert sizes.candidates("wegeft", 500_000) == [], "a shared pair ends at the rank of the weights"


def test_a_configuration_adapts_the_modules_of_its_name(sizes):
    base = LlamaForCausalLM(sizes.model_config)
    candidate = frontier.Candidate("lora", "v, upper half", (("r", 2),))
    model = training.adapted(base, "lora", candidate.config(4))
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.model.layers.{layer}.self_attn.v_proj" for layer in (2, 3)}
    assert frontier.Candidate("full").config(4) is None


# ---- the target tasks


def test_prose_is_in_three_parts_that_share_no_window():
    parts = tasks.prose(64, 10**6)
    seen = [{bytes(row.tolist()) for row in rows.ids} for rows in parts]
    assert len(tasks.prose(64, 1024).held_out.ids) == 16
    assert abs(len(parts.tuning.ids) - len(parts.held_out.ids)) <= 1
    assert len(parts.train.ids) > 4000
    assert len(set().union(*seen)) == sum(map(len, seen))
    assert all((rows.labels == rows.ids).all() for rows in parts)


def test_labels_say_which_kind_of_token_each_byte_belongs_to(monkeypatch, tmp_path):
    source = 'def total(x):\n    """Sum it,\n\f twice."""\n    return x + 12345  # why\n'
    digits = "111.000002022." + "...." + "4" * 22 + "." + "....111111.0.2.33333..55555."
    assert len(source) == len(digits)
    files = [tmp_path / f"{number}.py" for number in range(9)]
    for number, path in enumerate(files):
        path.write_text(source.replace("total", f"t{number:04}") * 40)
    (tmp_path / "latin.py").write_bytes(source.encode() * 40 + b"# \xe9\n")
    (tmp_path / "broken.py").write_text(source * 40 + "(")
    monkeypatch.setattr(tasks.corpora, "stdlib_files", lambda: [*files, tmp_path / "broken.py", tmp_path / "latin.py"])
    monkeypatch.setattr(tasks, "TRAINED", 24)
    parts = tasks.labels(88, 88 * 16)
    assert [tuple(rows.ids.shape) for rows in parts] == [(24, 88), (16, 88), (16, 88)]
    seen = []
    for rows in parts:
        counts: dict[str, int] = {}
        for ids, labels in zip(rows.ids.tolist(), rows.labels.tolist(), strict=True):
            text = bytes(ids).decode()
            number = re.findall(r"t(\d{4})", text)[0]
            counts[number] = counts.get(number, 0) + 1
            at = (source.replace("total", f"t{number}") * 3).index(text)
            got = "".join("." if label == IGNORED else chr(label) for label in labels)
            assert got == "." + (digits * 3)[at : at + 87], "a byte's label stands where the byte after it does"
        assert set(counts.values()) == {tasks.OF_A_FILE}
        seen += counts
    assert len(seen) == len(set(seen)), "a file is in one part"


# ---- training and held-out bits


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config).double()


def test_bits_are_of_what_is_to_be_predicted(small):
    ids = torch.randint(0, 256, (5, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[1] = IGNORED
    bits, share = training.evaluate(small, Rows(ids, labels), batch=2)
    with torch.no_grad():
        logits = small(input_ids=ids).logits
    found, right = [], []
    for row in (0, 2, 3, 4):
        for at in (5, 6, 7):
            chances = logits[row, at - 1].softmax(0)
            found.append(-math.log2(chances[ids[row, at]]))
            right.append(int(chances.argmax()) == int(ids[row, at]))
    assert bits == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert share == sum(right) / len(right)


def test_a_probe_is_the_logistic_regression_of_the_last_hidden_states(small):
    ids = torch.randint(0, 256, (6, 8), generator=torch.Generator().manual_seed(2))
    labels = torch.where(ids % 3 == 0, IGNORED, ids % 3 + 48).roll(1, 1)
    labels[:, 0] = IGNORED
    rows, base = Rows(ids, labels), copy.deepcopy(small)
    before = training.evaluate(base, rows)[0]
    training.probe(base, rows, batch=4)
    assert training.evaluate(base, rows)[0] < min(1.0, before), "two labels, about as frequent"
    head = base.get_output_embeddings()
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert base.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        chances = base(input_ids=ids).logits.softmax(-1)
    assert (chances > 0).sum(-1).eq(2).all(), "bytes that are no label have no chance"
    for parameter in (head.weight, head.bias):
        parameter.requires_grad_()
    loss = base(input_ids=ids, labels=labels).loss
    found = torch.autograd.grad(loss, [head.weight, head.bias])
    for gradient, parameter in zip(found, (head.weight, head.bias), strict=True):
        assert (gradient[49:51] + 2e-4 * parameter[49:51]).abs().max() < 1e-4, "the optimum, with the decay"


def test_a_training_is_adamw_with_warm_up_cosine_and_clipped_gradients(small):
    rows = tasks.windows("so it goes, and then it goes on; " * 40, 16)
    settings = {"steps": 5, "batch": 2, "lr": 1e-2, "seed": 3}
    model, want = training.adapted(small, "full", None), training.adapted(small, "full", None)
    training.train(model, rows, **settings, warmup=0.2, clip=0.1)
    optimizer = torch.optim.AdamW(want.parameters(), weight_decay=0.0)
    order = torch.randperm(len(rows.ids), generator=torch.Generator().manual_seed(3))
    for step in range(5):
        for group in optimizer.param_groups:  # one step of warm-up, then a cosine over the four that are left
            group["lr"] = 1e-2 * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 4)))
        ids = rows.ids[order[2 * step : 2 * step + 2]]
        want(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(want.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for (name, got), expected in zip(model.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=name)
    assert not torch.equal(model.lm_head.weight, small.lm_head.weight)


# ---- the report


def point(method, budget, trainable, *bits):
    return report.Point(method, budget, "v", {"r": 1}, trainable, 0.01, list(bits), [0.5] * len(bits), 0)


def test_the_pareto_set_and_the_leaders():
    a, b = point("gift", 1000, 900, 3.0, 3.2), point("lora", 1000, 1000, 3.15, 3.25)
    c, d = point("gift", 3000, 3000, 2.9, 2.9), point("lora", 3000, 2900, 2.8, 2.8)
    e = point("full", 0, 9000, 2.85)
    assert report.pareto([e, d, c, b, a]) == [a, d]
    assert report.leaders([a, b, c, d, e]) == [(1000, [a, b], b), (3000, [d], d)]


def test_runs_that_diverged_are_counted_and_not_averaged():
    def run(seed, bits):
        settings = {"method": "lora", "budget": 1000, "modules": "v", "options": {"r": 1}, "trainable": 9, "lr": 1.0}
        return {"settings": {**settings, "seed": seed}, "bits": bits, "accuracy": 0.5}

    runs = {"a": run(0, 2.0), "b": run(1, None), "c": run(2, 3.0), "d": run(report.TUNING_SEED, 1.0)}
    (found,) = report.points({"runs": runs})
    assert (found.bits, found.diverged, found.mean) == ([2.0, 3.0], 1, 2.5)
    assert dataclasses.replace(found, budget=0).key == found.method == "lora"
    assert found.key == "lora 1000"
    assert report.points({"runs": {"a": run(0, None)}}) == []
    assert set(NAMES) >= {found.method}


def test_the_readme_has_shares_of_what_full_fine_tuning_gains(tmp_path):
    def file(task, depth, before, finished=True, **bits):
        runs = {
            f"{name} {budget}": {
                "settings": {
                    "method": name, "budget": budget, "modules": "v", "options": {"r": 1}, "trainable": budget,
                    "lr": 1.0, "seed": 0,
                },
                "bits": value,
                "accuracy": 0.5,
            }
            for name, values in bits.items()
            for budget, value in values.items()
        }  # fmt: skip
        about = {"parameters": 8_000, "before": {"bits": before}, "finished": finished}
        return {"task": task, "depth": depth, "about": about, "runs": runs}

    files = [
        file("prose", 4, 3.0, full={0: 2.0}, wegeft={1000: 2.5, 2000: 2.4}, lora={1000: 2.6, 2000: 2.1, 4000: 2.0}),
        file("prose", 8, 4.0, full={0: 2.0}, wegeft={1000: 2.9}, lora={1000: 3.4, 2000: 2.5}),
        file("labels", 4, 1.0, full={0: 0.0}, wegeft={1000: 0.3, 2000: 0.25}, lora={1000: 0.6, 2000: 0.1}),
    ]
    unfinished = file("labels", 8, 1.0, finished=False, full={0: 0.0}, lora={500: 0.2})
    assert report.shares(files)["prose"]["wegeft", 1000] == pytest.approx([0.5, 0.55])
    shown = readme.blocks({}, [], [*files, unfinished])["quality"]
    assert "of 4 and 8 layers" in shown
    assert "with 1,000, WeGeFT 50–55% (prose) and 70% (labels), LoRA 30–40% (prose) and 40% (labels)" in shown
    assert "; with 2,000, LoRA 75–90% (prose) and 90% (labels), WeGeFT 60% (prose) and 75% (labels)." in shown
    assert "4,000" not in shown, "half of the model"
    assert readme.blocks({}, [], [unfinished])["quality"] == ""
    assert readme.draw_shares([unfinished], tmp_path / "it.svg") is None
    picture = readme.draw_shares(files, tmp_path / "it.svg").read_text()
    for words in ("prose", "labels", "WeGeFT", "LoRA", "90%"):
        assert f">{words}<" in picture


def test_the_guide_says_what_the_files_say():
    """docs/guides/choose.md: whoever makes the files anew reads the guide again."""
    text = " ".join((results.ROOT / "docs" / "guides" / "choose.md").read_text().split())
    ((_, files),) = report.load_folder(results.FOLDER)
    assert len(files) == len(frontier.ORDER)
    assert all(data["about"]["finished"] for data in files)
    near = [
        {budget: [point.method for point in points] for budget, points, _ in report.leaders(report.points(data))}
        for data in files
    ]
    assert {own[1_000][0] for own in near} == {"wegeft", "gift"}
    assert not any("lora" in own[1_000] for own in near)
    assert all("wegeft" in own[4_000] for own in near)
    assert sum("lora" in own[4_000] for own in near) == len(near) - 1
    assert {own[budget][0] for own in near for budget in (16_000, 64_000)} == {"lora", "hira"}

    shares = report.shares(files)

    def ends(task, *methods, budget=1_000):
        found = [share for method in methods for share in shares[task][method, budget]]
        return f"{100 * min(found):.0f}–{100 * max(found):.0f}%"

    shared, lora = [[ends(task, *own) for task in ("prose", "labels")] for own in (("wegeft", "gift"), ("lora",))]
    assert f"gain {shared[0]} of what full fine-tuning gains on prose and {shared[1]} on labels, " in text
    assert f"LoRA {lora[0]} and {lora[1]}." in text
    times = {
        method: sorted(data["steps"]["points"][f"{method} 1000"]["times_full"][1] for data in files)
        for method in ("wegeft", "lora")
    }
    shared_time, lora_time = (f"{own[0]:.2f}–{own[-1]:.2f}" for own in times.values())
    assert f"its step takes {shared_time} times that of full fine-tuning, LoRA's {lora_time}." in text
    assert ends("prose", "wegeft", "gift", budget=64_000) == "76–80%", "about four fifths"
    assert not any((method, 500_000) in own for own in shares.values() for method in ("wegeft", "gift"))
    most = [share for own in shares.values() for method in ("lora", "hira") for share in own[method, 500_000]]
    assert f"LoRA and HiRA gain at least {100 * min(most):.0f}%." in text

    rates = {
        (method, budget): sorted(
            {point.lr for data in files for point in report.points(data) if point.key == f"{method} {budget}"}
        )
        for method in ("wegeft", "lora")
        for budget in (1_000, 64_000)
    }
    few, many, few_of_lora, many_of_lora = (
        f"{own[0]:g}–{own[-1]:g}"
        for own in (rates[method, budget] for method in ("wegeft", "lora") for budget in (1_000, 64_000))
    )
    assert f"of WeGeFT falls from {few} with 1,000 parameters to {many} with 64,000, and LoRA's from" in text
    assert f"LoRA's from {few_of_lora} to {many_of_lora}." in text
