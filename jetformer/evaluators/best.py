"""Which checkpoint is the best one, by a metric of an evaluator (`train.keep_best`).

best.json in the workdir ranks the steps that have been evaluated, the best first:

    {"metric": "val/bits_per_dim", "mode": "lower", "ranking": [{"step": 400, "value": 5.94}, …]}

It is made of the evaluator's results, whoever evaluates: training or an evaluation job. The best checkpoint is that of
the first of these steps whose checkpoint is complete (`checkpoint.best`), so there is one while a better one is still
being written. Training does not delete it.
"""

import json
from collections.abc import Mapping

from upath import UPath

from jetformer.checkpoint import BEST_FILE, ranked
from jetformer.evaluators.base import RESULTS_FILE, directory_of
from jetformer.storage import write_whole


def evaluator_of(metric: str) -> str:
    """Returns the name of the evaluator that gives a metric, as "val" of "val_ema/bits_per_dim"."""
    return metric.partition("/")[0].removesuffix("_ema")


def values(workdir: UPath, metric: str) -> dict[int, float | None]:
    """Returns what has been recorded of a metric by step, in ascending order; None for what is not finite."""
    file = directory_of(workdir, evaluator_of(metric)) / RESULTS_FILE
    records = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {record["step"]: record[metric] for record in records if metric in record}


def rank(found: Mapping[int, float | None], mode: str) -> list[int]:
    """Returns the steps whose value is finite, the best first; of equal ones the earlier first.

    Args:
      found: see `values`.
      mode: which values are better, "lower" or "higher".
    """
    sign = 1 if mode == "lower" else -1
    return sorted((step for step in found if found[step] is not None), key=lambda step: (sign * found[step], step))


def evaluations_since_best(found: Mapping[int, float | None], mode: str) -> int:
    """Returns how many steps come after the best one, all if none has a finite value; arguments as in `rank`."""
    best = rank(found, mode)[:1]
    return sum(step > best[0] for step in found) if best else len(found)


def record(workdir: UPath, metric: str, mode: str) -> None:
    """Writes best.json.

    Results that another process adds meanwhile are seen after writing, and then it is written again.
    """
    written = None
    while True:
        found = values(workdir, metric)
        ranking = [{"step": step, "value": found[step]} for step in rank(found, mode)]
        text = json.dumps({"metric": metric, "mode": mode, "ranking": ranking}, indent=1)
        if text == written:
            return
        write_whole(workdir / BEST_FILE, text)
        written = text


def record_again(workdir: UPath) -> None:
    """Writes best.json of the results that are left, if it has a step.

    Raises:
      ValueError: if it is damaged.
    """
    if ranked(workdir):
        known = json.loads((workdir / BEST_FILE).read_text())
        record(workdir, known["metric"], known["mode"])
