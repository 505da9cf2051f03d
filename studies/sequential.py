"""GRU4Rec, Caser and SASRec on the same frozen candidates.

    python -m studies.sequential --method sasrec --dataset movielens \\
        --data_dir ml-1m.zip --output_dir runs/ml1m-sasrec

They turn a user's items into one vector per position and score an item by its inner product with
that item's embedding. They train on all positions before each user's last two interactions (with a
split in time: before the date), in windows of --max_items, with Adam and a sampled softmax.
Ratings are not used: a low rating counts as an interaction, as in the papers. Training stops when
HR@1 on the validation split has not risen for --patience epochs; the best epoch's weights are then
tested, once. Left out: session boundaries, BPR and top-1 losses, Caser's several targets.

Legend: B windows of a batch, T positions of a window, D width, E examples; item codes are shifted
by one, and 0 is padding."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import arg, parse_config, run_cli, writing
from data import Examples, Interactions
from eval import ranking_metrics, results_table, summarise
from loaders.counting import counting_baselines, training_interactions
from loaders.frozen import DataConfig, prepare
from runtime.stages import save_predictions
from studies.probes import KINDS, measured, other_list, references

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
    num_sampled: int = arg(512, "items that the next one is compared with; 0 = all", at_least=0)
    epochs: int = arg(200, "at most so many epochs", group="optimisation", at_least=1)
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
        D = config.hidden_size
        dropout = config.dropout if config.num_layers > 1 else 0.0
        self.gru = nn.GRU(D, D, config.num_layers, batch_first=True, dropout=dropout)

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        return self.gru(self.dropout(self.items(items)))[0]


class Caser(Recommender):
    """Convolutions over the last WINDOW items, and the user's own vector (arXiv:1809.07426):
    horizontal filters of every height find patterns, vertical ones weigh items."""

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
        patterns = [F.relu(filter(windows)).amax(dim=(2, 3)) for filter in self.horizontal]
        states = torch.cat([*patterns, self.vertical(windows).flatten(1)], 1)
        states = F.relu(self.hidden(self.dropout(states))).view(B, T, -1)
        return self.mix(torch.cat([states, self.users(users)[:, None].expand(-1, T, -1)], 2))


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward of SASRec."""

    def __init__(self, config: BaselineConfig):
        super().__init__()
        D = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, HEADS, D // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, HEADS, T, D / HEADS) each
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class SASRec(Recommender):
    """Causal self-attention over the items (arXiv:1808.09781)."""

    def __init__(self, config: BaselineConfig, num_items: int, num_users: int):
        super().__init__(config, num_items, num_users)
        self.positions = nn.Embedding(config.max_items, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, items: Tensor, users: Tensor) -> Tensor:
        T = items.shape[1]
        x = self.items(items) * math.sqrt(self.items.embedding_dim)
        # positions count from the end: windows are filled from the right
        x = self.dropout(x + self.positions.weight[-T:])
        order = torch.arange(T)
        mask = (order <= order[:, None]) & (items != 0)[:, None, None]  # (B, 1, T, T)
        mask = mask | torch.eye(T, dtype=torch.bool)  # padding sees itself, so that no row is empty
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


MODELS = {"gru4rec": GRU4Rec, "caser": Caser, "sasrec": SASRec}


