"""Tables and pictures from run folders: measured values with intervals, the paper's figure
beside, and which differences are real.

    python -m studies.report runs/planted-table                         into its folder report/
    python -m studies.report runs/planted-table --output_dir results/planted-table
    python -m studies.report runs/planted-table --measure all

--measure first measures, for every run, what is missing of probes, other lists and the whole
catalogue (studies.measure).

Every finished stage and baseline under the folder is a result. Results are one method, its
figures their mean, if their whole configuration but seed and paths is equal, that of the stage
they start from included; a method's name says what of its objective is not the paper's, and every
other option in which it differs from most of its kind. A seed counts once. All must have been
tested on the same users, candidates and targets; if not, the report refuses and names them.

Differences are paired over users and over the seeds that both methods have (seeds averaged
first); intervals resample users, so they say nothing of another seed: the number of training runs
stands beside each. Where a table asks several questions, Holm's correction holds for all of them
together. An interval that holds 0 is "not distinguishable".

Beside them: harder lists (studies.lists), the whole catalogue (studies.two_stage), coverage,
popularity and calibration of first places (studies.popularity), and K rejected titles side by side
(studies.negatives).

Writes report.md, report.html (one file with all pictures; tables are sorted by a click)
and, with matplotlib, methods.png, curves.png, margins.png and, where there are runs for them,
a picture of each swept option (margin_lambda, num_negatives, decay), inputs.png and length.png.

References: the paper's Tables 1 and 2 (LLaMA3-8B rows; they are other candidates and another
model: context, not a target)."""

import argparse
from dataclasses import fields
from pathlib import Path

import numpy as np

from common import run_cli
from loaders.frozen import DataConfig, find_prepared
from loaders.show import statistics
from studies.measure import MEASURED, measure_missing, wanted_kinds
from studies.methods import (
    Method,
    base_method,
    difference_of,
    grouped,
    mean_bins,
    probe_rows,
    same_seeds,
    shared_options,
    sweep,
)
from studies.page import page
from studies.paper import RESULTS
from studies.pictures import draw_all
from studies.probes import SPREAD_COLUMNS, spread_cells
from studies.results import Result, check_candidates, collect
from studies.sections import more_sections
from studies.statistics import bootstrap, judge, mcnemar, spread_of_bins
from train import PREFERENCE_LOSSES

MEASURES = ("hit_ratio@1", "valid_ratio", "ranking/hit_ratio@1")


def cell(method: Method, measure: str) -> str:
    low, high = bootstrap(method.per_user(measure))
    text = f"{method.mean(measure):.4f} [{low:.3f}, {high:.3f}]"
    if len(method.results) > 1:
        seeds = [f"{r.values[measure].mean():.3f}" for r in method.results]
        text += f" (seeds {', '.join(seeds)})"
    return text


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def best_other(method: Method, methods: dict[str, Method], measure: str) -> Method | None:
    others = [m for m in methods.values() if m is not method]
    return max(others, key=lambda m: m.mean(measure), default=None)


def versus_best(methods: dict[str, Method], measure: str) -> dict[str, str]:
    """Name -> the paired comparison with the best other method; Holm over all of them."""
    pairs = {m.name: best_other(m, methods, measure) for m in methods.values()}
    differences = {
        name: difference_of(methods[name], best, measure) for name, best in pairs.items() if best
    }
    judge(list(differences.values()))
    texts = {}
    for name, difference in differences.items():
        best = pairs[name]
        texts[name] = f"{difference} to {best.name}: {difference.verdict}"
        one, other = same_seeds(methods[name], best)
        if len(one.results) == len(other.results) == 1:
            p = mcnemar(one.results[0].values[measure], other.results[0].values[measure])
            texts[name] += f" (McNemar p {f'{p:.3f}' if p >= 0.001 else '< 0.001'}, uncorrected)"
    return texts


def printed_in_paper(method: Method, paper: dict) -> str:
    """HR@1 and ValidRatio of the paper's method of that name."""
    if method.name not in paper:
        return ""
    hit_ratio, valid_ratio = paper[method.name]
    return f"{hit_ratio:.4f}" if valid_ratio is None else f"{hit_ratio:.4f}, {valid_ratio:.4f}"


