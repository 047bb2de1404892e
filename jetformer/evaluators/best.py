"""Ranks checkpoints by a metric of an evaluator (`train.keep_best`).

best.json in the workdir ranks the evaluated steps, the best first:

    {"metric": "val/bits_per_dim", "mode": "lower", "ranking": [{"step": 400, "value": 5.94}, …]}

It is built from the evaluator's results, whether training or an evaluation job evaluates. The best checkpoint is that
of the first ranked step that has a complete one (`checkpoint.best`), so there is one even while a better one is being
written. Training does not delete it.
"""

import json
from collections.abc import Mapping

from upath import UPath

from jetformer.checkpoint import BEST_FILE, ranked
from jetformer.evaluators.results import RESULTS_FILE, directory_of
from jetformer.storage import write_whole


def evaluator_of(metric: str) -> str:
    """Returns the name of the evaluator that a metric belongs to, as "val" for "val_ema/bits_per_dim"."""
    return metric.partition("/")[0].removesuffix("_ema")


def values(workdir: UPath, metric: str) -> dict[int, float | None]:
    """Returns the recorded values of a metric by step, in ascending order; None for a value that is not finite."""
    file = directory_of(workdir, evaluator_of(metric)) / RESULTS_FILE
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {record["step"]: record[metric] for record in records if metric in record}


def rank(found: Mapping[int, float | None], mode: str) -> list[int]:
    """Returns the steps whose value is finite, the best first; of equal values the earlier step first.

    Args:
      found: see `values`.
      mode: which values are better, "lower" or "higher".
    """
    sign = 1 if mode == "lower" else -1
    return sorted((step for step in found if found[step] is not None), key=lambda step: (sign * found[step], step))


def evaluations_since_best(found: Mapping[int, float | None], mode: str) -> int:
    """Returns the number of steps after the best one; all, if no value is finite. Arguments as in `rank`."""
    best = rank(found, mode)[:1]
    return sum(step > best[0] for step in found) if best else len(found)


def write(workdir: UPath, metric: str, mode: str) -> None:
    """Writes best.json, and writes it again if another process has added results meanwhile."""
    written = None
    while True:
        found = values(workdir, metric)
        ranking = [{"step": step, "value": found[step]} for step in rank(found, mode)]
        text = json.dumps({"metric": metric, "mode": mode, "ranking": ranking}, indent=1)
        if text == written:
            return
        write_whole(workdir / BEST_FILE, text)
        written = text


def rewrite(workdir: UPath) -> None:
    """Writes best.json from the results that are left, by the metric that it names, if it ranks any step.

    Raises:
      ValueError: if it is damaged.
    """
    if ranked(workdir):
        known = json.loads((workdir / BEST_FILE).read_text())
        write(workdir, known["metric"], known["mode"])
