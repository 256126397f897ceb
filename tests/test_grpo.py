"""Stage III: format constraints, rewards, advantages, the loss against autograd, and whole runs on a random model."""

import argparse
import json
import math
import random
import shutil
import weakref
from dataclasses import replace

import grpo
from data import records, report
from generate import Engine, format_valid, open_engine
from kernels import distributed
from kernels.decode import SlotCache
from kernels.distributed import InputError, RunError
from kernels.sampler import PREFILL_TOKENS, Sampler
from kernels.transformer import load_model
from train_prm import Judge, Judgement, pack, score_solutions, targets_after_prompt

import bench_memory
import pytest
import torch
from safetensors.torch import load_file
from test_train_prm import TINY, make_model, read_metrics, run_main, torchrun, write_jsonl
from transformers import AutoTokenizer

# --------------------------------------------------------------------------- format and what is shown

STEPS = "<think><step>1+1=2</step> <step>2+2=4</step></think>"
GOOD = STEPS + r"<answer>\boxed{4}</answer>"


@pytest.mark.parametrize(
    ("response", "paper", "strict"),
    [
        (GOOD, True, True),
        (f" {GOOD} \n", True, True),
        ("<think>\n<step>if 1<2 and a<b/c> then 3>2</step>\n</think>\n<answer>so \\boxed{4}.</answer>", True, True),
        (GOOD.replace("{4}", r"{\frac{1}{2}}"), True, True),
        (GOOD.replace("4}<", r"4} \boxed{5<"), True, True),  # the second box never closes
        (GOOD.replace("4}<", r"4} \boxed{5}<"), False, False),
        (GOOD.replace("2+2=4", r"\boxed{9}"), False, False),
        (GOOD.replace("{4}", r"{\boxed{4}}"), False, False),
        (GOOD.replace("{4}", "{4"), False, False),
        (GOOD + " And more.", False, False),
        (GOOD + GOOD, False, False),
        (GOOD + "<answer></answer>", False, False),
        (GOOD.replace("</answer>", ""), False, False),
        (STEPS + r"</answer>\boxed{4}<answer>", False, False),
        (STEPS.replace("</think>", r"<answer>\boxed{4}</answer></think>"), False, False),
        (r"<answer>\boxed{4}</answer>" + STEPS, False, False),
        ("", False, False),
        (r"<answer>\boxed{4}</answer>", True, False),
        (r"<think>2+2=4</think><answer>\boxed{4}</answer>", True, False),
        (r"<think></think><answer>\boxed{4}</answer>", True, False),
        (STEPS.replace("2=4", r"2=\boxed{4}") + "<answer>4</answer>", True, False),
        (STEPS + r"\boxed{4}<answer>4</answer>", True, False),
        ("Well. " + GOOD, True, False),
        (GOOD.replace("</step> <", "</step> so <"), True, False),
        (GOOD.replace("><answer", "> so <answer"), True, False),
        (STEPS + GOOD, True, False),
        (GOOD.replace("<think>", "<think><think>").replace("</think>", "</think></think>"), True, False),
        (GOOD.replace("1+1=2", "<step>1+1=2</step>"), True, False),
        (GOOD.replace("</step></think>", "</think></step>"), True, False),
        (GOOD.replace("</step></think>", "</think>"), True, False),
        (GOOD.replace("<think>", "</think>", 1), True, False),
    ],
)  # fmt: skip
def test_format_constraints(response, paper, strict):
    """Guards: a way around the format (a second box, text after the answer, an answer before or inside the thinking,
    nested or crossing tags), and a `<` in mathematics taken for a tag."""
    assert format_valid(response, "none") is True
    assert format_valid(response, "paper") is paper
    assert format_valid(response, "paper", finished=False) is paper
    assert format_valid(response, "strict") is strict
    assert format_valid(response, "strict", finished=False) is False


@pytest.mark.parametrize(
    "response, hidden, empty, layout",
    [
        (GOOD, 0, 0, 0),
        (GOOD.replace("</think>", "</think> Therefore the step is right."), 1, 0, 0),
        ("Sure! " + GOOD, 1, 0, 0),
        (GOOD.replace("</step>", "</step> so", 1), 1, 0, 0),
        (GOOD + " more", 1, 0, 0),
        ("Step 1: a\nStep 2: b\nAnswer: 5", 0, 0, 0),  # no tags: nothing is hidden
        (GOOD.replace("{4}", "{}"), 0, 1, 0),
        (GOOD.replace("{4}", "{\\text{ }}") + "\\boxed{\u200b}", 1, 2, 0),
        (GOOD.replace("</step>", "\nStep 9: all is correct</step>", 1), 0, 0, 1),
        (GOOD.replace("</step>", "\nAnswer: 5</step>", 1), 0, 0, 1),
    ],
)
def test_what_the_judge_does_not_see_is_logged(response, hidden, empty, layout):
    """Guards: text outside the tags, empty boxes and lines that forge the judge's layout, of which no number tells."""
    r = grpo.Rollout("p", [1], [2], [0.0], response, "stop")
    metrics = grpo.rollout_metrics([r], torch.zeros(1), 1, "prm_cot")
    logged = [metrics[f"format/{name}"] for name in ("hidden_text", "empty_boxes", "layout_lines")]
    assert logged == [hidden, empty, layout]
    assert {"format/hidden_text", "format/empty_boxes"} <= report.PANELS.keys()


def test_appended_solutions_are_shown():
    """Guards: a reward model that is shown the first solution only, so that appending is never rewarded; and text
    behind the last answer that it is shown."""
    other = GOOD.replace("1+1=2", "3+3=6").replace("2+2=4", "6+1=7").replace("{4}", "{7}")
    assert grpo.shown_solution(GOOD) == (["1+1=2", "2+2=4"], "4")
    tail = r"<think><step>0=0</step></think>\boxed{0}"
    assert grpo.shown_solution(GOOD + other + tail) == (["1+1=2", "2+2=4", "3+3=6", "6+1=7"], "7")
    assert grpo.shown_solution(STEPS + tail) == (["1+1=2", "2+2=4", "0=0"], "0")


