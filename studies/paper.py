"""The figures of the paper (Ouyang, Wen et al.) that a table here puts beside its own.

HR@1 and ValidRatio of Table 1, and HR@1 of the margins in Table 2 (LLaMA3-8B). They are of other
candidates and another model: context, not a target."""

from pathlib import Path

DATASETS = ("ml-1m", "books", "beeradvocate", "steam", "lastfm")
TRADITIONAL = {
    "gru4rec": (0.2664, 1, 0.1310, 1, 0.3708, 1, 0.4584, 1, 0.6630, 1),
    "caser": (0.2714, 1, 0.1538, 1, 0.3757, 1, 0.4394, 1, 0.6716, 1),
    "sasrec": (0.2671, 1, 0.1559, 1, 0.3800, 1, 0.4587, 1, 0.6659, 1),
}
LLAMA = {
    "raw": (0.0929, 0.7351, 0.0654, 0.6165, 0.0686, 0.6617, 0.0852, 0.8672, 0.1264, 0.6147),
    "sft": (0.2478, 0.9985, 0.4447, 0.9974, 0.2645, 0.9936, 0.3122, 0.9990, 0.5076, 1),
    "dpo": (0.2809, 0.9970, 0.5049, 0.9887, 0.4412, 0.9875, 0.3340, 0.9980, 0.5719, 1),
    "simpo": (0.2974, 0.9725, 0.5129, 0.9564, 0.4020, 0.9250, 0.3401, 0.9766, 0.5759, 0.9419),
    "sdpo": (0.2902, 0.9983, 0.5065, 0.9880, 0.4698, 0.9903, 0.3588, 0.9990, 0.5719, 0.9990),
    "recpo": (0.3451, 0.9969, 0.5802, 0.9851, 0.5771, 0.9887, 0.4672, 0.9985, 0.6830, 0.9959),
    "recpo log_diff": (0.3160, None, 0.5370, None, 0.5023, None, 0.4284, None, 0.5912, None),
    "recpo log_ratio": (0.3247, None, 0.5455, None, 0.5257, None, 0.4517, None, 0.6388, None),
}
QWEN = {
    "raw": (0.1204, 0.7471, 0.1013, 0.7194, 0.0583, 0.4223, 0.1477, 0.6293, 0.2148, 0.6860),
    "sft": (0.2060, 0.9983, 0.3659, 0.9967, 0.2044, 0.9849, 0.2081, 0.9950, 0.3119, 0.9969),
    "dpo": (0.2610, 0.9983, 0.4412, 0.9930, 0.2600, 0.9724, 0.2457, 0.9960, 0.4046, 0.9969),
    "simpo": (0.2888, 0.9531, 0.4644, 0.9880, 0.4044, 0.9529, 0.3706, 0.9940, 0.5209, 0.9796),
    "sdpo": (0.2706, 0.9957, 0.4623, 0.9910, 0.3253, 0.9798, 0.3062, 0.9970, 0.4495, 0.9959),
    "recpo": (0.3446, 0.9896, 0.5307, 0.9880, 0.4320, 0.9729, 0.4143, 0.9912, 0.5973, 0.9980),
}


def paper_figures(config: dict, models: set[str]) -> dict[str, tuple]:
    """Method -> HR@1 and ValidRatio on this data set, by its own name: only ml-1m is the paper's
    MovieLens, only Books its Amazon; of LLMs those of the models' family alone."""
    dataset, place = config["dataset"], Path(config.get("data_dir") or "none given")
    if dataset in ("movielens", "amazon"):
        files = " ".join([place.name, *(f.name for f in place.glob("*"))]).lower()
        wanted = "ml-1m" if dataset == "movielens" else "books"
        dataset = wanted if wanted in files else ""
    if dataset not in DATASETS:
        return {}
    rows, names = TRADITIONAL, " ".join(Path(model).name.lower() for model in models)
    for family, figures in (("llama", LLAMA), ("qwen", QWEN)):
        rows = rows | (figures if family in names else {})
    at = 2 * DATASETS.index(dataset)
    return {method: figures[at : at + 2] for method, figures in rows.items()}
