"""Reading what models write: steps, boxes, answers, thoughts, judgements, in many a form. `generate.py` and `verify.py`
have the one form that they are asked for.

A policy answers `<think><step>…</step></think><answer>\\boxed{…}</answer>`, an instruct model "Step 1: … Answer: …", a
reasoning generator whatever it likes. All that tells these apart is here, with the reasons; whoever reads the stages
needs to know `split_steps` and `extract_answer`, and nothing else of it. No tokens: those are in `chat.py`.
"""

import re
import unicodedata
from itertools import accumulate

# The tags of this format. A tokenizer may call some of them special tokens; here they are always text.
TAGS = ("<think>", "</think>", "<step>", "</step>", "<answer>", "</answer>")
# In these patterns each run of blanks is matched by exactly one character class; overlapping classes backtrack
# quadratically.
# "<step>2 + 3 = 5</step>" and "<step id=1>2 + 3 = 5</step>". (?:(?!<step\b).)*? is text in which no other <step> opens,
# so of nested tags the innermost pair matches.
STEP_TAG = re.compile(r"<step(?:\s[^<>]*)?>((?:(?!<step\b).)*?)</step>", re.DOTALL)
# "<answer>5</answer>", or cut off
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
# What stands before and behind the word of a heading: signs, a list's number, and commands of LaTeX and HTML, as in
# "✅ **Step", "1. \textbf{Step", "<b>Step"; "**:", "}:", "</b>:".
OPENING = r"(?:\\[a-z]+\*?[{ ]|</?[a-z]+\d?>|[^\w\n]|_)*"
OPENING = rf"{OPENING}(?:\d+[.)]{OPENING})?"
CLOSING = r"(?:[^\S\n]|[*_\]}]|</[a-z]+\d?>)*"
# "Step 2: ", "**Step 2:** ", "Step #2) ", "> Step 2 of 3 - ", "### Step 2" alone on its line, and the "Step 2" of
# "Step 2 (add): ", whose title belongs to the text. "Step 2.1: " is part of a step, "Step 2.5 m" and "Step 2 - 1 = 1"
# are numbers.
STEP_HEADING = re.compile(
    rf"""^{OPENING} Step (?:[^\w\n.,:;!?]|_)* (?:No\.?[^\S\n]*)? (\d+) (?:[ \t]*(?:of|/)[ \t]*\d+)?
    (?: {CLOSING} (?:[:：)）\]、]|[.．](?!\d)) (?:[*_:\]}}]|</[a-z]+\d?>)* [ \t]*
      | [ \t]+ (?: — | [–-] (?=[ \t]+[^\W\d_]|[ \t]+[*_$]) ) [ \t]+
      | (?= [ \t]* \([^()\n]*\) {CLOSING} (?:[:：]|$) )
      | {CLOSING} \#* $ )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# "Answer: 5", "**Final answer:** 5", "1. The answer: 5", "(Answer: 5)", and "### Answer" alone on its line. Not "the
# answer: 5", which is the end of a sentence.
ANSWER_LINE = re.compile(
    rf"^{OPENING}(?:(?-i:The)[ \t]+)?(?:final[^\S\n]+)?answer{CLOSING}#*(?:[:：](.*))?$", re.MULTILINE | re.IGNORECASE
)
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# "---" below a blank line, where it isn't part of a long addition
RULE = re.compile(
    r"(\A|\n[^\S\n]*\n)[ \t]*(?:([-*_=~—–─━═])(?:[ \t]*\2){2,}|(?:\\noindent)?\\h?(?:rule|line)\b.*|<hr ?/?>)[ \t]*(?=\n|\Z)"
)
# "**" or "__" at the beginning or the end of a word, but not in 2**3; and tags of HTML
EMPHASIS = re.compile(
    r"(?<!\S)(?:\*\*|__)(?=\S)|(?<=\S)(?:\*\*|__)(?=[\s.,;:!?%°)\]}]|$)|</?(?:b|i|u|em|strong|p|h\d)>", re.IGNORECASE
)
# A line that an answer is not on: nothing, or the opening of a formula.
NO_VALUE = re.compile(r"(?:\$\$?|\\[\[(]|\\begin\{[a-z]+\*?\})?")
# A line that shows something
LINE = re.compile(r"^(?!\\(?:begin|end)\b).*\w", re.MULTILINE)
# How other reasoning generators tag their thoughts
THOUGHT_TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def tagged_steps(text: str) -> list[str]:
    """The contents of the step tags that aren't empty; none if the tags are only mentioned, "<step>...</step>"."""
    steps = [step.strip() for step in STEP_TAG.findall(text)]
    if all(step.strip(".…") == "" for step in steps):
        return []
    return [step for step in steps if step]


def split_thoughts(text: str) -> tuple[str, str]:
    """(what a reasoning generator thought, the solution that it wrote then).

    A thought begins with `<think>`, or with the text where the chat template has opened it, and ends with `</think>`,
    or with the text where it was cut off: then it is nothing but drafts. Not a thought is what stands before a bare
    `<answer>`: a policy that reasons inside `<think>` without `<step>` tags has no other steps.
    """
    text = THOUGHT_TAG.sub(r"<\1think>", text)
    if "</think>" in text.partition("<think>")[0]:
        text = "<think>" + text
    thoughts, solution = "", ""
    for part in text.split("</think>"):
        before, _, thought = part.partition("<think>")
        solution += before
        thoughts += thought
    if "<answer>" in solution and not ANSWER_TAG.sub("", solution).strip():
        return "", text
    return thoughts, solution


def find_answer_line(text: str) -> re.Match | None:
    """The last match of `ANSWER_LINE`. A heading at the top with several lines below it doesn't count: it introduces
    the solution."""
    top = len(text) - len(text.lstrip())
    last = None
    for match in ANSWER_LINE.finditer(text):
        introduces = match.start() <= top and not read_value(match.group(1))
        if not introduces or len(LINE.findall(text, match.end())) < 2:
            last = match
    return last


def read_value(rest_of_line: str | None) -> str:
    """What an answer line says: "**5**." -> "5.", "} 5" -> "5"."""
    value = EMPHASIS.sub("", rest_of_line or "").strip("*_` \t\r")
    stop = ""
    if value.endswith((".", ",", ";")):  # "*5*." is "5*." by now
        stop = value[-1]
        value = value[:-1].rstrip("*_` ")
    # What "\textbf{Answer:} 5" and "(Answer: 5)" opened is closed here. A half-open interval stays.
    for opening, closing in ("{}", "()"):
        if value.count(closing) > value.count(opening) and not re.search(r"[\[\]]", value):
            value = value[1:] if value[0] == closing else value.removesuffix(closing)
    return value.strip() + stop


def cut_answer(text: str) -> str:
    """The text without its answer: the last answer line with the rest of its paragraph or, if the line is only a
    heading, with all that follows. Steps that follow stay."""
    line = find_answer_line(text)
    if line is None:
        return text
    end = len(text)
    stops = [STEP_HEADING.search(text, line.end())]
    if read_value(line.group(1)):
        stops.append(BLANK_LINE.search(text, line.end()))
    for stop in stops:
        if stop is not None:
            end = min(end, stop.start())
    return text[: line.start()] + text[end:]


def split_steps(text: str) -> list[str]:
    """The reasoning steps of a solution, in order, without the final answer.

    Three layouts: `<step>…</step>` (the policy's format; contents kept verbatim), "Step 1: …" headings (instruct
    models; headings removed), and paragraphs separated by blank lines (the fallback, and before a first heading that is
    not Step 1). Empty steps are dropped, and so are the thoughts of a reasoning generator, see `split_thoughts`.

    Headings are read in English, as the prompts are. A sub-step ("Step 2.1:") stays in its step. A blank line separates
    paragraphs wherever it stands, in display mathematics or code, too: nothing is lost by that, and an environment that
    is never closed can't swallow the other steps. A `<step>` that is never closed opens a paragraph.
    """
    tagged = tagged_steps(text)
    if tagged:
        return tagged

    # No steps in tags. What is left of tags are mentions, and some that don't close.
    _, body = split_thoughts(text)
    body = ANSWER_TAG.sub("", STEP_TAG.sub("", body))
    body = re.sub(r"<step\b[^<>]*>", "\n\n", body)
    body = re.sub("|".join(TAGS), "", body)
    body = re.sub(r"\r\n?", "\n", body)
    body = cut_answer(RULE.sub(r"\1", body))

    # "Now. Step 1: a Step 2: b" is split into "Now. ", "1", "a ", "2", "b".
    before, *rest = STEP_HEADING.split(body)
    numbers = rest[0::2]
    steps = rest[1::2]
    starts_at_step_1 = bool(numbers) and numbers[0].lstrip("0０") in ("1", "１")  # int() refuses thousands of digits
    if starts_at_step_1:
        steps[0] = before + steps[0]  # an introduction belongs to the first step
    else:
        steps = BLANK_LINE.split(before) + steps
    return [step.strip() for step in steps if step.strip()]


def find_boxes(text: str) -> list[tuple[int, int]]:
    r"""(start, end) of the contents of each closed `\boxed{…}`, by start. Braces nest; `\{` and `\}` don't count."""
    boxes = []
    open_braces = []  # for each: where its contents start, and whether it belongs to a box
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, flags=re.DOTALL):
        token = match.group()
        if token.startswith("\\boxed"):
            open_braces.append((match.end(), True))
        elif token == "{":
            open_braces.append((match.end(), False))
        elif token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box:
                boxes.append((start, match.start()))
    return sorted(boxes)  # by start: a box inside another one was closed first