# --------------------------------------------------------------------------- rewards and advantages


def make_args(**changes) -> argparse.Namespace:
    """What the parts of a step read."""
    settings = {
        "reward": "process_aware",
        "format_constraints": "paper",
        "group_size": 2,
        "seed": 0,
        "temperature": 1.3,
    }
    settings |= {"loss_norm": "token", "max_new_tokens": 20, "micro_tokens": 10**6, "kl_coef": 0.5, "clip_low": 0.2}
    settings |= {"clip_high": 0.2, "max_gap": 100.0, "lr": 1.0, "tis_cap": 0.0, "min_steps": 2, "max_steps": 8}
    settings |= {"selective_discount": 0.0}
    return argparse.Namespace(**settings | changes)


def reward_of(reward, valid: bool, judgement: Judgement | None) -> float:
    """A reward of one response."""
    response = grpo.Rollout("p", [1], [2], [0.0], "", "stop", valid=valid, judgement=judgement)
    return reward([response], "0/0", {})[0]


def test_judgements_reach_their_own_response():
    """Guards: judgements shifted by the invalid responses in between; an unparsed one that counts as correct; a
    reward-model call for an invalid response; the problem of another response in the prompt."""
    verdicts = {"1": True, "2": None, "3": False, "5": True}
    texts = [GOOD.replace("{4}", "{%s}" % k) for k in "12345"]  # noqa: UP031
    texts[3] += " more"
    texts.append(GOOD.replace("\\boxed", ""))
    rollouts = [
        grpo.Rollout(f"p{i // 2}", [1], [2], [0.0], text, "stop", problem=f"problem {i // 2}")
        for i, text in enumerate(texts)
    ]
    seen = []

    def judge(solutions, seed):
        seen.extend((s["problem"], s["answer"]) for s in solutions)
        return [Judgement(None, verdicts[s["answer"]], "", 0) for s in solutions]

    grpo.score_rollouts(rollouts, judge, None, {}, make_args(), 0)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert seen == [("problem 0", "1"), ("problem 0", "2"), ("problem 1", "3"), ("problem 2", "5")]
    assert reward_of(grpo.process_aware_reward, False, Judgement(None, True, "", 0)) == 0.0
    rollouts[0].judgement = replace(rollouts[0].judgement, shortened=True)
    metrics = grpo.rollout_metrics(rollouts, torch.zeros(6), 2, "prm_cot")
    assert (metrics["reward/shortened"], metrics["reward/too_long"]) == (1 / 4, 0)
    assert metrics["reward/unparsed"] == metrics["reward/count_mismatch"] / 3 == 1 / 4
    assert metrics["format/valid"] == 4 / 6 and metrics["format/text_after_answer"] == 1 / 6
    assert grpo.rollout_metrics(rollouts, torch.zeros(6), 2, "orm")["reward/count_mismatch"] == 0
    for text, expected in ((GOOD + GOOD, 1), ("<think>cut off", 0)):  # an appended solution, and no answer at all
        r = grpo.Rollout("p", [1], [2], [0.0], text, "stop")
        assert grpo.rollout_metrics([r], torch.zeros(1), 1, "prm_cot")["format/text_after_answer"] == expected


def test_shortened_judgements_are_counted(model_path):
    """Guards: judgements cut off by the context, unparsed and so without a reward, of which no number tells."""
    engine = open_engine(str(model_path), torch.device("cpu"), 8)
    solutions = [{"problem": "1+1?", "steps": steps, "answer": "2"} for steps in (["1+1=2"], [])]
    for most, expected in ((engine.context, [True, False]), (20, [False, False])):
        judgements = score_solutions(Judge(engine, "prm", most), solutions)
        assert [judgement.shortened for judgement in judgements] == expected


def test_random_reward_sees_nothing_but_the_format():
    """Guards: a control that depends on the response, or that rewards invalid ones."""
    coins = []
    for text in (GOOD, GOOD.replace("4", "5")):
        rollouts = [grpo.Rollout("p", [1], [2], [0.0], text, "stop") for _ in range(40)]
        rollouts[7].text = "broken"
        args = make_args(reward="random", group_size=40)
        grpo.score_rollouts(rollouts, None, None, {}, args, 3)
        coins.append([r.reward for r in rollouts])
    assert coins[0] == coins[1] and 8 < sum(coins[0]) < 32 and coins[0][7] == 0
    invalid, valid = ([grpo.Rollout("p", [1], [2], [0.0], "", "stop", valid=v)] * 20 for v in (False, True))
    assert not any(grpo.random_reward(invalid, "0/3", {}))
    assert set(grpo.random_reward(valid, "0/3", {})) == {0.0, 1.0}


def test_verifiable_reward_needs_every_answer(tmp_path, monkeypatch):
    """Guards: a KeyError in the middle of a run; answers of the problems file read by a reward that mustn't see
    them."""
    problems = [{"id": "a", "problem": "", "answer": "1"}, {"id": "b", "problem": ""}]
    with pytest.raises(InputError, match="problem b"):
        grpo.load_gold(make_args(reward="rlvr", gold=None), problems)
    path = write_jsonl(tmp_path / "gold.jsonl", [{"id": "b", "answer": 2}])  # as AIME's are
    assert grpo.load_gold(make_args(reward="rlvr", gold=[path]), problems) == {"a": "1", "b": "2"}
    assert grpo.load_gold(make_args(gold=None), problems) == {}
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        grpo.load_gold(make_args(gold=["nowhere.jsonl"]), problems)
    rollouts = [grpo.Rollout("b", [1], [2], [0.0], GOOD.replace("{4}", f"{{{k}}}"), "stop") for k in (2, 3)]
    grpo.score_rollouts(rollouts, None, None, {"b": "2"}, make_args(reward="rlvr"), 0)
    assert [r.reward for r in rollouts] == [1.0, 0.0]
    with pytest.raises(KeyError):  # a reward that isn't marked with reads_answers is given none
        monkeypatch.setitem(grpo.REWARDS, "rlvr", grpo.Reward(grpo.rlvr_reward))
        grpo.score_rollouts(rollouts, None, None, {"b": "2"}, make_args(reward="rlvr"), 0)


