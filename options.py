"""The options of train.py: one frozen dataclass, from which the command line and --help are made."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import arg
from data import DataConfig
from eval import check_choice
from lora import TARGET_MODULES
from losses import MARGINS, OFFSETS
from objectives import PREFERENCE_LOSSES


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """SFT, then preference training, from a Hugging Face checkpoint; without --model and --config, the demo."""

    model: str = arg(
        "tiny",
        "Hugging Face directory or hub name; tiny = a small random model, or the base of --adapter",
        group="model",
    )
    adapter: str = arg(
        "", "PEFT adapter to start from: the policy and, without an sft stage, the reference"
    )
    dtype: str = arg(
        "auto",
        "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU (adapters are float32)",
    )
    load_in_4bit: bool = arg(
        False, "frozen linear layers in 4 bits (NF4): a quarter of the memory, slower; LoRA only"
    )
    lora_r: int = arg(8, "LoRA rank; 0 = train all parameters")
    sft_lora_r: int = arg(-1, "LoRA rank of the sft stage; -1 = lora_r, 0 = all parameters")
    lora_alpha: float = arg(32.0, "LoRA alpha; scaling = alpha / r")
    lora_dropout: float = arg(0.1, "dropout on the adapter's input, in the sft stage only")
    lora_target_modules: str = arg(
        ",".join(TARGET_MODULES), "comma-separated linear layers that get an adapter"
    )
    use_rslora: bool = arg(False, "scaling = alpha / sqrt(r)")
    tiny_hidden_size: int = arg(128, "tiny model: width, a multiple of 64")
    tiny_layers: int = arg(4, "tiny model: blocks")
    tiny_vocab_size: int = arg(1024, "tiny model: tokens of its tokenizer")
    stages: str = arg(
        "sft,recpo",
        f"comma-separated: raw (test the model as it is), sft, and any of {', '.join(PREFERENCE_LOSSES)}, each from the sft result",
        group="objective",
    )
    beta: float = arg(1.0, "strength of the KL anchor: reward = beta * log-ratio")
    margin_lambda: float = arg(2.0, "weight of the target margin in recpo; 0 is S-DPO")
    margin: str = arg("ratio", f"target margin of recpo: {', '.join(MARGINS)}")
    num_negatives: int = arg(3, "rejected titles per prompt (recpo, sdpo; the others take 1)")
    negative_source: str = arg(
        "both", "rejected titles are both, only random, or only follow(-ups)"
    )
    reference_free: bool = arg(
        False, "preference losses without a reference policy; simpo and cpo never have one"
    )
    label_smoothing: float = arg(0.0, "dpo: probability that a preference is the wrong way round")
    ipo_average: bool = arg(False, "ipo: log-probs as means over tokens instead of sums")
    simpo_gamma: float = arg(
        2.0, "simpo: target margin; gamma / beta between 0.25 and 1 is advised, the paper has 2"
    )
    odpo_offset: str = arg(
        "log_gap",
        "odpo: log_gap = log(chosen - rejected score), or log_ratio = log(chosen / rejected)",
    )
    odpo_alpha: float = arg(1.0, "odpo: weight of the offset")
    kto_desirable: float = arg(1.0, "kto: weight of chosen titles")
    kto_undesirable: float = arg(1.0, "kto: weight of rejected titles")
    sft_weight: float = arg(
        -1.0,
        "weight of the chosen title's mean NLL added to a preference loss; -1: 1 for cpo, else 0",
    )
    copy_steps: int = arg(
        0,
        "tiny models: at most so many steps of copying practice before SFT (see tiny.py); real models need none",
    )
    copy_weight: float = arg(
        0.0, "tiny models: weight of copying practice on the listed titles during SFT (see tiny.py)"
    )
    sft_epochs: float = arg(
        5.0, "epochs of the sft stage; a fraction is fine", group="optimisation"
    )
    epochs: float = arg(3.0, "epochs of a preference stage; a fraction is fine")
    max_steps: int = arg(0, "stop every stage after so many steps; 0 = off")
    batch_size: int = arg(128, "prompts per optimizer step, over all processes")
    micro_batch_tokens: int = arg(
        8192, "padded tokens of one forward pass per process; more only costs memory"
    )
    sft_learning_rate: float = arg(1e-5, "peak learning rate of the sft stage")
    learning_rate: float = arg(1e-5, "peak learning rate of a preference stage")
    warmup_ratio: float = arg(
        0.05, "share of the steps with rising learning rate; a cosine to 0 follows"
    )
    weight_decay: float = arg(0.0, "AdamW weight decay")
    adam_beta2: float = arg(0.999, "AdamW second-moment decay")
    max_grad_norm: float = arg(0.3, "clip the gradient's norm; 0 = off")
    shard: str = arg(
        "full",
        "full: split all weights over the processes; none: a replica each, faster where it fits; hybrid: see next",
    )
    shard_group_size: int = arg(
        0, "hybrid: processes that share one copy; 0 = those of a machine (LOCAL_WORLD_SIZE)"
    )
    gradient_checkpointing: bool = arg(
        False, "recompute each block in backward: less memory, about a third slower"
    )
    compile: bool = arg(
        False,
        "torch.compile the blocks: a minute or two of compilation, then fewer passes over memory",
    )
    max_length: int = arg(
        1024, "tokens of prompt and longest candidate; longer prompts lose their oldest history"
    )
    seed: int = arg(0, "seed of initial weights, batch order and dropout")
    decode: str = arg(
        "greedy",
        "how test answers are found: greedy (one pass), generate, trie",
        group="evaluation and output",
    )
    decode_rest: bool = arg(
        True, "generate an answer where no candidate verifies; off: count it invalid"
    )
    dry_run: bool = arg(
        False,
        "train nothing: show an example, first losses, memory of a rank and time of a step; needs no weights",
    )
    gpu_memory: float = arg(
        0.0, "dry run: GB of a device, for the largest micro-batch that fits; 0 = not asked"
    )
    tflops: float = arg(
        395.0, "dry run: achieved TFLOP/s of a device (395 is half of an H200's matrix rate)"
    )
    output_dir: str = arg("", "run folder; empty = the first unused of runs/<dataset>-1, -2, ...")
    save_steps: int = arg(
        100,
        "steps between checkpoints of a stage; 0 = only when a scheduler stops the run (SIGTERM)",
    )
    save_total_limit: int = arg(2, "checkpoints kept per stage")
    resume: str = arg(
        "",
        "auto: go on with the first unfinished stage of output_dir, from its newest whole checkpoint; or a checkpoint",
    )
    max_skipped_steps: int = arg(
        0,
        "steps with a loss or gradient that is not finite which may be left out; one more stops the run",
    )
    logging_steps: int = arg(10, "steps between printed lines; metrics.jsonl has every step")

    def __post_init__(self):
        super().__post_init__()
        stages = self.stage_list
        order = [s for s in ("raw", "sft") if s in stages]
        known = set(stages) <= {"raw", "sft", *PREFERENCE_LOSSES}
        if (
            not stages
            or len(set(stages)) < len(stages)
            or not known
            or stages[: len(order)] != order
        ):
            allowed = ", ".join(PREFERENCE_LOSSES)
            raise ValueError(
                f"--stages: raw and sft first (or not at all), then any of {allowed}, each once; got {self.stages!r}"
            )
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))
        if self.load_in_4bit and (self.lora_r == 0 or self.sft_lora_r == 0):
            raise ValueError(
                "--load_in_4bit freezes the base: it needs adapters in every stage, "
                "so neither --lora_r nor --sft_lora_r may be 0"
            )
        check_choice(self, "margin", MARGINS)
        check_choice(self, "negative_source", ("both", "random", "follow"))
        check_choice(self, "decode", ("greedy", "generate", "trie"))
        check_choice(self, "shard", ("full", "none", "hybrid"))
        if self.resume not in ("", "auto") and not Path(self.resume).is_dir():
            raise ValueError(f"--resume is auto or the folder of a checkpoint, got {self.resume!r}")
        if self.resume and not self.output_dir:
            raise ValueError("--resume needs --output_dir, the run folder to go on with")
        limits = {
            1: "num_negatives batch_size micro_batch_tokens logging_steps tiny_layers save_total_limit",
            0: "lora_r margin_lambda simpo_gamma odpo_alpha kto_desirable kto_undesirable max_steps copy_steps copy_weight max_grad_norm weight_decay save_steps "
            "max_skipped_steps shard_group_size",
        }
        for least, names in limits.items():
            for name in names.split():
                if getattr(self, name) < least:
                    raise ValueError(f"--{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("beta", "sft_epochs", "epochs", "sft_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}")
        if self.num_negatives > 19:
            raise ValueError(
                f"--num_negatives must be <= 19, got {self.num_negatives}: a list has 20 candidates"
            )
        check_choice(self, "odpo_offset", OFFSETS)
        if self.sft_weight < 0 and self.sft_weight != -1:
            raise ValueError(
                f"--sft_weight must be >= 0, or -1 for the loss's own, got {self.sft_weight}"
            )
        only = {  # options of one loss
            "label_smoothing": "dpo", "ipo_average": "ipo", "simpo_gamma": "simpo", "odpo_offset": "odpo", "odpo_alpha": "odpo",
            "kto_desirable": "kto", "kto_undesirable": "kto",
        }  # fmt: skip
        for name, loss in only.items():
            if (
                getattr(self, name) != type(self).__dataclass_fields__[name].default
                and loss not in stages
            ):
                raise ValueError(
                    f"--{name} belongs to {loss}, which is not among the stages {self.stages}"
                )
        if self.tiny_hidden_size % 64:
            raise ValueError(
                f"--tiny_hidden_size must be a multiple of 64, got {self.tiny_hidden_size}"
            )

    @property
    def stage_list(self) -> list[str]:
        return [s.strip() for s in self.stages.split(",") if s.strip()]


def stored_dtype(config: TrainConfig, device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)