def unwrap_boxes(text: str) -> str:
    r"""Replace each closed `\boxed{x}` by x."""
    wrappers = []  # (start, end) of each `\boxed{` and of its closing brace: (0, 7) and (8, 9) in `\boxed{7}`
    for start, end in find_boxes(text):
        wrappers.append((text.rindex("\\boxed", 0, start), start))
        wrappers.append((end, end + 1))
    kept = []
    position = 0
    for start, end in sorted(wrappers):
        kept.append(text[position:start])
        position = end
    kept.append(text[position:])
    return "".join(kept)


STRAY_TAG = re.compile(r"</?(?:step|think)\b[^<>]*>|^\s*<steps>|</steps>", re.IGNORECASE)


def unwrap_step(step: str) -> str:
    """A step to be put in tags: without boxes, because instruct models often box the answer in the last step, too, and
    without tags that were not closed, or had an attribute."""
    return STRAY_TAG.sub("", unwrap_boxes(step)).strip()


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last closed `\boxed{…}`, else the contents of the last `<answer>` tag, else the last
    "Answer: …" line or the line below such a heading; None if missing or empty. Thoughts aren't read.

    The last box counts even if it is empty or only mentioned: an answer that can be chosen isn't final. TeX's `\boxed
    73` boxes a single digit, `\\boxed{73}` is a line break and a word, and "#### 73" is a heading: none of them is
    read.
    """
    if not tagged_steps(text):
        _, text = split_thoughts(text)
    boxes = find_boxes(text)
    if boxes:
        start, end = boxes[-1]
        return text[start:end].strip() or None
    tags = [match.group(1).strip(" \t\r\n.…") for match in ANSWER_TAG.finditer(text)]
    if tags and "\\boxed" not in tags[-1]:  # a box without its closing brace isn't an answer
        return tags[-1] or None
    line = find_answer_line(text)
    if line is None:
        return None
    value = read_value(line.group(1))
    below = iter(text[line.end() :].split("\n"))
    while NO_VALUE.fullmatch(value):
        next_line = next(below, None)
        if next_line is None or STEP_HEADING.match(next_line):
            return None
        value = read_value(next_line)
    return value


# Commands and characters that set nothing: spaces of TeX, what has a length, a colour or an invisible argument, and
# commands around text.
INVISIBLE = re.compile(
    r"\\(?:[hv]?phantom\s*\{(?:[^{}]|\{[^{}]*\})*\}|(?:[hv]space\*?|(?:text)?color|colorbox)\s*(?:\[[^\[\]]*\])?\{[^{}]*\}"
    r"|(?:left|right|[bB]igg?[lrm]?)\s*\.|[hv]?phantom|(?:text|math|mbox|hbox|fbox|boxed|operatorname)[a-z]*"
    r"|hskip ?[\d.]+ ?[a-z]{2}|(?:emph|(?:und|ov)erline|boldsymbol|bm|smash|[lL]arge|small|bf|it|rm|q?quad|(?:display|script|scriptscript)style|(?:neg)?(?:thin|med|thick)space"
    r"|ensp(?:ace)|enskip|space|nobreakspace|strut|null|relax|hfill)(?![a-zA-Z])|[,;:!> \\-])|[{}$~]|&nbsp;"
)
# Letters and symbols without ink: Braille's blank, Hangul's fillers
INKLESS = "\u2800\u3164\u115f\u1160\uffa0"


def visible(text: str) -> str:
    """The text with a blank in place of each character that shows nothing."""
    text = INVISIBLE.sub(lambda match: " " * len(match[0]), text)
    # Categories C, M and Z: control and format characters, marks (which stand on what is visible), separators.
    return "".join(" " if unicodedata.category(c)[0] in "CMZ" or c in INKLESS else c for c in text)


def states_value(answer: str | None) -> bool:
    r"""Whether an answer states anything: a letter, digit or symbol, or `\{\}`. "?", "..." and what is invisible
    don't."""
    return any(unicodedata.category(character)[0] in "LNS" or character == "\\" for character in visible(answer or ""))


