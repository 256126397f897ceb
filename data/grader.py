"""Grading answers: math-verify in a process that may die, and what is settled before it is asked.

Run as a program, this file is the worker: it reads questions, a JSON list (prediction, reference, seconds) a line, and answers
each with true, false or null. It needs the standard library and math-verify only, and so does who imports it.
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
_idle: list[subprocess.Popen] = []  # workers between two questions; they end when this process does


def equal(prediction: str, reference: str, timeout: float) -> bool | None:
    """Is one answer mathematically equal to the other? None for unknown: out of time or memory, or crashed. No answer ("")
    is False; equal texts and integers need no worker. timeout: seconds of CPU time, twice that at most if the
    prediction is read again. Raises ChildProcessError if the worker can't run."""
    prediction, reference = (text.strip().removesuffix(".") for text in (prediction, reference))
    if not prediction or prediction == reference:
        return bool(prediction)
    if INTEGER.fullmatch(prediction) and INTEGER.fullmatch(reference):
        return int(prediction) == int(reference)
    verdict = ask(prediction, reference, timeout)
    # Only if it isn't right as written, because 2e-1 may also be about Euler's number.
    decimal = E_NOTATION.sub(r"\1 \\times 10^{\2}", prediction)
    return verdict if verdict or decimal == prediction else equal(decimal, reference, timeout)


def ask(prediction: str, reference: str, timeout: float) -> bool | None:
    """What a worker says; it starts when first needed and stays."""
    try:
        worker = _idle.pop()
    except IndexError:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In the root directory: it imports nothing that lies where the user happens to be.
        worker = subprocess.Popen([sys.executable, WORKER], text=True, start_new_session=True, cwd="/", **pipes)
    try:
        print(json.dumps([prediction, reference, timeout]), file=worker.stdin, flush=True)
        verdict = json.loads(worker.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        about = f"the grading worker ended with status {worker.wait()}; is math-verify installed?"
        raise ChildProcessError(about) from None
    _idle.append(worker)
    return verdict


# --------------------------------------------------------------------------- the worker

# It grades in a forked child under an alarm that kills, because computer algebra can hang or fill the memory inside C code
# that no Python exception reaches; the parent keeps the imported library, so a death costs a fork and not an import. The
# alarm counts CPU time (with a clock behind it), so a busy machine doesn't change verdicts. math-verify's own time limits
# are off: they would say "wrong".


def judge(prediction: str, reference: str) -> bool | None:
    """Is one answer equal to the other, as math-verify reads them? None if comparing them has failed."""
    from math_verify import parse, verify  # only the worker has it

    answers = [text if "\\boxed" in text else "\\boxed{" + text + "}" for text in (prediction, reference)]
    ours, gold = (parse(text, parsing_timeout=None) for text in answers)
    failed = False
    for a in gold:
        for b in ours:
            try:
                if verify(a, b, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception:
                failed = True
    return None if failed else False


def set_alarms(seconds: float) -> None:
    """Let this process be killed after so many seconds of CPU time, or four times as many of the clock; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 4 * seconds)


def serve() -> None:
    """Answer the questions on stdin, until it ends."""
    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    replies, sys.stdout = sys.stdout, sys.stderr
    judge(r"\frac{1}{2}", "0.5")  # fills the library's caches, which every child inherits
    while True:
        child = os.fork()
        if child == 0:
            for line in iter(sys.stdin.readline, ""):
                prediction, reference, timeout = json.loads(line)
                set_alarms(timeout)
                verdict = judge(prediction, reference)
                set_alarms(0)
                print(json.dumps(verdict), file=replies, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        print("null", file=replies, flush=True)


if __name__ == "__main__":
    # Python looks for modules beside a script first; what lies beside this one is ours, and no library.
    sys.path = [place for place in sys.path if Path(place) != WORKER.parent]
    serve()
