"""Tests of data/grader.py: the kinds of answers that math-verify alone drops or confuses, and the worker's deaths."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from data import grader
from evaluate import grade

import pytest

# kind of fault: pairs that are equal, and pairs that are not
KINDS = {
    "tiny numbers": (
        [
            (r"6.02 \times 10^{-23}", r"6.02 \cdot 10^{-23}"), ("1e-30", r"10^{-30}"), (r"e^{-50}", r"\frac{1}{e^{50}}"),
            (r"2^{-100}", r"\frac{1}{2^{100}}"), ("0.333333", "1/3"), (r"\frac{1}{30}", "0.0333333"),
        ],
        [
            (r"1.6 \times 10^{-19}", r"2.88 \times 10^{-19}"), ("10^{-30}", "10^{-31}"), ("1e-30", "1e-31"),
            (r"\frac{1}{3003!}", r"\frac{1}{3001!}"), ("0.0", r"2.88 \times 10^{-19}"), ("10^{-20}", "0"),
            (r"e^{-50}", r"e^{-51}"), (r"\frac{51}{2^{100}}", r"\frac{50}{2^{100}}"), (r"\pi^{-60}", r"\pi^{-61}"),
            ("(10^{-30}, 1)", "(10^{-31}, 1)"), ("x=10^{-30}", "x=10^{-31}"), ("10^{-30}x", "10^{-31}x"),
            (r"\begin{pmatrix}10^{-20}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-21}\\1\end{pmatrix}"),
            ("1+10^{-30}", "1+10^{-31}"), ("2.88e-5", "2.91e-5"), ("[0,10^{-20}]", "[0,10^{-21}]"),
            ("0.333", r"\frac13"), ("0.000333", r"\frac{1}{3000}"),
        ],
    ),
    "moduli and bases": (
        [
            (r"x \equiv 2 \pmod{3}", r"x\equiv 2 (\mathrm{mod}\ 3)"), ("3 (mod 5)", r"3 \pmod{5}"), ("3", r"x\equiv3\pmod5"),
            (r"8 \pmod 5", r"3 \pmod 5"), (r"x \equiv 4, 1 \pmod 5", r"x\equiv 1,4 \pmod{5}"), ("12 base 5", "12_5"),
            (r"x \equiv -1 \pmod 7", r"x \equiv 6 \text{ (mod 7)}"), ("1010_{two}", "1010_2"), ("2516", "2516_8"),
            (r"101_{\text{three}}", "101_3"), ("(123)_4", "123_4"), ("1A_{16}", "1a_{16}"),
        ],
        [
            (r"x \equiv 395(\bmod 1155)", r"x \equiv 394(\bmod 1155)"), (r"x \equiv 3 \pmod{5}", r"x \equiv 3 \pmod{7}"),
            (r"x\equiv 4 \pmod 7", r"x \equiv 3 \pmod 7"), ("3 mod 5", "3 mod 7"), (r"x\equiv1\mod 10", r"x\equiv1\mod 12"),
            ("2516_8", "2516_{10}"), ("1010_2", "1010_3"), ("2516_8", "2517_8"), ("1A_{16}", "A1_{16}"),
            ("12_5, 13_5", "12_6, 13_6"),
        ],
    ),
    "words": (
        [
            ("North", "north"), (r"\text{East}", "east"), (r"\text{no solution}", "No solution"), ("No", "no"),
            ("east, west", "west, east"), ("yes", r"\text{Yes}"),
        ],
        [
            ("east", "seat"), ("left", "felt"), ("night", "thing"), (r"\text{act}", r"\text{cat}"), ("no", "on"),
            ("Tom", "Mot"), ("Monday", "Tuesday"),
        ],
    ),
    "relations": (
        [
            ("1+1=2", "2"), ("x=5", "5"), (r"\approx 5", "5"), ("> 5", "x > 5"), ("n > 5", "> 5"), ("5 < x", "x > 5"),
            (r"\frac{\ln 2}{0.1}=10\ln 2", r"10\ln 2"), ("5!=120", "120"),
        ],
        [
            (r"\ne 5", "5"), ("7=5", "5"), ("> 5", "5"), ("2+2=10", "10"), (r"\ge 5", "5"), ("<= 5", "5"), ("≠ 5", "5"),
            (r"\not= 5", "5"), ("5", "> 5"), ("5", "7=5"), ("x>5", "5"), ("> 5", "x < 5"), ("x>5", r"x \ge 5"),
        ],
    ),
    "thousands": (
        [
            ("1 000", "1000"), (r"12\,345", "12345"), ("12345", r"12\,345"), ("10 000", "10000"), ("1 234 567", "1234567"),
            ("1{,}000", "1000"), (r"1\ 000", "1000"), (r"3\;000", "3000"), (r"10\,000.5", "10000.5"), ("1\u202f000", "1000"),
            (r"\$12\,345", "12345"), (r"1 000 \text{ m}", "1000"),
        ],
        [("1 000", "100"), ("1 2", "12"), ("1, 000", "1")],
    ),
    "Unicode": (
        [
            ("60°", r"60^\circ"), ("½", "1/2"), ("√5", r"\sqrt5"), ("１２", "12"), ("5\u200b", "5"), ("3½", "3.5"),
            ("2√3", r"2\sqrt{3}"), ("√(x+1)", r"\sqrt{x+1}"), ("e⁻ˣ", "e^{-x}"), ("1∶2", "1:2"), ("x²", "x^2"), ("10⁻¹²", "10^{-12}"), ("2π", r"2\pi"),
            ("−5", "-5"), ("3×4", "12"), ("≥ 5", r"\ge 5"), ("∞", r"\infty"), ("x₁", "x_1"), ("a·b", "ab"), ("50％", r"50\%"),
        ],
        [("x²", "x2"), ("3½", "31/2"), ("√10", r"\sqrt{1}0")],
    ),
    "negative exponents": (
        [
            ("10^-2", "0.01"), ("2^-1", "2^{-1}"), ("x^-1", r"\frac1x"), ("e^-x", "e^{-x}"), ("a^-n", "a^{-n}"),
            (r"5\times10^-3", "0.005"),
        ],
        [("10^-2", "10^2")],
    ),
    "percent": (
        [
            ("47.5", r"47.5\%"), (r"2\frac12\%", "2.5"), (r"\frac12\%", "0.5"), ("33.3%", r"33.3\%"), ("5.5 percent", "5.5"),
            ("0.475", r"47.5\%"), ("47.5%", r"47.50\%"), (r"33\frac13\%", r"33\frac13"),
        ],
        [("48.5", r"47.5\%"), (r"4.75\%", r"47.5\%")],
    ),
    "repeating decimals": (
        [
            (r"0.\overline{3}", r"\frac13"), (r"0.\overline{142857}", r"\frac17"), (r"\frac{3}{11}", r"0.\overline{27}"),
            (r"0.1\overline{6}", r"\frac16"), (r"-0.\overline3", "-1/3"), (r"0.\dot{1}4285\dot{7}", "1/7"), ("0.(3)", "1/3"),
            (r"12.3\overline{45}", r"\frac{679}{55}"), (r"0.\overline{27}", r"0.\overline{2727}"),
        ],
        [(r"0.\overline{3}", "0.3"), (r"0.\overline{12}", r"0.\overline{21}")],
    ),
    "degrees in functions": (
        [
            (r"\sin 30^\circ", r"\frac12"), (r"\cos\left(60^\circ\right)", "0.5"), (r"\sin^2 30^{\circ}", r"\frac14"),
            ("sin 30°", "1/2"), (r"\sin 30\degree", "1/2"), (r"\tan{60^{\circ}}", r"\sqrt3"), (r"\sin 30^\circ+\cos 60^\circ", "1"),
        ],
        [(r"\sin 30^\circ", r"\sin 30")],
    ),
    "words with numbers": (
        [
            ("October 30", r"\text{October 30}"), (r"\text{October } 30", r"\text{October 30}"), ("May 5", r"\text{May 5}"),
            (r"\text{Room 12}", "room 12"),
        ],
        [("October 30", "October 31"), ("30 October", "30 November")],
    ),
    "roots and logarithms": (
        [
            (r"\sqrt{1/m}", r"\frac{1}{\sqrt{m}}"), (r"\sqrt{\frac{2h}{g}}", r"\frac{\sqrt{2h}}{\sqrt{g}}"),
            (r"\ln\frac{a}{b}", r"\ln a-\ln b"), (r"\sqrt[3]{\frac{a}{b}}", r"\frac{\sqrt[3]{a}}{\sqrt[3]{b}}"),
            (r"\log_2\frac{a}{b}", r"\log_2 a-\log_2 b"), (r"2\pi\sqrt{\frac{L}{g}}", r"\frac{2\pi\sqrt{L}}{\sqrt g}"),
        ],
        [(r"\sqrt{x^2}", "x"), (r"\sqrt{\frac{k}{m}}", r"\sqrt{\frac{m}{k}}"), (r"\ln\frac{a}{b}", r"\ln b-\ln a")],
    ),
    "what raises": (
        [(r"3 \ne x", r"x \neq 3"), ("2:30", "2:30")],
        [
            ("2:30", "2:00"), (r"x \neq 4", r"x \neq 3"), (r"x \neq 4", "x=4"), ("x=4", r"x \neq 4"), ("3:00", "2:00"),
            (r"\frac{1}{0}", "5"),
        ],
    ),
    "capitals": (
        [("(b)", "(B)"), ("b", "B"), (r"\text{(B)}", "b"), ("E", "e"), ("Rr", "rR")],
        [
            (r"\frac{m}{M}", r"\frac{M}{m}"), ("-r", "R - 2r"), ("R", "r"), ("T_1", "t_1"), (r"\Delta", r"\delta"),
            ("B", "b"), ("A", "B"),
        ],
    ),
    "marks": (
        [
            (r"\textcolor{red}{5}", "5"), (r"\underline{5}", "5"), (r"{\color{red}5}", "5"), (r"\mathbf{5}", "5"),
            (r"\underline{\frac{1}{2}}", "1/2"), (r"\frac{\textcolor{red}{1}}{2}", "0.5"), (r"\textbf{(B)}", "B"),
            (r"\boxed{\underline{5}}", "5"), (r"\fcolorbox{red}{white}{5}", "5"), ("**5**", "5"), (r"\text{5}", "5"),
        ],
        [(r"\underline{5}", "6"), (r"\textcolor{red}{5}", "6")],
    ),
    "decided": (
        [
            ("3 1/2", "3.5"), ("2*pi", r"2\pi"), ("exp(3)", "e^3"), (r"\sqrt(5)", r"\sqrt5"), (r"\langle 1,2\rangle", "(1,2)"),
            (r"\emptyset", r"\varnothing"), ("5,", "5"), ("€5", "5"), ("5 dollars", "5"), ("5 km/h", "5"), ("5=x", "5"),
            ("5 g", "5 kg"), ("5" + " " * 20_000 + "g", "5"), ("2**3", "8"), ("infinity", r"\infty"),
            ("0.00001", "1e-05"), ("100000000000000000000", "1e+20"), ("-0.0000001", "-1e-07"), (r"3\times10^8", "3e8"),
        ],
        [("3 1/2", "2"), ("5 g", "6 g"), (r"3\times10^8", "3e7")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    """Guards against what math-verify drops (signs, moduli, bases), confuses (words with products, R with r, all tiny
    numbers) or can't read (Unicode, blanks between thousands, percent): a wrong reward without a word."""
    equal, unequal = KINDS[kind]
    found = {(one, other): grade(one, other) for one, other in equal + unequal}
    assert [pair for pair in equal if found[pair] is not True] == []
    assert [pair for pair in unequal if found[pair] is not False] == []


