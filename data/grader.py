r"""Grading answers: what is settled here, and math-verify in a process that may die for the rest.

An answer passes three stations:

    1. `normalise`  one typesetting for each thing, by the table `STEPS`           60°  ->  60^\circ
    2. `compare`    equal strings, integers, choices, moduli and bases, exactly    2516_8  is not  2516_{10}
    3. the worker   fractions exactly, and what is left by math-verify, as precise
                    as the smallest number needs                                   (x+1)^2  is  x^2+2x+1

Run as a program, this file is the worker: it reads questions, a JSON list (prediction, reference, seconds) per line,
and answers each with true, false or null. It imports nothing but the standard library and math-verify (with its
SymPy), so that a worker starts fast wherever it is needed.

Decisions, where a grader could also decide otherwise:

- A unit is dropped, not converted: 5 g, 5 kg, 5 km/h and 5 dollars are all 5, because most references have no unit.
- A modulus, a base or a percent sign that only one side has is dropped too; if both have one, they must agree.
- Million and dozen are factors, not units. Of several quantities, such as 3 hours 20 minutes, all numbers count.
- Opposite words (am and pm, north and south, profit and loss) contradict each other if both answers have one.
- 1,1,2 is a list, not the set 1,2; 12,34,567 is three numbers. x=5 and a+b=5 are 5, but 2x+3y=5 is an equation.
- Of a predicted text, only the last LONGEST_QUESTION characters count.
- A capital letter is another symbol than its small one (R and r), but words are compared in any case, and a choice is
  correct in any case: (b) for (B). A word is what stands in \text, any run of four letters, and "Tom", yes, no.
  e is Euler's number; E is accepted for it where it is the whole answer; i and \pi are constants, I and \Pi are not.
- 3 1/2 is 3.5; 2*pi, exp(3) and \sqrt(5) are read as they are meant; \langle 1,2\rangle is (1,2); 5=x is x=5.
- A decimal number equals the number that it rounds if six significant digits agree: 0.333333 is 1/3, 0.333 is not.

Out of reach without computer algebra of our own: identities that math-verify's simplification misses, the branches of
roots and logarithms of quotients (taken as for positive numbers), equal angles or transposes with different names,
converting units, one congruence under two moduli, degrees against radians outside a function, and plain text whose
words math-verify takes for a number's unit.
"""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from functools import partial
from html import unescape
from inspect import signature
from itertools import product
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

# --------------------------------------------------------------------------- one typesetting for each thing

LONGEST_ANSWER = 400  # characters; what is longer is a text, as are four words with a number, and formulas among words
TEXT = re.compile(r"\\boxed|\n|\$.*\$|(?=.*\d)(?:(?<![\\a-zA-Z])[a-zA-Z]{2,}[^\\{}]*?){4}")

SYMBOLS = {
    "−": "-", "–": "-", "‐": "-", "‒": "-", "—": "-", "•": r"\cdot ", "“": "", "”": "", "。": ".", "¢": "",
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ", "⟨": "(", "⟩": ")", "∶": ":", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "′": "'", "’": "'", "…": r"\ldots ",
    "€": "", "£": "", "¥": "", "₹": "", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ",
    "ε": r"\epsilon ", "ζ": r"\zeta ", "η": r"\eta ", "θ": r"\theta ", "κ": r"\kappa ", "λ": r"\lambda ", "μ": r"\mu ",
    "ν": r"\nu ", "ξ": r"\xi ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ",
    "ϕ": r"\phi ", "χ": r"\chi ", "ψ": r"\psi ", "ω": r"\omega ", "Γ": r"\Gamma ", "∠": r"\angle ", "∉": r"\notin ",
    "→": r"\to ", "⊂": r"\subset ", "⊆": r"\subseteq ", "⊥": r"\perp ", "∥": r"\parallel ", "¬": r"\neg ",
    "∣": r"\mid ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "√": r"\sqrt ",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∆": r"\Delta ", "Δ": r"\Delta ", "Θ": r"\Theta ", "Λ": r"\Lambda ",
    "Σ": r"\Sigma ", "Φ": r"\Phi ", "Ω": r"\Omega ",
}  # fmt: skip
FORMATS = {chr(code): unicodedata.decomposition(chr(code)) for code in range(0x80, 0x3000)}  # ² is "<super> 0032"
SUPERSCRIPTS = re.compile("[" + "".join(one for one in FORMATS if FORMATS[one].startswith("<super>")) + "]+")
SUBSCRIPTS = re.compile("[" + "".join(one for one in FORMATS if FORMATS[one].startswith("<sub>")) + "]+")
VULGAR_FRACTIONS = re.compile("[¼½¾⅐-⅞]")  # one character each
ROOTS = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|[^\W\d_])")  # √10, where √(10) and √{10} keep their brackets
OVERLINED = re.compile("(?:\\d\u0305)+")  # 3̅


def from_unicode(text: str) -> str:
    r"""LaTeX for what is pasted as Unicode: 60° and x² become 60^\circ and x^{2}, １２ becomes 12, ½ and √10 become
    \frac{1}{2} and \sqrt{10}; characters without a width go."""
    if text.isascii():
        return text
    text = SUPERSCRIPTS.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run[0]) + "}", text)
    text = SUBSCRIPTS.sub(lambda run: "_{" + unicodedata.normalize("NFKC", run[0]) + "}", text)
    text = VULGAR_FRACTIONS.sub(write_fraction, text)
    text = OVERLINED.sub(lambda run: "\\overline{" + run[0].replace("\u0305", "") + "}", text)
    text = ROOTS.sub(r"\1{\2}", text)
    text = "".join(SYMBOLS.get(character, character) for character in text)
    text = "".join(SYMBOLS.get(character, character) for character in unicodedata.normalize("NFKC", text))
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def write_fraction(character: re.Match) -> str:
    r"""½ -> \frac{1}{2}: NFKC alone would make 31⁄2 of 3½."""
    above, _, below = unicodedata.normalize("NFKC", character[0]).partition("⁄")
    return f"\\frac{{{above}}}{{{below}}}"


