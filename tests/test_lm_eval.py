"""The adapter for lm-evaluation-harness: its log-likelihoods and texts are those of the model under the plan."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from depthkv import SharingPlan, load, share
from depthkv.adapt.adapters import LoraSettings, add_adapter, save_adapter
from depthkv.checkpoint import save
from depthkv.errors import DepthKVError
from tiny import LAYERS, tiny_model

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

import depthkv.lm_eval
from depthkv.lm_eval import DepthKVLM, main

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["depthkv_colours", "depthkv_counting", "depthkv_passages"]

FULL = SharingPlan.full(LAYERS)
EVERY_SECOND = SharingPlan.every(2, LAYERS)
FIRST_HALF = SharingPlan.from_leaders([0, 1], LAYERS)
PLANS = [EVERY_SECOND, FIRST_HALF]

PAIRS = [
    ("The colour of fresh grass is", " green"),
    ("The colour of fresh grass is", " bright red"),
    ("Monday , Tuesday , Wednesday ,", " Thursday and then they turned back"),
    ("one , two ,", " three"),
    ("January", " February , March , April"),
]
TEXT = json.loads((TASKS / "passages.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]


def words() -> list[str]:
    """Every word of the tasks, and of the requests above."""
    found: dict[str, None] = {}
    for file in sorted(TASKS.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for value in json.loads(line).values():
                for text in value if isinstance(value, list) else [str(value)]:
                    found |= dict.fromkeys(text.split())
    return list(found)


def tokenizer_of(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """Words parted by spaces."""
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *vocabulary])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = tokenizer_of(words())
    save(folder, tiny_model(vocab_size=len(tokenizer)), tokenizer)
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another working directory than that of the tasks, so that none of their files is found by chance."""
    monkeypatch.chdir(tmp_path)


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of every token but the first: [tokens - 1, vocabulary]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0, :-1].double(), dim=-1)


def expected_pair(model: Any, tokenizer: Any, pair: tuple[str, str]) -> tuple[float, bool]:
    """Log-likelihood of a continuation, and whether greedy decoding writes it."""
    context, continuation = tokenizer.encode(pair[0]), tokenizer.encode(pair[1])
    rows = logprobs(model, context + continuation)[len(context) - 1 :]
    chosen = torch.tensor(continuation)
    return rows.gather(1, chosen[:, None]).sum().item(), bool((rows.argmax(-1) == chosen).all())


def expected_rolling(model: Any, tokenizer: Any, text: str, length: int) -> float:
    """Log-likelihood of a text in windows of `length` tokens, of which each token is a target once."""
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    total = 0.0
    for start in range(0, len(tokens) - 1, length):
        end = min(start + length, len(tokens) - 1)
        window = tokens[max(0, end - length) : end + 1]
        targets = torch.tensor(tokens[start + 1 : end + 1])
        rows = logprobs(model, window)[-len(targets) :]
        total += rows.gather(1, targets[:, None]).sum().item()
    return total


# The three kinds of requests


@pytest.mark.parametrize("batch", [1, "3", "auto"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_loglikelihoods_are_those_of_the_plan(checkpoint: Path, plan: SharingPlan, batch: int | str) -> None:
    with DepthKVLM(checkpoint, plan=plan, batch_size=batch, max_length=32, max_batch_size=4) as lm:
        found = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    model, tokenizer, _ = load(checkpoint)
    with share(model, plan):
        expected = [expected_pair(model, tokenizer, pair) for pair in PAIRS]
    unshared = [expected_pair(model, tokenizer, pair) for pair in PAIRS]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert all(abs(a[0] - b[0]) > 1e-2 for a, b in zip(found, unshared, strict=True))


@pytest.mark.parametrize("batch", [2, "auto"])
def test_rolling_loglikelihoods_are_those_of_the_plan(checkpoint: Path, batch: int | str) -> None:
    length = 16
    texts = [TEXT, " ".join(TEXT.split()[:5])]
    assert len(TEXT.split()) > 2 * length
    with DepthKVLM(checkpoint, plan=EVERY_SECOND, batch_size=batch, max_length=length, max_batch_size=4) as lm:
        found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in texts]))
    model, tokenizer, _ = load(checkpoint)
    with share(model, EVERY_SECOND):
        expected = [expected_rolling(model, tokenizer, text, length) for text in texts]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_generated_text_is_that_of_the_plan(checkpoint: Path, plan: SharingPlan, batch: int) -> None:
    contexts = [context for context, _ in PAIRS[1:]]
    with DepthKVLM(checkpoint, plan=plan, batch_size=batch) as lm:
        requests = [(context, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for context in contexts]
        found = lm.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    model, tokenizer, _ = load(checkpoint)

    def written(context: str) -> str:
        tokens = tokenizer(context, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**tokens, max_new_tokens=12, do_sample=False)
        return str(tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))

    with share(model, plan):
        assert found == [written(context) for context in contexts]
    assert found != [written(context) for context in contexts]


