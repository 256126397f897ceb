"""Tests of data/prepare.py: every public set that is at hand, the checks of its files, the overlap of two files,
balancing."""

import io
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

from data import prepare
from data.records import read_answers
from evaluate import grade, read_cases
from kernels import distributed
from kernels.distributed import InputError

import huggingface_hub
import pytest
from test_generate import cpu_milliseconds

SHARED = Path(__file__).parents[2] / "shared" / "data"
FILES = {  # set: the file at hand, its rows with an answer, and answers of some rows
    "skywork": ("rl-skywork-spark-author/train_8k_derived.jsonl", 8000, {0: "1156"}),
    "math_train": ("math-train/math_train7500_answers.json", 7498, {0: r"\frac{1}{4}", 1: "3003"}),
    "gsm8k": ("gsm8k/test.jsonl", 1319, {0: "18", 146: "2125"}),
    "math500": ("eval-math500/math500.jsonl", 500, {0: r"\left( 3, \frac{\pi}{2} \right)", 242: r"\$32,\!348"}),
    "aime24": ("eval-aime24/aime24.jsonl", 30, {0: "204", 7: "25", 15: "73"}),
    "aime25": ("eval-aime25/aime25_derived_30.jsonl", 30, {0: "70", 19: r"336^\circ"}),
    "amc23": ("eval-amc/amc23_40.jsonl", 40, {0: "27", 15: "-1"}),
    "olympiadbench": ("eval-olympiadbench/olympiadbench_oe_to_maths_en.jsonl", 675, {0: "2"}),
    "minerva": ("eval-minerva/minerva_math.jsonl", 272, {0: "1.6", 1: r"4.5 \times 10^{33}", 5: r"\arcsin(10/13)"}),
}
SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")


def run(monkeypatch, *command: object) -> None:
    """Run prepare.py's main in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, command)])
    prepare.main()


def write_lines(path: Path, records: list[dict]) -> Path:
    """Write records as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict]:
    """All records of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with every set, made from the files at hand."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    out = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for name, (file, _, _) in FILES.items():
            run(patch, name, "--out", out, "--source", SHARED / file)
        run(patch, "processbench", "--out", out, "--source", SHARED / "processbench")
    return out


# --------------------------------------------------------------------------- the real sets


@pytest.mark.parametrize("name", FILES)
def test_set(prepared, name):
    """Guards against answers in a file that reference-free stages read, gold of another row, and ids that collide."""
    _, rows, answers = FILES[name]
    problems, gold = read_lines(prepared / f"{name}.jsonl"), read_lines(prepared / "gold" / f"{name}.jsonl")
    assert len(problems) == len({problem["id"] for problem in problems}) == rows
    assert [problem["id"] for problem in problems] == [record["id"] for record in gold]
    assert all(problem.keys() == {"id", "problem", "source"} and problem["problem"] for problem in problems)
    assert all(record.keys() == {"id", "answer"} and record["answer"] for record in gold)
    found = {record["id"]: record["answer"] for record in gold}
    assert {row: found[f"{name}/{row}"] for row in answers} == answers
    run_of = json.loads((prepared / f"{name}.jsonl.args.json").read_text())["arguments"]
    assert run_of["command"] == name and run_of["source"].endswith(FILES[name][0])


def test_prepared_answers_grade_right(prepared):
    """Guards against an answer that is made so plain, or left so raw, that a right solution is graded wrong."""
    gold = read_answers([str(prepared / "gold" / f"{name}.jsonl") for name in FILES])
    assert not [answer for answer in gold.values() if "$" in answer.replace(r"\$", "")]
    pairs = read_lines(prepared / "olympiadbench.jsonl")
    several = next(pair["id"] for pair in pairs if gold[pair["id"]] == "69,84")  # `$69$,$84$` as published
    for name, right, wrong in [
        ("aime25/19", "336", "335"),
        ("aime24/7", "25", "250"),
        ("amc23/0", "27.0", "270"),
        ("gsm8k/146", "2,125", "2"),
        ("math500/242", "32348", "32"),
        ("minerva/0", "1.60", "16"),
        (several, "84, 69", "69"),
    ]:
        assert (grade(right, gold[name]), grade(wrong, gold[name])) == (True, False), name


def test_processbench(prepared):
    """Guards against a conversion that loses cases, shifts labels, or mixes up the answer's verdict with the steps'."""
    counts = []
    for subset in SUBSETS:
        cases = read_cases(str(prepared / f"processbench/{subset}.jsonl"))
        published = json.loads((SHARED / f"processbench/{subset}.json").read_text(encoding="utf-8"))
        assert [case["steps"] for case in cases] == [case["steps"] for case in published]
        assert len({case["id"] for case in cases}) == len(cases) == len(published)
        counts.append(sum(case["final_answer_correct"] and case["label"] != -1 for case in cases))
    assert counts == [7, 94, 161, 259]
    assert not (prepared / "gold/processbench").exists()


def test_overlap_of_the_real_sets(prepared, tmp_path, monkeypatch, capsys):
    """Guards against a comparison that typesetting defeats, or that is blind: 84 problems or more of Skywork's part are
    in ProcessBench, and 955 - 847 of its MATH problems aren't in MATH 12K, because they are in MATH-500."""
    benchmarks = [prepared / f"processbench/{subset}.jsonl" for subset in SUBSETS]
    clean = tmp_path / "clean.jsonl"
    run(monkeypatch, "overlap", "--train", prepared / "skywork.jsonl", "--benchmarks", *benchmarks, "--out", clean)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].partition(" different")[0] for line in lines[:-1]] == [
        "0 of 375", "4 of 955", "2 of 561", "92 of 950"
    ]  # fmt: skip
    assert "100 of 8000" in lines[-1] and len(read_lines(clean)) == 8000 - 100
    run(monkeypatch, "overlap", "--train", clean, "--benchmarks", *benchmarks)
    assert "0 of 7900" in capsys.readouterr().out
    run(monkeypatch, "overlap", "--train", prepared / "math500.jsonl", "--benchmarks", benchmarks[1])
    assert f"{955 - 847} of 955 different" in capsys.readouterr().out