MARK = re.compile(
    r"\\(?:colorbox ?(?:\[[^\]]*\])? ?\{[^{}]*\}|fcolorbox ?\{[^{}]*\} ?\{[^{}]*\}|uline|underline|underbar"
    r"|underbrace|overbrace|emph|f(?:rame)?box|hbox|mathop|bbox ?(?:\[[^\]]*\])?|math(?:bf|it|sf|tt)"
    r"|text(?:bf|it|sc|sl|tt|up|md)|boldsymbol|bm) ?(?=\{)|\\(?:text)?color ?(?:\[[^\]]*\])? ?\{[^{}]*\} ?"
)


def remove_marks(text: str) -> str:
    r"""Colour, underlining, bold and the like change no value: \textcolor{red}{5} -> 5, \underline{x} -> x."""
    while mark := MARK.search(text):
        before, behind = text[: mark.start()], text[mark.end() :]
        end = end_of_braces(behind)
        text = before + behind[1 : end - 1] + behind[end:] if end else before + behind
    return text


def end_of_braces(text: str) -> int:
    """The index behind the } that closes the { at the beginning; 0 if there is none."""
    depth = 0
    for index, brace in enumerate(text):
        depth += (brace == "{") - (brace == "}")
        if depth == 0:
            return index + 1 if index else 0
    return 0


def from_box(answer: str) -> str:
    r"""The content of the only \boxed{…}; several are left to math-verify."""
    behind = answer.partition("\\boxed")[2]
    end = end_of_braces(behind)
    if end == 0 or "\\boxed" in behind:
        return answer
    return behind[1 : end - 1].strip()


def write_repeating(decimal: re.Match) -> str:
    r"""A repeating decimal as its fraction: 0.1\overline{6} = (16 - 1) / 90.

    With a digits before the bar and b under it, 10^(a+b) x - 10^a x is an integer: the fraction's numerator.
    """
    whole, before = decimal["whole"], decimal["before"]
    repeated = re.sub(r"\D", "", decimal["repeated"])
    numerator = int(whole + before + repeated) - int("0" + whole + before)
    denominator = 10 ** len(before) * (10 ** len(repeated) - 1)
    return f"\\frac{{{numerator}}}{{{denominator}}}"


DEGREES = r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))"


def write_radians(call: re.Match) -> str:
    r"""math-verify ignores degrees, so in a function's argument they become radians: \sin 30^\circ ->
    \sin \frac{30\pi}{180}."""
    return re.sub(rf"(?:\{{([\d.]+)\}}|([\d.]+|[a-zA-Z])){DEGREES}", r"\\frac{\1\2\\pi}{180}", call[0])


WORD = re.compile(
    r"\\text\s*\{(?P<inside>[^{}]*)\}"
    r"|\\(?:begin|end|operatorname|math[a-z]+)\s*\*?\{[^{}]*\}|\\[A-Za-z]+"  # commands are no words
    r"|(?<![A-Za-z])(?P<plain>(?:[A-Za-z]{4,}|[A-Z][a-z]{2}|[Nn]o|[Yy]es)(?![A-Za-z])(?: (?!and\b|or\b)[A-Za-z]{2,})*)"
)


def write_word(word: re.Match) -> str:
    r"""east -> \text{east}, which is one symbol, where a bare east is the product of its letters."""
    inside = word["inside"]
    if inside is not None:
        if not re.search("[A-Za-z]", inside):
            return inside  # \text{5}
        if re.search("[A-Za-z]{2}", inside):  # the symbol \text{R} is not \text{r}
            inside = inside.lower()
        return "\\text{" + inside + "}"
    if word["plain"]:
        return "\\text{" + word["plain"].lower() + "}"
    return word[0]


NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
THIN = r"(?:\\[,;:!]|\{(?:,|\\[,;:!])\}|,\\!)"  # what is typeset between thousands
END = r"(?![a-zA-Z])"  # of a command
DIGITS = r"(?P<whole>\d{0,40})\.(?P<before>\d{0,40})"  # of a repeating decimal, before those that are repeated
FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\d|\{\d\}))?(?:\s|\\,)*"
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
# A step is what is found and what is put in its place, in this order: later steps rely on earlier ones.
STEPS: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"</?(?:b|i|em|strong|u)>|\\(?:tag|[hv]?phantom) ?\{[^{}]*\}|\\(?:begin|end) ?\{(?:align|equation|gather)(?:ed)?\*?\}", ""),
    (r"\\(?:qed|blacksquare)$|(?: ?\\)+$", ""),  # a line break at the end
    (r"&[gl]t;", lambda sign: unescape(sign[0])),
    (r"(?<!\\)\\ |~", " "),  # ties and control spaces
    (r"(?: |\\[,;:!])+$", ""),  # blanks at the end
    (r"\\(?:left|right) ?\.", ""),  # no bracket
    (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|bf|it|large|Large){END}(?: ?\.(?!\d))?", ""),
    (r"\\(?:text(?:normal|rm|sf)|mbox) ?(?=\{)", r"\\text"),
    (r"\{ ?\\rm ([^{}]*)\}", r"\\text{\1}"),  # {\rm m}
    (r"\\mathrm ?(?=\{ ?(?:[A-Z][a-z]{2,}|[a-z]{4,}|[Nn]o|[Yy]es) ?\})", r"\\text"),  # \mathrm{Yes}
    (r"_ ?\\text ?\{([^{}]*)\}", r"_{\1}"),  # x_\text{max}
    (r"\\[dtc](?=frac|binom)", r"\\"),
    (r"\\(frac|binom) ?([a-zA-Z\d]) ?([a-zA-Z\d])", r"\\\1{\2}{\3}"),  # \frac ab
    (rf"\\var(?=(?:phi|epsilon|theta|rho|sigma|pi|kappa){END})", r"\\"),  # \varphi
    (rf"\\mathbb ?([A-Z])|\\([RNZQC]){END}", r"\\mathbb{\1\2}"),  # \mathbb R, \R
    (rf"\\(?:c?dots[cbm]?){END}|\.\.\.", r"\\ldots "),
    (r"\\(?:(lbrace)|rbrace) ?", lambda brace: r"\{" if brace[1] else r"\}"),
    # numbers
    (r"(?<![\w.])0(?:x[\da-fA-F]{1,40}|b[01]{1,40})(?!\w)", lambda number: str(int(number[0], 0))),  # 0xFF
    (r"(?<=\d)_(?=\d{3}(?!\d))", ""),  # 1_000
    (r"\{ ?(\\overline ?\{[\d ]+\}) ?\}", r"\1"),  # 0.{\overline{3}}
    (r"(?<=\d)\{,\}(?=\\overline)", "."),  # 0{,}\overline{3}
    (rf"(?<![\d.])\d{{1,3}}(?:(?:{THIN} ?| )\d{{3}})+(?!\d)", lambda number: re.sub(r"\D", "", number[0])),  # 1 000
    (r"(?<=\.)\d{3}(?:\\,\d{1,3}| \d{3})+(?!\d)", lambda number: re.sub(r"\D", "", number[0])),  # 3.141\,592
    (DIGITS + r"(?P<repeated>\\dot ?\{?\d\}?\d{0,40}\\dot ?\{?\d\}?)", write_repeating),  # 0.\dot{1}4285\dot{7}
    (DIGITS + r"\\(?:overline|bar|dot) ?(?P<repeated>\d|\{ ?\d{1,40} ?\})", write_repeating),  # 0.1\overline{6}
    (DIGITS + r"\((?P<repeated>\d{1,40})\)(?! ?[\w(^])", write_repeating),  # 0.1(6)
    (r"(?P<whole>\d{0,40})\.(?P<before>\d{0,9}?)(?P<repeated>\d{1,9}?)(?P=repeated){2,40} ?\\ldots", write_repeating),
    (r"(?<![\d.^_/{])(\d+) (\d+)/(\d+)(?!\d)", r"(\1+\\frac{\2}{\3})"),  # 3 1/2
    (r" ?\*\* ?", "^"),  # 2**3
    (r"\^ ?([-+] ?(?:\d+(?:\.\d+)?|[a-zA-Z]|\\(?:pi|theta|alpha|beta|lambda)))", r"^{\1}"),  # 10^-2
    (r"\^ ?(\{)?(\d{1,9}\.\d{1,9})(?(1)\})", lambda exponent: f"^{{{Fraction(exponent[2])}}}"),  # 2^0.5
    (r"(?<=[\d}]) ?(\\text ?\{ ?)?(hundred|thousand|million|billion|trillion|dozen)s?(?![a-zA-Z])",
        lambda scale: f"\\times {SCALES[scale[2]]}" + (scale[1] or "")),  # 5\text{ million kg} -> 5\times 1000000\text{ kg}
    (r"(?<=\d)\^ ?\{ ?(?:\\text ?\{ ?)?(?:st|nd|rd|th) ?\}+", ""),  # 5^{th}
    (r"(?<![a-zA-Z])sq\. ?", "square "),
    (r" ?(?:\\text ?\{ ?)?(?<![a-zA-Z])(?:percent(?:age)?|pct)(?![a-zA-Z])(?: ?\})?|(?<!\\)%", r"\\%"),
    # names and brackets
    (r"(?<![\\a-zA-Z])(?<!name\{)(?<!rm\{)(?<!text\{)"
        r"(pi|sqrt|exp|ln|log|(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h)(?![a-zA-Z])", r"\\\1"),  # 2*pi
    (r"(?<![\\a-zA-Z])(?:infinity|infty|oo)(?![a-zA-Z])", r"\\infty"),
    (r"\\operatorname ?\{ ?(sin|cos|tan|ln|log) ?\}", r"\\\1"),
    (r"(?<![\\a-zA-Z])abs ?\(([^()]*)\)", r"|\1|"),
    (r"(?<![\\a-zA-Z])cbrt(?= ?\()", r"\\sqrt[3]"),
    (r"(\\sqrt(?:\[\d+\])?) ?\(([^()]*)\)", r"\1{\2}"),  # \sqrt(5)
    (r"(\\sqrt(?:\[\d+\])?) ?\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}"),  # \sqrt(2(3+1))
    (r"m?\\angle ?([A-Z]{3})(?![A-Za-z])",
        lambda angle: f"\\text{{angle {min(angle[1], angle[1][::-1])}}}"),  # CBA is ABC
    (r"(?<=[A-Za-df-z])\^ ?(?:\{ ?(?:T|\\top) ?\}|T|\\top)(?![a-zA-Z])", r"^{\\tau}"),  # A^T
    (r"\^ ?(?:\{ ?((?:\\prime ?)+)\}|(\\prime))", lambda primes: "'" * primes[0].count("prime")),
    (r"(?<=[a-zA-Z])'+(?![st]\b)", lambda primes: "_{" + "p" * len(primes[0]) + "}"),  # f'' -> f_{pp}
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    (r"^([\[(][^\[\]();,]*);([^\[\]();,]*[\])])$", r"\1,\2"),  # [1;2]
    (r"^\(([^()]*)\\pm([^()]*)\)$", r"(\1+\2), (\1-\2)"),  # (\pm 1,0)
    (r"^((?:[a-z] ?= ?)?)(\\frac\{[^,{}]*)\\pm([^,]*)$", r"\1\2+\3, \1\2-\3"),
    (r"\\exp ?\(([^()]*)\)", r"e^{\1}"),  # \exp(3)
    (rf"\\degree{END}", r"^\\circ "),
    (rf"\\lg{END}", r"\\log "),
    (rf"\\langle{END}", "("),
    (rf"\\rangle{END}", ")"),
    (rf"\\varnothing{END}|\\\{{ ?\\\}}", r"\\emptyset"),  # \{\}
    (r"(?<=[\d}]) ?(?:\\text ?\{ ?degrees? ?\}|degrees?(?![a-zA-Z]))", r"^\\circ "),  # 30 degrees
    (rf"(?<=\d)\^ ?(?:\{{ ?(?:\\(?:text|mathrm) ?\{{ ?)?o ?\}}+|o{END})", r"^\\circ "),  # 60^{\text{o}}
    (rf"{FUNCTION}(?:-? ?(?:{NUMBER}|[a-zA-Z]|\{{{NUMBER}\}}){DEGREES}"
        r"|\([^()]*\)|\{(?:[^{}]|\{[^{}]*\})*\})", write_radians),
    # relations, moduli and bases
    (r"(?<=[\d)])!=", "! ="),  # 5!=120
    (rf"\\(?:neq|not ?=){END}|(?<= )!=|<>", r"\\ne "),
    (r"(?<=\\ne )[^,=]*,[^=]*$", lambda list_: ", ".join(sorted(re.split(" ?, ?", list_[0].strip())))),  # x\ne 4,3
    (rf"\\(?:leq|leqslant){END}|<=", r"\\le "),
    (rf"\\(?:geq|geqslant){END}|>=", r"\\ge "),
    (rf"\\lt{END}", "<"),
    (rf"\\gt{END}", ">"),
    (r"\\equiv ?_ ?(?:\{ ?(\d+) ?\}|(\d)) ?(.*)$", r"=\3 \\pmod{\1\2}"),
    (r"^([a-z]) ?\\% ?(\d+) ?= ?(\d+)$", r"\1=\3 \\pmod{\2}"),
    (rf"\\equiv{END}", "="),
    (rf"^ ?(?:=>?|\\(?:implies|Rightarrow|to){END}|\\approx{END})", ""),  # = 5
    (rf"^(-?{NUMBER}|-?\\frac\{{\d+\}}\{{\d+\}}) ?= ?([a-zA-Z])$", r"\2=\1"),  # 5=x
    (r"\\text ?\{ ?(\(? ?mod(?:ulo)?(?![a-z])[^{}]*)\}", r"\1"),  # \text{(mod 7)}
    (r" ?(\()? ?(?:\\(?:operatorname|mathrm) ?\{ ?mod ?\}|\\[pb]?mod|(?<![a-zA-Z])mod(?:ulo)?)(?![a-zA-Z])"
        r"(?: |\\,)*(?:\{([^{}]*)\}|([\w^*+-]+)) ?(?(1)\))", r" \\pmod{\2\3}"),
    (r"(?<=[\dA-Z)])(?: |\\,)*\(?(?:\\text ?\{ ?(?:in )?base ?\}|(?:in )?base) ?(\d+|[a-z]+)\)?$",
        r"_{\1}"),  # 2516 base 8
    (r"(?<=[\dA-F])(?: |\\,)*\(?(?:\\text ?\{ ?)?(?:in )?(binary|octal|decimal|hexadecimal)(?: ?\})?\)?$", r"_{\1}"),
    (r"\\text ?\{ ?([0-9A-Fa-f]+) ?\}(?= ?_)", r"\1"),  # \text{FF}_{16}
    # words
    (rf"^(-?{NUMBER}) ?(?:km|cm|mi|miles|m|ft|feet) ?/ ?(?:hour|hr|h|second|sec|s|min)(?:\^\{{?2\}}?)?$", r"\1"),
    (r"\{:\}", ":"),  # 5{:}00
    (r"(?<=\d)(?: | ?\\text ?\{ ?)([aApP])\.?[mM]\.?(?: ?\})?(?![a-zA-Z])", r"\\text{\1m}"),  # 5 p.m.
    (WORD.pattern, write_word),
    (r"(\\text ?\{(?! ?I ?\})[^{}]*\})|\\text ?\{ ?I ?\}|(?<![a-zI\\])I(?![a-zI])",
        lambda part: part[1] or "\\iota "),  # math-verify would read the unit i
    # dates
    (rf"\b{MONTH}(?:uary|ruary|ch|il|e|y|ust|tember|t|ober|ember)?( ?\}})?\.?(?![a-z])", r"\1\2"),  # october -> oct
    (rf"(?<!\d)(\d{{1,2}})(?:st|nd|rd|th)? ?(?:of )?\\text ?\{{ ?{MONTH} ?\}}", r"\\text{\2} \1"),  # 30 oct
    (rf"({MONTH} ?\}}? ?\d{{1,2}}), ?(\d{{4}})(?!\d)", r"\1 \3"),  # july 4, 1776
]  # fmt: skip
COMPILED_STEPS = [(re.compile(pattern), replacement) for pattern, replacement in STEPS]


