"""Batches: the PromptTree (one prompt, several completions), and how a global batch is divided into micro-batches.

Legend: B examples of a batch, N completions per example, P prompt width, C completion width, M scored tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass
class PromptTree:
    """A batch of prompts with N completions each: one row per prompt, its completions behind it, right-padded."""

    input_ids: Tensor  # (B, P + C) int64
    position_ids: Tensor  # (B, P + C) int64; completions go on from the prompt's true length
    branch_ids: Tensor  # (B, P + C) int64: 0 prompt, 1..N completion, -1 padding
    rows: Tensor  # (M,) flat index of the hidden state that predicts the token
    labels: Tensor  # (M,) the token
    sequence_ids: Tensor  # (M,) b * N + n
    prompt_width: int
    num_completions: int

    def to(self, device) -> "PromptTree":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return PromptTree(
            **{k: to_device(v, device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )

    def sum_logps(self, token_logps: Tensor) -> Tensor:
        """(M,) token log-probs -> (B, N) sums per completion, of the same bits whenever they are run.

        One row per completion: no two tokens are added to the same place by threads in any order,
        which is what index_add does on a GPU."""
        B, N = len(self.input_ids), self.num_completions
        width = self.input_ids.shape[1] - self.prompt_width + 1  # C inputs, and EOS: a title fits
        sequences = torch.arange(B * N, device=self.sequence_ids.device)
        starts = torch.searchsorted(self.sequence_ids, sequences)  # sequence_ids ascend
        tokens = torch.arange(len(self.sequence_ids), device=self.sequence_ids.device)
        places = tokens - starts[self.sequence_ids]  # (M,) of a token within its title
        rows = token_logps.new_zeros(B * N * width)
        rows = rows.scatter(0, self.sequence_ids * width + places, token_logps)
        return rows.view(B, N, width).sum(2)


def build_tree(prompts: list, completions: list[list[list[int]]]) -> PromptTree:
    """B prompts (lists or arrays of ids) and, per prompt, N completions that each end in EOS.

    ValueError if N differs or anything is empty.
    All of a completion is scored, but its EOS is a label only: n ids occupy n - 1 positions. The last prompt token
    predicts the first token of every completion."""
    if not prompts or len(prompts) != len(completions):
        raise ValueError(
            f"expected one list of completions per prompt, got {len(completions)} for {len(prompts)} prompts"
        )
    N = len(completions[0])
    if N == 0 or any(len(group) != N for group in completions):
        raise ValueError(
            f"every prompt needs the same number of completions, at least 1; got {[len(g) for g in completions]}"
        )
    if any(len(p) == 0 for p in prompts) or any(
        len(c) == 0 for group in completions for c in group
    ):
        raise ValueError(
            "empty prompt or completion: a prompt needs a token, a completion at least its EOS"
        )
    B, P = len(prompts), max(map(len, prompts))
    C = max(sum(len(c) - 1 for c in group) for group in completions)
    input_ids = np.zeros((B, P + C), np.int64)
    position_ids = np.zeros((B, P + C), np.int64)
    branch_ids = np.full((B, P + C), -1, np.int64)
    rows, labels, sequence_ids = [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        length = len(prompt)
        input_ids[b, :length] = prompt
        position_ids[b, :length] = np.arange(length)
        branch_ids[b, :length] = 0
        at = P
        for n, completion in enumerate(group):
            inner = len(completion) - 1
            input_ids[b, at : at + inner] = completion[:-1]
            position_ids[b, at : at + inner] = np.arange(length, length + inner)
            branch_ids[b, at : at + inner] = n + 1
            rows += [b * (P + C) + length - 1, *range(b * (P + C) + at, b * (P + C) + at + inner)]
            labels += completion
            sequence_ids += [b * N + n] * len(completion)
            at += inner
    tensors = (
        input_ids,
        position_ids,
        branch_ids,
        np.array(rows),
        np.array(labels),
        np.array(sequence_ids),
    )
    return PromptTree(*map(torch.from_numpy, tensors), prompt_width=P, num_completions=N)


def to_device(tensor: Tensor, device) -> Tensor:
    """Copy to the device without waiting for it: from pageable memory the host would wait until the GPU is idle."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def micro_batches(widths, indices, num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Divide one global batch: per rank a list of micro-batches of examples with similar widths; `widths` as tree_widths.

    Sorted by width and dealt out in turn, so that ranks carry equal loads. A micro-batch holds one example, or as many as
    stay within `budget` tokens, padding included. All ranks get the same number of micro-batches; the missing ones are
    empty lists."""
    ordered = sorted((int(i) for i in indices), key=lambda i: (-sum(widths[i]), i))
    ranks = []
    for rank in range(num_ranks):
        batches: list[list[int]] = []
        P = C = 0  # widths of the last batch's widest prompt and completions
        for i in ordered[rank::num_ranks]:
            p, c = widths[i]
            if not batches or (max(P, p) + max(C, c)) * (len(batches[-1]) + 1) > budget:
                batches.append([])
                P = C = 0
            batches[-1].append(i)
            P, C = max(P, p), max(C, c)
        ranks.append(batches)
    most = max(map(len, ranks))
    return [batches + [[] for _ in range(most - len(batches))] for batches in ranks]


def prefetch(make: Callable, items: Iterable) -> Iterator:
    """make(item) for each item, in order, the next one made in the background while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        made = deque()
        for item in items:
            made.append(pool.submit(make, item))
            if len(made) > 1:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
