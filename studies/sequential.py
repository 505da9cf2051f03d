"""GRU4Rec, Caser and SASRec on the same frozen candidates.

    python -m studies.sequential --method sasrec --dataset movielens \\
        --data_dir ml-1m.zip --output_dir runs/ml1m-sasrec

A user's items become one vector per position, whose inner product with an item's embedding is the
item's score. They train on all positions before each user's last two interactions (or before a
split's date), in windows of --max_items, with Adam and a sampled softmax; low ratings count, as in
the papers. Training stops when validation HR@1 has not risen for --patience epochs; the best epoch
is tested once. Left out: sessions, BPR and top-1 losses, Caser's several targets. Legend: B windows
of a batch, T positions, D width, E examples; item codes are shifted by one, 0 is padding."""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from common import arg, parse_config, print0, run_cli, writing
from data import Examples, Interactions
from eval import answered, ranking_metrics, results_table, summarise
from hub.files import save_tensors
from loaders.counting import BASELINES, Retriever, counting_baselines, training_rows
from loaders.frozen import DataConfig, Prepared, data_defaults, prepare
from runtime.stages import save_predictions
from studies.probes import KINDS, measured, other_list, references

RETRIEVERS = (*BASELINES.values(), "sasrec")
HEADS = 2  # of SASRec
WINDOW = 5  # items that Caser's filters see


@dataclass(frozen=True)
class BaselineConfig(DataConfig):
    """Train and test a sequential recommender on frozen examples."""

    method: str = arg(
        "sasrec", "the recommender", group="method", choices=("gru4rec", "caser", "sasrec")
    )
    hidden_size: int = arg(64, "width of items and hidden states", at_least=1)
    num_layers: int = arg(2, "blocks of SASRec, layers of GRU4Rec", at_least=1)
    dropout: float = arg(0.2, "dropout", at_least=0, below=1)
    max_items: int = arg(50, "most recent items that a model sees", at_least=1)
    num_sampled: int = arg(512, "sampled items in the softmax; 0 = all items", at_least=0)
    epochs: int = arg(200, "maximum number of epochs", group="optimisation", at_least=1)
    patience: int = arg(10, "epochs without a better validation HR@1 before it stops", at_least=1)
    batch_size: int = arg(256, "windows per step", at_least=1)
    learning_rate: float = arg(1e-3, "Adam's learning rate", above=0)
    seed: int = arg(0, "seed of weights, order, samples and dropout")
    output_dir: str = arg("", "folder of config.json and eval/; empty = only print", group="output")


class Recommender(nn.Module):
    """Items (B, T), users (B,) -> a vector per position (B, T, D)."""

    def __init__(self, config: BaselineConfig, num_items: int, num_users: int):
        super().__init__()
        self.items = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)


class GRU4Rec(Recommender):
    """A GRU over the items (arXiv:1511.06939)."""

    def __init__(self, config: BaselineConfig, num_items: int, num_users: int):
        super().__init__(config, num_items, num_users)
        D, dropout = config.hidden_size, config.dropout * (config.num_layers > 1)
        self.gru = nn.GRU(D, D, config.num_layers, batch_first=True, dropout=dropout)

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        return self.gru(self.dropout(self.items(items)))[0]


class Caser(Recommender):
    """Convolutions over the last WINDOW items, and a vector per user (arXiv:1809.07426).
    Horizontal filters of every height find patterns, vertical ones weigh items."""

    def __init__(self, config: BaselineConfig, num_items: int, num_users: int):
        super().__init__(config, num_items, num_users)
        D = config.hidden_size
        self.users = nn.Embedding(num_users, D)
        self.horizontal = nn.ModuleList(nn.Conv2d(1, 16, (h, D)) for h in range(1, WINDOW + 1))
        self.vertical = nn.Conv2d(1, 4, (WINDOW, 1))
        self.hidden = nn.Linear(16 * WINDOW + 4 * D, D)
        # the paper scores with vectors of width 2 D; this keeps one embedding per item
        self.mix = nn.Linear(2 * D, D)

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        B, T = items.shape
        rows = F.pad(self.items(items), (0, 0, WINDOW - 1, 0))  # (B, WINDOW - 1 + T, D)
        windows = rows.unfold(1, WINDOW, 1).transpose(2, 3).reshape(B * T, 1, WINDOW, -1)
        patterns = [F.relu(conv(windows)).amax(dim=(2, 3)) for conv in self.horizontal]
        states = torch.cat([*patterns, self.vertical(windows).flatten(1)], 1)
        states = F.relu(self.hidden(self.dropout(states))).view(B, T, -1)
        return self.mix(torch.cat([states, self.users(users)[:, None].expand(-1, T, -1)], 2))


