"""Stage I, second half: a verifier judges every solution N times; the verifications become labels (Sec. 3.1).

    solutions.jsonl -> verify.py -> verifications.jsonl, labels_<method>.jsonl, report.json   (in --out)

    python verify.py                                       # the tiny world, on a CPU, in two minutes
    python verify.py --method single                       # other labels from the same verifications, in a second
    python verify.py --model Qwen/Qwen3-32B --solutions runs/solutions.jsonl --out runs/verify

| method              | label                                                                               |
|---------------------|-------------------------------------------------------------------------------------|
| single              | the first parsed verification                                                       |
| outcome_consistency | a random verification with the majority's verdict                                   |
| step_consistency    | a majority for each step and the outcome; a random verification that says just that |
| meta_critique       | the first parsed verification, merged with a critique of it: two more calls         |
| hybrid              | the same, from the verification that step_consistency selects                       |
| hybrid_outcome      | the same, from the one that outcome_consistency selects                             |
| reference_guided    | the first parsed verification by a verifier that sees the answer (baseline)         |

Only reference_guided reads answers; every other verifier sees the problem and the solution, nothing else. Methods that
use the first verification sample just one, unless --num_verifications says otherwise.
What `parse_verification` cannot read is *unparsed*: it is counted and never becomes a vote, a label or a reward.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data import records
from data.records import COUNT, POSITIVE, SEED, TEMPERATURE, TOP_P, WHOLE, group_by_solution
from generate import Engine, open_engine, render_steps, sample_from_queue
from kernels import distributed
from kernels.chat import find_model
from kernels.distributed import InputError
from kernels.sampler import CPU_SLOTS, Sample, with_progress
from kernels.text import CROSS, HEADING, TICK, WORKED_EXAMPLES, readable_lines, without_thinking

import torch

# Used when no --model is given; an explicit flag wins.
TINY = {
    "model": "data/tiny/verifier",
    "solutions": "runs/tiny/solutions.jsonl",
    "out": "runs/tiny/verify",
    "max_new_tokens": 200,
    "worked_examples": 0,  # the tiny verifier was trained on the bare prompt
    "slots": 256,
    "device": "cpu",
}
# A run resumes with other values of these flags, because they don't change verifications.
MAY_CHANGE_ON_RESUME = {
    "out", "limit", "slots", "device", "method", "num_verifications", "critique_rounds", "critique_temperature"
}  # fmt: skip
JUDGED_FIELDS = ["id", "problem", "steps", "answer"]  # what is read of a solution


@dataclass(frozen=True)
class Verification:
    """A parsed verification. A field that the text does not state exactly once is None: unparsed."""

    step_verdicts: list[bool] | None
    verdict: bool | None


# --------------------------------------------------------------------------- verification: prompt and parser

# What both prompts ask for, and `parse_verification` reads.
FORM = """A step is correct only if everything in it is right: a step that leaves out something it needs is incorrect, and so is a step that uses the result of an incorrect step.

For each step k of the student's solution write one section:
## Step k: <short title>
<your analysis>
and then, alone on a line, **This step is correct.** or **This step is incorrect.**
After the last section write one final line: **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.{examples}

Problem: {problem}

Student Solution: {solution}"""

VERIFY_PROMPT = f"""Judge a student's solution to a mathematics problem, one step at a time. No reference answer is given, so work out every step yourself. {FORM}"""

REFERENCE_PROMPT = f"""Judge a student's solution to a mathematics problem, one step at a time. The expected answer is given: use it to find mistakes, but work out every step yourself. {FORM}

Expected Answer: {{reference}}"""


def verification_prompt(solution: dict, worked_examples: int, reference: str | None = None) -> str:
    """The user turn that asks for a verification of a solution, optionally with the reference answer."""
    template = VERIFY_PROMPT if reference is None else REFERENCE_PROMPT
    return template.format(
        examples="".join(f"\n\n{example}" for example in WORKED_EXAMPLES[:worked_examples]),
        problem=solution["problem"],
        solution=render_steps(solution["steps"], solution["answer"]),
        reference=reference,
    )


# A verdict is a whole line; what is struck through (~), put as a question, or crossed out though "correct", is none.
STEP_VERDICT = re.compile(
    rf"(?=[^{CROSS}]*$|.* incorrect)(?=[^{TICK}]*$|.* correct)[^\w~?]*this step is:? (correct|incorrect)[^\w~?]*"
)
VERDICT = re.compile(
    rf"(?=[^{CROSS}]*$|.*\bno\W*$)(?=[^{TICK}]*$|.*\byes\W*$)[^\w~]*(?:final )?verification[^\w~]*"
    r"is the answer correct[ ?]*\( ?yes ?/ ?no ?\)[^\w~]*(yes|no)[^\w~?]*"
)


