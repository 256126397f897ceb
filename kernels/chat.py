"""A model's directory seen from outside: where it is found, its tokenizer and chat template, and where its turns end.

Others wrote these files, so each is checked when it is opened, and what is wrong with it is said in one line. Whoever
reads the stages needs to know `encode_chat` (a user turn as token ids), `decode` (the way back) and `find_model`.
"""

import json
from bisect import bisect_left
from datetime import datetime
from functools import cache
from pathlib import Path

from kernels import distributed
from kernels.distributed import InputError
from kernels.text import STEP_TAG, TAGS

from jinja2 import TemplateError


@cache  # GRPO decodes every response many times
def special_tokens(tokenizer) -> dict[str, int]:
    """token -> id of the tokens that control a model and aren't text; `TAGS` are always text."""
    # These are only bos, eos, pad and the like; chat markers are just added tokens.
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            tokens[token.content] = i
    return {token: i for token, i in tokens.items() if token and token not in TAGS}


def escape_special_tokens(tokenizer, text: str) -> str:
    """Insert a space into any special token spelled out in the text: a solution that spells `<|im_end|>` must not end
    its judge's prompt and begin the verdict."""
    for token in special_tokens(tokenizer):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def decode(tokenizer, ids: list[int]) -> str:
    """The text of token ids, without special tokens. `TAGS` stay even where the tokenizer calls them special: without
    its tags, a thought would pass for a solution or a judgement."""
    special = set(special_tokens(tokenizer).values())
    return tokenizer.decode([i for i in ids if i not in special])


def locate_steps(tokenizer, ids: list[int], text: str, steps: list[str]) -> list[tuple[int, int]]:
    """The half-open token range of each step of a response, in the ids that were sampled; [] if a step isn't in the
    text.

    The ids decode to `text`; nothing is encoded again. Six tokens, and two steps in tags:

        tokens       <step>  1+  1=2</  step>  <step>  3</step>
        characters   6       8   13     18     24      32           that the first 1, 2, 3, ... tokens decode to
        step "1+1=2" is text[6:11]: from the first token that reaches beyond 6, up to the first that reaches 11: (1, 3)
        step "3"     is text[24:25]: (5, 6)

    Tagged steps are looked for inside their tags, as the same words may stand outside. A token that has the end of one
    step and the beginning of the next belongs to the first; a step's range may then be empty.
    """

    opened = len(text) - len(decode(tokenizer, ids))  # of a <think> that the prompt ended with

    def characters(count: int) -> int:
        """How many characters the first `count` tokens decode to; one split over several tokens counts from its
        last."""
        return opened + len(decode(tokenizer, ids[:count]).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    tags = [match.start(1) for match in STEP_TAG.finditer(text) if match.group(1).strip()]
    spans = []
    text_end, token_end = 0, 0  # of the step before
    for k, step in enumerate(steps):
        earliest = max(text_end, tags[k]) if k < len(tags) else text_end
        text_start = text.find(step, earliest)
        if text_start < 0:
            return []
        text_end = text_start + len(step)
        token_start = bisect_left(counts, text_start, lo=token_end, key=characters)
        if token_start > token_end and characters(token_start) > text_start:
            token_start -= 1  # the token before has the step's first character, too
        token_end = bisect_left(counts, text_end, lo=token_start, key=characters)
        spans.append((token_start, token_end))
    return spans


# A chat template is a program that came with the model: what it may raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# The day that a template is told. With today's, a run resumed tomorrow would sample from other prompts, and a reward
# model would be asked in another way than it was trained.
TODAY = datetime(2024, 7, 26)  # as in Llama's templates
FORMATS = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBcdHIjmMpSUwWxXyY")
FIXED_DATE = "{% macro strftime_now(format) %}{{ format" + FORMATS + " }}{% endmacro %}{{ '' }}"


def apply_template(tokenizer, messages: list[dict], **settings) -> str:
    """The messages as text, by the tokenizer's own chat template. Raises InputError if the template fails."""
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_DATE + template
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **settings)
    except TEMPLATE_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{tokenizer.name_or_path}: its chat template fails ({reason}); mend it, or use another "
                         "model") from None  # fmt: skip


def render_chat(tokenizer, user: str, thinking: bool = True) -> str:
    """One user turn and the opening of the assistant's, by the tokenizer's own chat template. Some templates have a
    switch for thinking, `enable_thinking`, and think by default; thinking=False turns it off."""
    messages = [{"role": "user", "content": escape_special_tokens(tokenizer, user)}]
    settings = {} if thinking else {"enable_thinking": False}
    return apply_template(tokenizer, messages, add_generation_prompt=True, **settings)


def encode_chat(tokenizer, user: str, thinking: bool = True) -> list[int]:
    """Token ids of `render_chat`."""
    return tokenizer(render_chat(tokenizer, user, thinking), add_special_tokens=False).input_ids