class SASRec(Recommender):
    """Causal self-attention over the items (arXiv:1808.09781)."""

    def __init__(self, config: BaselineConfig, num_items: int, num_users: int):
        super().__init__(config, num_items, num_users)
        if config.hidden_size % HEADS:
            raise ValueError(f"--hidden_size {config.hidden_size}: sasrec needs an even number")
        self.positions = nn.Embedding(config.max_items, config.hidden_size)
        D, pre_norm = config.hidden_size, {"batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(D, HEADS, 4 * D, config.dropout, F.gelu, **pre_norm)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(D)

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        T = items.shape[1]
        x = self.items(items) * math.sqrt(self.items.embedding_dim)
        # positions count from the end: windows are filled from the right
        x = self.dropout(x + self.positions.weight[-T:])
        order = torch.arange(T)
        hidden = (order > order[:, None]) | (items == 0)[:, None]  # (B, T, T)
        hidden &= ~torch.eye(T, dtype=torch.bool)  # padding sees itself, so that no row is empty
        for block in self.blocks:
            x = block(x, hidden.repeat_interleave(HEADS, 0))
        return self.norm(x)


MODELS = {"gru4rec": GRU4Rec, "caser": Caser, "sasrec": SASRec}


def items_before(log: Interactions, users: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """(n, size) items of each user before a row (n,) of the log, the newest on the right."""
    at = rows[:, None] - np.arange(size, 0, -1)
    inside = at >= log.start[users][:, None]
    return np.where(inside, log.item[np.maximum(at, 0)].astype(np.int64) + 1, 0)


def training_windows(log: Interactions, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(W, size + 1) items before each user's last two interactions, and (W,) users.

    A user's items are cut from the end into windows that share one item, so that each item but the
    first is predicted once: position t predicts position t + 1."""
    rows, users = [], []
    for user, (start, end) in enumerate(zip(log.start[:-1], log.training_end(), strict=True)):
        ends = range(end, start + 1, -size)
        rows += ends
        users += [user] * len(ends)
    rows, users = np.array(rows, np.int64), np.array(users, np.int64)
    return items_before(log, users, rows, size + 1), users


@torch.no_grad()
def candidate_scores(model: Recommender, examples: Examples, size: int) -> np.ndarray:
    """(E, 20) scores of the candidates from the last position."""
    model.eval()
    log, rows = examples.interactions, np.asarray(examples.position)
    users = log.user[rows].astype(np.int64)
    candidates = np.asarray(examples.candidates, np.int64) + 1
    arrays = items_before(log, users, rows, size), users, candidates
    scores = []
    for i, u, c in zip(*(torch.from_numpy(a).split(512) for a in arrays), strict=True):
        states = model(i, u)[:, -1:]  # (512, 1, D)
        scores.append((model.items(c) @ states.mT).squeeze(-1))
    return torch.cat(scores).numpy()


def step_loss(model: Recommender, windows, users, pool, num_sampled: int, generator) -> Tensor:
    """Cross-entropy of the next item among itself and samples of the pool; mean over positions."""
    states = model(windows[:, :-1], users)
    target = windows[:, 1:]
    known = (target != 0) & (windows[:, :-1] != 0)
    states, target = states[known], target[known]  # (n, D), (n,)
    if not num_sampled or num_sampled >= len(pool):
        return F.cross_entropy(states @ model.items(pool).T, torch.searchsorted(pool, target))
    sampled = pool[torch.randint(len(pool), (num_sampled,), generator=generator)]
    logits = states @ model.items(sampled).T
    logits = logits.masked_fill(sampled == target[:, None], -1e9)  # the target, drawn by chance
    own = (states * model.items(target)).sum(1, keepdim=True)
    return F.cross_entropy(torch.cat([own, logits], 1), torch.zeros(len(target), dtype=torch.long))


def train(
    config: BaselineConfig, interactions: Interactions, val: Examples, report=print
) -> tuple[Recommender, list[dict]]:
    """Train without test data; returns the model of the best validation epoch, and the epochs."""
    torch.manual_seed(config.seed)
    generator, rng = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    model = MODELS[config.method](config, interactions.num_items, interactions.num_users)
    for name, p in model.named_parameters():
        if name in ("items.weight", "users.weight", "positions.weight"):
            nn.init.normal_(p, std=0.02)
    model.items.weight.data[0] = 0  # of padding
    windows, users = (torch.from_numpy(a) for a in training_windows(interactions, config.max_items))
    if not len(windows):
        raise ValueError("no user has two interactions before the last two: nothing to train on")
    pool = torch.arange(1, interactions.num_items + 1)
    if interactions.train_end is not None:  # items from after the date are not known yet
        known = np.unique(interactions.item[training_rows(interactions)])
        pool = torch.from_numpy(known.astype(np.int64) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    history, best_state = [], {}
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = []
        for rows in torch.from_numpy(rng.permutation(len(windows))).split(config.batch_size):
            loss = step_loss(model, windows[rows], users[rows], pool, config.num_sampled, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scores = candidate_scores(model, val, config.max_items)
        found = float(ranking_metrics(scores, val.target)["hit_ratio@1"].mean())
        entry = {"epoch": epoch, "loss": float(np.mean(losses)), "val_hit_ratio@1": found}
        history.append(entry)
        best = max(history, key=lambda entry: entry["val_hit_ratio@1"])  # the first of equals
        report(f"{config.method} {epoch:3} | loss {entry['loss']:.4f} | val HR@1 {found:.4f}")
        if best is entry:
            best_state = {name: t.clone() for name, t in model.state_dict().items()}
        elif epoch - best["epoch"] >= config.patience:
            break
    model.load_state_dict(best_state)
    return model, history


class SASRecRetriever(Retriever):
    """SASRec's scores of the whole catalogue, for two_stage.py and recommend.py."""

    def __init__(self, model: SASRec, num_shown: int):
        self.model, self.num_shown = model.eval(), num_shown

    @torch.no_grad()
    def scores(self, history: np.ndarray) -> np.ndarray:
        newest = torch.from_numpy(np.asarray(history, np.int64)[-self.num_shown :] + 1)
        items = F.pad(newest, (self.num_shown - len(newest), 0))[None]
        state = self.model(items, torch.zeros(1, dtype=torch.int64))[0, -1]  # (D,)
        return (self.model.items.weight[1:] @ state).double().numpy()


def fit_retriever(
    name: str, prepared: Prepared, config: DataConfig, rows: np.ndarray | None = None
) -> Retriever:
    """A counting retriever fitted on these rows of the log ((n,) bool; None: all), or SASRec.
    SASRec is trained with the defaults, without the last two, and kept with the examples."""
    interactions, file = prepared.interactions, prepared.folder / "sasrec-2.safetensors"
    if name in BASELINES.values():
        return Retriever(name, interactions, rows, config.history)
    own = BaselineConfig(**{f.name: getattr(config, f.name) for f in fields(DataConfig)})
    model = SASRec(own, interactions.num_items, interactions.num_users)
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        model, _ = train(own, interactions, prepared.splits["val"], report=print0)
        with writing(file):
            save_tensors(model.state_dict(), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
    return SASRecRetriever(model, own.max_items)


def records_of(examples: Examples, scores: np.ndarray) -> list[dict]:
    """Records like eval.py's: the best-scored title is the answer, so every answer is valid."""
    records = []
    for e, row in enumerate(scores):
        user, titles, slot = examples[e].user, examples[e].candidates, examples[e].target
        facts = {"example": e, "user": user, "target": titles[slot], "logps": row.tolist()}
        facts |= answered(examples[e], int(row.argmax()), "scored")
        records.append(facts | {"candidates": titles, "target_slot": slot})
    return records


def main() -> None:
    config = parse_config(BaselineConfig, beneath=data_defaults)
    prepared = prepare(config)
    test, folder = prepared.splits["test"], Path(config.output_dir)
    model, history = train(config, prepared.interactions, prepared.splits["val"])
    records = records_of(test, candidate_scores(model, test, config.max_items))
    facts = {"data_hash": prepared.hash, "history": history}
    metrics = summarise(records, counting_baselines(test)) | facts
    print(f"\n{config.dataset}, data {prepared.hash[:12]}\n")
    print(results_table({config.method: metrics}))
    if config.output_dir:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(vars(config), indent=2) + "\n")
            has_log = config.dataset != "prepared"
            for kind in [k for k in KINDS if has_log and k != config.negatives]:
                other = other_list(test, config, kind)
                found = records_of(other, candidate_scores(model, other, config.max_items))
                beside = references(kind, other, config)
                facts = measured(kind, other, found, beside, prepared.hash)
                save_predictions(folder / "probes" / config.method / kind, facts, found)
            save_predictions(folder / "eval", metrics, records)  # last: then it is finished
        print(f"\nwritten to {folder}")


if __name__ == "__main__":
    run_cli(main)