def parse_verification(text: str, num_steps: int) -> Verification:
    """Read the step verdicts and the final verdict of a verification of a solution that has num_steps steps.

    The sentences are those of FORM, with any emphasis and blanks, and some variants of the last one (`\\boxed{No}`).
    Other wording is not read: a verdict is never a guess. A field that isn't found exactly once is None, see
    `exactly_once`; so a verification that stops at the first error has no step verdicts. Linear in len(text).
    """
    # A heading opens the section of its step, and with it the analysis; the step's verdict closes the analysis.
    step = None  # whose section it is
    in_analysis = False
    step_verdicts: list[tuple[int, bool]] = []  # (number of the step, its verdict)
    verdicts: list[bool] = []
    # Without thinking, emphasis and capitals.
    lines = readable_lines(text)
    for number, line in enumerate(lines, 1):
        is_last = number == len(lines)
        if match := HEADING.match(line):
            step = int(match.group(1))
            if match.group(2) not in (None, f"/{num_steps}"):
                step = 0  # no step has this number, so a verdict here leaves all steps unparsed
            in_analysis = True
        elif match := STEP_VERDICT.fullmatch(line):
            if step is not None:  # before the first heading, a verdict belongs to no step
                step_verdicts.append((step, match.group(1) == "correct"))
                in_analysis = False
        elif (match := VERDICT.fullmatch(line)) and (is_last or not in_analysis):
            # Inside an analysis it would be a quotation; but the last line counts even if its section has no verdict.
            verdicts.append(match.group(1) == "yes")
    return exactly_once(step_verdicts, verdicts, num_steps)


def exactly_once(step_verdicts: list[tuple[int, bool]], verdicts: list[bool], num_steps: int) -> Verification:
    """The rule of every parser: a field counts if it was found exactly once; one may be None without the other.

    step_verdicts: all (step, verdict) pairs in the order of the text; verdicts: all final verdicts. For two steps:

        (1, True) (2, False)              [True, False]
        (2, False) (1, True)              [True, False]    the order does not matter
        (1, True)                         None             a step is missing
        (1, True) (2, False) (2, True)    None             which of the two?
        (1, True) (2, False) (3, True)    None             the solution has no third step
    """
    in_order = sorted(step_verdicts)
    one_for_each = [step for step, _ in in_order] == list(range(1, num_steps + 1))
    return Verification(
        step_verdicts=[verdict for _, verdict in in_order] if one_for_each else None,
        verdict=verdicts[0] if len(verdicts) == 1 else None,
    )


# --------------------------------------------------------------------------- votes


@dataclass(frozen=True)
class Label:
    """What the verifications of one solution amount to."""

    step_labels: list[bool] | None  # None only if nothing voted
    outcome: bool | None
    text: str | int | None  # a real verification, unchanged, or its place in the file; None if dropped
    votes: list[list[int]]  # per step: [correct, incorrect]
    dropped: str | None  # None, or the reason
    ties: int = 0  # tied votes among the steps and the outcome


NO_VOTES = Label(None, None, None, [], dropped="no_votes")  # nothing was parsed


def keep_parsed(verifications: list[dict]) -> list[dict]:
    """The verifications that vote: those with both fields parsed. A half-parsed one doesn't vote: it may have
    miscounted the steps, and couldn't be the training text."""
    return [v for v in verifications if v["step_verdicts"] is not None and v["verdict"] is not None]


def majority(votes: list[bool]) -> bool:
    """True if more votes say correct than incorrect."""
    correct = sum(votes)
    incorrect = len(votes) - correct
    return correct > incorrect  # a tie is incorrect: what half of the judges doubt should not be rewarded


def is_tie(votes: list[bool]) -> bool:
    """Are there as many votes for correct as for incorrect?"""
    return 2 * sum(votes) == len(votes)


def votes_by_step(voters: list[dict]) -> list[tuple[bool, ...]]:
    """The votes on each step. Three voters on two steps: [T, F], [T, T], [F, F] -> (T, T, F), (F, T, F)."""
    return list(zip(*(voter["step_verdicts"] for voter in voters), strict=True))


def count_votes(voters: list[dict]) -> list[list[int]]:
    """[correct, incorrect] for each step."""
    return [[sum(votes), len(votes) - sum(votes)] for votes in votes_by_step(voters)]


def single(verifications: list[dict], rng: random.Random) -> Label:
    """The label of the first parsed verification. rng is unused; all methods have the same signature."""
    voters = keep_parsed(verifications)
    if not voters:
        return NO_VOTES
    first = voters[0]
    return Label(first["step_verdicts"], first["verdict"], first["text"], count_votes([first]), dropped=None)


