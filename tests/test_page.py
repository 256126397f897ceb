"""The page of a run: its numbers are those of the files, what models wrote is text, and a browser shows it."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import grpo
import verify
from data import page, records
from kernels import distributed
from kernels.distributed import InputError
from train_prm import Judgement

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny"
EVIL = "<script>alert(1)</script><b onclick='x'>\x1b[8m\u202eabc{{ 7 * 7 }}</article>"
SHOWN = "<script>alert(1)</script><b onclick='x'>\\x1b[8m\\u202eabc{{ 7 * 7 }}</article>"  # EVIL as a reader sees it

# --------------------------------------------------------------------------- a run of two problems


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def verification_text(verdicts: list[bool], verdict: bool, remark: str = "") -> str:
    """A verification in the form that the verifier is asked for."""
    words = {True: "correct", False: "incorrect"}
    lines = []
    for k, right in enumerate(verdicts, 1):
        lines += [f"## Step {k}: look", remark or "fine", f"**This step is {words[right]}.**"]
    answer = "Yes" if verdict else "No"
    return "\n".join([*lines, f"**Verification: Is the answer correct (Yes/No)? {answer}**"])


# (solution id, its steps, its answer, its verifications as (step verdicts, verdict); None: one that can't be parsed)
SOLUTIONS = [
    ("p1/0", ["1+1=2", "2+2=5"], "5", [([1, 0], 0), ([1, 0], 0), ([1, 1], 1), None]),
    ("p1/1", ["1+1=2", "2+2=4"], "4", [([1, 1], 1), ([1, 0], 0), None, None]),  # ties, and labelled wrong
    ("p2/0", [EVIL], EVIL, [None, None, None, None]),  # no votes
    ("p2/1", ["3+3=6", "6+1=7"], "7", [([1, 0], 1), ([0, 1], 1), ([1, 1], 0), None]),  # none agrees with all majorities
]
PROBLEMS = {"p1": "One and one, then two more?", "p2": f"Three? {EVIL}"}


def make_stage_one(run: Path) -> None:
    """What verify.py writes, by its own functions."""
    solutions, verifications = [], []
    for solution_id, steps, answer, votes in SOLUTIONS:
        problem = PROBLEMS[records.problem_of(solution_id)]
        solutions.append({"id": solution_id, "problem": problem, "steps": steps, "answer": answer})
        for j, vote in enumerate(votes):
            text = f"nothing that can be read {EVIL}"
            if vote is not None:
                text = verification_text([bool(v) for v in vote[0]], bool(vote[1]), EVIL)
            parsed = asdict(verify.parse_verification(text, len(steps)))
            assert (parsed["verdict"] is None) == (vote is None)
            name = {"id": f"{solution_id}/{j}", "solution_id": solution_id, "sample": j}
            verifications.append({**name, "text": text, **parsed, "finish": "stop", "tokens": 9})
    labels = verify.label_solutions(solutions, verifications, verify.step_consistency, seed=0)
    rows = [solution | {"method": "step_consistency"} | asdict(label)
            for solution, label in zip(solutions, labels, strict=True)]  # fmt: skip
    path = run / "verify" / "labels_step_consistency.jsonl"
    write_lines(path, rows)
    write_lines(run / "verify" / "verifications.jsonl", verifications[::-1])  # in the order in which they ended
    records.write_args(path, argparse.Namespace(num_verifications=4, method="step_consistency"))
    report = {"method": "step_consistency", **verify.describe_labels(labels, verifications)}
    records.write_json(run / "verify" / "report.json", report)


def make_settings(**changes) -> argparse.Namespace:
    settings = {"reward": "process_aware", "format_constraints": "paper", "group_size": 2, "seed": 0, "min_steps": 2}
    settings |= {"max_steps": 8, "selective_discount": 0.0, "loss_norm": "token", "policy": "nowhere", "problems": None}
    return argparse.Namespace(**settings | changes)


# (steps, answer, step verdicts, verdict); without verdicts the format is broken. Two groups of two.
RESPONSES = [
    ("p1", ["1+1=2", "2+2=4"], "4", [True, True], True),
    ("p1", ["1+1=2", "2+2=5"], "5", [True, False], False),
    ("p9", ["3+3=6", "6+1=7"], "7", [True, False], True),
    ("p9", [EVIL.replace("\x1b", "")], "7", None, None),
]


def make_responses(run: Path, args: argparse.Namespace) -> None:
    """What grpo.py --dump_rollouts writes of one step, by its own functions, in steps 1, 2 and 3."""
    args.problems = str(run / "problems.jsonl")
    write_lines(run / "problems.jsonl", [{"id": name, "problem": f"The problem {name}?"} for name in ("p1", "p9")])
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rollouts = []
    for problem_id, steps, answer, verdicts, verdict in RESPONSES:
        inside = " ".join(f"<step>{step}</step>" for step in steps)
        text = f"<think>{inside}</think><answer>\\boxed{{{answer}}}</answer>"
        if verdicts is None:
            text += " and more"
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if tokenizer.decode(ids[:-1]) != text:  # its characters aren't all in the tiny vocabulary
            text = tokenizer.decode(ids[:-1])
        judgement = None
        if verdicts and grpo.REWARDS[args.reward].asks:
            judgement = Judgement(verdicts, verdict, verification_text(verdicts, verdict, EVIL), 9)
        rollout = grpo.Rollout(problem_id, [1], ids, [], text, "stop", problem="?")
        rollout.judgement = judgement
        rollouts.append(rollout)

    def judge(solutions, seed):
        return [rollout.judgement for rollout in rollouts if rollout.judgement is not None]

    grpo.score_rollouts(rollouts, judge, tokenizer, {"p1": "4", "p9": "7"}, args, 0)
    advantages = grpo.group_advantages(torch.tensor([r.reward for r in rollouts]), args.group_size)
    for rollout, tokens in zip(rollouts, grpo.spread_advantages(rollouts, advantages, args), strict=True):
        rollout.token_advantages = tokens
    rows = [records.describe_rollout(r, a, tokenizer) for r, a in zip(rollouts, advantages.tolist(), strict=True)]
    for step in (1, 2, 3, 4):
        write_lines(run / "grpo" / "rollouts" / f"step_{step:07d}.jsonl", rows)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, run / "grpo")
    records.write_args(run / "grpo", args)


def make_run(run: Path, **changes) -> Path:
    """A run with all files that the page reads; changes: of GRPO's settings."""
    make_stage_one(run)
    make_responses(run, make_settings(**changes))
    accuracy = {"heldout/accuracy": 0.5, "heldout/low": 0.4, "heldout/high": 0.6}
    metrics = [{"step": 0, **accuracy}] + [{"step": s, "reward/mean": s / 8, "format/valid": 1.0} for s in (1, 2, 3)]
    write_lines(run / "grpo" / "metrics.jsonl", [*metrics, {"step": 4, "reward/mean": 0.25, "format/valid": 1.0,
                "heldout/accuracy": 0.75, "heldout/low": 0.7, "heldout/high": 0.8}])  # fmt: skip
    write_lines(run / "processbench.jsonl", [{"subset": "tiny", "metric": "f1", "value": 0.8125,
                                              "settings": {"model": "m"}}])  # fmt: skip
    rows = [{"method": "step_consistency (file)", "N": None, "all": {"exact": 0.625}},
            {"method": "single", "N": 4, "all": {"exact": 0.5}}]  # fmt: skip
    records.write_json(run / "labels.json", {"rows": rows})
    gold = [{"id": "p1", "answer": "4", "steps": ["1+1=2", "2+2=4"]}]
    write_lines(run / "gold.jsonl", gold)
    return run