def test_the_full_plan_is_the_harness_own_model(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    reference = HFLM(pretrained=model, tokenizer=tokenizer_of(words()), batch_size=2)
    with DepthKVLM(checkpoint, retention=1, batch_size=2) as lm:
        assert lm.plan == FULL
        lines = asked("loglikelihood", *PAIRS)
        assert lm.loglikelihood(lines) == reference.loglikelihood(lines)
        lines = asked("loglikelihood_rolling", (TEXT,))
        assert lm.loglikelihood_rolling(lines) == reference.loglikelihood_rolling(lines)
        lines = asked("generate_until", ("one , two ,", {"until": ["\n"], "max_gen_toks": 8}))
        assert lm.generate_until(lines) == reference.generate_until(lines)


# Whole tasks


def evaluated(model: Any, **options: Any) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    options = {"tasks": list(NAMES), "task_manager": tasks, "bootstrap_iters": 0, **options}
    found = lm_eval.simple_evaluate(model=model, **options)
    # as the command line writes it
    return dict(json.loads(json.dumps(found, default=handle_non_serializable)))


def scores(found: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, metric): value
        for task in NAMES
        for metric, value in found["results"][task].items()
        if "," in metric and "stderr" not in metric
    }


def test_tasks_run_by_name_and_tell_the_plan(checkpoint: Path) -> None:
    shared = evaluated("depthkv", model_args=f"pretrained={checkpoint},retention=0.5", batch_size=2)
    model, tokenizer, _ = load(checkpoint)
    with share(model, EVERY_SECOND):
        expected = evaluated(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2))
    unshared = evaluated(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2))
    assert len(scores(shared)) == 5
    assert scores(shared) == scores(expected)
    metric = ("depthkv_passages", "bits_per_byte,none")
    assert scores(shared)[metric] != scores(unshared)[metric]
    answers = [[sample["filtered_resps"] for sample in found["samples"][NAMES[1]]] for found in (shared, unshared)]
    assert answers[0] != answers[1]

    config = shared["config"]
    assert config["pretrained"] == str(checkpoint)
    assert config["retention"] == 0.5
    assert config["kv_source_layers"] == list(EVERY_SECOND.kv_source_layers)
    assert config["kv_bytes_per_token"] == 2 * 64  # of 4 layers, see tiny_model
    assert config["model_dtype"] == "torch.float32"