def training_windows(interactions: Interactions, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(W, size + 1) items before each user's last two interactions, and (W,) users.

    A user's items are cut from the end into windows that share one item, filled from the right.
    Position t predicts position t + 1, so each item but a user's first is predicted once."""
    windows, users, ends = [], [], interactions.training_end()
    for user in range(interactions.num_users):
        items = interactions.item[interactions.start[user] : ends[user]] + 1
        for end in range(len(items), 1, -size):
            part = items[max(0, end - size - 1) : end]
            windows.append(np.concatenate([np.zeros(size + 1 - len(part), np.int64), part]))
            users.append(user)
    return np.array(windows).reshape(-1, size + 1), np.array(users, np.int64)


def shown_items(examples: Examples, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(E, size) last items before each position, filled from the right, and (E,) users."""
    interactions, at = examples.interactions, np.asarray(examples.position)
    rows = at[:, None] - np.arange(size, 0, -1)
    users = interactions.user[at].astype(np.int64)
    inside = rows >= interactions.start[users][:, None]
    return np.where(inside, interactions.item[np.maximum(rows, 0)].astype(np.int64) + 1, 0), users


@torch.no_grad()
def candidate_scores(model: Recommender, examples: Examples, size: int) -> np.ndarray:
    """(E, 20) scores of the candidates from the last position."""
    model.eval()
    items, users = (torch.from_numpy(a) for a in shown_items(examples, size))
    candidates = torch.from_numpy(np.asarray(examples.candidates, np.int64) + 1)
    scores = []
    for i, u, c in zip(*(t.split(512) for t in (items, users, candidates)), strict=True):
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
    sampled = pool[torch.randint(1, len(pool) + 1, (num_sampled,), generator=generator) - 1]
    logits = states @ model.items(sampled).T
    logits = logits.masked_fill(sampled == target[:, None], -1e9)  # the target, drawn by chance
    own = (states * model.items(target)).sum(1, keepdim=True)
    return F.cross_entropy(torch.cat([own, logits], 1), torch.zeros(len(target), dtype=torch.long))


def train(
    config: BaselineConfig, interactions: Interactions, val: Examples, report=print
) -> tuple[Recommender, list[dict]]:
    """The model of the best epoch on validation, an entry per epoch. Test data is not seen here."""
    torch.manual_seed(config.seed)
    generator, rng = torch.Generator().manual_seed(config.seed), np.random.default_rng(config.seed)
    model = MODELS[config.method](config, interactions.num_items, interactions.num_users)
    for name, p in model.named_parameters():
        if name in ("items.weight", "users.weight", "positions.weight"):
            nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        model.items.weight[0] = 0  # of padding
    windows, users = (torch.from_numpy(a) for a in training_windows(interactions, config.max_items))
    if not len(windows):
        raise ValueError("no user has two interactions before the last two: nothing to train on")
    pool = torch.arange(1, interactions.num_items + 1)
    if interactions.train_end is not None:  # items from after the date are not known yet
        pool = torch.from_numpy(np.unique(training_interactions(interactions)[1]) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    best, best_epoch, best_state, history = -1.0, 0, {}, []
    for epoch in range(1, config.epochs + 1):
        model.train()
        started, losses = time.time(), []
        order = torch.from_numpy(rng.permutation(len(windows)))
        for rows in order.split(config.batch_size):
            loss = step_loss(model, windows[rows], users[rows], pool, config.num_sampled, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scores = candidate_scores(model, val, config.max_items)
        found = float(ranking_metrics(scores, val.target)["hit_ratio@1"].mean())
        loss, seconds = float(np.mean(losses)), time.time() - started
        history.append({"epoch": epoch, "loss": loss, "val_hit_ratio@1": found, "seconds": seconds})
        mark = " *" if found > best else ""
        report(f"{config.method} {epoch:3} | loss {loss:.4f} | validation HR@1 {found:.4f}{mark}")
        if found > best:
            best, best_epoch = found, epoch
            best_state = {name: t.clone() for name, t in model.state_dict().items()}
        elif epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best_state)
    return model, history


def records_of(examples: Examples, scores: np.ndarray) -> list[dict]:
    """As eval.py's records: the best-scored title is the answer, so every answer is valid."""
    records = []
    for e, (row, slot) in enumerate(zip(scores.tolist(), scores.argmax(1).tolist(), strict=True)):
        user, titles, target = examples[e].user, examples[e].candidates, examples[e].target
        answer = {"answer": titles[slot], "valid": True, "hit": slot == target, "how": "scored"}
        shown = {"candidates": titles, "target_slot": target, "target": titles[target]}
        records.append({"example": e, "user": user, "logps": row} | answer | shown)
    return records


def main() -> None:
    config, started = parse_config(BaselineConfig), time.time()
    prepared = prepare(config)
    test, folder = prepared.splits["test"], Path(config.output_dir)
    model, history = train(config, prepared.interactions, prepared.splits["val"])
    records = records_of(test, candidate_scores(model, test, config.max_items))
    metrics = summarise(records, counting_baselines(test)) | {"data_hash": prepared.hash}
    best = max(history, key=lambda entry: entry["val_hit_ratio@1"])
    metrics |= {"best_epoch": best["epoch"], "epochs": len(history), "history": history}
    print(f"\n{config.dataset}, data {prepared.hash[:12]}, {time.time() - started:.0f} s\n")
    print(results_table({config.method: metrics}))
    if config.output_dir:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(vars(config), indent=2) + "\n")
            has_log = config.dataset != "prepared"
            for kind in [k for k in KINDS if has_log and k != config.negatives]:
                examples = other_list(test, config, kind)
                found = records_of(examples, candidate_scores(model, examples, config.max_items))
                facts = measured(kind, examples, found, references(kind, examples, config))
                facts["data_hash"] = prepared.hash
                save_predictions(folder / "probes" / config.method / kind, facts, found)
            save_predictions(folder / "eval", metrics, records)  # last: then it is finished
        print(f"\nwritten to {folder}")


if __name__ == "__main__":
    run_cli(main)