def make_page(monkeypatch, run: Path, *flags: str) -> str:
    """The page of a run, as the command writes it."""
    monkeypatch.setattr(sys, "argv", ["page", "--out", str(run / "page.html"), *flags])
    page.main()
    return (run / "page.html").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- reading a page


class Node:
    """An element of the page, with what is inside."""

    def __init__(self, tag: str, attributes: dict):
        self.tag = tag
        self.attributes = attributes
        self.inside: list = []

    def all(self, tag: str = "", kind: str = "") -> list["Node"]:
        """The elements inside with this tag and this class."""
        found = []
        for part in self.inside:
            if isinstance(part, Node):
                if tag in ("", part.tag) and (not kind or kind in (part.attributes.get("class") or "").split()):
                    found.append(part)
                found += part.all(tag, kind)
        return found

    def text(self) -> str:
        return "".join(part.text() if isinstance(part, Node) else part for part in self.inside)

    def words(self) -> str:
        return " ".join(self.text().split())


class Reader(HTMLParser):
    """Builds Nodes; asserts that every element is closed where it belongs."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]
        self.feed(html)
        assert len(self.open) == 1, [node.tag for node in self.open]

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes))
        self.open[-1].inside.append(node)
        if tag not in ("meta", "input", "br", "link", "img"):
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].inside.append(Node(tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parse(html: str) -> Node:
    return Reader(html).open[0]


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


# --------------------------------------------------------------------------- what is on it


def test_numbers_are_those_of_the_files(tmp_path, monkeypatch):
    """Guards: votes shifted by those that don't vote, or of another solution; a label, a count or a tie that the file
    doesn't have; the chosen verification mistaken; numbers of the pipeline that no file says."""
    run = make_run(tmp_path)
    html = parse(make_page(monkeypatch, run, "--gold", str(run / "gold.jsonl")))
    labels = {row["id"]: row for row in records.read(run / "verify/labels_step_consistency.jsonl", ["id"])}
    marks = {True: "✓", False: "✗", None: "?"}
    solutions = html.all("details", "solution")
    assert [s.all("span", "id")[0].words() for s in solutions] == [solution_id for solution_id, *_ in SOLUTIONS]
    for node, (solution_id, steps, _, votes) in zip(solutions, SOLUTIONS, strict=True):
        label = labels[solution_id]
        rows = node.all("tbody")[0].all("tr")
        assert len(rows) == len(steps) + 1
        for k, row in enumerate(rows):
            cells = [cell.words() for cell in row.all("td") if "f" not in cell.attributes["class"].split()]
            expected = [None if vote is None else bool([*vote[0], vote[1]][k]) for vote in votes]
            assert cells == [marks[verdict] for verdict in expected]
            given = [*label["step_labels"], label["outcome"]][k] if label["step_labels"] else None
            assert row.all("td", "label")[0].words().startswith(marks[given])
            count = row.all("td", "count")[0].words()
            correct, incorrect = expected.count(True), expected.count(False)
            if label["votes"]:
                tie = " =" if correct == incorrect else ""
                assert count == f"{correct} ✓ {incorrect} ✗{tie}"
                assert k == len(steps) or label["votes"][k] == [correct, incorrect]
            else:
                assert count == ""
        starred = [article for article in node.all("article") if "★" in article.all("h4")[0].text()]
        assert [article.all("pre")[0].text() for article in starred] == [
            page.report.printable(text) for text in [label["text"]] if text
        ]
        assert ("dropped" in node.attributes["class"].split()) == (label["dropped"] is not None)
    assert [s.attributes["class"] for s in solutions] == ["solution kept", "solution kept wrong", "solution dropped",
                                                          "solution dropped"]  # fmt: skip
    assert "2 of 3 verdicts call it incorrect" in solutions[0].words()
    assert "a tie, which counts as incorrect" in solutions[1].words()
    pipeline = html.all("ol", "pipeline")[0].words()
    for said in ("4 solutions of 2 problems", "2 labelled solutions by 16 verifications , 62.5 % right in every step (one verification: 50.0 %)",
                 "F1 81.2", "50.0 → 75.0 % right on held-out problems", "4 training steps"):  # fmt: skip
        assert said in pipeline.replace("verifications, ", "verifications , "), (said, pipeline)
    shown = html.all("section")[1].words()
    assert "1 dropped as no_votes" in shown and "1 dropped as no_match" in shown and "8 verifications could not be read" in shown and "2 votes were ties" in shown
    mistakes = html.all("div", "kinds")[0].words()
    assert "Missed errors: 0" in mistakes and "False alarms: 1" in mistakes and "p1/1 Step 2 2+2=4 1 ✓ 1 ✗ =" in mistakes


