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
    "several units, millions and dozens": (
        [
            ("5 million", "5000000"), ("2 dozen", "24"), (r"1.5\text{ million}", "1500000"),
            ("3 hours 20 minutes", r"3\text{ hours }20\text{ minutes}"),
            ("3 hours and 20 minutes", "3 hours, 20 minutes"), ("5 dollars", "5"), ("5 million dollars", "5000000"),
            ("3 boys and 4 girls", "4 girls and 3 boys"), (r"(3\text{ m}, 4\text{ m})", r"(3\text{ m},4\text{ m})"),
        ],
        [
            ("3 hours 20 minutes", "3 hours 21 minutes"),
            (r"3\text{ hours }20\text{ minutes}", r"3\text{ hours }40\text{ minutes}"),
            ("3 hours and 20 minutes", "3"), (r"5\text{ ft }3\text{ in}", r"5\text{ ft }4\text{ in}"),
            ("2 dollars 50 cents", "75"), ("3 boys and 4 girls", "5"), ("3 apples, 4 pears", "5"),
            ("5 million", "5 billion"), (r"5\text{ thousand}", "5"), ("2 dozen", "2"),
            ("2 hours 30 min", "2 hours 31 min"), ("5 feet 3 inches", "5 feet 4 inches"),
            ("3 million", "3 thousand"), ("1 km 200 m", "1 km 300 m"), ("2 red, 3 blue", "5"),
            ("1 week and 2 days", "1 week and 3 days"),
            ("2 red balls and 3 blue balls", "2 red balls and 4 blue balls"), (r"\$3.5\text{ billion}", "3.5"),
            (r"-3\text{ m}, 4\text{ m}", r"3\text{ m}, 4\text{ m}"),
            (r"(3\text{ m}, 4\text{ m})", r"(4\text{ m}, 3\text{ m})"),
        ],
    ),
    "opposite words": (
        [
            ("5 am", "5"), ("5 km north", "5"), ("5% profit", "5"), ("3 more", "3"), ("3 fewer", "3 less"),
        ],
        [
            ("5 am", "5 pm"), (r"30^\circ \text{ north of east}", r"30^\circ \text{ south of east}"),
            (r"5\% profit", r"5\% loss"), ("5 a.m.", "5 p.m."), ("5 km north", "5 km south"), ("3 more", "3 less"),
            ("3 more", "3 fewer"), ("5 m above", "5 m below"), ("10 units left", "10 units right"),
            ("5% increase", "5% decrease"), (r"5\text{ gain}", r"5\text{ loss}"), ("5 m up", "5 m down"),
            (r"90^\circ \text{ clockwise}", r"90^\circ \text{ counterclockwise}"),
            ("5 years older", "5 years younger"), ("3 units west", "3 units east"),
            ("1 second before", "1 second after"),
        ],
    ),
    "primes": (
        [
            ("f'(x)", "f'(x)"), ("f′(x)", "f'(x)"), (r"f^{\prime}(x)", "f'(x)"),
        ],
        [
            ("x'", "x"), ("f'(x)", "f(x)"), ("y''", "y'"), ("f''(2)=3", "f'(2)=3"), ("5'", "5°"), ("g'", "g"),
            ("y'''", "y''"), (r"x^{\prime}", "x"), ("dy/dx", "y"),
        ],
    ),
    "transposes, angles, and/or": (
        [
            (r"\angle ABC", r"\angle CBA"), ("A^T", "A^{T}"), ("x=1 or x=2", "x=1 and x=2"), ("1 or 2", "1 and 2"),
        ],
        [
            ("A^T", "A"), (r"\angle ABC", r"\angle ACB"), ("p and q", "p or q"), (r"x\nmid 5", r"x\mid 5"),
            ("A^{T}", "A"), (r"\mathbf{v}^T", r"\mathbf{v}"), (r"A\nsubseteq B", r"A\subseteq B"),
            (r"AB\nparallel CD", r"AB\parallel CD"), (r"\angle BAC", r"\angle ABC"), (r"x\notin A", r"x\in A"),
        ],
    ),
    "repeated values": (
        [
            ("1,2", "2,1"), ("1,1,2", "1,2,1"), (r"\{1,1,2\}", r"\{1,2\}"),
        ],
        [
            ("1,1", "1"), ("1,1,2", "1,2"), ("1,2,2", "1,1,2"), ("2,2", "2"), ("3, 3, 4", "3, 4"),
            (r"\frac12,\frac12", r"\frac12"), ("0,0,1", "0,1"),
        ],
    ),
    "answers behind a choice": (
        [
            ("A. 5", "5"), ("A. 5", "A) 5"),
        ],
        [
            ("A. 5", "B. 5"), ("A) 5", "B) 5"), ("(A) 5", "(B) 5"), ("C. 10", "D. 10"), ("(A) 5", "(B) 5"),
            ("C: 10", "D: 10"),
        ],
    ),
    "relations that are dropped, equations": (
        [
            ("x=5", "5"), ("f(x)=x^2", "x^2"), ("x<>5", r"x\ne 5"), ("a_n=2n", "2n"), ("2+3=5", "5"),
            ("2x+3y=5", "3y+2x=5"), ("x=2+3=5", "5"), ("|x|=5", "|x|=5"), (r"\angle ABC = 30", "30"),
            (r"\sin x=\frac12", r"\frac12"), ("f'(x)=2x", "2x"), ("AB=5", "5"), (r"\frac{AB}{CD}=2", "2"),
            ("a+b=5", "5"), ("3=x", "x=3"), ("2=x", "2"), ("x+y=5", "5"), ("f(2)=3", "3"), ("y=2x+3", "2x+3"),
            ("P(X=2)=0.3", "0.3"),
        ],
        [
            ("x <> 5", "x=5"), (r"\gg 5", "5"), (r"\ll 5", "5"), (r"\lesssim 5", "5"), (r"\neg 5", "5"),
            ("x=5=7", "7"), ("3=5x", "5x"), ("2x+3y=5", "5"), ("x^2+y^2=4", "4"), ("5", "2x+3y=5"), ("y=x", "y=2x"),
            ("x=3=4", "4"), ("4=2x", "2x"), ("3a+b=7", "7"), (r"\gtrsim 5", "5"), (r"\ggg 5", "5"), ("x^2=9", "9"),
            (r"\propto 5", "5"), (r"\not< 5", "5"), ("2x=6", "6"),
        ],
    ),
    "bases and moduli in other spellings": (
        [
            ("0x10", "0x10"), ("1101 in binary", "1101_2"), (r"x\equiv_5 3", r"x\equiv 3\pmod 5"), ("0b101", "5"),
            ("12 in octal", "12_8"),
        ],
        [
            ("0x10", "0x11"), ("1101 in binary", "1101 in octal"), (r"x\equiv_5 3", r"x\equiv_7 3"),
            (r"x \% 5 = 3", r"x \% 7 = 3"), ("0xAB", "0xAC"), ("17 in octal", "17 in decimal"), ("0b11", "0b10"),
        ],
    ),
    "superscripts and subscripts of letters": (
        [
            ("2ᵏ", "2^k"), ("aᵢ", "a_i"), ("x⁽²⁺¹⁾", "x^{(2+1)}"), ("xᵐ", "x^m"), ("H₂", "H_2"),
        ],
        [
            ("2ᵏ", "2k"), ("aᵢ", "ai"), ("xⁿ", "xn"), ("x³", "x3"), ("aⱼ", "aj"),
        ],
    ),
    "the imaginary unit": (
        [
            ("(1+i)^2", "2i"), ("i^2", "-1"), (r"\frac{1}{1+i}", r"\frac{1-i}{2}"), (r"e^{i\pi}", "-1"),
            ("|3+4i|", "5"), ("(2+3i)(1-i)", "5+i"), (r"\sqrt{-4}", "2i"), ("V=IR", "V=RI"), ("I_1", "I_1"),
            (r"\mathbf{I}", "I"), (r"\text{I}", "I"), (r"\frac{2I}{R}", "2I/R"), ("I_1+I_2", "I_2+I_1"),
            ("i^3", "-i"), (r"\frac{2+i}{1-i}", r"\frac{1+3i}{2}"), (r"\sqrt{-9}", "3i"), (r"e^{i\pi/2}", "i"),
            ("|1+i|", r"\sqrt2"), ("i^4", "1"), (r"\frac1i", "-i"), ("(1-2i)^2", "-3-4i"),
            (r"\cos\frac{\pi}{3}+i\sin\frac{\pi}{3}", r"e^{i\pi/3}"),
        ],
        [
            ("(1+i)^2", "-2i"), ("i", "1"), ("I", "i"), ("i", "j"), ("2I", "2i"), ("I^2", "-1"), ("I_1", "I_2"),
        ],
    ),
    "degrees in fractions and other spellings": (
        [
            (r"\frac{\sin 30^\circ}{2}", r"\frac14"), (r"\frac{1}{\sin 30^\circ}", "2"), (r"\sin {30^\circ}", "1/2"),
            (r"\sqrt{1-\cos 60^\circ}", r"\frac{1}{\sqrt2}"), (r"\sin\left(\frac{60^\circ}{2}\right)", "1/2"),
            (r"\sin -30^\circ", "-1/2"), (r"\sin{30}^\circ", "1/2"), (r"\sin\,30^\circ", "1/2"),
            (r"\sin 30\text{ degrees}", "1/2"), (r"\operatorname{sin} 30^\circ", "1/2"), (r"60^{\text{o}}", "60"),
            ("60^o", r"60^\circ"), (r"\sin 60^o", r"\frac{\sqrt3}{2}"), (r"\cos 60^{\circ}+1", r"\frac32"),
            (r"\frac{\tan 45^\circ}{2}", r"\frac12"), (r"2\sin(30^\circ)\cos(30^\circ)", r"\frac{\sqrt3}{2}"),
            (r"\sqrt{\sin 30^\circ}", r"\frac{1}{\sqrt2}"), (r"\cos(-60°)", "1/2"), ("45 degrees", r"45^\circ"),
            ("sin(30 degrees)", "1/2"), (r"\sin(45^\circ+45^\circ)", "1"), (r"\sin^{2} {30^\circ}", "1/4"),
        ],
        [],
    ),
    "one command under two names": (
        [
            (r"\varphi", r"\phi"), (r"\varepsilon", r"\epsilon"), (r"\vartheta", r"\theta"), ("φ", r"\varphi"),
            (r"\mathbb R", r"\mathbb{R}"), (r"\R", r"\mathbb{R}"), (r"1,\ldots,n", r"1,\dots,n"),
            (r"\lbrace 1,2\rbrace", r"\{1,2\}"), (r"\sqrt[4]{\frac ab}", r"\sqrt[4]{\frac{a}{b}}"),
            (r"\frac a b", r"\frac{a}{b}"), (r"\binom52", "10"), ("x&gt;5", "x>5"), ("Yes", r"\mathrm{Yes}"),
            ("ε", r"\varepsilon"), ("ϕ", r"\varphi"), (r"\mathbb Z", r"\Z"), (r"\cdots", r"\ldots"),
            (r"\tfrac ab", r"\frac{a}{b}"), (r"\tbinom{5}{2}", "10"), (r"\dbinom52", "10"), ("x&lt;5", "x<5"),
            (r"\mathrm{No}", "No"), (r"\leqslant 5", r"\le 5"), (r"\lbrack 0,1\rbrack", "[0,1]"),
            (r"\lvert x\rvert", "|x|"), (r"\vert x\vert", "|x|"),
        ],
        [],
    ),
    "more of Unicode": (
        [
            ("√(1+√2)", r"\sqrt{1+\sqrt2}"), ("√(2(3+1))", r"\sqrt{8}"), ("√25.5", r"\sqrt{25.5}"),
            ("√x²", r"\sqrt{x}^2"), ("⌊x⌋", r"\lfloor x\rfloor"), ("⌈2.5⌉", "3"), ("∠ABC", r"\angle ABC"),
            ("x∉A", r"x\notin A"), ("x→0", r"x\to 0"), ("A⊂B", r"A\subset B"), ("a⊥b", r"a\perp b"),
            ("¬p", r"\neg p"), ("a∣b", r"a\mid b"), ("∆", r"\Delta"), ("2•3", "6"), ("‒5", "-5"), ("—5", "-5"),
            ("5。", "5"), ("“5”", "5"), ("0.3̅", r"\frac13"), ("5¢", "5"),
        ],
        [],
    ),
    "functions without a backslash": (
        [
            ("sqrt(2+sqrt(3))", r"\sqrt{2+\sqrt3}"), (r"\sqrt(2+\sqrt3)", r"\sqrt{2+\sqrt3}"),
            ("arcsin(1/2)", r"\frac{\pi}{6}"), ("arctan(1)", r"\frac{\pi}{4}"), ("cbrt(2)", r"\sqrt[3]{2}"),
            ("abs(x)", "|x|"), ("[0, oo)", r"[0,\infty)"), ("(-infty, 5)", r"(-\infty,5)"), ("sinh(0)", "0"),
            ("ln(e)", "1"), ("(-oo, 3]", r"(-\infty,3]"), ("sqrt(3)/2", r"\frac{\sqrt3}{2}"), ("3*sqrt(2+1)", "3√3"),
        ],
        [],
    ),
    "exponents": (
        [
            ("2^0.5", r"\sqrt2"), (r"e^-\pi", r"e^{-\pi}"), ("4^0.5", "2"), ("4^{1.5}", "8"), ("x^0.5", r"\sqrt x"),
            ("2^-0.5", r"\frac{1}{\sqrt2}"),
        ],
        [],
    ),
    "bases in words": (
        [
            ("2516 (base 8)", "2516_8"), ("1101 (base two)", "1101_2"), ("FF_{16}", "ff_{16}"),
            (r"\text{FF}_{16}", "FF_{16}"), (r"2516_\text{eight}", "2516_8"), ("0xFF", "255"),
        ],
        [],
    ),
    "dates and times": (
        [
            ("30 October", "October 30"), ("Oct. 30", "October 30"), ("5:00 PM", r"5{:}00\text{ PM}"),
            ("5:00 p.m.", "5:00 PM"), ("July 4 1776", "July 4, 1776"),
        ],
        [
            ("5:00 AM", "5:00 p.m."), ("30 October", "31 October"), ("October 30", "30 November"),
        ],
    ),
    "powers of units, ordinals": (
        [
            ("5 cm^2", "5"), ("5 cm²", "5"), ("5 m^2", "5"), ("5^{th}", "5"), ("5 sq. units", "5"),
        ],
        [],
    ),
    "spellings of decimals": (
        [
            ("1_000", "1000"), (r"1{\,}000", "1000"), ("0.123 456", "0.123456"), ("1/3", r"33\frac13\%"),
            (r"0.{\overline{3}}", "1/3"), (r"0.\overline{ 3 }", "1/3"), (r"0{,}\overline{3}", "1/3"),
            ("0.333...", "1/3"), (r"0.333\ldots", "1/3"), ("10_000", "10000"), ("0.666...", "2/3"),
            (r"0.1666\ldots", "1/6"), ("0.142857142857142857...", "1/7"), (r"16\frac23\%", "1/6"),
        ],
        [],
    ),
    "more marks": (
        [
            (r"\hbox{5}", "5"), (r"\textcolor{red}5", "5"), (r"\mathop{5}", "5"), (r"\bbox[5px]{5}", "5"),
            (r"\framebox{5}", "5"), ("5\\\\", "5"), (r"5\tag{1}", "5"), (r"\begin{align*}5\end{align*}", "5"),
            ("***5***", "5"), ("<b>5</b>", "5"), (r"5 \qed", "5"), ("=> 5", "5"), (r"\left.5\right.", "5"),
            ("5\\", "5"), (r"\mbox{5}", "5"), (r"\colorbox{red}{5}", "5"), ("<strong>5</strong>", "5"), ("`5`", "5"),
            (r"\begin{aligned}5\end{aligned}", "5"), (r"\begin{gather*}5\end{gather*}", "5"),
            (r"5 \blacksquare", "5"), (r"\Rightarrow 5", "5"), ("→ 5", "5"), (r"\therefore 5", "5"),
            (r"5\quad", "5"), (r"5\\ ", "5"), ("5", "5"), (r"\{5\}", "5"), (r"\phantom{x}5", "5"),
            (r"\mathrm{5}", "5"), (r"5\,", "5"), (r"\;5", "5"), (r"\[5\]", "5"), (r"\(5\)", "5"),
            (r"5 \text{.}", "5"),
        ],
        [],
    ),
    "intervals and signs": (
        [
            ("[1;2]", "[1,2]"), ("(1,2)U(3,4)", r"(1,2)\cup(3,4)"),
            (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}"), (r"(\pm1,0)", "(1,0),(-1,0)"),
            (r"x\ne 3,4", r"x\ne 4,3"), ("-1<x<1", "(-1,1)"),
        ],
        [],
    ),
    "what stays": (
        [
            ("5 ft 3 in", r"5\text{ ft }3\text{ in}"), ("x^TAx", "x^TAx"), (r"y=-\frac{1}{2}x+\frac34", "2x+4y-3=0"),
            ("(a+bi)(a-bi)", "a^2+b^2"), ("2^10", "1024"), ("30 degrees", "30"), ("30 degrees", r"30^\circ"),
            ("1,234", "1234"), ("x^T", "x^T"), ("5 m^2", "5m^2"), ("12 m", "12"), ("1/2 hour", "1/2"),
            ("1 hour", "1"), (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
            ("(A)", "A"), (r"\text{(A)}", "A"), ("Tom's", "Tom's"), ("2.5^2", "6.25"), ("x^{2.0}", "x^2"),
            ("3 1/2", "7/2"), (r"[0,1)\cup(2,3]", r"[0,1)\cup(2,3]"), (r"\frac{\pi}{4}", "π/4"),
            ("10^{-3}", "0.001"), (r"1.5 \text{ million}", "1,500,000"), (r"x\in[0,1)", "[0,1)"),
            (r"\{1,2\}", "1,2"), (r"3\sqrt{2}\text{ cm}", r"3\sqrt2"), ("11:30 am", "11:30 a.m."),
            ("(1,2)", "(1, 2)"), (r"1 \text{ and } 2", "1,2"), ("x=1, y=2", "y=2, x=1"),
        ],
        [
            ("5 ft 3 in", "5 ft 4 in"), ("4 boys and 3 girls", "3 boys and 4 girls"), ("5_{pp}", "6"), ("A)", "B)"),
            ("5 July", "5 June"),
        ],
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


@pytest.mark.parametrize("noise", ["(", "{", "½", "1 ", "a ", "mod ", r"\frac{"])
@pytest.mark.parametrize("length", [390, 20_000])
def test_noise_is_wrong_at_once(noise, length):
    """Guards against seconds of computer algebra for repeated pieces, which an untrained generator writes."""
    assert grade((noise * length)[:length], "5", timeout=3.0) is False


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