def is_text(answer: str) -> bool:
    """Is an answer only mentioned in it? Its numbers and formulas are then math-verify's to find."""
    return len(answer) > LONGEST_ANSWER or TEXT.search(answer) is not None


def normalise(answer: str) -> str:
    """The answer in one typesetting: without surrounding white space, marks and the full stop of a sentence. A text
    stays as it is, but for its box."""
    answer = re.sub(r"[^\S\n]+", " ", answer.strip())  # math-verify takes seconds for a long run of blanks
    answer = re.sub(r"^(\*{1,3}|__|`|\$\$?)([^$\n]+)\1$", r"\2", from_box(answer))
    if is_text(answer):
        return answer
    answer = remove_marks(from_unicode(answer))
    for pattern, replacement in COMPILED_STEPS:
        answer = pattern.sub(replacement, answer)
    return re.sub(r"(?<![.,;])[.,;]$", "", answer.strip()).strip()


# --------------------------------------------------------------------------- the asking side

WORKER = Path(__file__).resolve()
# Workers that wait for a question. They are kept because starting one imports computer algebra, which takes a second;
# they end with this process, whose end closes their stdin.
_idle: list[subprocess.Popen] = []

# Second readings, tried only where the answers differ as written: 2e-1 may also be about Euler's number, and many
# references leave a percent sign out.
READINGS = [
    (re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)e([+-]?\d{1,3})(?!\w)", re.IGNORECASE), r"\1 \\times 10^{\2}"),  # 4.5e33
    (re.compile(r"(\d+) ?\\frac ?\{(\d+)\}\{(\d+)\} ?\\%"), r"\\frac{\1+\\frac{\2}{\3}}{100}"),  # 33\frac13\%
    (re.compile(r" ?\\%"), ""),
    (re.compile(r"(?<=\d)(?: ?\\(?:text|mathrm) ?\{ ?| )(?:[kcdm]?m|in|ft|yd|mi) ?\}? ?\^ ?\{?[23]\}?$"), ""),  # 5 cm^2
]
EXACT_NUMBER = re.compile(
    r"(-?) ?(?:\\frac ?(?:\{(-?\d{1,400})\} ?\{(\d{1,400})\}|(\d)(\d))|(\d{0,400}(?:\.\d{0,400})?)(?: ?/ ?(\d{1,400}))?)"
    r"(?: ?(?:\\times|\\cdot) ?10 ?\^ ?(?:\{ ?([+-]?\d{1,3}) ?\}|(\d)))?"
)
ROUNDING = Fraction(1, 10**5)  # relative; numbers that differ by more do not round each other
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
CHOICE = re.compile(r"(?:\\text ?\{ ?)?(\(?)([A-Ea-e])\)? ?\}?")
LEADING_SIGN = re.compile(r" ?(?:<|>|\\[nlg]e(?![a-zA-Z]))")
MODULUS = re.compile(r" ?\\pmod\{([^{}]*)\}")
BASED = re.compile(  # 2516_8, (2516)_{\text{eight}}; A1_{16}, but not the entry A_{12} of a matrix
    r"(?<![\w}])\(?(\d[0-9A-Fa-f.]*|[A-Fa-f][0-9A-Fa-f]*(?=\)? ?_ ?\{ ?16))\)? ?_ ?"
    r"(?:\{ ?(?:\\text ?\{)? ?(?:base )?(\w+) ?\}? ?\}|(\d+))"
)
OPPOSITES = [
    ("left", "right"), ("more", "less|fewer"), ("above", "below"), ("incr", "decr"), ("loss", "profit|gain"),
    ("up", "down"), ("before", "after"), ("counterclock", "clock"), ("faster", "slower"), ("longer", "shorter"),
    ("older", "younger"), ("heavier", "lighter"), ("taller", "smaller|shorter"), ("positive", "negative"),
]  # fmt: skip
# What both answers have must be the same. A group that only one of two opposite words sets tells them apart.
CONTRADICTIONS = [
    MODULUS,
    re.compile("(?<![a-z])(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun)[a-z]*"),
    re.compile(r"(?<![a-zA-Z])(?:([aA])|[pP])\.?[mM](?![a-zA-Z])"),  # 5 am, 5 p.m.
    re.compile(r"_\{(p+)\}"),  # f'' and f'
    re.compile(r"(north|south|east|west)(?:ern)?( of)?"),
    *(re.compile(rf"\b(?:({one})|{other})") for one, other in OPPOSITES),
    re.compile(r"^[^=<>\d]*?\b(?:(and)|or)\b(?=[^=<>\d]*$)"),  # p and q, but not the roots 1 and 2
    re.compile(r"(?<=\d) ?(?:(')|\^ ?\{? ?\\circ)"),  # 5' is not 5°
    re.compile(r"^ ?(?:\\text\{ ?)?\(?([A-E])[.)][ }]"),  # A. 5
]
DROPPED_RELATION = re.compile(r"\\(gg|ll|gtrsim|lesssim|neg|lnot|nmid|notin|nless|ngtr|nsubset|nparallel|propto|not)")
LONE_NUMBER = re.compile(r"(?<![\w.^_{])\d{1,40}(?:\.\d{1,40})?(?![\d}])")
QUANTITY = re.compile(
    rf"({LONE_NUMBER.pattern}) ?"
    r"(?:\\text ?\{ ?(?!and\b|or\b)|(?<= )(?=(?:ft|in|[cmk]m|k?g|lb|oz|hr|min|sec)\b))([a-z]+)"
)
LONGEST_QUESTION = 2000  # characters at the end of a text: math-verify's time grows with their square
DEEPEST_NESTING = 50