def test_groups_have_the_runs_rewards_and_grpos_advantages(tmp_path, monkeypatch):
    """Guards: a reward, an advantage or a judgement beside another response; a step's shade one token too early or too
    late; recomputed advantages that grpo.py wouldn't give."""
    run = make_run(tmp_path)
    html = parse(make_page(monkeypatch, run, "--gold", str(run / "gold.jsonl")))
    titles = [node.words() for node in html.all("h3") if node.words().startswith("Training step ")]
    assert titles == ["Training step 1", "Training step 2", "Training step 4"]
    dumped = records.read(run / "grpo/rollouts/step_0000001.jsonl", ["reward", "advantage", "text", "ids"])
    cards = html.all("article", "card")
    assert len(cards) == 3 * len(dumped)
    assert [group.all("p")[0].words() for group in html.all("details", "group")] == ["The problem p1?", "The problem p9?"] * 3
    for card, row in zip(cards, dumped, strict=False):
        head = card.all("h4")[0].words()
        reward, advantage = re.fullmatch(r"\S+ (?:\w+ )+reward (\S+) advantage (\S+)", head).groups()
        assert number(reward) == pytest.approx(row["reward"], abs=0.005)
        assert number(advantage) == pytest.approx(row["advantage"], abs=0.005)
        tokens = card.all("i")
        assert len(tokens) == len(row["ids"]) - 2 * row["text"].count("\u202e")  # which takes three tokens
        assert "".join(token.text() for token in tokens) == page.report.printable(row["text"]) + "<|im_end|>"

    # Two responses, rewards 1 and 0: A = 0.71 and -0.71. Steps: correct, correct; correct, incorrect.
    first, second, accepted, broken = cards[:4]
    table = [[cell.words() for cell in tr.all("td")] for tr in second.all("tbody")[0].all("tr")]
    assert [row[0] for row in table] == ["✓", "✗", ""]
    assert [row[1] for row in table] == ["<think><step>1+1=2", "</step> <step>2+2=5",
                                         "</step></think><answer>\\boxed{5}</answer><|im_end|>"]  # fmt: skip
    assert [row[2] for row in table] == ["−0.71"] * 3  # the run: every token
    assert [row[3] for row in table] == ["0.00", "−0.71", "−0.71"]  # selective: a correct step isn't pushed down
    # global: rewards of the steps 0.5 0.5 | 0.5 -0.5, mean 0.25, std 0.5: 0.5 0.5 | 0.5 -1.5, summed to the end.
    assert [row[4] for row in table] == ["−0.77", "−0.87", "−0.57"]
    assert [[cell.words() for cell in tr.all("td")][4] for tr in first.all("tbody")[0].all("tr")] == ["+0.77", "+0.67", "+0.57"]
    pieces = second.all("tbody")[0].all("tr")[0].all("span")
    assert [piece.attributes["class"].split() for piece in pieces] == [["o-2", "s-2", "g-2"], ["o-2", "g-2"]]
    assert [piece.text() for piece in pieces] == ["<think><step>", "1+1=2"]  # tags keep the response's advantage
    assert "judged correct" in accepted.words() and "format invalid" in broken.words()
    assert "answer right" in first.words() and "◆" not in second.words() and "answer" not in accepted.all("p")[0].words()


