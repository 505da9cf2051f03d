"""Every figure of the paper (Ouyang, Wen et al.) that a table here puts beside its own."""

RESULTS = {  # HR@1 and ValidRatio of Table 1, the LLaMA3-8B rows; margins from Table 2
    "movielens": {
        "gru4rec": (0.2664, 1), "caser": (0.2714, 1), "sasrec": (0.2671, 1),
        "raw": (0.0929, 0.7351), "sft": (0.2478, 0.9985), "dpo": (0.2809, 0.9970),
        "simpo": (0.2974, 0.9725), "sdpo": (0.2902, 0.9983), "recpo": (0.3451, 0.9969),
        "recpo log_diff": (0.3160, None), "recpo log_ratio": (0.3247, None),
    },
    "amazon_books": {
        "gru4rec": (0.1310, 1), "caser": (0.1538, 1), "sasrec": (0.1559, 1),
        "raw": (0.0654, 0.6165), "sft": (0.4447, 0.9974), "dpo": (0.5049, 0.9887),
        "simpo": (0.5129, 0.9564), "sdpo": (0.5065, 0.9880), "recpo": (0.5802, 0.9851),
        "recpo log_diff": (0.5370, None), "recpo log_ratio": (0.5455, None),
    },
    "beeradvocate": {
        "gru4rec": (0.3708, 1), "caser": (0.3757, 1), "sasrec": (0.3800, 1),
        "raw": (0.0686, 0.6617), "sft": (0.2645, 0.9936), "dpo": (0.4412, 0.9875),
        "simpo": (0.4020, 0.9250), "sdpo": (0.4698, 0.9903), "recpo": (0.5771, 0.9887),
        "recpo log_diff": (0.5023, None), "recpo log_ratio": (0.5257, None),
    },
    "steam": {
        "gru4rec": (0.4584, 1), "caser": (0.4394, 1), "sasrec": (0.4587, 1),
        "raw": (0.0852, 0.8672), "sft": (0.3122, 0.9990), "dpo": (0.3340, 0.9980),
        "simpo": (0.3401, 0.9766), "sdpo": (0.3588, 0.9990), "recpo": (0.4672, 0.9985),
        "recpo log_diff": (0.4284, None), "recpo log_ratio": (0.4517, None),
    },
    "lastfm": {
        "gru4rec": (0.6630, 1), "caser": (0.6716, 1), "sasrec": (0.6659, 1),
        "raw": (0.1264, 0.6147), "sft": (0.5076, 1), "dpo": (0.5719, 1),
        "simpo": (0.5759, 0.9419), "sdpo": (0.5719, 0.9990), "recpo": (0.6830, 0.9959),
        "recpo log_diff": (0.5912, None), "recpo log_ratio": (0.6388, None),
    },
}  # fmt: skip