def outcome_consistency(verifications: list[dict], rng: random.Random) -> Label:
    """A vote on the outcome alone: the step labels are those of the chosen text."""
    voters = keep_parsed(verifications)
    if not voters:
        return NO_VOTES
    verdicts = [voter["verdict"] for voter in voters]
    outcome = majority(verdicts)
    chosen = rng.choice([voter for voter in voters if voter["verdict"] == outcome])
    ties = int(is_tie(verdicts))  # only the outcome is put to the vote
    return Label(chosen["step_verdicts"], outcome, chosen["text"], count_votes(voters), dropped=None, ties=ties)


def step_consistency(verifications: list[dict], rng: random.Random) -> Label:
    """label_i = majority of the verdicts on step i, outcome = majority of the final verdicts."""
    voters = keep_parsed(verifications)
    if not voters:
        return NO_VOTES

    # 1. Each step is put to the vote on its own, and so is the outcome.
    steps = votes_by_step(voters)
    verdicts = [voter["verdict"] for voter in voters]
    step_labels = [majority(votes) for votes in steps]
    outcome = majority(verdicts)
    ties = sum(is_tie(votes) for votes in [*steps, verdicts])
    votes = count_votes(voters)

    # 2. Each majority has its own voters, so possibly no verification agrees with every majority. Then the solution is
    #    dropped, even for kinds of reward models that don't train on the text: a text put together from several, or one
    #    that contradicts its labels, would teach errors.
    matching = [voter for voter in voters if voter["step_verdicts"] == step_labels and voter["verdict"] == outcome]
    if not matching:
        return Label(step_labels, outcome, None, votes, "no_match", ties)
    return Label(step_labels, outcome, rng.choice(matching)["text"], votes, None, ties)


class Method(NamedTuple):
    """How labels are made."""

    aggregate: Callable[[list[dict], random.Random], Label]
    needs_critique: bool = False  # the chosen verification is criticised, then merged with its critique
    reads_answers: bool = False  # the verifier is shown the reference answer


METHODS = {
    "single": Method(single),
    "outcome_consistency": Method(outcome_consistency),
    "step_consistency": Method(step_consistency),
    "meta_critique": Method(single, needs_critique=True),
    "hybrid": Method(step_consistency, needs_critique=True),
    "hybrid_outcome": Method(outcome_consistency, needs_critique=True),
    "reference_guided": Method(single, reads_answers=True),
}
# The ways of voting alone, which the label report compares.
AGGREGATES = {
    name: method.aggregate for name, method in METHODS.items() if not method.needs_critique and not method.reads_answers
}


def label_solutions(solutions: list[dict], verifications: list[dict], aggregate: Callable, seed: int) -> list[Label]:
    """A label per solution, in order."""
    labels = []
    for solution_id, group in group_by_solution(solutions, verifications).items():
        # The choice of a text is seeded by the solution's id: it does not depend on which other solutions there are.
        rng = random.Random(f"{seed}/{solution_id}")
        labels.append(aggregate(group, rng))
    return labels


# --------------------------------------------------------------------------- when the votes are settled (--stop)

Vote = tuple[bool, ...] | None  # a verification's step verdicts, then its verdict; None if it is unparsed


def vote_of(verification: dict) -> Vote:
    """What a verification votes."""
    if not keep_parsed([verification]):
        return None
    return (*verification["step_verdicts"], verification["verdict"])


def fewest_to_settle(votes: list[Vote], total: int) -> int:
    """How many further votes, at least, until the `total` votes of a solution can no longer change a label; 0: now.

    A column is a step, or the outcome. Of its votes c say correct, w incorrect, and R are left. It is settled as
    correct if c > w + R and as incorrect if w >= c + R, since a tie is incorrect. m further votes that agree also
    reduce R by m, which makes 2m > w + R - c, or 2m >= c + R - w. With c = 6, w = 2, R = 8: 3, since 9 > 2 + 5, but not
    8 > 2 + 6.
    """
    left = total - len(votes)
    parsed = [vote for vote in votes if vote is not None]
    if not parsed:
        return math.ceil(left / 2)  # the columns are still empty: w >= c + R as above
    fewest = 0
    for column in zip(*parsed, strict=True):
        correct = sum(column)
        incorrect = len(column) - correct
        until_correct = (incorrect + left - correct) // 2 + 1
        until_incorrect = math.ceil((correct + left - incorrect) / 2)
        fewest = max(fewest, min(until_correct, until_incorrect))
    return fewest


def fewest_to_lead(votes: list[Vote], total: int, lead: int) -> int:
    """The same for `--stop lead`: after 4, 6, 8, ... votes, stop if every column is ahead by `lead`. That may be
    wrong."""
    parsed = [vote for vote in votes if vote is not None]
    looked_at = len(votes) >= 4 and len(votes) % 2 == 0
    margins = [abs(2 * sum(column) - len(column)) for column in zip(*parsed, strict=True)]
    if looked_at and parsed and min(margins) >= lead:
        return 0
    next_look = max(4, len(votes) + 2 - len(votes) % 2)
    return min(next_look, total) - len(votes)