def test_how_sure_the_votes_were(tmp_path, monkeypatch):
    """Guards: a step in the wrong row, a row that counts only the shown solutions, a share of labels without a
    reference; an answer counted as a step."""
    assert [page.rank_agreement(agreeing, 8) for agreeing in range(8, -1, -1)] == [0, 1, 1, 2, 3, 3, 3, 3, 3]
    assert page.rank_agreement(1, 1) == 0 and page.rank_agreement(2, 3) == 2
    monkeypatch.setattr(page, "PROBLEMS", 1)
    run = make_run(tmp_path)
    html = parse(make_page(monkeypatch, run, "--gold", str(run / "gold.jsonl")))
    table = next(node for node in html.all("table") if node.attributes.get("id") == "sureness")
    rows = [[cell.words() for cell in [*row.all("th"), *row.all("td")]] for row in table.all("tbody")[0].all("tr")]
    # p1/0: 3:0 and 1:2. p1/1: 2:0 and 1:1, a tie that is wrong. p2/1, of which gold says nothing: 2:1 and 2:1.
    assert rows == [["all of them", "2", "33.3", "0", "100.0"], ["more than half", "3", "50.0", "0", "100.0"],
                    ["half (a tie) or fewer", "1", "16.7", "1", "0.0"]]  # fmt: skip
    mistakes = html.all("section")[2].words()
    assert "1 of the 2 labelled solutions above have a wrong label, 1 of them in the answer alone" not in mistakes
    assert "1 of the 2 labelled solutions above have a wrong label, 0 of them in the answer alone" in mistakes
    assert "labelled right in 50.0 % of these solutions, and in 62.5 % of all in the run" in mistakes
    without = parse(make_page(monkeypatch, run))
    table = next(node for node in without.all("table") if node.attributes.get("id") == "sureness")
    assert [cell.words() for cell in table.all("thead")[0].all("th")] == ["agreeing verdicts", "steps", "of all, %"]


def test_each_rule_and_each_curve_is_explained(tmp_path, monkeypatch):
    """Guards: a reward or a curve that is added without a word of explanation, and other rules' numbers than the
    run's: its bounds, its discount, its votes."""
    assert set(page.NOTES) == set(page.report.PANELS) and set(page.NEEDS_GOLD) < set(page.NOTES)
    for reward in grpo.REWARDS:
        run = make_run(tmp_path / reward, reward=reward, selective_discount=0.25, prm_votes=3)
        section = parse(make_page(monkeypatch, run)).all("section")[2]
        rules = {term.words(): said.words() for term, said in zip(section.all("dt"), section.all("dd"), strict=True)}
        assert sum("(this run)" in term for term in rules) == 1 and rules[f"{reward} (this run)"].startswith("r = ")
        compared = bool(grpo.REWARDS[reward].asks)
        assert ("Both" in rules) == compared
        if compared:
            selective = next(said for term, said in rules.items() if term.startswith("selective_advantage"))
            assert "they get 0.25 · A" in selective and "fewer than 2 or more than 8 steps" in rules["Both"]
            assert "the majority of 3 judgements" in section.words()


def test_equal_rewards_are_pushed_under_global_step():
    """Guards: the page's words on global_step, which pushes where all rewards are equal: five correct steps against
    four. Of the steps' 1/5 and 1/4 the normalised sums are negative for the longer response."""
    pushed = grpo.global_step_advantage([[0.2] * 5, [0.25] * 4, [0.25] * 4], [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3]], [6, 5, 5])
    longer, shorter, _ = pushed
    assert (longer[:5] < 0).all() and (shorter[:4] > 0).all() and longer[5] == shorter[4] == 0


def test_verdicts_against_the_push_are_counted(tmp_path, monkeypatch):
    """Guards: a count of what selective_advantage changes that takes the answer's verdict for a step's."""
    run = make_run(tmp_path)
    section = parse(make_page(monkeypatch, run)).all("section")[2].words()
    # In each of three steps: p1's second response is pushed down with a correct step, p9's first up with a wrong one.
    assert "3 pushed up have a ✗ step and 3 pushed down have a ✓ step" in section


