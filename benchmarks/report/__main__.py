"""From result files to docs/benchmarks.md, its charts, and the README's pictures and table of methods.

python -m benchmarks.report                       writes docs/benchmarks.md, docs/charts, the README between markers
python -m benchmarks.report --compare OLD NEW     what became slower or larger; exit code 1 past --threshold
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import results
from benchmarks.report import budget, charts, frontier, page, readme, text
from benchmarks.report.devices import read_devices
from benchmarks.report.regressions import compare_files


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of result files")
    parser.add_argument("--docs", type=Path, default=results.ROOT / "docs", help="folder of benchmarks.md and charts/")
    parser.add_argument("--readme", type=Path, default=results.ROOT / "README.md")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two result files")
    parser.add_argument("--threshold", type=float, default=0.05, help="with --compare: share of growth (%(default)s)")
    parser.add_argument("--absolute", action="store_true", help="with --compare: milliseconds, not ratios to the floor")
    arguments = parser.parse_args(argv)
    if arguments.compare:
        return compare_files(*arguments.compare, arguments.threshold, arguments.absolute)
    devices = read_devices(arguments.results)
    drawn = {slug: charts.draw(device, arguments.docs / "charts") for slug, device in devices.items()}
    adapted = [
        (data, charts.draw_adaptation(slug, data, arguments.docs / "charts"))
        for slug, data in budget.load_folder(arguments.results)
    ]
    frontiers = [
        (files, charts.draw_frontier(slug, files, arguments.docs / "charts"))
        for slug, files in frontier.load_folder(arguments.results)
    ]
    arguments.docs.mkdir(parents=True, exist_ok=True)
    (arguments.docs / "benchmarks.md").write_text(page.document(devices, drawn, arguments.docs, adapted, frontiers))
    readme.draw_kept(devices, arguments.docs / "charts" / "memory.svg")
    studied = [data for files, _ in frontiers[:1] for data in files]
    readme.draw_shares(studied, arguments.docs / "charts" / "frontier.svg")
    refreshed = text.refresh(arguments.readme, readme.blocks(devices, [data for data, _ in adapted], studied))
    told = "README refreshed" if refreshed else "README lacks markers"
    print(f"{arguments.docs / 'benchmarks.md'}: {len(devices)} devices, {sum(map(len, drawn.values()))} charts; {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