def test_tasks_run_with_an_object(checkpoint: Path) -> None:
    with DepthKVLM(checkpoint, plan=FIRST_HALF, batch_size=2) as lm:
        found = evaluated(lm, tasks=NAMES[:1], limit=2)
    assert found["config"]["kv_source_layers"] == [0, 1, 1, 1]
    assert found["config"]["pretrained"] == str(checkpoint)
    assert found["n-samples"][NAMES[0]]["effective"] == 2


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, where the module is run as `__main__`."""
    model_args = f"pretrained={checkpoint},retention=0.5"
    command = [sys.executable, "-m", "depthkv.lm_eval", "--model", "depthkv", "--model_args", model_args]
    command += ["--include_path", str(TASKS), "--tasks", ",".join(NAMES[::2]), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(depthkv.__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|depthkv_colours" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(written.read_text(encoding="utf-8"))["config"]
    assert config["model"] == "depthkv"
    assert config["kv_source_layers"] == [0, 0, 2, 2]


# Which model and plan


def test_the_plan_of_the_checkpoint_holds_unless_another_is_given(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load(checkpoint)
    save(tmp_path / "own", model, tokenizer, FIRST_HALF)
    EVERY_SECOND.save("plan.json")
    for arguments, plan in [
        ({}, FIRST_HALF),
        ({"plan": "plan.json"}, EVERY_SECOND),
        ({"plan": Path("plan.json")}, EVERY_SECOND),
        ({"retention": 0.25}, SharingPlan.every(4, LAYERS)),
    ]:
        with DepthKVLM(str(tmp_path / "own"), **arguments) as lm:
            assert lm.plan == plan, arguments
    with DepthKVLM(checkpoint) as lm:
        assert lm.plan == FULL


def test_an_adapter_is_on(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load(checkpoint)
    adapted = add_adapter(model, LoraSettings(rank=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    save_adapter(tmp_path / "adapter", adapted, base=str(checkpoint), plan=EVERY_SECOND)
    with DepthKVLM(tmp_path / "adapter", batch_size=2) as lm:
        found = [value for value, _ in lm.loglikelihood(asked("loglikelihood", *PAIRS))]
        assert lm.plan == EVERY_SECOND
    base, _, _ = load(checkpoint)
    with share(base, EVERY_SECOND):
        without = [expected_pair(base, tokenizer, pair)[0] for pair in PAIRS]
    model, _, plan = load(tmp_path / "adapter")
    assert plan is not None
    with share(model, plan):
        expected = [expected_pair(model, tokenizer, pair)[0] for pair in PAIRS]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found != pytest.approx(without, abs=1e-2)


def test_arguments_reach_the_model(checkpoint: Path) -> None:
    with DepthKVLM(checkpoint, dtype="bfloat16", device="cpu", max_length=64, batch_size="auto:2") as lm:
        assert lm.model.dtype == torch.bfloat16
        assert (lm.max_length, lm.batch_size, lm.batch_schedule) == (64, "auto", 2)


def test_closing_restores_the_model(checkpoint: Path) -> None:
    lm = DepthKVLM(checkpoint, plan=EVERY_SECOND)
    model, tokenizer = lm.model, lm.tokenizer
    lm.close()
    lm.close()
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokens = tokenizer.encode(TEXT)
    assert torch.equal(logprobs(model, tokens), logprobs(plain, tokens))
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(DepthKVError, match="closed"):
        lm.loglikelihood(asked("loglikelihood", *PAIRS))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retnetion": 0.5}, "expected model_args among pretrained, plan, .*, got 'retnetion'"),
        ({"peft": "adapter"}, "got 'peft'"),
        ({"pretrained": None}, "expected pretrained=MODEL"),
        ({"pretrained": "/nowhere"}, "/nowhere"),
        ({"plan": EVERY_SECOND, "retention": 0.5}, "expected plan or retention among the model_args, got both"),
        ({"plan": "missing.json"}, "missing.json"),
        ({"plan": "six.json"}, "six.json: expected a plan for 4 layers, got one for 6"),
        ({"plan": SharingPlan.full(6)}, "^expected a plan for 4 layers, got one for 6"),
        ({"plan": [0, 0, 2, 2]}, "expected plan as a file, got"),
        ({"retention": "half"}, "expected a retention above 0 and at most 1, got 'half'"),
        ({"retention": 1.5}, "expected a retention above 0 and at most 1, got 1.5"),
        ({"dtype": "int8"}, "expected a dtype among auto, .*, got int8"),
        ({"device": "mps"}, "expected a device among cpu, .*, got 'mps'"),
        ({"batch_size": 0}, "expected a batch_size of at least 1, auto or auto:N, got 0"),
        ({"batch_size": "many"}, "expected a batch_size .*, got 'many'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_arguments(checkpoint: Path, arguments: dict[str, Any], message: str) -> None:
    SharingPlan.full(6).save("six.json")
    with pytest.raises(DepthKVError, match=message):
        DepthKVLM(**{"pretrained": checkpoint, **arguments})


def test_several_processes_are_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness would run every task in each of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DepthKVError, match="expected one process, got WORLD_SIZE=2"):
        DepthKVLM(checkpoint)


def test_command_line_refuses_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the harness's own command line would set up logging for the whole process
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: DepthKVLM(checkpoint, retention=2))
    assert main() == 2
    assert capsys.readouterr().err == "depthkv: expected a retention above 0 and at most 1, got 2\n"


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    spec = importlib.util.spec_from_file_location("depthkv.lm_eval_again", depthkv.lm_eval.__file__)
    assert spec is not None and spec.loader is not None
    with pytest.raises(DepthKVError, match=r"pip install 'depthkv\[eval\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