def fewest_further_votes(votes: list[Vote], args: argparse.Namespace) -> int:
    """How many votes a solution needs at least beside these, by the rule of --stop; 0: it stops here."""
    if args.stop == "settled":
        return fewest_to_settle(votes, args.num_verifications)
    if args.stop == "lead":
        return fewest_to_lead(votes, args.num_verifications, args.lead)
    return args.num_verifications - len(votes)


# --------------------------------------------------------------------------- sampling verifications


def hash_solution(solution: dict) -> str:
    """A fingerprint of what a verifier sees of a solution."""
    return records.hash_text(json.dumps([solution["problem"], solution["steps"], solution["answer"]]))


def find_unverified(
    solutions: list[dict], args: argparse.Namespace, output: records.RecordFile
) -> tuple[list[dict], list[list[Vote]]]:
    """(the solutions that lack some of their verifications, the votes that each of them has up to the first that is
    missing). Under `--stop all` nobody looks at the votes, and there are none. A collective. Raises InputError as
    `read_verifications`, before anything is sampled."""
    # Without steps there is nothing to judge: no verifications, and the label is no_votes.
    with_steps = [solution for solution in solutions if solution["steps"]]
    keys = ([(solution["id"], j) for j in range(args.num_verifications)] for solution in with_steps)
    unverified = [with_steps[i] for i in output.find_missing(keys)]
    votes: list[list[Vote]] = [[] for _ in unverified]
    if not unverified or not output.was_there:
        return unverified, votes
    if distributed.rank() == 0:
        groups = group_by_solution(solutions, read_verifications(output.path, solutions))
        if args.stop != "all":
            for solution, so_far in zip(unverified, votes, strict=True):
                first = enumerate(groups[solution["id"]][: args.num_verifications])
                so_far += [vote_of(v) for number, v in first if v["sample"] == number]
    return unverified, distributed.broadcast(votes)


def hash_prompt(args: argparse.Namespace) -> str:
    """A fingerprint of the prompt apart from the solution: verifications that were asked for otherwise don't vote
    together."""
    solution = {"problem": "problem", "steps": ["step"], "answer": "answer"}
    reference = "reference" if METHODS[args.method].reads_answers else None
    return records.hash_text(verification_prompt(solution, args.worked_examples, reference))


def verify_solutions(
    args: argparse.Namespace,
    engine: Engine,
    todo: list[dict],
    votes: list[list[Vote]],
    references: dict[str, str],
    output: records.RecordFile,
) -> None:
    """Sample and write the verifications of these solutions. votes: those they have, which this function continues.
    references: solution id -> reference answer, if used."""
    # 1. The prompts. One that is too long for the context is left out; the solution's label is then no_votes.
    turns = [verification_prompt(s, args.worked_examples, references.get(s["id"])) for s in todo]
    prompts, limits = engine.fit_prompts(turns, args.max_new_tokens, "verify", resumed=output.was_there)

    def needed(i: int) -> int:
        """The fewest votes that solution i lacks, whatever they say; 0: it is settled."""
        return fewest_further_votes(votes[i], args) if limits[i] is not None else 0

    def settings(asked: list[int], counts: list[int]) -> dict:
        """The sampler's settings, for so many votes on each of these solutions."""
        return {
            "prompts": [prompts[i] for i in asked],
            "keys": [todo[i]["id"] for i in asked],
            "num_samples": counts,
            "first_samples": [len(votes[i]) for i in asked],
            "max_new_tokens": [limits[i] for i in asked],
            "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "seed": args.seed,
        }  # fmt: skip

    # 2. The votes that each solution needs in any case; by default these are all. `settled` asks for a majority, which
    #    a correct step needs: votes that are asked for together share their prompt. Where no step is correct the last
    #    one may be superfluous, and is thrown away.
    at_least = args.num_verifications // 2 + 1 if args.stop == "settled" else 0
    unsettled = [i for i in range(len(todo)) if needed(i) > 0]
    counts = [max(needed(i), at_least - len(votes[i])) for i in unsettled]
    stream = sample_from_queue(engine, title="verify", queue="verifications", **settings(unsettled, counts))
    mine = []  # this rank's
    for place, samples in stream:
        i = unsettled[place]
        verifications = []
        for sample in samples:
            if needed(i) == 0:
                break
            verifications.append(make_verification(engine, todo[i], prompts[i], sample, len(votes[i])))
            votes[i].append(vote_of(verifications[-1]))
        output.append(verifications)
        mine.append(i)

    # 3. Further votes, each as soon as no stop can make it superfluous. They end in any order, which doesn't matter:
    #    the rules of --stop only count.
    unsettled = [i for i in mine if needed(i) > 0]
    if not unsettled:
        return
    numbers = [len(votes[i]) for i in unsettled]  # of each one's next verification
    further: list[dict[int, dict]] = [{} for _ in unsettled]  # its further verifications by number

    def count_vote(place: int, number: int, sample: Sample) -> int:
        """How many more votes the solution needs at least, now that this one is known."""
        i = unsettled[place]
        verification = make_verification(engine, todo[i], prompts[i], sample, numbers[place] + number)
        further[place][number] = verification
        votes[i].append(vote_of(verification))
        return needed(i)

    counts = [needed(i) for i in unsettled]
    stream = engine.stream(further=count_vote, **settings(unsettled, counts))
    for place, _ in with_progress(stream, engine.sampler, "verify further", len(unsettled), 1):
        output.append([further[place][number] for number in sorted(further[place])])


