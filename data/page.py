"""A run as one page to look at: every vote, every label, and what GRPO's rewards do to each token.

    the files of a run -> data.page -> page.html, which needs no network and no program beside a browser

    bash data/tiny/run.sh                                  # makes the files, and ends with the next line
    python -m data.page --out runs/tiny/page.html
    python -m data.page --run runs/mine --gold gold.jsonl --out mine.html

A run is a directory as data/tiny/run.sh fills it: verify/ with verifications and labels, grpo/ with metrics and, by
--dump_rollouts, responses; each may be missing. The page shows the first problems and the first groups of three steps,
says what it left out, and stays under 10 MB. Nothing is sampled here, and no label or reward is computed anew; only the
advantages that responses would have got under other rewards are, by the functions of grpo.py.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpo
from data import records, report
from evaluate import read_gold
from kernels import distributed
from kernels.chat import decode, special_tokens
from kernels.distributed import InputError
from kernels.text import HEADING, shown_solution
from train_prm import Judgement
from verify import METHODS, is_tie, keep_parsed, read_verifications, vote_of

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import AutoTokenizer

PROBLEMS = 20  # shown, with all their verifications
GROUPS = 8  # shown of each step
MOST_BYTES = 10_000_000
MOST_CHARACTERS = 20_000  # of one text
STEP_DESIGNS = {"selective_advantage": "selective", "global_step": "global"}  # what advantages are recomputed for
# "## Step 3: 89-65=24\nWritten: 34\n**This step is correct.**": its own result, the one that it read, and the verdict.
ACCEPTED = re.compile(r"^## Step \d+: .*=(.*)\nWritten: (.*)\n\*\*This step is correct\.\*\*$", re.MULTILINE)
DUMPED_FIELDS = ["problem_id", "text", "ids", "finish", "valid", "reward", "advantage", "judgement"]
# What the settings of a run are if its args.json is from before a flag existed.
SETTINGS = {"reward": "process_aware", "format_constraints": "paper", "loss_norm": "token", "seed": 0,
            "min_steps": 1, "max_steps": 20, "selective_discount": 0.0, "prm_votes": 1}  # fmt: skip

# --------------------------------------------------------------------------- Stage I: solutions and their votes


def cut(text: str) -> str:
    """A text of at most MOST_CHARACTERS; the end of a longer one says how much is missing."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]}… [{len(text) - MOST_CHARACTERS:,} more characters]"


def split_sections(text: str) -> list[tuple[int, str]]:
    """(number of the step, its section) of a verification, in order; 0 for what stands before the first heading."""
    sections: list[tuple[int, str]] = [(0, "")]
    for line in text.splitlines(keepends=True):
        heading = HEADING.match(line.lower())
        if heading:
            sections.append((int(heading.group(1)), ""))
        number, so_far = sections[-1]
        sections[-1] = (number, so_far + line)
    return [section for section in sections if section[1]]


def make_row(name: str, text: str, cells: list[bool | None], votes: list[int] | None) -> dict:
    """A row of a vote map. cells: a verification's verdict each, None where it doesn't vote; votes: [correct,
    incorrect], None where nothing voted."""
    row = {"name": name, "text": cut(text), "cells": cells, "votes": votes, "tie": False, "label": None, "gold": None}
    if votes:
        correct, incorrect = votes
        row["tie"] = is_tie([True] * correct + [False] * incorrect)
    return row


def vote_map(label: dict, verifications: list[dict]) -> list[dict]:
    """The rows of a solution's map: one for each step, then one for the answer. A cell for each verification."""
    votes = [vote_of(verification) for verification in verifications]
    num_steps = len(label["steps"])
    rows = []
    for k, step in enumerate(label["steps"]):
        cells = [vote[k] if vote else None for vote in votes]
        rows.append(make_row(f"Step {k + 1}", step, cells, label["votes"][k] if label["votes"] else None))
    cells = [vote[num_steps] if vote else None for vote in votes]
    counted = report.count_outcome_votes(label, keep_parsed(verifications))
    rows.append(make_row("Answer", label["answer"] or "none", cells, counted))
    if label["step_labels"] is not None:
        for row, value in zip(rows, [*label["step_labels"], label["outcome"]], strict=True):
            row["label"] = value
    return rows


def find_chosen(label: dict, texts: list[str], verifications: list[dict]) -> int | None:
    """The place of the verification whose text was chosen for the label; None if it is none of them: the solution was
    dropped, or the text is a merge."""
    for place, (text, verification) in enumerate(zip(texts, verifications, strict=True)):
        if label["text"] == text and vote_of(verification) is not None:
            return place
    return None