def is_balanced(text: str) -> bool:
    """Are nearly all brackets closed? [0, 1) and A) pass; math-verify takes many seconds for dozens of open ones."""
    return abs(sum(map(text.count, "([{")) - sum(map(text.count, ")]}"))) < DEEPEST_NESTING


BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
    "eleven": "11", "twelve": "12", "sixteen": "16",
    "binary": "2", "octal": "8", "decimal": "10", "hexadecimal": "16",
}  # fmt: skip


def equal(prediction: str, reference: str, timeout: float) -> bool | None:
    """Is the prediction mathematically equal to the reference? None if unknown: out of time or memory, or crashed.

    An empty prediction is False. timeout: seconds of CPU time for a comparison; a number like 4.5e33 and a percent sign
    have a second reading each, with a comparison of its own. Raises ChildProcessError if the worker can't run.
    """
    pair = [normalise(prediction), normalise(reference)]
    pairs = [pair]
    for pattern, replacement in READINGS:
        other = [pattern.sub(replacement, answer) for answer in pair]
        if other != pair:
            pairs.append(other)
    is_unknown = False
    for one, other in pairs:
        verdict = compare(one, other, timeout)
        if verdict:
            return True
        is_unknown = is_unknown or verdict is None
    return None if is_unknown else False


def compare(prediction: str, reference: str, timeout: float) -> bool | None:
    """Compare two normalised answers. What math-verify would drop or confuse is settled before it is asked."""
    # 1. What is equal as it stands, and integers.
    if not prediction:
        return False
    if compact(prediction) == compact(reference):
        return True
    if INTEGER.fullmatch(prediction) and INTEGER.fullmatch(reference):
        return int(prediction) == int(reference)
    if not is_balanced(prediction + reference):
        return False
    same_number = compare_numbers(prediction, reference)
    if same_number is not None:
        return same_number
    # 2. Choices, and marks of a number that must agree.
    if is_text(prediction) or is_text(reference):
        if len(prediction) > LONGEST_QUESTION >= len(reference):
            prediction = prediction[-LONGEST_QUESTION:].partition(" ")[2] or prediction
        return ask(prediction, reference, timeout)
    verdict = compare_choices(prediction, reference)
    if verdict is None:
        verdict = contradict(prediction, reference)
    if verdict is not None:
        return verdict

    # 3. Write out what math-verify would drop, and drop what only one answer has.
    prediction, reference = drop_moduli(prediction, reference)
    question = [add_left_side(prediction, reference), add_left_side(reference, prediction)]
    prediction, reference = [BASED.sub(lambda numeral: numeral[1].lower(), answer) for answer in question]
    return ask(prediction, reference, timeout)


