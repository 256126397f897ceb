"""Grading answers: math-verify in a process that may die, and what is settled before it is asked.

Run as a program, this file is the worker: it reads questions, a JSON list (prediction, reference, seconds) per line,
and answers each with true, false or null. It imports nothing but the standard library and math-verify, so that a worker
starts fast wherever it is needed.
"""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
E_NOTATION = re.compile(r"(?<![\w.\\])([0-9]+(?:\.[0-9]+)?)e([+-]?[0-9]{1,3})(?!\w)", re.IGNORECASE)  # 4.5e33

# --------------------------------------------------------------------------- the asking side

WORKER = Path(__file__).resolve()
# Workers that wait for a question. They are kept because starting one imports computer algebra, which takes a second;
# they end with this process, whose end closes their stdin.
_idle: list[subprocess.Popen] = []


def equal(prediction: str, reference: str, timeout: float) -> bool | None:
    """Is the prediction mathematically equal to the reference? None if unknown: out of time or memory, or crashed.

    An empty prediction is False. timeout: seconds of CPU time for a comparison; there is a second one if the prediction
    has numbers like 4.5e33. Raises ChildProcessError if the worker can't run.
    """
    prediction = clean(prediction)
    reference = clean(reference)
    verdict = compare(prediction, reference, timeout)
    # As written first, because 2e-1 may also be about Euler's number.
    decimal = E_NOTATION.sub(r"\1 \\times 10^{\2}", prediction)
    if verdict or decimal == prediction:
        return verdict
    return compare(clean(decimal), reference, timeout)


def clean(text: str) -> str:
    """Remove surrounding white space and the full stop of a sentence."""
    return text.strip().removesuffix(".")


def compare(prediction: str, reference: str, timeout: float) -> bool | None:
    """Compare two cleaned answers; equal strings and integers need no worker."""
    if not prediction:
        return False
    if prediction == reference:
        return True
    if INTEGER.fullmatch(prediction) and INTEGER.fullmatch(reference):
        return int(prediction) == int(reference)
    return ask(prediction, reference, timeout)


def ask(prediction: str, reference: str, timeout: float) -> bool | None:
    """The verdict of an idle worker, or of a new one if all are busy."""
    try:
        worker = _idle.pop()  # atomic: threads that ask at the same time get different workers
    except IndexError:
        worker = start_worker()
    try:
        print(json.dumps([prediction, reference, timeout]), file=worker.stdin, flush=True)
        verdict = json.loads(worker.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        status = worker.wait()
        raise ChildProcessError(f"the grading worker ended with status {status}; is math-verify installed?") from None
    _idle.append(worker)
    return verdict


def start_worker() -> subprocess.Popen:
    """Start this file as a program, in the root directory, so that it can't import the user's files by mistake."""
    return subprocess.Popen(
        [sys.executable, WORKER],
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


def judge(prediction: str, reference: str) -> bool | None:
    """Is the prediction equal to the reference, as math-verify reads them? None if the comparison fails."""
    from math_verify import parse, verify  # only the worker has it

    predicted = parse(boxed(prediction), parsing_timeout=None)  # all readings of the string
    expected = parse(boxed(reference), parsing_timeout=None)
    failed = False
    for gold in expected:
        for answer in predicted:
            try:
                if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception:
                failed = True
    return None if failed else False


def boxed(text: str) -> str:
    r"""The answer in a \boxed{…}, where math-verify looks for it first."""
    if "\\boxed" in text:
        return text
    return "\\boxed{" + text + "}"


def set_alarms(seconds: float) -> None:
    """Have this process killed after `seconds` of CPU time or four times as many by the clock; 0 cancels both."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)


def serve() -> None:
    """Answer the questions on stdin until it is closed. A child does it; when one is killed, the next takes over."""
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    replies = sys.stdout
    sys.stdout = sys.stderr  # whatever the library prints is no reply
    judge(r"\frac{1}{2}", "0.5")  # fills the library's caches, which every child inherits
    while True:
        child = os.fork()
        if child == 0:
            answer_questions(replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:  # stdin is closed
            break
        print("null", file=replies, flush=True)  # the question that killed the child


def answer_questions(replies) -> None:
    """Judge question after question, each under its alarms."""
    for line in iter(sys.stdin.readline, ""):
        prediction, reference, timeout = json.loads(line)
        set_alarms(timeout)
        verdict = judge(prediction, reference)
        set_alarms(0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    # Python looks for modules beside a script first, but what lies beside this one is our code and no library.
    sys.path = [place for place in sys.path if Path(place) != WORKER.parent]
    serve()