def make_verification(engine: Engine, solution: dict, prompt: list[int], sample: Sample, number: int) -> dict:
    """The record of a sample, the verification of this number."""
    text = engine.text(sample.ids, prompt)
    parsed = parse_verification(text, len(solution["steps"]))
    return {
        "id": f"{solution['id']}/{number}",
        "solution_id": solution["id"],
        "sample": number,
        "text": text,
        "step_verdicts": parsed.step_verdicts,
        "verdict": parsed.verdict,
        "finish": sample.finish,
        "tokens": len(sample.ids),
        "solution_sha256": hash_solution(solution),
    }


# --------------------------------------------------------------------------- reading verifications


def read_verifications(path: str | Path, solutions: list[dict]) -> list[records.StoredVerification]:
    """The verifications of these solutions, without texts. Raises InputError for one of another solution of their
    id."""
    num_steps = {solution["id"]: len(solution["steps"]) for solution in solutions}
    digests = {solution["id"]: hash_solution(solution) for solution in solutions if "problem" in solution}
    optional = ("step_verdicts", "verdict", "tokens")
    shared: dict = {}
    verifications = []
    for line in records.scan(path, ["solution_id", "sample", "text"], "python verify.py", optional):
        solution_id = line.value["solution_id"]
        if solution_id in num_steps:  # not from before a smaller --limit
            judged = line.value.get("solution_sha256")  # None where another engine left it out
            if judged is not None and judged != digests.get(solution_id, judged):
                raise InputError(f"{path}: {solution_id} was another solution when it was judged; judge it anew")
            record = complete_verification(line.value, num_steps[solution_id])
            verifications.append(records.store_verification(record, line.start, shared))  # texts wouldn't fit in memory
    return verifications


def chosen_text(label: Label, verifications: BinaryIO) -> str | None:
    """The text of a label: read from the file of verifications if the label has only its place."""
    if isinstance(label.text, int):
        return records.read_at(verifications, label.text)["text"]
    return label.text


def complete_verification(verification: dict, num_steps: int) -> dict:
    """Add what a verification of another engine may lack: it needs only solution_id, sample and text."""
    missing = {"id": f"{verification['solution_id']}/{verification['sample']}", "tokens": 0}
    if "step_verdicts" not in verification or "verdict" not in verification:
        missing |= asdict(parse_verification(verification["text"], num_steps))
    return missing | verification


# --------------------------------------------------------------------------- critique and merge

CRITIQUE_PROMPT = """Below are a problem, a student's solution and somebody's verification of it. Criticise the verification: look for errors of the student that it missed, for correct steps that it calls incorrect, for right verdicts with a wrong reason, and for a final verdict at odds with its steps. Go through the sections in order and say of each whether it judged rightly, and why.

Problem: {problem}

Student Solution: {solution}

Verification: {verification}"""

MERGE_PROMPT = """Below are a problem, a student's solution, a verification of it and a critique of that verification. Write one corrected verification, as if done in one go, in the same form: for each step a section "## Step k: <short title>" with your analysis and, alone on a line, **This step is correct.** or **This step is incorrect.**, and one final line **Verification: Is the answer correct (Yes/No)? Yes** or the same with No.

Problem: {problem}

Student Solution: {solution}

Verification: {verification}

Critique: {critique}"""


def critique_prompt(solution: dict, verification: str, critique: str | None = None) -> str:
    """The user turn that asks for a critique of a verification or, given the critique, for the merge of both."""
    template = CRITIQUE_PROMPT if critique is None else MERGE_PROMPT
    return template.format(
        problem=solution["problem"],
        solution=render_steps(solution["steps"], solution["answer"]),
        verification=without_thinking(verification),
        critique=without_thinking(critique or ""),
    )