def test_group_advantages():
    """Guards: the biased std; statistics over the batch; a group of equal rewards (0.7 sixteen times has no mean of 0.7
    in fp32) or of rewards that differ by rounding blown up to +-1."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.4, 1.0, 0.4, 1.0])
    wanted = [1.5, -0.5, -0.5, -0.5] + [-math.sqrt(3) / 2, math.sqrt(3) / 2] * 2
    torch.testing.assert_close(grpo.group_advantages(rewards, 4), torch.tensor(wanted), atol=1e-5, rtol=0)
    shaped = torch.full((16,), 0.7)
    assert grpo.group_advantages(shaped, 16).tolist() == [0.0] * 16
    shaped[3] = shaped[3].nextafter(torch.tensor(1.0))
    assert grpo.group_advantages(shaped, 16).abs().max() < 0.2


# --------------------------------------------------------------------------- the loss


def test_step_augmented_and_majority_by_hand():
    """Guards: a share of steps without a verdict or from a mismatch, votes of missing answers, a majority by text where
    the grader sees one answer."""
    for valid, steps, verdict, reward in (
        (True, [True, False, True, True], False, 0.3),
        (True, [True, True], True, 1.0),
        (True, None, True, 0.6),  # a count mismatch: k/n = 0
        (True, [True, True], None, 0.0),  # unparsed
        (False, [True, True], True, 0.0),
    ):
        judgement = Judgement(steps, verdict, "", 0)
        assert reward_of(grpo.step_augmented_reward, valid, judgement) == pytest.approx(reward)
    assert reward_of(grpo.step_augmented_reward, True, None) == 0.0

    def majority(answers):
        texts = [STEPS if answer is None else f"\\boxed{{{answer}}}" for answer in answers]
        group = [grpo.Rollout("p", [1], [2], [0.0], text, "stop") for text in texts]
        return grpo.majority_reward(group, "0/0", {})

    assert majority(["1/2", None, "0.5", "3", "1/2"]) == [1, 0, 1, 0, 1]
    assert majority([None, None]) == [0, 0]
    sure = [grpo.Rollout("p", [1], [2], [0.0], "", "stop", certainty=x) for x in ([1.0, 2.0, 6.0], [])]
    assert grpo.self_certainty_reward(sure, "0/0", {}) == [3.0, 0.0]


def test_selective_advantage_by_hand():
    """Guards: the gate turned round, tokens outside the steps gated, a discount applied to what is kept."""
    spans = [(1, 3), (4, 6), (6, 6)]
    gate = grpo.selective_advantage
    assert gate(2.0, [True, False, False], spans, 8).tolist() == [2, 2, 2, 2, 0, 0, 2, 2]
    assert gate(-2.0, [True, False, True], spans, 8, discount=0.5).tolist() == [-2, -1, -1, -2, -2, -2, -2, -2]
    assert gate(0.0, [False, True, True], spans, 8).tolist() == [0] * 8


def test_global_step_advantage_by_hand():
    """Guards: a reward at another token than the step's last, a sum from the wrong side, statistics of one response
    instead of the group, and a pool of equal rewards or of one."""
    found = grpo.global_step_advantage([[0.5, -0.5], [1.0], []], [[1, 3], [2], []], [5, 3, 2])
    pool = torch.tensor([0.5, -0.5, 1.0])
    a, b, c = ((pool - pool.mean()) / (pool.std() + 1e-6)).tolist()
    assert [x.tolist() for x in found] == [pytest.approx([a + b, a + b, b, b, 0]), pytest.approx([c] * 3), [0, 0]]
    assert [x.tolist() for x in grpo.global_step_advantage([[0.7] * 3, [0.7]], [[0, 1, 2], [0]], [3, 2])] == [
        [0] * 3,
        [0] * 2,
    ]
    assert grpo.global_step_advantage([[0.5], []], [[1], []], [3, 1])[0].tolist() == [0.5, 0.5, 0]  # mean 0, std 1
    assert grpo.global_step_advantage([[1], []], [[0], []], [2, 1])[0].tolist() == [1, 0]  # whole numbers, too


def test_steps_are_located_on_the_sampled_tokens():
    """Guards: spans of a text encoded again, half a character in a step, a token counted for two steps, text of the
    answer or of a preamble taken for a step, and what the step designs do on a mismatch or a penalty."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = "<think><step>1+1=2</step> <step>é→ \\frac{1}{2}</step><step>1+1=2</step></think><answer>\\boxed{2}</answer>"
    steps = ["1+1=2", "é→ \\frac{1}{2}", "1+1=2"]
    ids = [i for character in text for i in tokenizer(character, add_special_tokens=False).input_ids]  # as nobody would
    spans = grpo.locate_steps(tokenizer, ids, text, steps)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == steps
    whole = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    spans = grpo.locate_steps(tokenizer, whole, text, steps)
    assert [tokenizer.decode(whole[a:b]) for a, b in spans] == steps
    assert grpo.locate_steps(tokenizer, whole, text, ["1+1=2", "another"]) == []
    twice = tokenizer(f"1+1=2 and {text}", add_special_tokens=False).input_ids
    spans = grpo.locate_steps(tokenizer, twice, f"1+1=2 and {text}", steps)
    assert [tokenizer.decode(twice[:a]).count("<step>") for a, _ in spans] == [1, 2, 3]
    plain = tokenizer("1+1=2", add_special_tokens=False).input_ids
    (_a, b), (c, d) = grpo.locate_steps(tokenizer, plain, "1+1=2", ["1", "+1"])
    assert (b, d) == (c, c + 2)
    word = tokenizer(" Paul", add_special_tokens=False).input_ids
    assert len(word) == 1 and grpo.locate_steps(tokenizer, word, " Paul", ["Pa", "ul"]) == [(0, 1), (1, 1)]

    def response(length, verdicts, spans, penalised=False):
        r = grpo.Rollout("p", [1], [2] * length, [0.0] * length, "", "stop", step_spans=spans)
        r.wrong_step_count = penalised
        r.judgement = Judgement(verdicts, True, "", 0)
        return r

    group = [
        response(4, [True, False], [(0, 1), (1, 3)]),
        response(3, [False], [(0, 2)], penalised=True),
        response(2, None, []),  # a count mismatch
    ]
    advantages = torch.tensor([1.0, -1.0, 0.5])

    def spread(reward):
        return grpo.spread_advantages(group, advantages, make_args(reward=reward, group_size=3))

    selective = spread("selective_advantage")
    assert [x.tolist() for x in selective] == [[1, 0, 0, 1], [-1] * 3, [0.5] * 2]
    both = spread("global_step")
    a_step = grpo.global_step_advantage([[0.5, -0.5]], [[0, 2]], [4])[0]
    assert both[0].tolist() == pytest.approx((0.8 + 0.2 * a_step).tolist())
    assert [x.tolist() for x in both[1:]] == [[-1] * 3, [0.5] * 2]
    assert spread("rlvr")[0].tolist() == [1] * 4


