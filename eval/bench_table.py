"""The figures of `python eval/bench_index.py` as a short Markdown page."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """What :func:`.run_bench` returns -> the page; parts that were left out are left out."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Search",
        "",
        f"`{result['command']}`, seed {result['seed']}, {result['threads']} threads; {versions}.",
        "Two sides of a ratio ran in turns in one process; the best run of each counts. In brackets the ratio of the "
        "medians, and that of CPU seconds with one thread, which other work on the machine changes least: a bar counts "
        "as met when best runs and CPU seconds both meet it. nprobe is chosen on 500 queries, recall@20 is of 1,000 "
        "others; neither are in the index. "
        f"{_load(result)}",
        "",
        "| what | measured | bar | met |",
        "|---|---|---|---|",
    ]
    for name, title in (("geoclip_locations", "GeoCLIP's places, jittered"), ("views", "views")):
        if name in result:
            lines.append(_compared(title, result[name]))
    if "geoclip_gallery" in result:
        lines.append(_gallery(result["geoclip_gallery"]))
    if "build" in result:
        lines += [_built(result["build"]), *_plans(result["build"], result["plans"])]
    return "\n".join(lines) + "\n"


def _compared(title: str, of: dict[str, Any]) -> str:
    bar = of["bar"]
    return (
        f"| {title}: {of['rows']:,} x {of['dim']}, {of['factory']}, nprobe {of['nprobe']} | "
        f"recall@20 {of['recall@20']}, {of['queries_per_second']:,} queries/s, Flat {of['flat_queries_per_second']:,}: "
        f"{of['times_flat']} times ({of['times_flat_median']}; {of['times_flat_cpu_one_thread']} by CPU) | "
        f"{bar['recall@20']} at {bar['times_flat']:g} times | "
        f"{_met(of)} |"
    )


def _gallery(of: dict[str, Any]) -> str:
    return (
        f"| GeoCLIP's gallery of {of['places']:,}, seconds a photo | search {of['search_seconds']}, "
        f"in batches of 64 {of['search_seconds_in_batches_of_64']}; encoding it each time "
        f"{of['encode_and_search_seconds']}: {of['times_faster']} times ({of['times_faster_median']}), batched "
        f"{of['times_faster_batched']} | {of['bar']['times_faster']} times | {_met(of)} |"
    )


def _built(of: dict[str, Any]) -> str:
    return (
        f"| build of {of['rows']:,} x {of['dim']}, {of['factory']} | peak {of['peak_bytes'] / 1e9:.2f} GB, "
        f"{of['above_data_bytes'] / 1e9:.2f} GB above its data of {of['data_bytes'] / 1e9:.2f} GB; "
        f"{of['build_seconds']:.0f} s, of them training {of['train_seconds']:.0f}, adding {of['add_seconds']:.0f} | "
        f"{of['bar']['above_data_bytes'] / 1e9:g} GB | {_met(of)} |"
    )


def _plans(built: dict[str, Any], plans: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "Peak: the most that the building process ever had in memory (Python, libraries, index, mapped files). "
        "Its data: the projections in half precision, synthetic, with 16 degrees of freedom. "
        f"recall@20 {built['recall@20']} against an exact search by all three parts, at nprobe {built['effort']} "
        f"and with {built['refine']} times the rows wanted compared exactly; "
        f"{built['queries_per_second']:,} queries/s, {built['queries_per_second_of_faiss']:,} of FAISS alone.",
        "",
        "## A plan on paper",
        "",
        f"Rows of {built['dim']} numbers on this machine; embedding the photos is not counted.",
        "",
        "| rows | memory allowed | factory | index GB | disk GB | training h | adding h | queries/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for of in plans:
        lines.append(
            f"| {of['rows']:,} | {of['memory_gib']:g} GiB | {of['factory']} | {of['index_gb']:g} | {of['disk_gb']:g} | "
            f"{of['train_hours']:g} | {of['add_hours']:g} | {of['queries_per_second']:g} |"
        )
    return [
        *lines,
        "",
        "Computed: index (codes, row numbers, centers). "
        "Measured on 65,536 rows, with as many centers as the plan has lists: seconds to find a row's list, "
        "to encode it, to compare a query with a code. "
        "Measured in the build above: k-means, the exact comparison of what was found, bytes a row of the tables. "
        "Extrapolated: k-means in proportion to sample x lists; the training of OPQ and product codes from four rounds "
        "of k-means on 10,240 rows; adding and searching in proportion to rows, with the build's nprobe, lists as much "
        "longer as there are more rows a list, all in memory; disk is index, projections and rows (random digests, no "
        "place text). Real photos may need another nprobe, and product codes may find less than was asked: the build "
        "measures both.",
    ]


def _met(of: dict[str, Any]) -> str:
    return "yes" if of["met"] else "NO"


def _load(result: dict[str, Any]) -> str:
    loads = [of["load_average"] for of in result.values() if isinstance(of, dict) and "load_average" in of]
    return f"Load average at the measured parts: {', '.join(map(str, loads))}."