def main_table(methods: dict[str, Method], dataset: str) -> str:
    """Table 1: every method, compared in pairs with the best other one, and the paper's."""
    some = next(iter(methods.values())).results[0]
    paper = RESULTS.get(dataset, {})
    n = len(some.values["hit_ratio@1"])
    columns = ["method", "runs", "HR@1 written", "ValidRatio", "HR@1 ranked first"]
    columns += ["against the best other, ranked first"]
    columns += ["paper: HR@1, ValidRatio"] if paper else []
    rows = []
    for name, value in some.metrics["baselines"].items():
        rows.append([name, "", "", "", f"{value:.4f}", *[""] * (len(columns) - 5)])
    versus = versus_best(methods, MEASURES[-1])
    for name, method in methods.items():
        cells = [cell(method, measure) for measure in MEASURES]
        row = [name, str(len(method.results)), *cells, versus.get(name, "")]
        rows.append([*row, printed_in_paper(method, paper)] if paper else row)
    lines = [
        f"n = {n:,} test users, 20 candidates, the same for all "
        f"(hash {some.candidates['test'][:12]}).",
        "Runs: training runs, one seed each. Intervals resample users, not seeds;",
        f"those of the comparisons hold for all {len(versus)} of them together (Holm, 95 %).",
        *shared_lines([r for m in methods.values() for r in m.results]),
        *rate_lines(methods),
        *repeat_lines(methods),
        "",
        table(columns, rows),
    ]
    return "\n".join(lines)


def shared_lines(results: list[Result]) -> list[str]:
    shared = shared_options(results)
    text = ", ".join(f"{k} {v}" for k, v in shared.items())
    return [f"Options of all trained stages that are not the defaults: {text}."] if shared else []


def rate_lines(methods: dict[str, Method]) -> list[str]:
    """Learning rates of the preference methods, where they differ."""
    rates: dict[float, list[str]] = {}
    for name, method in methods.items():
        if method.stage in PREFERENCE_LOSSES:
            rates.setdefault(method.settings["learning_rate"], []).append(name)
    if len(rates) < 2:
        return []
    text = "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in rates.items())
    return [f"Learning rates: {text}."]


def repeat_lines(methods: dict[str, Method]) -> list[str]:
    repeats = [f"{r.folder} ({m.name}, seed {r.seed})" for m in methods.values() for r in m.repeats]
    if not repeats:
        return []
    return [f"Not counted, because that seed is there already: {'; '.join(repeats)}."]


def data_table(config: dict, data_hash: str) -> str:
    """Table 3: sizes of the data set here and in the paper, if its examples are at hand."""
    prepared = data_hash and find_prepared(config.get("prepared_dir", "prepared"), data_hash)
    if not prepared:
        return (
            f"The prepared examples {data_hash} are not at hand; "
            "`python -m loaders` prints their statistics."
        )
    known = {f.name for f in fields(DataConfig)}
    options = DataConfig(**{k: v for k, v in config.items() if k in known})
    lines = []
    for line in statistics(options, prepared).splitlines():
        in_table = not line or line.startswith("|")
        lines.append(line if in_table else f"- {line.strip()}")
    return "\n".join(lines)


def probe_tables(methods: dict[str, Method]) -> str:
    """The probes' rows, averaged over the runs of a method."""
    sizes = {}
    for method in methods.values():
        for result in method.results:
            sizes |= {probe: content["n"] for probe, content in result.probes.items()}
    lines = []
    for probe, n in sorted(sizes.items()):
        make_table = length_table if probe == "length" else figures_table
        text = make_table(probe_rows(methods, probe))
        lines += ["", f"**{probe}** (n = {n:,})", "", text]
    return "\n".join(lines)


def row_name(name: str, group: list[dict]) -> str:
    return name if len(group) == 1 else f"{name} (mean of {len(group)} runs)"


def figures_table(rows: dict[str, list[dict]]) -> str:
    first = next(iter(rows.values()))[0]
    figures = [key for key in first if not key.endswith("_ci95")]
    lines = []
    for name, group in rows.items():
        cells = []
        for key in figures:
            mean = np.mean([g[key] for g in group])
            intervals = [g[f"{key}_ci95"] for g in group]
            width = np.mean([high - low for low, high in intervals]) / 2
            cells.append(f"{mean:.4f}" if name == "chance" else f"{mean:.4f} ± {width:.3f}")
        lines.append([row_name(name, group), *cells])
    return table(["", *figures], lines)


def length_table(rows: dict[str, list[dict]]) -> str:
    some = next(iter(rows.values()))[0]
    columns = ["HR@1 by history length"]
    columns += [f"{name} (n = {entry['n']})" for name, entry in some["bins"].items()]
    columns += SPREAD_COLUMNS
    lines = []
    for name, group in rows.items():
        bins = mean_bins(group)
        spread = spread_of_bins(bins)
        cells = [
            f"{b['hit_ratio@1']:.3f} ± {1.96 * b['variance'] ** 0.5:.3f}" for b in bins.values()
        ]
        lines.append([row_name(name, group), *cells, *spread_cells(spread)])
    return table(columns, lines)


CLAIMS = (
    ("recpo", "sdpo"),
    ("sdpo", "sft"),
    ("recpo", "sft"),
    ("recpo", "dpo"),
    ("recpo", "simpo"),
)

PROBE_CLAIMS = (("adherence", "hit_ratio@1"), ("avoidance", "avoidance"))

HIT_RATIOS = ("hit_ratio@1", "ranking/hit_ratio@1")  # written, ranked first