def test_texts_that_contradict_their_verdicts_are_marked(tmp_path, monkeypatch):
    """Guards: a line of the tiny world's verifier that stays unexplained, an explanation of what isn't there, and a mark
    at a text that doesn't contradict itself: a step may be rejected though its result is right."""
    form = "## Step 1: 1+1={}\nWritten: {}\n**This step is {}.**\n"
    texts = [form.format(*parts) for parts in [(2, 3, "correct"), (2, 2, "correct"), (2, 3, "incorrect"), (2, 2, "incorrect")]]
    assert [page.accepts_another_result(text) for text in [*texts, "## Step 1: fine"]] == [True, False, None, None, None]
    run = make_run(tmp_path)
    before = make_page(monkeypatch, run)
    assert "Written:" not in before and 'class="odd"' not in before
    path = run / "verify" / "verifications.jsonl"
    rows = []
    for row in records.read(path, ["id", "text"]):
        text = row["text"].replace(f": look\n{EVIL}\n", ": 1+1=2\nWritten: 3\n", 1)
        rows.append(row | {"text": text.replace(f": look\n{EVIL}\n", ": 1+1=2\nWritten: 2\n", 1)})
    write_lines(path, rows)
    html = parse(make_page(monkeypatch, run))
    # Eight verifications can be read. Of their first steps, seven are accepted, and of the second ones, four.
    assert "7 of the 11 steps accepted below have two different numbers there (marked ≠)" in html.words()
    marked = html.all("section")[1].all("span", "odd")
    assert len(marked) == 7 and all(part.text().endswith("Written: 3\n**This step is correct.**\n") for part in marked)


