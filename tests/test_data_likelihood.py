"""`verl-hpt data likelihood`: what a model says of each demonstration, as a column."""

import pyarrow.parquet as pq
import pytest
from test_data_check import checked, random_model, rows, say, verl_row, write

from verl_hpt.data.commands import main
from verl_hpt.demos.demonstration import Demonstration


def test_likelihood_writes_a_number_for_each_demonstration_and_check_reads_it(tmp_path, tokenizers):
    random_model(tmp_path / "model")
    table = [verl_row("a?", [say("#### 1"), say("1 is one\n#### 1")], "1"), verl_row("b?", [say("#### 1"), []], "1")]
    file, out = write(tmp_path / "a.parquet", table), tmp_path / "out" / "b.parquet"
    given = ["likelihood", file, str(out), "--model", str(tmp_path / "model"), "--device", "cpu"]
    given += ["--tokenizer", str(tokenizers / "qwen3")]
    assert main(given) == 0
    written = pq.read_table(out).to_pylist()
    assert [{k: v for k, v in row.items() if k != "log_likelihood"} for row in written] == pq.read_table(
        file
    ).to_pylist()
    (first, second), (third, nothing) = (row["log_likelihood"] for row in written)
    assert first != second and first < 0 and third != first and nothing is None
    assert len(list(out.parent.iterdir())) == 1, "nothing provisional stays"
    _, found, _ = checked(tmp_path, str(out), "--log-likelihood-key", "log_likelihood", "--reward", "none")
    assert set(found) == {"unusable: empty"}
    for more in (["--column", "prompt"], ["--demo-key", "demos"], ["--model", str(tmp_path)], ["--column", ""]):
        assert main([*given, *more]) == 2
    text = write(tmp_path / "text.parquet", [{"prompt": "Q1", "target": "a"}])
    assert main(["likelihood", text, *given[2:]]) == 2
    assert len(list(out.parent.iterdir())) == 1, "nothing provisional stays"


def test_mean_log_likelihood_is_the_models(tmp_path, tokenizers):
    import torch

    from verl_hpt.data.likelihood import Likelihood

    model = random_model(tmp_path / "model")
    demo = Demonstration("x", ids=[5, 6, 7], mask=[1, 0, 1])
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([[1, 2, 5, 6, 7]])).logits[0], -1)
    expected = float((logs[1, 5] + logs[3, 7]) / 2)
    assert Likelihood(str(tmp_path / "model"), "cpu")([1, 2], demo) == pytest.approx(expected, abs=1e-5)
    file = write(tmp_path / "a.parquet", rows(20))
    options = ("--tokenizer", str(tokenizers / "qwen3"), "--model", str(tmp_path / "model"), "--model-rows", "4")
    _, _, result = checked(tmp_path, file, *options, "--report", str(tmp_path / "r.png"))
    assert len(result["log_likelihood"]["values"]) == 4 and all(
        -12 < v < -4 for v in result["log_likelihood"]["values"]
    )
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
