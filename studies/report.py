"""The report of a folder of runs: figures with intervals, the paper's beside them, its findings.

    python -m studies.report runs/planted-table                         into its folder report/
    python -m studies.report runs/planted-table --measure all --output_dir results/planted-table

Every tested stage and baseline below the folder is a result. The table file (FOLDER/table.json,
which studies.tables leaves there, or --table) names its method; results of a method are averaged
over their seeds. All must have been tested on the same users and candidates. Differences are paired
over users, and over the seeds that both methods have; 95 % intervals resample users, so they do not
cover another training run. Holm's correction covers all questions of a table. --measure first
measures what is missing. Writes report.md and, with matplotlib, its pictures."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from common import read_json, run_cli, table
from loaders.frozen import DataConfig, Prepared, find_prepared
from loaders.show import statistics
from studies.methods import (
    NOT_THE_METHOD,
    Method,
    Result,
    base_method,
    collect,
    difference_of,
    grouped,
    of_one_seed,
    same_seeds,
    sweep,
)
from studies.paper import paper_figures
from studies.pictures import CURVES, draw_all
from studies.popularity import MEASURES, beyond_accuracy, catalogue_of
from studies.probes import KINDS, LAST_TWO, mean_bins, probe_table
from studies.statistics import holm, mcnemar, spread_of_bins, with_interval
from studies.tables import MEASURED, measure_missing
from studies.two_stage import MEASURES as PLACES
from studies.two_stage import catalogue_tables, gains
from train import TrainConfig

WRITTEN, RANKED, VALID = "hit_ratio@1", "ranking/hit_ratio@1", "valid_ratio"
TESTED = {WRITTEN: "HR@1 written", VALID: "ValidRatio", RANKED: "HR@1 ranked first"}


def cell(method: Method, measure: str) -> str:
    text = with_interval(method.per_user(measure))
    seeds = [f"{r.values[measure].mean():.3f}" for r in method.results]
    return f"{text} (seeds {', '.join(seeds)})" if len(seeds) > 1 else text


def with_runs(values: list[float], digits: int = 3) -> str:
    """The mean, and the lowest and highest run where there are several."""
    mean, low, high = (f"{f(values):.{digits}f}" if values else "" for f in (np.mean, min, max))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def versus_best(methods: dict[str, Method]) -> dict[str, str]:
    """Name -> the paired comparison with the best other method, ranked first; Holm over all."""
    pairs, texts = {}, {}
    for name, method in methods.items():
        if others := [m for m in methods.values() if m is not method]:
            best = max(others, key=lambda m: m.mean(RANKED))
            pairs[name] = best, difference_of(method, best, RANKED)
    holm([difference for _, difference in pairs.values()])
    for name, (best, difference) in pairs.items():
        texts[name] = f"{difference} to {best.name}: {difference.verdict}"
        if difference.runs == (1, 1):
            one, other = same_seeds(methods[name], best)
            p = mcnemar(one.per_user(RANKED), other.per_user(RANKED))
            texts[name] += f" (McNemar p {f'{p:.3f}' if p >= 0.001 else '< 0.001'}, uncorrected)"
    return texts


def methods_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    """Table 1: every method, compared in pairs with the best other one, and the paper's."""
    trained = [r for r in results if "stages" in r.config]
    paper = paper_figures(results[0].config, {r.config.get("model", "") for r in trained})
    versus, rows = versus_best(methods), []
    for name, value in results[0].metrics["baselines"].items():
        rows.append([name, "", "", "", f"{value:.4f}", "", ""])
    for name, method in methods.items():
        printed = ", ".join(f"{x:.4f}" for x in paper.get(name, ()) if x is not None)
        cells = [cell(method, measure) for measure in TESTED]
        rows.append([name, str(len(method.results)), *cells, versus.get(name, ""), printed])
    columns = ["method", "runs", *TESTED.values(), "against the best other, ranked first"]
    columns += ["paper: HR@1, ValidRatio"] if paper else []
    options = []  # of training that are not the defaults
    for option, default in asdict(TrainConfig()).items() if trained else ():
        values = {r.config.get(option, default) for r in trained}
        if option not in NOT_THE_METHOD and len(values) == 1 and default not in values:
            options.append(f"{option} {values.pop()}")
    rates: dict[float, list[str]] = {}
    for m in [m for m in methods.values() if m.results[0].steps]:
        rates.setdefault(m.config.get("learning_rate"), []).append(m.name)
    if len(rates) > 1:
        options += [f"learning_rate {x:g} for {', '.join(names)}" for x, names in rates.items()]
    lines = [
        f"n = {len(results[0].records):,} test users, 20 candidates, the same for all.",
        "Runs: training runs, one seed each. Intervals resample users, not seeds;",
        f"those of the comparisons hold for all {len(versus)} of them together (Holm, 95 %).",
    ]
    if options:
        lines.append(f"Options of training that are not the defaults: {', '.join(options)}.")
    return ["\n".join(lines), table(columns, [row[: len(columns)] for row in rows])]