def compact(answer: str) -> str:
    r"""Without \text and without blanks, but for those between digits: \text{october } 30 -> october30."""
    answer = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"(?<!\d) | (?!\d)", "", answer)


def compare_choices(prediction: str, reference: str) -> bool | None:
    """True if both are the same choice (A) to (E), in any case if one is in parentheses or the reference is a capital;
    else None."""
    given, right = CHOICE.fullmatch(prediction), CHOICE.fullmatch(reference)
    if not given or not right or given[2].upper() != right[2].upper():
        return None
    return True if given[1] or right[1] or right[2].isupper() else None


def contradict(prediction: str, reference: str) -> bool | None:
    r"""False if both have marks of one kind, such as moduli, numerals like 2516_8 or dates, and these differ, or if
    they have other quantities, as in 3 hours 20 minutes; else None."""
    pair = (prediction, reference)
    numerals = [sorted(map(read_numeral, BASED.finditer(answer))) for answer in pair]
    marks = [numerals] + [[sorted(pattern.findall(answer)) for answer in pair] for pattern in CONTRADICTIONS]
    if any(one and other and one != other for one, other in marks):
        return False
    relations = [sorted(DROPPED_RELATION.findall(answer)) for answer in pair]
    if relations[0] != relations[1]:
        return False
    lists = [sorted(re.split(" ?, ?", answer)) for answer in pair]
    is_plain = not re.search(r"[(\[]|\\\{", prediction + reference)
    if is_plain and set(lists[0]) == set(lists[1]) and lists[0] != lists[1]:
        return False  # 1,1,2 is not 1,2, where \{1,1,2\} is \{1,2\}
    return compare_quantities(prediction, reference)


def compare_quantities(prediction: str, reference: str) -> bool | None:
    """False if one has several quantities and the other not the same numbers; True if they are equal and there are no
    signs or brackets; else None: 3 boys and 4 girls are 4 girls and 3 boys, not 4 boys and 3 girls, nor 5."""
    pair = (prediction, reference)
    quantities = [sorted((unit, Fraction(number)) for number, unit in QUANTITY.findall(answer)) for answer in pair]
    if max(map(len, quantities)) < 2:
        return None
    units = [[unit for unit, _ in parts] for parts in quantities]
    if units[0] == units[1] and quantities[0] != quantities[1]:
        return False
    if quantities[0] == quantities[1] and not re.search(r"[-+*/^=<>(\[]|\\(?!text)", prediction + reference):
        return True
    numbers = [sorted(map(Fraction, LONE_NUMBER.findall(answer))) for answer in pair]
    return None if numbers[0] == numbers[1] else False


def compare_numbers(prediction: str, reference: str) -> bool | None:
    """Compare two plain numbers as fractions. None if one is something else, or a decimal that may round the other."""
    one, other = read_number(prediction), read_number(reference)
    if one is None or other is None:
        return None
    if one == other:
        return True
    if "." in prediction + reference and abs(one - other) <= ROUNDING * max(abs(one), abs(other)):
        return None
    return False


def read_number(answer: str) -> Fraction | None:
    r"""An integer, a decimal, a fraction (a/b, \frac{a}{b}) or one of these times a power of ten; else None."""
    match = EXACT_NUMBER.fullmatch(answer)
    if match is None:
        return None
    sign, above, below, above_digit, below_digit, number, divisor, exponent, exponent_digit = match.groups()
    numerator = above or above_digit or number
    denominator = Fraction(below or below_digit or divisor or 1)
    if numerator in ("", ".") or denominator == 0:
        return None
    value = Fraction(numerator) / denominator * Fraction(10) ** int(exponent or exponent_digit or 0)
    return -value if sign else value


def read_numeral(numeral: re.Match) -> tuple[str, str]:
    """(digits, base): ("2516", "8"), also for 2516 in base eight."""
    base = numeral[2] or numeral[3]
    return numeral[1].lower().lstrip("0"), BASES.get(base, base)