def asked(methods: dict[str, Method]) -> list[tuple[str, Method, Method, tuple[str, ...]]]:
    """The paper's claims that these methods can answer: (text, better, worse, measures)."""
    base = {m.stage: base_method(methods, m.stage) for m in methods.values()}
    questions = []
    for better, worse in CLAIMS:
        if better in base and worse in base:
            a, b = base[better], base[worse]
            questions.append((f"HR@1 of {a.name} above {b.name}", a, b, HIT_RATIOS))
    ladder = sweep(methods, "margin_lambda")
    if len(ladder) > 2:
        (lowest, low), (highest, high) = ladder[0], ladder[-1]
        span = f"({lowest:g} to {highest:g})"
        questions.append((f"λ raises HR@1 {span}", high, low, HIT_RATIOS))
        questions.append((f"λ lowers ValidRatio {span}", low, high, ("valid_ratio",)))
    for probe, figure in PROBE_CLAIMS:
        measures = (f"{probe}/written", f"{probe}/ranked")
        for worse in ("sdpo", "sft"):
            a, b = base.get("recpo"), base.get(worse)
            if a and b and a.measured(measures[0]) and b.measured(measures[0]):
                questions.append((f"{probe} ({figure}) of {a.name} above {b.name}", a, b, measures))
    return questions


def claims(methods: dict[str, Method]) -> str:
    """The paper's claims, held, not held or not distinguishable; Holm over the whole table."""
    said = {"higher": "held", "lower": "not held", "not distinguishable": "not distinguishable"}
    answers = []
    for text, a, b, measures in asked(methods):
        answers.append((text, [difference_of(a, b, measure) for measure in measures]))
    family = [difference for _, differences in answers for difference in differences]
    judge(family)
    rows = []
    for text, differences in answers:
        cells = [f"{said[d.verdict]}: {d}" for d in differences]
        runs = " against ".join(str(n) for n in differences[0].runs)
        rows.append([text, runs, *cells, *[""] * (2 - len(cells))])
    if not rows:
        return ""
    return (
        "Paired over the same users. Training runs: those that stand behind each side "
        "(of the seeds that both have). "
        "Bootstrap intervals over users;\n"
        f"they do not cover another training run, and hold for all {len(family)} "
        "comparisons of this table together (Holm, 95 %).\n\n"
    ) + table(["claim of the paper", "training runs", "written", "ranked first"], rows)


def report_text(results: list[Result], note: str) -> str:
    """All of report.md but the pictures."""
    methods = grouped(results)
    config = results[0].config
    dataset = {"amazon": "amazon_books"}.get(config["dataset"], config["dataset"])
    hashes = sorted({r.metrics["data_hash"][:12] for r in results if "data_hash" in r.metrics})
    runs = len({r.run for r in results})
    parts = [f"# {config['dataset']}: methods compared"]
    if note:
        parts.append(note)
    parts.append(f"{len(results)} tested models in {runs} runs, data hash {', '.join(hashes)}.")
    parts += ["## Methods (the paper's Tables 1 and 2)", main_table(methods, dataset)]
    hashed = next((r for r in results if "data_hash" in r.metrics), results[0])
    table_3 = data_table(hashed.config, hashed.metrics.get("data_hash", "")[:12])
    parts += ["## Data (the paper's Table 3)", table_3]
    if probes := probe_tables(methods):
        parts += ["## Probes", probes]
    if verdicts := claims(methods):
        parts += ["## Claims", verdicts]
    return "\n\n".join(parts)


def picture_text(drawn: list[tuple[str, str]]) -> str:
    if not drawn:
        return "No pictures: matplotlib is not installed."
    parts = ["## Pictures"]
    for file, title in drawn:
        parts += [f"### {title}", f"![{title}]({file})"]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, help="folder of run folders, as studies.tables leaves it"
    )
    parser.add_argument("--output_dir", type=Path, help="default: FOLDER/report")
    parser.add_argument("--note", default="", help="a line for the top: command, machine, commit")
    parser.add_argument(
        "--measure",
        default="",
        help=f"first measure what is missing: all, or some of {', '.join(MEASURED)}",
    )
    args = parser.parse_args()
    wanted = wanted_kinds(args.measure)

    results = collect(args.folder)
    check_candidates(results)
    if wanted:
        measure_missing(results, wanted)
        results = collect(args.folder)
        check_candidates(results)
    folder, methods = args.output_dir or args.folder / "report", grouped(results)
    folder.mkdir(parents=True, exist_ok=True)
    more, drawn = more_sections(methods, folder)
    text = f"{report_text(results, args.note)}\n\n{more}"
    whole = f"{text}\n\n{picture_text(draw_all(methods, folder) + drawn)}\n"

    (folder / "report.md").write_text(whole)
    (folder / "report.html").write_text(page(whole, folder), encoding="utf-8")
    print(text)
    print(f"\nwritten to {folder / 'report.md'} and report.html")


if __name__ == "__main__":
    run_cli(main)