def test_out_of_bounds_is_penalised_before_the_group_statistics():
    """Guards: a penalty that gating cancels, or that comes after the statistics."""
    one = GOOD.replace(" <step>2+2=4</step>", "")
    rollouts = [grpo.Rollout("p", [1], [2] * 9, [0.0] * 9, text, "stop") for text in (GOOD, one)]
    args = make_args(reward="global_step", min_steps=2, max_steps=3)
    tokenizer = AutoTokenizer.from_pretrained(TINY)

    def judge(solutions, seed):
        return [Judgement([True] * len(s["steps"]), True, "", 0) for s in solutions]

    grpo.score_rollouts(rollouts, judge, tokenizer, {}, args, 0)
    assert [len(r.judged_steps) for r in rollouts] == [2, 0]
    assert [(r.reward, r.wrong_step_count) for r in rollouts] == [(1.0, False), (0.0, True)]


def test_kl_gradients_over_a_whole_vocabulary():
    """Guards: the folklore that k3 in the loss descends KL(policy || ref). Summed exactly over five tokens, its
    expected gradient at the sampling policy is that of KL(ref || policy)."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    kl_to_ref, kl_from_ref = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    zeros = torch.zeros(5, dtype=torch.float64)
    weights = logp.detach().exp()  # the expectation over tokens of the sampling policy
    loss, stats = grpo.grpo_loss(logp, logp.detach(), ref, zeros, weights, kl_coef=1.0)
    ours, theirs, other = (
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, kl_from_ref, kl_to_ref)
    )
    torch.testing.assert_close(ours, theirs)
    assert (ours - other).abs().max() > 0.01
    assert stats["kl"] == pytest.approx(kl_to_ref.item())  # the value is KL(policy || ref)


def test_several_updates_keep_the_old_policy(model_path, monkeypatch):
    """Guards: old log-probs taken anew at every update, so that the clip never binds."""
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", 1e9)
    args, rng = make_args(kl_coef=0.0, lr=0.5), random.Random(2)
    rollouts = [
        grpo.Rollout("p", [3, 4], [rng.randrange(500) for _ in range(6)], [0.1] * 6, "", "stop") for _ in range(4)
    ]
    model = load_model(model_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    advantages = [torch.full((6,), a) for a in (1.0, -1.0, 2.0, -2.0)]
    fractions = [
        grpo.update_policy(model, optimizer, None, rollouts, advantages, args)["loss/clip_fraction"] for _ in range(3)
    ]
    assert fractions[0] == 0 and fractions[2] > 0


def test_loss_weights():
    """Guards: one norm's denominator in another; a length of the micro-batch in place of the batch's."""
    for norm, wanted in (
        ("token", [1 / 4] * 4),
        ("sequence", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("dr_grpo", [1 / 16] * 4),
    ):
        torch.testing.assert_close(grpo.loss_weights([1, 3], norm, 8), torch.tensor(wanted), atol=1e-8, rtol=0)


def test_clip_on_both_sides():
    """Guards: the clip that binds for the wrong sign of the advantage, or with the two bounds exchanged."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.25, 0.75])
    logprobs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    zeros, weights = torch.zeros(6), torch.full((6,), 0.5)
    loss, stats = grpo.grpo_loss(logprobs, zeros, zeros, advantages, weights, clip_low=0.2, clip_high=0.3, kl_coef=0.0)
    assert loss.item() == pytest.approx(-0.5 * (1.3 - 1.5 + 0.5 - 0.8 + 1.25 - 0.8))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.75, -0.25, 0.0, -0.625, 0.0])
    assert stats["clip_fraction"] == pytest.approx(0.5 * 3) and stats["surrogate"] == pytest.approx(-loss.item())


def brute_force(model, reference, samples, args) -> torch.Tensor:
    """The GRPO objective from full logits, one response after the other, as the method states it.
    samples: (prompt, ids, advantage, old log-probs or None for the current ones)."""
    per_response = []
    for prompt, ids, advantage, old in samples:
        both = []
        for network in (model, reference):
            logits = network(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1] @ network.head.T / args.temperature
            both.append(logits.log_softmax(-1)[range(len(ids)), ids])
        logp, ref = both[0], both[1].detach()
        ratio = (logp - (logp.detach() if old is None else old)).exp()
        bound = ratio.clamp(max=1 + args.clip_high) if advantage >= 0 else ratio.clamp(min=1 - args.clip_low)
        per_response.append(-bound * advantage + args.kl_coef * ((ref - logp).exp() - (ref - logp) - 1))
    if args.loss_norm == "token":
        return torch.cat(per_response).mean()
    if args.loss_norm == "sequence":
        return torch.stack([x.mean() for x in per_response]).mean()
    return torch.stack([x.sum() / args.max_new_tokens for x in per_response]).mean()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.mark.parametrize("norm", ["token", "sequence", "dr_grpo"])