def drop_moduli(prediction: str, reference: str) -> tuple[str, str]:
    r"""Residues in place of congruences, between 0 and the modulus: x = 8 \pmod{5} -> x = 3."""
    moduli = MODULUS.findall(prediction) or MODULUS.findall(reference)
    if not moduli:
        return prediction, reference
    answers = [MODULUS.sub("", answer) for answer in (prediction, reference)]
    if len(moduli) == 1 and re.fullmatch(r"0*[1-9]\d{0,17}", moduli[0]):
        answers = [reduce_residues(answer, int(moduli[0])) for answer in answers]
    return answers[0], answers[1]


def reduce_residues(answer: str, modulus: int) -> str:
    """x = 8, 11 -> x = 1, 3 for modulus 5; anything but integers stays as it is."""
    left, sign, right = answer.rpartition("=")
    residues = re.split(r"\\text\{ ?(?:or|and) ?\}|,|\bor\b|\band\b", right)
    if not all(re.fullmatch(r" *-?\d{1,18} *", residue) for residue in residues):
        return answer
    reduced = sorted({int(residue) % modulus for residue in residues})
    return left + sign + ", ".join(map(str, reduced))


def add_left_side(answer: str, other: str) -> str:
    """> 5 -> x > 5, with the left side of the other answer if it has one; math-verify would read 5."""
    if not LEADING_SIGN.match(answer):
        return answer
    left = re.match(r"([^<>=\\]+?) ?(?:<|>|\\[nlg]e(?![a-zA-Z]))", other)
    return (left[1] if left else "x") + answer


