"""Write a report of a folder of runs: figures with intervals, and the paper's figures and findings.

    python -m studies.report runs/planted-table                         into its folder report/
    python -m studies.report runs/planted-table --measure all --output_dir results/planted-table

Every tested stage and baseline below the folder is a result; FOLDER/table.json (of studies.tables)
or --table names its method. All were tested on the same users and candidates. Figures are means
over seeds; differences are paired over users and shared seeds. 95 % intervals resample users, not
training runs; Holm's correction covers all questions of a table. --measure first measures what is
missing. Writes report.md, the table file and, with matplotlib, pictures."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import read_json, run_cli, table
from loaders.frozen import find_prepared
from loaders.show import statistics
from studies.methods import TESTED, Method, base_method, collect, difference_of, same_seeds, sweep
from studies.pictures import CURVES, draw_all
from studies.popularity import MEASURES, beyond_accuracy, catalogue_of
from studies.probes import HOW, KINDS, LAST_TWO, by_length, probe_table
from studies.statistics import holm, mcnemar, spread_of_bins, with_interval
from studies.tables import MEASURED, measure_missing
from studies.two_stage import MEASURES as PLACES
from studies.two_stage import catalogue_tables

Methods = dict[str, Method]
RANKED = "hit_ratio@1/ranked"
# The paper's figures: model family ("" for sequential recommenders), method, data set -> HR@1 and
# ValidRatio of Tables 1 and 2. Its findings: what, figure, and pairs of roles, of which the first
# is higher; Holm's correction covers each of the two lists.
PAPER = read_json(Path(__file__).with_name("paper.json"))


def paper_figures(config: dict, models: set[str]) -> dict[str, list[float]]:
    """Map methods to the paper's figures for this data set and the models' family.
    The paper's MovieLens is ml-1m only, its Amazon is Books only."""
    dataset, place = config["dataset"], Path(config.get("data_dir") or "none given")
    files = " ".join([place.name, *(f.name for f in place.glob("*"))]).lower()
    wanted = {"movielens": "ml-1m", "amazon": "books"}.get(dataset, "")
    names, found = " ".join(Path(model).name.lower() for model in models), {}
    for family, rows in PAPER["figures"].items():
        if wanted in files and family in names:
            found |= {method: row[dataset] for method, row in rows.items() if dataset in row}
    return found


def with_runs(values: list[float], digits: int = 3) -> str:
    """The mean, and the lowest and highest run if there are several."""
    mean, low, high = (f"{f(values):.{digits}f}" if values else "" for f in (np.mean, min, max))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def methods_section(methods: Methods, results: list) -> list[str]:
    """Table 1: every method, its paired difference to the best other one, and the paper's."""
    models = {r.config.get("model", "") for r in results if "stages" in r.config}
    paper, best, versus = paper_figures(results[0].config, models), {}, {}
    for name, method in methods.items():
        if others := [m for m in methods.values() if m is not method]:
            best[name] = max(others, key=lambda m: m.per_user(RANKED).mean())
            versus[name] = difference_of(method, best[name], RANKED)
    holm(list(versus.values()))
    columns = ["method", "runs", *TESTED.values(), "against the best other, ranked first"]
    columns += ["paper: HR@1, ValidRatio"] * bool(paper)
    baselines = results[0].metrics["baselines"].items()
    rows = [[name, "", "", "", f"{value:.4f}", "", ""] for name, value in baselines]
    for name, method in methods.items():
        row = [name, str(len(method.results))]
        for measure in TESTED:
            seeds = [f"{r.values[measure].mean():.3f}" for r in method.results]
            beside = f" (seeds {', '.join(seeds)})" if len(seeds) > 1 else ""
            row.append(with_interval(method.per_user(measure)) + beside)
        compared = ""
        if found := versus.get(name):
            compared = f"{found} to {best[name].name}: {found.verdict}"
            if found.runs == (1, 1):
                p = mcnemar(*(m.per_user(RANKED) for m in same_seeds([method, best[name]])))
                compared += f" (McNemar p {f'{p:.3f}' if p >= 0.001 else '< 0.001'}, uncorrected)"
        printed = ", ".join(f"{x:.4f}" for x in paper.get(name, ()))
        rows.append([*row, compared, printed])
    text = (
        f"{len(results[0].records):,} test users, 20 candidates, the same for all. Runs differ in "
        "their seed; options: table.json. Intervals resample users, not seeds; the verdicts of the "
        f"{len(versus)} comparisons hold together (Holm, 95 %)."
    )
    return [text, table(columns, [row[: len(columns)] for row in rows])]


def data_section(prepared) -> list[str]:
    """Table 3: sizes of the data set, if its prepared examples are found."""
    if not prepared:
        return ["The prepared examples are not at hand; `python -m loaders` prints statistics."]
    return ["\n".join(f"- {line}" for line in statistics(prepared))]