def test_what_models_write_is_text(tmp_path, monkeypatch):
    """Guards: a problem, a solution, a verification, a response or a judgement that becomes part of the page, runs as a
    script or a template, or turns the direction of what stands beside it."""
    run = make_run(tmp_path / EVIL.replace("/", "∕")[:40])
    text = make_page(monkeypatch, run)
    html = parse(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", text)
    assert len(html.all("script")) == 2 and not any("alert" in script.text() for script in html.all("script"))
    assert not [node for node in html.all() if any(name.startswith("on") for name in node.attributes)]
    places = [html.all("details", "problem")[1].all("p")[0], html.all("details", "solution")[2].all("tbody")[0],
              html.all("details", "solution")[0].all("pre")[0], html.all("details", "solution")[2].all("pre")[0],
              html.all("article", "card")[0].all("pre")[0]]  # fmt: skip
    for place in places:
        assert SHOWN in place.text(), place.text()
    addresses = [node.attributes[name] for node in html.all() for name in ("src", "href") if name in node.attributes]
    assert addresses and all(address.startswith("#") for address in addresses)
    targets = {node.attributes["id"] for node in html.all() if "id" in node.attributes}
    assert {address[1:] for address in addresses} <= targets
    assert not html.all("link") and not html.all("img") and "@import" not in text and "url(" not in text


def test_the_page_is_small_and_says_what_it_left_out(tmp_path, monkeypatch):
    """Guards: a page that no browser opens, from a run with long texts; one that passes a part off as the whole."""
    run = make_run(tmp_path)
    path = run / "verify" / "verifications.jsonl"
    rows = records.read(path, ["id", "text"])
    write_lines(path, [row | {"text": row["text"] + "x" * 50_000} for row in rows])
    html = make_page(monkeypatch, run)
    assert len(html) < 16 * (page.MOST_CHARACTERS + 2000) + 200_000
    assert "more characters]" in html
    monkeypatch.setattr(page, "MOST_BYTES", len(html) * 3 // 4)
    smaller = make_page(monkeypatch, run)
    assert len(smaller.encode()) < page.MOST_BYTES
    assert "Shown: 1 of 2 problems" in parse(smaller).all("section")[1].words()
    groups = parse(smaller).all("section")[2].words()
    assert "training step 1 (1 of 2 groups), training step 2 (1 of 2 groups), training step 4 (1 of 2 groups), of 4 whose" in groups
    assert len(parse(smaller).all("details", "problem")) == 1


def test_optional_files_may_be_missing(tmp_path, monkeypatch):
    """Guards: a page that needs a stage which hasn't run, or the reference answers; a mark of them without them."""
    run = make_run(tmp_path)
    html = make_page(monkeypatch, run)
    assert "◆" not in parse(html).all("main")[0].text() and "gold" not in [n.attributes.get("id") for n in parse(html).all()]
    (run / "grpo" / "tokenizer.json").unlink()
    html = parse(make_page(monkeypatch, run))
    assert "tokenizer is missing" in html.words() and SHOWN[:20] in html.words()
    (run / "labels.json").unlink()
    (run / "processbench.jsonl").unlink()
    (run / "verify" / "report.json").unlink()
    shutil.rmtree(run / "grpo" / "rollouts")
    html = parse(make_page(monkeypatch, run))
    assert "No responses here" in html.words() and html.all("figure", "panel")
    (run / "verify" / "verifications.jsonl").unlink()
    shutil.rmtree(run / "grpo")
    html = parse(make_page(monkeypatch, run))
    assert "No curves here" in html.words() and "3 ✓ 0 ✗" in html.words()
    assert [article.all("h4")[0].words() for article in html.all("article")] == ["★ The text of the label"] * 2
    shutil.rmtree(run / "verify")
    with pytest.raises(InputError, match=r"neither labels nor a GRPO run there; create them with: bash data/tiny/run.sh"):
        make_page(monkeypatch, run)
    make_responses(run, make_settings())
    assert "No labels here" in parse(make_page(monkeypatch, run)).words()


@pytest.mark.parametrize("reward", ["process_aware", "selective_advantage", "global_step", "random", "rlvr"])
def test_old_dumps_and_other_rewards(tmp_path, monkeypatch, reward):
    """Guards: a dump from before `token_advantages` that can't be shown, or is shaded otherwise than the run was; a
    page that needs judgements where the reward asks for none."""
    run = make_run(tmp_path, reward=reward)
    new = make_page(monkeypatch, run)
    for path in (run / "grpo" / "rollouts").glob("*.jsonl"):
        rows = records.read(path, ["text"])
        for row in rows:
            del row["token_advantages"], row["prompt"]
            if row["judgement"]:
                row["judgement"] = {field: row["judgement"][field] for field in ("text", "verdict", "step_verdicts")}
        write_lines(path, rows)
    assert make_page(monkeypatch, run) == new
    judged = bool(grpo.REWARDS[reward].asks)
    shades = [node.attributes["id"] for node in parse(new).all("input") if node.attributes.get("name") == "by"]
    assert shades == (["by-own", "by-selective", "by-global"] if judged else ["by-own"])
    if reward in page.STEP_DESIGNS:  # recomputed as it was
        for row in parse(new).all("section")[2].all("tbody")[0].all("tr"):
            values = [cell.words() for cell in row.all("td")][2:]
            assert values[0] == values[1 + list(page.STEP_DESIGNS).index(reward)]


def test_another_engines_verifications_and_a_merge(tmp_path, monkeypatch):
    """Guards: verifications that have only a text and aren't parsed when read; a label whose text is a merge, of which no
    verification is the chosen one."""
    run = make_run(tmp_path)
    before = parse(make_page(monkeypatch, run)).all("section")[1]
    path = run / "verify" / "verifications.jsonl"
    write_lines(path, [{key: row[key] for key in ("solution_id", "sample", "text")} for row in records.read(path, ["id"])])
    assert parse(make_page(monkeypatch, run)).all("section")[1].text() == before.text()
    path = run / "verify" / "labels_step_consistency.jsonl"
    write_lines(path, [row | {"text": row["text"] and "a merge"} for row in records.read(path, ["id"])])
    merged = parse(make_page(monkeypatch, run)).all("details", "solution")[0].all("article")[-1]
    assert "none of these verifications" in merged.words() and "a merge" in merged.words()


def test_wrong_files_are_one_line(tmp_path, monkeypatch):
    """Guards: tracebacks; somebody's file overwritten."""
    run = make_run(tmp_path)
    path = run / "grpo" / "rollouts" / "step_0000001.jsonl"
    rows = records.read(path, ["text"])
    broken = [
        (rows[:3], "3 responses don't make whole groups of 2"),
        ([rows[0] | {"token_advantages": [0.0]}, *rows[1:]], "token_advantages of a response of p1 must be"),
        ([rows[0] | {"token_advantages": "+"}, *rows[1:]], "numbers, one for each id"),
        ([rows[0] | {"judgement": {"text": "", "verdict": 1}}, *rows[1:]], "verdict must be true or false"),
        ([rows[0] | {"judgement": {"text": "", "verdict": True, "step_verdicts": [True]}}, *rows[1:]], "another response"),
    ]
    for changed, message in broken:
        write_lines(path, changed)
        with pytest.raises(InputError, match=message):
            make_page(monkeypatch, run)
    write_lines(path, rows)
    (run / "grpo" / "args.json").unlink()
    with pytest.raises(InputError, match=r"no args\.json of grpo\.py"):
        make_page(monkeypatch, run)
    (run / "mine.html").write_text("my own")
    monkeypatch.setattr(sys, "argv", ["page", "--run", str(run), "--out", str(run / "mine.html")])
    with pytest.raises(InputError, match=r"no args\.json says that this program made it"):
        page.main()
    monkeypatch.setattr(sys, "argv", ["page"])
    with pytest.raises(SystemExit):
        distributed.run_stage(page.main)
    assert (run / "mine.html").read_text() == "my own"


def test_pieces():
    """Guards: a border of tokens that is missing or empty; a shade that contradicts its sign."""
    assert page.cut_into_pieces(6, [(1, 3)], [[5, 5, 5, 5, 2, 2]]) == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert page.cut_into_pieces(3, [(0, 3)], [[1, 1, 1]]) == [(0, 3)] and page.cut_into_pieces(0, [], [[]]) == []
    assert [page.level_of(a) for a in (0.0, 0.3, 0.5, 2.4, -0.1, -0.94, -1.0)] == [0, 1, 2, 3, -1, -2, -3]
    assert [page.signed(a) for a in (0.935, -1.2, 0.0, -0.001)] == ["+0.94", "−1.20", "0.00", "0.00"]
    assert page.choose_steps([1, 2, 3, 4]) == [1, 2, 4] and page.choose_steps([7]) == [7]
    assert page.split_sections("Well.\n## Step 2: a\nb\n") == [(0, "Well.\n"), (2, "## Step 2: a\nb\n")]


def test_help_and_import_have_no_effects(tmp_path):
    """Guards: a page that draws with matplotlib, which takes seconds to import, or that needs a run for its --help."""
    program = "import sys; from data import page; print(sorted({'matplotlib', 'math_verify'} & set(sys.modules))); "
    program += "sys.argv = ['page', '--help']; page.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[]\nusage: ") and not list(tmp_path.iterdir())



# --------------------------------------------------------------------------- in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe"]  # fmt: skip


class Browser:
    """A headless Chromium with one page, driven by its DevTools protocol over two pipes: no package is needed."""

    def __init__(self, profile: Path):
        theirs_in, self.out = os.pipe()
        reads, theirs_out = os.pipe()
        self.messages = os.fdopen(reads, "rb")
        # It reads commands from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = ["bash", "-c", script, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), **quiet)
        self.deadline = threading.Timer(300, self.process.kill)  # one that hangs must not hang the tests
        self.deadline.start()
        os.close(theirs_in)
        os.close(theirs_out)
        self.count, self.session, self.events = 0, {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def receive(self) -> dict:
        message = bytearray()
        while (byte := self.messages.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)

    def send(self, method: str, **params) -> dict:
        """The answer to a command; what the browser tells meanwhile is kept in `events`."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(command).encode() + b"\0")
        while (message := self.receive()).get("id") != self.count:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def show(self, path: Path, width: int, height: int = 900, scheme: str = "light", scripts: bool = True) -> None:
        """Load a file."""
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=f"({expression})", returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of the first element of this selector."""
        script = f"""(() => {{ const one = document.querySelector({json.dumps(selector)});
            one.scrollIntoView({{block: "nearest"}}); const box = one.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        x, y = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"ArrowRight": 39}[key])

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(20)
        self.deadline.cancel()
        os.close(self.out)
        self.messages.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """The page of a run, with reference answers."""
    run = make_run(tmp_path_factory.mktemp("shown"))
    with pytest.MonkeyPatch.context() as patch:
        make_page(patch, run, "--gold", str(run / "gold.jsonl"))
    return run / "page.html"


MAP = "#s0-0 .map"
STATE = """[document.querySelector("#s0-0 article.on h4").textContent, scrollY, document.documentElement.scrollHeight,
    document.querySelector("#s0-0 .votes").getBoundingClientRect().top]"""


def test_a_click_shows_a_verification(browser, shown):
    """Guards: a vote whose text can't be read, or that is another one's; a page that jumps; a map that needs a mouse."""
    browser.show(shown, 1400)
    browser.evaluate('document.querySelector("#s0-0").open = true')
    browser.click(f"{MAP} tbody tr:nth-child(2) td:nth-of-type(3)")
    title, *place = browser.evaluate(STATE)
    assert title == "Verification 3"
    assert browser.evaluate(f"document.querySelectorAll('{MAP} .here').length") == 1
    assert browser.evaluate(f"document.querySelector('{MAP} .here').textContent").startswith("## Step 2: look")
    assert browser.evaluate(f"[...document.querySelectorAll('{MAP} .texts article')].filter(a => a.offsetHeight).length") == 1
    browser.click(f"{MAP} thead th:nth-child(5) a")
    title, *now = browser.evaluate(STATE)
    assert title == "Verification 4: unreadable, not counted" and now == place
    browser.click(f"{MAP} thead th:nth-child(2) a")
    browser.evaluate(f"document.querySelector('{MAP} thead th:nth-child(2) a').focus()")
    browser.press("ArrowRight")
    title, *now = browser.evaluate(STATE)
    assert title.startswith("Verification 2") and now == place
    assert browser.evaluate("document.activeElement.textContent.trim().endsWith('2')")


def test_filters_and_the_overlay(browser, shown):
    """Guards: a filter that hides what it should show; an overlay that can't be switched off, or moves the page."""
    listed = "[...document.querySelectorAll('.solution')].filter(s => s.offsetHeight).map(s => s.id)"
    browser.show(shown, 1400)
    browser.evaluate("document.querySelectorAll('.problem').forEach(one => one.open = true)")
    for name, expected in (("wrong", ["s0-1"]), ("dropped", ["s1-0", "s1-1"]), ("kept", ["s0-0", "s0-1"]),
                           ("all", ["s0-0", "s0-1", "s1-0", "s1-1"])):  # fmt: skip
        browser.click(f"#show-{name}")
        assert browser.evaluate(listed) == expected, name
    for typed, expected in (("2+2=5", 1), ("p2", 1), ("P", 2), ("nothing", 0), ("", 2)):
        browser.evaluate(f"(search.value = {typed!r}, search.dispatchEvent(new Event('input')))")
        assert browser.evaluate("[...document.querySelectorAll('.problem')].filter(p => p.offsetHeight).length") == expected
    seen = "[...document.querySelectorAll('.gold')].filter(one => getComputedStyle(one).visibility === 'visible').length"
    before = browser.evaluate("[document.documentElement.scrollHeight, scrollY]")
    assert browser.evaluate(seen) > 10
    browser.evaluate("gold.click()")
    assert browser.evaluate(seen) == 0
    assert browser.evaluate("[document.documentElement.scrollHeight, scrollY]") == before


SEEN = """(() => { const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = [];
    while (walker.nextNode()) { const one = walker.currentNode.parentElement;
        if (!one.closest("script") && getComputedStyle(one).visibility === "visible") seen.push(walker.currentNode.data); }
    return seen.join("").replace(/\\s+/g, " "); })()"""


def test_switched_off_references_leave_nothing_but_a_note(browser, shown):
    """Guards: a figure that needs reference answers and stays when they are switched off; a blank section without a
    word; a note that is there when they are on."""
    browser.show(shown, 1400)
    needs_references = ["F1 81.2", "50.0 → 75.0 %", "62.5 %", "held-out accuracy", "labelled right", "False alarms", "answer right"]
    notes = ["the figures on the arrows", "only reference answers show what", "only reference answers show how", "the curves that need"]
    said = browser.evaluate(SEEN)
    assert all(part in said for part in needs_references) and "◆ is switched off" not in said
    browser.evaluate("gold.click()")
    said = browser.evaluate(SEEN)
    assert not [part for part in needs_references if part in said]
    assert all(f"◆ is switched off: {part}" in said for part in notes)
    assert browser.evaluate("[...document.querySelectorAll('.off')].every(note => note.offsetHeight < 30)")  # one line each


def test_shades_follow_the_chosen_reward(browser, shown):
    """Guards: a choice of the reward that changes nothing; a positive advantage that looks like a negative one."""
    browser.show(shown, 1400)
    colour = "[...document.querySelectorAll('.card')].slice(0, 2).map(card => getComputedStyle(card.querySelectorAll('i')[2])"
    up, down = browser.evaluate(f"{colour}.backgroundColor)")
    assert up != down
    assert browser.evaluate(f"{colour}.borderBottomStyle)") == ["solid", "dashed"]  # not by colour alone
    browser.click("#by-selective")
    assert browser.evaluate(f"{colour}.backgroundColor)") == [up, "rgba(0, 0, 0, 0)"]  # 1+1=2 in the wrong response


CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const read = (colour, below) => { canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1); canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
    const light = (rgb) => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const found = {};
    for (const one of document.querySelectorAll("main *, nav *, header *")) {
        if (![...one.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || one.closest("svg, script")) continue;
        let ground = "rgba(0, 0, 0, 0)";
        for (let part = one; part && ground === "rgba(0, 0, 0, 0)"; part = part.parentElement)
            ground = getComputedStyle(part).backgroundColor;
        const paper = getComputedStyle(document.body).backgroundColor;
        const pair = [light(read(getComputedStyle(one).color, paper)), light(read(ground, paper))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        const name = one.tagName + "." + one.className;
        found[name] = Math.min(found[name] || 99, ratio);
    }
    return found; })()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 820, 360])
