"""The start-up check: does this model, on this device, give a token the same bits however it is computed?

The real runner computes the same tokens in several ways, and their logits are compared bit by bit; attention is
compared by itself too, in float32, since rounding to a low precision hides a difference from most tokens and not from
all. Row counts are those at which float32 kernels are known to change (`python -m benchmarks.rows`), and the prompt is
longer than a key block of attention. A check of a few forwards proves nothing for all others; it finds a kernel, a
device or a layer that does not keep the rules on which repeatability rests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reprise.engine import attention
from reprise.engine.alone_runner import AloneRunner
from reprise.engine.attention import KEY_BLOCK
from reprise.engine.kv_cache import KVCache, LayerShape
from reprise.engine.model_runner import ModelRunner, PagedRunner
from reprise.engine.scheduler import Batch, ScheduledSequence
from reprise.engine.sequence import Sequence, SequenceStatus
from reprise.types import SamplingParams

NUM_PROMPT_TOKENS = KEY_BLOCK + 5
CHUNKS = (3, 7, 1, 5, 10)
"""Where the prompt is cut: row counts, filled up or not, that have kernels of their own."""
NUM_ALONE_TOKENS = 13
_NUM_IN_COMPANY = 11
_NUM_OTHER_TOKENS = 6
_BLOCK_SIZE = 16


def num_check_blocks(block_size: int) -> int:
    """Of the pool, that the check computes in."""
    return sum(
        -(-count // block_size) for count in (NUM_PROMPT_TOKENS, sum(CHUNKS) + _NUM_IN_COMPANY, _NUM_OTHER_TOKENS)
    )


NUM_CHECK_BLOCKS = num_check_blocks(_BLOCK_SIZE)
_ATTENTION_TOKENS = 2 * KEY_BLOCK + 9
_ATTENTION_PARTS = ((0, 1), (1, 3), (5, 8), (120, 131), (130, 131), (250, _ATTENTION_TOKENS), (264, 265))
_EVERY_ROW = SamplingParams(seed=0, max_tokens=8, num_prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class Repeatability:
    """What the check found. `fingerprint`: of the bits of the logits of the tokens computed alone."""

    passed: bool
    reason: str
    fingerprint: str


def check_paged(
    model: PreTrainedModel, shapes: dict[nn.Module, LayerShape], max_sequence_tokens: int, *, fixed_order: bool
) -> Repeatability:
    """As `check_runner`, in a KV cache of its own. Without `fixed_order` the fingerprint alone."""
    vocab_size = model.config.get_text_config().vocab_size
    cache = KVCache(NUM_CHECK_BLOCKS * _BLOCK_SIZE, model.device, shapes)
    runner = PagedRunner(model, cache, _BLOCK_SIZE, fixed_order=fixed_order)
    if not fixed_order:
        (prompt,) = _prompts(vocab_size, min(NUM_PROMPT_TOKENS, max_sequence_tokens))
        (rows,) = _rows(runner, [ScheduledSequence(_sequence(0, prompt, range(NUM_CHECK_BLOCKS)), 0, len(prompt))])
        return Repeatability(passed=False, reason="turned off", fingerprint=_fingerprint([rows]))
    return check_runner(runner, vocab_size, max_sequence_tokens, difference=_attention_difference(model, shapes))


def check_runner(
    runner: ModelRunner,
    vocab_size: int,
    max_sequence_tokens: int,
    *,
    block_size: int = _BLOCK_SIZE,
    difference: str = "",
) -> Repeatability:
    """About 190 tokens in 10 forwards, in the first NUM_CHECK_BLOCKS blocks. `difference`: found before."""
    num_tokens = min(NUM_PROMPT_TOKENS, max_sequence_tokens)
    num_blocks = -(-num_tokens // block_size)
    prompt, other = _prompts(vocab_size, num_tokens, min(_NUM_OTHER_TOKENS, max_sequence_tokens))
    whole = _sequence(0, prompt, range(num_blocks))
    (expected,) = _rows(runner, [ScheduledSequence(whole, 0, num_tokens)])
    fingerprint = _fingerprint([expected])
    found = _Comparison(expected)
    found.difference = difference

    # The first tokens again in chunks, elsewhere in the cache, the last chunk in company.
    num_again = -(-(sum(CHUNKS) + _NUM_IN_COMPANY) // block_size)
    again = _sequence(1, prompt, range(num_blocks, num_blocks + num_again))
    end = 0
    for size in CHUNKS:
        start, end = end, min(end + size, num_tokens)
        if start < end:
            found.compare("in chunks", start, _rows(runner, [ScheduledSequence(again, start, end - start)])[0])
    company = ScheduledSequence(
        _sequence(
            2, other, range(num_blocks + num_again, num_blocks + num_again + -(-_NUM_OTHER_TOKENS // block_size))
        ),
        0,
        len(other),
    )
    if end < num_tokens:
        ours = ScheduledSequence(again, end, min(_NUM_IN_COMPANY, num_tokens - end))
        found.compare("in company", end, _rows(runner, [company, ours])[1])

    # The last tokens again, over the keys and values of the first pass: decoding, and a cached prefix.
    start = max(0, num_tokens - 7)
    found.compare(
        "after a cached prefix", start, _rows(runner, [ScheduledSequence(whole, start, num_tokens - start)])[0]
    )
    last = num_tokens - 1
    for rows in (
        _rows(runner, [ScheduledSequence(whole, last, 1)])[0],
        _rows(runner, [company, ScheduledSequence(whole, last, 1)])[1],
    ):
        found.compare("token by token", last, rows)
    return found.result("the same bits alone, in company, in chunks and token by token", fingerprint)


def check_alone(model: PreTrainedModel, max_sequence_tokens: int) -> Repeatability:
    """Where each sequence is computed by itself: the same forwards, run again, give the same bits."""
    runner = AloneRunner(model)
    num_tokens = min(NUM_ALONE_TOKENS, max_sequence_tokens)
    prompt, other = _prompts(model.config.get_text_config().vocab_size, num_tokens, min(6, max_sequence_tokens))
    num_prompt_tokens = max(1, num_tokens - 2)
    expected = _generated(runner, _sequence(0, prompt[:num_prompt_tokens]), prompt, None)
    found = _Comparison(expected)
    neighbour = ScheduledSequence(_sequence(1, other), 0, len(other))
    found.compare("in company", 0, _generated(runner, _sequence(2, prompt[:num_prompt_tokens]), prompt, neighbour))
    continued = Sequence(
        3,
        choice_index=0,
        prompt_token_ids=prompt[:num_prompt_tokens],
        sampling=_EVERY_ROW,
        output_token_ids=prompt[num_prompt_tokens:],
    )
    continued.status = SequenceStatus.RUNNING
    (last,) = _rows(runner, [ScheduledSequence(continued, 0, num_tokens)])
    found.compare("continued", len(expected) - 1, last[-1:])
    return found.result("the same bits alone, in company and continued", _fingerprint([expected]))


def fingerprint_of(model: PreTrainedModel, runner: ModelRunner, max_sequence_tokens: int) -> str:
    """As a check gives it, from one forward, where nothing is compared."""
    num_tokens = min(NUM_ALONE_TOKENS, max_sequence_tokens)
    (prompt,) = _prompts(model.config.get_text_config().vocab_size, num_tokens)
    return _fingerprint(_rows(runner, [ScheduledSequence(_sequence(0, prompt), 0, num_tokens)]))


def _attention_difference(model: PreTrainedModel, shapes: dict[nn.Module, LayerShape]) -> str:
    """How attention of a query differs with the queries beside it; empty where it does not."""
    num_heads = model.config.get_text_config().num_attention_heads
    generator = torch.Generator().manual_seed(2)
    for heads, key_dim, value_dim in {(s.num_key_value_heads, s.key_dim, s.value_dim) for s in shapes.values()}:

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(model.device)

        query = random(heads, max(1, num_heads // heads), _ATTENTION_TOKENS, key_dim)
        keys, values = random(heads, 3 * KEY_BLOCK, key_dim), random(heads, 3 * KEY_BLOCK, value_dim)
        whole = _attended(query, keys, values, 0, _ATTENTION_TOKENS)
        for start, end in _ATTENTION_PARTS:
            largest = (_attended(query, keys, values, start, end) - whole[:, :, start:end]).abs().max()
            if largest:
                return f"attention of a token differs with the number of tokens beside it by up to {float(largest):.2g}"
    return ""


def _attended(query: Tensor, keys: Tensor, values: Tensor, start: int, end: int) -> Tensor:
    num_keys = -(-end // KEY_BLOCK) * KEY_BLOCK
    positions = torch.arange(num_keys, device=query.device)
    return attention.attend(
        query[:, :, start:end],
        keys[:, :num_keys],
        values[:, :num_keys],
        positions[None, :] <= positions[start:end, None],
        scale=query.shape[-1] ** -0.5,
        softcap=None,
        sinks=None,
    )


class _Comparison:
    """Rows of logits against the expected ones; the first that differ are kept."""

    def __init__(self, expected: Tensor) -> None:
        self._expected = expected
        self.difference = ""

    def compare(self, how: str, start: int, rows: Tensor) -> None:
        """`rows`: logits of the tokens from `start` on."""
        expected = self._expected[start : start + rows.shape[0]]
        if self.difference or torch.equal(rows.view(torch.uint8), expected.contiguous().view(torch.uint8)):
            return
        largest = float((rows.float() - expected.float()).abs().max())
        self.difference = f"logits {how} differ from those of the prompt alone by up to {largest:.2g}"

    def result(self, equal: str, fingerprint: str) -> Repeatability:
        """`equal`: what to say where no row differed."""
        reason = self.difference or f"logits have {equal}"
        return Repeatability(passed=not self.difference, reason=reason, fingerprint=fingerprint)


def _generated(
    runner: ModelRunner, sequence: Sequence, tokens: list[int], neighbour: ScheduledSequence | None
) -> Tensor:
    """Logits of each token, the prompt's in one pass and one pass for each token after it."""
    parts = []
    while sequence.num_computed_tokens < len(tokens):
        scheduled = ScheduledSequence(sequence, sequence.num_computed_tokens, sequence.num_uncomputed_tokens)
        batch = [scheduled] if neighbour is None else [neighbour, scheduled]
        parts.append(_rows(runner, batch)[-1])
        sequence.num_computed_tokens, neighbour = sequence.num_tokens, None
        sequence.token_ids += tokens[sequence.num_tokens : sequence.num_tokens + 1]
    return torch.cat(parts)


def _rows(runner: ModelRunner, batch: Batch) -> list[Tensor]:
    """Logits [rows, vocab] of each entry; a runner may write the next step's over its own."""
    return list(torch.split(runner.run(batch).clone(), [scheduled.num_logit_rows for scheduled in batch]))


def _sequence(sequence_id: int, token_ids: list[int], block_ids: range = range(0)) -> Sequence:
    sequence = Sequence(sequence_id, choice_index=0, prompt_token_ids=token_ids, sampling=_EVERY_ROW)
    sequence.block_ids = list(block_ids)
    sequence.status = SequenceStatus.RUNNING
    return sequence


def _prompts(vocab_size: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _fingerprint(logits: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for rows in logits:
        digest.update(rows.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
