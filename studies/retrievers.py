"""A retriever by its name: the counting ones of loaders/counting.py, or SASRec, trained here.

SASRec trains as in studies/sequential.py, on everything before each user's last two interactions,
and stops by validation. Its weights are kept among the prepared examples: a second call, another
process, prompts of other kinds over the same interactions, or a call after studies.sequential with
its usual options reads them.
"""

from dataclasses import fields

import numpy as np
import torch
from safetensors.torch import load_file

from common import print0
from loaders.counting import COUNTING_RETRIEVERS, Retriever, fit
from loaders.frozen import DataConfig, Prepared
from studies.sequential import BaselineConfig, SASRec, keep_weights, train, weights_file


class SASRecRetriever(Retriever):
    def __init__(self, model: SASRec, num_shown: int):
        self.model, self.num_shown = model.eval(), num_shown

    @torch.no_grad()
    def scores(self, history: np.ndarray) -> np.ndarray:
        newest = torch.from_numpy(np.asarray(history, np.int64)[-self.num_shown :] + 1)
        items = torch.zeros(1, self.num_shown, dtype=torch.int64)
        if len(newest):
            items[0, -len(newest) :] = newest
        state = self.model(items, torch.zeros(1, dtype=torch.int64))[0, -1]  # (D,)
        return (self.model.items.weight[1:] @ state).double().numpy()


def sasrec_config(config: DataConfig) -> BaselineConfig:
    """The options of these examples, and studies/sequential.py's usual training."""
    names = [f.name for f in fields(DataConfig)]
    return BaselineConfig(method="sasrec", **{name: getattr(config, name) for name in names})


def fit_sasrec(prepared: Prepared, config: BaselineConfig) -> SASRecRetriever:
    interactions = prepared.interactions
    file = weights_file(config, prepared)
    if file.exists():
        model = SASRec(config, interactions.num_items, interactions.num_users)
        model.load_state_dict(load_file(file))
        return SASRecRetriever(model, config.num_shown)
    model, _ = train(config, interactions, prepared.splits["val"], report=print0)
    keep_weights(model, file)
    return SASRecRetriever(model, config.num_shown)


def fit_retriever(
    name: str, prepared: Prepared, config: DataConfig, rows: np.ndarray | None = None
) -> Retriever:
    """Fitted on these rows of the log (n,) bool, all without; SASRec never sees the last two."""
    if name in COUNTING_RETRIEVERS:
        return fit(name, prepared.interactions, rows, config.history)
    return fit_sasrec(prepared, sasrec_config(config))