def merged_label(base: Label, merged: str | None, num_steps: int) -> Label:
    """The label that a merged verification gives in place of its base's. If there is no merge (None), or it does not
    parse, the solution is dropped, and the base's labels stand without a text."""
    if base.dropped:
        return base  # there was no text to criticise
    if merged is None:
        # A prompt left no space for the output, or the critique did not get beyond its thinking.
        return replace(base, text=None, dropped="too_long")
    parsed = parse_verification(merged, num_steps)
    if parsed.step_verdicts is None or parsed.verdict is None:
        return replace(base, text=None, dropped="unparsed_merge")
    return Label(parsed.step_verdicts, parsed.verdict, merged, count_votes([asdict(parsed)]), dropped=None)


class Reply(NamedTuple):
    """A reply to a critique or merge prompt. text is None if the model was not asked."""

    text: str | None = None
    tokens: int = 0


def ask(args: argparse.Namespace, engine: Engine, call: str, turns: dict[str, str]) -> defaultdict[str, Reply]:
    """The reply to the user turn of each solution, by its id; those that are too long for the context are not asked.
    call: "critique 1" or the like, so that two calls about a solution don't share random numbers."""
    prompts = {}
    limits = []
    for solution_id, turn in turns.items():
        prompt = engine.encode(turn)
        limit = engine.output_limit(prompt, args.max_new_tokens)
        if limit is not None:
            prompts[solution_id] = prompt
            limits.append(limit)
    groups = engine.sample(
        list(prompts.values()),
        keys=[f"{solution_id}/{call}" for solution_id in prompts],
        temperature=args.critique_temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=limits,
        seed=args.seed,
    )
    replies = defaultdict(Reply)
    for (solution_id, prompt), (sample,) in zip(prompts.items(), groups, strict=True):
        replies[solution_id] = Reply(engine.text(sample.ids, prompt), len(sample.ids))
    return replies


def critique_and_merge(
    args: argparse.Namespace, engine: Engine, number: int, judged: list[tuple[dict, str]]
) -> Iterator[tuple[str, tuple[Reply, Reply]]]:
    """Yield (solution id, (critique, merge)) for each solution with its verification. number: of the round."""
    size = 4 * (args.slots or CPU_SLOTS)  # work lost if the run is killed
    for start in range(0, len(judged), size):
        chunk = judged[start : start + size]

        # 1. A critique of each verification.
        turns = {solution["id"]: critique_prompt(solution, text) for solution, text in chunk}
        critiques = ask(args, engine, f"critique {number}", turns)

        # 2. A merge of each verification with its critique; none if the critique is nothing but thinking.
        turns = {}
        for solution, text in chunk:
            critique = critiques[solution["id"]].text
            if critique is not None and without_thinking(critique):
                turns[solution["id"]] = critique_prompt(solution, text, critique)
        merges = ask(args, engine, f"merge {number}", turns)

        for solution, _ in chunk:
            yield solution["id"], (critiques[solution["id"]], merges[solution["id"]])


def hash_judged(solution: dict, text: str) -> str:
    """Fingerprint of a solution and the verification of it that is criticised."""
    return records.hash_text(hash_solution(solution) + text)


def sample_critiques(
    args: argparse.Namespace, engine: Engine, number: int, judged: list[tuple[dict, str]], output: records.RecordFile
) -> None:
    """Append a record to critiques.jsonl for each solution with its verification. number: of the round."""
    digests = {solution["id"]: hash_judged(solution, text) for solution, text in judged}
    stream = critique_and_merge(args, engine, number, judged)
    stream = with_progress(stream, engine.sampler, f"critique {number}", len(judged), num_samples=2)
    for solution_id, (critique, merge) in stream:
        record = {"id": solution_id, "method": args.method, "num_verifications": args.num_verifications}
        record |= {"round": number, "critique": critique.text, "merged": merge.text}
        record["tokens"] = critique.tokens + merge.tokens
        record["judged_sha256"] = digests[solution_id]
        output.append([record])


# What names a record of critiques.jsonl; N, because the choice of the text depends on it.
CRITIQUE_KEY = ("id", "method", "num_verifications", "round")