def data_section(result: Result, prepared: Prepared | None) -> list[str]:
    """Table 3: sizes of the data set, if its examples are at hand."""
    if not prepared:
        return ["The prepared examples are not at hand; `python -m loaders` prints statistics."]
    known = {f.name for f in fields(DataConfig)}
    options = DataConfig(**{k: v for k, v in result.config.items() if k in known})
    lines = statistics(options, prepared).splitlines()
    shown = [line if not line or line[0] == "|" else f"- {line.strip()}" for line in lines]
    return ["\n".join(shown)]


def probes_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    """The figures of every probe, averaged over the runs of a method."""
    parts = []
    for probe in (*LAST_TWO, "length"):
        if content := next((r.measured[probe] for r in results if probe in r.measured), None):
            rows = {name: [found] for name, found in content["references"].items()}
            for m in methods.values():
                for how, shown in (("written", "written"), ("ranked", "ranked first")):
                    if runs := m.probed(probe, how):
                        rows[f"{m.name}; {shown}"] = runs
            parts += [f"**{probe}** (n = {content['n']:,})", probe_table(content, rows)]
    return parts


def both(probe: str, figure: str) -> tuple[str, str]:
    return f"{probe}/{figure}/written", f"{probe}/{figure}/ranked"


HIT_RATIOS = (WRITTEN, RANKED)
RIVALS = [("recpo", "sdpo"), ("recpo", "sft")]
INPUTS = [("all", True), ("positive", True), ("positive", False), ("all", False)]  # best first
# The paper's findings: a measure, and pairs of roles of which the first is higher. Each of the two
# tables is a family of Holm's.
FIRST = (
    ("HR@1", HIT_RATIOS, [("recpo", "sdpo"), ("sdpo", "sft"), ("recpo", "sft"), ("recpo", "dpo")]),
    ("HR@1", HIT_RATIOS, [("recpo", "simpo"), ("highest λ", "lowest λ")]),
    ("ValidRatio", (VALID,), [("lowest λ", "highest λ")]),
    ("adherence (HR@1)", both("adherence", "hit_ratio@1"), RIVALS),
    ("avoidance", both("avoidance", "avoidance"), RIVALS),
)
MORE = (
    ("HR@1", HIT_RATIOS, [("sdpo", "dpo"), ("dpo", "sft"), ("simpo", "sft")]),
    ("HR@1", HIT_RATIOS, [("recpo", other) for other in ("gru4rec", "caser", "sasrec")]),
    ("HR@1", HIT_RATIOS, [("log_diff", "best other LLM"), ("log_ratio", "best other LLM")]),
    ("HR@1", HIT_RATIOS, [("recpo", "log_diff"), ("recpo", "log_ratio")]),
    ("HR@1", HIT_RATIOS, list(zip(INPUTS, INPUTS[1:], strict=False))),
    ("ValidRatio", (VALID,), [("sft", "raw"), ("sft", "simpo"), ("dpo", "simpo")]),
    ("ValidRatio", (VALID,), [("sdpo", "simpo"), ("recpo", "simpo")]),
    ("HR@1 under temptation", both("temptation", "hit_ratio@1"), RIVALS),
    (
        "taking the tempting disliked title",
        both("temptation", "takes the disliked one"),
        [("sdpo", "recpo"), ("sft", "recpo")],
    ),
    ("aversion (naming the disliked title)", both("aversion", "hit_ratio@1"), RIVALS),
)


def roles_of(methods: dict[str, Method]) -> dict:
    """Role in the paper's findings -> the method that plays it here."""
    roles = dict(sweep(methods, "margin"))
    roles |= dict(sweep(methods, "history_items", "ratings", stage="sft"))
    ladder = of_one_seed(sweep(methods, "margin_lambda"))
    for role, end in (("lowest λ", 0), ("highest λ", -1)) if len(ladder) > 2 else ():
        value, method = ladder[end]
        roles[role] = Method(f"λ = {value:g}", method.results)
    for stage in {m.stage for m in methods.values()}:
        if base := base_method(methods, stage):
            roles[stage] = base
    if rest := [roles[stage] for stage in ("sft", "dpo", "simpo", "sdpo") if stage in roles]:
        roles["best other LLM"] = max(rest, key=lambda m: m.mean(WRITTEN))
    return roles