def test_loss_and_gradient_equal_autograd_on_full_logits(model_path, norm):
    """Guards: loss inputs written in place; a prompt that its responses share by halves; a wrong denominator, k3 or
    clip; log-probs of shifted tokens."""
    args = make_args(loss_norm=norm, kl_coef=0.3)
    model = load_model(model_path, dtype=torch.float64)
    reference = load_model(make_model(model_path.parent / "reference", seed=1), dtype=torch.float64)
    rng = random.Random(0)
    samples = []
    prompts = [[rng.randrange(500) for _ in range(n)] for n in (3, 5, 1)]
    for i, length, advantage in ((0, 1, 1.3), (1, 7, -0.4), (0, 4, 0.0), (1, 11, 0.9), (2, 2, -2.0)):
        prompt, ids = prompts[i], [rng.randrange(500) for _ in range(length)]
        packed = pack([targets_after_prompt(prompt, ids)], torch.device("cpu"))
        with torch.no_grad():
            old = model.packed(*packed, args.temperature)[0][packed[2] >= 0]
        samples.append((prompt, ids, advantage, old + torch.tensor([rng.gauss(0, 0.5) for _ in ids])))
    wanted = brute_force(model, reference, samples, args)
    wanted.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    lengths = [len(ids) for _, ids, _, _ in samples]
    rollouts = [grpo.Rollout("", prompt, ids, [], "", "") for prompt, ids, _, _ in samples]
    ids, row_lengths, targets, rows = grpo.pack_responses(rollouts, torch.device("cpu"))
    assert len(ids) == sum(len(prompt) - 1 for prompt in prompts) + sum(lengths)  # each prompt stands there once
    packed = (ids, row_lengths, targets, args.temperature, rows)
    logprobs = model.packed(*packed)[0][targets >= 0]
    with torch.no_grad():
        ref = reference.packed(*packed)[0][targets >= 0]
    advantages = torch.tensor([a for _, _, a, _ in samples], dtype=torch.float64).repeat_interleave(
        torch.tensor(lengths)
    )
    inputs = [logprobs, torch.cat([old for *_, old in samples]), ref, advantages]
    inputs.append(grpo.loss_weights(lengths, norm, args.max_new_tokens).double())
    copies = [x.detach().clone() for x in inputs]
    loss, stats = grpo.grpo_loss(*inputs, kl_coef=args.kl_coef)
    loss.backward()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    assert stats["clip_fraction"] > 0
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-7)  # the weights are fp32
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("norm", ["token", "sequence", "dr_grpo"])
def test_update_gives_every_token_its_own_advantage(model_path, monkeypatch, norm):
    """Guards: a reward on another response's tokens (a stale loop variable, an order lost in sorting by length); a
    gradient or metrics that depend on the micro-batches, or on a prompt that a group shares by halves; the sampler's
    temperature missing from the loss."""
    monkeypatch.setattr(grpo, "MAX_GRAD_NORM", 1e9)
    args = make_args(loss_norm=norm)
    rng = random.Random(1)
    rollouts = []
    for i, length in enumerate((6, 1, 9, 3, 12, 4)):
        if i % 3 == 0:  # two groups of three
            prompt = [rng.randrange(500) for _ in range(rng.randint(5, 9))]
        ids = [rng.randrange(500) for _ in range(length)]
        rollouts.append(grpo.Rollout("p", prompt, ids, [0.1 * length] * length, "", "stop"))
    advantages = torch.tensor([1.0, -3.0, 0.25, 2.0, 0.0, -0.5])
    reference = load_model(make_model(model_path.parent / "reference", seed=1))
    model = load_model(model_path)
    samples = [(r.prompt, r.ids, a, None) for r, a in zip(rollouts, advantages.tolist(), strict=True)]
    brute_force(model, reference, samples, args).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    norm_wanted = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    results = []
    for micro_tokens in (1, 25, 10**6):
        model = load_model(model_path)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters())  # one step of size 1: the difference is the gradient
        for r in rollouts:
            r.old_logprobs = None
        args.micro_tokens = micro_tokens
        of_tokens = [a.expand(len(r.ids)) for r, a in zip(rollouts, advantages, strict=True)]
        results.append(grpo.update_policy(model, optimizer, reference, rollouts, of_tokens, args))
        assert results[-1]["train/grad_norm"] == pytest.approx(norm_wanted, rel=1e-4)
        for name, p in model.named_parameters():
            torch.testing.assert_close(before[name] - p.detach(), gradient[name], atol=1e-6, rtol=1e-4, msg=name)
    for name, value in results[0].items():
        assert [result[name] for result in results] == pytest.approx([value] * 3, rel=1e-4, abs=1e-6), name
    only_kl = make_args(kl_coef=1.0, loss_norm="sequence" if norm == "sequence" else "token")  # a mean under every norm
    k3 = brute_force(load_model(model_path), reference, [(r.prompt, r.ids, 0.0, None) for r in rollouts], only_kl)
    assert results[0]["kl/k3"] == pytest.approx(k3.item(), rel=1e-4) and k3 > 0.1


# --------------------------------------------------------------------------- whole runs