def improve_labels(
    args: argparse.Namespace,
    solutions: list[dict],
    labels: list[Label],
    verifications: Path,
    engine: Engine | None,
    device: torch.device,
) -> list[Label]:
    """The labels that the merges give after --critique_rounds, each a critique of what the round before left of a
    label's text, and a merge. What critiques.jsonl lacks is sampled, by each rank its share. A collective.

    verifications: the file that has the texts. engine: opened if it is None and needed.
    """
    mine = distributed.my_part(list(zip(solutions, labels, strict=True)))
    improved = [label for _, label in mine]
    my_ids = {solution["id"] for solution, _ in mine}
    output = records.RecordFile(
        Path(args.out) / "critiques.jsonl",
        args,
        MAY_CHANGE_ON_RESUME - {"critique_temperature"},
        CRITIQUE_KEY,
        remembered_field=("merged", "judged_sha256"),
        other_fields=("critique", "merged"),
        is_mine=lambda record: record["id"] in my_ids,
    )
    with output, open(verifications, "rb") as texts_file:
        for number in range(1, args.critique_rounds + 1):
            # 1. The texts of this round. A dropped label has none, so a merge that does not parse ends the rounds.
            todo = []
            for (solution, _), label in zip(mine, improved, strict=True):
                if label.text is None:
                    continue
                key = (solution["id"], args.method, args.num_verifications, number)
                text = chosen_text(label, texts_file)
                if key not in output.done:
                    todo.append((solution, text))
                elif output.done[key][1] not in (None, hash_judged(solution, text)):  # None: an older run wrote it
                    raise InputError(f"{output.path}: another text of {solution['id']} was criticised; remove the file")

            # 2. Two calls for each.
            if todo:
                prompts = records.hash_text(CRITIQUE_PROMPT + MERGE_PROMPT)
                output.check_made_with(model_sha256=records.hash_model(find_model(args.model)), prompt_sha256=prompts)
                if engine is None:
                    engine = open_engine(args.model, device, args.slots, thinking=not args.no_thinking)
                sample_critiques(args, engine, number, todo, output)

            # 3. The labels of the merges.
            for i, (solution, label) in enumerate(mine):
                if improved[i].dropped is None:
                    merged, _ = output.done[solution["id"], args.method, args.num_verifications, number]
                    improved[i] = merged_label(label, merged, len(solution["steps"]))
    return distributed.gather(improved)


def count_critique_tokens(args: argparse.Namespace, solutions: list[dict]) -> int:
    """The tokens of the critiques and merges that the labels of these solutions cost."""
    path = Path(args.out) / "critiques.jsonl"
    if not path.exists():
        return 0  # there was no text to criticise
    solution_ids = {solution["id"] for solution in solutions}
    tokens = 0
    for line in records.scan(path, [*CRITIQUE_KEY, "tokens"]):
        record = line.value
        if record["id"] not in solution_ids or record["round"] > args.critique_rounds:
            continue
        if record["method"] == args.method and record["num_verifications"] == args.num_verifications:
            tokens += record["tokens"]
    return tokens


# --------------------------------------------------------------------------- main


def labels_path(args: argparse.Namespace) -> Path:
    """The file of labels."""
    return Path(args.out) / f"labels_{args.method}.jsonl"


def write_labels(args: argparse.Namespace, solutions: list[dict], labels: list[Label], verifications: Path) -> None:
    """Write labels_<method>.jsonl. verifications: the file that has the labels' texts."""

    def lines(texts_file: BinaryIO) -> Iterator[dict]:
        for solution, label in zip(solutions, labels, strict=True):
            judged = {field: solution[field] for field in JUDGED_FIELDS}
            yield judged | {"method": args.method} | asdict(label) | {"text": chosen_text(label, texts_file)}

    with open(verifications, "rb") as texts_file:
        records.write_records(labels_path(args), lines(texts_file), args)