def test_normalising_is_fast_for_any_text():
    """Guards against a pattern that backtracks: the asking side has no deadline."""
    rng = random.Random(0)
    pieces = [
        "(",
        ")",
        "{",
        "}",
        r"\text{",
        "1 ",
        "12",
        "a",
        "abcd ",
        "0.",
        r"\dot1",
        r"\overline{",
        "^-",
        r"\boxed{",
        "$",
    ]
    pieces += [
        "mod ",
        "_8",
        r"\sin(",
        r"^\circ",
        "%",
        "√",
        "²",
        "=",
        "<",
        r"\,",
        "base ",
        r"\color{",
        "e5",
        "**",
        " ",
        "\t",
    ]
    slowest = 0.0
    for _ in range(1000):
        chosen = rng.sample(pieces, rng.choice([1, 2, 3]))
        text = "".join(rng.choice(chosen) for _ in range(rng.choice([20, 150, 5000])))
        started = time.perf_counter()
        answer = grader.normalise(text)
        grader.compact(answer)
        if not grader.is_text(answer):
            grader.contradict(answer, answer)
            grader.drop_moduli(answer, answer)
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.5


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("victim", ["worker", "child"])
def test_a_death_from_outside_costs_no_verdict(monkeypatch, victim):
    """Guards against a killed worker (by the kernel, when memory runs out) that ends the stage, and against a reply too
    many, which would give every later verdict to the question before it."""
    monkeypatch.setattr(grader, "_idle", [])
    pairs = [("(x+1)^2", "x^2+2x+1"), ("(x+1)^2", "x^2+2x+2"), ("(x+2)^2", "x^2+4x+4")]
    assert grade(*pairs[0]) is True
    [worker] = grader._idle
    pid = worker.pid if victim == "worker" else children_of(worker.pid)[0]
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert [grade(*pair) for pair in pairs] == [True, False, True]


def test_the_worker_finds_libraries_but_nothing_of_the_current_directory(monkeypatch, tmp_path):
    """Guards against a file of the user's run as a library where PYTHONPATH names the current directory, and against
    a worker so isolated that it misses a library from elsewhere on the search path."""
    for name in ("math_verify", "sympy", "json", "re"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(grader, "_idle", [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(elsewhere), *sys.path])
    asked = []
    started = subprocess.Popen

    def start(command, **options):
        asked.extend(command)
        return started(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    assert grade("x/2", "0.5x") is True
    assert str(elsewhere) in asked and str(tmp_path) not in asked