def describe_solution(name: str, label: dict, verifications: list[dict], texts: list[str], gold: tuple | None) -> dict:
    """What the page shows of one solution. name: its id on the page; gold: see `evaluate.read_gold`."""
    rows = vote_map(label, verifications)
    if gold is not None:
        gold_steps, gold_outcome = gold
        for row, value in zip(rows, [*(gold_steps or [None] * len(label["steps"])), gold_outcome], strict=True):
            row["gold"] = value
    wrong = [row for row in rows if None not in (row["label"], row["gold"]) and row["label"] != row["gold"]]
    chosen = find_chosen(label, texts, verifications)
    judged = []
    for text, verification in zip(texts, verifications, strict=True):
        judged.append({"number": verification["sample"] + 1, "sections": split_sections(cut(text)),
                       "votes": vote_of(verification) is not None})  # fmt: skip
    other_text = None  # of a label that none of these verifications gave its text
    if label["text"] is not None and chosen is None:
        other_text = split_sections(cut(label["text"]))
    return {
        "name": name, "id": label["id"], "rows": rows, "wrong": wrong, "dropped": label["dropped"], "chosen": chosen,
        "outcome": label["outcome"], "verifications": judged, "other_text": other_text,
    }  # fmt: skip


@dataclass
class StageOne:
    """The files of verify.py, and what is known of the whole of them."""

    labels: list[dict]  # all
    method: str
    num_verifications: int | None  # of a solution; None if no args.json says it
    texts: Path  # the file of verifications


def read_stage_one(path: Path) -> StageOne:
    """The labels of a file, and where their verifications are."""
    fields = ["id", "problem", "steps", "answer", "method", "step_labels", "outcome", "text", "votes", "dropped"]
    labels = records.read(path, fields, "python verify.py")
    method = labels[0]["method"]
    made_with = records.read_args(path) or {}
    reads_answers = method in METHODS and METHODS[method].reads_answers
    name = "verifications_reference.jsonl" if reads_answers else "verifications.jsonl"
    return StageOne(labels, method, made_with.get("num_verifications"), path.with_name(name))


def read_texts(path: Path, stored: list[records.StoredVerification]) -> list[str]:
    """The texts of verifications, of which only the places in their file are known."""
    if not stored:
        return []
    with open(path, "rb") as file:
        return [records.read_at(file, verification.text)["text"] for verification in stored]


def read_references(gold_path: str | None) -> dict[str, dict]:
    """id -> its record in a gold file: of a problem with `answer`, and `steps` if its solutions are canonical."""
    if gold_path is None:
        return {}
    return {record["id"]: record for record in records.read(gold_path, ["id"], optional=("answer", "steps"))}


def describe_problems(stage: StageOne, count: int, gold_path: str | None) -> list[dict]:
    """The first `count` problems by id, each with its solutions and everything that was said of them."""
    # 1. Their labels. The order of the file is that in which solutions were finished, which says nothing.
    of_problem: dict[str, list[dict]] = {}
    for label in sorted(stage.labels, key=lambda label: label["id"]):
        of_problem.setdefault(records.problem_of(label["id"]), []).append(label)
    shown = dict(list(of_problem.items())[:count])
    labels = [label for group in shown.values() for label in group]
    gold = read_gold(gold_path, labels) if gold_path else {}
    references = read_references(gold_path)

    # 2. Their verifications that had a vote: a run with a larger N may have left more.
    stored = read_verifications(stage.texts, labels) if stage.texts.exists() else []
    if stage.num_verifications is not None:
        stored = [v for v in stored if v["sample"] < stage.num_verifications]
    verifications = records.group_by_solution(labels, stored)

    # 3. One by one, with the texts.
    problems = []
    for p, (problem_id, group) in enumerate(shown.items()):
        solutions = []
        for k, label in enumerate(group):
            judged = verifications[label["id"]]
            texts = read_texts(stage.texts, judged)
            solution = describe_solution(f"s{p}-{k}", label, judged, texts, gold.get(label["id"]))
            solutions.append(solution)
        problem = {"id": problem_id, "text": cut(group[0]["problem"]), "solutions": solutions}
        problems.append(problem | {"reference": references.get(problem_id)})
    return problems


