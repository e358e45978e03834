"""Rows in the layouts of public chats, instructions, tool calls and preferences; in the form of `layouts`."""

import json

from layouts import NO_ANSWER, ask, chat, from_value, rows, say, system

ADD, NOW = {"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now", "arguments": {}}
CALLS = [[ADD], [NOW, {"name": "add", "arguments": {"a": 4}}]]
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
TOOLS = json.dumps([{"name": "add", "description": "adds", "parameters": {"a": {"type": "int"}}}])


def tool_calls(calls):
    return [
        {"type": "function", "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for c in calls
    ]


def called(row):
    turn = {"role": "assistant", "content": "", "tool_calls": tool_calls(json.loads(row["answers"]))}
    return ask(row["query"]), [[turn]], row["answers"]


CHAT_LAYOUTS = {
    # instructions and chats
    "alpaca": (
        rows(lambda i, q, s, a: {"instruction": "Add.", "input": q if i % 2 else "", "output": s}),
        NO_ANSWER,
        lambda r: (ask(f"Add.\n\n{r['input']}" if r["input"] else "Add."), [say(r["output"])], ""),
    ),
    "alpaca with history": (
        rows(
            lambda i, q, s, a: {
                "instruction": q,
                "input": "",
                "output": s,
                "system": "Be kind.",
                "history": [["Hi.", "Hello."]] if i % 2 else [],
            }
        ),
        NO_ANSWER,
        lambda r: (
            ask(r["instruction"], system("Be kind."), *(chat("Hi.", "Hello.") if r["history"] else [])),
            [say(r["output"])],
            "",
        ),
    ),
    "dolly": (
        rows(
            lambda i, q, s, a: {
                "instruction": q,
                "context": f"Sums, part {i}." if i % 2 else "",
                "response": s,
                "category": "closed_qa",
            }
        ),
        NO_ANSWER,
        lambda r: (
            ask(f"{r['context']}\n\n{r['instruction']}" if r["context"] else r["instruction"]),
            [say(r["response"])],
            "",
        ),
    ),
    "sharegpt": (
        rows(lambda i, q, s, a: {"id": f"{i}", "conversations": [from_value("human", q), from_value("gpt", s)]}),
        NO_ANSWER,
        lambda r: (ask(r["conversations"][0]["value"]), [say(r["conversations"][1]["value"])], ""),
    ),
    "ultrachat": (
        rows(
            lambda i, q, s, a: {
                "prompt": q,
                "prompt_id": f"{i:x}",
                "messages": [*chat(q, "Let me see."), *chat("And so?", s)],
            }
        ),
        NO_ANSWER,
        lambda r: (r["messages"][:3], [r["messages"][3:]], ""),
    ),
    "openai": (
        rows(lambda i, q, s, a: {"messages": [system("Be kind."), *chat(q, s)]}),
        NO_ANSWER,
        lambda r: (r["messages"][:2], [r["messages"][2:]], ""),
    ),
    "openai content parts": (
        rows(
            lambda i, q, s, a: {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": q}]},
                    {"role": "assistant", "content": [{"type": "text", "value": s}]},
                ]
            }
        ),
        NO_ANSWER,
        lambda r: (
            ask(r["messages"][0]["content"][0]["text"]),
            [say(r["messages"][1]["content"][0]["value"])],
            "",
        ),
    ),
    "openai tools": (
        [
            {
                "messages": [
                    *ask(f"{i}?"),
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **tool_calls(CALLS[0])[0]}]},
                    {"role": "tool", "content": "3", "tool_call_id": "1"},
                    *say("It is 3."),
                ],
                "tools": [{"type": "function", "function": {"name": "add"}}],
            }
            for i in range(4)
        ],
        NO_ANSWER,
        lambda r: (r["messages"][:1], [[{**r["messages"][1], "content": ""}, *r["messages"][2:]]], ""),
    ),
    "openai functions": (
        [{"messages": [*ask(f"{i}?"), OLD_CALL]} for i in range(4)],
        NO_ANSWER,
        lambda r: (
            r["messages"][:1],
            [
                [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            ],
            "",
        ),
    ),
    "openai preference": (
        rows(
            lambda i, q, s, a: {
                "input": {"messages": ask(q)},
                "preferred_output": say(s),
                "non_preferred_output": say("No."),
            }
        ),
        NO_ANSWER,
        lambda r: (r["input"]["messages"], [r["preferred_output"]], ""),
    ),
    "xlam": (
        [{"id": i, "query": f"{i}?", "answers": json.dumps(CALLS[i % 2]), "tools": TOOLS} for i in range(6)],
        [],
        called,
    ),
    # TRL
    "trl prompt completion": (
        rows(lambda i, q, s, a: {"prompt": q, "completion": s}),
        NO_ANSWER,
        lambda r: (ask(r["prompt"]), [say(r["completion"])], ""),
    ),
    "trl conversational prompt completion": (
        rows(lambda i, q, s, a: {"prompt": ask(q), "completion": say(s)}),
        NO_ANSWER,
        lambda r: (r["prompt"], [r["completion"]], ""),
    ),
    "trl prompt and messages": (
        rows(lambda i, q, s, a: {"prompt": ask(q), "messages": chat(q, s)}),
        NO_ANSWER,
        lambda r: (r["prompt"], [r["messages"][1:]], ""),
    ),
    "trl preference": (
        rows(lambda i, q, s, a: {"prompt": q, "chosen": s, "rejected": "No."}),
        NO_ANSWER,
        lambda r: (ask(r["prompt"]), [say(r["chosen"])], ""),
    ),
    "trl preference, implicit prompt": (
        rows(lambda i, q, s, a: {"chosen": chat(q, s), "rejected": chat(q, "No.")}),
        NO_ANSWER,
        lambda r: (r["chosen"][:1], [r["chosen"][1:]], ""),
    ),
    "ultrafeedback": (
        rows(
            lambda i, q, s, a: {
                "prompt": q,
                "chosen": chat(q, s),
                "rejected": chat(q, "No."),
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
        ),
        NO_ANSWER,
        lambda r: (ask(r["prompt"]), [r["chosen"][1:]], ""),
    ),
    "trl kto": (
        rows(lambda i, q, s, a: {"prompt": q, "completion": s, "label": i % 2 == 0}),
        NO_ANSWER,
        lambda r: (ask(r["prompt"]), [say(r["completion"])] if r["label"] else [], ""),
    ),
    "sharegpt preference": (
        rows(
            lambda i, q, s, a: {
                "conversations": [from_value("human", q)],
                "chosen": from_value("gpt", s),
                "rejected": from_value("gpt", "No."),
            }
        ),
        NO_ANSWER,
        lambda r: (ask(r["conversations"][0]["value"]), [say(r["chosen"]["value"])], ""),
    ),
}