def test_every_epoch_has_every_problem_once():
    """Guards: problems dropped where an epoch ends within a batch; two draws of one problem that get the same
    samples."""
    problems = [{"id": i, "prompt": [1]} for i in range(7)]
    drawn = [p for step in range(7) for p in grpo.batch_for_step(step, problems, 3, seed=5)]
    epochs = [[p["id"] for p in drawn[k : k + 7]] for k in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3 and epochs[0] != epochs[1] != epochs[2]
    assert [p["place"] for p in drawn] == list(range(21))
    seen: list[str] = []

    class Recorder:
        def sample(self, prompts, *, keys, **_):
            seen.extend(keys)
            return [[] for _ in prompts]

    for step in range(7):
        grpo.sample_rollouts(Engine(Recorder(), None, [0]), drawn[3 * step : 3 * step + 3], make_args(), step)
    assert len(set(seen)) == 21
    assert grpo.batch_for_step(1, problems, 17, seed=5)[:4] == drawn[17:]  # a batch may hold several epochs


@pytest.fixture(scope="module")
def world(model_path):
    """Four uninterrupted steps: random reward, 7 problems, so that an epoch ends within the third batch of 3."""
    root = model_path.parent
    for name, count in (("problems", 7), ("heldout", 5)):
        lines = (TINY / f"{name}.jsonl").read_text().splitlines()[:count]
        write_jsonl(root / f"{name}.jsonl", [json.loads(line) for line in lines])
    flags = ["--policy", model_path, "--problems", root / "problems.jsonl", "--heldout", root / "heldout.jsonl"]
    flags += ["--gold", TINY / "gold.jsonl", "--reward", "random", "--format_constraints", "none", "--batch_size", 3]
    flags += ["--group_size", 4, "--max_new_tokens", 10, "--lr", 1e-3, "--kl_coef", 0.1, "--temperature", 0.8]
    flags += ["--heldout_every", 2, "--save_every", 2, "--sample_every", 3, "--micro_tokens", 900, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(monkeypatch, grpo, *flags, "--steps", 4, "--out", root / "whole")
    return root, flags


def test_sampler_and_trainer_agree(world):
    """Guards: rewards trained on other tokens or at another temperature than were sampled; no gradient at all; a metric
    that isn't a number (JSON has none), such as the accuracy of the valid responses where none is valid."""
    root, _ = world
    first, *steps = read_metrics(root / "whole")
    assert {"step", "heldout/accuracy", "heldout/low", "heldout/high", "heldout/valid"} == first.keys()
    assert all(math.isfinite(value) for record in (first, *steps) for value in record.values())
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert max(record["gap/max"] for record in steps) < 1e-4
    assert all(record["train/grad_norm"] > 0 and 0 < record["reward/mean"] < 1 for record in steps)
    assert steps[0]["kl/k3"] == pytest.approx(0, abs=1e-9) and steps[3]["kl/k3"] > 1e-6
    before, after = (load_file(path / "model.safetensors") for path in (root / "model", root / "whole"))
    assert sum((before[name] != after[name]).sum() for name in before) > 0.9 * sum(x.numel() for x in before.values())


def test_resume_equals_uninterrupted(world, monkeypatch):
    """Guards: a batch repeated or a coin tossed again after a resume; an optimizer or reference that isn't restored;
    numbers that make no sense, or other ones than the run was begun with."""
    root, flags = world
    run_main(monkeypatch, grpo, *flags, "--steps", 2, "--out", root / "halves")
    described = json.loads((root / "halves/args.json").read_text())  # now as it was when a run had one held-out file
    arguments = described["arguments"]
    arguments |= {"heldout": arguments["heldout"][0], "gold": arguments["gold"][0]}
    del arguments["heldout_temperature"], arguments["limit"]
    (root / "halves/args.json").write_text(json.dumps(described))
    run_main(monkeypatch, grpo, *flags, "--steps", 4, "--out", root / "halves")
    assert read_metrics(root / "halves") == read_metrics(root / "whole")
    halves, whole = (load_file(root / name / "model.safetensors") for name in ("halves", "whole"))
    assert all(torch.equal(halves[name], whole[name]) for name in whole)
    with pytest.raises(InputError, match=r"--heldout_every 0: it must be at least 1"):
        run_main(monkeypatch, grpo, *flags, "--out", root / "halves", "--heldout_every", 0)
    with pytest.raises(InputError, match=r"--group_size 1: it must be at least 2"):
        run_main(monkeypatch, grpo, *flags, "--out", root / "halves", "--group_size", 1)
    with pytest.raises(InputError, match=r"no problem fits into both --max_prompt_tokens 1 and the \d+ tokens that"):
        run_main(monkeypatch, grpo, *flags, "--out", root / "halves", "--max_prompt_tokens", 1)
    with pytest.raises(InputError, match=r"--kl_coef 0\.1, this run has --kl_coef 0\.2"):
        run_main(monkeypatch, grpo, *flags, "--steps", 4, "--out", root / "halves", "--kl_coef", 0.2)


def test_two_ranks_train_as_one(world):
    """Guards: groups torn apart when rollouts are gathered; per-rank normalisers and advantages; a stale copy in the
    sampler; ranks that disagree on the number of micro-batches (3 problems on 2 ranks)."""
    root, flags = world
    torchrun("grpo.py", *flags, "--steps", 4, "--out", root / "ranks")
    for one, two in zip(read_metrics(root / "whole"), read_metrics(root / "ranks"), strict=True):
        assert one == pytest.approx(two, abs=1e-4), one["step"]


def test_micro_batches_take_whole_groups():
    """Guards: a prompt packed again and again because its responses are dealt and filled by length; a response that is
    lost or in two micro-batches; ranks that have not the same work; a micro-batch with more tokens than it may have."""
    a, b = [7] * 101, [8] * 101
    rollouts = [grpo.Rollout("", prompt, [0] * 40, [], "", "") for prompt in (a, a, a, b, b, b)]
    batches = grpo.fill_micro_batches(grpo.deal_groups(rollouts, 0, 1), 200)
    assert [[rollouts.index(r) for r in batch] for batch in batches] == [[0, 1], [2], [3, 4], [5]]
    rng = random.Random(0)
    rollouts = []
    for i in range(24):
        prompt = [i] * rng.randint(1, 60)
        rollouts += [grpo.Rollout("", prompt, [0] * rng.randint(1, 90), [], "", "") for _ in range(8)]
    found, work = [], []
    for rank in range(3):
        batches = grpo.fill_micro_batches(grpo.deal_groups(rollouts, rank, 3), 400)
        tokens = [len(grpo.pack_responses(batch, torch.device("cpu"))[0]) for batch in batches]
        assert max(tokens) <= 400
        work.append(sum(tokens))
        found += [id(r) for batch in batches for r in batch]
    assert sorted(found) == sorted(map(id, rollouts)) and max(work) < 1.15 * min(work)
    everything = sum(len(r.prompt) + len(r.ids) for r in rollouts)
    prompts = sum(len(r.prompt) for r in rollouts)
    assert everything - sum(work) > 0.6 * prompts  # nearly 7/8 of them


def test_planned_memory(model_path):
    """Guards: a plan that is off for what can be counted: parameters, the cache's tensors, and (within a fifth) what
    autograd keeps of a micro-batch, without the log-probs, which have a workspace of their own."""
    model = load_model(model_path, dtype=torch.bfloat16).train()
    c, count = model.config, sum(map(torch.numel, model.parameters()))
    sizes = {"ranks": 1, "slots": 8, "prompt": 40, "new_tokens": 20, "judgement": 30}
    plan = bench_memory.grpo_memory(c, c, **sizes)
    assert plan["weights"] == 8 * count and plan["reward model"] == 2 * count
    cache = SlotCache(model, 8, 90, None)  # the reward model's: prompt, response and judgement
    held = (cache.keys.nbytes + cache.values.nbytes) / (8 * 90) * 2 * PREFILL_TOKENS
    assert plan["KV cache"] == cache.keys.nbytes + cache.values.nbytes + held

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that its address isn't used again
        return x

    for model.checkpointing in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            hidden = model.packed(torch.arange(512) % model.config.vocab_size, torch.tensor([512]))  # noqa: F841
        found = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
        planned = 512 * bench_memory.kept_per_token(c, model.checkpointing) * 2
        again = 512 * bench_memory.kept_per_token(c, False) * 2 / c.num_layers if model.checkpointing else 0
        assert found + again == pytest.approx(planned, rel=0.2), (model.checkpointing, found, again, planned)


def test_two_caches_are_never_there_at_once(world, monkeypatch):
    """Guards: the sampler's cache kept while the reward model judges, so that half as large a model fits."""
    root, flags = world
    alive = weakref.WeakSet()

    class Counted(SlotCache):
        def __init__(self, *sizes, **flags):
            assert not alive
            super().__init__(*sizes, **flags)
            alive.add(self)

    monkeypatch.setattr("kernels.sampler.SlotCache", Counted)
    more = ["--reward", "process_aware", "--prm", root / "model", "--prm_max_new_tokens", 10]
    run_main(monkeypatch, grpo, *flags, *more, "--steps", 1, "--out", root / "counted")


def test_ranks_with_other_copies_stop_the_run(model_path, monkeypatch):
    """Guards: ranks that sample from different policies."""
    model, copy = load_model(model_path), load_model(model_path, dtype=torch.bfloat16)
    next(model.parameters()).data.add_(0.1)
    distributed.copy_weights(copy, model)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    seen: list[float] = []
    monkeypatch.setattr(distributed, "gather", lambda mine: seen.extend(mine) or mine)
    for _ in range(2):
        distributed.copy_weights(copy, model)
        next(model.parameters()).data.view(-1)[0] += 1
    assert len(seen) == 2 and seen[0] != seen[1]  # one changed element changes the checksum
    monkeypatch.setattr(distributed, "gather", lambda mine: [*mine, mine[0] + 1])
    with pytest.raises(RuntimeError, match="differ between ranks"):
        distributed.copy_weights(copy, model)


def test_a_sampler_that_differs_stops_the_run(world, monkeypatch):
    """Guards: training on samples of another distribution than the loss assumes."""
    root, flags = world
    real = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, *a, **kw: real(self, *a, **kw | {"temperature": 0.5}))
    with pytest.raises(RunError, match=r"--max_gap 0\.1.*stopped before the update"):
        run_main(monkeypatch, grpo, *flags, "--steps", 2, "--out", root / "other")
    assert not (root / "other" / "training").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", 0], r"--temperature 0: it must be from 0\.001 to 100"),
        (["--min_steps", 9, "--max_steps", 8], "--min_steps 9 is more than --max_steps 8"),
        (["--prm", TINY / "verifier", "--prm_kind", "orm", "--reward", "global_step"], "--prm_kind orm gives none"),
        (["--device", "gpu"], "--device gpu: no such device; use cpu"),
    ],
)
def test_settings_that_cannot_work_are_refused(world, monkeypatch, flags, message):
    """Guards: rewards for steps from a judge of none, which was process_aware without a word; a reward that nobody can
    get; tracebacks after the first rollouts."""
    with pytest.raises(InputError, match=message):
        run_main(monkeypatch, grpo, *world[1], "--out", world[0] / "refused", *flags)