# --------------------------------------------------------------------------- small files


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A source file of three rows, and a table of known files that says so."""
    path = write_lines(tmp_path / "rows.jsonl", [{"problem": f"What is {i}?", "answer": f"0{i}"} for i in range(3)])
    monkeypatch.setattr(prepare, "KNOWN", [("aime24", ".jsonl", 3, None), ("math500", ".jsonl", 3, "0" * 64)])
    return path


def test_small_set(small, tmp_path, monkeypatch, capsys):
    """Guards against a run that looks checked where nothing could be."""
    run(monkeypatch, "aime24", "--out", tmp_path / "out", "--source", small)
    assert "rows as expected, sha256 not checked" in capsys.readouterr().out
    assert [record["answer"] for record in read_lines(tmp_path / "out/gold/aime24.jsonl")] == ["0", "1", "2"]
    assert read_lines(tmp_path / "out/aime24.jsonl")[2] == {
        "id": "aime24/2", "problem": "What is 2?", "source": "aime24"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("aime24", lambda text: text.split("\n", 1)[1], "2 rows, expected one of"),
        ("aime24", lambda text: text[:-9], "can't be read as .jsonl"),
        ("aime24", lambda text: "[" * 100_000, "can't be read as .jsonl"),
        ("aime24", lambda text: text.replace("answer", "reply"), "row 0: KeyError"),
        ("aime24", lambda text: text.replace('"01"', "null"), "2 of 3 rows have"),
        ("aime24", lambda text: text.replace('"01"', '""'), "2 of 3 rows have"),
        ("aime24", lambda text: "1\n2\n3\n", "row 0: TypeError"),
        ("math500", lambda text: text, "sha256 .* expected one of"),
    ],
)
def test_wrong_file_is_refused(small, tmp_path, monkeypatch, capsys, name, change, message):
    """Guards against a benchmark made from a cut, changed or other file, and against half of it being written."""
    small.write_text(change(small.read_text()))
    with pytest.raises(InputError, match=message):
        run(monkeypatch, name, "--out", tmp_path / "out", "--source", small)
    with pytest.raises(SystemExit, match="2"):
        distributed.run_stage(prepare.main)
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_one_wrong_subset_stops_all(tmp_path, monkeypatch):
    """Guards against three subsets of four passing for ProcessBench, and against labels that count from 1."""
    monkeypatch.setattr(prepare, "KNOWN", [(f"processbench/{subset}", ".json", 2, None) for subset in SUBSETS])
    case = {"generator": "g", "problem": "p", "steps": ["a", "b"], "final_answer_correct": True, "label": -1}
    for subset, label in zip(SUBSETS, (-1, 0, 1, 2), strict=True):
        (tmp_path / f"{subset}.json").write_text(json.dumps([case, {**case, "label": label}]))
    with pytest.raises(InputError, match=r"processbench/omnimath, row 1: .*label 2 of 2 steps"):
        run(monkeypatch, "processbench", "--out", tmp_path / "out", "--source", tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "omnimath.json").unlink()
    with pytest.raises(InputError, match=r"no file .*omnimath\.json"):
        run(monkeypatch, "processbench", "--out", tmp_path / "out", "--source", tmp_path)


def test_rows_as_the_hub_has_them():
    """Guards against converting only the editions at hand: Skywork's rows are nested, MATH has no answer."""
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 1+1? "}]
    rows = [{"prompt": turns, "reward_model": {"ground_truth": r'["$\\frac{4}{2}$", "2"]'}}]
    problems, gold = prepare.convert("skywork", rows)
    assert (problems[0]["problem"], gold[0]["answer"]) == ("What is 1+1?", r"\frac{4}{2}")
    solutions = [r"$\boxed{1}$, so $\boxed{\frac{1}{\sqrt{2}}}$.", r"It is $\boxed 2$."] + [r"$\boxed{5\$}$"] * 98
    _, gold = prepare.convert("math_train", [{"problem": "p", "solution": solution} for solution in solutions])
    assert [record["answer"] for record in gold[:3]] == [r"\frac{1}{\sqrt{2}}", "2", r"5\$"]
    _, gold = prepare.convert("math_train", [{"problem": "p", "solution": s} for s in [r"$\boxed{}$", *solutions]])
    assert [record["id"] for record in gold] == [f"math_train/{row}" for row in range(1, 101)]
    _, gold = prepare.convert("olympiadbench", [{"question": "q", "final_answer": ["$1$,$2$", "3"]}])
    assert gold[0]["answer"] == "1,2, 3"


