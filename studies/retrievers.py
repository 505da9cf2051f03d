"""A retriever by its name: the counting ones of loaders/counting.py, or SASRec, trained here.

SASRec trains by the defaults of studies/sequential.py and stops by validation; its weights are kept
beside the prepared examples, so that another call or process reads them."""

from dataclasses import fields

import numpy as np
import torch
from safetensors.torch import load_file

from common import print0, writing
from hub.files import save_tensors
from loaders.counting import COUNTING_RETRIEVERS, Retriever, fit
from loaders.frozen import DataConfig, Prepared
from studies.sequential import BaselineConfig, SASRec, train


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


def fit_retriever(
    name: str, prepared: Prepared, config: DataConfig, rows: np.ndarray | None = None
) -> Retriever:
    """Fitted on these rows of the log (n,) bool, all without; SASRec never sees the last two."""
    interactions, file = prepared.interactions, prepared.folder / "sasrec.safetensors"
    if name in COUNTING_RETRIEVERS:
        return fit(name, interactions, rows, config.history)
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
