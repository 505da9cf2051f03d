"""The options of train.py: one frozen dataclass, from which the command line and --help are made."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common import arg, changed_options
from data import DataConfig
from examples import NUM_CANDIDATES
from lora import TARGET_MODULES
from losses import MARGINS, OFFSETS
from objectives import PAIRWISE, PREFERENCE_LOSSES, REFERENCE_FREE

PREFERENCE = frozenset(PREFERENCE_LOSSES)
READ_BY = {  # option of a loss -> the stages that read it
    "margin_lambda": {"recpo"},
    "margin": {"recpo"},
    "num_negatives": PREFERENCE - set(PAIRWISE),
    "negative_source": PREFERENCE,
    "reference_free": PREFERENCE - set(REFERENCE_FREE),
    "label_smoothing": {"dpo"},
    "ipo_average": {"ipo"},
    "simpo_gamma": {"simpo"},
    "odpo_offset": {"odpo"},
    "odpo_alpha": {"odpo"},
    "kto_desirable": {"kto"},
    "kto_undesirable": {"kto"},
}


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
    prompt_format: str = arg(
        "plain",
        "plain text, or chat: the prompt is the user's turn of the model's own chat template",
        choices=("plain", "chat"),
    )
    dtype: str = arg(
        "auto",
        "float32 or bfloat16; auto = bfloat16 on a GPU, float32 on CPU (adapters are float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    load_in_4bit: bool = arg(
        False, "frozen linear layers in 4 bits (NF4): a quarter of the memory, slower; LoRA only"
    )
    lora_r: int = arg(8, "LoRA rank; 0 = train all parameters", at_least=0)
    sft_lora_r: int = arg(
        -1, "LoRA rank of the sft stage; -1 = lora_r, 0 = all parameters", at_least=-1
    )
    lora_alpha: float = arg(32.0, "LoRA alpha; scaling = alpha / r", above=0)
    lora_dropout: float = arg(
        0.1, "dropout on the adapter's input, in the sft stage only", at_least=0, below=1
    )
    lora_target_modules: str = arg(
        ",".join(TARGET_MODULES), "comma-separated linear layers that get an adapter"
    )
    use_rslora: bool = arg(
        False, "scaling = alpha / sqrt(r); llama.cpp ignores it: merge before converting"
    )
    tiny_hidden_size: int = arg(128, "tiny model: width, a multiple of 64")
    tiny_layers: int = arg(4, "tiny model: blocks", at_least=1)
    tiny_vocab_size: int = arg(1024, "tiny model: tokens of its tokenizer", at_least=300)
    stages: str = arg(
        "sft,recpo",
        f"comma-separated: raw (test the model as it is), sft, and any of {', '.join(PREFERENCE_LOSSES)}, each from the sft result",
        group="objective",
    )
    beta: float = arg(1.0, "strength of the KL anchor: reward = beta * log-ratio", above=0)
    margin_lambda: float = arg(2.0, "weight of the target margin in recpo; 0 is S-DPO", at_least=0)
    margin: str = arg("ratio", f"target margin of recpo: {', '.join(MARGINS)}", choices=MARGINS)
    num_negatives: int = arg(
        3,
        "rejected titles per prompt (recpo, sdpo; the others take 1)",
        at_least=1,
        at_most=NUM_CANDIDATES - 1,
    )
    negative_source: str = arg(
        "both",
        "rejected titles are both, only random, or only follow(-ups)",
        choices=("both", "random", "follow"),
    )
    reference_free: bool = arg(
        False, "preference losses without a reference policy; simpo and cpo never have one"
    )
    label_smoothing: float = arg(
        0.0, "dpo: probability that a preference is the wrong way round", at_least=0, below=0.5
    )
    ipo_average: bool = arg(False, "ipo: log-probs as means over tokens instead of sums")
    simpo_gamma: float = arg(
        2.0,
        "simpo: target margin; gamma / beta between 0.25 and 1 is advised, the paper has 2",
        at_least=0,
    )
    odpo_offset: str = arg(
        "log_gap",
        "odpo: log_gap = log(chosen - rejected score), or log_ratio = log(chosen / rejected)",
        choices=OFFSETS,
    )
    odpo_alpha: float = arg(1.0, "odpo: weight of the offset", at_least=0)
    kto_desirable: float = arg(1.0, "kto: weight of chosen titles", at_least=0)
    kto_undesirable: float = arg(1.0, "kto: weight of rejected titles", at_least=0)
    sft_weight: float = arg(
        -1.0,
        "weight of the chosen title's mean NLL added to a preference loss; -1: 1 for cpo, else 0",
        at_least=-1,
    )
    copy_steps: int = arg(
        0,
        "tiny models: at most so many steps of copying practice before SFT (see tiny.py); real models need none",
        at_least=0,
    )
    copy_weight: float = arg(
        0.0,
        "tiny models: weight of copying practice on the listed titles during SFT (see tiny.py)",
        at_least=0,
    )
    sft_epochs: float = arg(
        5.0, "epochs of the sft stage; a fraction is fine", group="optimisation", above=0
    )
    epochs: float = arg(3.0, "epochs of a preference stage; a fraction is fine", above=0)
    max_steps: int = arg(0, "stop every stage after so many steps; 0 = off", at_least=0)
    batch_size: int = arg(128, "prompts per optimizer step, over all processes", at_least=1)
    micro_batch_tokens: int = arg(
        8192, "padded tokens of one forward pass per process; more only costs memory", at_least=1
    )
    sft_learning_rate: float = arg(1e-5, "peak learning rate of the sft stage", above=0)
    learning_rate: float = arg(1e-5, "peak learning rate of a preference stage", above=0)
    warmup_ratio: float = arg(
        0.05,
        "share of the steps with rising learning rate; a cosine to 0 follows",
        at_least=0,
        at_most=1,
    )
    weight_decay: float = arg(0.0, "AdamW weight decay", at_least=0)
    adam_beta2: float = arg(0.999, "AdamW second-moment decay", at_least=0, below=1)
    max_grad_norm: float = arg(0.3, "clip the gradient's norm; 0 = off", at_least=0)
    shard: str = arg(
        "full",
        "full: split all weights over the processes; none: a replica each, faster where it fits; hybrid: see next",
        choices=("full", "none", "hybrid"),
    )
    shard_group_size: int = arg(
        0,
        "hybrid: processes that share one copy; 0 = those of a machine (LOCAL_WORLD_SIZE)",
        at_least=0,
    )
    gradient_checkpointing: bool = arg(
        False, "recompute each block in backward: less memory, about a third slower"
    )
    compile: bool = arg(
        False,
        "torch.compile the blocks: a minute or two of compilation, then fewer passes over memory",
    )
    max_length: int = arg(
        1024,
        "tokens of prompt and longest candidate; longer prompts lose their oldest history",
        at_least=1,
    )
    seed: int = arg(0, "seed of initial weights, batch order and dropout")
    decode: str = arg(
        "greedy",
        "how test answers are found: greedy (one pass), generate, trie",
        group="evaluation and output",
        choices=("greedy", "generate", "trie"),
    )
    decode_rest: bool = arg(
        True, "generate an answer where no candidate verifies; off: count it invalid"
    )
    val_size: int = arg(
        200,
        "validation users (a sample) of the curves; 0 = none. One pass: what it does not verify is invalid",
        at_least=0,
    )
    eval_steps: int = arg(
        0, "steps between validations; 0 = only at the end of each stage", at_least=0
    )
    keep: str = arg(
        "last",
        "weights that a stage saves and tests: its last, or the best by validation hit_ratio@1",
        choices=("last", "best"),
    )
    dry_run: bool = arg(
        False,
        "train nothing: show an example, first losses, memory of a rank and time of a step; needs no weights",
    )
    gpu_memory: float = arg(
        0.0,
        "dry run: GB of a device, for the largest micro-batch that fits; 0 = not asked",
        at_least=0,
    )
    tflops: float = arg(
        395.0,
        "dry run: achieved TFLOP/s of a device (395 is half of an H200's matrix rate)",
        above=0,
    )
    output_dir: str = arg("", "run folder; empty = the first unused of runs/<dataset>-1, -2, ...")
    save_steps: int = arg(
        100,
        "steps between checkpoints of a stage; 0 = only when a scheduler stops the run (SIGTERM)",
        at_least=0,
    )
    save_total_limit: int = arg(2, "checkpoints kept per stage", at_least=1)
    resume: str = arg(
        "",
        "auto: go on with the first unfinished stage of output_dir, from its newest whole checkpoint; or a checkpoint",
    )
    max_skipped_steps: int = arg(
        0,
        "steps with a loss or gradient that is not finite which may be left out; one more stops the run",
        at_least=0,
    )
    logging_steps: int = arg(
        10, "steps between printed lines; metrics.jsonl has every step", at_least=1
    )

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
        if self.load_in_4bit and (self.lora_r == 0 or self.sft_lora_r == 0):
            raise ValueError(
                "--load_in_4bit freezes the base: it needs adapters in every stage, "
                "so neither --lora_r nor --sft_lora_r may be 0"
            )
        if self.resume not in ("", "auto") and not Path(self.resume).is_dir():
            raise ValueError(f"--resume is auto or the folder of a checkpoint, got {self.resume!r}")
        if self.resume and not self.output_dir:
            raise ValueError("--resume needs --output_dir, the run folder to go on with")
        if -1 < self.sft_weight < 0:
            raise ValueError(
                f"--sft_weight must be >= 0, or -1 for the loss's own, got {self.sft_weight}"
            )
        if self.keep == "best" and not (self.eval_steps and self.val_size):
            raise ValueError("--keep best needs --eval_steps and --val_size, by which it is found")
        if self.margin == "none" and "margin_lambda" in changed_options(self):
            raise ValueError("--margin_lambda has no effect with --margin none: leave one out")
        self.refuse_inert()
        if self.tiny_hidden_size % 64:
            raise ValueError(
                f"--tiny_hidden_size must be a multiple of 64, got {self.tiny_hidden_size}"
            )

    def refuse_inert(self) -> None:
        """ValueError for an option that no stage of this run reads."""
        for name in sorted(changed_options(self) & READ_BY.keys()):
            if not READ_BY[name] & set(self.stage_list):
                raise ValueError(
                    f"--{name} is read by {', '.join(sorted(READ_BY[name]))} alone, "
                    f"and none of them is among the stages {self.stages}: leave it out"
                )

    @property
    def stage_list(self) -> list[str]:
        return [s.strip() for s in self.stages.split(",") if s.strip()]


def stored_dtype(config: TrainConfig, device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)