def list_mistakes(problems: list[dict]) -> dict[str, list[dict]]:
    """The shown solutions that are labelled wrong, each with the first wrong row of its map: the errors that the vote
    `missed`, and its false `alarms`. Those that it was surest of come first."""
    mistakes: dict[str, list[dict]] = {"missed": [], "alarms": []}
    for problem in problems:
        for solution in problem["solutions"]:
            if solution["wrong"]:
                row = solution["wrong"][0]
                kind = "missed" if row["label"] else "alarms"
                mistakes[kind].append({"solution": solution, "row": row})

    def majority_share(mistake: dict) -> float:
        votes = mistake["row"]["votes"]
        return max(votes) / sum(votes) if votes else 0.0

    for of_kind in mistakes.values():
        of_kind.sort(key=majority_share, reverse=True)
    return mistakes


def compare_with_reference(problems: list[dict]) -> dict[str, int]:
    """Of the shown solutions: how many have a label (`labelled`), a wrong one (`wrong`), and one that is wrong in the
    answer alone (`answer_only`)."""
    labelled = [s for problem in problems for s in problem["solutions"] if s["outcome"] is not None]
    wrong = [s["wrong"] for s in labelled if s["wrong"]]
    return {"labelled": len(labelled), "wrong": len(wrong), "answer_only": sum(rows[0]["name"] == "Answer" for rows in wrong)}


def accepts_another_result(section: str) -> bool | None:
    """Does a section of the form of the tiny world's verifier accept a result that isn't its own? None: it is of
    another form, or doesn't accept. What it rejects, it may reject for another reason than the result."""
    accepted = ACCEPTED.search(section)
    return accepted.group(1) != accepted.group(2) if accepted else None


def count_accepted(problems: list[dict]) -> dict[str, int]:
    """Of the shown sections that accept a step, in the form of the tiny world's verifier: `all`, and those that accept
    `another` result than their own."""
    solutions = [solution for problem in problems for solution in problem["solutions"]]
    verifications = [verification for solution in solutions for verification in solution["verifications"]]
    answers = [accepts_another_result(text) for verification in verifications for _, text in verification["sections"]]
    return {"all": len(answers) - answers.count(None), "another": answers.count(True)}


AGREEMENTS = ["all of them", "three quarters or more", "more than half", "half (a tie) or fewer"]


def rank_agreement(agreeing: int, votes: int) -> int:
    """Which of AGREEMENTS: of 8 verdicts, 8 agree with the label -> 0; 7 or 6 -> 1; 5 -> 2; 4 -> 3."""
    if agreeing == votes:
        return 0
    if 4 * agreeing >= 3 * votes:
        return 1
    if 2 * agreeing > votes:
        return 2
    return 3


def measure_sureness(labels: list[dict], gold_path: str | None) -> list[dict]:
    """A row for each of AGREEMENTS: how many steps of all solutions have such a vote (`steps`), how many of them have a
    reference (`known`), and how many have its label (`right`)."""
    voted = [label for label in labels if label["step_labels"] is not None and label["votes"]]
    gold_steps = {}
    if gold_path and voted:
        gold_steps = {label["id"]: steps for label, steps, _, _ in records.find_gold(gold_path, voted)}
    rows = [{"name": name, "steps": 0, "known": 0, "right": 0} for name in AGREEMENTS]
    for label in voted:
        references = gold_steps.get(label["id"]) or [None] * len(label["steps"])
        for value, votes, gold in zip(label["step_labels"], label["votes"], references, strict=True):
            correct, incorrect = votes
            agreeing = correct if value else incorrect
            row = rows[rank_agreement(agreeing, correct + incorrect)]
            row["steps"] += 1
            row["known"] += gold is not None
            row["right"] += gold == value
    return rows


# --------------------------------------------------------------------------- GRPO: groups, and the shade of each token


def read_settings(run: Path) -> argparse.Namespace:
    """The arguments of a run of grpo.py. Raises InputError if it has no args.json."""
    arguments = records.read_args(run)
    if arguments is None or "group_size" not in arguments:
        raise InputError(f"{run}: no args.json of grpo.py, which says how large its groups are; restore it or name another "
                         "--grpo")  # fmt: skip
    return argparse.Namespace(**SETTINGS | arguments)