VERDICTS = {"higher": "held", "lower": "not held", "not distinguishable": "not distinguishable"}


def findings_table(asked: tuple, roles: dict) -> list[str]:
    """Held, not held or not distinguishable; Holm over the whole table."""
    rows, answers = [], []
    for what, measures, pairs in asked:
        for a, b in [(roles[a], roles[b]) for a, b in pairs if a in roles and b in roles]:
            if a.has(measures[0]) and b.has(measures[0]):
                answers.append([difference_of(a, b, measure) for measure in measures])
                runs = " against ".join(str(n) for n in answers[-1][0].runs)
                rows.append([f"{what} of {a.name} above {b.name}", runs])
    family = [difference for row in answers for difference in row]
    holm(family)
    for row, differences in zip(rows, answers, strict=True):
        cells = [f"{VERDICTS[d.verdict]}: {d}" for d in differences]
        row += [*cells, *[""] * (2 - len(cells))]
    columns = ["finding of the paper", "training runs", "written", "ranked first"]
    note = f"These {len(family)} comparisons hold together (Holm, 95 %)."
    return [note, table(columns, rows)] if rows else []


def stability_table(roles: dict) -> list[str]:
    """Does HR@1 of RecPO vary less over history lengths, by spread / mean (cv)?"""
    rows = []
    for a, b in [(roles[a], roles[b]) for a, b in RIVALS if a in roles and b in roles]:
        row = [f"HR@1 of {a.name} varies less with history length than that of {b.name}"]
        found = [r.measured["length"]["lengths"] for r in a.results if "length" in r.measured]
        for how in ("written", "ranked") if found and b.probed("length", "ranked") else ():
            runs = (m.probed("length", how) for m in (a, b))
            one, two = (spread_of_bins(mean_bins(found[0], outcomes)) for outcomes in runs)
            (low, high), (least, most) = one["cv_ci95"], two["cv_ci95"]
            verdict = "lower" if low > most else "not distinguishable"
            verdict = VERDICTS["higher" if high < least else verdict]
            text = f"{verdict}: {one['cv']:.3f} [{low:.3f}, {high:.3f}] against "
            row.append(f"{text}{two['cv']:.3f} [{least:.3f}, {most:.3f}]")
        rows += [row] if len(row) == 3 else []
    note = "Spread between fifths of the users beyond sampling / mean; held if intervals are apart."
    return [note, table(["finding of the paper", "written", "ranked first"], rows)] if rows else []


def findings_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    roles = roles_of(methods)
    tables = [*findings_table(FIRST, roles), *findings_table(MORE, roles), *stability_table(roles)]
    note = (
        "Paired over the same users. Training runs: those behind each side, of the seeds that both "
        "have. Intervals resample users; they do not cover another training run."
    )
    return [note, *tables] if tables else []


def lists_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    """HR@1 ranked first on every kind of list, if more than one was measured."""
    measures = {kind: f"{kind}/hit_ratio@1/ranked" for kind in KINDS}
    if sum(any(m.has(measure) for m in methods.values()) for measure in measures.values()) < 2:
        return []
    rules: dict[str, dict[str, str]] = {}
    for r in results:
        own = {rule: {"hit_ratio@1": value} for rule, value in r.metrics["baselines"].items()}
        found = {k: r.measured[k]["references"] for k in KINDS if k in r.measured}
        for kind, references in ({r.config.get("negatives", "uniform"): own} | found).items():
            for rule, row in references.items():
                rules.setdefault(rule, {})[kind] = f"{np.mean(row['hit_ratio@1']):.4f}"
    rows = [[rule, *(found.get(kind, "") for kind in KINDS)] for rule, found in rules.items()]
    for m in methods.values():
        cells = [with_interval(m.per_user(k)) if m.has(k) else "" for k in measures.values()]
        rows.append([m.name, *cells])
    text = (
        "HR@1 ranked first of the same users among 19 uniform, popular or retrieved items "
        "(Markov's best that the user never touched). Training is that of the run."
    )
    return [text, table(["method", *KINDS], rows)]


