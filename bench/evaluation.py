"""Evaluation from one forward pass against the ways that take more.

Answers, rankings, examples per second, agreement.

    python bench/evaluation.py --run runs/movielens-tiny [--stage sft]

times a trained model: answers mean something. Without --run: random weights, speed only.

one pass          eval.predict without decoding: the 20 log-probs of every prompt, and its greedy
                  answer where it is listed
one pass + rest   the same, and real decoding of the prompts whose greedy answer is no listed title
20 sequences      the same model on 20 full sequences per prompt, scored rows only: ranking alone
generate          our batched, KV-cached greedy decoding: the answer alone
transformers      its generate on the merged weights, batch 10: with 128 new tokens whatever comes
                  (as the authors run it), and stopping at EOS or a line break: the answer alone
"""

import sys
from pathlib import Path

import numpy as np
import torch
from harness import (
    dtype_of,
    header,
    interleaved,
    make_model,
    movielens,
    parser,
    table,
    transformers_model,
)

from common import read_json
from data import NUM_CANDIDATES, Encoded, micro_batches, tree_widths
from eval import predict
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, encode_split, prepare
from lora import load_adapter, lora_layers, merge_lora
from model import generate, load_pretrained
from runtime.stages import load_stage


def load(args):
    """Model, tokenizer and the first `examples` test examples of a run.

    Without a run: random weights on MovieLens-1M."""
    if not args.run:
        if not args.data_dir:
            sys.exit("give --run, or --data_dir with ml-1m.zip")
        encoded, tokenizer = movielens(args, args.examples)
        return make_model(args, lora=False).eval(), tokenizer, encoded
    run = Path(args.run)
    settings = read_json(run / "config.json")
    known = {k: v for k, v in settings.items() if k in DataConfig.__dataclass_fields__}
    for name in ("data_dir", "prepared_dir"):
        known[name] = getattr(args, name) or known[name]
    prepared = prepare(DataConfig(**known))
    base, adapter = load_stage(run / args.stage)
    model = load_pretrained(base, dtype_of(args), args.device)
    if adapter:
        load_adapter(model, adapter)
    if lora_layers(model):
        merge_lora(model)
    tokenizer = Tokenizer(base)
    whole = encode_split(prepared, "test", tokenizer, settings["max_length"])
    return model.eval(), tokenizer, selected(whole, np.arange(args.examples))


def selected(encoded: Encoded, indices) -> Encoded:
    """Only these examples, as often as they are named."""
    prompts = [encoded.prompts[e] for e in indices]
    return Encoded(encoded.examples.select(indices), prompts, encoded.completions)


