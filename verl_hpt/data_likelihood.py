"""Mean log-likelihood of demonstrations under a model, for `verl-hpt data check --model`."""

from verl_hpt.demos import EncodedDemo
from verl_hpt.errors import UserError


def mean_log_likelihoods(path: str, pairs: list[tuple[list[int], EncodedDemo]]) -> list[float]:
    """log π(demo | prompt) per trained token, EOS included, in nats; one number for each (prompt ids, demo).

    One sequence at a time, in float32 on the CPU: exact, and no padding to get wrong.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except Exception as error:  # whatever transformers raises for a folder that holds no model
        raise UserError(f"--model {path}: cannot be loaded: {str(error).splitlines()[0][:300]}") from None
    means = []
    for prompt, demo in tqdm(pairs, desc="log-likelihood", unit=" demonstrations", disable=None):
        ids = torch.tensor([prompt + demo.ids])  # (1, prompt + tokens)
        if int(ids.max()) >= model.config.get_text_config().vocab_size:
            raise UserError(f"--model {path}: token {int(ids.max())} is beyond its vocabulary; wrong --tokenizer?")
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()  # (tokens, vocabulary)
        said = torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        mask = torch.tensor(demo.mask, dtype=torch.float32)
        means.append(float((said * mask).sum() / mask.sum()))
    return means