def count_empty_boxes(response: str) -> int:
    r"""How many closed boxes show nothing, as `\boxed{}`, `\boxed{\text{ }}`, or one with a zero-width space. Under
    `paper` such a response is valid, as in the paper."""
    shown_before = [0, *accumulate(character != " " for character in visible(response))]  # each index
    return sum(shown_before[start] == shown_before[end] for start, end in find_boxes(response))


# What else of a judge's prompt and of its reply begins a line
JUDGE_LINE = re.compile(
    rf"{OPENING}(?:student\W+solution\W*:|(?:final\W+)?verification\W*is\s+the\s+answer\s+correct)", re.IGNORECASE
)


def has_layout_line(step: str) -> bool:
    """Whether a line of a step begins as a line of `render_steps` does, "Step 3:" or "Answer:", or as the judge's own.
    The judge would take it for one. Lines end wherever a reader may see them end, at a carriage return or U+2028, too;
    letters are what they look like, full-width ones and those with a zero-width space between them, too."""
    shown = re.sub("[\u00ad\u200b-\u200f\u2060\ufeff]", "", unicodedata.normalize("NFKC", step))
    for line in shown.splitlines():
        if STEP_HEADING.match(line) or ANSWER_LINE.match(line) or JUDGE_LINE.match(line):
            return True
    return False