def encode_to_ends(tokenizer, text: str, ends: list[int]) -> tuple[list[int], list[int]]:
    """(token ids, for each end the position of the last token that begins before it). Ends count characters of the
    text.

    For the text "ab.cd.":

        tokens    [ab]  [.c]  [d.]    begin at characters 0, 2, 4
        ends      3 -> token 1, 6 -> token 2
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in encoded.offset_mapping]
    return encoded.input_ids, [bisect_left(begins, end) - 1 for end in ends]


def opens_thought(tokenizer, prompt: list[int]) -> bool:
    """Whether the prompt ends with an opening `<think>`. Some chat templates write it."""
    end_of_prompt = tokenizer.decode(prompt[-8:])  # more than <think> and the line breaks after it
    return end_of_prompt.rstrip().endswith("<think>")


def end_of_turn(tokenizer) -> int | None:
    """The special token that the chat template writes behind an assistant's turn; None if it writes none. The models
    that the template was made for end their turns with it, even where it isn't their end-of-sequence token."""
    answer = "Forty-two."
    messages = [{"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": answer}]
    _, found, behind = apply_template(tokenizer, messages).rpartition(answer)
    ids = tokenizer(behind.lstrip(), add_special_tokens=False).input_ids
    if found and ids and ids[0] in special_tokens(tokenizer).values():
        return ids[0]
    return None


# Checkpoints of the tiny world, and the scripts that create them.
MADE_BY = {
    "data/tiny/policy": "-m data.make_tiny",
    "data/tiny/verifier": "-m data.make_tiny",
    "data/tiny/base": "-m data.make_tiny",
    "runs/tiny/prm_cot": "train_prm.py",
    "runs/tiny/grpo": "grpo.py",
}
HUB_TIMEOUT = 10  # seconds that the hub has for an answer


def find_model(name: str, flag: str = "--model") -> Path:
    """The directory of a model given as a directory or as a hub name. Raises InputError, naming the flag, if there is
    no such model.

    A name that may be meant as a path never goes to the hub: whoever registers it there would supply the weights.
    """
    if Path(name).is_dir():
        return Path(name)
    if name in MADE_BY:
        raise InputError(f"{flag} {name}: no such directory; create it with: python {MADE_BY[name]}")
    first, *others = name.split("/")
    if len(others) != 1 or not others[0] or first in ("", ".", "..", "~", "runs", "data") or Path(first).exists():
        raise InputError(f"{flag} {name}: neither a directory nor a hub name (organisation/name)")
    return fetch_model(name, flag)


@cache  # a trainer comes back for the tokenizer files at each save
def fetch_model(name: str, flag: str) -> Path:
    """The directory of a hub model, downloaded or found in the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download  # here, because they take a while to import

    distributed.log(f"{flag} {name}: no such directory, so it is fetched from the Hugging Face hub, or from its cache")
    revision, reason = None, None
    try:
        # snapshot_download would ask for the revision, too, but wait for the answer forever.
        revision = HfApi().model_info(name, timeout=HUB_TIMEOUT).sha
    except Exception as error:  # of the hub, or of whichever HTTP library it uses
        reason = error
    files = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=revision is None, allow_patterns=files))
    except (ValueError, OSError) as error:  # hub and network errors are OSErrors
        reason = f"{reason or error}".splitlines()[0]
        raise InputError(f"{flag} {name}: neither a directory nor a hub model that can be loaded ({reason})") from None


def read_end_tokens(path: Path) -> set[int]:
    """The end tokens that a configuration lists; none if there is no such file. Raises InputError if it is damaged."""
    if not path.is_file():
        return set()
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a JSON object ({error}); fetch the file again") from None
    if listed is None:
        return set()
    if not isinstance(listed, list):
        listed = [listed]
    for token in listed:
        if type(token) is not int:
            raise InputError(f"{path}: eos_token_id must be an integer or a list of integers, not {token!r}")
    return set(listed)


def check_tokenizer(tokenizer, path: Path, flag: str) -> None:
    """Raise InputError for a tokenizer that doesn't give back a text (one whose file is missing is empty), and without
    a chat template that shows a turn as it is and the same each time."""
    if not tokenizer.chat_template:
        raise InputError(f"{flag} {path}: its tokenizer has no chat template; use an instruct model")
    given = "What is 3 + 4?"
    decoded = decode(tokenizer, tokenizer(given, add_special_tokens=False).input_ids)
    if decoded.strip() != given:
        raise InputError(f"{flag} {path}: its tokenizer makes {decoded!r} of {given!r}; is tokenizer.json missing?")
    given += '\n\nIs "a" < B & c?'
    prompt = render_chat(tokenizer, given)
    if given not in prompt:
        raise InputError(f"{flag} {path}: its chat template drops or changes the user's text; use another model")
    if render_chat(tokenizer, given) != prompt:
        raise InputError(f"{flag} {path}: its chat template writes another prompt each time; use another model")


def find_stop_ids(tokenizer, path: Path, flag: str) -> list[int]:
    """A sample ends at any of these: the tokenizer's end-of-sequence token, those of config.json and
    generation_config.json, and what the chat template writes behind an assistant's turn. Raises InputError if there is
    none."""
    stop_ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for name in ("config.json", "generation_config.json"):
        stop_ids |= read_end_tokens(path / name)
    stop_ids.discard(None)
    if not stop_ids:
        raise InputError(f"{flag} {path}: no end token, so no sample would end; set eos_token in tokenizer_config.json")
    return sorted(stop_ids)