def open_tokenizer(run: Path, policy: str):
    """The tokenizer of a run, or of the policy that it began with; None if neither is here. The hub isn't asked: a page
    needs no network."""
    for directory in (run, Path(policy)):
        if (directory / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(directory)
    return None


def choose_steps(steps: list[int]) -> list[int]:
    """The first, a middle and the last of some steps, each once."""
    middle = steps[(len(steps) - 1) // 2]
    return list(dict.fromkeys([steps[0], middle, steps[-1]]))


def read_judgement(row: dict, place: str) -> Judgement | None:
    """The judgement of a dumped response. Raises InputError, beginning with `place`, for one of another response."""
    dumped = row["judgement"]
    if dumped is None:
        return None
    verdicts = {field: dumped.get(field) for field in ("step_verdicts", "verdict")}
    records.check_record(verdicts, list(verdicts), place)
    steps, _ = shown_solution(row["text"])
    if verdicts["step_verdicts"] is not None and len(verdicts["step_verdicts"]) != len(steps):
        lengths = f"{len(verdicts['step_verdicts'])} step_verdicts for {len(steps)} steps"
        raise InputError(f"{place}: {lengths}; the judgement is another response's")
    return Judgement(**verdicts, text=dumped["text"], tokens=dumped.get("tokens", 0))


def rebuild_rollouts(rows: list[dict], tokenizer, args: argparse.Namespace, place: str) -> list[grpo.Rollout]:
    """The responses of whole groups as grpo.py has them under a step design: judged, with the tokens of each step, and
    rewarded. From their dump; no model is asked. Without a tokenizer they are only judged."""
    judgements = {}
    rollouts = []
    for row in rows:
        rollout = grpo.Rollout(row["problem_id"], [], row["ids"], [], row["text"], row["finish"])
        rollout.judgement = read_judgement(row, place)
        judgements[f"{row['problem_id']}/{row['text']}"] = rollout.judgement
        rollouts.append(rollout)

    def recall(solutions: list[dict], seed: str) -> list[Judgement | None]:
        """What the reward model said of them. Equal responses have equal judgements."""
        return [judgements[solution["id"]] for solution in solutions]

    if tokenizer is not None:
        as_step_design = argparse.Namespace(**vars(args) | {"reward": "selective_advantage"})
        grpo.score_rollouts(rollouts, recall, tokenizer, {}, as_step_design, step=0)
    return rollouts


def spread(name: str, rollouts: list[grpo.Rollout], advantages: torch.Tensor, args: argparse.Namespace) -> list[list]:
    """The advantage of each token under the reward of this name, by grpo.py."""
    under = argparse.Namespace(**vars(args) | {"reward": name})
    return [tokens.tolist() for tokens in grpo.spread_advantages(rollouts, advantages, under)]


def token_advantages(
    rows: list[dict], rollouts: list[grpo.Rollout], args: argparse.Namespace
) -> dict[str, list[list[float]]]:
    """"own" -> the advantages of each response's tokens in the run; "selective", "global" -> those that they would have
    had under the two step designs, if the reward model has judged steps."""
    dumped = torch.tensor([row["advantage"] for row in rows])  # (B,)
    own = spread(args.reward, rollouts, dumped, args)  # for a dump from before `token_advantages`
    own = [row.get("token_advantages", recomputed) for row, recomputed in zip(rows, own, strict=True)]
    schemes = {"own": own}
    if any(rollout.step_spans for rollout in rollouts):
        rewards = torch.tensor([rollout.reward for rollout in rollouts])  # (B,)
        advantages = grpo.group_advantages(rewards, args.group_size, std_norm=args.loss_norm != "dr_grpo")
        for name, short in STEP_DESIGNS.items():
            schemes[short] = spread(name, rollouts, advantages, args)
    return schemes


def token_texts(tokenizer, ids: list[int], text: str) -> list[str] | None:
    """The text of each token; None if tokens can't be read one by one. A character that several tokens make up is the
    last one's. A token that isn't text, such as that which ends the turn, has its name."""
    decoded: dict[tuple[int, ...], str] = {}
    texts = []
    pending: tuple[int, ...] = ()  # the tokens of a character that isn't complete yet
    for i in ids:
        pending += (i,)
        if pending not in decoded:
            decoded[pending] = decode(tokenizer, list(pending))
        if decoded[pending].endswith("\ufffd"):
            texts.append("")
        else:
            texts.append(decoded[pending])
            pending = ()
    if not text.endswith("".join(texts)):
        return None
    names = {i: name for name, i in special_tokens(tokenizer).items()}
    return [names.get(i, shown) for i, shown in zip(ids, texts, strict=True)]


def level_of(advantage: float) -> int:
    """The shade of an advantage: 0, or from 1 to 3 by its size, with its sign. 0.3 -> 1, 0.94 -> 2, -1.2 -> -3."""
    size = abs(advantage)
    level = int(size > 0) + int(size >= 0.5) + int(size >= 1)
    return level if advantage >= 0 else -level


def cut_into_pieces(length: int, spans: list[tuple[int, int]], schemes: list[list[float]]) -> list[tuple[int, int]]:
    """Half-open token ranges, within which every scheme has one advantage and no step begins or ends.

    Six tokens, a step (1, 3), advantages 5 5 5 5 2 2: the pieces are (0, 1), (1, 3), (3, 4), (4, 6).
    """
    borders = {0, length}
    for span in spans:
        borders |= set(span)
    for advantages in schemes:
        borders |= {t for t in range(1, length) if advantages[t] != advantages[t - 1]}
    ordered = sorted(borders)
    return [(start, end) for start, end in pairwise(ordered)]


def describe_lines(rollout: grpo.Rollout, schemes: dict[str, list[float]], tokenizer) -> list[dict]:
    """A response as lines of shaded pieces: a step ends a line, and so does the response. Without a tokenizer: one
    line, without a shade."""
    if tokenizer is None:
        piece = {"tokens": [rollout.text], "levels": {}}
        return [{"step": None, "verdict": None, "gold": None, "pieces": [piece], "advantages": {}}]
    ids = rollout.ids
    texts = token_texts(tokenizer, ids, rollout.text)
    step_of_end = {end: k for k, (start, end) in enumerate(rollout.step_spans) if start < end}
    lines = []
    pieces = []
    for start, end in cut_into_pieces(len(ids), rollout.step_spans, list(schemes.values())):
        if texts is not None:
            tokens = texts[start:end]
        else:
            before = len(decode(tokenizer, ids[:start]))
            tokens = [decode(tokenizer, ids[:end])[before:]]
        advantages = {scheme: of_tokens[start] for scheme, of_tokens in schemes.items()}
        levels = {scheme: level_of(advantage) for scheme, advantage in advantages.items()}
        pieces.append({"tokens": tokens, "levels": levels})
        step = step_of_end.get(end)
        if step is not None or end == len(ids):
            verdict = None if step is None else rollout.step_verdicts[step]
            # The advantages of its last piece: the step's own, where there is one.
            lines.append({"step": step, "verdict": verdict, "gold": None, "pieces": pieces, "advantages": advantages})
            pieces = []
    return lines


def describe_response(row: dict, rollout: grpo.Rollout, schemes: dict[str, list[float]], tokenizer) -> dict:
    """What the page shows of one response; `add_gold` adds the reference answer's opinion."""
    judgement = rollout.judgement
    return {
        "reward": row["reward"], "advantage": row["advantage"], "valid": row["valid"], "finish": row["finish"],
        "tokens": len(row["ids"]), "verdict": judgement.verdict if judgement else None,
        "judged": judgement is not None, "judgement": split_sections(cut(judgement.text)) if judgement else [],
        "lines": describe_lines(rollout, schemes, tokenizer), "gold": None, "text": row["text"],
    }  # fmt: skip


def describe_step(step: int, path: Path, count: int, problems: dict[str, str], tokenizer, args) -> dict:
    """The first `count` groups of a step."""
    rows = records.read(path, DUMPED_FIELDS, "python grpo.py --dump_rollouts")
    G = args.group_size
    if len(rows) % G:
        raise InputError(f"{path}: {len(rows)} responses don't make whole groups of {G}; its end is missing, so remove it")
    shown = rows[: count * G]
    rollouts = rebuild_rollouts(shown, tokenizer, args, str(path))
    schemes = token_advantages(shown, rollouts, args)
    responses = []
    for i, (row, rollout) in enumerate(zip(shown, rollouts, strict=True)):
        own = schemes["own"][i]
        if not records.NUMBERS.accepts(own) or len(own) != len(row["ids"]):
            raise InputError(f"{path}: token_advantages of a response of {row['problem_id']} must be {len(row['ids'])} "
                             "numbers, one for each id")  # fmt: skip
        mine = {scheme: of_responses[i] for scheme, of_responses in schemes.items()}
        responses.append(describe_response(row, rollout, mine, tokenizer))
    groups = []
    for number, start in enumerate(range(0, len(shown), G)):
        problem_id = shown[start]["problem_id"]
        group = responses[start : start + G]
        groups.append({
            "name": f"g{step}-{number}", "problem_id": problem_id,
            "text": cut(problems.get(problem_id) or shown[start].get("prompt", "")), "responses": group,
            "mean": sum(r["reward"] for r in group) / G, "reference": None,
        })  # fmt: skip
    return {"step": step, "groups": groups, "all": len(rows) // G, "schemes": list(schemes) if tokenizer else []}


def add_gold(steps: list[dict], gold_path: str) -> None:
    """Set the `reference` of each group, and `gold` of each response, is its answer right, and of its judged steps."""
    references = read_references(gold_path)
    solutions = []
    responses = []
    for step in steps:
        for group in step["groups"]:
            group["reference"] = references.get(group["problem_id"])
            for number, response in enumerate(group["responses"]):
                shown, answer = shown_solution(response["text"])
                # What stands before the last slash is the problem's id.
                name = f"{group['problem_id']}/step {step['step']} {group['name']} {number}"
                solutions.append({"id": name, "steps": shown, "answer": answer})
                responses.append(response)
    gold = read_gold(gold_path, solutions)
    for solution, response in zip(solutions, responses, strict=True):
        step_labels, response["gold"] = gold.get(solution["id"], (None, None))
        for line in response["lines"]:
            if line["step"] is not None and step_labels is not None:
                line["gold"] = step_labels[line["step"]]


def count_against(steps: list[dict]) -> dict[str, int]:
    """How many of the shown responses have a verdict on a step that speaks against their push: `up` with an incorrect
    step, `down` with a correct one. These are the ones that selective_advantage changes."""
    counts = {"up": 0, "down": 0}
    for step in steps:
        for group in step["groups"]:
            for response in group["responses"]:
                verdicts = [line["verdict"] for line in response["lines"] if line["step"] is not None]
                counts["up"] += response["advantage"] > 0 and False in verdicts
                counts["down"] += response["advantage"] < 0 and True in verdicts
    return counts


def describe_grpo(run: Path, count: int, gold_path: str | None) -> dict:
    """The groups of three steps of a run; without dumped responses there are no steps."""
    if not list((run / "rollouts").glob("step_*.jsonl")):
        return {"steps": []}
    args = read_settings(run)
    problems = {}
    if Path(str(getattr(args, "problems", ""))).is_file():
        problems = {problem["id"]: problem["problem"] for problem in records.read(args.problems, ["id", "problem"])}
    tokenizer = open_tokenizer(run, str(getattr(args, "policy", "")))
    paths = report.find_rollouts(run / "rollouts")
    steps = []
    for step in choose_steps(sorted(paths)):
        steps.append(describe_step(step, paths[step], count, problems, tokenizer, args))
    if gold_path:
        add_gold(steps, gold_path)
    names = ["reward", "group_size", "min_steps", "max_steps", "prm_votes", "selective_discount", "loss_norm"]
    settings = {name: getattr(args, name) for name in names}
    return {"steps": steps, "dumped": len(paths), "tokenizer": tokenizer is not None, **settings,
            "against": count_against(steps)}  # fmt: skip


# --------------------------------------------------------------------------- curves

WIDTH, HEIGHT = 280, 110  # of a panel, in the units of its drawing
# What a curve shows, where its title doesn't say it; the curves are in this order.
NOTES = {
    "reward/mean": "Mean over all responses of a training step.",
    "heldout/accuracy": "Share of right answers, by the reference, on problems that are never trained on.",
    "heldout/reward_minus_accuracy": "On held-out problems: mean reward minus share of right answers. Where it grows, the "
    "policy learns to please the reward model more than to be right.",
    "format/valid": "Share of responses in the required layout.",
    "response/steps": "",
    "response/length": "",
    "kl/k3": "How far the policy has moved from where it began: KL divergence in nats per token, by the estimator k3.",
    "format/boxes": "\\boxed{…}, where an answer stands. There should be one; several would offer several answers.",
    "format/answers": "<answer> tags. There should be one.",
    "format/empty_boxes": "Boxes without an answer.",
    "format/text_after_answer": "Share of responses that go on after the answer, perhaps with another solution.",
    "format/hidden_text": "Share of responses with text outside of steps and answer: the reward model is not shown it.",
    "reward/count_mismatch": "Share of judgements with more or fewer verdicts than the response has steps.",
    "gap/mean": "How much the log-probabilities of the same tokens differ between the program that samples and the one that "
    "trains. Only rounding, unless one of them is wrong.",
}
NEEDS_GOLD = ("heldout/accuracy", "heldout/reward_minus_accuracy")


def describe_panel(curve: dict) -> dict | None:
    """A curve of `report.run_curves` as points of a drawing; None if it is a constant, which needs none."""
    x, y = curve["x"], curve["y"]
    low, high = curve.get("low", y), curve.get("high", y)
    if len(x) < 2 or not min(low) < max(high):  # also where a value is NaN
        return None
    # Every axis has its zero, and that of a fraction its one: noise must not look like an event.
    bottom = min(0.0, *low)
    top = max(1.0 if curve["panel"] in report.FRACTIONS else 0.0, *high)

    def place(at: float, value: float) -> str:
        across = WIDTH * (at - x[0]) / (x[-1] - x[0])
        down = HEIGHT * (top - value) / (top - bottom)
        return f"{across:.1f},{down:.1f}"

    line = [place(at, value) for at, value in zip(x, y, strict=True)]
    behind = []  # the single steps, behind their moving average
    if curve["smooth"]:
        behind = line
        line = [place(at, value) for at, value in zip(x, report.moving_average(y), strict=True)]
    above = [place(at, value) for at, value in zip(x, high, strict=True)]
    below = [place(at, value) for at, value in zip(x, low, strict=True)]
    return {
        "title": curve["panel"], "line": " ".join(line), "behind": " ".join(behind),
        "band": " ".join([*above, *below[::-1]]) if "low" in curve else "",
        "bottom": bottom, "top": top, "x": x, "y": y,
    }  # fmt: skip


def describe_curves(run: Path) -> dict:
    """The panels of a run's metrics, and the titles and values of those that never change."""
    panels, constants = [], []
    key_of = {report.PANELS[key]: key for key in NOTES}
    if (run / "metrics.jsonl").is_file():
        for curve in report.run_curves(str(run), run.name, list(NOTES)):
            key = key_of[curve["panel"]]
            about = {"note": NOTES[key], "gold": key in NEEDS_GOLD}
            panel = describe_panel(curve)
            if panel is None:
                constants.append({"title": curve["panel"], "value": curve["y"][-1], **about})
            else:
                panels.append(panel | about)
    # Held-out measurements are rarer than steps, so a row of the table may have gaps.
    values = [dict(zip(panel["x"], panel["y"], strict=True)) for panel in panels]
    steps = sorted({step for of_panel in values for step in of_panel})
    table = [[step, *(of_panel.get(step) for of_panel in values)] for step in steps]
    return {"panels": panels, "constants": constants, "table": table, "width": WIDTH, "height": HEIGHT}


# --------------------------------------------------------------------------- the pipeline's own numbers


def read_f1(path: Path) -> dict:
    """ProcessBench's F1 from a results file, and of how many `cases`: of several subsets, their average, which is its
    last row of F1. None if it isn't known."""
    if path.is_file():
        rows = records.read(path, ["subset", "metric", "value", "settings"])
        for row in reversed(rows):
            if row["metric"] == "f1":
                return {"f1": row["value"], "cases": row.get("n")}
    return {"f1": None, "cases": None}


def read_object(path: Path) -> dict:
    """The object of a JSON file; an empty one if there is no such file. Raises InputError if it isn't JSON."""
    if not path.is_file():
        return {}
    return records.parse_json(path.read_bytes(), str(path), "make it anew")


def read_label_report(path: Path, method: str) -> dict | None:
    """Shares of solutions labelled right in every step, from a report of evaluate.py labels: `voted` by this method's
    file, `single` by one verification, and `by_votes`: N -> way of voting -> share. None without a report."""
    rows = read_object(path).get("rows", [])
    voted = [row["all"]["exact"] for row in rows if row["N"] is None and row["method"] == f"{method} (file)"]
    by_votes: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["N"] is not None:
            by_votes.setdefault(row["N"], {})[row["method"]] = row["all"]["exact"]
    if not voted or not by_votes:
        return None
    most = max(by_votes)
    return {"voted": voted[0], "single": by_votes[most].get("single"), "by_votes": by_votes}


def count_stage_one(stage: StageOne, directory: Path) -> dict:
    """Numbers of all of Stage I, of which the page shows a part."""
    dropped = Counter(label["dropped"] for label in stage.labels if label["dropped"])
    numbers = {
        "method": stage.method, "num_verifications": stage.num_verifications, "dropped": dropped,
        "problems": len({records.problem_of(label["id"]) for label in stage.labels}), "solutions": len(stage.labels),
        "kept": len(stage.labels) - dropped.total(), "verifications": None, "unparsed": None, "ties": None,
    }  # fmt: skip
    written = read_object(directory / "report.json")
    if written.get("method") == stage.method:  # else it tells of labels that were made later
        numbers |= {name: written.get(name) for name in ("verifications", "unparsed", "ties")}
    return numbers


def measured_numbers(run: Path, grpo_run: Path) -> dict:
    """What the reward model and the policy reached: ProcessBench's F1, and accuracies before and after GRPO."""
    numbers = {**read_f1(run / "processbench.jsonl"), "steps": None, "before": None, "after": None}
    path = grpo_run / "metrics.jsonl"
    if path.is_file():
        numbers["steps"] = max((record["step"] for record in records.read_metrics(path)), default=0)
        accuracy = list(report.read_metrics(str(grpo_run)).get("heldout/accuracy", {}).values())
        if len(accuracy) > 1:
            numbers |= {"before": accuracy[0], "after": accuracy[-1]}
    return numbers


# --------------------------------------------------------------------------- the page


def shown_value(value: object) -> object:
    """What a template prints: a model's text with its invisible characters made visible, anything else as it is. The
    template engine then escapes it; what it has escaped already, of a type of its own, must stay so."""
    return report.printable(value) if type(value) is str else value


def signed(value: float) -> str:
    """An advantage: +0.94, −1.20, 0.00."""
    text = f"{value:+.2f}"
    if float(text) == 0:
        return "0.00"
    return text.replace("-", "−")


def render(context: dict) -> str:
    """The page. Autoescape is on: whatever a model wrote is text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown_value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = signed
    environment.tests["accepting_another_result"] = accepts_another_result
    environment.filters["percent"] = report.percent
    return environment.get_template("page.html.jinja").render(context)


def fit(args: argparse.Namespace, stage: StageOne | None) -> tuple[str, dict]:
    """(the page, what it shows), with fewer problems and groups, in proportion, if MOST_BYTES has no space for all."""
    num_problems, num_groups = PROBLEMS, GROUPS
    run, grpo_run = Path(args.run), Path(args.grpo)
    numbers = {"run": run.name, **measured_numbers(run, grpo_run)}
    numbers["labels"] = read_label_report(run / "labels.json", stage.method) if stage else None
    numbers["stage_one"] = count_stage_one(stage, Path(args.labels).parent) if stage else None
    numbers["sureness"] = measure_sureness(stage.labels, args.gold) if stage else []
    curves = describe_curves(grpo_run)
    while True:
        problems = describe_problems(stage, num_problems, args.gold) if stage else []
        groups = describe_grpo(grpo_run, num_groups, args.gold)
        context = {"numbers": numbers, "problems": problems, "mistakes": list_mistakes(problems), "grpo": groups,
                   "compared": compare_with_reference(problems), "accepted": count_accepted(problems), "curves": curves,
                   "gold": args.gold is not None}  # fmt: skip
        page = render(context)
        size = len(page.encode())
        if size < MOST_BYTES or num_problems == num_groups == 1:
            return page, context
        share = 0.9 * MOST_BYTES / size
        most_groups = max((len(step["groups"]) for step in groups["steps"]), default=1)
        num_problems = max(1, int(share * len(problems)))
        num_groups = max(1, int(share * most_groups))


def parse_arguments() -> argparse.Namespace:
    """The command line, with the files of the run in place of the flags that weren't given."""
    parser = records.new_parser(__doc__)
    parser.add_argument("--out", help="the page to write, such as runs/tiny/page.html")
    parser.add_argument("--run", help="directory of a run; default: that of --out")
    parser.add_argument("--labels", help="default: <run>/verify/labels_step_consistency.jsonl, if it is there")
    parser.add_argument("--grpo", help="directory of a GRPO run with metrics and rollouts; default: <run>/grpo")
    parser.add_argument("--gold", help="reference answers; default: those that <run>/labels.json was made with, if any")
    args = records.parse_flags(parser)
    if args.out is None:
        raise InputError("--out is missing; say where to write the page, such as --out runs/tiny/page.html")
    if args.run is None:
        args.run = str(Path(args.out).parent)
    run = Path(args.run)
    if args.labels is None:
        args.labels = str(run / "verify" / "labels_step_consistency.jsonl")
        if not Path(args.labels).exists():
            args.labels = ""
    if args.grpo is None:
        args.grpo = str(run / "grpo")
    if args.gold is None:
        used = (records.read_args(run / "labels.json") or {}).get("gold")
        args.gold = used if used and Path(used).is_file() else None
    return args


def main() -> None:
    args = parse_arguments()
    out = Path(args.out)
    records.check_place(out)
    records.check_output(out, args)
    stage = read_stage_one(Path(args.labels)) if args.labels else None
    if stage is None and not Path(args.grpo, "metrics.jsonl").is_file() and not Path(args.grpo, "rollouts").is_dir():
        raise InputError(f"--run {args.run}: neither labels nor a GRPO run there; create them with: bash data/tiny/run.sh")
    page, context = fit(args, stage)
    records.write_args(out, args)
    with records.replace_file(out) as file:
        file.write(page)
    groups = sum(len(step["groups"]) for step in context["grpo"]["steps"])
    size = len(page.encode()) / 1e6
    print(f"{out}: {len(context['problems'])} problems, {groups} groups, {size:.1f} MB")


if __name__ == "__main__":
    distributed.run_stage(main)