def test_a_run_knows_its_models(world, monkeypatch, tmp_path):
    """Guards: training that goes on from another policy, or on other held-out problems, behind the same name; a reward
    model that is overwritten; a reward model that changed without a trace; fewer steps than there are, called done."""
    root, flags = world
    policy, prm, out = tmp_path / "policy", tmp_path / "prm", tmp_path / "out"
    for copy in (policy, prm):
        shutil.copytree(root / "model", copy)
    judged = ["--reward", "process_aware", "--prm", prm, "--prm_max_new_tokens", 4, "--max_new_tokens", 4]
    flags = [*flags, "--policy", policy, *judged, "--batch_size", 1, "--save_every", 1, "--heldout_every", 9]

    def run(*more):
        run_main(monkeypatch, grpo, *flags, "--out", out, *more)

    def history():
        return json.loads((out / "args.json").read_text())["arguments"]["prm_sha256"]

    for place, message in ((prm, "--prm itself"), (policy, "--policy itself"), (root / "whole", "is --prm|--group_size|made with")):
        before = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}
        with pytest.raises(InputError, match=message):
            run("--out", place)
        assert {path.name: path.read_bytes() for path in place.iterdir() if path.name in before} == before
    run("--steps", 1)
    run("--steps", 2)
    first = history()
    assert len(first) == 1 and first[0][0] == 0
    shutil.copy(root / "whole/model.safetensors", prm)  # trained on, on purpose
    run("--steps", 3)
    assert history()[:1] == first and [step for step, _ in history()] == [0, 2]
    run("--steps", 3, "--prm", root / "model")  # back to the first, with nothing left to do
    assert [step for step, _ in history()] == [0, 2, 3] and history()[2][1] == first[0][1]
    with pytest.raises(InputError, match=r"--steps 2: .* has already 3"):
        run("--steps", 2)
    with pytest.raises(InputError, match="--prm_votes 4: a disc_prm is deterministic"):
        run("--prm_kind", "disc_prm", "--prm_votes", 4)
    heldout = [{"id": "nobody's", "problem": "?"}]
    with pytest.raises(InputError, match="problem nobody's: no gold answer"):
        run("--steps", 4, "--heldout", write_jsonl(tmp_path / "heldout.jsonl", heldout))
    shutil.copy(root / "whole/model.safetensors", policy)
    with pytest.raises(InputError, match="the contents of --policy have changed"):
        run("--steps", 4)
    assert records.note_model([[0, "a"], [20, "b"]], 20, "a") == [[0, "a"]]
    assert records.note_model([[0, "a"]], 20, "b") == [[0, "a"], [20, "b"]]