def probes_section(methods: Methods, measured: dict) -> list[str]:
    """The figures of every probe, averaged over the runs of a method."""
    parts = []
    for probe in (*LAST_TWO, "length"):
        if content := measured.get(probe):
            rows = {name: [found] for name, found in content["references"].items()}
            for m in methods.values():
                for how, shown in HOW.items():
                    if runs := m.probed(probe, how):
                        rows[f"{m.name}; {shown}"] = runs
            parts += [f"**{probe}** (n = {content['n']:,})", probe_table(content, rows)]
    return parts


VERDICTS = {"higher": "held", "lower": "not held", "not distinguishable": "not distinguishable"}


def roles_of(methods: Methods) -> dict:
    """Map each role in the paper's findings to the method that has it here."""
    roles = dict(sweep(methods, "margin"))
    for (items, rated), m in sweep(methods, "history_items", "ratings", stage="sft"):
        roles[f"{items}, {'ratings' if rated else 'no ratings'}"] = m
    ladder = sweep(methods, "margin_lambda")
    if len(ladder) > 2:
        values, rungs = zip(*ladder, strict=True)
        rungs = same_seeds(rungs)
        for role, end in (("lowest λ", 0), ("highest λ", -1)):
            roles[role] = replace(rungs[end], name=f"λ = {values[end]:g}")
    for stage in {m.stage for m in methods.values()}:
        if base := base_method(methods, stage):
            roles[stage] = base
    if rest := [roles[stage] for stage in ("sft", "dpo", "simpo", "sdpo") if stage in roles]:
        roles["best other LLM"] = max(rest, key=lambda m: m.per_user("hit_ratio@1/written").mean())
    return roles


def stability_table(roles: dict, lengths: list[int]) -> list[str]:
    """Test whether RecPO's HR@1 varies less over history lengths, by spread / mean (cv)."""
    rows, recpo = [], roles.get("recpo")
    for other in [roles[stage] for stage in ("sdpo", "sft") if recpo and stage in roles]:
        row = [f"HR@1 of {recpo.name} varies less with history length than that of {other.name}"]
        for how in HOW:
            runs = [m.probed("length", how) for m in (recpo, other)]
            if all(runs):
                one, two = (spread_of_bins(by_length(lengths, found)) for found in runs)
                (low, high), (least, most) = one["cv_ci95"], two["cv_ci95"]
                verdict = "not held" if low > most else "not distinguishable"
                verdict = "held" if high < least else verdict
                text = f"{verdict}: {one['cv']:.3f} [{low:.3f}, {high:.3f}] against "
                row.append(f"{text}{two['cv']:.3f} [{least:.3f}, {most:.3f}]")
        rows += [row] if len(row) > 1 else []
    note = "Spread between fifths of the users beyond sampling / mean; held if intervals are apart."
    return [note, table(["finding of the paper", *HOW.values()], rows)] if rows else []


def findings_section(methods: Methods, measured: dict) -> list[str]:
    """The findings: held, not held or not distinguishable, with Holm's correction per list."""
    roles, parts = roles_of(methods), []
    for asked in PAPER["findings"]:
        rows, answers = [], []
        for what, figure, pairs in asked:
            measures = [f"{figure}/{how}" for how in HOW]
            for a, b in [(roles[a], roles[b]) for a, b in pairs if a in roles and b in roles]:
                if found := [difference_of(a, b, m) for m in measures if a.has(m) and b.has(m)]:
                    runs = " against ".join(str(n) for n in found[0].runs)
                    rows.append([f"{what} of {a.name} above {b.name}", runs])
                    answers.append(found)
        family = [difference for row in answers for difference in row]
        holm(family)
        for row, differences in zip(rows, answers, strict=True):
            cells = [f"{VERDICTS[d.verdict]}: {d}" for d in differences]
            row += [*cells, *[""] * (len(HOW) - len(cells))]
        columns = ["finding of the paper", "training runs", *HOW.values()]
        note = f"These {len(family)} comparisons hold together (Holm, 95 %)."
        parts += [note, table(columns, rows)] if rows else []
    if "length" in measured:
        parts += stability_table(roles, measured["length"]["lengths"])
    note = "Paired over the same users, and over the training runs of the seeds that both have."
    return [note, *parts] if parts else []


