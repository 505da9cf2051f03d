"""Evaluation from one forward pass against the ways that take more: answers, rankings, examples per second, agreement.

    python bench/evaluation.py --run runs/movielens-tiny [--stage sft]      a trained model: answers mean something
    python bench/evaluation.py                                              random weights: speed only

one pass          eval.predict without decoding: the 20 log-probs of every prompt, and its greedy answer where it is listed
one pass + rest   the same, and real decoding of the prompts whose greedy answer is no listed title
20 sequences      the same model on 20 full sequences per prompt, scored rows only: the ranking alone
generate          our batched, KV-cached greedy decoding: the answer alone
transformers      its generate on the merged weights, batch 10: with 128 new tokens whatever comes (as the authors run it), and
                  stopping at EOS or a line break: the answer alone
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

ALL = range(NUM_CANDIDATES)


def load(args):
    """Model, tokenizer and the first `examples` test examples of a run; or random weights on MovieLens-1M."""
    if not args.run:
        if not args.data_dir:
            sys.exit("give --run, or --data_dir with ml-1m.zip")
        encoded, tokenizer = movielens(args, args.examples)
        return make_model(args, lora=False).eval(), tokenizer, encoded
    run = Path(args.run)
    settings = read_json(run / "config.json")
    known = {k: v for k, v in settings.items() if k in DataConfig.__dataclass_fields__}
    known |= {
        "data_dir": args.data_dir or known["data_dir"],
        "prepared_dir": args.prepared_dir or known["prepared_dir"],
    }
    prepared = prepare(DataConfig(**known))
    base, adapter = load_stage(run / args.stage)
    model = load_pretrained(base, dtype_of(args), args.device)
    if adapter:
        load_adapter(model, adapter)
    if lora_layers(model):
        merge_lora(model)
    tokenizer = Tokenizer(base)
    whole = encode_split(prepared, "test", tokenizer, settings["max_length"])
    some = Encoded(
        whole.examples.select(np.arange(args.examples)),
        whole.prompts[: args.examples],
        whole.completions,
    )
    return model.eval(), tokenizer, some


def main() -> None:
    options = parser(__doc__, examples=60, repeats=3, micro_batch_tokens=8192)
    options.add_argument("--run", default="", help="run folder of train.py")
    options.add_argument("--stage", default="sft")
    options.add_argument("--prepared_dir", default="", help="the run's, if it is not where it was")
    args = options.parse_args()
    model, tokenizer, encoded = load(args)
    n, device = len(encoded.prompts), args.device
    stop_ids = tokenizer.stop_ids | tokenizer.newline_ids()
    longest = 2 * max(map(len, encoded.completions.values()))
    slots = np.tile(np.arange(NUM_CANDIDATES), (n, 1))
    widths = tree_widths(encoded, slots)
    theirs = transformers_model(model)
    budget = args.micro_batch_tokens

    def one_pass(decode_rest=False):
        return predict(
            model, tokenizer, encoded, range(n), "greedy", decode_rest, budget, device=device
        )

    @torch.no_grad()
    def twenty_sequences():
        """(n, 20) log-probs, each candidate behind its own copy of the prompt."""
        singles = np.repeat(np.arange(n), NUM_CANDIDATES)
        per_sequence = np.stack(
            [
                widths[singles, 0],
                [len(encoded.slots(e, [s])[0]) - 1 for e in range(n) for s in ALL],
            ],
            1,
        )
        out = torch.zeros(n * NUM_CANDIDATES)
        copies = Encoded(
            encoded.examples.select(singles),
            [encoded.prompts[e] for e in singles],
            encoded.completions,
        )
        one_slot = np.tile(np.arange(NUM_CANDIDATES), n)[:, None]
        for batch in micro_batches(per_sequence, range(len(singles)), 1, budget)[0]:
            tree = copies.tree(batch, one_slot).to(device)
            out[batch] = tree.sum_logps(model(tree)[0])[:, 0].cpu()
        return out.view(n, NUM_CANDIDATES)

    def ours():
        answers = {}
        for batch in micro_batches(widths, range(n), 1, budget)[0]:
            prompts = [encoded.prompts[e].tolist() for e in batch]
            outputs = generate(model, prompts, longest, stop_ids)
            answers |= {e: tokenizer.answer(ids) for e, ids in zip(batch, outputs, strict=True)}
        return [answers[e] for e in range(n)]

    @torch.no_grad()
    def hugging_face(stop: bool):
        answers = []
        for start in range(0, n, 10):
            prompts = [p.tolist() for p in encoded.prompts[start : start + 10]]
            width = max(map(len, prompts))
            ids = torch.tensor(
                [[0] * (width - len(p)) + p for p in prompts], device=device
            )  # left-padded
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
            )
            settings = {
                "do_sample": False,
                "max_new_tokens": longest if stop else 128,
                "pad_token_id": 0,
            }
            settings |= {"eos_token_id": sorted(stop_ids)} if stop else {"eos_token_id": None}
            outputs = theirs.generate(ids, attention_mask=mask, **settings)
            answers += [tokenizer.answer(row[width:].tolist()) for row in outputs]
        return answers

    ways = {
        "one pass": one_pass,
        "one pass + rest": lambda: one_pass(True),
        "20 sequences": twenty_sequences,
        "generate": ours,
        "transformers, 128 tokens": lambda: hugging_face(False),
        "transformers, to the end of the answer": lambda: hugging_face(True),
    }
    records, full_records, full = one_pass(), one_pass(True), twenty_sequences()
    logps = torch.tensor([r["logps"] for r in records])
    written = [r["answer"] for r in full_records]
    verified = sum(r["valid"] for r in records)

    def same(answers: list[str]) -> str:
        return (
            f"{sum(a == (b or '') for a, b in zip(answers, written, strict=True))} of {n} answers"
        )

    gap = (logps - full).abs().max().item()
    ranking = (logps.argmax(1) == full.argmax(1)).sum().item()
    agreement = {
        "one pass": f"{verified} answers verified, {n - verified} not listed",
        "one pass + rest": "",
        "20 sequences": f"{ranking} of {n} best titles, log-probs within {gap:.0e}",
        "generate": same(ours()),
        "transformers, 128 tokens": same(hugging_face(False)),
        "transformers, to the end of the answer": same(hugging_face(True)),
    }
    seconds = interleaved(ways, args.repeats)
    config = model.config
    note = f"{n} test prompts of {min(map(len, encoded.prompts))} to {max(map(len, encoded.prompts))} tokens, 20 candidates; "
    note += f"hidden {config.hidden_size}, {config.num_hidden_layers} layers, V = {config.vocab_size}, {dtype_of(args)}, "
    note += f"{'trained' if args.run else 'random'} weights, {budget} tokens a micro-batch."
    header("Evaluation", args, note)
    gives = {
        "one pass": "ranking, answer if listed",
        "one pass + rest": "ranking, answer",
        "20 sequences": "ranking",
    }
    rows = [
        [
            name,
            gives.get(name, "answer"),
            f"{n / s:.2f}",
            f"{s / seconds['one pass']:.1f}",
            f"{s / seconds['one pass + rest']:.1f}",
            agreement[name],
        ]
        for name, s in seconds.items()
    ]
    table(
        ["way", "gives", "examples / s", "time / one pass", "time / one pass + rest", "agreement"],
        rows,
    )


if __name__ == "__main__":
    main()
