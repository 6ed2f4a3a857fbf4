"""Whether the engine is right on a GPU, and how fast: in less than eight minutes, without a network.

  right     small models with random weights, in float32 and bfloat16: what the engine says greedily is what the model
            itself finds most likely but for rounding (and in float32 what `generate` says), and with the start-up check
            passed, every answer has the same bits alone, in company, in chunks and preempted
  floors    how fast this GPU reads memory and multiplies
  decoding  seconds of a step, and the share of the time in which weights, keys and values can be read
  prompts   tokens a second, and the share of the rate at which this GPU multiplies
  beside    transformers' own continuous batching over the same weights, in turns: output tokens a second

Without a GPU it says so and ends well. `--device cpu --shape tiny` goes through all of it where there is none: its
figures mean nothing. A part for which no time is left is named and not run; one that fails is named with its error,
and the rest goes on unless the GPU is lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.floors import matrix_rate, read_bandwidth
from benchmarks.report import print_report, table
from benchmarks.shapes import SHAPES, attention_operations, empty_model, layer_matrix_parameters
from benchmarks.steps import checked_step, seconds_a_step
from reprise.engine.block_pool import BlockPool
from reprise.engine.core import EngineCore
from reprise.engine.cuda.products import BlasSettings
from reprise.engine.device import is_lost
from reprise.engine.execution import Execution, choose_execution, cuda_paged
from reprise.engine.repeatability import Repeatability
from reprise.engine.sampler import Sampler
from reprise.engine.scheduler import Scheduler
from reprise.ipc.messages import Add, EngineConfig
from reprise.types import SamplingParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCAB_SIZE = 512
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 64},
    "mistral": {**_SMALL, "sliding_window": 48},
    "gpt_neox": {name: size for name, size in _SMALL.items() if name != "num_key_value_heads"},
    "mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""By model type: those that the decoder for CUDA runs, and two that stay with torch."""
OF_OUR_DECODER = ("llama", "qwen3", "mistral")
MAX_DEFICIT = {"float32": 1e-3, "bfloat16": 0.1}
"""By how much of what a row's logits vary by chosen tokens may be behind the model's own, on average."""
TARGETS = {"decode_share": 0.7, "prefill_share": 0.5, "ratio_to_transformers": 3.0}
CONTEXT, PROMPT_TOKENS, NEW_TOKENS = 2048, 64, 64


class OverError(BaseException):
    """There is no going on. No error that what is measured may get over."""


class OutOfTimeError(OverError):
    """The whole of it has taken longer than it may."""


class DeviceLostError(OverError):
    """The GPU answers with an error whatever it is asked."""