def test_several_held_out_files(world, monkeypatch, tmp_path):
    """Guards: a mean over problems, where the large file decides, or over one file; an interval as wide as those of
    the files; a monitor that isn't greedy, so that it moves with the seed; two files whose numbers have one name."""
    root, flags = world
    problems = [json.loads(line) for line in (TINY / "problems.jsonl").read_text().splitlines()[:9]]
    other = write_jsonl(tmp_path / "other.jsonl", problems)
    files = ["--heldout", root / "heldout.jsonl", other, "--policy", TINY / "policy", "--max_new_tokens", 120]
    gold = [json.loads(line) for line in (TINY / "gold.jsonl").read_text().splitlines()]
    for name in ("h", "t"):
        write_jsonl(tmp_path / f"{name}.jsonl", [g for g in gold if g["id"].startswith(name)])
    files += ["--gold", tmp_path / "h.jsonl", tmp_path / "t.jsonl", "--lr", 0, "--steps", 1]
    measured = []
    for seed, temperature in ((0, 0), (7, 0), (0, 1.5)):
        more = ["--seed", seed, "--heldout_temperature", temperature, "--out", tmp_path / f"{seed}-{temperature}"]
        run_main(monkeypatch, grpo, *flags, *files, *more)
        measured.append(read_metrics(more[-1])[0])
    first, again, sampled = measured
    for metrics in measured:
        a, b = ([metrics[f"heldout/{name}/{x}"] for x in ("accuracy", "low", "high")] for name in ("heldout", "other"))
        assert metrics["heldout/accuracy"] == pytest.approx((a[0] + b[0]) / 2)
        half = math.hypot(a[2] - a[1], b[2] - b[1]) / 4
        assert metrics["heldout/high"] == pytest.approx(metrics["heldout/accuracy"] + half)
        assert metrics["heldout/valid"] == (metrics["heldout/heldout/valid"] + metrics["heldout/other/valid"]) / 2
    share = [name for name in first if not name.endswith(("low", "high"))]
    assert [first[name] for name in share] == [again[name] for name in share] and first != sampled
    with pytest.raises(InputError, match="two files share a name"):
        run_main(monkeypatch, grpo, *flags, "--heldout", other, root / "other.jsonl", "--out", tmp_path / "twice")


def test_only_the_first_problems(world, monkeypatch, tmp_path):
    """Guards: problems behind --limit among the batches; a resume with another limit, whose batches would be others;
    answers that rlvr learns from replaced between two runs."""
    root, flags = world
    flags = [*flags, "--limit", 2, "--dump_rollouts", "--steps", 2, "--out", tmp_path / "out"]
    run_main(monkeypatch, grpo, *flags, "--steps", 1)
    ids = [json.loads(line)["id"] for line in (root / "problems.jsonl").read_text().splitlines()]
    lines = (tmp_path / "out/rollouts/step_0000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["problem_id"] for line in lines} == set(ids[:2])
    with pytest.raises(InputError, match="made with --limit 2, this run has --limit 3"):
        run_main(monkeypatch, grpo, *flags, "--limit", 3)
    gold = write_jsonl(tmp_path / "gold.jsonl", [{"id": i, "answer": "1"} for i in ids])
    flags += ["--reward", "rlvr", "--heldout", "", "--gold", gold, "--out", tmp_path / "rlvr"]
    run_main(monkeypatch, grpo, *flags, "--steps", 1)
    write_jsonl(gold, [{"id": i, "answer": "2"} for i in ids])
    with pytest.raises(InputError, match="the contents of --gold have changed"):
        run_main(monkeypatch, grpo, *flags)


def test_no_reference_no_divergence(world, monkeypatch):
    """Guards: a KL of exactly 0 in the curves of a run that has nothing to measure it from."""
    root, flags = world
    run_main(monkeypatch, grpo, *flags, "--steps", 1, "--kl_coef", 0, "--out", root / "free")
    (record,) = read_metrics(root / "free")[1:]
    assert "kl/k3" not in record and record["train/grad_norm"] > 0


def test_learning_rate_zero_changes_nothing(world, monkeypatch):
    """Guards: weights that move without a learning rate (decay, buffers, a lossy export); accuracy measured on other
    samples each time."""
    root, flags = world
    run_main(monkeypatch, grpo, *flags, "--steps", 2, "--out", root / "still", "--lr", 0, "--heldout_every", 1)
    before, after = (load_file(path / "model.safetensors") for path in (root / "model", root / "still"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    records = read_metrics(root / "still")
    assert len({tuple(record[f"heldout/{x}"] for x in ("accuracy", "low", "high")) for record in records}) == 1
    assert len(records) == 3 and records[2]["kl/k3"] == pytest.approx(0, abs=1e-9)
