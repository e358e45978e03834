"""Rows in the layouts of public datasets, of texts made here, each with what a reader of its own makes of a row.

`MATH_LAYOUTS` maps a name to (rows, options of `data convert`, row → (prompt messages, demonstrations, expected
answer)). A demonstration is a list of messages, or None.
"""

BOXED = "{0} and {1} make {2}, so the answer is $\\boxed{{{2}}}$."


def ask(text, *before):
    return [*before, {"role": "user", "content": text}]


def say(text):
    return [{"role": "assistant", "content": text}]


def system(text):
    return {"role": "system", "content": text}


def sums(count=7):
    """(question, worked solution with a box, answer)"""
    return [
        (f"What is {i} plus {i * i}?", BOXED.format(i, i * i, i + i * i), str(i + i * i)) for i in range(3, 3 + count)
    ]


def rows(make):
    return [make(i, *three) for i, three in enumerate(sums())]


def from_value(role, text):
    return {"from": role, "value": text}


def chat(q, s):
    return [{"content": q, "role": "user"}, {"content": s, "role": "assistant"}]


def verl(i, q, answer, extra, source="own/source", **more):
    return {
        "data_source": source,
        "prompt": ask(q),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": "train", "index": i, **extra},
        **more,
    }


def hashed(s, a):
    return f"#### Step 1: think\n{s.partition(', so')[0]}.\n#### {a}"


def letters(texts):
    return "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDEFGHIJ", texts, strict=False))


def options(a):
    return [str(int(a) + d) for d in (1, 2, 0, 5)]  # C is right