def ask(prediction: str, reference: str, timeout: float) -> bool | None:
    """The verdict of an idle worker, or of a new one if all are busy. A worker that was killed from outside is
    replaced; if that happens twice, the question may be why (the system ran out of memory), and the verdict is
    unknown."""
    question = json.dumps([prediction, reference, timeout])
    try:
        worker = _idle.pop()  # atomic: threads that ask at the same time get different workers
    except IndexError:
        worker = start_worker()
    for is_last in (False, True):
        try:
            print(question, file=worker.stdin, flush=True)
            verdict = json.loads(worker.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            status = worker.wait()
            if status >= 0:
                advice = "is math-verify installed?"
                raise ChildProcessError(f"the grading worker ended with status {status}; {advice}") from None
            if not is_last:
                worker = start_worker()
        else:
            _idle.append(worker)
            return verdict
    return None


def start_worker() -> subprocess.Popen:
    """Start this file as a program that finds the same libraries but nothing of the user's: isolated (-I), in the root
    directory, with this process's search path behind the standard library, less the current directory and this one."""
    ours = {Path.cwd(), WORKER.parent, WORKER.parents[1]}
    libraries = [place for place in sys.path if place and Path(place).resolve() not in ours]
    return subprocess.Popen(
        [sys.executable, "-I", WORKER, *libraries],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd="/",
    )


# --------------------------------------------------------------------------- the worker

# Computer algebra can hang, or fill the memory, inside C code that no Python exception reaches. So each answer is
# graded in a forked child under an alarm that kills it. The parent keeps the imported library: a death costs a fork,
# not an import. The alarm counts CPU time (with a clock behind it), so a busy machine doesn't change verdicts.
# math-verify's own time limits are off, because they return False rather than "unknown".

DECIMAL_PLACES = 6  # to which decimals are compared; for numbers below 0.1, significant digits
EXACT_PLACES = 15  # likewise, for numbers that are not decimals


def judge(prediction: str, reference: str) -> bool | None:
    """Is the prediction equal to the reference, as math-verify reads them? None if memory or stack ran out.

    Any other exception from a comparison means that the two can't be compared, such as a number and the 1/0 that 2:00
    is read as. So they are not equal.
    """
    from math_verify import parse  # only the worker has it

    # math-verify looks for a box first, and gives all readings of the string.
    answers = [text if "\\boxed" in text else "\\boxed{" + text + "}" for text in (reference, prediction)]
    readings = [parse(answer, parsing_timeout=None) for answer in answers]
    exhausted = False
    for gold, answer in product(*readings):
        try:
            equal = same_value(gold, answer)
        except (MemoryError, RecursionError):
            equal, exhausted = False, True
        except Exception:  # of SymPy: what can't be compared isn't equal
            equal = False
        if equal:
            return True
    return None if exhausted else False


def same_value(gold: object, answer: object) -> bool:
    """math-verify's verdict on two of its readings (SymPy objects, or strings that it couldn't read), and more."""
    import math_verify
    from math_verify.parser import sympy

    if isinstance(gold, sympy.Symbol) and isinstance(answer, sympy.Symbol):  # math-verify takes T_1 for t_1
        return gold.name == answer.name
    both_unequal = isinstance(gold, sympy.Ne) and isinstance(answer, sympy.Ne)
    if both_unequal:  # math-verify compares x = 3 with x = 4, but not x \ne 3 with x \ne 4
        gold = sympy.Eq(*gold.args, evaluate=False)
        answer = sympy.Eq(*answer.args, evaluate=False)
    gold, answer = value_of(gold), value_of(answer)
    if gold is None or answer is None:
        return False
    for one, other in ((gold, answer), (answer, gold)):
        if is_equation(one) and isinstance(other, sympy.Expr):
            return False
    # Its places are behind the decimal point, so all numbers below 10^-15 would be equal.
    zeros = max(leading_zeros(gold), leading_zeros(answer))
    places = {"float_rounding": DECIMAL_PLACES + zeros, "numeric_precision": EXACT_PLACES + zeros}
    options = {**places, "allow_set_relation_comp": True, "timeout_seconds": None, "raise_on_error": True}
    if math_verify.verify(gold, answer, **options):
        return True
    if not isinstance(gold, sympy.Basic) or not isinstance(answer, sympy.Basic):
        return False
    for rewrite in (split_quotients, write_imaginary):
        pair = (rewrite(gold), rewrite(answer))
        if pair != (gold, answer) and math_verify.verify(*pair, **options):
            return True
    return False


def is_equation(reading) -> bool:
    """Is it an equation such as 2x+3y=5, which is not 5? x=5, f(2)=5 and a+b=5 only name a value."""
    from math_verify.parser import sympy

    if not isinstance(reading, sympy.Eq) or isinstance(reading.lhs, sympy.Function):
        return False
    return bool(reading.lhs.atoms(sympy.Integer) - {sympy.S.NegativeOne})


def write_imaginary(reading):
    """(1+i)^2 -> 2i: math-verify reads i as a symbol."""
    from math_verify.parser import sympy

    reading = reading.subs({symbol: sympy.I for symbol in reading.free_symbols if symbol.name == "i"})
    if not reading.has(sympy.I):
        return reading
    reading = reading.doit()
    return sympy.expand_complex(reading) if reading.is_number else reading


def value_of(reading):
    """The right side of an equation of numbers, such as 2+3=5, and None if it is false, because math-verify would take
    7=5 for 5. Anything else is its own value. 22/7 = 3.14 is meant as an approximation, and passes."""
    from math_verify.parser import sympy

    equations = [reading]
    if isinstance(reading, sympy.And):  # a = b = c is read as two equations
        equations = getattr(reading, "_unsorted_args", reading.args)
    is_of_numbers = True
    for equation in equations:
        if not isinstance(equation, sympy.Eq):
            return reading
        if not equation.lhs.is_number or not equation.rhs.is_number:
            is_of_numbers = False
            continue
        left = equation.lhs.evalf()
        right = equation.rhs.evalf()
        tolerance = 1e-2 if equation.has(sympy.Float) else 1e-12
        if abs(left - right) > tolerance * abs(right):
            return None
    return equations[-1].rhs if is_of_numbers else reading


def leading_zeros(reading: object) -> int:
    """Zeros behind the decimal point of the smallest number in it: 18 for 2.88 * 10^-19; 0 for 0.3, 5 and x."""
    from math_verify.parser import sympy

    if isinstance(reading, sympy.MatrixBase):
        reading = sympy.Tuple(*reading.flat())
    if not isinstance(reading, sympy.Basic):
        return 0
    zeros = 0
    parts = sympy.preorder_traversal(reading)
    for part in parts:
        if isinstance(part, sympy.UnevaluatedExpr):  # the 1/100 of a percent sign
            parts.skip()
        elif isinstance(part, (sympy.Number, sympy.Pow, sympy.exp)) and part.is_number and not part.is_Integer:
            size = abs(part.evalf(3))
            if 0 < size < 0.1:
                exponent = sympy.floor(sympy.log(size, 10).evalf())  # -19
                zeros = max(zeros, -int(exponent) - 1)
    return zeros


def split_quotients(reading):
    r"""\sqrt{a/b} -> \sqrt{a}/\sqrt{b} and \ln(a/b) -> \ln a - \ln b, as for positive a and b; products, too."""
    from math_verify.parser import sympy

    def can_split(part) -> bool:
        if isinstance(part, sympy.Pow) and not part.exp.is_integer:
            return isinstance(part.base, (sympy.Mul, sympy.Pow))
        return isinstance(part, sympy.log) and isinstance(part.args[0], (sympy.Mul, sympy.Pow))

    def split_root(part):
        if isinstance(part, sympy.log):
            return part
        numerator, denominator = sympy.fraction(part.base)
        return sympy.Pow(numerator, part.exp) / sympy.Pow(denominator, part.exp)

    if not reading.free_symbols or not any(map(can_split, reading.atoms(sympy.Pow, sympy.log))):
        return reading
    split = reading.replace(can_split, split_root)
    return sympy.expand_log(sympy.expand_power_base(split, force=True), force=True)


def keep_capitals() -> None:
    """Have math-verify tell R from r. `parse` has no argument for it, so its converter gets another default."""
    import math_verify.parser as parser

    config = signature(parser.latex2sympy).parameters["conversion_config"].default
    parser.latex2sympy = partial(parser.latex2sympy, conversion_config=replace(config, lowercase_symbols=False))


def set_alarms(seconds: float) -> None:
    """Have this process killed after `seconds` of CPU time or four times as many by the clock; 0 cancels both."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)


class Child(NamedTuple):
    """A forked process that judges, and the pipe to it."""

    pid: int
    pipe: Connection


def fork_child() -> Child:
    """Start a process that answers questions, each under its alarms, until this process ends."""
    ours, theirs = Pipe()
    pid = os.fork()
    if pid > 0:
        theirs.close()
        return Child(pid, ours)
    ours.close()
    os.dup2(2, 1)  # whatever the library prints is no reply
    with suppress(EOFError):  # the worker has ended
        while True:
            prediction, reference, timeout = json.loads(theirs.recv_bytes())
            set_alarms(timeout)
            verdict = judge(prediction, reference)
            set_alarms(0)
            theirs.send_bytes(json.dumps(verdict).encode())
    os._exit(0)


def serve() -> None:
    """Answer the questions on stdin until it is closed, each with exactly one line: a reply too many or too few would
    give all later verdicts to the wrong questions."""
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    keep_capitals()
    judge(r"\frac{1}{2}", "0.5")  # fills the library's caches, which every child inherits
    child = fork_child()
    for question in iter(sys.stdin.readline, ""):
        if os.waitpid(child.pid, os.WNOHANG) != (0, 0):  # killed from outside while it waited
            child = fork_child()
        try:
            child.pipe.send_bytes(question.encode())
            reply = child.pipe.recv_bytes().decode()
        except (EOFError, OSError):  # the question killed it
            os.waitpid(child.pid, 0)
            child = fork_child()
            reply = "null"
        print(reply, flush=True)


if __name__ == "__main__":
    sys.path += sys.argv[1:]  # see start_worker
    serve()
