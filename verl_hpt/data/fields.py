"""The names under which datasets keep a question, its demonstrations and its answer, and what a question needs beside.

All names are in lower case and hold in any letter case. Of several the first that has a value is read.
"""

import re
from typing import Any, NamedTuple

from verl_hpt.data.rows import Row

PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input", "question_stem")
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
DEMOS = ("target", "demonstrations", "demonstration", "response", "deepseek_attempt", "attempt", "r1_solution_1")
DEMOS += ("generated_solution", "deepseek_solution", "solution", "completion", "output", "generations")
DEMOS += ("solutions", "responses", "completions", "outputs", "answers")
DEMOS += ("chosen", "preferred_output", "rationale")
TRUTHS = ("reward_model.ground_truth", "ground_truth", "expected_answer", "final_answer", "gt", "gt_answer", "answer")
TRUTHS += ("answerkey", "correct_answer", "reference_answer", "golden_answers", "correct")
WORKED_TRUTHS = ("ground_truth_solution", "solution")  # worked solutions beside another demonstration: what they end in
WORKED = "extra_info.answer"  # where verl's own scripts leave GSM8K's worked solution
LABELS = ("label", "kto_tag")  # true or false, beside a chat or one of LABELLED: whether the answer is a good one
LABELLED = ("completion", "response", "output")
# Whether each demonstration of a row is right, or the one: true or false, or yes or no.
GRADES = ("correctness_math_verify", "correctness", "correctness_llama", "is_correct", "grades", "deepseek_grade")
JSON_FIELDS = {*CHATS, *PROMPTS, *DEMOS, "reward_model"}  # read where they hold JSON text

BEFORE = {"body": " ", "context": "\n\n", "passage": "\n\n"}  # texts in front of the question, and what parts the two
OPTIONS = ("options", "choices")  # of a multiple choice
HISTORY = "history"  # Alpaca's earlier turns: pairs of question and answer
_SEEN = "a question may refer to it"
NEEDED = {  # what a question may need and a prompt may lack: what to do where it does
    **dict.fromkeys((*BEFORE, *OPTIONS, HISTORY, "contexts", "passages", "documents", "table"), _SEEN),
    **dict.fromkeys(
        ("tools", "functions"), "rollouts get the tools of actor_rollout_ref.rollout.multi_turn.tool_config_path alone"
    ),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "a run trains on text alone"),
}


def any_case(values: dict) -> dict[str, str]:
    """The row's names for fields known in lower case: the same, else the first in other letter case."""
    return {**{name.lower(): name for name in reversed(values)}, **{name: name for name in values}}


def first(values: dict, keys: tuple, taken: tuple = ()) -> str | None:
    """The first of the fields that has a value, else the first that there is."""
    names = any_case(values)
    found = [key if "." in key else names.get(key) for key in keys]
    found = [key for key in found if key is not None and key not in taken]
    filled = (key for key in found if Row("", 0, values).get(key) is not None)
    return next(filled, None) or next((key for key in found if key in values), None)


def truth_name(values: dict, taken: tuple = ()) -> str | None:
    """The field of the expected answer. `correct` is one where it is text: true or false say how good an answer is."""
    grades = [name for name in values if name.lower() == "correct" and not isinstance(values[name], str)]
    return first(values, TRUTHS, (*taken, *grades))


class Choices(NamedTuple):
    """The options of a multiple choice: letters, the texts behind them, and how a prompt lists them."""

    letters: list[str]
    texts: list[str]
    listed: str


def choices(value: Any) -> Choices | None:
    """The options in any of their forms (texts, letters to texts, `text` beside `label`); None: these are none."""
    if isinstance(value, str) and value.strip():
        return Choices([], [], value.strip())
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        pairs = list(zip(map(str, value["label"]), value["text"], strict=False))
        pairs = pairs if len(value["label"]) == len(value["text"]) else []
    elif isinstance(value, dict):
        pairs = list(value.items()) if all(len(key) == 1 for key in value) else []
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        pairs = [(item.get("label", item.get("key")), item.get("text", item.get("content"))) for item in value]
    else:
        pairs = [(chr(65 + i), text) for i, text in enumerate(value[:26])] if isinstance(value, list) else []
    if not pairs or not all(isinstance(part, str) and part for pair in pairs for part in pair):
        return None
    letters, texts = map(list, zip(*pairs, strict=True))
    marked = [re.match(r"\(?([A-Za-z])\s?[.):]\s*", text) for text in texts]
    if all(marked) and [m[1].upper() for m in marked] == [chr(65 + i) for i in range(len(texts))]:
        bare = [text[mark.end() :] for text, mark in zip(texts, marked, strict=True)]
        return Choices([mark[1].upper() for mark in marked], bare, "\n".join(texts))
    return Choices(letters, texts, "\n".join(f"{letter}. {text}" for letter, text in pairs))


def letter(options: Choices, answer: Any) -> str:
    """The expected answer as a letter where it is a position among the options, a letter, or an option's text."""
    text = str(answer).strip()
    if text in options.letters:
        return text
    if isinstance(answer, int) and 0 <= answer < len(options.letters):  # MMLU's form, whatever the options say
        return options.letters[answer]
    if text in options.texts:
        return options.letters[options.texts.index(text)]
    if text.isdigit() and int(text) < len(options.letters):
        return options.letters[int(text)]
    return text.upper() if len(text) == 1 else text


def turns(value: Any) -> list[dict] | None:
    """Earlier turns, [[question, answer], …], as messages; None: these are none."""
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in value):
        return None
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair, strict=True)]


def wrongly_graded(values: dict, count: int) -> str | None:
    """The field that says that the first of the row's demonstrations is wrong; None: none says so."""
    for name, value in values.items():
        if name.lower() in GRADES:
            grades = value if isinstance(value, list) else [value]
            if len(grades) == count and (grades[0] is False or str(grades[0]).strip().lower() in ("no", "false")):
                return name
    return None