NO_ANSWER = ["--no-answer"]
MATH_LAYOUTS = {
    # verl's own preprocessing scripts
    "verl gsm8k": (
        rows(lambda i, q, s, a: verl(i, q, a, {"answer": hashed(s, a), "question": q}, "openai/gsm8k")),
        [],
        lambda r: (r["prompt"], [say(r["extra_info"]["answer"])], r["reward_model"]["ground_truth"]),
    ),
    "verl gsm8k tool agent": (
        rows(
            lambda i, q, s, a: verl(
                i,
                q,
                a,
                {
                    "answer": hashed(s, a),
                    "question": q,
                    "need_tools_kwargs": True,
                    "tools_kwargs": {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": a}}},
                    "interaction_kwargs": {"query": q, "ground_truth": a},
                },
                "openai/gsm8k",
                agent_name="tool_agent",
            )
        ),
        [],
        lambda r: (r["prompt"], [say(r["extra_info"]["answer"])], r["reward_model"]["ground_truth"]),
    ),
    "verl math": (
        rows(lambda i, q, s, a: verl(i, q, a, {}, "DigitalLearningGmbH/MATH-lighteval")),
        [],
        lambda r: (r["prompt"], [], r["reward_model"]["ground_truth"]),
    ),
    "verl hellaswag": (
        rows(
            lambda i, q, s, a: {
                **verl(i, q, "2", {}, "Rowan/hellaswag"),
                "reward_model": {"style": "model", "eval": "multiple_choice", "ground_truth": "2"},
            }
        ),
        [],
        lambda r: (r["prompt"], [], "2"),
    ),
    "verl geo3k": (
        rows(lambda i, q, s, a: verl(i, q, a, {"answer": a, "question": q}, "hiyouga/geometry3k", images=["x.png"])),
        [],
        lambda r: (r["prompt"], [], r["reward_model"]["ground_truth"]),
    ),
    "verl full_hh_rlhf sft": (
        rows(lambda i, q, s, a: {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "response": s}),
        NO_ANSWER,
        lambda r: (ask(r["prompt"]), [say(r["response"])], ""),
    ),
    "verl search r1": (
        rows(
            lambda i, q, s, a: {
                **verl(i, q, None, {"question": q, "need_tools_kwargs": True}, "searchR1_nq"),
                "reward_model": {"style": "rule", "ground_truth": {"target": [a, f"{a}.0"]}},
                "metadata": None,
            }
        ),
        [],
        lambda r: (r["prompt"], [], r["reward_model"]["ground_truth"]),
    ),
    "verl multiturn": (
        rows(lambda i, q, s, a: {"messages": [system("Be kind."), *chat("Hi.", "Hello."), *chat(q, s)]}),
        NO_ANSWER,
        lambda r: (r["messages"][:-1], [r["messages"][-1:]], ""),
    ),
    "verl gsm8k multiturn sft": (
        rows(lambda i, q, s, a: {"messages": [system("Be exact."), *chat(q, hashed(s, a))], "enable_thinking": False}),
        [],
        lambda r: (r["messages"][:2], [r["messages"][2:]], r["messages"][2]["content"].split("#### ")[-1]),
    ),
    "dapo": (
        rows(lambda i, q, s, a: verl(i, q, a, {"index": f"id-{i}"}, "math_dapo")),
        [],
        lambda r: (r["prompt"], [], r["reward_model"]["ground_truth"]),
    ),
    "eurus": (
        rows(lambda i, q, s, a: {**verl(i, q, a, {}, "numina_cn_k12"), "prompt": ask(q, system("Think."))}),
        [],
        lambda r: (r["prompt"], [], r["reward_model"]["ground_truth"]),
    ),
    # worked mathematics
    "gsm8k": (
        rows(lambda i, q, s, a: {"question": q, "answer": f"{s.partition(', so')[0]}.\n#### {a}"}),
        [],
        lambda r: (ask(r["question"]), [say(r["answer"])], r["answer"].split("#### ")[1]),
    ),
    "luffy": (
        rows(lambda i, q, s, a: verl(i, q, a, {}, target=say(s)) | {"prompt": ask(q, system("Think."))}),
        [],
        lambda r: (r["prompt"], [r["target"]], r["reward_model"]["ground_truth"]),
    ),
    "numinamath cot": (
        rows(lambda i, q, s, a: {"source": "cn_k12", "problem": q, "solution": s, "messages": chat(q, s)}),
        [],
        lambda r: (ask(r["problem"]), [say(r["solution"])], r["solution"].split("boxed{")[1].split("}")[0]),
    ),
    "numinamath 1.5": (
        rows(
            lambda i, q, s, a: {
                "problem": q,
                "solution": s,
                "answer": a,
                "problem_type": "Algebra",
                "question_type": "math-word-problem",
                "problem_is_valid": "Yes",
                "solution_is_valid": "Yes",
                "source": "olympiads",
                "synthetic": False,
            }
        ),
        [],
        lambda r: (ask(r["problem"]), [say(r["solution"])], r["answer"]),
    ),
    "openr1": (
        rows(
            lambda i, q, s, a: {
                "problem": q,
                "solution": f"By hand. {s}",
                "answer": a,
                "uuid": f"u-{i}",
                "is_reasoning_complete": [True, True],
                "generations": [f"<think>\nHm.\n</think>\n\n{s}", "I do not know."],
                "correctness_math_verify": [True, False],
                "correctness_llama": None,
                "finish_reasons": None,
                "correctness_count": 1,
                "messages": chat(q, f"<think>\nHm.\n</think>\n\n{s}"),
            }
        ),
        [],
        lambda r: (ask(r["problem"]), [say(r["generations"][0])], r["answer"]),
    ),
    "openthoughts": (
        rows(
            lambda i, q, s, a: {
                "system": "Think at length.",
                "conversations": [
                    from_value("user", q),
                    from_value("assistant", f"<|begin_of_thought|>\n\n{s}\n\n<|end_of_thought|>\n\n{s}"),
                ],
            }
        ),
        [],
        lambda r: (
            ask(r["conversations"][0]["value"], system(r["system"])),
            [say(r["conversations"][1]["value"])],
            r["conversations"][1]["value"].split("boxed{")[-1].split("}")[0],
        ),
    ),
    "openthoughts metadata": (
        rows(
            lambda i, q, s, a: {
                "problem": q,
                "deepseek_reasoning": "Hm.",
                "deepseek_solution": s,
                "ground_truth_solution": f"It is $\\boxed{{{a}}}$.",
                "domain": "math",
                "source": "numina_math",
                "test_cases": None,
                "starter_code": None,
            }
        ),
        [],
        lambda r: (
            ask(r["problem"]),
            [say(r["deepseek_solution"])],
            r["ground_truth_solution"].split("boxed{")[1].split("}")[0],
        ),
    ),
    "limo": (
        rows(lambda i, q, s, a: {"question": q, "solution": s, "answer": a}),
        [],
        lambda r: (ask(r["question"]), [say(r["solution"])], r["answer"]),
    ),
    "s1k": (
        rows(
            lambda i, q, s, a: {
                "solution": a,
                "question": q,
                "cot_type": "math",
                "source_type": "own",
                "metadata": "{}",
                "cot": None,
                "thinking_trajectories": ["Hm."],
                "attempt": s,
            }
        ),
        [],
        lambda r: (ask(r["question"]), [say(r["attempt"])], r["solution"]),
    ),
    "s1k 1.1": (
        rows(
            lambda i, q, s, a: {
                "solution": f"We add. Hence\n{s}",
                "question": q,
                "gemini_thinking_trajectory": "Hm.",
                "gemini_attempt": "No idea.",
                "deepseek_thinking_trajectory": "Hm.",
                "deepseek_attempt": f"Sure. {s}",
                "gemini_grade": "No",
                "deepseek_grade": "Yes",
            }
        ),
        [],
        lambda r: (
            ask(r["question"]),
            [say(r["deepseek_attempt"])],
            r["solution"].split("boxed{")[1].split("}")[0],
        ),
    ),
    "deepscaler": (
        rows(lambda i, q, s, a: {"problem": q, "answer": a, "solution": s if i != 3 else ""}),
        [],
        lambda r: (ask(r["problem"]), [say(r["solution"])] if r["solution"] else [None], r["answer"]),
    ),
    "deepmath": (
        rows(
            lambda i, q, s, a: {
                "question": q,
                "final_answer": a,
                "difficulty": 5.5,
                "topic": "Mathematics -> Algebra",
                **{f"r1_solution_{n}": f"{n}. {s}" for n in (1, 2, 3)},
            }
        ),
        [],
        lambda r: (ask(r["question"]), [say(r["r1_solution_1"])], r["final_answer"]),
    ),
    "metamathqa": (
        rows(
            lambda i, q, s, a: {
                "type": "GSM_Rephrased",
                "query": q,
                "original_question": q,
                "response": f"{s.partition(', so')[0]}.\n#### {a}\nThe answer is: {a}",
            }
        ),
        [],
        lambda r: (ask(r["query"]), [say(r["response"])], r["response"].split("The answer is: ")[1]),
    ),
    "math": (
        rows(lambda i, q, s, a: {"problem": q, "level": "Level 1", "type": "Algebra", "solution": s}),
        [],
        lambda r: (ask(r["problem"]), [say(r["solution"])], r["solution"].split("boxed{")[1].split("}")[0]),
    ),
    "openmathinstruct": (
        rows(lambda i, q, s, a: {"problem": q, "generated_solution": s, "expected_answer": a, "problem_source": "own"}),
        [],
        lambda r: (ask(r["problem"]), [say(r["generated_solution"])], r["expected_answer"]),
    ),
    "worked answers under markdown headings": (
        rows(lambda i, q, s, a: {"question": q, "answer": f"#### Step 1: read\nSum.\n#### Step 2: compute\n{s}"}),
        [],
        lambda r: (ask(r["question"]), [say(r["answer"])], r["answer"].split("boxed{")[1].split("}")[0]),
    ),
    "svamp": (
        rows(
            lambda i, q, s, a: {
                "ID": f"chal-{i}",
                "Body": f"Ann has {i} pears.",
                "Question": q,
                "Equation": "( 1.0 + 2.0 )",
                "Answer": float(a),
                "Type": "Addition",
            }
        ),
        [],
        lambda r: (ask(f"{r['Body']} {r['Question']}"), [], str(r["Answer"])),
    ),
    # multiple choice
    "mmlu": (
        rows(lambda i, q, s, a: {"question": q, "subject": "sums", "choices": options(a), "answer": 2}),
        [],
        lambda r: (ask(f"{r['question']}\n\n{letters(r['choices'])}"), [], "C"),
    ),
    "mmlu pro": (
        rows(
            lambda i, q, s, a: {
                "question_id": i,
                "question": q,
                "options": options(a),
                "answer": "C",
                "answer_index": 2,
                "cot_content": "",
            }
        ),
        [],
        lambda r: (ask(f"{r['question']}\n\n{letters(r['options'])}"), [], "C"),
    ),
    "arc": (
        rows(
            lambda i, q, s, a: {
                "id": f"q{i}",
                "question": q,
                "choices": {"text": options(a), "label": ["A", "B", "C", "D"]},
                "answerKey": "C",
            }
        ),
        [],
        lambda r: (ask(f"{r['question']}\n\n{letters(r['choices']['text'])}"), [], "C"),
    ),
    "aqua": (
        rows(
            lambda i, q, s, a: {
                "question": q,
                "options": [f"{letter}){o}" for letter, o in zip("ABCD", options(a), strict=True)],
                "rationale": s,
                "correct": "C",
            }
        ),
        [],
        lambda r: (ask(r["question"] + "\n\n" + "\n".join(r["options"])), [say(r["rationale"])], "C"),
    ),
}