def catalogue_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    """Two-stage figures of every retriever."""
    parts, found = [], {name: c for r in results for name, c in r.measured.items() if "/" in name}
    for name, content in sorted(found.items()):
        fixed = {row: gains(np.array(places)) for row, places in content["places"].items()}
        alone, ranked = fixed.pop("retriever"), {}
        del fixed["model"]
        for m in [m for m in methods.values() if m.has(f"{name}/MRR")]:
            runs = sum(name in r.measured for r in m.results)
            row = f"+ {m.name}" + (f" (mean of {runs} runs)" if runs > 1 else "")
            ranked[row] = {measure: m.per_user(f"{name}/{measure}") for measure in PLACES}
        text = (
            f"**{name.split('/')[1]}** retrieves 20 of {content['items']:,} items for "
            f"{len(alone['MRR']):,} users; a column's differences hold together (Holm, 95 %):"
        )
        parts += [text, catalogue_tables(alone, ranked, fixed)]
    text = (
        "Where the target comes among all items that the history does not hold. A model ranks the "
        "20 items that a retriever puts first. The ceiling puts a retrieved target first always; "
        "the optimum is the best possible order of the 20."
    )
    return [text, *parts] if parts else []


def popularity_section(methods: dict[str, Method], prepared: Prepared | None) -> list[str]:
    catalogue, rows = catalogue_of(prepared) if prepared else None, []
    for name, method in methods.items():
        found = [beyond_accuracy(r, catalogue) for r in method.results]
        cells = [with_runs([f[measure] for f in found if measure in f], 4) for measure in MEASURES]
        rows.append([name, str(len(found)), *cells])
    text = (
        "First places of the test users, ranked by log-prob; popularity as training counts it, if "
        "the prepared examples are at hand. Means over runs (lowest to highest run)."
    )
    return [text, table(["method", "runs", *MEASURES.values()], rows)]


def negatives_section(methods: dict[str, Method], results: list[Result]) -> list[str]:
    """What K rejected titles do to answers, rewards and log-probs: a row for every K."""
    rows, trained = [], list(CURVES)[:5]
    for stage in ("recpo", "sdpo"):
        points = sweep(methods, "num_negatives", stage=stage)
        for k, method in points if len(points) > 1 else ():
            logs = [steps for r in method.results if (steps := r.steps)]
            logs = [steps[-max(1, round(len(steps) / 10)) :] for steps in logs]
            cells = [with_runs([r.values[key].mean() for r in method.results]) for key in TESTED]
            for key in trained:
                cells.append(with_runs([np.mean([s[key] for s in steps]) for steps in logs]))
            rows.append([stage, str(k), str(len(method.results)), *cells])
    text = (
        "K rejected titles per prompt. Means over runs (lowest to highest run); training figures "
        "are those of the last tenth of the steps."
    )
    columns = ["method", "K", "runs", *TESTED.values(), *(CURVES[key] for key in trained)]
    return [text, table(columns, rows)] if rows else []


def report_text(results: list[Result], note: str = "") -> str:
    """All of report.md but the pictures."""
    methods, some = grouped(results), results[0]
    data_hash = some.metrics["data_hash"]
    prepared = find_prepared(some.config.get("prepared_dir", "prepared"), data_hash)
    sections = {
        "Methods (the paper's Tables 1 and 2)": methods_section(methods, results),
        "Data (the paper's Table 3)": data_section(some, prepared),
        "Probes": probes_section(methods, results),
        "Findings of the paper": findings_section(methods, results),
        "Harder lists": lists_section(methods, results),
        "The whole catalogue": catalogue_section(methods, results),
        "Beyond accuracy": popularity_section(methods, prepared),
        "More negatives": negatives_section(methods, results),
    }
    runs = len({r.run for r in results})
    parts = [f"# {some.config['dataset']}: methods compared", *([note] if note else [])]
    parts.append(f"{len(results)} tested models in {runs} runs, data hash {data_hash[:12]}.")
    for title, content in sections.items():
        parts += [f"## {title}", *content] if content else []
    return "\n\n".join(parts)


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of run folders")
    parser.add_argument("--table", type=Path, help="table file; default: FOLDER/table.json")
    parser.add_argument("--output_dir", type=Path, help="default: FOLDER/report")
    parser.add_argument("--note", default="", help="a line for the top: command, machine, commit")
    what = f"what to measure first, if it is missing: all, or some of {', '.join(MEASURED)}"
    parser.add_argument("--measure", default="", help=what)
    args = parser.parse_args()
    if args.measure:
        measure_missing(args.folder, args.measure)
    file = args.table or args.folder / "table.json"
    results = collect(args.folder, read_json(file) if args.table or file.exists() else {})
    folder = args.output_dir or args.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    text, drawn = report_text(results, args.note), draw_all(grouped(results), folder)
    pictures = [f"### {title}\n\n![{title}]({file})" for file, title in drawn.items()]
    pictures = ["## Pictures", *pictures] if drawn else ["No pictures: matplotlib is missing."]
    (folder / "report.md").write_text("\n\n".join([text, *pictures]) + "\n")
    print(f"{text}\n\nwritten to {folder / 'report.md'}")


if __name__ == "__main__":
    run_cli(main)