def lists_section(methods: Methods, measured: dict) -> list[str]:
    """HR@1 ranked first on every kind of list, if more than one was measured."""
    kinds = [kind for kind in KINDS if kind in measured]
    means: dict[str, dict[str, str]] = {}
    for kind in kinds:
        for rule, row in measured[kind]["references"].items():
            means.setdefault(rule, {})[kind] = f"{np.mean(row['hit_ratio@1']):.4f}"
    rows = [[rule, *(found.get(kind, "") for kind in KINDS)] for rule, found in means.items()]
    for m in methods.values():
        measures = [f"{kind}/{RANKED}" for kind in KINDS]
        cells = [with_interval(m.per_user(k)) if m.has(k) else "" for k in measures]
        rows.append([m.name, *cells])
    text = "HR@1 ranked first of the same users among 19 uniform, popular or retrieved items."
    return [text, table(["method", *KINDS], rows)] if len(kinds) > 1 else []


def catalogue_section(methods: Methods, measured: dict) -> list[str]:
    """Two-stage figures of every retriever."""
    parts = []
    for name in sorted(name for name in measured if "/" in name):
        content, ranked = measured[name], {}
        for m in [m for m in methods.values() if m.has(f"{name}/MRR")]:
            runs = sum(name in r.measured for r in m.results)
            row = f"+ {m.name}" + (f" (mean of {runs} runs)" if runs > 1 else "")
            ranked[row] = {measure: m.per_user(f"{name}/{measure}") for measure in PLACES}
        text = (
            f"**{name.split('/')[1]}** retrieves 20 of {content['items']:,} items for "
            f"{len(content['places']['retriever']):,} users (differences: Holm in each column):"
        )
        parts += [text, catalogue_tables(content["places"], ranked)]
    text = (
        "The target's place among all items that the history does not hold; a model ranks the 20 "
        "retrieved ones. Ceiling: a retrieved target is always first; optimum: the best order."
    )
    return [text, *parts] if parts else []


def popularity_section(methods: Methods, prepared) -> list[str]:
    catalogue, rows = catalogue_of(prepared) if prepared else None, []
    for name, method in methods.items():
        found = [beyond_accuracy(r, catalogue) for r in method.results]
        cells = [with_runs([f[measure] for f in found if measure in f], 4) for measure in MEASURES]
        rows.append([name, str(len(found)), *cells])
    text = "What is ranked first; popularity is that in training. Mean (lowest to highest) run."
    return [text, table(["method", "runs", *MEASURES.values()], rows)]


def training_section(methods: Methods) -> list[str]:
    """Where preference training ended: loss, rewards and log-probs."""
    rows = []
    for m in methods.values():
        ends = [r.steps[-max(1, round(len(r.steps) / 10)) :] for r in m.results if r.steps]
        cells = [with_runs([np.mean([s[key] for s in end]) for end in ends]) for key in CURVES]
        rows += [[m.name, str(len(ends)), *cells]] if ends else []
    text = "Means of the last tenth of the steps. Mean (lowest to highest) run."
    return [text, table(["method", "runs", *CURVES.values()], rows)] if rows else []


def report_text(methods: Methods, note: str = "") -> str:
    """The text of report.md, without the pictures."""
    results = [r for m in methods.values() for r in m.results]
    config, facts = results[0].config, results[0].metrics
    # references and lengths are the same in all runs
    measured = {name: content for r in results for name, content in r.measured.items()}
    own = {name: {"hit_ratio@1": mean} for name, mean in facts["baselines"].items()}
    measured[config.get("negatives", "uniform")] = {"references": own}
    prepared = find_prepared(config.get("prepared_dir", "prepared"), facts["data_hash"])
    sections = {
        "Methods (the paper's Tables 1 and 2)": methods_section(methods, results),
        "Data (the paper's Table 3)": data_section(prepared),
        "Probes": probes_section(methods, measured),
        "Findings of the paper": findings_section(methods, measured),
        "Harder lists": lists_section(methods, measured),
        "The whole catalogue": catalogue_section(methods, measured),
        "Beyond accuracy": popularity_section(methods, prepared),
        "The end of preference training": training_section(methods),
    }
    parts = [f"# {config['dataset']}: methods compared", *([note] if note else [])]
    runs = f"{len(results)} tested models in {len({r.run for r in results})} runs"
    parts.append(f"{runs}, data hash {facts['data_hash'][:12]}.")
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
    described = read_json(file) if args.table or file.exists() else {}
    methods, folder = collect(args.folder, described), args.output_dir or args.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    text, drawn = report_text(methods, args.note), draw_all(methods, folder)
    pictures = [f"### {title}\n\n![{title}]({file})" for file, title in drawn.items()]
    pictures = ["## Pictures", *pictures] if drawn else ["No pictures: matplotlib is missing."]
    (folder / "table.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    (folder / "report.md").write_text("\n\n".join([text, *pictures]) + "\n")
    print(f"{text}\n\nwritten to {folder / 'report.md'}")


if __name__ == "__main__":
    run_cli(main)