class Ways:
    """Each way as a method; all answer the same n prompts."""

    def __init__(self, model, tokenizer, encoded: Encoded, args):
        self.model, self.tokenizer, self.encoded = model, tokenizer, encoded
        self.n, self.device, self.budget = (
            len(encoded.prompts),
            args.device,
            args.micro_batch_tokens,
        )
        self.stop_ids = tokenizer.stop_ids | tokenizer.newline_ids()
        self.longest = 2 * max(map(len, encoded.completions.values()))
        self.slots = np.tile(np.arange(NUM_CANDIDATES), (self.n, 1))
        self.widths = tree_widths(encoded, self.slots)
        self.theirs = transformers_model(model)

    def one_pass(self, decode_rest: bool = False) -> list[dict]:
        how = (range(self.n), "greedy", decode_rest, self.budget)
        return predict(self.model, self.tokenizer, self.encoded, *how)

    @torch.no_grad()
    def twenty_sequences(self) -> torch.Tensor:
        """(n, 20) log-probs, each candidate behind its own copy of the prompt."""
        copies = selected(self.encoded, np.repeat(np.arange(self.n), NUM_CANDIDATES))
        one_slot = np.tile(np.arange(NUM_CANDIDATES), self.n)[:, None]
        out = torch.zeros(len(one_slot))
        widths = tree_widths(copies, one_slot)
        for batch in micro_batches(widths, range(len(one_slot)), 1, self.budget)[0]:
            tree = copies.tree(batch, one_slot).to(self.device)
            out[batch] = tree.sum_logps(self.model(tree)[0])[:, 0].cpu()
        return out.view(self.n, NUM_CANDIDATES)

    def ours(self) -> list[str]:
        answers = {}
        for batch in micro_batches(self.widths, range(self.n), 1, self.budget)[0]:
            prompts = [self.encoded.prompts[e].tolist() for e in batch]
            outputs = generate(self.model, prompts, self.longest, self.stop_ids)
            for e, ids in zip(batch, outputs, strict=True):
                answers[e] = self.tokenizer.answer(ids)
        return [answers[e] for e in range(self.n)]

    @torch.no_grad()
    def hugging_face(self, stop: bool) -> list[str]:
        settings = {"do_sample": False, "pad_token_id": 0}
        settings["max_new_tokens"] = self.longest if stop else 128
        settings["eos_token_id"] = sorted(self.stop_ids) if stop else None
        answers = []
        for start in range(0, self.n, 10):
            prompts = [p.tolist() for p in self.encoded.prompts[start : start + 10]]
            width = max(map(len, prompts))
            ids = [[0] * (width - len(p)) + p for p in prompts]  # left-padded
            mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
            ids, mask = (torch.tensor(rows, device=self.device) for rows in (ids, mask))
            outputs = self.theirs.generate(ids, attention_mask=mask, **settings)
            answers += [self.tokenizer.answer(row[width:].tolist()) for row in outputs]
        return answers

    def agreement(self) -> dict[str, str]:
        """Way -> how far it agrees with the one pass."""
        records, full = self.one_pass(), self.twenty_sequences()
        written = [r["answer"] or "" for r in self.one_pass(True)]
        logps = torch.tensor([r["logps"] for r in records])
        verified = sum(r["valid"] for r in records)

        def same(answers: list[str]) -> str:
            equal = sum(a == b for a, b in zip(answers, written, strict=True))
            return f"{equal} of {self.n} answers"

        gap = (logps - full).abs().max().item()
        ranking = (logps.argmax(1) == full.argmax(1)).sum().item()
        return {
            "one pass": f"{verified} answers verified, {self.n - verified} not listed",
            "one pass + rest": "",
            "20 sequences": f"{ranking} of {self.n} best titles, log-probs within {gap:.0e}",
            "generate": same(self.ours()),
            "transformers, 128 tokens": same(self.hugging_face(False)),
            "transformers, to the end of the answer": same(self.hugging_face(True)),
        }


def main() -> None:
    options = parser(__doc__, examples=60, repeats=3, micro_batch_tokens=8192)
    options.add_argument("--run", default="", help="run folder of train.py")
    options.add_argument("--stage", default="sft")
    options.add_argument("--prepared_dir", default="", help="the run's, if it is not where it was")
    args = options.parse_args()
    model, tokenizer, encoded = load(args)
    ways = Ways(model, tokenizer, encoded, args)
    agreement = ways.agreement()
    timed = {
        "one pass": ways.one_pass,
        "one pass + rest": lambda: ways.one_pass(True),
        "20 sequences": ways.twenty_sequences,
        "generate": ways.ours,
        "transformers, 128 tokens": lambda: ways.hugging_face(False),
        "transformers, to the end of the answer": lambda: ways.hugging_face(True),
    }
    seconds = interleaved(timed, args.repeats)
    config, lengths = model.config, [len(p) for p in encoded.prompts]
    header(
        "Evaluation",
        args,
        f"{ways.n} test prompts of {min(lengths)} to {max(lengths)} tokens, 20 candidates; "
        f"hidden {config.hidden_size}, {config.num_hidden_layers} layers, V = {config.vocab_size}, "
        f"{dtype_of(args)}, {'trained' if args.run else 'random'} weights, "
        f"{ways.budget} tokens a micro-batch.",
    )
    gives = {
        "one pass": "ranking, answer if listed",
        "one pass + rest": "ranking, answer",
        "20 sequences": "ranking",
    }
    rows = []
    for name, s in seconds.items():
        ratios = [s / seconds["one pass"], s / seconds["one pass + rest"]]
        cells = [f"{ways.n / s:.2f}", *(f"{ratio:.1f}" for ratio in ratios)]
        rows.append([name, gives.get(name, "answer"), *cells, agreement[name]])
    columns = ["way", "gives", "examples / s", "time / one pass", "time / one pass + rest"]
    table([*columns, "agreement"], rows)


if __name__ == "__main__":
    main()