@contextmanager
def time_limit(seconds: float) -> Iterator[Callable[[], float]]:
    """Yields what tells the seconds that are left. What still runs then ends with OutOfTimeError."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    end = time.monotonic() + seconds
    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: whatever runs may swallow one.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield lambda: end - time.monotonic()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def execute(model: PreTrainedModel, config: EngineConfig) -> Execution:
    """What runs the model, on the CPU too through the decoder for CUDA where it has it."""
    found = cuda_paged(model, config, CONTEXT, model.device)
    if isinstance(found, Execution):
        return found
    print(f"  {found}")
    return choose_execution(model, msgspec.structs.replace(config, kernels="torch"), CONTEXT, model.device)


def make_core(execution: Execution, *, num_tokens: int | None = None, chunk: int | None = None) -> EngineCore:
    """A core over the runner; with room for no more than `num_tokens`, or steps of `chunk` tokens."""
    pool, limits = execution.pool, execution.limits
    num_blocks = min(pool.num_blocks, -(-num_tokens // pool.block_size)) if num_tokens else pool.num_blocks
    if chunk is not None:
        limits = dataclasses.replace(limits, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, limits.max_num_seqs))
    scheduler = Scheduler(limits, BlockPool(num_blocks, pool.block_size))
    return EngineCore(scheduler, execution.runner, Sampler(None, execution.selection))


Request = tuple[list[int], SamplingParams]
Answer = tuple[list[int], list[float]]


def answers(core: EngineCore, requests: Sequence[Request]) -> list[Answer]:
    """Tokens and their log-probabilities, all requests at once."""
    found: dict[int, Answer] = {index: ([], []) for index in range(len(requests))}
    for index, (prompt, sampling) in enumerate(requests):
        core.add(Add(index, 0, prompt, sampling))
    while core.has_work:
        for output in checked_step(core):
            found[output.sequence_id][0].extend(output.token_ids)
            found[output.sequence_id][1].extend(entry.logprob for entry in output.logprobs or [] if entry is not None)
    return list(found.values())


def random_ids(count: int, seed: int, vocab_size: int = VOCAB_SIZE) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


def small_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(7)
    config = AutoConfig.for_model(name, **MODELS[name])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.09)
    made: PreTrainedModel = model.to(device, dtype).eval()
    return made


@torch.inference_mode()
def deficit(model: Any, prompt: list[int], token_ids: list[int]) -> float:
    """By how much of what logits vary by the chosen tokens are behind the most likely ones, on average."""
    ids = torch.tensor([prompt + token_ids], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).mean())


def check_model(name: str, dtype: str, device: Literal["cpu", "cuda"], num_tokens: int) -> dict[str, Any]:
    """Whether a small model's answers are its own, and the same in every circumstance."""
    config = EngineConfig(
        model=name, device=device, max_num_seqs=16, max_num_batched_tokens=1024, kv_cache_memory=1 << 26
    )  # fmt: skip
    execution = execute(small_model(name, DTYPES[dtype], device), config)
    found: Repeatability = execution.check()
    block = execution.pool.block_size
    # Two end a block while they answer: with few blocks one of them has to give way.
    prompts = [random_ids(length, index) for index, length in enumerate((1, 9, block - 3, block - 2, 2 * block - 5))]
    greedy, sampled = (
        SamplingParams(seed=5, temperature=temperature, max_tokens=num_tokens, num_logprobs=0)
        for temperature in (0.0, 1.0)
    )
    requests: list[Request] = [(prompt, sampling) for sampling in (greedy, sampled) for prompt in prompts]
    alone = [answers(make_core(execution), [request])[0] for request in requests]
    longest = max(map(len, prompts)) + num_tokens
    scarce = make_core(execution, num_tokens=longest + 2 * block)
    ways = {
        "in company": answers(make_core(execution), requests),
        "in chunks": answers(make_core(execution, chunk=11), requests),
        "preempted": answers(scarce, requests),
    }
    own: Any = small_model(name, DTYPES[dtype], device)
    said = [token_ids for token_ids, _ in alone[: len(prompts)]]
    with default_settings(device):
        by_itself = [
            own.generate(
                torch.tensor([prompt], device=device), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
        behind = sum(deficit(own, prompt, token_ids) for prompt, token_ids in zip(prompts, said, strict=True))
    behind /= len(prompts)
    same = sum(ours == theirs for ours, theirs in zip(said, by_itself, strict=True))
    right = behind <= MAX_DEFICIT[dtype] and (dtype != "float32" or same == len(prompts))
    differing = [how for how, found_there in ways.items() if found_there != alone]
    # Here nothing else is to run, and the promise is to be made.
    expected = device == "cuda" and dtype == "bfloat16" and name in OF_OUR_DECODER
    as_expected = not expected or (execution.kernels.startswith("cuda") and found.passed)
    return {
        "model": name, "dtype": dtype, "kernels": execution.kernels, "right": right,
        "deficit": behind, "same_as_generate": same, "prompts": len(prompts),
        "repeats": found.passed, "reason": found.reason, "differing": differing,
        "num_preemptions": scarce.stats().num_preemptions,
        # Where the check passes, the promise is made, and must hold.
        "passed": right and as_expected and not (found.passed and differing),
    }  # fmt: skip


def large_model(shape: str, device: str) -> PreTrainedModel:
    """Random weights in bfloat16, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = empty_model(shape)
    finally:
        torch.set_default_dtype(before)
    made: PreTrainedModel = model.eval()
    return made


def prefill_seconds(core: EngineCore, num_tokens: int, repeats: int, vocab_size: int) -> float:
    """The shortest time to the first token of a prompt that no cache knows."""
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=1)
    best = float("inf")
    for index in range(repeats + 1):
        core.add(Add(1_000_000 + index, 0, random_ids(num_tokens, index, vocab_size), sampling))
        started = time.perf_counter()
        while core.has_work:
            checked_step(core)
        if index:
            best = min(best, time.perf_counter() - started)
    return best


def rate_of_engine(core: EngineCore, prompts: list[list[int]], new_tokens: int) -> float:
    """Output tokens a second from the first request to the last token."""
    sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=new_tokens)
    started = time.perf_counter()
    found = answers(core, [(prompt, sampling) for prompt in prompts])
    return sum(len(token_ids) for token_ids, _ in found) / (time.perf_counter() - started)


def rate_of_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """The same of `generate_batch`, by its own clock: its start and its warm-up do not count."""
    generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    results = model.generate_batch(
        prompts,
        generation_config=generation_config,
        # On a GPU as much as it likes of what is free; in a rehearsal no more than it needs.
        continuous_batching_config=ContinuousBatchingConfig(
            **({"max_memory_percent": 0.5} if model.device.type == "cuda" else {"num_blocks": 32})
        ),
        record_timestamps=True,
    ).values()
    if len(results) != len(prompts) or any(len(result.generated_tokens) != new_tokens for result in results):
        raise RuntimeError("transformers' continuous batching did not finish")
    seconds = max(result.timestamps[-1] for result in results) - min(result.created_time for result in results)
    return float(len(prompts) * new_tokens / seconds)


@contextmanager
def default_settings(device: str) -> Iterator[None]:
    """Settings of products as torch has them; an engine that runs changes them for the process."""
    if device != "cuda":
        yield
        return
    ours = BlasSettings.now()
    BlasSettings("default", (True, True), (True, True)).apply()
    try:
        yield
    finally:
        ours.apply()


@dataclasses.dataclass(frozen=True)
class Parts:
    """Runs one part after the other, as long as time is left, and notes in `result` what was not run or failed."""

    device: str
    left: Callable[[], float]
    result: dict[str, Any]

    def run(self, name: str, needed: float, part: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What the part found; nothing where it failed, or less than the `needed` seconds are left.

        Raises DeviceLostError.
        """
        if self.left() < needed:
            self.result["not_run"].append(name)
            return []
        try:
            return [part()]
        except Exception as error:
            traceback.print_exc()
            self.result["failures"].append({"part": name, "error": f"{type(error).__name__}: {error}"})
            print(f"{name}: FAILED with {type(error).__name__}", flush=True)
            if is_lost(torch.device(self.device)):
                raise DeviceLostError from error
            return []


def measure(options: argparse.Namespace, left: Callable[[], float], result: dict[str, Any]) -> None:
    """Fill in `result` part by part, so that what was found is shown when time runs out."""
    device = options.device
    parts = Parts(device, left, result)
    for name in MODELS:
        for dtype in DTYPES:
            check = partial(check_model, name, dtype, device, options.check_tokens)
            with default_settings(device):  # nothing of an earlier model is left to this one
                checked = parts.run(f"{name} in {dtype}", 15, check)
            for found in checked:
                result["models"].append(found)
                print(f"{name} in {dtype}: {'passed' if found['passed'] else 'FAILED'}", flush=True)
    with default_settings(device):
        for rates in parts.run("speed", 90, partial(measure_floors, device)):
            result |= rates
            for large in parts.run(options.shape, 60, partial(load_large, options)):
                measure_speed(options, parts, **large)


def measure_floors(device: str) -> dict[str, float]:
    """What this GPU reads (bytes a second) and multiplies (operations a second)."""
    on_gpu = device == "cuda"
    budget, size = (1.0, 8192) if on_gpu else (0.05, 64)
    return {
        "read_bytes_per_second": read_bandwidth((4 << 30) if on_gpu else (1 << 24), budget=budget, device=device),
        "operations_per_second": matrix_rate(size, size, torch.bfloat16, budget=budget, device=device),
    }


def load_large(options: argparse.Namespace) -> dict[str, Any]:
    """The large model, what runs it, and whether that repeats."""
    started = time.perf_counter()
    model = large_model(options.shape, options.device)
    config = EngineConfig(model=options.shape, device=options.device, max_num_seqs=max(options.sequences),
                          max_num_batched_tokens=8192, kv_cache_memory=options.kv_cache_memory)  # fmt: skip
    execution = execute(model, config)
    found = execution.check()
    return {"model": model, "execution": execution, "found": found, "seconds": time.perf_counter() - started}


def measure_speed(
    options: argparse.Namespace,
    parts: Parts,
    model: PreTrainedModel,
    execution: Execution,
    found: Repeatability,
    seconds: float,
) -> None:
    """The large model's, which took so many seconds to load."""
    result, shape = parts.result, options.shape
    vocab_size = SHAPES[shape]["vocab_size"]
    result |= {"kernels": execution.kernels, "repeats": found.passed, "reason": found.reason, "load_seconds": seconds}
    if options.device == "cuda" and not (execution.kernels.startswith("cuda") and found.passed):
        result["failures"].append({"part": shape, "error": f"runs by {execution.kernels}: {found.reason}"})
    print(f"{shape}: {execution.kernels}, loaded in {seconds:.0f} s", flush=True)
    for count in options.sequences:
        decoding = partial(measure_decoding, options, execution, count, result["read_bytes_per_second"])
        result["decoding"] += parts.run(f"decoding {count}", 20, decoding)
    prompts = partial(measure_prompts, options, execution, result["operations_per_second"])
    result["prefill"] = next(iter(parts.run("prompts", 20, prompts)), None)
    for count in options.sequences:
        asked = [random_ids(PROMPT_TOKENS, 100 + index, vocab_size) for index in range(count)]
        beside = partial(beside_transformers, execution, model, asked)
        result["beside"] += parts.run(f"transformers' continuous batching of {count}", 60, beside)


def measure_decoding(
    options: argparse.Namespace, execution: Execution, count: int, bandwidth: float
) -> dict[str, float]:
    """Of so many sequences, beside the time in which weights, keys and values can be read (bytes a second)."""
    sizes = SHAPES[options.shape]
    core, best = make_core(execution), float("inf")
    for first_id in range(0, options.repeats * count, count):
        best = min(best, seconds_a_step(core, first_id, count, PROMPT_TOKENS, NEW_TOKENS))
    weights = 2 * (layer_matrix_parameters(options.shape) + sizes["vocab_size"] * sizes["hidden_size"])
    context = count * (PROMPT_TOKENS + NEW_TOKENS / 2) * execution.pool.bytes_per_token
    return {
        "sequences": count, "step_ms": best * 1000, "tokens_per_second": count / best,
        "share_of_floor": (weights + context) / bandwidth / best,
    }  # fmt: skip


def measure_prompts(options: argparse.Namespace, execution: Execution, operations: float) -> dict[str, float]:
    """Of one long prompt, beside the rate of products (operations a second)."""
    sizes, tokens = SHAPES[options.shape], options.prompt_tokens
    seconds = prefill_seconds(make_core(execution), tokens, options.repeats, sizes["vocab_size"])
    products = 2 * layer_matrix_parameters(options.shape) * tokens + attention_operations(options.shape, tokens)
    return {
        "tokens": tokens, "ms": seconds * 1000, "tokens_per_second": tokens / seconds,
        "share_of_rate": products / seconds / operations,
    }  # fmt: skip


def beside_transformers(execution: Execution, model: PreTrainedModel, prompts: list[list[int]]) -> dict[str, float]:
    """The best of two rounds each, and their ratio; transformers' with torch's settings as they are by default."""
    model.set_attn_implementation("sdpa")
    engine = transformers = 0.0
    for _ in range(2):
        # Each time with an empty prefix cache.
        engine = max(engine, rate_of_engine(make_core(execution), prompts, NEW_TOKENS))
        with default_settings(model.device.type):
            transformers = max(transformers, rate_of_transformers(model, prompts, NEW_TOKENS))
    return {
        "sequences": len(prompts), "engine": engine, "transformers": transformers, "ratio": engine / transformers
    }  # fmt: skip


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """What was measured, and the targets."""
    rows = [["measured", "value", "share", "target"]]
    for found in result["decoding"]:
        target = f"{TARGETS['decode_share']:.2f}" if found["sequences"] == 1 else ""
        value = f"{found['tokens_per_second']:.0f} tokens/s"
        rows.append([f"decoding {found['sequences']}", value, f"{found['share_of_floor']:.2f}", target])
    if result["prefill"]:
        found = result["prefill"]
        value, share = f"{found['tokens_per_second']:.0f} tokens/s", f"{found['share_of_rate']:.2f}"
        rows.append([f"prompt of {found['tokens']}", value, share, f"{TARGETS['prefill_share']:.2f}"])
    for found in result["beside"]:
        value = f"{found['engine']:.0f} : {found['transformers']:.0f} tokens/s"
        target = f"{TARGETS['ratio_to_transformers']:.1f}"
        rows.append([f"beside transformers, {found['sequences']}", value, f"{found['ratio']:.1f}", target])
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a rehearsal (default: cuda)")
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b", help="of the speed part (default: llama3-8b)")
    parser.add_argument("--deadline", type=float, default=460.0, help="seconds for all of it (default: 460)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=2000, help="of the long prompt (default: 2000)")
    parser.add_argument("--check-tokens", type=int, default=24, help="new tokens of the small models (default: 24)")
    parser.add_argument("--kv-cache-memory", type=int, default=4 << 30, help="bytes (default: 4 GiB)")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch sees: nothing was run (--device cpu --shape tiny rehearses)")
        return 0
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": options.shape,
        "models": [], "decoding": [], "prefill": None, "beside": [], "not_run": [], "failures": [],
    }  # fmt: skip
    started = time.monotonic()
    try:
        with time_limit(options.deadline) as left:
            measure(options, left, result)
    except OutOfTimeError:
        signal.setitimer(signal.ITIMER_REAL, 0)
        result["not_run"].append("what was running when the time was over, and all after it")
    except DeviceLostError:
        result["not_run"].append("all after the part that broke the GPU")
    gc.collect()
    checks = [["model", "dtype", "kernels", "own answers", "same as generate", "repeats", "differing"]]
    checks += [
        [
            found["model"], found["dtype"], found["kernels"], "yes" if found["right"] else "NO",
            f"{found['same_as_generate']}/{found['prompts']}", "yes" if found["repeats"] else "no",
            ", ".join(found["differing"]) or "none",
        ]
        for found in result["models"]
    ]  # fmt: skip
    every = len(result["models"]) == len(MODELS) * len(DTYPES)
    right = every and not result["failures"] and all(found["passed"] for found in result["models"])
    # A large model that was not run, for time, has not been shown to repeat.
    result["passed"] = right and (options.device == "cpu" or result.get("repeats") is True)
    result["seconds"] = time.monotonic() - started
    print(table(checks))
    for part in result["not_run"]:
        print(f"not run: {part}")
    for failure in result["failures"]:
        print(f"failed: {failure['part']}: {failure['error']}")
    print_report(rows_of(result), result)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except Exception:  # noqa: BLE001 # shown, and the process ends
        traceback.print_exc()
    sys.stdout.flush()
    # A thread of transformers that does not end would keep the process.
    os._exit(code)