def test_hub_download(small, tmp_path, monkeypatch):
    """Guards against a file of whatever commit is newest, and against a traceback where there is no network."""
    asked = []

    def download(*names, **where):
        asked.append((*names, where))
        return str(small)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    run(monkeypatch, "aime24", "--out", tmp_path / "out")
    [(hub, file, where)] = asked
    assert (hub, file) == ("HuggingFaceH4/aime_2024", "data/train-00000-of-00001.parquet")
    assert where["repo_type"] == "dataset" and len(where["revision"]) == 40
    assert all(len(source.hub.partition("@")[2]) == 40 for source in prepare.SOURCES.values())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: Path("nowhere").read_bytes())
    with pytest.raises(InputError, match=r"can't be downloaded .*try --source"):
        run(monkeypatch, "aime24", "--out", tmp_path / "out")


def test_github_download(tmp_path, monkeypatch):
    """Guards: the edition of OlympiadBench with 674 rows, where the paper's scores are multiples of 1/675; a traceback
    where there is no network."""
    asked = []

    def respond(url, timeout):
        asked.append(url)
        return io.BytesIO("{}\n½".encode())

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", respond)
    source = prepare.SOURCES["olympiadbench"]
    assert [prepare.find_file(source, None).read_text() for _ in range(2)] == ["{}\n½"] * 2
    commit = "a45202bd16f1ec06f433442dc1152d0074773465"
    path = f"QwenLM/Qwen2.5-Math/{commit}/evaluation/data/olympiadbench/test.jsonl"
    assert asked == [f"https://raw.githubusercontent.com/{path}"]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "empty"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Path("nowhere").read_bytes())
    with pytest.raises(InputError, match=r"can't be downloaded .*try --source"):
        run(monkeypatch, "olympiadbench", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "one, other",
    [
        (r"Is $\dfrac{1}{2}$ more than $x$?", r"Is $\frac12$ more than $x$?"),
        (r"$\left( x \right)$", r"$( x )$"),
        (r"$\displaystyle \sum_{n=1}^\infty \,a_n$", r"\[\sum\limits_{n=1}^{\infty} a_n\]"),
        (r"$x \leq 5, y \neq 2$", r"$x \le 5, y \ne 2$"),
        (r"$1, 2, \ldots, 9$ \textbf{and} $\mathrm{cm}$", r"$1, 2, \dots, 9$ and cm"),
        (r"$\big|x\big|$", "$|x|$"),
        ("a≤b, a≠1, 3×4 and 60°", r"$a\le b$, $a\not=1$, $3\times 4$ and $60\degree$"),
        ("x², x₁, √2, 2π, ½, ∠A", r"$x^2$, $x_{1}$, $\sqrt2$, $2\pi$, $\frac12$, $\angle A$"),
        ("1, …, 9 in ℝ and ℤ", r"$1,\ldots,9$ in $\mathbb{R}$ and \Z"),
        ("Ψ and Δ for each ﬁgure of Erdős: １２ café", "$\\Psi$ and $\\Delta$ for each figure of Erd\\H{o}s: 12 cafe\u0301"),
        (r"\emph{a}, {\rm b}, \boldsymbol{c}, \bm d, \mathit{e}", r"a, \textit{b}, $c, d, e$"),
        (r"$\dbinom{5}{2} \equiv a \bmod 7$", r"$\binom52 \equiv a \pmod{7}$"),
        (r"$1, ..., \lvert\varphi\rvert \to 1/2$", r"$1,\cdots, |\phi| \rightarrow \tfrac{1}{2}$"),
        (r"\noindent\begin{align*}a&=b\\[2pt]c&=d\end{align*}", r"\begin{aligned}a&=b\\c&=d\end{aligned}"),
        (r"a\hspace{1cm}b\kern2pt c \begin{equation}d\end{equation}", "abc $$d$$"),
        (r"\begin{tabular}{|c|c|}a&b\end{tabular}<br>", "a b [asy]draw((0,0)--(1,1));[/asy]"),
        ("if a &lt; b", "if $a<b$"),
    ],
)
def test_typesetting_hides_no_problem(one, other):
    """Guards against a benchmark's problem in the training file because its fractions or brackets are typeset
    otherwise, or pasted as Unicode."""
    assert prepare.keys(one) & prepare.keys(other)