def hidden_text(response: str) -> str:
    """What a judge isn't shown of a response: where there are step tags, the text outside of steps and answer, else the
    thoughts."""
    if not tagged_steps(response):
        thoughts, _ = split_thoughts(response)
        return thoughts.strip()
    outside = ANSWER_TAG.sub("", STEP_TAG.sub("", response))
    return re.sub("|".join(TAGS), "", outside).strip()


def shown_solution(response: str) -> tuple[list[str], str | None]:
    """(steps, answer) that the reward model is shown: those of the text up to the last `</answer>`. Under the
    constraint `none` that includes whatever was appended to a first solution; otherwise appending couldn't be
    studied."""
    if "</answer>" in response:
        response = response[: response.rindex("</answer>") + len("</answer>")]
    return split_steps(response), extract_answer(response)


def describe_format(response: str) -> dict[str, float]:
    """What a response's layout shows of attempts to fool its judge; GRPO logs the means as format/<name>."""
    return {
        "boxes": len(find_boxes(response)),
        "empty_boxes": count_empty_boxes(response),
        "answers": response.count("<answer>"),
        "text_after_answer": bool(response.partition("</answer>")[2].strip()),
        "hidden_text": bool(hidden_text(response)),
        "layout_lines": any(map(has_layout_line, split_steps(response))),
    }


# --------------------------------------------------------------------------- judgements