def test_readable_in_both_themes_at_every_width(browser, shown, scheme, width):
    """Guards: text that hardly stands out from its ground (WCAG AA: 4.5 to 1), a page wider than a phone, a script that
    fails, a request to the network."""
    browser.show(shown, width, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    faint = {name: ratio for name, ratio in browser.evaluate(CONTRAST).items() if ratio < 4.5}
    assert not faint
    wrong = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert not wrong and asked == [shown.as_uri()]


def test_without_scripts(browser, shown):
    """Guards: verifications, responses or a filter that only a script can show."""
    browser.show(shown, 1400, scripts=False)
    seen = browser.send("Accessibility.getFullAXTree")["nodes"]
    names = [node.get("name", {}).get("value", "") for node in seen if not node.get("ignored")]
    opened = [name for name in names if name.startswith("Verification ")]
    assert len(opened) >= 4 and any("▲ pushed up" in name for name in names)
    assert not any(node["role"]["value"] == "searchbox" for node in seen if not node.get("ignored") and "role" in node)


def test_a_screen_reader_finds_names(browser, shown):
    """Guards: controls and pictures that a screen reader announces without saying what they are."""
    browser.show(shown, 1400)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    nodes = [node for node in browser.send("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    for node in nodes:
        role = node["role"]["value"]
        if role in ("link", "radio", "checkbox", "searchbox", "image", "img", "region", "heading", "DisclosureTriangle"):
            assert node.get("name", {}).get("value", "").strip(), node
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(after <= before + 2 for before, after in pairwise(levels))