def test_comparing_garbage_takes_linear_time():
    """Guards: patterns for what never closes, an environment or a figure, that go over the rest of a problem again."""
    units = ["\\begin{", "\\tag{a", "[asy]", "\\\\[", "\\kern1", "<p ", "&", "√(", "\\begin{a}{", "\\hspace*", " ", "½"]
    slow = {unit: ms for unit in units if (ms := cpu_milliseconds(prepare.keys, unit * (30_000 // len(unit)))) >= 500}
    assert not slow


def test_other_problems_stay_other():
    """Guards against commands that are dropped with the layout: \\leftarrow is no \\left, \\le no \\ge."""
    for one, other in [(r"$x \le 5$", r"$x \ge 5$"), (r"\leftarrow", r"\rightarrow"), (r"$\sqrt{2}$", "$2$")]:
        assert prepare.normalise(one) != prepare.normalise(other)
    for one, other in [(r"$\sin 60^\circ$", r"$\cos 60^\circ$"), (r"$\sqrt{2}$", "$2$"), ("证明", "计算"), ("≤", "π")]:
        assert not prepare.keys(one) & prepare.keys(other)


def test_answers_of_other_types():
    """Guards: a number's exponent that no grader reads, or a sign that hides it; an object taken for an answer."""
    given = [1e-05, 1e20, -1e-07, 27.0, 5, [5, 7], ["$1$", 2.5], None, "-4.5e33", float("nan"), ["5", None], "1E5"]
    assert [prepare.clean_answer(value) for value in given] == [
        r"1 \times 10^{-5}", r"1 \times 10^{20}", r"-1 \times 10^{-7}", "27.0", "5", "5, 7", "1, 2.5", "",
        r"-4.5 \times 10^{33}", "", "5", r"1 \times 10^{5}",
    ]  # fmt: skip
    assert grade("0.00001", prepare.clean_answer(1e-05)) is True
    for value in ({"value": 5}, True, [{"value": 5}]):
        with pytest.raises(InputError, match=r"row 0: .*is no number, string or list of these"):
            prepare.convert("olympiadbench", [{"question": "q", "final_answer": value}])
    with pytest.raises(InputError, match=r"row 0: .*its answer has no ####"):
        prepare.convert("gsm8k", [{"question": "q", "answer": "a"}])


def test_overlap(tmp_path, monkeypatch, capsys):
    """Guards against counting a repeated problem twice, parts of problems, and losing fields of the training file."""
    train = [
        {"id": f"t/{i}", "problem": p, "source": "s"} for i, p in enumerate(["Find $a b$.", "Find $c$.", "FIND $AB$"])
    ]
    cases = [{"id": f"b/{i}", "problem": p} for i, p in enumerate(["Find {ab}", "find ab!", "Find", "Find $c$ or $d$"])]
    paths = [write_lines(tmp_path / f"{name}.jsonl", x) for name, x in [("train", train), ("bench", cases)]]
    run(monkeypatch, "overlap", "--train", paths[0], "--benchmarks", paths[1], "--out", tmp_path / "clean.jsonl")
    out = capsys.readouterr().out
    assert "1 of 3 different problems" in out and "2 of 3 problems are in a benchmark" in out
    assert read_lines(tmp_path / "clean.jsonl") == [train[1]]
    with pytest.raises(InputError, match="no such file"):
        run(monkeypatch, "overlap", "--train", tmp_path / "none.jsonl", "--benchmarks", paths[1])


# --------------------------------------------------------------------------- balancing


def solutions_of(problem: str, answers: list[str | None]) -> list[dict]:
    """One solution for each answer; one without steps where the answer is "none"."""
    common = {"problem_id": problem, "text": "t"}
    return [
        {"id": f"{problem}/{k}", "steps": ["s"] * (answer != "none"), "answer": answer, **common}
        for k, answer in enumerate(answers)
    ]


def test_balance_solutions_counted_by_hand():
    """Guards against a balance over all problems in place of each, more than three of a kind, an unknown grade that
    counts as incorrect, and a choice that other problems or the order of the file change."""
    grades = {
        "few wrong": [True, False, True, True, False, True],
        "many": [True] * 5 + [False] * 4,
        "all right": [True] * 4,
        "all wrong": [False] * 4,
        "unknown": [True, None, None, True],
    }
    solutions = [s for problem, found in grades.items() for s in solutions_of(problem, ["1"] * len(found))]
    grade_of = dict(zip([s["id"] for s in solutions], [g for found in grades.values() for g in found], strict=True))

    def balance(some: list[dict], seed: int) -> list[dict]:
        return prepare.balance_solutions(some, [grade_of[s["id"]] for s in some], seed)

    seen = set()
    for seed in range(20):
        kept = balance(solutions, seed)
        assert [s for s in solutions if s in kept] == kept  # unchanged and in order
        counts = {problem: [0, 0] for problem in grades}
        for s in kept:
            counts[s["problem_id"]][grade_of[s["id"]]] += 1
        assert list(counts.values()) == [[2, 2], [3, 3], [0, 0], [0, 0], [0, 0]]
        seen |= {s["id"] for s in kept}
        assert {s["id"] for s in balance(solutions[::-1], seed)} == {s["id"] for s in kept}
        alone = balance([s for s in solutions if s["problem_id"] == "many"], seed)
        assert alone == [s for s in kept if s["problem_id"] == "many"]
    assert len(seen) == 6 + 9  # every candidate has its turn


def test_balance(tmp_path, monkeypatch, capsys):
    """Guards against answers that are compared as text, solutions without a reference answer or without steps, and
    fields that get lost."""
    answers = {"a": ["0.5", r"\frac{1}{2}", "2", None, "none"], "b": ["7", "7"], "c": ["none", "9"]}
    solutions = [s for problem, found in answers.items() for s in solutions_of(problem, found)]
    gold = [{"id": "a", "answer": "1/2"}, {"id": "b", "answer": "7"}, {"id": "c", "answer": "9"}]
    paths = [write_lines(tmp_path / f"{name}.jsonl", x) for name, x in [("solutions", solutions), ("gold", gold)]]
    command = ["balance", "--solutions", paths[0], "--gold", paths[1], "--out"]
    out = tmp_path / "balanced.jsonl"
    run(monkeypatch, *command, out)
    assert read_lines(out) == solutions[:4]
    printed = capsys.readouterr().out
    assert "4 of 9 solutions" in printed and "1 of 3 problems" in printed
    assert json.loads(Path(f"{out}.args.json").read_text())["arguments"]["seed"] == 0
    with pytest.raises(InputError, match="is the file of --solutions"):
        run(monkeypatch, *command, tmp_path / "." / "solutions.jsonl")
    for change, message in (
        ((paths[1], gold[1:]), r"gold\.jsonl: no answer for the problem of solution a/0"),
        ((paths[1], [*gold[:2], {"id": "c", "answer": None}]), "'c' has no answer"),
        ((paths[1], [*gold[:2], {"id": "c", "answer": "\\text{\u200b}"}]), "'c' has an answer that shows nothing"),
        ((paths[0], solutions[5:]), "no problem has both correct and incorrect"),
        ((paths[0], [{**solutions[0], "steps": "s"}]), "steps must be a list"),
        ((paths[0], [{"id": "a/0", "steps": ["s"], "answer": "1"}]), "no field 'problem_id'"),
    ):
        write_lines(paths[0], solutions)
        write_lines(paths[1], gold)
        write_lines(*change)
        with pytest.raises(InputError, match=message):
            run(monkeypatch, *command, tmp_path / "other.jsonl")
        with pytest.raises(SystemExit, match="2"):
            distributed.run_stage(prepare.main)
        assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "other.jsonl").exists()