def describe_labels(labels: list[Label], verifications: list[dict]) -> dict:
    """The numbers of report.json that follow from the records alone."""
    kept = [label for label in labels if label.dropped is None]
    return {
        "solutions": len(labels),
        "kept": len(kept),
        "yield": len(kept) / len(labels),
        "dropped": dict(Counter(label.dropped for label in labels if label.dropped)),
        "ties": sum(label.ties for label in labels),
        "outcome_yes": sum(label.outcome for label in kept) / max(len(kept), 1),
        "verifications": len(verifications),
        "unparsed": len(verifications) - len(keep_parsed(verifications)),
        "tokens": sum(v["tokens"] for v in verifications),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises InputError for flags that don't go together."""
    parser = records.new_parser(__doc__)
    parser.add_argument("--model", help="verifier: a directory or hub name; none: the tiny world")
    parser.add_argument("--solutions", help="solutions.jsonl of generate.py, or a file like it")
    parser.add_argument("--out", help="directory for verifications, critiques, labels and report")
    parser.add_argument("--answers", help="JSON Lines with id and answer, for reference_guided")
    parser.add_argument("--limit", type=POSITIVE, help="use only the first N solutions")
    parser.add_argument("--method", default="step_consistency", choices=METHODS)
    parser.add_argument("--critique_rounds", type=COUNT, default=1, help="of critique and merge")
    parser.add_argument("--critique_temperature", type=TEMPERATURE, default=0.0, help="0, greedy, may loop in thinking")
    parser.add_argument("--num_verifications", type=COUNT, help="N, per solution; default: 16 for a vote, otherwise 1")
    parser.add_argument("--stop", default="all", choices=["all", "settled", "lead"], help="sample N verifications, or "
                        "stop when the rest can't change a label, or when all labels are ahead by --lead")  # fmt: skip
    parser.add_argument("--lead", type=COUNT, default=3, help="votes, for --stop lead")
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    parser.add_argument("--top_p", type=TOP_P, default=0.95)
    parser.add_argument("--top_k", type=WHOLE, default=0, help="sample from the k likeliest tokens; 0: from all")
    parser.add_argument("--no_thinking", action="store_true", help="turn off thinking in a chat template that has it")
    parser.add_argument("--max_new_tokens", type=POSITIVE, default=8192, help="per verification, thinking included")
    parser.add_argument("--worked_examples", type=int, default=2, choices=[0, 1, 2], help="examples in the prompt")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--slots", type=COUNT, help="samples at a time; default: by the GPU's memory, on a CPU 128")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    args = records.parse_args(parser, TINY, "model", "solutions", "out")
    if args.num_verifications is None:
        args.num_verifications = 1 if METHODS[args.method].aggregate is single else 16
    if METHODS[args.method].reads_answers != (args.answers is not None):
        raise InputError("--method reference_guided needs --answers, and no other method reads them")
    if args.stop != "all" and args.method != "step_consistency":
        raise InputError(f"--stop {args.stop} decides by the votes of --method step_consistency, not of {args.method}")
    return args


def main() -> None:
    args = parse_arguments()
    method = METHODS[args.method]
    device = distributed.init_distributed(args.device)
    started = time.time()

    # 1. Read the solutions, and reference answers for the one method that may see them.
    records.check_output(args.out, args)
    records.check_output(labels_path(args), args)
    records.check_output(Path(args.out) / "report.json", args, signature=b'{\n  "method"')
    solutions = records.read(args.solutions, JUDGED_FIELDS, "python generate.py", only=True)[: args.limit]
    if not any(solution["steps"] for solution in solutions):
        raise InputError(f"{args.solutions}: no solution has steps, so there is nothing to judge")
    references = {}
    if method.reads_answers:
        references = records.read_references(args.answers, solutions)
        args.answers_sha256 = records.hash_file(args.answers)

    # 2. Sample the verifications that are missing. Those made with the answer in sight go to a separate file, which no
    #    other method reads. The model is loaded only if needed: other labels from the same verifications take seconds.
    path = Path(args.out) / "verifications.jsonl"
    if method.reads_answers:
        path = Path(args.out) / "verifications_reference.jsonl"
    engine = None
    key = ("solution_id", "sample")
    with records.RecordFile(path, args, MAY_CHANGE_ON_RESUME, key, other_fields=("text",)) as output:
        unverified, votes = find_unverified(solutions, args, output)
        if any(fewest_further_votes(so_far, args) > 0 for so_far in votes):
            model = records.hash_model(find_model(args.model))
            output.check_made_with(model_sha256=model, prompt_sha256=hash_prompt(args))
            engine = open_engine(args.model, device, args.slots, thinking=not args.no_thinking)
            verify_solutions(args, engine, unverified, votes, references, output)
    speed = {}
    if engine is not None:  # this run sampled; critiques are left out, because short batches are slower
        sampled = distributed.sum_over_ranks(engine.sampler.tokens)[0]
        seconds = distributed.max_over_ranks(time.time() - started)
        speed["tokens_per_second"] = distributed.per_second(sampled, seconds)

    # 3. Turn the verifications into labels. Rank 0 does so; the others stay for critiques, to sample their share.
    if distributed.rank() != 0 and not method.needs_critique:
        return
    verifications, labels = [], []
    if distributed.rank() == 0:
        # The first N of each solution vote: a run with a larger N may have left more.
        stored = read_verifications(path, solutions)
        verifications = [v for v in stored if v["sample"] < args.num_verifications]
        labels = label_solutions(solutions, verifications, method.aggregate, args.seed)
    if method.needs_critique:
        labels = improve_labels(args, solutions, distributed.broadcast(labels), path, engine, device)
    if distributed.rank() != 0:
        return

    # 4. Write the labels, and what they cost.
    write_labels(args, solutions, labels, path)
    report = {"method": args.method, **describe_labels(labels, verifications)}
    report["critique_tokens"] = count_critique_tokens(args, solutions) if method.needs_critique else 0
    report |= {**speed, "seconds": round(time.time() - started, 1)}
    records.write_json(Path(args.out) / "report.json", report)
    shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in report.items()}
    distributed.log(" | ".join(f"{key} {value}" for key, value in shown.items()))


if __name__ == "__main__":
    distributed.run_stage(main)