# "## step 2: pythagoras". The second group is there if the number is not that of one step: "1.2", "1a", "1-3" or "1/2".
HEADING = re.compile(r"[^\w\n#]*(?:\d+[.)][^\w\n#]*)?#[^\w\n]*step(?:[^\S\n]|[#№*])+(\d{1,6})([a-z\d]|[.,–-]\d|/\d+)?")
# A line whose step number is bold in Markdown, LaTeX or HTML: "- **step 1", "1. __step 1", "> \textbf{step 1", or
# "✅ <b>step 1". Each piece of the prefix begins with a character of its own, so a long one is never read in two ways.
BOLD = r"(?:\*\*|__|\\textbf\{|<(?:b|strong)>)"
PREFIX = r"(?:[^\w\n]|_|textbf\{|b>|strong>)*"
BOLD_HEADING = re.compile(rf"^(?=[^a-z\n]*{BOLD}){PREFIX}(?:\d+[.)]{PREFIX})?(?=step\b)", re.MULTILINE)
# In Markdown, LaTeX and HTML, with comments; `\boxed{No}` is an emphasised No, too.
VERDICT_EMPHASIS = re.compile(
    r"[*_`${}]|\\(?:boxed|emph|mathbf|text|textbf|textit|underline)\b|\\(?=[()/])|</?(?:b|em|i|strong|u)>"
    r"|<!--(?s:.*?)(?:-->|\Z)"
)
# The Verification line, with line breaks within its question and before each lone yes or no that follows.
LATE_VERDICT = re.compile(
    r"verification\W*\bis\s+the\s+answer\s+correct[\s?]*\(\s*yes\s*/\s*no\s*\)(?:[^\w\n]*(?:yes|no)\b)?[^\w\n]*"
    r"(?:\n\W*(?:yes|no)[^\w\n]*(?=\n|\Z))*"
)
FULL_WIDTH = str.maketrans("（）？／：", "()?/:")
# A verdict that is ticked or crossed out must say the same.
CROSS = "❌✗✘✖☒🚫👎"
TICK = "✅✓✔☑👍"


def without_thinking(text: str) -> str:
    """What follows the last thought: the whole text if there is none, nothing if the last one was cut off. Every parser
    reads a judgement through this, because a thought is full of drafts.

    The last of all `<think>` and `</think>` decides, even if it is a quotation: that can't be told from the text, and a
    judgement that is lost does less harm than a draft that votes.
    """
    after_thought = THOUGHT_TAG.sub(r"<\1think>", text).rpartition("</think>")[2]
    if "<think>" in after_thought:
        return ""
    return after_thought.strip()


def readable_lines(text: str) -> list[str]:
    """The lines of a judgement as every parser reads them: without thinking and emphasis, in lower case, with single
    blanks, and with the Verification line in one piece."""
    # Lower case instead of re.IGNORECASE, which takes the long s, "ſ", for an s: "Yeſ" would match.
    text = without_thinking(text).lower().translate(FULL_WIDTH)
    # Bold step numbers are headings only where there are no "#" headings: otherwise they may stand in an analysis.
    if not any(HEADING.match(line) for line in text.split("\n")):
        text = BOLD_HEADING.sub("# ", text)
    text = VERDICT_EMPHASIS.sub("", text)
    text = LATE_VERDICT.sub(lambda verdict: verdict[0].replace("\n", " "), text)
    return [" ".join(line.split()) for line in text.split("\n")]


# Two verifications as `verify.VERIFY_PROMPT` asks for them, to be shown in the prompt.
WORKED_EXAMPLES = [
    """Example

Problem: A rectangle is 6 cm wide and 4 cm high. How long is its diagonal, squared?

Student Solution: Step 1: The diagonal, the width and the height form a right triangle.
Step 2: So the squared diagonal is 6^2 + 4^2 = 36 + 16.
Step 3: 36 + 16 = 52.
Answer: 52

## Step 1: The right triangle
The corners of a rectangle are right angles, so width, height and diagonal form a right triangle.
**This step is correct.**
## Step 2: Pythagoras
6^2 = 36 and 4^2 = 16, and the theorem adds them.
**This step is correct.**
## Step 3: The sum
36 + 16 = 52.
**This step is correct.**
**Verification: Is the answer correct (Yes/No)? Yes**""",
    """Example

Problem: A shop sells pens at 3 for 2 euros. How much do 12 pens cost with a discount of 25 percent?

Student Solution: Step 1: 12 pens are 12 / 3 = 4 packs.
Step 2: 4 packs cost 4 * 3 = 12 euros.
Step 3: 25 percent of 12 is 3, so the price is 12 - 3 = 9 euros.
Answer: 9

## Step 1: The number of packs
A pack has 3 pens, and 12 / 3 = 4.
**This step is correct.**
## Step 2: The price without the discount
A pack costs 2 euros, not 3, so it should be 4 * 2 = 8 euros.
**This step is incorrect.**
## Step 3: The discount
The arithmetic is right, but it starts from the wrong price of Step 2; it should be 8 - 2 = 6 euros.
**This step is incorrect.**
**Verification: Is the answer correct (Yes/No)? No**""",
]
